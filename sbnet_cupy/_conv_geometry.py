"""Where convolutions read and write, dense and in blocks. Plain integers, no arrays, no device.

A chain of convolutions is one convolution with the chain's receptive field as its kernel: that gives the blocks of its
input and the tiles of its output. In between, each convolution has a block grid of its own, on the image that the dense
network would have there.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ._geometry import BlockGrid, parse_pair

Pair = tuple[int, int]
#: What a caller may pass as padding: a rule, or ((top, bottom), (left, right)).
Padding = str | Sequence[Sequence[int]]

_RULES = ("SAME", "VALID")


@dataclass(frozen=True)
class BlockParams:
    """Blocks of a convolution, or of a chain of them, as pairs (height, width).

    Gather with ``bsize``, ``boffset`` and ``bstrides``; scatter with ``bsize_out``, offset (0, 0) and stride
    ``bsize_out``: output tiles lie side by side.

    Made by :func:`calc_block_params` and :func:`calc_block_params_res_block`.

    Attributes
    ----------
    bsize : (int, int)
        Pixels of an input block, halo included.
    bsize_out : (int, int)
        Pixels of an output tile.
    boffset : (int, int)
        Input pixel at which block (0, 0) begins: the padding before the image, negated.
    bcount : (int, int)
        Number of blocks.
    bstrides : (int, int)
        Distance between input blocks.
    """

    bsize: Pair
    bsize_out: Pair
    boffset: Pair
    bcount: Pair
    bstrides: Pair

    def __post_init__(self) -> None:
        for name, minimum in (("bsize", 1), ("bsize_out", 1), ("boffset", None), ("bcount", 0), ("bstrides", 1)):
            object.__setattr__(self, name, parse_pair(name, getattr(self, name), minimum=minimum))

    @property
    def grid_in(self) -> BlockGrid:
        """The grid of the input blocks."""
        return BlockGrid(self.bsize, self.boffset, self.bstrides)

    @property
    def grid_out(self) -> BlockGrid:
        """The grid of the output tiles."""
        return BlockGrid(self.bsize_out, (0, 0), self.bsize_out)


class Layer(NamedTuple):
    """One convolution on an image of a known size; pairs (height, width)."""

    in_size: Pair
    ksize: Pair
    strides: Pair
    pad_before: Pair
    pad_after: Pair
    out_size: Pair


def valid_size(size: Pair, ksize: Pair, strides: Pair) -> Pair:
    """Pixels that a convolution without padding leaves."""
    return _each(lambda n, k, s: max(0, (n - k) // s + 1), size, ksize, strides)


def calc_block_params(
    in_size: Sequence[int],
    bsize: Sequence[int],
    ksize: Sequence[int],
    strides: int | Sequence[int],
    padding: Padding,
) -> BlockParams:
    """Blocks for one convolution.

    Parameters
    ----------
    in_size : (N, H, W, C)
        Shape of the image tensor. Only H and W matter.
    bsize : (int, int), or [1, height, width, 1]
        Pixels of a block, halo included.
    ksize : (int, int), or [height, width, C, K]
        Kernel size.
    strides : int, (int, int), or [1, height, width, 1]
        Strides of the convolution.
    padding : 'SAME', 'VALID' or ((top, bottom), (left, right))
        ``'SAME'`` is TensorFlow's: ``ceil(size / stride)`` output pixels, and where the padding is odd, the larger
        part of it behind the image.

    Returns
    -------
    BlockParams
        With kernel k and stride s along an axis: ``bstrides = bsize - k + s``, ``bsize_out = (bsize - k)//s + 1``,
        ``boffset = -pad_before`` and ``bcount = ceil(out_size / bsize_out)``.

    Raises
    ------
    ValueError
        An argument of another form, or a block that does not hold a whole number of kernel positions
        (``bsize < k`` or ``(bsize - k) % s != 0``): the message names the nearest sizes that do.
    """
    return block_params([parse_layer(in_size, ksize, strides, padding)], parse_size("bsize", bsize))


def calc_block_params_res_block(
    in_size: Sequence[int],
    bsize: Sequence[int],
    ksize_list: Sequence[Sequence[int]],
    strides: int | Sequence[Any],
    padding: Padding | Sequence[Padding],
) -> BlockParams:
    """Blocks for a chain of convolutions, such as a residual block.

    The chain has the receptive field ``k = 1 + sum((k_i - 1) * s_1 * ... * s_(i-1))`` and the stride
    ``s = s_1 * s_2 * ...``, and its blocks are those of one convolution with that kernel and stride. Its padding is
    what the convolutions' own paddings add up to.

    Parameters
    ----------
    in_size, bsize
        As in :func:`calc_block_params`.
    ksize_list : sequence of (int, int), or of [height, width, C, K]
        Kernel sizes, first convolution first.
    strides : int, (int, int), [1, height, width, 1], or a sequence of pairs or of 4-lists
        A sequence gives one for each convolution. A single stride is that of the second of three
        convolutions, where a bottleneck has it, and of the first in any other chain.
    padding : 'SAME', 'VALID', or a sequence with a padding for each convolution
        Each convolution pads its own input, as in the dense network.

    Returns
    -------
    BlockParams
        As in :func:`calc_block_params`.

    Raises
    ------
    ValueError
        As in :func:`calc_block_params`.
    """
    return block_params(parse_chain(in_size, ksize_list, strides, padding), parse_size("bsize", bsize))


def block_params(layers: Sequence[Layer], bsize: Pair) -> BlockParams:
    """The blocks of a chain of convolutions."""
    k, s, pad = _receptive_field(layers)
    for axis in range(2):
        _check_block(axis, bsize[axis], k[axis], s[axis])
    bsize_out = valid_size(bsize, k, s)
    return BlockParams(
        bsize=bsize,
        bsize_out=bsize_out,
        boffset=(-pad[0], -pad[1]),
        bcount=_each(lambda n, b: -(-n // b), layers[-1].out_size, bsize_out),
        bstrides=_each(lambda b, k, s: b - k + s, bsize, k, s),
    )


@functools.lru_cache(maxsize=1024)
def stack_grids(layers: tuple[Layer, ...], params: BlockParams) -> list[BlockGrid]:
    """Grid of the stack that each convolution of a chain reads, on its own input image; and that of the last output.

    Pixel q of a convolution's output is computed from its input's pixels from ``q*s - pad_before`` on. A block that
    begins at input pixel p so begins at output pixel ``(p + pad_before) / s``.
    """
    grids = [params.grid_in]
    for layer in layers:
        grid, s = grids[-1], layer.strides
        begin = _each(lambda p, pad, s: (p + pad) // s, grid.boffset, layer.pad_before, s)
        step = _each(operator.floordiv, grid.bstride, s)
        grids.append(BlockGrid(valid_size(grid.bsize, layer.ksize, s), begin, step))
    return grids


def _receptive_field(layers: Sequence[Layer]) -> tuple[Pair, Pair, Pair]:
    """Kernel size, stride and padding before the image of the one convolution that a chain is."""
    k, s, pad = (1, 1), (1, 1), (0, 0)
    for layer in layers:
        k = _each(lambda k, s, own: k + s * (own - 1), k, s, layer.ksize)
        pad = _each(lambda pad, s, own: pad + s * own, pad, s, layer.pad_before)
        s = _each(operator.mul, s, layer.strides)
    return k, s, pad


def _check_block(axis: int, b: int, k: int, s: int) -> None:
    if b >= k and (b - k) % s == 0:
        return
    above = k + max(0, -(-(b - k) // s)) * s
    nearest = f"{above - s} and {above}" if above - s >= k else f"{above}"
    raise ValueError(
        f"bsize: expected a {('height', 'width')[axis]} that holds a kernel of {k} at a whole number of steps of {s}: "
        f"the nearest that do: {nearest}; got {b}"
    )


@functools.lru_cache(maxsize=1024)
def make_layer(size: Pair, ksize: Pair, strides: Pair, padding: str | tuple[Pair, Pair]) -> Layer:
    """A convolution on an image of `size` pixels; the arguments are already parsed."""
    if isinstance(padding, str):
        (top, bottom), (left, right) = (_rule(padding, n, k, s) for n, k, s in zip(size, ksize, strides))
    else:
        (top, bottom), (left, right) = padding
    before, after = (top, left), (bottom, right)
    padded = _each(lambda n, p, q: n + p + q, size, before, after)
    return Layer(size, ksize, strides, before, after, valid_size(padded, ksize, strides))


def _rule(padding: str, n: int, k: int, s: int) -> Pair:
    """Pixels before and after an axis of n pixels."""
    if padding == "VALID" or n == 0:
        return 0, 0
    total = max((-(-n // s) - 1) * s + k - n, 0)
    return total // 2, total - total // 2


def parse_layer(in_size: Any, ksize: Any, strides: Any, padding: Any) -> Layer:
    """A :class:`Layer` from what a caller passed."""
    return make_layer(
        parse_image_size(in_size), parse_ksize("ksize", ksize), parse_strides(strides), parse_padding(padding)
    )


def parse_chain(in_size: Any, ksize_list: Any, strides: Any, padding: Any) -> list[Layer]:
    """The layers of a chain from what a caller passed."""
    ksizes = [parse_ksize("ksize_list", ksize) for ksize in _sequence("ksize_list", ksize_list)]
    if not ksizes:
        raise ValueError("ksize_list: expected at least one kernel size, got none")
    return make_chain(
        parse_image_size(in_size), ksizes, _chain_strides(strides, len(ksizes)), _chain_paddings(padding, len(ksizes))
    )


def make_chain(
    size: Pair, ksizes: Sequence[Pair], strides: Sequence[Pair], paddings: Sequence[str | tuple[Pair, Pair]]
) -> list[Layer]:
    """Convolutions of which each reads the image that the one before it leaves."""
    layers: list[Layer] = []
    for ksize, stride, padding in zip(ksizes, strides, paddings):
        layers.append(make_layer(layers[-1].out_size if layers else size, ksize, stride, padding))
    return layers


def bottleneck_strides(strides: Pair, count: int = 3) -> list[Pair]:
    """The stride of each of `count` convolutions of a residual block that has `strides` in all."""
    own = [(1, 1)] * count
    own[1 if count == 3 else 0] = strides
    return own


def _chain_strides(value: Any, count: int) -> list[Pair]:
    if isinstance(value, Sequence) and any(isinstance(v, Sequence) for v in value):
        if len(value) != count:
            raise ValueError(f"strides: expected one for each of the {count} convolutions, got {len(value)}")
        return [parse_strides(v) for v in value]
    return bottleneck_strides(parse_strides(value), count)


def _chain_paddings(value: Any, count: int) -> list[str | tuple[Pair, Pair]]:
    if isinstance(value, str):
        return [parse_padding(value)] * count
    paddings = _sequence("padding", value)
    if len(paddings) != count:
        raise ValueError(
            f"padding: expected 'SAME', 'VALID' or one for each of the {count} convolutions, got {value!r}"
        )
    return [parse_padding(v) for v in paddings]


def _sequence(name: str, value: Any) -> list[Any]:
    try:
        return list(value)
    except TypeError:
        raise ValueError(f"{name}: expected a sequence, got {value!r}") from None


def parse_image_size(value: Any) -> Pair:
    """H and W of a shape ``(N, H, W, C)``."""
    try:
        sizes = [operator.index(v) for v in value]
    except TypeError:
        sizes = []
    if len(sizes) != 4 or min(sizes) < 0:
        raise ValueError(f"in_size: expected 4 integers (N, H, W, C), each >= 0, got {value!r}")
    return sizes[1], sizes[2]


def parse_size(name: str, value: Any) -> Pair:
    """`value` as a pair; ``[1, height, width, 1]`` is taken as well, as in the original SBNet."""
    if hasattr(value, "__len__") and len(value) == 4:
        if not value[0] == value[3] == 1:
            raise ValueError(f"{name}: expected (height, width) or [1, height, width, 1], got {value!r}")
        value = value[1:3]
    return parse_pair(name, value, minimum=1)


def parse_strides(value: Any) -> Pair:
    """Strides as a pair; an integer stands for both."""
    if type(value) is int and value == 1:  # what nearly every call passes
        return 1, 1
    return parse_size("strides", value if hasattr(value, "__iter__") else (value, value))


def parse_ksize(name: str, value: Any) -> Pair:
    """Kernel size as a pair, also of the shape ``[height, width, C, K]`` of its weights."""
    if hasattr(value, "__len__") and len(value) == 4:
        value = value[:2]
    return parse_pair(name, value, minimum=1)


def parse_padding(value: Any) -> str | tuple[Pair, Pair]:
    """``'SAME'``, ``'VALID'`` or explicit pixels."""
    wanted = "padding: expected 'SAME', 'VALID' or ((top, bottom), (left, right)), each >= 0"
    if isinstance(value, str):
        if value not in _RULES:
            raise ValueError(f"{wanted}, got {value!r}")
        return value
    try:
        rows, columns = value
        return parse_pair("padding", rows, minimum=0), parse_pair("padding", columns, minimum=0)
    except (TypeError, ValueError):
        raise ValueError(f"{wanted}, got {value!r}") from None


def _each(function: Any, *pairs: Pair) -> Pair:
    """A function of numbers, along height and along width."""
    return function(*(p[0] for p in pairs)), function(*(p[1] for p in pairs))
