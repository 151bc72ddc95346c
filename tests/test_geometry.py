"""The block grid's arithmetic, on Python integers alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbnet_cupy._geometry import Axis, BlockGrid, parse_grid

sizes = st.integers(1, 50) | st.sampled_from([2**31, 2**61])
offsets = st.integers(-60, 60) | st.sampled_from([-(2**61), -(2**31), 2**31, 2**61])


@given(sizes, offsets, sizes, st.integers(0, 100), st.integers(-200, 200) | st.integers(-(2**31), 2**31 - 1))
def test_axis_places_every_block(size: int, offset: int, stride: int, extent: int, index: int) -> None:
    axis, _ = BlockGrid((size, 1), (offset, 0), (stride, 1)).axes(extent, 1)
    begin = offset + index * stride
    low, high = max(begin, 0), min(begin + size, extent)
    image, block = axis.clip(index)
    if low < high:
        assert axis.span(index) == (begin, begin + size)
        assert (image, block) == (slice(low, high), slice(low - begin, high - begin))
    else:
        assert range(extent)[image] == range(0)


@given(sizes, offsets, sizes, st.integers(0, 100))
def test_axis_numbers_fit_the_kernels_integers(size: int, offset: int, stride: int, extent: int) -> None:
    axis, _ = BlockGrid((size, 1), (offset, 0), (stride, 1)).axes(extent, 1)
    assert -(2**31) <= axis.first <= axis.first + max(axis.count, 1) - 1 < 2**31
    last = axis.start + max(axis.count - 1, 0) * axis.stride
    assert all(-(2**63) <= value < 2**63 for value in (axis.start, last, last + size, last - extent))
    # Every block between the first and the last touches the image, and no more blocks than pixels and overhangs do.
    assert axis.count <= max(0, extent + size - 1)


def test_axis_of_a_convolution() -> None:
    grid = BlockGrid((18, 18), (-1, -1), (16, 16))
    # Block -1 still covers pixel 0, and the last ones begin at pixels 399 and 687.
    assert grid.axes(400, 700) == (Axis(-1, 27, -17, 16, 18, 400), Axis(-1, 45, -17, 16, 18, 700))
    assert grid.overlaps
    assert not BlockGrid((16, 16), (0, 0), (16, 17)).overlaps
    assert BlockGrid((16, 17), (0, 0), (16, 16)).overlaps


def test_pairs_may_be_any_sequence_of_integers() -> None:
    expected = BlockGrid((3, 4), (-1, 0), (5, 6))
    assert parse_grid([3, 4], np.array([-1, 0]), (np.int32(5), np.uint8(6))) == expected
    assert parse_grid((3, 4), (-1, 0), (5, 6)) == expected


@pytest.mark.parametrize(
    "bad", [(0, 1), (1, -1), (1,), (1, 2, 3), 4, None, "ab", (1.0, 2), (True, 1), (2**62, 1), ([1], 2), {}]
)
def test_sizes_must_be_two_positive_integers(bad: object) -> None:
    good = (1, 1)
    with pytest.raises(ValueError, match=r"^bsize: expected two integers \(height, width\), .*got "):
        parse_grid(bad, good, good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^bstride: expected two integers \(height, width\), .*got "):
        parse_grid(good, good, bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [(1,), 4, None, (1.0, 2), (True, 1), (-(2**62), 1)])
def test_offsets_must_be_two_integers(bad: object) -> None:
    with pytest.raises(ValueError, match=r"^boffset: expected two integers \(height, width\)"):
        parse_grid((1, 1), bad, (1, 1))  # type: ignore[arg-type]
