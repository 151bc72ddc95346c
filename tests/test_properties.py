"""The ops on random calls: NumPy against the oracle everywhere, CuPy against NumPy to the bit where there is a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import SUM_DTYPES, Case, MaskCase, cases, identical, lay_out, mask_cases, random_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import gather, pool, scatter

import sbnet_cupy

# A device tries more examples than the per-pixel oracle has time for.
on_device = settings(max_examples=400)


def poisoned(shape: tuple[int, ...], dtype: np.dtype[Any], layout: str, xp: Any) -> Any:
    """An output full of arbitrary bits, so that an element that nobody writes shows."""
    return lay_out(random_bits(np.random.default_rng(0), shape, dtype), layout, xp)


def run_gather(case: Case, xp: Any, out_layout: str | None = None) -> Any:
    x, blocks, bin_counts, indices = case.arrays(xp)
    out = None if out_layout is None else poisoned(blocks.shape, case.x.dtype, out_layout, xp)
    result = sbnet_cupy.sparse_gather(x, bin_counts, indices, **case.grid, transpose=case.transpose, out=out)
    assert out is None or result is out
    assert identical(x, case.x)
    return result.transpose(0, 2, 3, 1) if case.transpose else result


def run_scatter(case: Case, xp: Any, add: bool, how: str) -> Any:
    x, blocks, bin_counts, indices = case.arrays(xp)
    options: dict[str, Any] = {**case.grid, "add": add, "atomic": add, "transpose": case.transpose}
    if how == "var":
        result = sbnet_cupy.sparse_scatter_var(blocks, bin_counts, indices, x, **options)
        assert result is x
        return result
    out = None if how == "new" else poisoned(case.x.shape, case.x.dtype, case.layouts[1], xp)
    result = sbnet_cupy.sparse_scatter(blocks, bin_counts, indices, x, **options, out=out)
    assert out is None or result is out
    assert identical(x, case.x)
    return result


@given(cases(), st.sampled_from([None, "nhwc", "sliced", "reversed"]))
def test_gather_is_as_specified(case: Case, out_layout: str | None) -> None:
    expected = gather(case.x, case.count, case.indices, case.bsize, case.boffset, case.bstride)
    assert identical(run_gather(case, np, out_layout), expected)


@given(cases(), st.sampled_from(["var", "new", "out"]))
def test_scatter_is_as_specified(case: Case, how: str) -> None:
    expected = scatter(case.stack, case.count, case.indices, case.x, case.bsize, case.boffset, case.bstride, False)
    assert identical(run_scatter(case, np, False, how), expected)


@given(cases(SUM_DTYPES), st.sampled_from(["var", "new", "out"]))
def test_scatter_add_is_as_specified(case: Case, how: str) -> None:
    expected = scatter(case.stack, case.count, case.indices, case.x, case.bsize, case.boffset, case.bstride, True)
    assert identical(run_scatter(case, np, True, how), expected, nan_payloads=False)


@given(mask_cases())
def test_reduce_mask_is_as_specified(case: MaskCase) -> None:
    active, unsure = pool(case.mask, case.bcount, case.bsize, case.boffset, case.bstride, case.tol, case.avgpool)
    found = sbnet_cupy.reduce_mask(case.array(np), case.bcount, **{**case.arguments, "capacity": None})
    # Where float64 rounding decides, both answers are right: take over the one that was given.
    for triple in np.argwhere(unsure):
        active[tuple(triple)] = any(np.array_equal(triple, row) for row in found.active_block_indices)
    expected = np.argwhere(active).astype(np.int32)
    assert identical(found.active_block_indices, expected)
    assert identical(found.bin_counts, np.array([len(expected)], np.int32))
    given = run_reduce_mask(case, np)
    assert identical(given.bin_counts, found.bin_counts)
    if case.capacity is None:
        assert identical(given.active_block_indices, found.active_block_indices)
    else:
        check_capacity(given, found.active_block_indices, case.capacity)
        padded = sbnet_cupy.reduce_mask(case.array(np), case.bcount, **case.arguments)
        check_capacity(padded, expected, case.capacity)


def run_reduce_mask(case: MaskCase, xp: Any) -> sbnet_cupy.BlockIndices:
    """Into memory that is full of other bits."""
    rows = case.mask.shape[0] * case.bcount[0] * case.bcount[1] if case.capacity is None else case.capacity
    out = sbnet_cupy.BlockIndices(xp.full((rows, 3), 77, np.int32), xp.full(1, 77, np.int32))
    found = sbnet_cupy.reduce_mask(case.array(xp), case.bcount, **case.arguments, out=out)
    assert identical(out.active_block_indices[: found.active_block_indices.shape[0]], to_host(found[0]))
    assert identical(out.bin_counts, to_host(found.bin_counts))
    return found


def to_host(array: Any) -> np.ndarray[Any, Any]:
    return array if isinstance(array, np.ndarray) else array.get()


def check_capacity(found: sbnet_cupy.BlockIndices, expected: np.ndarray[Any, Any], capacity: int) -> None:
    kept = min(len(expected), capacity)
    assert identical(found.bin_counts, np.array([len(expected)], np.int32))
    assert identical(found.active_block_indices[:kept], expected[:kept])
    assert found.active_block_indices.shape == (capacity, 3)
    assert bool((found.active_block_indices[kept:] == -1).all())


@pytest.mark.gpu
@on_device
@given(cases(), st.sampled_from([None, "nhwc", "nchw", "sliced", "reversed", "misaligned"]))
def test_gather_is_the_same_on_the_device(case: Case, out_layout: str | None) -> None:
    import cupy

    assert identical(run_gather(case, cupy, out_layout), run_gather(case, np))


@pytest.mark.gpu
@on_device
@given(cases(), st.sampled_from(["var", "new", "out"]))
def test_scatter_is_the_same_on_the_device(case: Case, how: str) -> None:
    import cupy

    assert identical(run_scatter(case, cupy, False, how), run_scatter(case, np, False, how))


@pytest.mark.gpu
@on_device
@given(cases(SUM_DTYPES), st.sampled_from(["var", "new", "out"]))
def test_scatter_add_is_the_same_on_the_device(case: Case, how: str) -> None:
    import cupy

    expected = run_scatter(case, np, True, how)
    assert identical(run_scatter(case, cupy, True, how), expected, nan_payloads=False)


@pytest.mark.gpu
@on_device
@given(mask_cases())
def test_reduce_mask_is_the_same_on_the_device(case: MaskCase) -> None:
    import cupy

    expected = sbnet_cupy.reduce_mask(case.array(np), case.bcount, **case.arguments)
    found = sbnet_cupy.reduce_mask(case.array(cupy), case.bcount, **case.arguments)
    given = run_reduce_mask(case, cupy)
    assert identical(given.active_block_indices, to_host(found.active_block_indices))
    assert identical(given.bin_counts, to_host(found.bin_counts))
    if case.avgpool and case.mask.dtype.kind not in "biu":
        # The two sum in other orders: where that may decide, the oracle knows, and the case says nothing.
        with np.errstate(all="ignore"):
            _, unsure = pool(case.mask, case.bcount, case.bsize, case.boffset, case.bstride, case.tol, case.avgpool)
        if unsure.any():
            return
    assert identical(found.active_block_indices, expected.active_block_indices)
    assert identical(found.bin_counts, expected.bin_counts)
