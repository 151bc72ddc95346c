"""Memory between guard pages: whatever reads or writes beyond an array faults at once."""

from __future__ import annotations

import ctypes
import functools
import mmap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

POISON = 0xA5  # of memory that nobody has written, as in runtime.h

#: On each side: far more than a wrong stride or a forgotten bound can leap over. Address space only.
_GUARD = 1 << 26

_NONE, _READ, _READ_WRITE = 0, 1, 3  # PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE
_FLAGS = 0x4022  # MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE

_live: weakref.WeakSet[Memory] = weakref.WeakSet()


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class Memory:
    """`size` poisoned bytes, the last of them (or the first) beside an inaccessible page, as closely as aligned."""

    def __init__(self, size: int, at_end: bool, alignment: int) -> None:
        self.size = size
        self._pages = max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
        self._base = reserve(self._pages)
        self.address = self._base + ((self._pages - size) // alignment * alignment if at_end else 0)
        ctypes.memset(self._base, POISON, self._pages)
        weakref.finalize(self, _libc().munmap, self._base - _GUARD, self._pages + 2 * _GUARD)
        _live.add(self)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "typestr": "|u1", "shape": (self.size,), "data": (self.address, False)}

    def bytes(self) -> Bytes:
        """All of it, as an array without a copy."""
        return np.asarray(self)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Let every write fault, until the end of the context."""
        _protect(self._base, self._pages, _READ)
        try:
            yield
        finally:
            _protect(self._base, self._pages, _READ_WRITE)


def reserve(size: int) -> int:
    """Address of whole pages of memory with a guard on each side, for the caller to unmap or to keep."""
    start = _libc().mmap(None, size + 2 * _GUARD, _NONE, _FLAGS, -1, 0)
    if start == ctypes.c_void_p(-1).value:
        raise MemoryError(f"mmap of {size} bytes: errno {ctypes.get_errno()}")
    _protect(start + _GUARD, size, _READ_WRITE)
    return int(start + _GUARD)


def _protect(address: int, size: int, access: int) -> None:
    if _libc().mprotect(address, size, access):
        raise OSError(ctypes.get_errno(), "mprotect")


def reserve_stacks(count: int, size: int) -> int:
    """Address of `count` stacks of `size` bytes, one after another, each above an inaccessible page."""
    address = reserve(count * size)
    for k in range(count):
        _protect(address + k * size, mmap.PAGESIZE, _NONE)
    return address


def holds(address: int, size: int) -> bool:
    """Whether so many bytes from an address on lie in one array."""
    return any(m.address <= address and address + size <= m.address + m.size for m in _live)


def describe(address: int) -> str:
    """Which array an address lies in or beside."""
    nearest = min(_live, key=lambda m: abs(address - m.address - m.size // 2) - m.size // 2, default=None)
    if nearest is None or not -_GUARD <= address - nearest.address < nearest.size + _GUARD:
        return f"address {address:#x}, far from every array" if address else "a null or impossible address"
    offset = address - nearest.address
    if offset < 0:
        return f"{-offset} bytes before an array of {nearest.size} bytes"
    if offset >= nearest.size:
        return f"{offset - nearest.size} bytes past the end of an array of {nearest.size} bytes"
    return f"byte {offset} of a read-only array of {nearest.size} bytes"
