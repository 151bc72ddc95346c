"""Launch configurations: pure functions of shapes, strides and addresses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbnet_cupy._instances import Walk
from sbnet_cupy._plan import MAX_THREADS, TILE_PIXELS, UNROLL, Layout, TransferPlan, division, plan_transfer


def layout(shape: tuple[int, ...], itemsize: int = 4, order: str = "nhwc", address: int = 0) -> Layout:
    axes = {"nhwc": (0, 1, 2, 3), "nchw": (0, 3, 1, 2)}[order]
    strides, step = [0] * 4, itemsize
    for axis in reversed(axes):
        strides[axis] = step
        step *= shape[axis]
    return Layout(address, shape, tuple(strides))


IMAGE, STACK = (2, 40, 50, 16), (7, 10, 10, 16)


@pytest.mark.parametrize(
    ("image", "stack", "itemsize", "walk"),
    [
        (layout(IMAGE), layout(STACK), 4, Walk("rows", 16)),
        (layout(IMAGE, 2), layout(STACK, 2), 2, Walk("rows", 16)),
        (layout(IMAGE, address=8), layout(STACK), 4, Walk("rows", 8)),
        (layout(IMAGE), layout(STACK, address=4), 4, Walk("rows", 4)),
        (layout((1, 9, 9, 6)), layout((3, 2, 2, 6)), 4, Walk("rows", 8)),
        (layout((1, 9, 9, 3)), layout((3, 2, 2, 3)), 4, Walk("rows", 4)),
        (layout((1, 9, 9, 3), 1), layout((3, 2, 2, 3), 1), 1, Walk("rows", 1)),
        (layout((1, 9, 9, 1)), layout((3, 2, 2, 1)), 4, Walk("rows", 4)),
        # Every other pixel of a wider image: pixels are apart, their channels are not.
        (Layout(0, IMAGE, (256000, 6400, 128, 4)), layout(STACK), 4, Walk("pixels", 16)),
        (layout(IMAGE, order="nchw"), layout(STACK, order="nchw"), 4, Walk("columns", 4)),
        # Turned: 16 bytes of channels on one side; on the other 10 x 10 pixels, 4 at a time.
        (layout(IMAGE), layout(STACK, order="nchw"), 4, Walk("tiled", 4, True, 4, 4)),
        (layout((2, 9, 9, 16)), layout((7, 3, 3, 16), order="nchw"), 4, Walk("tiled", 4, True, 4, 1)),
        (layout((2, 9, 9, 16), 2), layout((7, 6, 6, 16), 2, "nchw"), 2, Walk("tiled", 2, True, 8, 4)),
        (layout((2, 9, 9, 9)), layout((7, 6, 6, 9), order="nchw"), 4, Walk("tiled", 4, True, 1, 4)),
        (layout(IMAGE, order="nchw"), layout(STACK), 4, Walk("tiled", 4, False, 1, 4)),
        # Too few channels to fill tiles: along what is contiguous in the stack.
        (layout((1, 9, 9, 3)), layout((3, 2, 2, 3), order="nchw"), 4, Walk("columns", 4)),
        # An image with every second channel has no contiguous axis.
        (Layout(0, IMAGE, (64000, 3200, 64, 8)), layout(STACK), 4, Walk("pixels", 4)),
    ],
)
def test_walk(image: Layout, stack: Layout, itemsize: int, walk: Walk) -> None:
    assert plan_transfer(image, stack, itemsize).walk == walk


def test_strides_are_in_words() -> None:
    plan = plan_transfer(layout(IMAGE), layout(STACK), 4)
    assert plan.channels == 4
    assert plan.image_strides == (40 * 50 * 4, 50 * 4, 4, 1)
    assert plan.stack_strides == (10 * 10 * 4, 10 * 4, 4, 1)


def test_axes_of_one_element_do_not_narrow_words() -> None:
    image = Layout(0, (1, 8, 8, 4), (3, 128, 16, 4))
    assert plan_transfer(image, layout((1, 2, 2, 4)), 4).walk.word == 16


def test_a_block_of_more_than_2_to_the_31_words_counts_in_64_bits() -> None:
    plan = plan_transfer(layout((1, 2**16, 2**15, 1), 1), layout((1, 2**16, 2**15, 1), 1), 1)
    assert plan.walk.wide
    assert not plan_transfer(layout((1, 2**15, 2**15, 1), 1), layout((1, 2**15, 2**15, 1), 1), 1).walk.wide


@given(
    st.integers(1, 2**31 - 1),
    st.integers(1, 100),
    st.integers(1, 100),
    st.integers(1, 300),
    st.sampled_from(["nhwc", "nchw"]),
)
def test_launches_are_legal_and_cover_the_work(rows: int, height: int, width: int, channels: int, order: str) -> None:
    stack = layout((rows, height, width, channels), order=order)
    plan = plan_transfer(layout((1, 500, 500, channels)), stack, 4)
    assert 1 <= math.prod(plan.block) <= MAX_THREADS
    assert plan.grid[0] < 2**31
    assert 1 <= plan.grid[1] <= 65535
    if plan.walk.order == "tiled":
        assert plan.block == (MAX_THREADS, 1)
        assert plan.grid[0] == rows
        assert plan.grid[1] <= math.ceil(height * width / TILE_PIXELS) * math.ceil(channels / 32)
    else:
        words = height * width * plan.channels
        assert plan.grid[0] * plan.block[1] >= rows
        # No CTA is without work in the first block, and none without a full load of words unless it is the last.
        assert (plan.grid[1] - 1) * plan.block[0] * UNROLL < words
        assert words + UNROLL * plan.block[0] * plan.grid[1] < 2**32  # the kernel's 32-bit counter


@given(st.integers(1, 2**31 - 1) | st.integers(1, 100), st.integers(0, 2**31 - 1))
def test_division_by_multiplication_is_exact(divisor: int, number: int) -> None:
    magic, shift = division(divisor)
    assert magic < 2**32
    for n in {number, number - number % divisor, max(number - number % divisor - 1, 0), 2**31 - 1}:
        assert n * magic >> shift == n // divisor


def test_runs_of_each_order() -> None:
    assert plan_transfer(layout(IMAGE), layout(STACK), 4).run == 10 * 4
    assert plan_transfer(Layout(0, IMAGE, (256000, 6400, 128, 4)), layout(STACK), 4).run == 4
    assert plan_transfer(layout(IMAGE, order="nchw"), layout(STACK, order="nchw"), 4).run == 10


def test_narrow_words_where_numbers_are_added() -> None:
    assert plan_transfer(layout(IMAGE, 1), layout(STACK, 1), 1, max_word=4).walk.word == 4


def test_small_blocks_share_a_cta_and_large_ones_use_several() -> None:
    small: TransferPlan = plan_transfer(layout((1, 99, 99, 3)), layout((10000, 3, 3, 3)), 4)
    assert small.block == (32, 8)
    large = plan_transfer(layout((1, 400, 700, 96)), layout((110, 18, 18, 96)), 4)
    assert large.block == (MAX_THREADS, 1)
    assert large.grid == (110, 8)
    assert np.prod(large.grid) * MAX_THREADS * UNROLL >= 110 * 18 * 18 * 24
