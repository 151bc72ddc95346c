"""The part of CuPy that the library's device code uses, over NumPy: what ``import cupy`` finds in `device`.

Arrays lie between guard pages and begin as poison. Functions that are not here are NumPy's.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import compiler
from .compiler import CompileError, KernelFault, RawModule
from .memory import Memory

__all__ = ["RawModule", "asarray", "cuda", "empty", "lib", "ndarray"]

cuda = SimpleNamespace(
    alloc=lambda size: empty(size, np.uint8).data,
    alloc_pinned_memory=lambda size: empty(size, np.uint8).host,
    compiler=SimpleNamespace(CompileException=CompileError),
    Memory=lambda size: empty(size, np.uint8).data,
    MemoryPointer=lambda memory, offset: memory + offset,
    Stream=lambda non_blocking: SimpleNamespace(synchronize=lambda: None),
    get_current_stream=lambda: SimpleNamespace(ptr=0, synchronize=lambda: None, is_capturing=lambda: False),
    runtime=SimpleNamespace(
        getDevice=lambda: 0,
        memcpyAsync=lambda target, source, size, kind, stream: ctypes.memmove(target, source, size),
        memcpyDeviceToDevice=3,
        memsetAsync=lambda target, value, size, stream: ctypes.memset(target, value, size),
    ),
)

#: Bytes of which the address of a new array is a multiple. CuPy's number is 512, but kernels need no more than this,
#: and less of it leaves less room between an array and the guard page.
ALIGNMENT = 16


class _Pointer:
    """``cupy.cuda.MemoryPointer``."""

    device_id = 0

    def __init__(self, ptr: int, owner: Any) -> None:
        self.ptr, self.owner = ptr, owner

    def __add__(self, offset: int) -> _Pointer:
        return _Pointer(self.ptr + offset, self.owner)

    def memset_async(self, value: int, size: int, stream: Any = None) -> None:
        ctypes.memset(self.ptr, value, size)


class ndarray:
    """An array "on the device". Not a NumPy array, so that whoever mixes up the two finds out."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        memptr: _Pointer | None = None,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        memptr = memptr or empty(shape, dtype).data
        memory, size = memptr.owner, math.prod(shape) * np.dtype(dtype).itemsize
        bytes_ = memory.bytes()[memptr.ptr - memory.address :][:size]
        if len(bytes_) < size:  # of a number of rows that a kernel has told
            raise KernelFault(f"an array of shape {shape} exceeds its memory of {memory.size} bytes")
        self.host: np.ndarray[Any, Any] = bytes_.view(dtype)
        self.host = self.host.reshape(shape) if strides is None else np.ndarray(shape, dtype, bytes_, 0, strides)

    @classmethod
    def of(cls, host: np.ndarray[Any, Any]) -> ndarray:
        array = cls.__new__(cls)
        array.host = host
        return array

    @property
    def data(self) -> _Pointer:
        return _Pointer(self.host.__array_interface__["data"][0], self.memory)

    @property
    def memory(self) -> Memory:
        """The memory that this array is a view of."""
        owner = _owner(self.host)
        assert isinstance(owner, Memory)
        return owner

    def get(self) -> np.ndarray[Any, Any]:
        return self.host.copy()

    def copy(self, order: Any = "C") -> ndarray:
        return as_device(self.host.copy(order), ALIGNMENT)

    def __getitem__(self, key: Any) -> ndarray:
        return as_device(self.host[key if isinstance(key, tuple) else (key, ...)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.host[key] = _to_host(value)

    def __eq__(self, other: object) -> Any:
        return _lift(operator.eq)(self, other)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.host, name)
        return _lift(value) if callable(value) else value


def empty(shape: Any, dtype: Any = float, *, alignment: int = ALIGNMENT) -> ndarray:
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = Memory(size, compiler.order.at_end, alignment)
    if dtype.kind not in "biu":
        memory.bytes()[:] = 0xFF  # NaN: POISON would be a small number, which bounds of sums forgive
    return ndarray.of(memory.bytes().view(dtype).reshape(shape))


def asarray(values: Any) -> ndarray:
    return values if isinstance(values, ndarray) else as_device(np.asarray(values))


def _as_strided(array: ndarray, shape: Any, strides: Any) -> ndarray:
    memory = array.memory
    return ndarray.of(np.ndarray(shape, array.dtype, memory.bytes(), array.data.ptr - memory.address, strides))


lib = SimpleNamespace(stride_tricks=SimpleNamespace(as_strided=_as_strided))


def _owner(array: Any) -> Any:
    while isinstance(array, np.ndarray):
        array = array.base
    return array


def _to_host(value: Any) -> Any:
    return value.host if isinstance(value, ndarray) else value


def as_device(value: np.ndarray[Any, Any], alignment: int = 1) -> ndarray:
    """A view where the memory is the device's already, else a copy there, in the same memory order."""
    if isinstance(_owner(value), Memory):
        return ndarray.of(value)
    axes = sorted(range(value.ndim), key=lambda k: -abs(value.strides[k]))
    copy = empty([value.shape[k] for k in axes], value.dtype, alignment=alignment).host.transpose(np.argsort(axes))
    copy[...] = value
    return ndarray.of(copy)


def _lift(function: Callable[..., Any]) -> Callable[..., Any]:
    def on_device(*values: Any, **named: Any) -> Any:
        named = {name: _to_host(value) for name, value in named.items()}
        result = function(*map(_to_host, values), **named)
        return as_device(result) if isinstance(result, np.ndarray) else result

    return on_device


def __getattr__(name: str) -> Any:
    value = getattr(np, name)
    return value if isinstance(value, type) or not callable(value) else _lift(value)
