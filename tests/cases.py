"""Random calls of the ops: shapes that do not divide evenly, every dtype and layout, indices of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

Array = np.ndarray[Any, Any]

DTYPES = [
    np.dtype(name)
    for name in (
        "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 complex64 complex128".split()
    )
]
DTYPES.append(np.dtype(ml_dtypes.bfloat16))
MASK_DTYPES = [dtype for dtype in DTYPES if dtype.kind != "c"]
SUM_DTYPES = [dtype for dtype in DTYPES if dtype.kind != "b"]

LAYOUTS = ("nhwc", "nchw", "sliced", "reversed", "strided", "misaligned")

#: Few, because each is compiled once for every word and order that the cases ask for.
BLOCK_SIZES = [(1, 1), (2, 2), (3, 3), (4, 7), (5, 4), (8, 8), (1, 6), (17, 3)]

INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class Case:
    """One gather, or one scatter of `stack`, with the logical contents of its arrays."""

    x: Array
    stack: Array  # [M, h, w, C], whatever `transpose` says
    indices: Array
    count: int
    bsize: tuple[int, int]
    boffset: tuple[int, int]
    bstride: tuple[int, int]
    transpose: bool
    layouts: tuple[str, str]  # of image and stack

    @property
    def grid(self) -> dict[str, tuple[int, int]]:
        return {"bsize": self.bsize, "boffset": self.boffset, "bstride": self.bstride}

    def arrays(self, xp: Any) -> tuple[Any, Any, Any, Any]:
        """The arguments x, blocks, bin_counts and active_block_indices as arrays of `xp`, laid out."""
        blocks = self.stack.transpose(0, 3, 1, 2) if self.transpose else self.stack
        return (
            lay_out(self.x, self.layouts[0], xp),
            lay_out(blocks, self.layouts[1], xp),
            xp.asarray(np.array([self.count], np.int32)),
            xp.asarray(self.indices),
        )


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Any value of the dtype: every bit is random, so there are NaNs, infinities, subnormals and -0.0."""
    bits = rng.integers(0, 2 if dtype.kind == "b" else 256, (*shape, dtype.itemsize), np.uint8)
    return np.ascontiguousarray(bits).view(dtype).reshape(shape)


def lay_out(values: Array, layout: str, xp: Any) -> Any:
    """An array of `xp` with these values and the given memory layout, 4 axes in all."""
    a, b, c, d = values.shape
    if layout == "nhwc":
        view = xp.empty((a, b, c, d), values.dtype)
    elif layout == "nchw":
        view = xp.empty((a, d, b, c), values.dtype).transpose(0, 2, 3, 1)
    elif layout == "sliced":
        view = xp.empty((a + 1, b + 2, c + 1, d + 5), values.dtype)[1:, 1 : b + 1, :c, 2 : d + 2]
    elif layout == "reversed":
        view = xp.empty((a, b, c, d), values.dtype)[:, ::-1, ::-1]
    elif layout == "strided":
        view = xp.empty((a, 2 * b, c, 2 * d), values.dtype)[:, ::2, :, ::2]
    else:
        # Begins one element off any wide word.
        view = xp.empty(a * b * c * d + 1, values.dtype)[1:].reshape(a, b, c, d)
    view[...] = xp.asarray(values)
    return view


def identical(actual: Any, expected: Array, *, nan_payloads: bool = True) -> bool:
    """Whether two arrays agree in dtype, shape and every bit; arithmetic may leave NaNs with other payloads."""
    found = actual if isinstance(actual, np.ndarray) else actual.get()
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if not nan_payloads and expected.dtype.kind == "c":
        part = np.dtype(f"f{expected.itemsize // 2}")
        found = np.ascontiguousarray(found)[..., None].view(part)
        expected = np.ascontiguousarray(expected)[..., None].view(part)
    if not nan_payloads and expected.dtype.kind in "fV":
        found = np.where(np.isnan(found), found.dtype.type(np.nan), found)
        expected = np.where(np.isnan(expected), expected.dtype.type(np.nan), expected)
    return np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    bsize = draw(st.sampled_from(BLOCK_SIZES))
    far = st.sampled_from([-(2**40), -(2**31), 2**31, 2**40])
    near = st.integers(-20, 20)
    boffset = draw(st.tuples(near, near) | st.tuples(near | far, near | far))
    # Equal to the size, overlapping by any amount, with holes, or so long that indices overflow 64 bits.
    bstride = tuple(draw(st.just(size) | st.integers(1, size + 3) | st.sampled_from([2**31, 2**61])) for size in bsize)
    return bsize, boffset, bstride  # type: ignore[return-value]


@st.composite
def cases(draw: st.DrawFn, dtypes: list[np.dtype[Any]] = DTYPES) -> Case:
    dtype = draw(st.sampled_from(dtypes))
    bsize, boffset, bstride = draw(grids())
    small = st.integers(0, 22)
    channels = draw(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 40]))
    shape = (draw(st.integers(0, 3)), draw(small), draw(small), channels)
    triple = st.tuples(
        st.integers(-1, shape[0]),
        st.integers(*_around(shape[1], bsize[0], boffset[0], bstride[0])),
        st.integers(*_around(shape[2], bsize[1], boffset[1], bstride[1])),
    )
    if draw(st.booleans()):
        hostile = st.sampled_from([INT32.min, -(2**30), -1, 0, 2**30, INT32.max])
        triple = triple | st.tuples(hostile, hostile, hostile) | st.tuples(st.just(0), hostile, hostile)
    rows = draw(st.lists(triple, max_size=12))
    if rows and draw(st.booleans()):
        rows += draw(st.lists(st.sampled_from(rows), max_size=4))  # equal blocks
    if draw(st.booleans()):
        rows = sorted(set(rows))
    indices = np.array(rows, np.int32).reshape(-1, 3)
    count = draw(st.just(len(rows)) | st.integers(0, len(rows)) | st.sampled_from([-1, INT32.min, INT32.max]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Case(
        x=random_bits(rng, shape, dtype),
        stack=random_bits(rng, (len(rows), *bsize, channels), dtype),
        indices=indices,
        count=count,
        bsize=bsize,
        boffset=boffset,
        bstride=bstride,
        transpose=draw(st.booleans()),
        layouts=(draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
    )


def _around(extent: int, size: int, offset: int, stride: int) -> tuple[int, int]:
    """Indices of the blocks that touch the image, and one more on each side, as far as they fit int32."""
    first = (-size - offset) // stride
    last = (extent - offset) // stride + 1
    return tuple(int(np.clip(v, INT32.min, INT32.max)) for v in (first, last))  # type: ignore[return-value]


@dataclass(frozen=True)
class MaskCase:
    """One ``reduce_mask``."""

    mask: Array
    bcount: tuple[int, int]
    bsize: tuple[int, int]
    boffset: tuple[int, int]
    bstride: tuple[int, int]
    tol: float
    avgpool: bool
    capacity: int | None
    layout: str

    @property
    def arguments(self) -> dict[str, Any]:
        names = ("bsize", "boffset", "bstride", "tol", "avgpool", "capacity")
        return {name: getattr(self, name) for name in names}

    def array(self, xp: Any) -> Any:
        return lay_out(self.mask[..., None], self.layout, xp)


@st.composite
def mask_cases(draw: st.DrawFn) -> MaskCase:
    dtype = draw(st.sampled_from(MASK_DTYPES))
    bsize, boffset, bstride = draw(grids())
    if draw(st.booleans()):  # any size at all: masks are not tied to the sizes that gather compiles
        bsize = (draw(st.integers(1, 40)), draw(st.integers(1, 400)))
    shape = (draw(st.integers(0, 2)), draw(st.integers(0, 22)), draw(st.integers(0, 22) | st.just(700)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["bits", "sparse", "eighths", "empty", "full"]))
    if kind == "bits":
        mask = random_bits(rng, shape, dtype)
    elif kind == "sparse":
        mask = (rng.random(shape) < 0.02).astype(dtype)
    elif kind == "eighths":  # sums are exact in any order, and averages meet tol exactly
        mask = (rng.integers(0, 9, shape) / 8).astype(dtype)
    else:
        mask = np.full(shape, kind == "full", dtype)
    tols = [0.5, 0.0, -0.0, -1.0, 0.125, 1.0, 127.5, 255.0, 2.0**53, 1e300, np.inf, -np.inf, np.nan, 1e-40]
    tol = draw(st.sampled_from(tols) | st.floats(0, 1))
    if mask.size and draw(st.booleans()):
        tol = float(mask.flat[draw(st.integers(0, mask.size - 1))])
    bcount = (draw(st.integers(0, 6)), draw(st.integers(0, 6) | st.just(150)))
    blocks = shape[0] * bcount[0] * bcount[1]
    return MaskCase(
        mask=mask,
        bcount=bcount,
        bsize=bsize,
        boffset=boffset,
        bstride=bstride,
        tol=tol,
        avgpool=draw(st.booleans()),
        capacity=draw(st.none() | st.integers(0, blocks + 3)),
        layout=draw(st.sampled_from(LAYOUTS)),
    )
