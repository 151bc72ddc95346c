"""Launch configurations: pure functions of shapes, strides and addresses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbnet_cupy._instances import Walk
from sbnet_cupy._plan import MAX_THREADS, TILE, TILE_ROWS, UNROLL, Layout, TransferPlan, plan_transfer


def layout(shape: tuple[int, ...], itemsize: int = 4, order: str = "nhwc", address: int = 512) -> Layout:
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
        (layout(IMAGE), layout(STACK), 4, Walk("channels", 16)),
        (layout(IMAGE, 2), layout(STACK, 2), 2, Walk("channels", 16)),
        (layout(IMAGE, address=520), layout(STACK), 4, Walk("channels", 8)),
        (layout(IMAGE), layout(STACK, address=516), 4, Walk("channels", 4)),
        (layout((1, 9, 9, 6)), layout((3, 2, 2, 6)), 4, Walk("channels", 8)),
        (layout((1, 9, 9, 3)), layout((3, 2, 2, 3)), 4, Walk("channels", 4)),
        (layout((1, 9, 9, 3), 1), layout((3, 2, 2, 3), 1), 1, Walk("channels", 1)),
        (layout(IMAGE, order="nchw"), layout(STACK, order="nchw"), 4, Walk("columns", 4)),
        (layout((1, 9, 9, 1)), layout((3, 2, 2, 1)), 4, Walk("columns", 4)),
        (layout(IMAGE), layout(STACK, order="nchw"), 4, Walk("tiled", 4, image_along_channels=True)),
        (layout(IMAGE, order="nchw"), layout(STACK), 4, Walk("tiled", 4, image_along_channels=False)),
        # Too few channels to fill tiles: along what is contiguous in the stack.
        (layout((1, 9, 9, 3)), layout((3, 2, 2, 3), order="nchw"), 4, Walk("columns", 4)),
        # An image with every second channel has no contiguous axis.
        (Layout(512, IMAGE, (64000, 3200, 64, 8)), layout(STACK), 4, Walk("channels", 4)),
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
    image = Layout(512, (1, 8, 8, 4), (3, 128, 16, 4))
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
        assert plan.block == (TILE, TILE_ROWS)
        assert plan.grid[0] == rows
    else:
        words = height * width * plan.channels
        assert plan.grid[0] * plan.block[1] >= rows
        # No CTA is without work in the first block, and none without a full load of words unless it is the last.
        assert (plan.grid[1] - 1) * plan.block[0] * UNROLL < words
        assert words + UNROLL * plan.block[0] * plan.grid[1] < 2**32  # the kernel's 32-bit counter


def test_small_blocks_share_a_cta_and_large_ones_use_several() -> None:
    small: TransferPlan = plan_transfer(layout((1, 99, 99, 3)), layout((10000, 3, 3, 3)), 4)
    assert small.block == (32, 8)
    large = plan_transfer(layout((1, 400, 700, 96)), layout((110, 18, 18, 96)), 4)
    assert large.block == (MAX_THREADS, 1)
    assert large.grid == (110, 8)
    assert np.prod(large.grid) * MAX_THREADS * UNROLL >= 110 * 18 * 18 * 24
