"""Host side of reduce_mask.cu: fills in the arguments of its kernels and launches them."""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from . import _jit
from ._geometry import BlockGrid
from ._instances import COMPACT_ACTIVE, COUNT_ACTIVE, Instance, activity_instance, mask_lanes
from ._reference import integer_threshold
from ._transfer import pack_axis
from ._validate import Spec, spec_of

#: Threads of the kernels, and flags that a CTA compacts at once, as in kernels/reduce_mask.cu.
_POOL_THREADS = 256
_COMPACT_THREADS = 1024
_FLAGS = 8
_PIECE = _COMPACT_THREADS * _FLAGS

#: CTAs that pooling should have at least: 4 for each multiprocessor of an H200. With fewer, strips are made narrower,
#: and their rows are read by more threads at once.
_ENOUGH_CTAS = 528


def reduce_mask(
    mask: Any, bcount: tuple[int, int], grid: BlockGrid, tol: float, avgpool: bool, capacity: int | None
) -> tuple[Any, Any]:
    """Device side of ``reduce_mask`` for a mask ``[N, H, W]``: (indices, bin_counts)."""
    blocks = mask.shape[0] * bcount[0] * bcount[1]
    indices = cupy.empty((blocks if capacity is None else capacity, 3), np.int32)
    bin_counts = cupy.empty(1, np.int32)
    if blocks == 0:
        indices.fill(-1)
        bin_counts.fill(0)
        return indices, bin_counts
    ready = _prepare(spec_of(mask), bcount, grid, tol, avgpool, capacity)
    # One allocation for the flags of the blocks, and behind them the counts of the tiles.
    scratch = cupy.empty(ready.scratch_bytes, np.uint8)
    flags = scratch.data.ptr
    if ready.pooling is None:
        scratch.fill(0)
    else:
        _jit.launch(ready.pooling, ready.grid, ready.block, (ready.pooling_argument.at(mask.data.ptr, flags),))
    host_count = _host_count() if capacity is None else None
    addresses = (
        flags,
        flags + ready.flag_bytes,
        indices.data.ptr,
        bin_counts.data.ptr,
        0 if host_count is None else host_count.__array_interface__["data"][0],
    )
    argument = (ready.compaction_argument.at(*addresses),)
    if ready.tiles > 1:
        _jit.launch(COUNT_ACTIVE, (ready.tiles,), (_COMPACT_THREADS,), argument)
    _jit.launch(COMPACT_ACTIVE, (ready.tiles,), (_COMPACT_THREADS,), argument)
    if host_count is not None:
        cupy.cuda.get_current_stream().synchronize()
        indices = indices[: int(host_count[0])]
    return indices, bin_counts


_per_thread = threading.local()


def _host_count() -> np.ndarray[Any, Any]:
    """Four bytes of pinned memory, which kernels write to directly. Each thread of the host has its own."""
    if not hasattr(_per_thread, "count"):
        _per_thread.count = np.frombuffer(cupy.cuda.alloc_pinned_memory(4), np.int32, 1)
    count: np.ndarray[Any, Any] = _per_thread.count
    return count


@dataclass(frozen=True)
class _Ready:
    """All of the launches but the addresses. Made once for calls that look alike."""

    pooling: Instance | None  # None: no pixel can be above the threshold
    grid: tuple[int, int]
    block: tuple[int, int]
    pooling_argument: _jit.Template
    compaction_argument: _jit.Template
    tiles: int
    flag_bytes: int
    scratch_bytes: int


@functools.lru_cache(maxsize=1024)
def _prepare(
    mask: Spec, bcount: tuple[int, int], grid: BlockGrid, tol: float, avgpool: bool, capacity: int | None
) -> _Ready:
    lanes = _choose_lanes(mask, grid)
    columns, strip = _choose_strip(mask.shape[0] * bcount[0], bcount[1], grid, lanes)
    threshold = _threshold(mask.dtype, grid, tol, avgpool)
    height, width = grid.axes(mask.shape[1], mask.shape[2])
    pooling_argument = _jit.Template(
        2,
        [
            *(s // mask.itemsize for s in mask.strides),
            *grid.bsize,
            *bcount,
            strip,
            *pack_axis(height),
            *pack_axis(width),
            *(threshold or ()),
        ],
    )
    blocks = mask.shape[0] * bcount[0] * bcount[1]
    tile = _PIECE
    while math.ceil(blocks / tile) > _COMPACT_THREADS:
        tile *= 2
    tiles = math.ceil(blocks / tile)
    flag_bytes = math.ceil(blocks / _FLAGS) * _FLAGS
    rows = blocks if capacity is None else capacity
    return _Ready(
        pooling=activity_instance(mask.dtype, avgpool, lanes) if threshold is not None else None,
        grid=(mask.shape[0] * bcount[0] * math.ceil(bcount[1] / strip), 1),
        block=(columns, _POOL_THREADS // columns),
        pooling_argument=pooling_argument,
        compaction_argument=_jit.Template(5, [blocks, *bcount, tile, tiles, rows, int(capacity is not None)]),
        tiles=tiles,
        flag_bytes=flag_bytes,
        scratch_bytes=flag_bytes + 4 * tiles,
    )


def _choose_lanes(mask: Spec, grid: BlockGrid) -> int:
    """How many pixels a thread reads at once: as many as aligned rows allow, where blocks leave no gaps."""
    lanes, *_ = mask_lanes(mask.dtype)
    size = lanes * mask.itemsize
    dense = mask.shape[2] % lanes == 0 and mask.strides[2] == mask.itemsize
    outer = zip(mask.strides[:2], mask.shape[:2])
    aligned = mask.misalignment % size == 0 and all(n == 1 or s % size == 0 for s, n in outer)
    return lanes if dense and aligned and grid.bstride[1] <= grid.bsize[1] else 1


def _choose_strip(grid_rows: int, blocks: int, grid: BlockGrid, lanes: int) -> tuple[int, int]:
    """Threads that share a pixel row, and blocks that a CTA pools."""
    columns = _POOL_THREADS
    while True:
        # As many blocks as one pass of the threads takes in, and as evenly as the strips of a grid row can be.
        strip = (columns * lanes - grid.bsize[1] - lanes + 1) // grid.bstride[1] + 1
        strip = max(1, min(strip, _POOL_THREADS, blocks))
        strips = math.ceil(blocks / strip)
        if columns == 32 or grid_rows * strips >= _ENOUGH_CTAS:
            return columns, math.ceil(blocks / strips)
        columns //= 2


def _threshold(dtype: np.dtype[Any], grid: BlockGrid, tol: float, avgpool: bool) -> tuple[int, ...] | None:
    """struct Threshold of kernels/pool.cuh; None if no pixel of `dtype` can be above `tol`."""
    every, integer = 0, 0
    if not avgpool and dtype.kind in "biu":
        limit = integer_threshold(dtype, tol)
        if limit is None:
            return None
        every = int(limit < np.iinfo(np.uint8 if dtype.kind == "b" else dtype).min)
        integer = 0 if every else limit
    elif not avgpool:
        with np.errstate(over="ignore"):
            tol = float(dtype.type(tol))
    area = float(grid.bsize[0] * grid.bsize[1])
    return _bits(tol), integer - 2**64 if integer >= 2**63 else integer, every, _bits(area)


def _bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))
