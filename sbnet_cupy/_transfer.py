"""Host side of gather.cu, scatter.cu and cover.cu: fills in their argument and launches them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from . import _jit
from ._affine import IDENTITY, Affine
from ._geometry import Axis, BlockGrid
from ._instances import MAX_WORD, Instance, cover_instance, gather_instance, max_word, scatter_instance
from ._plan import LISTED_OVERLAPS, LISTED_ROWS, MAX_THREADS, Layout, TransferPlan, division, plan_transfer
from ._validate import Spec

#: Images that an int32 index can name.
MOST_IMAGES = 2**31


@dataclass(frozen=True)
class Launch:
    """All of a launch but the addresses. Made once for calls that look alike."""

    instance: Instance
    grid: _jit.Dim3
    block: _jit.Dim3
    argument: _jit.Template
    cells: int = 0  # of the cover map; 0 if it is not needed
    activates: bool = False  # whether it computes act(x*scale + shift)


def prepare_gather(
    x: Spec, stack: Spec, index_strides: tuple[int, ...], grid: BlockGrid, transpose: bool, affine: Affine
) -> Launch | None:
    """How to gather from `x` into `stack`; None if there is nothing to write."""
    if stack.size == 0:
        return None
    plan = _plan(x, stack, transpose)
    # Tiles turn what they copy, zeros included: the step would have to tell which of those are pixels.
    activates = plan.walk.order != "tiled" and not affine.is_identity
    instance = gather_instance(plan.walk, grid.bsize, x.dtype if activates else None)
    argument = _argument(plan, x, stack, index_strides, grid, affine)
    return Launch(instance, (*plan.grid, 1), (*plan.block, 1, 1), argument, activates=activates)


def gather(launch: Launch, x: Any, bin_counts: Any, indices: Any, stack: Any, affine: Affine) -> None:
    """Run what :func:`prepare_gather` made, on the current stream."""
    ends = (0, 0)
    if launch.activates:
        affine = affine.aligned()
        ends = affine.addresses
    argument = launch.argument.at(x.data.ptr, stack.data.ptr, indices.data.ptr, bin_counts.data.ptr, *ends)
    _jit.launch(launch.instance, launch.grid, launch.block, argument)


def prepare_scatter(
    x: Spec, stack: Spec, index_strides: tuple[int, ...], grid: BlockGrid, add: bool, transpose: bool
) -> Launch | None:
    """How to scatter from `stack` into `x`; None if no block touches a pixel."""
    height, width = grid.axes(x.shape[1], x.shape[2])
    cells = x.shape[0] * height.count * width.count
    if stack.size == 0 or x.size == 0 or cells == 0:
        return None
    plan = _plan(x, stack, transpose, max_word(x.dtype, add, grid.overlaps), True, grid.overlaps)
    argument = _argument(plan, x, stack, index_strides, grid)
    mapped = plan.rows_per_cta > 1 or stack.shape[0] > _most_listed(plan, grid)
    instance = scatter_instance(plan.walk, grid.bsize, x.dtype, add, grid.overlaps)
    return Launch(instance, (*plan.grid, 1), (*plan.block, 1, 1), argument, cells if mapped else 0)


def scatter(launch: Launch, blocks: Any, bin_counts: Any, indices: Any, x: Any, add: bool) -> None:
    """Run what :func:`prepare_scatter` made, on the current stream."""
    argument = launch.argument.at(x.data.ptr, blocks.data.ptr, indices.data.ptr, bin_counts.data.ptr, 0, 0)
    if launch.cells:
        rows = blocks.shape[0]
        # One allocation for both arrays of the cover map; see kernels/cover.cuh.
        cover = cupy.empty(launch.cells + (rows if add else 0), np.int32)
        cover.data.memset_async(0xFF, 4 * launch.cells)
        covered = _COVER.at(cover.data.ptr, cover.data.ptr + 4 * launch.cells if add else 0)
        _jit.launch(cover_instance(add), (math.ceil(rows / MAX_THREADS), 1, 1), (MAX_THREADS, 1, 1), argument, covered)
    else:
        covered = _NO_COVER
    _jit.launch(launch.instance, launch.grid, launch.block, argument, covered)


def _most_listed(plan: TransferPlan, grid: BlockGrid) -> int:
    """Rows up to which there is no need of a cover map where each has CTAs of its own."""
    if not grid.overlaps:
        return LISTED_ROWS
    return 0 if plan.walk.order == "tiled" else LISTED_OVERLAPS


#: struct Cover of kernels/cover.cuh: nothing but addresses.
_COVER = _jit.Template(2, [])
_NO_COVER = _COVER.at(0, 0)


def _plan(
    x: Spec, stack: Spec, transpose: bool, word: int = MAX_WORD, scatters: bool = False, overlaps: bool = False
) -> TransferPlan:
    order = (0, 2, 3, 1) if transpose else (0, 1, 2, 3)
    return plan_transfer(
        Layout(x.misalignment, x.shape, x.strides),
        Layout(stack.misalignment, tuple(stack.shape[k] for k in order), tuple(stack.strides[k] for k in order)),
        x.itemsize,
        word,
        scatters,
        overlaps,
    )


def _argument(
    plan: TransferPlan,
    x: Spec,
    stack: Spec,
    index_strides: tuple[int, ...],
    grid: BlockGrid,
    affine: Affine = IDENTITY,
) -> _jit.Template:
    """struct Transfer of kernels/transfer.cuh, all of whose fields have 8 bytes; the first six are addresses."""
    height, width = grid.axes(x.shape[1], x.shape[2])
    return _jit.Template(
        6,
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
            int(affine.relu),
        ],
    )


def pack_axis(axis: Axis) -> tuple[int, ...]:
    """struct Axis of kernels/transfer.cuh."""
    return axis.first, axis.count, axis.start, axis.stride, axis.extent
