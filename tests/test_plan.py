"""Launch configurations: pure functions of shapes, strides and addresses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbnet_cupy import _plan
from sbnet_cupy._instances import Walk
from sbnet_cupy._plan import MAX_THREADS, Layout, TransferPlan, cut_tiles, division, plan_transfer


def layout(shape: tuple[int, ...], itemsize: int = 4, order: str = "nhwc", address: int = 0) -> Layout:
    axes = {"nhwc": (0, 1, 2, 3), "nchw": (0, 3, 1, 2)}[order]
    strides, step = [0] * 4, itemsize
    for axis in reversed(axes):
        strides[axis] = step
        step *= shape[axis]
    return Layout(address, shape, tuple(strides))


IMAGE, STACK = (2, 40, 50, 16), (7, 10, 10, 16)

TILED_CHANNELS = ("_GATHER_TILED_CHANNELS", "_GATHER_TILED_CHANNELS_NCHW", "_SCATTER_TILED_CHANNELS")


@pytest.mark.parametrize(
    ("image", "stack", "itemsize", "walk"),
    [
        (layout(IMAGE), layout(STACK), 4, Walk("channels", 16)),
        (layout(IMAGE, 2), layout(STACK, 2), 2, Walk("channels", 16)),
        (layout(IMAGE, address=8), layout(STACK), 4, Walk("channels", 8)),
        (layout(IMAGE), layout(STACK, address=4), 4, Walk("channels", 4)),
        (layout((1, 9, 9, 6)), layout((3, 2, 2, 6)), 4, Walk("channels", 8)),
        (layout((1, 9, 9, 3)), layout((3, 2, 2, 3)), 4, Walk("channels", 4)),
        (layout((1, 9, 9, 3), 1), layout((3, 2, 2, 3), 1), 1, Walk("channels", 1)),
        # Every other pixel of a wider image: pixels are apart, their channels are not.
        (Layout(0, IMAGE, (256000, 6400, 128, 4)), layout(STACK), 4, Walk("channels", 16)),
        # A single channel: pixels are as contiguous as channels.
        (layout((1, 9, 9, 1)), layout((3, 2, 2, 1)), 4, Walk("columns", 4)),
        (layout(IMAGE, order="nchw"), layout(STACK, order="nchw"), 4, Walk("columns", 4)),
        # Turned: 16 bytes of channels on one side; on the other 10 x 10 pixels x 16 channels, 4 at a time.
        (layout(IMAGE), layout(STACK, order="nchw"), 4, Walk("tiled", 4, True, 4, 4)),
        # Pixels need not fill 16 bytes: with their channels, they do.
        (layout((2, 9, 9, 16)), layout((7, 3, 3, 16), order="nchw"), 4, Walk("tiled", 4, True, 4, 4)),
        (layout((2, 9, 9, 6)), layout((7, 3, 3, 6), order="nchw"), 4, Walk("tiled", 4, True, 1, 1)),
        (layout((2, 9, 9, 9)), layout((7, 6, 6, 9), order="nchw"), 4, Walk("tiled", 4, True, 1, 4)),
        (layout(IMAGE), layout(STACK, order="nchw", address=4), 4, Walk("tiled", 4, True, 4, 1)),
        # 16 bytes of channels, 4 bytes of them, or one channel.
        (layout((2, 9, 9, 8), 2), layout((7, 6, 6, 8), 2, "nchw"), 2, Walk("tiled", 2, True, 8, 8)),
        (layout((2, 9, 9, 10), 2), layout((7, 6, 6, 10), 2, "nchw"), 2, Walk("tiled", 2, True, 2, 8)),
        (layout((2, 9, 9, 9), 2), layout((7, 6, 6, 9), 2, "nchw"), 2, Walk("tiled", 2, True, 1, 1)),
        (layout((2, 9, 9, 8), 1), layout((7, 4, 4, 8), 1, "nchw"), 1, Walk("tiled", 1, True, 4, 16)),
        # Blocks that are apart: pixels of one each are contiguous, but not from a channel to the next.
        (layout(IMAGE), Layout(0, STACK, (16 * 480, 40, 4, 480)), 4, Walk("tiled", 4, True, 4, 1)),
        (layout(IMAGE, order="nchw"), layout(STACK), 4, Walk("tiled", 4, False, 4)),
        (layout(IMAGE, order="nchw"), layout(STACK, address=4), 4, Walk("tiled", 4, False, 1)),
        # As many channels as tiles need. Fewer: along what is contiguous in the stack.
        (layout((1, 9, 9, 4)), layout((3, 2, 2, 4), order="nchw"), 4, Walk("tiled", 4, True, 4, 4)),
        (layout((1, 9, 9, 3)), layout((3, 2, 2, 3), order="nchw"), 4, Walk("columns", 4)),
        (layout((1, 9, 9, 3), order="nchw"), layout((3, 2, 2, 3)), 4, Walk("channels", 4)),
        # An image with every second channel has no contiguous axis.
        (Layout(0, IMAGE, (64000, 3200, 64, 8)), layout(STACK), 4, Walk("channels", 4)),
        (Layout(0, IMAGE, (64000, 3200, 64, 8)), layout(STACK, order="nchw"), 4, Walk("columns", 4)),
    ],
)
def test_walk(image: Layout, stack: Layout, itemsize: int, walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TILED_CHANNELS:
        monkeypatch.setattr(_plan, name, 4)
    assert plan_transfer(image, stack, itemsize).walk == walk


@pytest.mark.parametrize(
    ("image_order", "stack_order", "scatters", "least"),
    [("nhwc", "nchw", False, 16), ("nchw", "nhwc", False, 32), ("nhwc", "nchw", True, 8), ("nchw", "nhwc", True, 8)],
)
def test_tiles_from_so_many_channels(image_order: str, stack_order: str, scatters: bool, least: int) -> None:
    for channels in range(1, 40):
        image, stack = layout((1, 40, 40, channels), order=image_order), layout((9, 6, 6, channels), order=stack_order)
        assert (plan_transfer(image, stack, 4, scatters=scatters).walk.order == "tiled") == (channels >= least)


def test_strides_are_in_words() -> None:
    plan = plan_transfer(layout(IMAGE), layout(STACK), 4)
    assert (plan.channels, plan.columns) == (4, 10 * 4)
    assert plan.image_strides == (40 * 50 * 4, 50 * 4, 4, 1)
    assert plan.stack_strides == (10 * 10 * 4, 10 * 4, 4, 1)
    turned = plan_transfer(layout(IMAGE), layout(STACK, order="nchw"), 4)
    assert (turned.channels, turned.columns) == (16, 10 * 16)
    assert turned.image_strides == (40 * 50 * 16, 50 * 16, 16, 1)
    assert turned.stack_strides == (10 * 10 * 16, 10, 1, 100)


def test_axes_of_one_element_do_not_narrow_words() -> None:
    image = Layout(0, (1, 8, 8, 4), (3, 128, 16, 4))
    assert plan_transfer(image, layout((1, 2, 2, 4)), 4).walk.word == 16


def test_narrow_words_where_numbers_are_added() -> None:
    assert plan_transfer(layout(IMAGE, 1), layout(STACK, 1), 1, max_word=4).walk.word == 4


def test_a_block_of_more_than_2_to_the_31_words_counts_in_64_bits() -> None:
    def wide(side: int, height: int) -> bool:
        return plan_transfer(layout((1, 9, 9, 1), 1), layout((1, height, side, 1), 1), 1).walk.wide

    assert wide(2**15, 2**16)
    assert not wide(2**15, 2**16 - 1)
    in_words_of_16_bytes = plan_transfer(layout((1, 9, 9, 16), 1), layout((1, 2**15, 2**15, 16), 1), 1)
    assert not in_words_of_16_bytes.walk.wide


@pytest.mark.parametrize("axis", [1, 2])
def test_pixel_coordinates_beyond_32_bits_count_in_64(axis: int) -> None:
    """Coordinates reach from minus the block's size to the image's: their difference is what must fit."""

    def wide(extent: int) -> bool:
        image, stack = [1, 1, 1, 1], [1, 1, 1, 1]
        image[axis], stack[axis] = extent, 8
        return plan_transfer(layout(tuple(image), 1), layout(tuple(stack), 1), 1).walk.wide

    assert wide(2**31 - 8)
    assert not wide(2**31 - 9)


# Who works on what ----------------------------------------------------------------------------------------------------


def shares(plan: TransferPlan, rows: int) -> Iterator[tuple[Any, Any, int]]:
    """Rows and first columns of the threads with work, and their step: ``Cta`` and ``Share`` of transfer.cuh."""
    threads = np.arange(plan.block[0])
    for cta in range(plan.grid[0]):
        group, part = divmod(cta, plan.ctas_per_row)
        alone = plan.rows_per_cta == 1
        slot = np.zeros_like(threads) if alone else threads // plan.slot
        row = np.where(slot < plan.rows_per_cta, group * plan.rows_per_cta + slot, rows)
        first = part * plan.block[0] + threads - slot * plan.slot
        yield row[row < rows], first[row < rows], plan.ctas_per_row * plan.block[0] if alone else plan.slot


def lines(plan: TransferPlan, height: int) -> list[int]:
    """Rows of a block in the order in which ``Share`` names them."""
    parts = [(y * plan.lines, min((y + 1) * plan.lines, height)) for y in range(plan.grid[1])]
    assert all(begin < end for begin, end in parts), "a CTA without work"
    return [line for begin, end in parts for line in range(begin, end)]


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(["nhwc", "nchw"]),
    st.sampled_from([2**31 - 1, 100, 1]),
)
def test_each_word_is_one_threads(
    rows: int, height: int, width: int, channels: int, overlaps: bool, order: str, most: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan, "_MOST_CTAS", max(most, rows))  # rows are never more than CTAs
        image, stack = layout((1, 50, 50, channels), order=order), layout((rows, height, width, channels), order=order)
        plan = plan_transfer(image, stack, 4, overlaps=overlaps)
    assert plan.walk.order != "tiled"
    assert plan.columns == width * plan.channels
    assert lines(plan, height) == list(range(height))
    visits = np.zeros((rows, plan.columns), int)
    for row, first, step in shares(plan, rows):
        for column in range(0, plan.columns, step):
            inside = first + column < plan.columns
            np.add.at(visits, (row[inside], first[inside] + column), 1)
        if overlaps:  # all threads of a warp have one row
            assert len(row) % 32 == 0
            assert (row.reshape(-1, 32) == row[::32, None]).all()
    assert (visits == 1).all()


@given(
    st.integers(1, 60),
    st.integers(1, 30),
    st.integers(2, 30),  # a single pixel is contiguous along channels too
    st.integers(4, 150),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.booleans(),
    st.sampled_from([2**31 - 1, 100, 1]),
)
def test_each_tile_is_one_ctas(
    rows: int, height: int, width: int, channels: int, itemsize: int, overlaps: bool, most: int
) -> None:
    image = layout((1, 50, 50, channels), itemsize)
    stack = layout((rows, height, width, channels), itemsize, "nchw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan, "_MOST_CTAS", max(most, rows))
        for name in TILED_CHANNELS:
            patch.setattr(_plan, name, 4)
        plan = plan_transfer(image, stack, itemsize, overlaps=overlaps)
    assert plan.walk.order == "tiled"
    assert plan.block == (MAX_THREADS,)
    assert plan.grid[1] == 1
    parts, blocks = cut_tiles(itemsize, height * width, overlaps)
    assert plan.rows_per_cta == blocks
    assert blocks == 1 or not overlaps
    tiles = parts * math.ceil(channels / (128 // itemsize))  # Part::count
    visits = np.zeros((rows, tiles), int)
    for cta in range(plan.grid[0]):
        group, part = divmod(cta, plan.ctas_per_row)
        assert part < tiles, "a CTA without work"
        visits[group * blocks : (group + 1) * blocks, part :: plan.ctas_per_row] += 1
    assert (visits == 1).all()


@given(
    st.integers(1, 2**31 - 1),
    st.integers(1, 100),
    st.integers(1, 100),
    st.integers(1, 300) | st.integers(1, 2**31),
    st.sampled_from([1, 4, 16]),
    st.booleans(),
    st.sampled_from(["nhwc", "nchw"]),
)
def test_launches_are_legal_and_counters_do_not_wrap_around(
    rows: int, height: int, width: int, channels: int, itemsize: int, overlaps: bool, order: str
) -> None:
    stack = layout((rows, height, width, channels), itemsize, order)
    plan = plan_transfer(layout((1, 500, 500, channels), itemsize), stack, itemsize, overlaps=overlaps)
    assert plan.block[0] % 32 == 0
    assert 32 <= plan.block[0] <= MAX_THREADS
    assert 1 <= plan.grid[0] < 2**31
    assert 1 <= plan.grid[1] <= 65535
    assert plan.grid[0] == math.ceil(rows / plan.rows_per_cta) * plan.ctas_per_row
    assert plan.rows_per_cta == 1 or plan.walk.order == "tiled" or plan.rows_per_cta * plan.slot <= plan.block[0]
    if not plan.walk.wide:  # a loop ends before its 32-bit counter does
        tiled = plan.walk.order == "tiled"
        step = plan.ctas_per_row * (1 if tiled else plan.block[0])
        assert plan.columns - 1 + step < 2**32
        assert height * plan.columns < 2**31
        assert max(plan.channels, plan.slot, plan.ctas_per_row) < 2**31  # what Divisor divides by


# Thresholds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "rows", "whole_warps", "threads", "rows_per_cta", "slot"),
    [
        (9, 10_000, False, 256, 28, 9),
        (9, 10_000, True, 256, 8, 32),
        (9, 1025, False, 256, 28, 9),
        (9, 1024, False, 32, 1, 32),  # few rows have CTAs of their own
        (128, 10_000, False, 256, 2, 128),
        (100, 10_000, True, 256, 2, 128),
        (129, 10_000, False, 160, 1, 160),
        (257, 10_000, False, 160, 1, 160),  # two CTAs, about even
        (18 * 32, 10_000, True, 192, 1, 192),
    ],
)
def test_small_blocks_share_a_cta_and_large_ones_use_several(
    columns: int, rows: int, whole_warps: bool, threads: int, rows_per_cta: int, slot: int
) -> None:
    plan = plan_transfer(layout((1, 9, 9, columns), 16), layout((rows, 3, 1, columns), 16), 16, overlaps=whole_warps)
    assert (plan.block, plan.rows_per_cta, plan.slot) == ((threads,), rows_per_cta, slot)


@pytest.mark.parametrize(
    ("rows", "height", "lines", "parts"),
    [
        (10_000, 18, 18, 1),  # enough CTAs as it is
        (2048, 18, 18, 1),
        (10, 18, 18, 1),  # not fewer, though there is little to do
        (10, 19, 10, 2),
        (2047, 34, 17, 2),
        (1000, 81, 27, 3),
        (10, 100, 17, 6),
        (1, 10**6, 489, 2045),
    ],
)
def test_blocks_are_cut_where_ctas_are_few(rows: int, height: int, lines: int, parts: int) -> None:
    plan = plan_transfer(layout((1, 9, 9, 256), 16), layout((rows, height, 1, 256), 16), 16)
    assert (plan.lines, plan.grid) == (lines, (rows, parts))


@pytest.mark.parametrize(
    ("itemsize", "pixels", "alone", "parts", "blocks"),
    [
        (4, 324, False, 1, 1),
        (4, 64, False, 1, 5),
        (4, 64, True, 1, 1),
        (4, 100, False, 1, 3),  # of 112 places each
        (4, 9, False, 1, 32),  # no more: what is known of each takes memory too
        (4, 21, False, 1, 16),  # an odd number needs no more places
        (1, 256, False, 1, 1),
        (2, 65, False, 1, 5),
        (4, 352, False, 1, 1),
        (4, 353, False, 2, 1),
        (4, 65 * 65, False, 13, 1),
        (16, 1, False, 1, 32),
    ],
)
def test_blocks_in_tiles(itemsize: int, pixels: int, alone: bool, parts: int, blocks: int) -> None:
    assert cut_tiles(itemsize, pixels, alone) == (parts, blocks)


#: What a tile must be like, told by the compiler of the kernels.
TILE_SHAPES = """
#include "tile.cuh"
template <int kBytes, unsigned long long kBlockPixels, bool kAlone, unsigned long long kParts, int kBlocks>
constexpr bool agrees() {
    using Shape = sbnet::TileShape<kBytes, kBlockPixels, kAlone>;
    static_assert(Shape::kParts == kParts && Shape::kBlocks == kBlocks, "cut_tiles says otherwise");
    static_assert((Shape::kParts - 1) * Shape::kPixels < kBlockPixels, "the last part of a block is empty");
    static_assert(Shape::kParts * Shape::kPixels >= kBlockPixels, "pixels belong to no part");
    static_assert(Shape::kPitch >= Shape::kPixels && Shape::kPitch <= sbnet::kMostPixels, "lines do not fit");
    static_assert(Shape::kElements * kBytes <= 44 << 10, "a tile does not fit into shared memory");
    static_assert(Shape::kChannels * kBytes == %d, "TILE_BYTES");
    return true;
}
static_assert(sbnet::kMostPixels == %d, "TILE_PIXELS");
static_assert(sbnet::kTileThreads == %d && sbnet::kMaxThreads == %d, "MAX_THREADS");
"""


def test_tiles_are_those_of_the_kernels() -> None:
    pytest.importorskip("cupy")
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy.cuda.compiler import _NVRTCProgram

    from sbnet_cupy._jit import compile_options

    text = TILE_SHAPES % (_plan.TILE_BYTES, _plan.TILE_PIXELS, MAX_THREADS, MAX_THREADS)
    beside = {_plan.TILE_PIXELS // n + d for n in range(1, 8) for d in (-1, 0, 1)}
    large = [*range(360, 9000, 370), 352 * 22 + 1, 65 * 65, 2**31, 46341**2, 2**40 + 1]
    for itemsize in (1, 2, 4, 8, 16):
        for n in {*range(1, 70), *range(70, 352, 9), *beside, *large}:
            for alone in (False, True) if n % 5 == 0 else (False,):
                parts, blocks = cut_tiles(itemsize, n, alone)
                known = f"{itemsize}, {n}ull, {str(alone).lower()}, {parts}ull, {blocks}"
                text += f"static_assert(agrees<{known}>());\n"
    options = (*assemble_cupy_compiler_options(compile_options()), "--device-as-default-execution-space", "-arch=sm_90")
    _NVRTCProgram(text, "tiles.cu").compile(options)


@given(st.integers(1, 2**31 - 1) | st.integers(1, 100), st.integers(0, 2**31 - 1))
def test_division_by_multiplication_is_exact(divisor: int, number: int) -> None:
    magic, shift = division(divisor)
    assert magic < 2**32
    for n in {number, number - number % divisor, max(number - number % divisor - 1, 0), 2**31 - 1}:
        assert n * magic >> shift == n // divisor
