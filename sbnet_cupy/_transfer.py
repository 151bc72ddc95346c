"""Host side of gather.cu, scatter.cu and cover.cu: fills in their argument and launches them."""

from __future__ import annotations

import math
from typing import Any

import cupy
import numpy as np

from . import _jit
from ._geometry import Axis, BlockGrid
from ._instances import cover_instance, gather_instance, scatter_instance
from ._plan import MAX_THREADS, Layout, TransferPlan, plan_transfer

_INT32_MAX = 2**31 - 1


def gather(x: Any, bin_counts: Any, indices: Any, grid: BlockGrid, stack: Any) -> None:
    """Device side of ``sparse_gather``; `stack` is ``[M, h, w, C]`` in any strides."""
    if stack.size == 0:
        return
    if x.size == 0:  # nothing to read: no block has a pixel
        stack.fill(0)
        return
    plan = plan_transfer(_layout(x), _layout(stack), x.itemsize)
    argument = _pack(plan, x, stack, bin_counts, indices, grid.axes(x.shape[1], x.shape[2]))
    _jit.launch(gather_instance(plan.walk, grid.bsize), plan.grid, plan.block, (argument,))


def scatter(stack: Any, bin_counts: Any, indices: Any, grid: BlockGrid, x: Any, add: bool) -> None:
    """Device side of ``sparse_scatter_var``; `stack` is ``[M, h, w, C]`` in any strides."""
    axes = grid.axes(x.shape[1], x.shape[2])
    cells = x.shape[0] * axes[0].count * axes[1].count
    rows = stack.shape[0]
    if stack.size == 0 or x.size == 0 or cells == 0:
        return
    plan = plan_transfer(_layout(x), _layout(stack), x.itemsize)
    argument = _pack(plan, x, stack, bin_counts, indices, axes)
    # One allocation for both arrays of the cover map; see kernels/cover.cuh.
    cover = cupy.empty(cells + (rows if add else 0), np.int32)
    cover.data.memset_async(0xFF, 4 * cells)
    cover_argument = _jit.pack([cover.data.ptr, cover.data.ptr + 4 * cells if add else 0])
    arguments = (argument, cover_argument)
    _jit.launch(cover_instance(add), (math.ceil(rows / MAX_THREADS),), (MAX_THREADS,), arguments)
    _jit.launch(scatter_instance(plan.walk, grid.bsize, x.dtype, add), plan.grid, plan.block, arguments)


def _layout(array: Any) -> Layout:
    return Layout(array.data.ptr, array.shape, array.strides)


def _pack(
    plan: TransferPlan, x: Any, stack: Any, bin_counts: Any, indices: Any, axes: tuple[Axis, Axis]
) -> np.ndarray[Any, Any]:
    """struct Transfer of kernels/transfer.cuh, all of whose fields have 8 bytes."""
    return _jit.pack(
        [
            x.data.ptr,
            stack.data.ptr,
            indices.data.ptr,
            bin_counts.data.ptr,
            *plan.image_strides,
            *plan.stack_strides,
            indices.strides[0] // 4,
            indices.strides[1] // 4,
            stack.shape[0],
            x.shape[0],
            plan.channels,
            *pack_axis(axes[0]),
            *pack_axis(axes[1]),
        ]
    )


def pack_axis(axis: Axis) -> tuple[int, ...]:
    """struct Axis of kernels/transfer.cuh."""
    return axis.first, axis.count, axis.start, axis.stride, axis.extent
