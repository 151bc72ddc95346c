"""Host side of gather.cu, scatter.cu and cover.cu: fills in their argument and launches them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from . import _jit
from ._geometry import Axis, BlockGrid
from ._instances import MAX_WORD, Instance, cover_instance, gather_instance, max_word, scatter_instance
from ._plan import LISTED_ROWS, MAX_THREADS, Layout, TransferPlan, division, plan_transfer
from ._validate import Spec, spec_of

#: Images that an int32 index can name.
MOST_IMAGES = 2**31


def gather(
    x: Any,
    image: Spec,
    bin_counts: Any,
    indices: Any,
    grid: BlockGrid,
    stack: Any,
    given: Spec | None,
    transpose: bool,
) -> None:
    """Device side of ``sparse_gather``; `image` is the spec of `x`, `given` that of `stack` if there is one yet."""
    if stack.size == 0:
        return
    if x.size == 0:  # nothing to read: no block has a pixel
        stack.fill(0)
        return
    ready = _prepare_gather(image, given or spec_of(stack), indices.strides, grid, transpose)
    addresses = (x.data.ptr, stack.data.ptr, indices.data.ptr, bin_counts.data.ptr)
    _jit.launch(ready.instance, ready.grid, ready.block, (ready.argument.at(addresses),))


def scatter(
    blocks: Any, stack: Spec, bin_counts: Any, indices: Any, grid: BlockGrid, x: Any, add: bool, transpose: bool
) -> None:
    """Device side of ``sparse_scatter_var``; `stack` is the spec of `blocks`."""
    ready = _prepare_scatter(spec_of(x), stack, indices.strides, grid, add, transpose)
    if ready is None:
        return
    argument = ready.argument.at((x.data.ptr, blocks.data.ptr, indices.data.ptr, bin_counts.data.ptr))
    if ready.cells:
        rows = blocks.shape[0]
        # One allocation for both arrays of the cover map; see kernels/cover.cuh.
        cover = cupy.empty(ready.cells + (rows if add else 0), np.int32)
        cover.data.memset_async(0xFF, 4 * ready.cells)
        arguments = (argument, _COVER.at((cover.data.ptr, cover.data.ptr + 4 * ready.cells if add else 0)))
        _jit.launch(cover_instance(add), (math.ceil(rows / MAX_THREADS),), (MAX_THREADS,), arguments)
    else:
        arguments = (argument, _NO_COVER)
    _jit.launch(ready.instance, ready.grid, ready.block, arguments)


@dataclass(frozen=True)
class _Ready:
    """All of a launch but the addresses. Made once for calls that look alike."""

    instance: Instance
    grid: tuple[int, ...]
    block: tuple[int, ...]
    argument: _jit.Template
    cells: int = 0  # of the cover map; 0 if it is not needed


#: struct Cover of kernels/cover.cuh: nothing but addresses.
_COVER = _jit.Template([])
_NO_COVER = _COVER.at((0, 0))


@functools.lru_cache(maxsize=1024)
def _prepare_gather(x: Spec, stack: Spec, index_strides: tuple[int, ...], grid: BlockGrid, transpose: bool) -> _Ready:
    plan = _plan(x, stack, transpose)
    argument = _argument(plan, x, stack, index_strides, grid)
    return _Ready(gather_instance(plan.walk, grid.bsize), plan.grid, plan.block, argument)


@functools.lru_cache(maxsize=1024)
def _prepare_scatter(
    x: Spec, stack: Spec, index_strides: tuple[int, ...], grid: BlockGrid, add: bool, transpose: bool
) -> _Ready | None:
    height, width = grid.axes(x.shape[1], x.shape[2])
    cells = x.shape[0] * height.count * width.count
    if stack.size == 0 or x.size == 0 or cells == 0:
        return None
    plan = _plan(x, stack, transpose, max_word(x.dtype, add, grid.overlaps), grid.overlaps)
    argument = _argument(plan, x, stack, index_strides, grid)
    mapped = grid.overlaps or plan.rows_per_cta > 1 or stack.shape[0] > LISTED_ROWS
    instance = scatter_instance(plan.walk, grid.bsize, x.dtype, add, grid.overlaps)
    return _Ready(instance, plan.grid, plan.block, argument, cells if mapped else 0)


def _plan(x: Spec, stack: Spec, transpose: bool, word: int = MAX_WORD, overlaps: bool = False) -> TransferPlan:
    order = (0, 2, 3, 1) if transpose else (0, 1, 2, 3)
    return plan_transfer(
        Layout(x.misalignment, x.shape, x.strides),
        Layout(stack.misalignment, tuple(stack.shape[k] for k in order), tuple(stack.strides[k] for k in order)),
        x.itemsize,
        word,
        overlaps,
    )


def _argument(
    plan: TransferPlan, x: Spec, stack: Spec, index_strides: tuple[int, ...], grid: BlockGrid
) -> _jit.Template:
    """struct Transfer of kernels/transfer.cuh, all of whose fields have 8 bytes; the first four are addresses."""
    height, width = grid.axes(x.shape[1], x.shape[2])
    return _jit.Template(
        [
            *plan.image_strides,
            *plan.stack_strides,
            index_strides[0] // 4,
            index_strides[1] // 4,
            stack.shape[0],
            min(x.shape[0], MOST_IMAGES),
            plan.channels,
            *division(plan.channels),
            plan.columns,
            plan.rows_per_cta,
            plan.slot,
            *division(plan.slot),
            plan.ctas_per_row,
            *division(plan.ctas_per_row),
            plan.lines,
            *pack_axis(height),
            *pack_axis(width),
        ]
    )


def pack_axis(axis: Axis) -> tuple[int, ...]:
    """struct Axis of kernels/transfer.cuh."""
    return axis.first, axis.count, axis.start, axis.stride, axis.extent
