"""Every error of the ops, with its message; after it, nothing has changed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from sbnet_cupy import BlockIndices, reduce_mask, sparse_gather, sparse_scatter, sparse_scatter_var

GRID: dict[str, Any] = {"bsize": (2, 2), "bstride": (2, 2)}


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


class Arguments:
    """Good arguments of all ops, to spoil one at a time."""

    def __init__(self, xp: Any) -> None:
        self.x = xp.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
        self.blocks = xp.full((2, 2, 2, 3), -1, np.float32)
        self.bin_counts = xp.asarray([2], np.int32)
        self.indices = xp.asarray([[0, 0, 0], [1, 1, 2]], np.int32)
        self.mask = xp.ones((2, 4, 6), np.float32)

    def gather(self, **options: Any) -> Any:
        return sparse_gather(self.x, self.bin_counts, self.indices, **{**GRID, **options})

    def scatter(self, **options: Any) -> Any:
        return sparse_scatter(self.blocks, self.bin_counts, self.indices, self.x, **{**GRID, **options})

    def scatter_var(self, **options: Any) -> Any:
        return sparse_scatter_var(self.blocks, self.bin_counts, self.indices, self.x, **{**GRID, **options})

    def reduce(self, bcount: Any = (2, 3), **options: Any) -> Any:
        return reduce_mask(self.mask, bcount, **{**GRID, **options})


@pytest.fixture
def good(xp: Any) -> Arguments:
    return Arguments(xp)


def expect(kind: type[Exception], message: str, call: Any, **options: Any) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call(**options)


def transfers(good: Arguments) -> list[Any]:
    return [good.gather, good.scatter, good.scatter_var]


def test_good_arguments_are_good(good: Arguments) -> None:
    for call in [*transfers(good), good.reduce]:
        call()


@pytest.mark.parametrize("name", ["x", "bin_counts", "active_block_indices"])
@pytest.mark.parametrize("value", [None, [1, 2], 3.5])
def test_not_an_array(good: Arguments, name: str, value: Any) -> None:
    setattr(good, {"active_block_indices": "indices"}.get(name, name), value)
    for call in transfers(good):
        expect(TypeError, f"{name}: expected a NumPy or CuPy array, got {type(value).__name__}", call)


def test_mask_is_not_an_array() -> None:
    for value in ([[[1]]], None):
        with pytest.raises(TypeError, match=r"^mask: expected a NumPy or CuPy array, got "):
            reduce_mask(value, (1, 1), **GRID)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["x", "bin_counts", "indices"])
def test_mixed_kinds(name: str) -> None:
    cupy = pytest.importorskip("cupy")
    mixed = Arguments(cupy)
    setattr(mixed, name, getattr(Arguments(np), name))
    for call in transfers(mixed):
        with pytest.raises(TypeError, match=r"expected a (cupy|numpy) array like (x|blocks), got "):
            call()
    with pytest.raises(TypeError, match=r"^out: expected a cupy array like x, got numpy.ndarray"):
        Arguments(cupy).gather(out=np.empty((2, 2, 2, 3), np.float32))


@pytest.mark.parametrize("shape", [(4, 6, 3), (1, 2, 4, 6, 3), ()])
def test_rank_of_the_image(xp: Any, good: Arguments, shape: tuple[int, ...]) -> None:
    good.x = xp.zeros(shape, np.float32)
    for call in transfers(good):
        expect(ValueError, f"x: expected 4 dimensions (N, H, W, C), got shape {shape}", call)


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6, 3), (1, 2, 4, 6, 1)])
def test_shape_of_the_mask(xp: Any, good: Arguments, shape: tuple[int, ...]) -> None:
    good.mask = xp.zeros(shape)
    expect(ValueError, f"mask: expected shape (N, H, W) or (N, H, W, 1), got {shape}", good.reduce)


def test_dtypes_that_are_no_numbers(good: Arguments) -> None:
    if isinstance(good.x, np.ndarray):  # CuPy has no such arrays
        good.x, good.mask = np.zeros((1, 2, 2, 1), "M8[s]"), np.zeros((1, 2, 2), object)
        for call in transfers(good):
            expect(TypeError, "x: expected a numeric or bool dtype, got datetime64[s]", call)
        expect(TypeError, "mask: expected a bool, integer or floating dtype, got object", good.reduce)


def test_complex_mask(good: Arguments) -> None:
    good.mask = good.mask.astype(np.complex64)
    expect(TypeError, "mask: expected a bool, integer or floating dtype, got complex64", good.reduce)


@pytest.mark.parametrize("dtype", ["int64", "uint32", "float32"])
def test_dtype_of_indices_and_counts(good: Arguments, dtype: str) -> None:
    counts = good.bin_counts
    good.bin_counts = counts.astype(dtype)
    for call in transfers(good):
        expect(TypeError, f"bin_counts: expected dtype int32, got {dtype}", call)
    good.bin_counts, good.indices = counts, good.indices.astype(dtype)
    for call in transfers(good):
        expect(TypeError, f"active_block_indices: expected dtype int32, got {dtype}", call)


def test_shape_of_indices_and_counts(good: Arguments) -> None:
    counts, indices = good.bin_counts, good.indices
    for bad in (counts.reshape(()), counts[:0], counts[None]):
        good.bin_counts = bad
        for call in transfers(good):
            expect(ValueError, f"bin_counts: expected shape (1,), got {bad.shape}", call)
    good.bin_counts = counts
    for bad in (indices[0], indices[:, :2], indices[None]):
        good.indices = bad
        for call in transfers(good):
            expect(ValueError, f"active_block_indices: expected shape (M, 3), got {bad.shape}", call)


def test_blocks_that_do_not_fit(good: Arguments) -> None:
    blocks = good.blocks
    for bad in (blocks[:1], blocks[:, :1], blocks[:, :, :1], blocks[..., :2], blocks[0]):
        good.blocks = bad
        message = f"blocks: expected shape (2, 2, 2, 3) (M, height, width, C), got {bad.shape}"
        expect(ValueError, message, good.scatter)
        expect(ValueError, message, good.scatter_var)
    good.blocks = blocks
    message = "blocks: expected shape (2, 3, 2, 2) (M, C, height, width), got (2, 2, 2, 3)"
    expect(ValueError, message, good.scatter, transpose=True)
    good.blocks = blocks.astype(np.float64)
    expect(TypeError, "blocks: expected dtype float32 like x, got float64", good.scatter)
    expect(TypeError, "blocks: expected dtype float32 like x, got float64", good.scatter_var)


def test_outputs_that_do_not_fit(xp: Any, good: Arguments) -> None:
    expect(
        ValueError,
        "out: expected shape (2, 2, 2, 3) (M, height, width, C), got (2, 2, 2, 4)",
        good.gather,
        out=xp.empty((2, 2, 2, 4), np.float32),
    )
    expect(
        ValueError,
        "out: expected shape (2, 3, 2, 2) (M, C, height, width), got (2, 2, 2, 3)",
        good.gather,
        out=xp.empty((2, 2, 2, 3), np.float32),
        transpose=True,
    )
    expect(
        TypeError, "out: expected dtype float32 like x, got int32", good.gather, out=xp.empty((2, 2, 2, 3), np.int32)
    )
    expect(
        ValueError,
        "out: expected shape (2, 4, 6, 3) (N, H, W, C), got (1, 4, 6, 3)",
        good.scatter,
        out=xp.empty((1, 4, 6, 3), np.float32),
    )
    expect(TypeError, "out: expected dtype float32 like x, got bool", good.scatter, out=xp.empty(good.x.shape, bool))
    expect(TypeError, "out: expected a NumPy or CuPy array, got tuple", good.scatter, out=(good.x,))


def test_outputs_that_overlap_an_input(good: Arguments) -> None:
    before = good.x.copy()
    message = "out: expected memory of its own, got an array that overlaps x"
    expect(ValueError, message, good.scatter, out=good.x)
    expect(ValueError, message, good.scatter, out=good.x[:, ::-1])
    expect(ValueError, message, good.gather, out=good.x.ravel()[1:25].reshape(2, 2, 2, 3))
    good.blocks = good.x.ravel()[3:27].reshape(2, 2, 2, 3)
    expect(ValueError, "x: expected memory of its own, got an array that overlaps blocks", good.scatter_var)
    assert bool((good.x == before).all())


def test_outputs_that_only_interleave_are_fine(xp: Any, good: Arguments) -> None:
    both = xp.zeros((2, 4, 6, 6), np.float32)
    both[..., :3] = good.x
    expected = good.scatter()
    good.x = both[..., :3]
    result = good.scatter(out=both[..., 3:])
    assert bool((result == expected).all())


def test_outputs_whose_elements_share_memory(xp: Any, good: Arguments) -> None:
    stride_tricks = np.lib.stride_tricks if xp is np else xp.lib.stride_tricks
    out = stride_tricks.as_strided(xp.zeros(64, np.float32), (2, 2, 2, 3), (16, 8, 4, 4))
    expect(ValueError, "out: expected an array whose elements lie apart, got shape (2, 2, 2, 3)", good.gather, out=out)
    good.x = stride_tricks.as_strided(xp.zeros(64, np.float32), (2, 4, 6, 3), (0, 72, 12, 4))
    expect(ValueError, "x: expected an array whose elements lie apart", good.scatter_var)
    good.gather()  # to read from such an array is fine


def test_read_only_outputs() -> None:
    good = Arguments(np)
    good.x.flags.writeable = False
    expect(ValueError, "x: expected a writable array, got a read-only one", good.scatter_var)
    good.scatter()
    out = np.empty((2, 2, 2, 3), np.float32)
    out.flags.writeable = False
    expect(ValueError, "out: expected a writable array, got a read-only one", good.gather, out=out)


@pytest.mark.parametrize("name", ["bsize", "bstride"])
@pytest.mark.parametrize("bad", [(0, 2), (2, -1), (2,), 2, (2, 2.5), "22", None])
def test_sizes_and_strides(good: Arguments, name: str, bad: Any) -> None:
    message = f"{name}: expected two integers (height, width), each >= 1, got {bad!r}"
    for call in [*transfers(good), good.reduce]:
        expect(ValueError, message, call, **{name: bad})


@pytest.mark.parametrize("bad", [(0.5, 0), (1, 2, 3), 7])
def test_offsets(good: Arguments, bad: Any) -> None:
    for call in [*transfers(good), good.reduce]:
        expect(ValueError, f"boffset: expected two integers (height, width), got {bad!r}", call, boffset=bad)


def test_adding(xp: Any, good: Arguments) -> None:
    message = "atomic: expected True to add blocks that overlap (bsize (2, 2) exceeds bstride (2, 1)), got False"
    expect(ValueError, message, good.scatter, add=True, bstride=(2, 1))
    expect(ValueError, message, good.scatter_var, add=True, bstride=(2, 1))
    good.scatter(add=True)
    good.scatter(add=True, atomic=True, bstride=(2, 1))
    good.x, good.blocks = good.x.astype(bool), good.blocks.astype(bool)
    expect(TypeError, "x: expected a dtype that add=True can sum", good.scatter, add=True)
    good.scatter()


def test_counts_of_blocks(good: Arguments) -> None:
    for bad in [(-1, 2), (1,), 3, (1.5, 2)]:
        expect(
            ValueError,
            f"bcount: expected two integers (height, width), each >= 0, got {bad!r}",
            good.reduce,
            bcount=bad,
        )
    message = "bcount: expected at most 2**31 - 1 blocks in the batch, got 2 x 32768 x 32768"
    expect(ValueError, message, good.reduce, bcount=(2**15, 2**15))


def test_tol_and_capacity(good: Arguments) -> None:
    for bad in ("1", None, 1j, [0.5]):
        expect(TypeError, f"tol: expected a real number, got {type(bad).__name__}", good.reduce, tol=bad)
    good.reduce(tol=10**400)
    for bad in (1.5, "3", True):
        message = f"capacity: expected an integer or None, got {type(bad).__name__}"
        expect(TypeError, message, good.reduce, capacity=bad)
    for bad in (-1, 2**31):
        expect(ValueError, f"capacity: expected an integer from 0 to 2**31 - 1, got {bad}", good.reduce, capacity=bad)


def test_where_to_put_the_blocks_of_a_mask(xp: Any, good: Arguments) -> None:
    def out(rows: int = 12, dtype: Any = np.int32, count: int = 1) -> BlockIndices:
        return BlockIndices(xp.zeros((rows, 3), dtype), xp.zeros(count, np.int32))

    good.reduce(out=out())
    good.reduce(capacity=7, out=out(7))
    expect(TypeError, "out: expected BlockIndices, got tuple", good.reduce, out=tuple(out()))
    message = "out.active_block_indices: expected shape (12, 3) (M, 3), got (7, 3)"
    expect(ValueError, message, good.reduce, out=out(7))
    message = "out.active_block_indices: expected shape (7, 3) (M, 3), got (12, 3)"
    expect(ValueError, message, good.reduce, capacity=7, out=out())
    message = "out.active_block_indices: expected dtype int32 like the result, got int64"
    expect(TypeError, message, good.reduce, out=out(dtype=np.int64))
    expect(ValueError, "out.bin_counts: expected shape (1,) (1), got (2,)", good.reduce, out=out(count=2))
    strided = BlockIndices(xp.zeros((24, 3), np.int32)[::2], xp.zeros(1, np.int32))
    expect(ValueError, "out.active_block_indices: expected a contiguous array", good.reduce, out=strided)
    memory = xp.zeros(40, np.int32)
    shared = BlockIndices(memory[:36].reshape(12, 3), memory[35:36])
    message = "out.bin_counts: expected memory of its own, got an array that overlaps out.active_block_indices"
    expect(ValueError, message, good.reduce, out=shared)


def test_nothing_changes_after_an_error(good: Arguments) -> None:
    names = ("x", "blocks", "bin_counts", "indices")
    before = {name: getattr(good, name).copy() for name in names}
    for options in ({"add": True, "bstride": (1, 1)}, {"bsize": (2, 3)}, {"transpose": True}, {"boffset": 1}):
        with pytest.raises(ValueError, match=": expected "):
            good.scatter_var(**options)
    for name in names:
        assert bool((getattr(good, name) == before[name]).all())


@pytest.mark.gpu
def test_misaligned_device_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    good = Arguments(cupy)
    memory = cupy.zeros(1024, np.uint8)
    pointer = cupy.cuda.MemoryPointer(memory.data.mem, 2)
    good.x = cupy.ndarray((1, 2, 2, 3), np.float32, pointer)
    with pytest.raises(ValueError, match=r"^x: expected an address and strides that are multiples of 4 bytes"):
        good.gather()
