"""Host side of activate.cu: fills in its argument and launches it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from . import _jit
from ._affine import Affine
from ._geometry import Axis, BlockGrid
from ._instances import Instance, activate_instance, activate_lanes
from ._launch import Dim3, Template
from ._transfer import MOST_IMAGES, pack_axis
from ._validate import Spec, spec_of

#: Threads of a CTA, as in kernels/transfer.cuh, and pixels that a thread loads at once, as in kernels/activate.cu.
_THREADS = 256
_UNROLL = 4

#: CTAs to launch at least, where the work allows: 8 waves of 2 CTAs on the 132 multiprocessors of an H200.
_ENOUGH_CTAS = 2048

#: Pixels of a block from which counting them takes 64 bits.
_WIDE_PIXELS = 2**31


def activate(
    stack: Any, out: Any, affine: Affine, bin_counts: Any, indices: Any, grid: BlockGrid, shape: tuple[int, ...]
) -> None:
    """Write ``affine(stack)`` to `out` in pixels of the image, and 0 elsewhere; `out` may be `stack` itself.

    `grid` is that of the stack's pixels in an image of `shape` [N, H, W]. `out` has the shape of `stack`, any strides,
    and its dtype or, where that is float32, a half type.
    """
    if out.size:
        where = (indices.strides, grid, tuple(shape[:3]))
        _launch(stack, out, affine, (indices.data.ptr, bin_counts.data.ptr), where)


def activate_image(x: Any, out: Any, affine: Affine) -> None:
    """Write ``affine(x)`` to `out`, both [N, H, W, C], in every pixel."""
    if out.size:
        _launch(x, out, affine, (0, 0), None)


#: Strides of the indices, grid, and shape of the image.
_Where = tuple[tuple[int, ...], BlockGrid, tuple[int, ...]]


def _launch(source: Any, target: Any, affine: Affine, addresses: tuple[int, int], where: _Where | None) -> None:
    ready = _prepare(spec_of(source), spec_of(target), where, affine.relu)
    affine = affine.aligned()
    argument = ready.argument.at(source.data.ptr, target.data.ptr, *addresses, *affine.addresses)
    _jit.launch(ready.instance, ready.grid, ready.block, argument)


@dataclass(frozen=True)
class _Ready:
    """All of a launch but the addresses. Made once for calls that look alike."""

    instance: Instance
    grid: Dim3
    block: Dim3
    argument: Template


@functools.lru_cache(maxsize=1024)
def _prepare(source: Spec, target: Spec, where: _Where | None, relu: bool) -> _Ready:
    rows, height, width, channels = source.shape
    lanes = _choose_lanes(source, target)
    words, pixels = channels // lanes, height * width
    block = (min(words, _THREADS), max(1, min(pixels, _THREADS // min(words, _THREADS))))
    slices = min(math.ceil(pixels / (block[1] * _UNROLL)), math.ceil(_ENOUGH_CTAS / rows), 65535)
    index_strides, batch = (0, 0), 0
    axes = (Axis(0, 0, 0, 1, height, height), Axis(0, 0, 0, 1, width, width))
    if where is not None:
        (step, part), grid, shape = where
        index_strides, batch, axes = (step // 4, part // 4), min(shape[0], MOST_IMAGES), grid.axes(shape[1], shape[2])
    argument = Template(
        6,
        [
            *_word_strides(source, lanes),
            *_word_strides(target, lanes),
            *index_strides,
            batch,
            height,
            width,
            words,
            int(relu),
            *pack_axis(axes[0]),
            *pack_axis(axes[1]),
        ],
    )
    return _Ready(
        activate_instance(source.dtype, target.dtype, lanes, pixels >= _WIDE_PIXELS),
        (rows, slices, 1),
        (*block, 1),
        argument,
    )


def _choose_lanes(source: Spec, target: Spec) -> int:
    """As many channels at once as addresses and strides of both allow."""
    for lanes in activate_lanes(source.dtype):
        if all(_holds_words(spec, lanes) for spec in (source, target)):
            return lanes
    return 1


def _holds_words(spec: Spec, lanes: int) -> bool:
    """Whether every pixel begins at a multiple of so many numbers, which lie side by side."""
    size = lanes * spec.itemsize
    outer = zip(spec.strides[:3], spec.shape[:3])
    return (
        spec.shape[3] % lanes == 0
        and (spec.strides[3] == spec.itemsize or spec.shape[3] == 1)
        and spec.misalignment % size == 0
        and all(n == 1 or s % size == 0 for s, n in outer)
    )


def _word_strides(spec: Spec, lanes: int) -> tuple[int, ...]:
    size = lanes * spec.itemsize
    outer = (s // size if n > 1 else 0 for s, n in zip(spec.strides[:3], spec.shape[:3]))
    return *outer, 1 if lanes > 1 else spec.strides[3] // spec.itemsize
