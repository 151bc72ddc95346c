"""How compiled kernels are launched: through the driver, with one struct for an argument."""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
import threading
from collections.abc import Sequence
from typing import Any

DRIVER_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

#: CTAs of a grid, and threads of a CTA, along x, y and z.
Dim3 = tuple[int, int, int]


class Template:
    """A struct of 8-byte fields, of which the first are addresses and the others the same in every call.

    It is passed by value as one kernel argument: each argument of its own would cost host time.
    """

    def __init__(self, addresses: int, fields: Sequence[int]) -> None:
        # A bytes object takes less time to join and to wrap than an array to copy and to fill.
        self._fields = struct.pack(f"={len(fields)}q", *fields)
        self._pack = struct.Struct(f"={addresses}Q").pack

    def at(self, *addresses: int) -> bytes:
        """The kernel argument with these addresses."""
        return self._pack(*addresses) + self._fields


class _Frame(threading.local):
    """Where the driver reads a kernel's arguments and launch; each thread of the host has its own."""

    #: Arguments, and bytes that each has room for.
    most, room = 2, 1024

    def __init__(self) -> None:
        memory = ctypes.create_string_buffer(self.room * self.most)
        start = ctypes.addressof(memory)
        self._pointers = (ctypes.c_void_p * self.most)(*(start + self.room * k for k in range(self.most)))
        self.arguments = memoryview(memory).cast("B")
        self.address = ctypes.addressof(self._pointers)
        # Two CUlaunchAttribute, of 72 bytes: a name, and a value of 4 bytes at byte 8.
        self._attributes = ctypes.create_string_buffer(2 * 72)
        for number, name in enumerate((_PROGRAMMATIC_SERIALIZATION, _COOPERATIVE)):
            struct.pack_into("=iii", self._attributes, number * 72, name, 0, 1)
        self._attributes_address = ctypes.addressof(self._attributes)
        self._launch = ctypes.create_string_buffer(56)
        self.launch_address = ctypes.addressof(self._launch)

    def set_launch(self, grid: Dim3, block: Dim3, shared: int, stream: int, attributes: int) -> None:
        """Fill in a CUlaunchConfig, of whose attributes the first so many count."""
        _LAUNCH.pack_into(self._launch, 0, *grid, *block, shared, stream, self._attributes_address, attributes)


#: CUlaunchConfig of the driver, and CUlaunchAttributeIDs.
_LAUNCH = struct.Struct("=7I4xQQI")
_COOPERATIVE, _PROGRAMMATIC_SERIALIZATION = 2, 6

#: Dynamic shared memory that every kernel may ask for, in bytes.
_SHARED_LIMIT = 48 << 10


class DirectKernel:
    """A kernel that the driver launches: a call of CuPy's own takes 2 us more for what never changes here."""

    _frame = _Frame()

    def __init__(self, kernel: Any) -> None:
        from cupy.cuda import driver, get_current_stream

        self._kernel = kernel
        self._launch, self._current_stream = driver.launchKernel, get_current_stream
        self._launch_together, self._launch_early = driver.launchCooperativeKernel, _early_launcher()
        self._shared_limit = _SHARED_LIMIT

    @property
    def address(self) -> int:
        """The driver's handle."""
        return self._kernel.kernel.ptr  # type: ignore[no-any-return]

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """Dynamic shared memory that a launch may ask for."""
        return self._shared_limit

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        self._kernel.max_dynamic_shared_size_bytes = size
        self._shared_limit = size

    def __call__(self, grid: Dim3, block: Dim3, arguments: tuple[bytes, ...], shared_mem: int = 0) -> None:
        frame, start = self._frame, 0
        for argument in arguments:
            frame.arguments[start : start + len(argument)] = argument
            start += frame.room
        (x, y, z), (threads_x, threads_y, threads_z) = grid, block
        stream, function = self._current_stream().ptr, self._kernel.kernel.ptr
        self._launch(function, x, y, z, threads_x, threads_y, threads_z, shared_mem, stream, frame.address, 0)

    def early(self, grid: Dim3, block: Dim3, argument: bytes, shared: int, together: bool) -> None:
        """Launch a kernel that waits for earlier ones of the stream itself; perhaps with CTAs that wait for each other.

        Where CTAs wait for each other, the driver refuses more than fit on the device.
        """
        frame = self._frame
        frame.arguments[: len(argument)] = argument
        stream, function = self._current_stream().ptr, self._kernel.kernel.ptr
        if self._launch_early is None:
            if together:
                self._launch_together(function, *grid, *block, shared, stream, frame.address)
            else:
                self._launch(function, *grid, *block, shared, stream, frame.address, 0)
            return
        frame.set_launch(grid, block, shared, stream, 2 if together else 1)
        status = self._launch_early(frame.launch_address, function, frame.address, None)
        if status:
            from cupy.cuda import driver

            raise driver.CUDADriverError(status)


@functools.cache
def _early_launcher() -> Any:
    """The driver's cuLaunchKernelEx, or None if not all devices and the driver let kernels start early."""
    from cupy.cuda import Device, runtime

    devices = map(Device, range(runtime.getDeviceCount()))
    oldest = min(int(device.compute_capability) for device in devices)
    if runtime.driverGetVersion() < _EARLY_DRIVER or oldest < _EARLY_CAPABILITY:
        return None
    launcher = ctypes.CDLL(DRIVER_LIBRARY).cuLaunchKernelEx
    launcher.argtypes = [ctypes.c_void_p] * 4
    return launcher


#: The first driver, of CUDA 12.3, that captures such launches into graphs, and the first compute capability with them.
_EARLY_DRIVER, _EARLY_CAPABILITY = 12030, 90
