"""Host side of reduce_mask.cu: fills in the arguments of its kernels and launches them."""

from __future__ import annotations

import math
from typing import Any

import cupy
import numpy as np

from . import _jit
from ._geometry import BlockGrid
from ._instances import COMPACT_ACTIVE, COUNT_ACTIVE, activity_instance
from ._reference import integer_threshold
from ._transfer import pack_axis

#: Threads of the kernels, as in kernels/reduce_mask.cu.
_POOL_THREADS = 256
_COMPACT_THREADS = 1024

#: Blocks that one CTA compacts before a second CTA is worth a kernel more, to count.
_SINGLE_TILE = 8192


def reduce_mask(
    mask: Any, bcount: tuple[int, int], grid: BlockGrid, tol: float, avgpool: bool, capacity: int | None
) -> tuple[Any, Any]:
    """Device side of ``reduce_mask`` for a mask ``[N, H, W]``: (indices, bin_counts)."""
    blocks = mask.shape[0] * bcount[0] * bcount[1]
    rows = blocks if capacity is None else capacity
    indices = cupy.empty((rows, 3), np.int32)
    bin_counts = cupy.empty(1, np.int32)
    if blocks == 0:
        indices.fill(-1)
        bin_counts.fill(0)
        return indices, bin_counts
    activity = cupy.empty(blocks, np.uint8)
    _pool(mask, bcount, grid, tol, avgpool, activity)
    _compact(activity, bcount, indices, bin_counts, pad=capacity is not None)
    if capacity is None:
        indices = indices[: int(bin_counts.item())]  # waits for the current stream
    return indices, bin_counts


def _pool(mask: Any, bcount: tuple[int, int], grid: BlockGrid, tol: float, avgpool: bool, activity: Any) -> None:
    """Write 1 to `activity` for every active block, 0 for the others."""
    every, integer = 0, 0
    if not avgpool and mask.dtype.kind in "biu":
        limit = integer_threshold(mask.dtype, tol)
        if limit is None:
            activity.fill(0)
            return
        every = int(limit < np.iinfo(np.uint8 if mask.dtype.kind == "b" else mask.dtype).min)
        integer = 0 if every else limit
    elif not avgpool:
        tol = _round_to(mask.dtype, tol)
    height, width = grid.axes(mask.shape[1], mask.shape[2])
    # As many blocks as one pass of a CTA's threads over their columns takes in.
    strip = (_POOL_THREADS - grid.bsize[1]) // grid.bstride[1] + 1
    strip = max(1, min(strip, _POOL_THREADS, bcount[1]))
    argument = _jit.pack(
        [
            mask.data.ptr,
            activity.data.ptr,
            *(s // mask.itemsize for s in mask.strides),
            *grid.bsize,
            *bcount,
            strip,
            *pack_axis(height),
            *pack_axis(width),
            _bits(tol),
            integer - 2**64 if integer >= 2**63 else integer,
            every,
            _bits(float(grid.bsize[0] * grid.bsize[1])),
        ]
    )
    ctas = mask.shape[0] * bcount[0] * math.ceil(bcount[1] / strip)
    _jit.launch(activity_instance(mask.dtype, avgpool), (ctas,), (_POOL_THREADS,), (argument,))


def _compact(activity: Any, bcount: tuple[int, int], indices: Any, bin_counts: Any, pad: bool) -> None:
    """List the active blocks in ascending order."""
    blocks = activity.size
    tile = _SINGLE_TILE
    while math.ceil(blocks / tile) > _COMPACT_THREADS:
        tile *= 2
    tiles = math.ceil(blocks / tile)
    tile_counts = cupy.empty(tiles, np.int32) if tiles > 1 else None
    argument = _jit.pack(
        [
            activity.data.ptr,
            tile_counts.data.ptr if tile_counts is not None else 0,
            indices.data.ptr,
            bin_counts.data.ptr,
            blocks,
            *bcount,
            tile,
            tiles,
            indices.shape[0],
            pad,
        ]
    )
    for instance in (COUNT_ACTIVE, COMPACT_ACTIVE) if tiles > 1 else (COMPACT_ACTIVE,):
        _jit.launch(instance, (tiles,), (_COMPACT_THREADS,), (argument,))


def _round_to(dtype: np.dtype[Any], tol: float) -> float:
    with np.errstate(over="ignore"):
        return float(dtype.type(tol))


def _bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))
