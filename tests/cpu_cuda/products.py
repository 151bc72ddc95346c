"""Matrix products at addresses of the stand-in's memory: what stands in for cuBLAS."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from . import memory

Array = np.ndarray[Any, Any]


class HostMultiplier:
    """``sbnet_cupy._cublas.Multiplier``, on the host."""

    def __enter__(self) -> HostMultiplier:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def multiply(self, x: int, w: int, y: int, sizes: Any, dtypes: Any, accumulate: bool, tf32: bool) -> None:
        rows, inner, columns = sizes
        factor, result = dtypes
        wide = np.float64 if factor.itemsize == 8 else np.float32
        product = _matrix(x, (rows, inner), factor).astype(wide) @ _matrix(w, (inner, columns), factor).astype(wide)
        target = _matrix(y, (rows, columns), result)
        target[...] = target.astype(wide) + product if accumulate else product


def _matrix(address: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    """The matrix, which must lie in one array."""
    size = shape[0] * shape[1] * dtype.itemsize
    if not memory.holds(address, size):
        raise IndexError(f"a matrix of {size} bytes leaves its array: {memory.describe(address + size)}")
    if address % dtype.itemsize:
        raise ValueError(f"a matrix of {dtype} at address {address:#x}")
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
