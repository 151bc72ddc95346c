"""The block grid: which pixels a block covers. Plain integers, no arrays, no device."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

#: Bound on sizes, offsets and strides: sums of two of them still fit the kernels' 64-bit integers.
_LIMIT = 2**62
_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class Axis:
    """One axis of a block grid, reduced to the blocks that touch an image of ``extent`` pixels.

    Block ``first + k`` covers pixels ``start + k*stride ... + size`` for ``0 <= k < count``; every other
    block lies wholly outside of the image. With these numbers an index of any value is either told
    to be outside, or placed without overflow.
    """

    first: int
    count: int
    start: int
    stride: int
    size: int
    extent: int

    def span(self, index: int) -> tuple[int, int]:
        """Pixels ``[begin, end)`` of block `index`, not clipped; an empty span where it misses the image."""
        k = index - self.first
        if not 0 <= k < self.count:
            return 0, 0
        begin = self.start + k * self.stride
        return begin, begin + self.size

    def clip(self, index: int) -> tuple[slice, slice]:
        """In-image part of block `index`: as a slice of the image, and as a slice of the block."""
        begin, end = self.span(index)
        low, high = max(begin, 0), min(end, self.extent)
        return slice(low, high), slice(low - begin, high - begin)


class BlockGrid(NamedTuple):
    """Size, offset and stride of the blocks, each a pair (height, width) in pixels."""

    bsize: tuple[int, int]
    boffset: tuple[int, int]
    bstride: tuple[int, int]

    @property
    def overlaps(self) -> bool:
        """Whether neighbouring blocks share pixels."""
        return self.bsize[0] > self.bstride[0] or self.bsize[1] > self.bstride[1]

    def axes(self, height: int, width: int) -> tuple[Axis, Axis]:
        """The grid's two axes over an image of `height` x `width` pixels."""
        return self._axis(0, height), self._axis(1, width)

    def _axis(self, k: int, extent: int) -> Axis:
        size, offset, stride = self.bsize[k], self.boffset[k], self.bstride[k]
        # Block i touches [0, extent) when offset + i*stride > -size and offset + i*stride < extent.
        first = max((-size - offset) // stride + 1, _INT32_MIN)
        last = min((extent - 1 - offset) // stride, _INT32_MAX)
        count = max(0, last - first + 1) if extent else 0
        start = offset + first * stride if count else 0
        return Axis(first if count else 0, count, start, stride, size, extent)


def parse_pair(name: str, value: Sequence[int], *, minimum: int | None = None) -> tuple[int, int]:
    """`value` as two integers ``(height, width)``, each at least `minimum`; `name` is for the error."""
    wanted = "two integers (height, width)"
    if minimum is not None:
        wanted += f", each >= {minimum}"
    try:
        pair = tuple(_integer(v) for v in value)
    except TypeError:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}") from None
    if len(pair) != 2 or (minimum is not None and min(pair) < minimum):
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    if max(map(abs, pair)) >= _LIMIT:
        raise ValueError(f"{name}: expected {wanted}, below 2**62 in magnitude, got {value!r}")
    return pair


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("a bool is not a size")
    return operator.index(value)


def parse_grid(bsize: Sequence[int], boffset: Sequence[int], bstride: Sequence[int]) -> BlockGrid:
    """A validated :class:`BlockGrid` from what a caller passed."""
    try:
        (bh, bw), (oh, ow), (sh, sw) = bsize, boffset, bstride
        return _parse_numbers(bh, bw, oh, ow, sh, sw)
    except (TypeError, ValueError):  # wrong in form or in value, or unhashable: say which
        return BlockGrid(
            parse_pair("bsize", bsize, minimum=1),
            parse_pair("boffset", boffset),
            parse_pair("bstride", bstride, minimum=1),
        )


# Typed, because 1, 1.0 and True are equal, and only the first is a size.
@functools.lru_cache(maxsize=256, typed=True)
def _parse_numbers(bh: Any, bw: Any, oh: Any, ow: Any, sh: Any, sw: Any) -> BlockGrid:
    return BlockGrid(
        parse_pair("bsize", (bh, bw), minimum=1),
        parse_pair("boffset", (oh, ow)),
        parse_pair("bstride", (sh, sw), minimum=1),
    )
