"""How to launch gather and scatter: pure functions of shapes, strides and addresses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ._instances import MAX_WORD, Walk, tile_lanes

#: Threads of a CTA and words that a thread loads at once, as in kernels/transfer.cuh.
MAX_THREADS = 256
UNROLL = 4

#: A tile, as in kernels/tile.cuh: pixels, and bytes of the channels of each; at most as many channels as pixels.
TILE_PIXELS, TILE_BYTES = 64, 128

_WARP = 32

#: With fewer channels than this, tiles would be mostly empty: neighbouring threads then step from pixel to
#: pixel, and the cache serves the channels in between.
_TILED_CHANNELS = 8

#: CTAs to launch at least, where the work allows: 8 waves of 2 CTAs on the 132 multiprocessors of an H200, so that
#: no multiprocessor waits long for the last one.
_ENOUGH_CTAS = 2048


class Layout(NamedTuple):
    """Where the elements of an array of 4 axes lie: the address's lowest bits, shape, and strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class TransferPlan:
    """Launch configuration of one gather or scatter. Counts and strides are in words."""

    walk: Walk
    grid: tuple[int, int]
    block: tuple[int, int]
    channels: int
    run: int
    shared_lanes: int
    image_strides: tuple[int, ...]
    stack_strides: tuple[int, ...]


def plan_transfer(image: Layout, stack: Layout, itemsize: int, max_word: int = MAX_WORD) -> TransferPlan:
    """Choose words, order and launch shape for blocks between `image` [N, H, W, C] and `stack` [M, h, w, C]."""
    order = _choose_order(image, stack, itemsize)
    image_along_channels = order == "tiled" and _contiguous(image, 3, itemsize)
    word = _widest_word(image, stack, itemsize, max_word) if order in ("rows", "pixels") else itemsize
    channels = image.shape[3] * itemsize // word
    rows, block_height, block_width = stack.shape[:3]
    words = block_height * block_width * channels
    if order == "tiled":
        image_lanes = _channel_lanes(image, itemsize) if image_along_channels else 1
        stack_lanes = _pixel_lanes(stack, itemsize) if image_along_channels else _channel_lanes(stack, itemsize)
        tile_channels = min(TILE_PIXELS, TILE_BYTES // word)
        tiles = math.ceil(block_height * block_width / TILE_PIXELS) * math.ceil(channels / tile_channels)
        grid, block = (rows, _slices(rows, tiles)), (MAX_THREADS, 1)
    else:
        image_lanes = stack_lanes = 1
        # A power of two of threads for each block, so that small blocks share a CTA.
        threads = min(MAX_THREADS, max(_WARP, 1 << (math.ceil(words / UNROLL) - 1).bit_length()))
        rows_per_cta = MAX_THREADS // threads
        across = math.ceil(rows / rows_per_cta)
        grid = (across, _slices(across, math.ceil(words / (threads * UNROLL))))
        block = (threads, rows_per_cta)
    by_channel = channels > 1 and _contiguous(image, 3, itemsize)
    return TransferPlan(
        walk=Walk(order, word, image_along_channels, image_lanes, stack_lanes, wide=words >= 2**31),
        grid=grid,
        block=block,
        channels=channels,
        run={"rows": block_width * channels, "pixels": channels}.get(order, block_width),
        shared_lanes=min(_WARP, 1 << (channels - 1).bit_length()) if by_channel else 1,
        image_strides=_word_strides(image, word, itemsize),
        stack_strides=_word_strides(stack, word, itemsize),
    )


def division(divisor: int) -> tuple[int, int]:
    """``(magic, shift)`` with ``n // divisor == n * magic >> shift`` for ``0 <= n < 2**31``; magic fits 32 bits.

    With ``s = ceil(log2(divisor))`` and ``magic = ceil(2**(31 + s) / divisor)``, ``magic * divisor`` exceeds
    ``2**(31 + s)`` by less than ``divisor <= 2**s``, so the quotient is off by less than ``1 / divisor``
    (T. Granlund and P. Montgomery, Division by Invariant Integers using Multiplication, 1994).
    """
    shift = 31 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor), shift


def _choose_order(image: Layout, stack: Layout, itemsize: int) -> str:
    """What consecutive threads step along."""
    image_channels, stack_channels = _contiguous(image, 3, itemsize), _contiguous(stack, 3, itemsize)
    image_columns, stack_columns = _contiguous(image, 2, itemsize), _contiguous(stack, 2, itemsize)
    if image_channels and stack_channels and _dense_pixels(image, itemsize) and _dense_pixels(stack, itemsize):
        return "rows"
    if image_channels and stack_channels and image.shape[3] > 1:
        return "pixels"
    if image_columns and stack_columns:
        return "columns"
    if image.shape[3] >= _TILED_CHANNELS and ((image_channels and stack_columns) or (image_columns and stack_channels)):
        return "tiled"
    return "columns" if stack_columns else "pixels"


def _contiguous(layout: Layout, axis: int, itemsize: int) -> bool:
    return layout.shape[axis] == 1 or layout.strides[axis] == itemsize


def _dense_pixels(layout: Layout, itemsize: int) -> bool:
    return layout.shape[2] == 1 or layout.strides[2] == layout.shape[3] * itemsize


def _widest_word(image: Layout, stack: Layout, itemsize: int, word: int) -> int:
    """The widest power of two, up to `word` bytes, that addresses, strides and channels of both are multiples of."""
    if not (_contiguous(image, 3, itemsize) and _contiguous(stack, 3, itemsize)):
        return itemsize
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
    for lanes in tile_lanes(itemsize):
        if layout.shape[3] % lanes == 0 and _aligned(layout, 3, lanes * itemsize):
            return lanes
    return 1


def _pixel_lanes(stack: Layout, itemsize: int) -> int:
    """How many pixels of a channel a thread may move at once, across the rows of the block."""
    _, height, width, _ = stack.shape
    if height == 1 or stack.strides[1] == width * itemsize:
        plane = Layout(stack.address, (*stack.shape[:1], stack.shape[3]), (*stack.strides[:1], stack.strides[3]))
        for lanes in tile_lanes(itemsize):
            if height * width % lanes == 0 and _aligned(plane, -1, lanes * itemsize):
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


def _slices(ctas: int, most: int) -> int:
    """Into how many CTAs to cut each block, so that there are enough CTAs in all, and no more than `most`."""
    return max(1, min(most, math.ceil(_ENOUGH_CTAS / ctas), 65535))
