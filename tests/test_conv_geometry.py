"""Blocks of convolutions: literal tables, and a brute-force check that each tile has all the pixels it is made of."""

from __future__ import annotations

from typing import Any

import networks
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbnet_cupy import (
    BlockIndices,
    BlockParams,
    block_indices,
    calc_block_params,
    calc_block_params_res_block,
    reduce_mask,
)
from sbnet_cupy._conv_geometry import make_chain, parse_chain, parse_layer, stack_grids

TABLE = {
    # in_size, bsize, ksize, strides, padding: bsize_out, boffset, bcount, bstrides
    ((1, 400, 700, 24), (18, 18), (3, 3), (1, 1), "SAME"): ((16, 16), (-1, -1), (25, 44), (16, 16)),
    ((1, 400, 700, 24), (18, 18), (3, 3), (1, 1), "VALID"): ((16, 16), (0, 0), (25, 44), (16, 16)),
    ((1, 400, 700, 24), (17, 19), (3, 3), (2, 2), "SAME"): ((8, 9), (0, 0), (25, 39), (16, 18)),
    ((1, 401, 701, 24), (17, 19), (3, 3), (2, 2), "SAME"): ((8, 9), (-1, -1), (26, 39), (16, 18)),
    ((8, 10, 10, 1), (8, 8), (2, 4), (1, 1), "SAME"): ((7, 5), (0, -1), (2, 2), (7, 5)),
    ((8, 10, 11, 1), (7, 9), (7, 3), (3, 2), "SAME"): ((1, 4), (-3, -1), (4, 2), (3, 8)),
    ((8, 10, 11, 1), (5, 5), (3, 3), (1, 1), ((2, 0), (1, 4))): ((3, 3), (-2, -1), (4, 5), (3, 3)),
    ((1, 2, 2, 1), (5, 5), (5, 5), (1, 1), "VALID"): ((1, 1), (0, 0), (0, 0), (1, 1)),
    ((1, 0, 9, 1), (3, 3), (3, 3), (2, 1), "SAME"): ((1, 1), (0, -1), (0, 9), (2, 1)),
    ((1, 9, 9, 1), (4, 4), (1, 1), (3, 3), "SAME"): ((2, 2), (0, 0), (2, 2), (6, 6)),
}


@pytest.mark.parametrize("arguments", TABLE, ids=str)
def test_table(arguments: Any) -> None:
    bsize_out, boffset, bcount, bstrides = TABLE[arguments]
    expected = BlockParams(arguments[1], bsize_out, boffset, bcount, bstrides)
    assert calc_block_params(*arguments) == expected
    # The same as the original SBNet writes it.
    in_size, bsize, ksize, strides, padding = arguments
    lists = (list(in_size), [1, *bsize, 1], [*ksize, 3, 5], [1, *strides, 1], padding)
    assert calc_block_params(*lists) == expected
    assert (
        calc_block_params_res_block(
            in_size, bsize, [ksize], strides, padding if padding in ("SAME", "VALID") else [padding]
        )
        == expected
    )


def test_blocks_of_chains() -> None:
    bottleneck = [(1, 1), (3, 3), (1, 1)]
    assert calc_block_params_res_block((1, 400, 700, 96), (18, 18), bottleneck, 1, "SAME") == calc_block_params(
        (1, 400, 700, 96), (18, 18), (3, 3), 1, "SAME"
    )
    basic = calc_block_params_res_block((1, 40, 40, 8), (12, 12), [(3, 3), (3, 3)], (1, 1), "SAME")
    assert basic == BlockParams((12, 12), (8, 8), (-2, -2), (5, 5), (8, 8))
    # A stride of a bottleneck is that of its second convolution, of a basic block that of its first.
    strided = calc_block_params_res_block((1, 40, 40, 8), (13, 13), bottleneck, [1, 2, 2, 1], "SAME")
    assert strided == BlockParams((13, 13), (6, 6), (0, 0), (4, 4), (12, 12))
    strided = calc_block_params_res_block((1, 40, 40, 8), (15, 15), [(3, 3), (3, 3)], 2, "SAME")
    assert strided == BlockParams((15, 15), (5, 5), (-2, -2), (4, 4), (10, 10))
    # Even kernels pad less before than after, each on its own.
    even = calc_block_params_res_block((1, 9, 9, 8), (4, 4), [(2, 2), (2, 2)], 1, "SAME")
    assert even == BlockParams((4, 4), (2, 2), (0, 0), (5, 5), (2, 2))
    mixed = calc_block_params_res_block(
        (1, 20, 20, 8), (9, 9), [(3, 3), (2, 2)], [(2, 2), (1, 1)], ["VALID", ((1, 0), (0, 1))]
    )
    assert mixed == BlockParams((9, 9), (3, 3), (-2, 0), (3, 3), (6, 6))


def read_pixels(layers: list[Any], axis: int, tile: range) -> tuple[int, int]:
    """First and last pixel of the chain's input, image or padding, that some output pixels are made of."""
    first, last = tile[0], tile[-1]
    for layer in reversed(layers):
        first = first * layer.strides[axis] - layer.pad_before[axis]
        last = last * layer.strides[axis] - layer.pad_before[axis] + layer.ksize[axis] - 1
    return first, last


@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (2, 2), (1, 3)]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.sampled_from(["SAME", "VALID"]),
)
def test_blocks_hold_what_their_tiles_are_made_of(
    ksizes: Any, strides: Any, bsize_out: Any, size: Any, padding: str
) -> None:
    in_size = (1, *size, 3)
    layers = parse_chain(in_size, ksizes, strides, padding)
    reach = [read_pixels(layers, axis, range(bsize_out[axis])) for axis in (0, 1)]
    bsize = tuple(last - first + 1 for first, last in reach)
    params = calc_block_params_res_block(in_size, bsize, ksizes, strides, padding)
    assert params.bsize_out == bsize_out
    grids = stack_grids(tuple(layers), params)
    assert grids[-1] == params.grid_out
    for axis in (0, 1):
        # Tiles cover the output, and no tile lies wholly behind it.
        covered = params.bcount[axis] * bsize_out[axis]
        assert covered - bsize_out[axis] < layers[-1].out_size[axis] <= covered
        for block in range(params.bcount[axis]):
            tile = range(block * bsize_out[axis], (block + 1) * bsize_out[axis])
            for step in range(len(layers) + 1):  # of each convolution's stack
                grid = grids[step]
                first = grid.boffset[axis] + block * grid.bstride[axis]
                assert (first, first + grid.bsize[axis] - 1) == read_pixels(layers[step:], axis, tile)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9))
def test_same_padding_is_that_of_tensorflow(n: int, k: int, s: int) -> None:
    layer = parse_layer((1, n, 5, 1), (k, 1), (s, 1), "SAME")
    assert layer.out_size[0] == -(-n // s)
    if n:
        assert (layer.pad_before[0], layer.pad_after[0]) == networks.paddings((n, 5), (k, 1), (s, 1), "SAME")[0]


MISFITS = [
    # bsize, stride: axis, and the nearest sizes that fit
    ((6, 9), 2, "height", (5, 7), 6),
    ((2, 9), 2, "height", (3,), 2),
    ((9, 10), 4, "height", (7, 11), 9),
    ((7, 10), 4, "width", (7, 11), 10),
]


@pytest.mark.parametrize(("bsize", "stride", "axis", "nearest", "got"), MISFITS)
def test_blocks_that_do_not_fit(bsize: Any, stride: int, axis: str, nearest: tuple[int, ...], got: int) -> None:
    message = (
        rf"^bsize: expected a {axis} that holds a kernel of 3 at a whole number of steps of {stride}: "
        rf"the nearest that do: {' and '.join(map(str, nearest))}; got {got}$"
    )
    with pytest.raises(ValueError, match=message):
        calc_block_params((1, 20, 20, 1), bsize, (3, 3), stride, "SAME")
    for size in nearest:
        calc_block_params((1, 20, 20, 1), (size, size), (3, 3), stride, "SAME")


ERRORS = {
    "in_size": (1, 2, 3),
    "bsize": (3, 0),
    "ksize": (3, 3, 1),
    "strides": (0, 1),
    "padding": "same",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name: str) -> None:
    good = {"in_size": (1, 9, 9, 1), "bsize": (5, 5), "ksize": (3, 3), "strides": 1, "padding": "SAME"}
    calc_block_params(**good)  # type: ignore[arg-type]
    for bad in (ERRORS[name], None, (1.5, 2), [2, 5, 5, 1][: 4 if name in ("bsize", "strides") else 3]):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            calc_block_params(**{**good, name: bad})  # type: ignore[arg-type]


def test_block_params_are_pairs_of_integers() -> None:
    params = calc_block_params((1, 9, 9, 1), (5, 5), (3, 3), 1, "SAME")
    assert BlockParams([5, 5], (3, 3), np.array([-1, -1]), (3, 3), (3, 3)) == params  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^bcount: expected two integers \(height, width\), each >= 0, got 3"):
        BlockParams((5, 5), (3, 3), (-1, -1), 3, (3, 3))  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        params.bsize = (6, 6)  # type: ignore[misc]


def test_errors_of_chains() -> None:
    size, bsize = (1, 9, 9, 1), (5, 5)
    for arguments, message in (
        (([], 1, "SAME"), "ksize_list: expected at least one"),
        ((3, 1, "SAME"), "ksize_list: expected a sequence"),
        (([(3, 3)], [(1, 1), (1, 1)], "SAME"), "strides: expected one for each of the 1 convolutions, got 2"),
        (([(3, 3)], 1, ["SAME", "SAME"]), "padding: expected 'SAME', 'VALID' or one for each of the 1"),
        (([(3, 3), (1, 1)], 1, ((1, 1), (1, 1))), "padding: expected 'SAME', 'VALID' or "),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            calc_block_params_res_block(size, bsize, *arguments)


def test_explicit_paddings_of_a_chain() -> None:
    layers = make_chain((10, 10), [(3, 3), (2, 2)], [(1, 1), (2, 2)], [((1, 0), (2, 3)), "VALID"])
    assert [layer.out_size for layer in layers] == [(9, 13), (4, 6)]


@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("avgpool", [False, True])
def test_block_indices_is_reduce_mask(capacity: int | None, avgpool: bool) -> None:
    params = calc_block_params((2, 40, 31, 8), (11, 9), (3, 3), 2, "SAME")
    mask = np.random.default_rng(0).random((2, 40, 31)).astype(np.float32)
    how: dict[str, Any] = {"tol": 0.95 if not avgpool else 0.4, "avgpool": avgpool, "capacity": capacity}
    found = block_indices(mask, params, **how)
    expected = reduce_mask(
        mask, params.bcount, bsize=params.bsize, boffset=params.boffset, bstride=params.bstrides, **how
    )
    assert isinstance(found, BlockIndices)
    for ours, theirs in zip(found, expected):
        assert np.array_equal(ours, theirs)
    assert 0 < int(found.bin_counts[0]) < 2 * params.bcount[0] * params.bcount[1]
    with pytest.raises(TypeError, match=r"^params: expected BlockParams, got tuple"):
        block_indices(mask, (1, 2))  # type: ignore[arg-type]
