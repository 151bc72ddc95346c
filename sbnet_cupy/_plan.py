"""How to launch gather and scatter: pure functions of shapes, strides and addresses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ._instances import MAX_WORD, Walk

#: Threads of a CTA, words a thread loads at once and edge of a tile: as in kernels/transfer.cuh.
MAX_THREADS = 256
UNROLL = 4
TILE, TILE_ROWS = 32, 8

_WARP = 32

#: With fewer channels than this, tiles of 32 channels would be mostly empty: neighbouring threads then read
#: with the pixels' pitch, and the cache serves the channels in between.
_TILED_CHANNELS = 8

#: CTAs to launch at least, where the work allows: 2 for each place on the largest current GPUs (132 to 160
#: multiprocessors of 8 CTAs of 256 threads).
_ENOUGH_CTAS = 2048


class Layout(NamedTuple):
    """Where the elements of an array of 4 axes lie: address, shape, and strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class TransferPlan:
    """Launch configuration of one gather or scatter."""

    walk: Walk
    grid: tuple[int, int]
    block: tuple[int, int]
    #: In words.
    channels: int
    image_strides: tuple[int, ...]
    stack_strides: tuple[int, ...]


def plan_transfer(image: Layout, stack: Layout, itemsize: int) -> TransferPlan:
    """Choose words, order and launch shape for blocks between `image` [N, H, W, C] and `stack` [M, h, w, C]."""
    order, image_along_channels = _choose_order(image, stack, itemsize)
    word = _widest_word(image, stack, itemsize) if order == "channels" else itemsize
    channels = image.shape[3] * itemsize // word
    rows, block_pixels = stack.shape[0], stack.shape[1] * stack.shape[2]
    words = block_pixels * channels
    walk = Walk(order, word, image_along_channels, wide=words >= 2**31)
    if order == "tiled":
        tiles = math.ceil(block_pixels / TILE) * math.ceil(channels / TILE)
        grid, block = (rows, _slices(rows, tiles)), (TILE, TILE_ROWS)
    else:
        # A power of two of threads for each block, so that small blocks share a CTA.
        threads = min(MAX_THREADS, max(_WARP, 1 << (math.ceil(words / UNROLL) - 1).bit_length()))
        rows_per_cta = MAX_THREADS // threads
        across = math.ceil(rows / rows_per_cta)
        grid = (across, _slices(across, math.ceil(words / (threads * UNROLL))))
        block = (threads, rows_per_cta)
    return TransferPlan(
        walk, grid, block, channels, _word_strides(image, word, itemsize), _word_strides(stack, word, itemsize)
    )


def _choose_order(image: Layout, stack: Layout, itemsize: int) -> tuple[str, bool]:
    """What consecutive threads step along, and for "tiled" whether the image is contiguous along channels."""
    channels = image.shape[3]
    image_channels, stack_channels = _contiguous(image, 3, itemsize), _contiguous(stack, 3, itemsize)
    image_columns, stack_columns = _contiguous(image, 2, itemsize), _contiguous(stack, 2, itemsize)
    if channels > 1 and image_channels and stack_channels:
        return "channels", False
    if image_columns and stack_columns:
        return "columns", False
    if channels >= _TILED_CHANNELS and image_channels and stack_columns:
        return "tiled", True
    if channels >= _TILED_CHANNELS and image_columns and stack_channels:
        return "tiled", False
    return ("columns" if stack_columns else "channels"), False


def _contiguous(layout: Layout, axis: int, itemsize: int) -> bool:
    return layout.shape[axis] == 1 or layout.strides[axis] == itemsize


def _widest_word(image: Layout, stack: Layout, itemsize: int) -> int:
    """The widest power of two, up to 16 bytes, that addresses, strides and channels of both are multiples of."""
    word = MAX_WORD
    if not (_contiguous(image, 3, itemsize) and _contiguous(stack, 3, itemsize)):
        return itemsize
    while word > itemsize:
        if image.shape[3] * itemsize % word == 0 and _aligned(image, word) and _aligned(stack, word):
            return word
        word //= 2
    return itemsize


def _aligned(layout: Layout, word: int) -> bool:
    outer = zip(layout.strides[:3], layout.shape[:3])
    return layout.address % word == 0 and all(n == 1 or s % word == 0 for s, n in outer)


def _word_strides(layout: Layout, word: int, itemsize: int) -> tuple[int, ...]:
    outer: Sequence[int] = [s // word if n > 1 else 0 for s, n in zip(layout.strides[:3], layout.shape[:3])]
    channel = 1 if word > itemsize else layout.strides[3] // word
    return (*outer, channel)


def _slices(ctas: int, most: int) -> int:
    """Into how many CTAs to cut each block, so that there are enough CTAs in all, and no more than `most`."""
    return max(1, min(most, math.ceil(_ENOUGH_CTAS / ctas), 65535))
