"""Host side of reduce_mask.cu: fills in the argument of its kernels and launches them."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from . import _jit, _meetings
from ._geometry import Axis, BlockGrid
from ._instances import COMPACT_ACTIVE, COUNT_ACTIVE, Instance, activity_instance, mask_lanes
from ._launch import Dim3, Template
from ._plan import division
from ._reference import integer_threshold
from ._validate import Spec

#: As in the kernels: threads of a CTA, threads of a warp and so bits of a word, and rows that a thread reads at once.
_POOL_THREADS = 256
_COMPACT_THREADS = 256
_WARP = 32
_ROWS = 9

#: CTAs that pooling should have at least, or strips are made narrower: one for every second multiprocessor of an H200.
#: More would read a small mask no faster, and leave more words to compact.
_ENOUGH_CTAS = 66

#: Where the host waits for the count and words are at most so many, the last CTA of pooling compacts them: the host
#: saves a launch, but one CTA lists all blocks. In a CUDA graph of an H200, 400x700 pixels took 5.5 us with one kernel,
#: and 3.8 with two.
_FUSED_WORDS = 256

#: Words that a CTA compacts: one for each warp where words are few, so that all are listed at once, else more, so that
#: CTAs that count all words for themselves are not many. Beyond so many words a kernel of its own counts them.
_FEW_WORDS, _FEW_TILE, _TILE = 2048, _COMPACT_THREADS // _WARP, 32
_MANY_WORDS, _MOST_TILES = 16384, 4096

#: Scratch memory of so many bytes is allocated together with the result, and lives as long.
_SMALL_SCRATCH = 4096

_INT32 = np.dtype(np.int32)


def reduce_mask(
    ready: Ready | None, mask: Any, capacity: int | None, device: int, out: tuple[Any, Any] | None
) -> tuple[Any, Any]:
    """Run what :func:`prepare` made: (indices, bin_counts), in `out` if that is given, which has room for all rows."""
    if ready is None:
        return _nothing(capacity or 0, out)
    if out is None:
        # One allocation, which takes less time than three, for the words, the count and the indices.
        memory = cupy.cuda.alloc(ready.result_bytes)
        scratch = cupy.cuda.alloc(ready.scratch_bytes) if ready.scratch_bytes else memory
        bin_counts = memory + ready.count_offset
        indices = memory + ready.indices_offset
    else:
        scratch = cupy.cuda.alloc(ready.scratch_bytes)
        indices, bin_counts = (array.data for array in out)
    words = scratch.ptr
    waiting = _waiting(device) if capacity is None else None
    arrivals = _meetings.place(device, needed=False) if ready.fused else 0
    argument = ready.argument.at(
        mask.data.ptr,
        words,
        words + ready.tile_counts_offset if ready.tile_counts_offset else 0,
        indices.ptr,
        bin_counts.ptr,
        waiting.count_address if waiting else 0,
        arrivals,
    )
    if waiting:
        _jit.launch(ready.pooling, ready.grid, ready.block, argument)
    else:
        # In a CUDA graph of an H200, 400x700 pixels took 3.5 us like this, and 3.9 with a first kernel that does not
        # start early. Where the host waits, it would only cost the host a microsecond.
        _jit.launch_early(ready.pooling, ready.grid, ready.block, 0, argument)
    if not arrivals:
        if ready.tile_counts_offset:
            _jit.launch_early(COUNT_ACTIVE, ready.tiles, (_COMPACT_THREADS, 1, 1), 0, argument)
        _jit.launch_early(COMPACT_ACTIVE, ready.tiles, (_COMPACT_THREADS, 1, 1), 0, argument)
    rows = capacity if waiting is None else waiting.wait()
    return cupy.ndarray((rows, 3), _INT32, indices), cupy.ndarray((1,), _INT32, bin_counts)


def _nothing(rows: int, out: tuple[Any, Any] | None) -> tuple[Any, Any]:
    """The result without an active block."""
    indices, bin_counts = out or (cupy.empty((rows, 3), _INT32), cupy.empty(1, _INT32))
    indices = indices[:rows]
    if rows:
        indices.data.memset_async(0xFF, indices.nbytes)
    bin_counts.data.memset_async(0, 4)
    return indices, bin_counts


class _Waiting:
    """What a thread of the host waits for a count with: all its calls, since each ends before the next begins."""

    def __init__(self) -> None:
        #: Four bytes of pinned memory, which kernels write to directly.
        self._count: np.ndarray[Any, Any] = np.frombuffer(cupy.cuda.alloc_pinned_memory(4), _INT32, 1)
        self.count_address: int = self._count.__array_interface__["data"][0]

    def wait(self) -> int:
        """Synchronise the current stream, and return the count."""
        try:
            cupy.cuda.get_current_stream().synchronize()
        except BaseException:  # the kernel died, or runs on while the user has lost patience: leave it what it uses
            _abandoned.append(_per_thread.__dict__.copy())
            _per_thread.__dict__.clear()
            raise
        return int(self._count[0])


_per_thread = threading.local()
_abandoned: list[Any] = []


def _waiting(device: int) -> _Waiting:
    """The one of this thread of the host, on the current device."""
    known: dict[Any, _Waiting] = _per_thread.__dict__
    if device not in known:
        known[device] = _Waiting()
    return known[device]


@dataclass(frozen=True)
class Ready:
    """All of a call but the addresses. Made once for calls that look alike."""

    pooling: Instance
    grid: Dim3
    block: Dim3
    argument: Template
    fused: bool
    tiles: Dim3
    tile_counts_offset: int  # in scratch; 0 if they are not needed
    scratch_bytes: int  # 0 if it lies in the result
    count_offset: int
    indices_offset: int
    result_bytes: int


def prepare(
    mask: Spec,
    bcount: tuple[int, int],
    grid: BlockGrid,
    tol: float,
    avgpool: bool,
    capacity: int | None,
    given: bool = False,
) -> Ready | None:
    """How to reduce a mask with axes [N, H, W], into memory that is given or new; None if no block can be active."""
    threshold = _threshold(mask.dtype, grid, tol, avgpool)
    grid_rows = mask.shape[0] * bcount[0]
    if grid_rows * bcount[1] == 0 or threshold is None:
        return None
    lanes = _choose_lanes(mask)
    strips = _choose_strips(grid_rows, bcount[1], grid, lanes)
    words = grid_rows * strips.row_words
    tile, tiles = _choose_tiles(words)
    rows = grid_rows * bcount[1] if capacity is None else capacity
    height, width = grid.axes(mask.shape[1], mask.shape[2])
    fields = [
        *(s // mask.itemsize for s in mask.strides),
        *_block_axis(height, bcount[0]),
        *_block_axis(width, bcount[1]),
        *threshold,
        *_divisor(bcount[0]),
        bcount[1],
        *_divisor(strips.count),
        strips.blocks,
        *_divisor(strips.row_words),
        strips.words,
        strips.word_blocks,
        words,
        tile,
        tiles,
        rows,
        int(capacity is not None),
    ]
    ctas = grid_rows * strips.count
    return Ready(
        pooling=activity_instance(mask.dtype, avgpool, lanes),
        grid=(ctas, 1, 1),
        block=(strips.columns, strips.row_threads, 1),
        argument=Template(7, fields),
        fused=capacity is None and words <= _FUSED_WORDS,
        tiles=(tiles, 1, 1),
        **_memory(words, tiles, rows, given),
    )


def _memory(words: int, tiles: int, rows: int, given: bool = False) -> dict[str, int]:
    """Where words, counts and indices lie; the result perhaps in memory that is `given`."""
    counted = words > _MANY_WORDS
    scratch = 4 * (words + tiles * counted)
    # Else a few rows would keep much memory from others.
    apart = given or scratch > max(_SMALL_SCRATCH, 12 * rows)
    count_offset = 0 if apart else scratch
    indices_offset = math.ceil((count_offset + 4) / 16) * 16
    return {
        "tile_counts_offset": 4 * words * counted,
        "scratch_bytes": scratch * apart,
        "count_offset": count_offset,
        "indices_offset": indices_offset,
        "result_bytes": indices_offset + 12 * rows,
    }


def _choose_tiles(words: int) -> tuple[int, int]:
    """Words of a tile, and tiles."""
    tile = _FEW_TILE if words <= _FEW_WORDS else _TILE
    while words > _MANY_WORDS and math.ceil(words / tile) > _MOST_TILES:
        tile *= 2
    return tile, math.ceil(words / tile)


def _choose_lanes(mask: Spec) -> int:
    """How many pixels a thread reads at once: as many as aligned rows allow."""
    lanes, *_ = mask_lanes(mask.dtype)
    size = lanes * mask.itemsize
    dense = mask.shape[2] % lanes == 0 and mask.strides[2] == mask.itemsize
    outer = zip(mask.strides[:2], mask.shape[:2])
    aligned = mask.misalignment % size == 0 and all(n == 1 or s % size == 0 for s, n in outer)
    return lanes if dense and aligned else 1


@dataclass(frozen=True)
class _Strips:
    """How a grid row is cut into strips, one for each CTA."""

    columns: int  # threads that share a pixel row
    row_threads: int  # rows that are read at once by neighbouring threads
    count: int  # strips of a grid row
    blocks: int  # of a strip
    words: int  # of a strip
    word_blocks: int
    row_words: int  # words of a grid row


def _choose_strips(grid_rows: int, blocks: int, grid: BlockGrid, lanes: int) -> _Strips:
    """Strips as wide as the threads of a CTA take in at once, but enough of them."""
    row_threads = min(-(-grid.bsize[0] // _ROWS), _POOL_THREADS // _WARP)
    for columns in range(_POOL_THREADS // row_threads // _WARP * _WARP, 0, -_WARP):
        # A vector may begin left of the strip.
        strip = (columns * lanes - (lanes - 1) - grid.bsize[1]) // grid.bstride[1] + 1
        strip = max(1, min(strip, columns * row_threads, blocks))
        # As evenly as possible, in one word or in whole ones.
        if strip <= _WARP:
            word_blocks = math.ceil(blocks / math.ceil(blocks / strip))
            words = 1
        else:
            word_blocks = _WARP
            words = math.ceil(math.ceil(blocks / _WARP) / math.ceil(blocks / (strip // _WARP * _WARP)))
        count = math.ceil(blocks / (words * word_blocks))
        if grid_rows * count >= _ENOUGH_CTAS:
            break
    return _Strips(
        columns,
        row_threads,
        count=count,
        blocks=words * word_blocks,
        words=words,
        word_blocks=word_blocks,
        row_words=math.ceil(blocks / word_blocks),
    )


def _block_axis(axis: Axis, blocks: int) -> tuple[int, ...]:
    """struct BlockAxis of kernels/reduce_mask.cu."""
    first = min(max(axis.first, 0), blocks)
    end = min(max(axis.first + axis.count, first), blocks)
    if first == end:
        return 0, 0, 0, 0, 0, 0
    return first, end, axis.start + (first - axis.first) * axis.stride, axis.stride, axis.size, axis.extent


def _divisor(value: int) -> tuple[int, int, int]:
    """A number, and its struct Divisor of kernels/transfer.cuh."""
    return value, *division(value)


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
    with np.errstate(over="ignore"):
        single = int(np.float32(tol).view(np.int32))
    return _bits(tol), single, integer - 2**64 if integer >= 2**63 else integer, every, _bits(area)


def _bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))
