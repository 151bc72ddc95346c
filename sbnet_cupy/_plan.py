"""How to launch gather and scatter: pure functions of shapes, strides and addresses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ._instances import MAX_WORD, Walk, channel_lane_counts, pixel_lane_counts

#: Threads of a CTA, as in kernels/transfer.cuh and kernels/tile.cuh.
MAX_THREADS = 256

#: A tile, as in kernels/tile.cuh: pixels at most, and bytes of the channels of each.
TILE_PIXELS, TILE_BYTES = 352, 128

#: Blocks that share a tile at most.
TILE_BLOCKS = 32

_WARP = 32

#: With fewer channels than this, tiles would be mostly empty: neighbouring threads then step from pixel to
#: pixel, and the cache serves the channels in between. Shares of the copy's bandwidth on an H200, float32, blocks of 18
#: and 16, in tiles and without: gather to a transposed stack 0.77 and 0.85 with 8 channels, 0.87 and 0.82 with 16;
#: gather from an NCHW image 0.54 and 0.62 with 16; scatter of a transposed stack 0.36 and 0.54 with 6 channels, 0.58
#: and 0.46 with 8; scatter to an NCHW image 0.34 and 0.46 with 6, 0.48 and 0.47 with 8.
_GATHER_TILED_CHANNELS, _GATHER_TILED_CHANNELS_NCHW, _SCATTER_TILED_CHANNELS = 16, 32, 8

#: CTAs to launch at least, where the work allows: 8 waves of 2 CTAs on the 132 multiprocessors of an H200, so that
#: no multiprocessor waits long for the last one. With 110 blocks of 18 x 18 x 96 float32, gather in a CUDA graph took
#: 6.1 us with 2048 and 6.3 us with 512 or 1024.
_ENOUGH_CTAS = 2048

#: Up to so many rows each have CTAs of their own, which can look for equal rows in the list itself: see
#: kernels/cover.cuh. Scatter of blocks of 16 x 16 x 32 float32 in a CUDA graph on an H200, with a map and without: 5.9
#: and 3.5 us for 110 rows, 10.4 and 8.5 us for 512, 23.0 and 22.6 us for 1024, 40.3 and 43.4 us for 2048.
LISTED_ROWS = 1024

#: The same where blocks overlap, and more is to be found; but not in tiles, whose kernels have no registers to spare.
#: kernels/overlap.cuh has room for so many.
LISTED_OVERLAPS = 512

#: CTAs of a launch at most, where each of them can do more.
_MOST_CTAS = 2**31 - 1

#: Rows of a block that a thread walks down at least: fewer do not pay for finding the block. With the 110 blocks above,
#: gather took 5.8 us with 18 rows, 6.1 with 6, 7.4 with 3; adding took 5.7, 6.2 and 6.1 us.
_LEAST_LINES = 18


class Layout(NamedTuple):
    """Where the elements of an array of 4 axes lie: the address's lowest bits, shape, and strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class TransferPlan:
    """Launch configuration of one gather or scatter. Counts and strides are in words; see struct Transfer."""

    walk: Walk
    grid: tuple[int, int]
    block: tuple[int]
    channels: int
    columns: int
    rows_per_cta: int
    slot: int
    ctas_per_row: int
    lines: int
    image_strides: tuple[int, ...]
    stack_strides: tuple[int, ...]


def plan_transfer(
    image: Layout,
    stack: Layout,
    itemsize: int,
    max_word: int = MAX_WORD,
    scatters: bool = False,
    overlaps: bool = False,
) -> TransferPlan:
    """Choose words, order and launch shape for blocks between `image` [N, H, W, C] and `stack` [M, h, w, C].

    Where blocks overlap that are scattered, no two of them share a warp or a tile.
    """
    order = _choose_order(image, stack, itemsize, scatters)
    word = _widest_word(image, stack, itemsize, max_word) if order == "channels" else itemsize
    channels = image.shape[3] * itemsize // word
    rows, block_height, block_width = stack.shape[:3]
    columns = block_width * channels
    wide = max(block_height * columns, image.shape[1] + block_height, image.shape[2] + block_width) >= 2**31
    if order == "tiled":
        image_along_channels = _contiguous(image, 3, itemsize)
        walk = Walk(
            order,
            word,
            image_along_channels,
            _channel_lanes(image if image_along_channels else stack, itemsize),
            _pixel_lanes(stack, itemsize) if image_along_channels else 1,
            wide,
        )
        parts, blocks = cut_tiles(itemsize, block_height * block_width, overlaps)
        threads, rows_per_cta, slot, lines = MAX_THREADS, blocks, MAX_THREADS, block_height
        ctas_per_row = parts * math.ceil(channels * word / TILE_BYTES)
    else:
        walk = Walk(order, word, wide=wide)
        threads, rows_per_cta, slot = _share_cta(columns, rows, overlaps)
        ctas_per_row = math.ceil(columns / threads) if rows_per_cta == 1 else 1
        ctas = math.ceil(rows / rows_per_cta) * ctas_per_row
        parts = max(1, min(math.ceil(block_height / _LEAST_LINES), math.ceil(_ENOUGH_CTAS / ctas), 65535))
        lines = math.ceil(block_height / parts)
    across = math.ceil(rows / rows_per_cta)
    ctas_per_row = max(1, min(ctas_per_row, _MOST_CTAS // across))
    grid = (across * ctas_per_row, math.ceil(block_height / lines))
    return TransferPlan(
        walk=walk,
        grid=grid,
        block=(threads,),
        channels=channels,
        columns=columns,
        rows_per_cta=rows_per_cta,
        slot=slot,
        ctas_per_row=ctas_per_row,
        lines=lines,
        image_strides=_word_strides(image, word, itemsize),
        stack_strides=_word_strides(stack, word, itemsize),
    )


def _share_cta(columns: int, rows: int, whole_warps: bool) -> tuple[int, int, int]:
    """Threads of a CTA, stack rows that share it, and threads of each of those."""
    slot = _round_up(columns, _WARP) if whole_warps else columns
    if slot > MAX_THREADS // 2 or rows <= LISTED_ROWS:
        # As many CTAs as it takes, with about equally many columns each.
        ctas = math.ceil(columns / MAX_THREADS)
        threads = _round_up(math.ceil(columns / ctas), _WARP)
        return threads, 1, threads
    rows_per_cta = min(MAX_THREADS // slot, rows)
    return _round_up(rows_per_cta * slot, _WARP), rows_per_cta, slot


def cut_tiles(itemsize: int, pixels: int, alone: bool) -> tuple[int, int]:
    """Parts that a block of `pixels` is cut into, and blocks that share a tile: TileShape of kernels/tile.cuh."""
    parts = math.ceil(pixels / TILE_PIXELS)
    if parts > 1 or alone:
        return parts, 1
    piece = MAX_WORD // itemsize
    pitch = pixels if pixels % piece else _round_up(pixels, piece * (2 if itemsize == 1 else 4))
    return 1, max(1, min(TILE_PIXELS // pitch, TILE_BLOCKS))


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def division(divisor: int) -> tuple[int, int]:
    """``(magic, shift)`` with ``n // divisor == n * magic >> shift`` for ``0 <= n < 2**31``; magic fits 32 bits.

    With ``s = ceil(log2(divisor))`` and ``magic = ceil(2**(31 + s) / divisor)``, ``magic * divisor`` exceeds
    ``2**(31 + s)`` by less than ``divisor <= 2**s``, so the quotient is off by less than ``1 / divisor``
    (T. Granlund and P. Montgomery, Division by Invariant Integers using Multiplication, 1994).
    """
    shift = 31 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor), shift


def _choose_order(image: Layout, stack: Layout, itemsize: int, scatters: bool) -> str:
    """What consecutive threads step along."""
    image_channels, stack_channels = _contiguous(image, 3, itemsize), _contiguous(stack, 3, itemsize)
    image_columns, stack_columns = _contiguous(image, 2, itemsize), _contiguous(stack, 2, itemsize)
    if image_channels and stack_channels and image.shape[3] > 1:
        return "channels"
    if image_columns and stack_columns:
        return "columns"
    least = _GATHER_TILED_CHANNELS if image_channels else _GATHER_TILED_CHANNELS_NCHW
    if scatters:
        least = _SCATTER_TILED_CHANNELS
    if image.shape[3] >= least and ((image_channels and stack_columns) or (image_columns and stack_channels)):
        return "tiled"
    return "columns" if stack_columns else "channels"


def _contiguous(layout: Layout, axis: int, itemsize: int) -> bool:
    return layout.shape[axis] == 1 or layout.strides[axis] == itemsize


def _widest_word(image: Layout, stack: Layout, itemsize: int, word: int) -> int:
    """The widest power of two, up to `word` bytes, that addresses, strides and channels of both are multiples of."""
    if _contiguous(image, 3, itemsize) and _contiguous(stack, 3, itemsize):
        while word > itemsize:
            if image.shape[3] * itemsize % word == 0 and all(_aligned(layout, 3, word) for layout in (image, stack)):
                return word
            word //= 2
    return itemsize


def _aligned(layout: Layout, contiguous: int, size: int) -> bool:
    """Whether the address, and the strides of all axes but the `contiguous` one, are multiples of `size` bytes."""
    axes = zip(layout.strides, layout.shape)
    return layout.address % size == 0 and all(
        n == 1 or s % size == 0 for axis, (s, n) in enumerate(axes) if axis != contiguous
    )


def _channel_lanes(layout: Layout, itemsize: int) -> int:
    """How many channels of a pixel a thread may move at once."""
    for lanes in channel_lane_counts(itemsize):
        if layout.shape[3] % lanes == 0 and _aligned(layout, 3, lanes * itemsize):
            return lanes
    return 1


def _pixel_lanes(stack: Layout, itemsize: int) -> int:
    """How many elements a thread may move at once along pixels: where whole blocks are contiguous."""
    rows, height, width, channels = stack.shape
    dense = (
        (channels == 1 or stack.strides[3] == height * width * itemsize)
        and (height == 1 or stack.strides[1] == width * itemsize)
        and (width == 1 or stack.strides[2] == itemsize)
    )
    starts = Layout(stack.address, (rows,), stack.strides[:1])
    if dense:
        for lanes in pixel_lane_counts(itemsize):
            if height * width * channels % lanes == 0 and _aligned(starts, -1, lanes * itemsize):
                return lanes
    return 1


def _word_strides(layout: Layout, word: int, itemsize: int) -> tuple[int, ...]:
    def strides() -> Iterator[int]:
        for axis, (stride, length) in enumerate(zip(layout.strides, layout.shape)):
            if axis == 3 and _contiguous(layout, 3, itemsize):
                yield 1
            else:
                yield stride // word if length > 1 else 0

    return tuple(strides())
