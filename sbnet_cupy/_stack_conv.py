"""The convolution of every row of a stack, without padding: what an engine is, and which one does it.

NumPy arrays have one engine. CuPy arrays have two: cuBLAS, which is always there, and cuDNN, where it is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np

from . import _device, _stack_conv_numpy

#: Environment variable that names the engine for CuPy arrays: ``cublas``, ``cudnn``, or ``auto`` (the default).
ENGINE_VARIABLE = "SBNET_CUPY_CONV"

_ENGINES = ("auto", "cublas", "cudnn")

#: Where ``auto`` takes cuDNN, if it is installed: for kernels of at least this many pixels, by the arithmetic; None is
#: never. One 3x3 convolution of the active tenth of 400x700x24 and 50x88x96 pixels, on an H200 in a CUDA graph: 21 and
#: 16 us with cuDNN in TF32, 63 and 40 us with cuBLAS; in float16 34 and 14 us, 48 and 30 us. A kernel of one pixel is
#: one product for cuBLAS too. In IEEE float32 these two take 39 and 38 us, and 63 and 44 with cuBLAS, but wider ones,
#: for which the composed engine is taken, have not been measured.
_CUDNN_KERNEL_PIXELS: dict[str, int | None] = {"float16": 9, "bfloat16": 9, "tf32": 9, "float32": None}


class Engine(Protocol):
    """A module with these two functions."""

    def room(self, rows: int) -> int:
        """How many rows a stack had better have room for, so that `rows` of them are convolved."""

    def convolve(self, stack: Any, w: Any, strides: tuple[int, int], tf32: bool) -> Any:
        """Convolve ``[M, h, w, C]`` with ``[kh, kw, C, K]`` of the same dtype to ``[M, h', w', K]``.

        The result has the dtype of the stack, or that in which it was summed; it may be a view of a larger array, which
        nobody else holds.
        """


def choose_engine(
    xp: ModuleType, dtype: np.dtype[Any], ksize: tuple[int, int], tf32: bool = False, engine: str | None = None
) -> Engine:
    """The engine for a convolution: `engine`, what the environment names, or what was measured to be fastest."""
    if xp is np:
        return _stack_conv_numpy
    return _engine(dtype, ksize, tf32, engine or os.environ.get(ENGINE_VARIABLE, "auto"))


@functools.lru_cache(maxsize=256)
def _engine(dtype: np.dtype[Any], ksize: tuple[int, int], tf32: bool, name: str) -> Engine:
    if name not in _ENGINES:
        raise ValueError(f"{ENGINE_VARIABLE}: expected one of {', '.join(_ENGINES)}, got {name!r}")
    if dtype.name == "float64":  # which cuDNN's engines do not take in channels-last layouts
        name = "cublas"
    if name == "auto":
        limit = _CUDNN_KERNEL_PIXELS["tf32" if tf32 and dtype == np.float32 else dtype.name]
        wanted = limit is not None and ksize[0] * ksize[1] >= limit
        name = "cudnn" if wanted and importlib.util.find_spec("cudnn") is not None else "cublas"
    return cast(Engine, _device.stack_conv(name))


def use_tf32(allow_tf32: bool | None) -> bool:
    """Whether float32 may be rounded to TF32 before it is multiplied; None asks CuPy's CUPY_TF32."""
    if allow_tf32 is None:
        return os.environ.get("CUPY_TF32", "0") not in ("", "0")
    if not isinstance(allow_tf32, (bool, np.bool_)):
        raise TypeError(f"allow_tf32: expected a bool or None, got {type(allow_tf32).__name__}")
    return bool(allow_tf32)
