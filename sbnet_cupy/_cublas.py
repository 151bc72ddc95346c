"""One matrix product of cuBLAS, through ctypes.

CuPy's own bindings refuse to run while a stream is captured in a CUDA graph (as of 14.2), which cuBLAS itself allows.
The library and the handle are CuPy's; with a workspace from CuPy's pool, a captured product needs no memory of its own.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import cupy
import numpy as np

#: cudaDataType_t and cublasComputeType_t, from library_types.h and cublas_api.h of CUDA 12 and 13.
_DATA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
_COMPUTE_32F, _COMPUTE_64F, _COMPUTE_32F_FAST_TF32 = 68, 70, 77

_OP_N = 0
_GEMM_DEFAULT = -1
#: CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: the default, but partial sums are never rounded to a half type.
_MATH_MODE = 16

#: What NVIDIA's documentation of cublasSetWorkspace recommends for Hopper and later; older GPUs use less of it.
WORKSPACE_BYTES = 32 << 20

#: The factors 0 and 1 on the host, where cuBLAS reads them at the call (its default pointer mode).
_FLOATS = ctypes.byref(ctypes.c_float(0)), ctypes.byref(ctypes.c_float(1))
_DOUBLES = ctypes.byref(ctypes.c_double(0)), ctypes.byref(ctypes.c_double(1))


class Multiplier:
    """A context in which to multiply, on what are the current device and stream when it begins.

    Its workspace goes back to CuPy's pool at the end: whoever takes it from there for the same stream comes after the
    products.
    """

    def __enter__(self) -> Multiplier:
        self._handle = cupy.cuda.device.get_cublas_handle()
        self._workspace = cupy.cuda.alloc(WORKSPACE_BYTES)
        self._mode = ctypes.c_int()
        # Before each product of its own, CuPy sets the stream again, and that takes the workspace away.
        _call("SetStream_v2", self._handle, cupy.cuda.get_current_stream().ptr)
        _call("SetWorkspace_v2", self._handle, self._workspace.ptr, WORKSPACE_BYTES)
        _call("GetMathMode", self._handle, ctypes.byref(self._mode))
        _call("SetMathMode", self._handle, _MATH_MODE)
        return self

    def __exit__(self, *_: object) -> None:
        _call("SetMathMode", self._handle, self._mode)
        del self._workspace

    def multiply(
        self,
        x: int,
        w: int,
        y: int,
        sizes: tuple[int, int, int],
        dtypes: tuple[np.dtype[Any], np.dtype[Any]],
        accumulate: bool,
        tf32: bool,
    ) -> None:
        """``y = x @ w``, or ``y += x @ w`` with `accumulate`, of dense row-major matrices at these addresses.

        `sizes` are (rows of x, columns of x, columns of w), `dtypes` those of x and w, and of y. Sums are
        float32, or float64 for float64; `tf32` lets float32 factors be rounded to TF32.
        """
        rows, inner, columns = sizes
        factor, result, compute = _types(*dtypes, tf32)
        zero, one = _DOUBLES if compute == _COMPUTE_64F else _FLOATS
        # cuBLAS counts along columns: to it, a row-major matrix is its own transpose, and y' = w' x'.
        _call(
            "GemmEx_64",
            *(self._handle, _OP_N, _OP_N, columns, rows, inner, one),
            *(w, factor, columns),
            *(x, factor, inner),
            one if accumulate else zero,
            *(y, result, columns),
            *(compute, _GEMM_DEFAULT),
        )


@functools.cache
def _types(factor: np.dtype[Any], result: np.dtype[Any], tf32: bool) -> tuple[int, int, int]:
    """Of a product: cuBLAS's numbers for the types of its factors, of its result, and of its sums."""
    return _DATA_TYPES[factor.name], _DATA_TYPES[result.name], compute_type(factor, tf32)


def compute_type(factor: np.dtype[Any], tf32: bool) -> int:
    """In what products of `factor` are summed. Without `tf32`, float32 is IEEE float32 (CUBLAS_COMPUTE_32F)."""
    if factor.name == "float64":
        return _COMPUTE_64F
    return _COMPUTE_32F_FAST_TF32 if tf32 and factor.name == "float32" else _COMPUTE_32F


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), f"cublas{name}")(*arguments)
    if status:
        raise RuntimeError(f"cublas{name}: {_library().cublasGetStatusString(status).decode()}")


@functools.cache
def _library() -> Any:
    """The cuBLAS that CuPy has loaded."""
    from cuda import pathfinder  # what CuPy finds its libraries with, and depends on

    library = ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublas").abs_path)
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    matrix: list[Any] = [pointer, number, size]
    sizes: list[Any] = [pointer, number, number, size, size, size, pointer]
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasSetWorkspace_v2.argtypes = [pointer, pointer, ctypes.c_size_t]
    library.cublasGetMathMode.argtypes = [pointer, pointer]
    library.cublasSetMathMode.argtypes = [pointer, number]
    library.cublasGemmEx_64.argtypes = [*sizes, *matrix, *matrix, pointer, *matrix, number, number]
    library.cublasGetStatusString.argtypes = [number]
    library.cublasGetStatusString.restype = ctypes.c_char_p
    return library
