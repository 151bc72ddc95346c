"""Whole arrays on the device, copied and cleared: by one command to the driver where nothing lies between elements.

CuPy's own functions for the same take several times as long on the host.
"""

from __future__ import annotations

import functools
from typing import Any

import cupy
import numpy as np


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A new array of zeros, which are written on the current stream."""
    target = cupy.ndarray(shape, dtype)
    clear(target)
    return target


def copy_of(x: Any) -> Any:
    """A copy with the axes in the same order in memory, made on the current stream."""
    if not _is_dense(x.shape, x.strides, x.dtype.itemsize):
        return x.copy(order="K")
    target = cupy.ndarray(x.shape, x.dtype, cupy.cuda.alloc(x.nbytes), x.strides)
    _copy_bytes(target, x)
    return target


def copyto(target: Any, source: Any) -> None:
    """Copy an array over another of its shape and dtype that shares no memory with it, on the current stream."""
    if source.strides == target.strides and _is_dense(source.shape, source.strides, source.dtype.itemsize):
        _copy_bytes(target, source)
    else:
        cupy.copyto(target, source)


def clear(target: Any) -> None:
    """Fill an array with zeros, on the current stream."""
    if _is_dense(target.shape, target.strides, target.dtype.itemsize):
        cupy.cuda.runtime.memsetAsync(target.data.ptr, 0, target.nbytes, cupy.cuda.get_current_stream().ptr)
    else:
        target[...] = 0


def _copy_bytes(target: Any, source: Any) -> None:
    runtime = cupy.cuda.runtime
    stream = cupy.cuda.get_current_stream().ptr
    runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, runtime.memcpyDeviceToDevice, stream)


@functools.lru_cache(maxsize=1024)
def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether the elements fill one piece of memory, from the first of them on."""
    reach = itemsize
    for stride, length in sorted((s, n) for s, n in zip(strides, shape) if n != 1):
        if stride != reach or length == 0:
            return False
        reach *= length
    return True
