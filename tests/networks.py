"""Convolutions and bottlenecks once more, in float64 from the specification alone, with a bound of the rounding error.

Nothing is shared with the package. A value travels with the error that arithmetic may have left in it:

- A sum of n products, in any order, is off by at most ``gamma_n * sum |x||w|``, with ``gamma_n = n*u / (1 - n*u)``
  (N. Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1); errors of x come in times |w|.
- A product or a sum of two is off by u times its size; ReLU enlarges no error.
- Rounding to a half type is off by its u times the size, or by half of the smallest subnormal number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

Array = np.ndarray[Any, Any]
Pair = tuple[int, int]

DTYPES = [np.dtype(name) for name in ("float64", "float32", "float16")] + [np.dtype(ml_dtypes.bfloat16)]

#: Unit roundoff, and half of the smallest positive number.
_UNITS = {
    "float64": (2.0**-53, 2.0**-1075),
    "float32": (2.0**-24, 2.0**-150),
    "float16": (2.0**-11, 2.0**-25),
    "bfloat16": (2.0**-8, 2.0**-134),
    "tf32": (2.0**-11, 0.0),
}


@dataclass(frozen=True)
class Bounded:
    """Values, and how far from them a computation may come out; float64."""

    value: Array
    error: Array

    def assert_near(self, found: Any, where: Array) -> None:
        """Raise unless `found` [N, H, W, C] is near enough in the pixels that `where` [N, H, W] names."""
        numbers = to_host(found).astype(np.float64)
        assert numbers.shape == self.value.shape
        distance = np.abs(numbers - self.value)[where]
        # The value itself was computed in float64, with an error of its own.
        worst = np.max(distance - 2 * self.error[where], initial=0.0)
        assert worst <= 0, f"off by up to {distance.max()}, {worst} beyond the bound"


def to_host(array: Any) -> Array:
    return array if isinstance(array, np.ndarray) else array.get()


def exactly(x: Array) -> Bounded:
    return Bounded(x.astype(np.float64), np.zeros(x.shape))


def paddings(size: Pair, ksize: Pair, strides: Pair, padding: Any) -> tuple[Pair, Pair]:
    """Pixels before and after, along each axis, as TensorFlow documents it."""
    if not isinstance(padding, str):
        return padding
    found = []
    for n, k, s in zip(size, ksize, strides):
        # "SAME": as many zeros as ceil(n / s) positions of the kernel need, the odd one behind.
        total = max(k - s if n % s == 0 else k - n % s, 0) if padding == "SAME" else 0
        found.append((total // 2, total - total // 2))
    return found[0], found[1]


def correlate(x: Array, w: Array, strides: Pair, padding: Any) -> Array:
    """The convolution of neural networks, one output pixel at a time."""
    (top, bottom), (left, right) = paddings(x.shape[1:3], w.shape[:2], strides, padding)
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    height, width = (max(0, (n - k) // s + 1) for n, k, s in zip(padded.shape[1:3], w.shape, strides))
    y = np.zeros((x.shape[0], height, width, w.shape[3]))
    for i, j in np.ndindex(height, width):
        window = padded[:, i * strides[0] :, j * strides[1] :][:, : w.shape[0], : w.shape[1]]
        y[:, i, j] = np.einsum("nabc,abck->nk", window, w)
    return y


def convolved(x: Bounded, w: Array, strides: Pair, padding: Any, dtype: np.dtype[Any], tf32: bool = False) -> Bounded:
    w = w.astype(np.float64)
    value = correlate(x.value, w, strides, padding)
    terms = w.shape[0] * w.shape[1] * w.shape[2]
    u = _UNITS["float64" if dtype.itemsize == 8 else "float32"][0]
    gamma = terms * u / (1 - terms * u)
    if tf32:  # both factors rounded first
        gamma += 2.01 * _UNITS["tf32"][0]
    absolute = np.abs(w)
    error = correlate(x.error, absolute, strides, padding)
    error += gamma * correlate(np.abs(x.value) + x.error, absolute, strides, padding)
    # A library may round half types here already.
    return rounded(Bounded(value, error), dtype) if dtype.itemsize == 2 else Bounded(value, error)


def rounded(x: Bounded, dtype: np.dtype[Any]) -> Bounded:
    u, smallest = _UNITS[dtype.name]
    return Bounded(x.value, x.error + u * (np.abs(x.value) + x.error) + smallest)


def activated(x: Bounded, scale: Array | None, shift: Array | None, relu: bool, dtype: np.dtype[Any]) -> Bounded:
    arithmetic = np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)
    if scale is not None:
        scale = scale.astype(np.float64)
        x = rounded(Bounded(x.value * scale, x.error * np.abs(scale)), arithmetic)
    if shift is not None:
        x = rounded(Bounded(x.value + shift.astype(np.float64), x.error), arithmetic)
    if relu:
        x = Bounded(np.maximum(x.value, 0), x.error)
    return rounded(x, dtype)


def bottleneck(x: Array, weights: Any, strides: Pair, tf32: bool = False, wide_sums: bool = False) -> Bounded:
    """The formula of the specification; `weights` are NumPy arrays. `wide_sums`: none is rounded to a half type."""
    inner, same = exactly(x), (1, 1)
    sums = np.dtype(np.float32) if wide_sums and x.dtype.itemsize == 2 else x.dtype
    if weights.scale1 is not None:
        inner = activated(inner, weights.scale1, weights.shift1, True, x.dtype)
    inner = convolved(inner, weights.conv1, same, "SAME", sums, tf32)
    inner = activated(inner, weights.scale2, weights.shift2, True, x.dtype)
    inner = convolved(inner, weights.conv2, strides, "SAME", sums, tf32)
    inner = activated(inner, weights.scale3, weights.shift3, True, x.dtype)
    inner = convolved(inner, weights.conv3, same, "SAME", sums, tf32)
    shortcut = exactly(x)
    if weights.project is not None:
        shortcut = convolved(shortcut, weights.project, strides, "SAME", x.dtype, tf32)
    return rounded(Bounded(shortcut.value + inner.value, shortcut.error + inner.error), x.dtype)


def tiles(indices: Any, params: Any, shape: Sequence[int]) -> Array:
    """Which pixels of the output [N, H, W] the active blocks compute."""
    covered = np.zeros(shape[:3], bool)
    height, width = params.bsize_out
    count = int(to_host(indices.bin_counts)[0])
    for n, i, j in to_host(indices.active_block_indices)[:count].tolist():
        covered[n, i * height : (i + 1) * height, j * width : (j + 1) * width] = True
    return covered


@dataclass(frozen=True)
class Geometry:
    """An image, a chain's kernel, and the blocks that are active."""

    shape: tuple[int, int, int, int]
    ksize: Pair
    strides: Pair
    padding: Any
    bsize_out: Pair
    density: float
    #: Rows of the indices beyond the number of active blocks; None: as many rows as blocks.
    spare: int | None
    seed: int

    def mask(self) -> Array:
        rng = np.random.default_rng(self.seed)
        return rng.random(self.shape[:3]) < self.density

    def block(self, ksize: Pair, strides: Pair) -> Pair:
        """The block that leaves tiles of `bsize_out`."""
        height, width = (k + (out - 1) * s for k, out, s in zip(ksize, self.bsize_out, strides))
        return height, width


@st.composite
def geometries(draw: st.DrawFn, same_padding: bool = False) -> Geometry:
    pairs = st.tuples(st.integers(1, 7), st.integers(1, 7))
    small = st.integers(0, 4)
    explicit = st.tuples(st.tuples(small, small), st.tuples(small, small))
    return Geometry(
        # Images smaller than a block, and empty ones, are among them.
        shape=(draw(st.integers(0, 2)), draw(st.integers(0, 17)), draw(st.integers(0, 17)), draw(st.integers(1, 5))),
        ksize=draw(pairs | st.sampled_from([(1, 1), (3, 3), (3, 3)])),
        strides=draw(st.sampled_from([(1, 1), (2, 2), (1, 1), (2, 1), (3, 2)])),
        padding="SAME" if same_padding else draw(st.sampled_from(["SAME", "VALID"]) | explicit),
        bsize_out=(draw(st.integers(1, 8)), draw(st.integers(1, 8))),
        density=draw(st.sampled_from([0.0, 0.01, 0.1, 1.0])),
        spare=draw(st.none() | st.integers(-3, 5)),
        seed=draw(st.integers(0, 2**16)),
    )


#: Few block sizes, because each is compiled; borders, ragged tiles, strides, rows out of use, too few rows.
DEVICE_CASES = {
    "3x3": Geometry((2, 13, 16, 8), (3, 3), (1, 1), "SAME", (4, 5), 0.03, None, 0),
    "3x3-spare-rows": Geometry((2, 13, 16, 3), (3, 3), (1, 1), "SAME", (4, 5), 0.03, 4, 1),
    "3x3-too-few-rows": Geometry((2, 13, 16, 6), (3, 3), (1, 1), "SAME", (4, 5), 0.1, -3, 2),
    "3x3-all": Geometry((1, 3, 4, 4), (3, 3), (1, 1), "VALID", (4, 5), 1.0, None, 3),
    "3x3-none": Geometry((1, 13, 16, 4), (3, 3), (1, 1), "SAME", (4, 5), 0.0, 2, 4),
    "3x3-stride": Geometry((2, 14, 15, 8), (3, 3), (2, 2), "SAME", (2, 3), 0.03, None, 5),
    "2x5-strides": Geometry((1, 14, 15, 5), (2, 5), (3, 1), ((1, 0), (3, 2)), (2, 2), 0.1, 1, 6),
    "1x1-stride": Geometry((2, 14, 15, 4), (1, 1), (2, 2), "SAME", (2, 2), 0.03, None, 7),
    "1x1": Geometry((2, 14, 15, 4), (1, 1), (1, 1), "SAME", (5, 7), 0.03, None, 8),
}


def capacity(spare: int | None, count: int) -> int | None:
    return None if spare is None else max(0, count + spare)
