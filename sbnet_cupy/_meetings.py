"""Counters, zero between launches, at which the CTAs of a grid meet or tell that they are done."""

from __future__ import annotations

import threading
from typing import Any

import cupy

#: The legacy stream and its other name, which no capture takes; and the stream of which each thread of the host has its
#: own, under one name.
_LEGACY, _PER_THREAD = (0, 1), 2


class Meetings:
    """Pairs of 4-byte counters. A kernel finds them at zero, and leaves them so.

    Launches of one stream follow each other and share a pair. A captured launch may later run beside any other, so it
    has a pair that is never given to another.
    """

    #: Bytes of a pair, and pairs that are allocated at once.
    _bytes, _pairs = 8, 1 << 16

    def __init__(self) -> None:
        #: Memory that is never freed: graphs may hold addresses in it.
        self.slabs: list[Any] = []
        self._lock = threading.Lock()
        self._free: dict[int, list[Any]] = {}
        self._of_stream: dict[tuple[int, int], int] = {}
        self._of_thread = threading.local()

    def place(self, device: int, needed: bool = True) -> int:
        """Address of the pair for a launch on the current stream.

        If it is not `needed`, 0 rather than ask the driver for memory while the stream is being captured, which not
        every capture allows.
        """
        stream = cupy.cuda.get_current_stream()
        number = stream.ptr
        if number not in _LEGACY and stream.is_capturing():
            return self._take(device) if needed or self._has_free(device) else 0
        known: dict[Any, int] = self._of_thread.__dict__ if number == _PER_THREAD else self._of_stream
        found = known.get((device, number))
        if found is None:
            found = known[device, number] = self._take(device)
        return found

    def _has_free(self, device: int) -> bool:
        return device in self._free and self._free[device][1] < self._pairs

    def _take(self, device: int) -> int:
        with self._lock:
            slab = self._free.get(device)
            if slab is None or slab[1] == self._pairs:
                slab = self._free[device] = [self._allocate(), 0]
            slab[1] += 1
            return slab[0].ptr + self._bytes * (slab[1] - 1)  # type: ignore[no-any-return]

    def _allocate(self) -> Any:
        # Not of an allocator that is current only now, such as the one of a graph that is being captured.
        memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(self._bytes * self._pairs), 0)
        # On a stream of its own: the current one may be capturing.
        side = cupy.cuda.Stream(non_blocking=True)
        memory.memset_async(0, self._bytes * self._pairs, side)
        side.synchronize()
        self.slabs.append(memory)
        return memory


#: The library's own.
meetings = Meetings()


def place(device: int, needed: bool = True) -> int:
    """:meth:`Meetings.place` of the library's own."""
    return meetings.place(device, needed)
