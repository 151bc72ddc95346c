"""Gradients of gather and scatter: against the oracle, finite differences, and each other."""

from __future__ import annotations

import os
import re
from typing import Any

import cpu_cuda
import numpy as np
import pytest
from cases import SUM_DTYPES, Array, Case, cases, identical, lay_out, random_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import block_pixels, scatter

import sbnet_cupy
from sbnet_cupy import sparse_gather, sparse_gather_grad, sparse_scatter, sparse_scatter_grad

on_device = settings(max_examples=200)

#: Grids beside an image of 5 x 6 pixels: side by side, overlapping, with gaps, and hanging over all edges.
GRIDS: list[dict[str, Any]] = [
    {"bsize": (2, 3), "bstride": (2, 3)},
    {"bsize": (3, 3), "boffset": (-1, -1), "bstride": (2, 2)},
    {"bsize": (4, 2), "boffset": (-1, 0), "bstride": (1, 3)},
    {"bsize": (2, 1), "boffset": (1, -1), "bstride": (3, 2)},
]
#: Repeated, unordered, outside of the image or of the batch, and one beyond the count.
ROWS = [
    [1, 1, 1],
    [0, 0, 0],
    [1, 0, 1],
    [1, 1, 1],
    [0, 2, 2],
    [-1, -1, -1],
    [2, 0, 0],
    [0, 99, 0],
    [0, 0, 0],
    [0, 1, 0],
]
COUNT = len(ROWS) - 1


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def to_host(array: Any) -> Array:
    return array if isinstance(array, np.ndarray) else array.get()


def indices_of(xp: Any) -> tuple[Any, Any]:
    return xp.asarray(np.array([COUNT], np.int32)), xp.asarray(np.array(ROWS, np.int32))


def oracle_scatter_grad(case: Case, add: bool) -> tuple[Array, Array]:
    """Who wrote a pixel last gets its gradient; `case.x` is the gradient by the result."""
    blocks, base = np.zeros(case.stack.shape, case.x.dtype), case.x.copy()
    writers: dict[Any, list[Any]] = {}
    for row, (n, i, j) in enumerate(case.indices.tolist()):
        if row < case.count:
            for part, pixel in block_pixels(n, i, j, case.x.shape, case.bsize, case.boffset, case.bstride):
                writers.setdefault(pixel, []).append((row, *part))
    for pixel, places in writers.items():
        for place in places if add else places[-1:]:
            blocks[place] = case.x[pixel]
        if not add:
            base[pixel] = 0
    return blocks, base


def run_gather_grad(case: Case, xp: Any, out_layout: str | None) -> Any:
    _, blocks, bin_counts, indices = case.arrays(xp)
    out = None if out_layout is None else poisoned(case.x, out_layout, xp)
    found = sparse_gather_grad(
        blocks, bin_counts, indices, case.x.shape, **case.grid, transpose=case.transpose, out=out
    )
    assert out is None or found is out
    return found


def run_scatter_grad(case: Case, xp: Any, add: bool, out_layouts: tuple[str, str] | None) -> tuple[Any, Any]:
    x, _, bin_counts, indices = case.arrays(xp)
    out = None
    if out_layouts is not None:
        stack = case.stack.transpose(0, 3, 1, 2) if case.transpose else case.stack
        out = poisoned(stack, out_layouts[0], xp), poisoned(case.x, out_layouts[1], xp)
    options = {**case.grid, "add": add, "transpose": case.transpose}
    found = sparse_scatter_grad(x, bin_counts, indices, **options, out=out)
    assert out is None or (found[0] is out[0] and found[1] is out[1])
    assert identical(x, case.x)
    return (found[0].transpose(0, 2, 3, 1) if case.transpose else found[0]), found[1]


def poisoned(like: Array, layout: str, xp: Any) -> Any:
    return lay_out(random_bits(np.random.default_rng(0), like.shape, like.dtype), layout, xp)


out_layouts = st.sampled_from([None, "nhwc", "nchw", "sliced", "reversed"])
out_pairs = st.none() | st.tuples(st.sampled_from(["nhwc", "nchw"]), st.sampled_from(["nhwc", "nchw", "strided"]))


@given(cases(SUM_DTYPES), out_layouts)
def test_gather_grad_is_as_specified(case: Case, out_layout: str | None) -> None:
    nothing = np.zeros(case.x.shape, case.x.dtype)
    expected = scatter(case.stack, case.count, case.indices, nothing, case.bsize, case.boffset, case.bstride, True)
    assert identical(run_gather_grad(case, np, out_layout), expected, nan_payloads=False)


@given(cases(), st.booleans(), out_pairs)
def test_scatter_grad_is_as_specified(case: Case, add: bool, out_layouts: tuple[str, str] | None) -> None:
    found = run_scatter_grad(case, np, add, out_layouts)
    for result, expected in zip(found, oracle_scatter_grad(case, add)):
        assert identical(result, expected)


@pytest.mark.gpu
@on_device
@given(cases(SUM_DTYPES), out_layouts)
def test_gather_grad_is_the_same_on_the_device(case: Case, out_layout: str | None) -> None:
    import cupy

    expected = run_gather_grad(case, np, out_layout)
    assert identical(run_gather_grad(case, cupy, out_layout), expected, nan_payloads=False)


@pytest.mark.gpu
@on_device
@given(cases(), st.booleans(), out_pairs)
def test_scatter_grad_is_the_same_on_the_device(case: Case, add: bool, out_layouts: tuple[str, str] | None) -> None:
    import cupy

    found = run_scatter_grad(case, cupy, add, out_layouts)
    for result, expected in zip(found, run_scatter_grad(case, np, add, out_layouts)):
        assert identical(result, expected)


def differences(function: Any, at: Array, weights: Array) -> Array:
    """Central differences of ``sum(function(at) * weights)``. Whole numbers and a step of 1: exact in float64."""
    found = np.zeros(at.shape)
    for place in np.ndindex(at.shape):
        step = np.zeros(at.shape)
        step[place] = 1
        found[place] = ((function(at + step) - function(at - step)) * weights).sum() / 2
    return found


def whole(shape: Any, seed: int) -> Array:
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(np.float64)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("transpose", [False, True])
def test_gather_grad_equals_finite_differences(xp: Any, grid: dict[str, Any], transpose: bool) -> None:
    counts, indices = indices_of(xp)

    def gather(x: Array) -> Array:
        return to_host(sparse_gather(xp.asarray(x), counts, indices, **grid, transpose=transpose))

    x = whole((2, 5, 6, 2), 0)
    weights = whole(gather(x).shape, 1)
    found = sparse_gather_grad(xp.asarray(weights), counts, indices, x.shape, **grid, transpose=transpose)
    assert identical(found + 0.0, differences(gather, x, weights) + 0.0)  # + 0.0: zeros of one sign
    assert np.abs(to_host(found)).sum() > 0


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_scatter_grad_equals_finite_differences(xp: Any, grid: dict[str, Any], transpose: bool, add: bool) -> None:
    counts, indices = indices_of(xp)
    options = {**grid, "transpose": transpose, "add": add}

    def scatter_into(blocks: Array, base: Array) -> Array:
        arrays = xp.asarray(blocks), counts, indices, xp.asarray(base)
        return to_host(sparse_scatter(*arrays, **options, atomic=add))

    base, weights = whole((2, 5, 6, 2), 0), whole((2, 5, 6, 2), 1)
    height, width = grid["bsize"]
    blocks = whole((len(ROWS), 2, height, width) if transpose else (len(ROWS), height, width, 2), 2)
    found = sparse_scatter_grad(xp.asarray(weights), counts, indices, **options)
    assert identical(found.grad_blocks + 0.0, differences(lambda b: scatter_into(b, base), blocks, weights) + 0.0)
    assert identical(found.grad_x + 0.0, differences(lambda x: scatter_into(blocks, x), base, weights) + 0.0)


@given(cases([np.dtype(np.float64)]), st.booleans())
def test_the_gradients_are_adjoint(case: Case, add: bool) -> None:
    """``<gather(x), b> == <x, gather_grad(b)>``, and the same for scatter; sums of whole numbers are exact."""
    x, y = whole(case.x.shape, 1), whole(case.x.shape, 2)
    blocks = whole(case.stack.shape, 3)
    rows, grid = (np.array([case.count], np.int32), case.indices), case.grid
    gathered = sparse_gather(x, *rows, **grid)
    assert (gathered * blocks).sum() == (x * sparse_gather_grad(blocks, *rows, x.shape, **grid)).sum()
    grad_blocks, grad_x = sparse_scatter_grad(y, *rows, **grid, add=add)
    scattered = sparse_scatter(blocks, *rows, x, **grid, add=add, atomic=add)
    assert (scattered * y).sum() == (blocks * grad_blocks).sum() + (x * grad_x).sum()


def test_a_table() -> None:
    """Three blocks of two pixels on a line of four: the second pixel is written twice, and so is a block."""
    counts, rows = np.array([3], np.int32), np.array([[0, 0, 0], [0, 0, 1], [0, 0, 1]], np.int32)
    grid: dict[str, Any] = {"bsize": (1, 2), "bstride": (1, 1)}
    blocks = np.array([[1, 2], [3, 4], [5, 6]], np.float32).reshape(3, 1, 2, 1)
    assert sparse_gather_grad(blocks, counts, rows, (1, 1, 4, 1), **grid).ravel().tolist() == [1, 10, 10, 0]
    y = np.array([1, 2, 3, 4], np.float32).reshape(1, 1, 4, 1)
    found = sparse_scatter_grad(y, counts, rows, **grid)
    assert found.grad_blocks.ravel().tolist() == [1, 0, 0, 0, 2, 3]
    assert found.grad_x.ravel().tolist() == [0, 0, 0, 4]
    found = sparse_scatter_grad(y, counts, rows, **grid, add=True)
    assert found.grad_blocks.ravel().tolist() == [1, 2, 2, 3, 2, 3]
    assert found.grad_x is y


@pytest.mark.gpu
def test_gradients_are_reproducible_and_do_not_wait() -> None:
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    x = cupy.asarray(rng.standard_normal((2, 90, 110, 16)).astype("f"))
    rows = cupy.asarray(
        np.stack([rng.integers(0, 2, 300), rng.integers(-1, 12, 300), rng.integers(-1, 14, 300)], 1), "i"
    )
    counts, grid = cupy.asarray([300], "i"), {"bsize": (18, 18), "boffset": (-3, 2), "bstride": (8, 7)}
    stack = sparse_gather(x, counts, rows, **grid)

    def both() -> list[Any]:
        return [
            sparse_gather_grad(stack, counts, rows, x.shape, **grid),
            *sparse_scatter_grad(x, counts, rows, **grid),
            *sparse_scatter_grad(x, counts, rows, bsize=(8, 7), bstride=(8, 7)),
        ]

    first = [result.get() for result in both()]
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    with stream, cupy.cuda.using_allocator(pool.malloc):
        both()
        stream.synchronize()
        stream.begin_capture()  # a synchronisation would end it with an error
        captured = both()
        graph = stream.end_capture()
    graph.launch(stream)
    stream.synchronize()
    for result, expected in zip(captured, first):
        assert identical(result, expected)


@pytest.mark.skipif(bool(cpu_cuda.why_unavailable()) and not os.environ.get("CI"), reason=cpu_cuda.why_unavailable())
@pytest.mark.parametrize("grid", [GRIDS[0], {"bsize": (2, 3), "boffset": (-1, -1), "bstride": (1, 2)}])
def test_the_kernels_take_the_views_that_gradients_hand_them(grid: dict[str, Any]) -> None:
    """Stacks of one repeated block, and of one number for each block, executed on a CPU."""
    y = whole((2, 5, 6, 4), 1).astype(np.float32)
    expected = sparse_scatter_grad(y, *indices_of(np), **grid)
    with cpu_cuda.device() as xp:
        found = sparse_scatter_grad(xp.asarray(y), *indices_of(xp), **grid)
        for result, wanted in zip(found, expected):
            assert identical(result, wanted)
        stack = xp.asarray(expected.grad_blocks)
        found_x = sparse_gather_grad(stack, *indices_of(xp), y.shape, **grid)
    assert identical(found_x, sparse_gather_grad(expected.grad_blocks, *indices_of(np), y.shape, **grid))


class TestErrors:
    grid: dict[str, Any] = {"bsize": (2, 2), "bstride": (2, 2)}

    def gather_grad(self, xp: Any, **changed: Any) -> Any:
        arguments: dict[str, Any] = {
            "grad_blocks": xp.ones((2, 2, 2, 3), np.float32),
            "bin_counts": xp.asarray([2], np.int32),
            "active_block_indices": xp.asarray([[0, 0, 0], [0, 1, 1]], np.int32),
            "x_shape": (1, 4, 6, 3),
            **self.grid,
            **changed,
        }
        return sparse_gather_grad(**arguments)

    def scatter_grad(self, xp: Any, **changed: Any) -> Any:
        arguments: dict[str, Any] = {
            "grad_y": xp.ones((1, 4, 6, 3), np.float32),
            "bin_counts": xp.asarray([2], np.int32),
            "active_block_indices": xp.asarray([[0, 0, 0], [0, 1, 1]], np.int32),
            **self.grid,
            **changed,
        }
        return sparse_scatter_grad(**arguments)

    def expect(self, kind: type[Exception], message: str, call: Any, xp: Any, **changed: Any) -> None:
        with pytest.raises(kind, match="^" + re.escape(message)):
            call(xp, **changed)

    def test_gather_grad(self, xp: Any) -> None:
        self.gather_grad(xp)
        call = self.gather_grad
        for bad in ((4, 6, 3), (1, 4, 6, -3), 7, (1, 4, 6, 3.0)):
            message = f"x_shape: expected 4 integers (N, H, W, C), each >= 0, got {bad!r}"
            self.expect(ValueError, message, call, xp, x_shape=bad)
        self.expect(
            ValueError, "grad_blocks: expected shape (2, 2, 2, 5) (M, height, width, C), got (2, 2, 2, 3)", call, xp,
            x_shape=(1, 4, 6, 5),
        )  # fmt: skip
        self.expect(TypeError, "grad_blocks: expected a NumPy or CuPy array, got int", call, xp, grad_blocks=1)
        bools = xp.ones((2, 2, 2, 3), bool)
        self.expect(TypeError, "grad_blocks: expected a dtype that add=True can sum", call, xp, grad_blocks=bools)
        self.expect(TypeError, "bin_counts: expected dtype int32", call, xp, bin_counts=xp.asarray([2], np.int64))
        self.expect(ValueError, "bsize: expected two integers", call, xp, bsize=(0, 2))
        out = xp.ones((1, 4, 6, 3), np.float64)
        self.expect(TypeError, "out: expected dtype float32 like grad_blocks, got float64", call, xp, out=out)
        out = xp.ones((1, 4, 6, 4), np.float32)
        self.expect(ValueError, "out: expected shape (1, 4, 6, 3) (N, H, W, C), got (1, 4, 6, 4)", call, xp, out=out)
        memory = xp.ones(100, np.float32)
        overlapping = {"grad_blocks": memory[:24].reshape(2, 2, 2, 3), "out": memory[20:92].reshape(1, 4, 6, 3)}
        message = "out: expected memory of its own, got an array that overlaps grad_blocks"
        self.expect(ValueError, message, call, xp, **overlapping)
        assert bool((memory == 1).all())

    def test_scatter_grad(self, xp: Any) -> None:
        self.scatter_grad(xp)
        call = self.scatter_grad
        bad = xp.ones((4, 6, 3))
        self.expect(ValueError, "grad_y: expected 4 dimensions (N, H, W, C), got shape (4, 6, 3)", call, xp, grad_y=bad)
        self.expect(TypeError, "out: expected two arrays (grad_blocks, grad_x), got int", call, xp, out=3)
        blocks, x = xp.ones((2, 2, 2, 3), np.float32), xp.ones((1, 4, 6, 3), np.float32)
        message = "out[0]: expected shape (2, 3, 2, 2) (M, C, height, width), got (2, 2, 2, 3)"
        self.expect(ValueError, message, call, xp, out=(blocks, x), transpose=True)
        self.expect(
            TypeError, "out[1]: expected dtype float32 like grad_y, got bool", call, xp, out=(blocks, x.astype(bool))
        )
        message = "out[1]: expected memory of its own, got an array that overlaps grad_y"
        self.expect(ValueError, message, call, xp, grad_y=x, out=(None, x))
        message = "out[1]: expected memory of its own, got an array that overlaps out[0]"
        memory = xp.ones(96, np.float32)
        both = memory[:24].reshape(2, 2, 2, 3), memory[12:84].reshape(1, 4, 6, 3)
        self.expect(ValueError, message, call, xp, out=both)
        assert bool((memory == 1).all())


def test_they_are_public() -> None:
    assert {"sparse_gather_grad", "sparse_scatter_grad"} <= set(sbnet_cupy.__all__)
