"""The NumPy implementation on tables written by hand, and the device on the same ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sbnet_cupy import reduce_mask, sparse_gather, sparse_scatter, sparse_scatter_var


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def listed(array: Any) -> Any:
    return array.tolist()


MASK = [
    [0, 0, 0, 0, 0, 0, 0],
    [0, 0, 3, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 1],
    [4, 0, 0, 0, 0, 0, 0],
]

# Options beside MASK (5 x 7 pixels), the grid of 3 x 4 blocks of 2 x 2 and tol 0.5, and the active blocks.
REDUCTIONS = [
    ({}, [[0, 0, 1], [0, 1, 3], [0, 2, 0]]),
    ({"tol": 1}, [[0, 0, 1], [0, 2, 0]]),
    ({"tol": 3}, [[0, 2, 0]]),
    ({"tol": 4}, []),
    ({"tol": float("nan")}, []),
    ({"tol": -1, "bcount": (1, 2)}, [[0, 0, 0], [0, 0, 1]]),
    # Averages over 4 pixels: 0.75, 0.25 and 1, the last two of blocks that hang over the edge.
    ({"avgpool": True}, [[0, 0, 1], [0, 2, 0]]),
    ({"avgpool": True, "tol": 0.25}, [[0, 0, 1], [0, 2, 0]]),
    ({"avgpool": True, "tol": 0.2}, [[0, 0, 1], [0, 1, 3], [0, 2, 0]]),
    # An offset moves the pixel (1, 2) to block (1, 1), whose rows are 1 and 2.
    ({"boffset": (-1, 0)}, [[0, 1, 1], [0, 2, 3], [0, 2, 0]]),
    # Overlapping blocks of 3 x 3: pixel (1, 2) lies in two of them.
    ({"bsize": (3, 3)}, [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 2], [0, 1, 3], [0, 2, 0]]),
    # Gaps: single pixels, every second one.
    ({"bsize": (1, 1), "boffset": (1, 0)}, [[0, 0, 1], [0, 1, 3]]),
    # Blocks beyond the image are never active, except that an average of nothing is 0 and above -1.
    ({"boffset": (100, 0), "tol": -1}, []),
    ({"boffset": (100, 0), "tol": -1, "avgpool": True, "bcount": (1, 1)}, [[0, 0, 0]]),
    ({"bcount": (0, 4)}, []),
]


@pytest.mark.parametrize(("options", "active"), REDUCTIONS)
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float32", "float64"])
def test_reduce_mask(xp: Any, options: dict[str, Any], active: list[list[int]], dtype: str) -> None:
    mask = xp.asarray(np.array([MASK], dtype))
    arguments = {"bsize": (2, 2), "bstride": (2, 2), **options}
    bcount = arguments.pop("bcount", (3, 4))
    found = reduce_mask(mask, bcount, **arguments)
    assert listed(found.active_block_indices) == sorted(active)
    assert listed(found.bin_counts) == [len(active)]
    assert found.active_block_indices.dtype == found.bin_counts.dtype == np.int32
    assert found.active_block_indices.shape == (len(active), 3)


def test_reduce_mask_takes_a_channel_axis_and_several_images(xp: Any) -> None:
    mask = np.zeros((3, 4, 4, 1), bool)
    mask[2, 0, 0] = mask[0, 3, 3] = True
    found = reduce_mask(xp.asarray(mask), (2, 2), bsize=(2, 2), bstride=(2, 2))
    assert listed(found.active_block_indices) == [[0, 1, 1], [2, 0, 0]]


@pytest.mark.parametrize("capacity", [0, 1, 2, 3, 5])
def test_capacity_pads_and_cuts_but_counts_all(xp: Any, capacity: int) -> None:
    mask = xp.asarray(np.array([MASK]))
    found = reduce_mask(mask, (3, 4), bsize=(2, 2), bstride=(2, 2), capacity=capacity)
    rows = [[0, 0, 1], [0, 1, 3], [0, 2, 0], [-1, -1, -1], [-1, -1, -1]]
    assert listed(found.active_block_indices) == rows[:capacity]
    assert listed(found.bin_counts) == [3]


# Where pixels just above and just below a threshold must not be rounded together.
@pytest.mark.parametrize(
    ("dtype", "value", "tol", "active"),
    [
        ("int64", 2**53 + 1, 2.0**53, True),
        ("int64", -(2**63), -(2.0**63), False),
        ("int64", -(2**63), -(2.0**64), True),
        ("int64", 2**63 - 1, 2.0**63, False),
        ("uint64", 2**64 - 1, 2.0**63, True),
        ("uint64", 2**63, 2.0**63, False),
        ("uint64", 2**63 + 1, 2.0**63, True),
        ("uint64", 2**64 - 1, 2.0**64, False),
        ("int8", -128, -128.5, True),
        ("int8", -128, -128, False),
        ("uint8", 0, -0.25, True),
        ("bool", True, 0.99, True),
        ("bool", True, 1, False),
        ("bool", False, -1, True),
        ("float32", 2.0**-149, 0, True),  # subnormal
        ("float32", 2.0**-149, 2.0**-140, False),
        ("float32", 2.0**-139, 2.0**-140, True),
        ("float32", 0.1, 0.1, False),  # tol is rounded to float32, as in NumPy
        ("float32", np.inf, 1e300, False),  # which makes this one infinite
        ("float64", 0.1, 0.1, False),
        ("float16", np.nan, -np.inf, False),
        ("float16", 65504, 65503, False),  # in float16 the two are one number
    ],
)
def test_thresholds_are_exact(xp: Any, dtype: str, value: Any, tol: float, active: bool) -> None:
    mask = xp.asarray(np.full((1, 1, 1), value, dtype))
    found = reduce_mask(mask, (1, 1), bsize=(1, 1), bstride=(1, 1), tol=tol)
    assert listed(found.bin_counts) == [int(active)]


# The original's average pooling broke above 1024 pixels; sums here must be exact far beyond.
@pytest.mark.parametrize(
    ("dtype", "value", "tol"),
    [
        ("bool", 1, 1),
        ("uint8", 255, 255),
        ("uint64", 2**64 - 1, 2.0**64),
        ("int64", 2**62, 2.0**62),
        ("int64", -(2**63), -(2.0**63)),
        ("float32", 1, 1),
        ("float16", 1024, 1024),
    ],
)
def test_averages_of_large_blocks_are_exact(xp: Any, dtype: str, value: Any, tol: float) -> None:
    mask = xp.asarray(np.full((1, 100, 700), value, dtype))
    block: dict[str, Any] = {"bsize": (100, 700), "bstride": (100, 700), "avgpool": True}
    assert listed(reduce_mask(mask, (1, 1), tol=tol, **block).bin_counts) == [0]
    below = float(np.nextafter(tol, -np.inf))
    assert listed(reduce_mask(mask, (1, 1), tol=below, **block).bin_counts) == [1]


IMAGE = [
    [11, 12, 13],
    [21, 22, 23],
]  # 2 x 3 pixels, 1 channel

# Grid, indices, count, and the blocks that come out.
GATHERS = [
    ({"bsize": (1, 2), "bstride": (1, 2)}, [[0, 0, 0], [0, 1, 1]], 2, [[[11, 12]], [[23, 0]]]),
    ({"bsize": (2, 2), "bstride": (1, 1), "boffset": (-1, -1)}, [[0, 0, 0]], 1, [[[0, 0], [0, 11]]]),
    ({"bsize": (2, 2), "bstride": (1, 1), "boffset": (-1, -1)}, [[0, 2, 3]], 1, [[[23, 0], [0, 0]]]),
    # Order and repetition are the caller's.
    ({"bsize": (1, 1), "bstride": (1, 1)}, [[0, 1, 0], [0, 0, 2], [0, 1, 0]], 3, [[[21]], [[13]], [[21]]]),
    # Rows at or past the count, of another batch, and beyond the image are zero.
    ({"bsize": (1, 1), "bstride": (1, 1)}, [[0, 0, 0], [0, 0, 1]], 1, [[[11]], [[0]]]),
    ({"bsize": (1, 1), "bstride": (1, 1)}, [[0, 0, 0], [0, 0, 1]], 99, [[[11]], [[12]]]),
    ({"bsize": (1, 1), "bstride": (1, 1)}, [[0, 0, 0]], -1, [[[0]]]),
    ({"bsize": (1, 1), "bstride": (1, 1)}, [[1, 0, 0], [-1, 0, 0], [-1, -1, -1]], 3, [[[0]], [[0]], [[0]]]),
    ({"bsize": (1, 1), "bstride": (1, 1)}, [[0, -1, 0], [0, 2**31 - 1, -(2**31)]], 2, [[[0]], [[0]]]),
    # Negative block indices are blocks like any other.
    ({"bsize": (1, 1), "bstride": (1, 1), "boffset": (1, 2)}, [[0, -1, -1]], 1, [[[12]]]),
]


@pytest.mark.parametrize(("grid", "indices", "count", "blocks"), GATHERS)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "complex128"])
def test_gather(
    xp: Any, grid: dict[str, Any], indices: Any, count: int, blocks: Any, transpose: bool, dtype: str
) -> None:
    x = xp.asarray(np.array(IMAGE, dtype)[None, :, :, None])
    stack = sparse_gather(x, xp.asarray([count], np.int32), xp.asarray(indices, np.int32), **grid, transpose=transpose)
    expected = np.array(blocks, dtype)
    expected = expected[:, None] if transpose else expected[..., None]
    assert stack.shape == expected.shape
    assert stack.dtype == expected.dtype
    assert listed(stack) == expected.tolist()


# Grid, indices, count, blocks, and the image after writing and after adding. The base is IMAGE.
SCATTERS = [
    (
        {"bsize": (1, 2), "bstride": (1, 2)},
        [[0, 0, 0], [0, 1, 1]],
        2,
        [[[1, 2]], [[3, 4]]],
        [[1, 2, 13], [21, 22, 3]],
        [[12, 14, 13], [21, 22, 26]],
    ),
    # The later of two overlapping blocks wins; both are added.
    (
        {"bsize": (1, 2), "bstride": (1, 1)},
        [[0, 0, 1], [0, 0, 0]],
        2,
        [[[1, 2]], [[3, 4]]],
        [[3, 4, 2], [21, 22, 23]],
        [[14, 17, 15], [21, 22, 23]],
    ),
    (
        {"bsize": (1, 1), "bstride": (1, 1)},
        [[0, 1, 1], [0, 1, 1], [0, 1, 1]],
        3,
        [[[1]], [[2]], [[3]]],
        [[11, 12, 13], [21, 3, 23]],
        [[11, 12, 13], [21, 28, 23]],
    ),
    # Ignored: past the count, outside of the batch, outside of the image.
    (
        {"bsize": (1, 1), "bstride": (1, 1)},
        [[0, 0, 0], [1, 0, 0], [-1, -1, -1], [0, 9, 0], [0, 0, 1]],
        4,
        [[[1]], [[2]], [[3]], [[4]], [[5]]],
        [[1, 12, 13], [21, 22, 23]],
        [[12, 12, 13], [21, 22, 23]],
    ),
    (
        {"bsize": (2, 2), "bstride": (2, 2), "boffset": (-1, -1)},
        [[0, 0, 0], [0, 1, 1]],
        2,
        [[[1, 2], [3, 4]], [[5, 6], [7, 8]]],
        [[4, 12, 13], [21, 5, 6]],
        [[15, 12, 13], [21, 27, 29]],
    ),
]


@pytest.mark.parametrize(("grid", "indices", "count", "blocks", "written", "added"), SCATTERS)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "complex128"])
def test_scatter(
    xp: Any, grid: Any, indices: Any, count: int, blocks: Any, written: Any, added: Any, transpose: bool, dtype: str
) -> None:
    stack = np.array(blocks, dtype)
    stack = xp.asarray(stack[:, None] if transpose else stack[..., None])
    base = np.array(IMAGE, dtype)[None, :, :, None]
    bin_counts, triples = xp.asarray([count], np.int32), xp.asarray(indices, np.int32)
    for add, expected in ((False, written), (True, added)):
        options = {**grid, "add": add, "atomic": add, "transpose": transpose}
        x = xp.asarray(base)
        result = sparse_scatter(stack, bin_counts, triples, x, **options)
        assert listed(result[0, :, :, 0]) == np.array(expected, dtype).tolist()
        assert listed(x) == base.tolist()
        changed = sparse_scatter_var(stack, bin_counts, triples, x.copy(), **options)
        assert listed(changed) == listed(result)


def test_add_wraps_integers_around(xp: Any) -> None:
    x = xp.asarray(np.full((1, 1, 1, 2), 200, np.uint8))
    blocks = xp.asarray(np.full((1, 1, 1, 2), 100, np.uint8))
    y = sparse_scatter(
        blocks, xp.asarray([1], np.int32), xp.asarray([[0, 0, 0]], np.int32), x, bsize=(1, 1), bstride=(1, 1), add=True
    )
    assert listed(y.ravel()) == [44, 44]


def test_half_sums_are_rounded_once(xp: Any) -> None:
    # 2048 + 1 is a tie in float16 and would stay 2048 each time; in float32 the three add up to 2051.
    x = xp.asarray(np.full((1, 1, 1, 1), 2048, np.float16))
    blocks = xp.asarray(np.ones((3, 1, 1, 1), np.float16))
    y = sparse_scatter(
        blocks, xp.asarray([3], np.int32), xp.zeros((3, 3), np.int32), x, bsize=(1, 1), bstride=(1, 1), add=True
    )
    assert float(y.ravel()[0]) == 2052  # 2051 rounded to even


def test_results_keep_the_memory_order_of_the_base(xp: Any) -> None:
    nchw = xp.zeros((1, 4, 3, 2), np.float32)
    x = nchw.transpose(0, 2, 3, 1)
    y = sparse_scatter(
        xp.ones((1, 1, 1, 4), np.float32),
        xp.asarray([1], np.int32),
        xp.zeros((1, 3), np.int32),
        x,
        bsize=(1, 1),
        bstride=(1, 1),
    )
    assert y.strides == x.strides
    assert listed(y[0, 0, 0]) == [1, 1, 1, 1]
