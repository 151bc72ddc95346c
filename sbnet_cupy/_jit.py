"""The JIT: the only module that compiles kernels and holds what is compiled.

Each compilation takes a text of two lines, a digest of all kernel sources and an ``#include``: NVRTC's messages then
name the real file and line, and CuPy's disk cache notices an edited header.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import struct
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from ._fused_plan import DeviceLimits
from ._instances import Instance, default_instances, instances_for
from ._sources import kernel_folder, sources_digest

#: Environment variable that chooses when the default set is built: ``import`` (the default) or ``lazy``.
MODE_VARIABLE = "SBNET_CUPY_JIT"

_DRIVER_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

_kernels: dict[Instance, Any] = {}
_lock = threading.Lock()
_import_report = "nothing built at import"


class KernelCompileError(RuntimeError):
    """A kernel did not compile. The message carries NVRTC's log, with the file and line of each error."""


#: CTAs of a grid, and threads of a CTA, along x, y and z.
Dim3 = tuple[int, int, int]


def launch(instance: Instance, grid: Dim3, block: Dim3, *arguments: bytes) -> None:
    """Run a kernel on the current stream, after compiling it if nobody has yet. Arguments are passed by value."""
    kernel = _kernels.get(instance)
    if kernel is None:
        kernel = compile_instances([instance])[0]
    kernel(grid, block, arguments)


def launch_early(
    instance: Instance, grid: Dim3, block: Dim3, shared: int, argument: bytes, together: bool = False
) -> None:
    """The same with dynamic shared memory, in bytes; and perhaps with all CTAs running at the same time.

    The kernel may start before earlier ones of the stream are done, and waits for them itself.
    """
    kernel = _kernels.get(instance)
    if kernel is None:
        kernel = compile_instances([instance])[0]
    if shared > kernel.max_dynamic_shared_size_bytes:
        kernel.max_dynamic_shared_size_bytes = shared
    kernel.early(grid, block, argument, shared, together)


def ctas_that_fit(instance: Instance, threads: int, shared: int) -> int:
    """How many CTAs of a kernel a multiprocessor of the current device holds."""
    from cupy.cuda import driver

    kernel = _kernels.get(instance) or compile_instances([instance])[0]
    if shared > kernel.max_dynamic_shared_size_bytes:
        kernel.max_dynamic_shared_size_bytes = shared
    return driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel.address, threads, shared)  # type: ignore[no-any-return]


@functools.cache
def device_limits(device: int) -> DeviceLimits:
    """What the plans of the fused kernels have to know of a device."""
    from cupy.cuda import Device

    attributes, capability = Device(device).attributes, Device(device).compute_capability
    return DeviceLimits(
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MaxSharedMemoryPerMultiprocessor"],
        int(capability),
    )


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
        self._launch = ctypes.create_string_buffer(56)
        self.launch_address = ctypes.addressof(self._launch)

    def set_launch(self, *sizes_stream_and_count: int) -> None:
        """Fill in a CUlaunchConfig: sizes of grid and block, shared memory, stream; and how many attributes count."""
        *sizes, stream, count = sizes_stream_and_count
        attributes = ctypes.addressof(self._attributes)
        struct.pack_into("=7I4xQQI", self._launch, 0, *sizes, stream, attributes, count)


#: CUlaunchAttributeID of the driver.
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
        frame.set_launch(*grid, *block, shared, stream, 2 if together else 1)
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
    launcher = ctypes.CDLL(_DRIVER_LIBRARY).cuLaunchKernelEx
    launcher.argtypes = [ctypes.c_void_p] * 4
    return launcher


#: The first driver, of CUDA 12.3, that captures such launches into graphs, and the first compute capability with them.
_EARLY_DRIVER, _EARLY_CAPABILITY = 12030, 90


def compile_instances(instances: Sequence[Instance]) -> list[Any]:
    """Compile instantiations of one source file as one module, or take it from CuPy's disk cache.

    Raises
    ------
    KernelCompileError
        With NVRTC's log.
    """
    import cupy

    source = instances[0].source
    expressions = [instance.expression for instance in instances]
    module = cupy.RawModule(
        code=compile_text(source),
        options=compile_options(),
        name_expressions=expressions,
    )
    try:
        kernels = [DirectKernel(module.get_function(expression)) for expression in expressions]
    except cupy.cuda.compiler.CompileException as error:
        raise KernelCompileError(_explain(source, expressions, str(error))) from None
    with _lock:
        for instance, kernel in zip(instances, kernels):
            _kernels[instance] = kernel
    return kernels


def compile_text(source: str) -> str:
    """The program that instantiates kernels of one source file."""
    return f'// kernels {sources_digest()}\n#include "{source}"\n'


def compile_options() -> tuple[str, ...]:
    """NVRTC's options, besides those that CuPy adds."""
    return ("-std=c++17", f"-I{kernel_folder()}")


def _explain(source: str, expressions: Sequence[str], log: str) -> str:
    message = f"{kernel_folder() / source}: NVRTC could not compile {', '.join(expressions)}\n{log}"
    if "could not open source file" in log:
        message += (
            "\nA header of the CUDA toolkit is missing: install CuPy with its toolkit extra, for instance "
            'pip install "cupy-cuda13x[ctk]"'
        )
    return message


def precompile(
    bsizes: Iterable[int | tuple[int, int]],
    dtypes: Iterable[Any] = (np.float32,),
    *,
    progress: bool = True,
) -> int:
    """Compile all kernels that some block sizes and dtypes can need, into CuPy's disk cache.

    Calls then find them there, in this process and in later ones, whatever the number of channels and the memory
    layout: useful before a measurement, or when a container image is built. The fused kernels of convolutions and
    bottlenecks are not among them: channels and kernel sizes decide about those, so the first call compiles them.

    Parameters
    ----------
    bsizes : iterable of int or (int, int)
        Block sizes in pixels; an int stands for a square. Name the sizes of gather and those of scatter.
    dtypes : iterable of dtype
        Dtypes of image tensors and of masks.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    int
        Number of kernels that are ready.

    Raises
    ------
    RuntimeError
        Without CuPy or without a CUDA device, whose architecture decides what is compiled.
    TypeError, ValueError
        A block size that is no size, or a dtype that the ops do not take.
    KernelCompileError
        If a kernel does not compile.

    Notes
    -----
    Compiles in as many threads as there are CPU cores; one kernel takes a tenth to half of a second of a core. Does not
    synchronise.
    """
    sizes = [_parse_size(bsize) for bsize in bsizes]
    instances = instances_for(sizes, [_parse_dtype(dtype) for dtype in dtypes])
    reason = why_unavailable()
    if reason:
        raise RuntimeError(f"precompile needs CuPy and a CUDA device: {reason}")
    import cupy
    from tqdm import tqdm

    device = cupy.cuda.Device()

    def compile_one(instance: Instance) -> None:
        with device:
            compile_instances([instance])

    missing = [instance for instance in instances if instance not in _kernels]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        futures = [pool.submit(compile_one, instance) for instance in missing]
        try:
            for future in tqdm(as_completed(futures), "compiling", len(futures), disable=not progress, unit="kernel"):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return len(instances)


def _parse_size(bsize: Any) -> tuple[int, int]:
    from ._geometry import parse_pair

    pair = (bsize, bsize) if np.ndim(bsize) == 0 else bsize
    return parse_pair("bsizes", pair, minimum=1)


def _parse_dtype(dtype: Any) -> np.dtype[Any]:
    parsed: np.dtype[Any] = np.dtype(dtype)
    if (parsed.kind not in "biufc" and parsed.name != "bfloat16") or parsed.itemsize > 16:
        raise TypeError(f"dtypes: expected numeric or bool dtypes that CuPy has, got {dtype!r}")
    return parsed


def compiled() -> list[str]:
    """C++ names of the kernels that this process has ready."""
    return sorted(instance.expression for instance in _kernels)


def import_report() -> str:
    """One line on what the import of the package built."""
    return _import_report


def why_unavailable() -> str:
    """Why CuPy cannot be used here, in a few words; empty if it can."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        return 'CuPy is not installed; pip install "sbnet-cupy[cu13]"'
    except Exception as error:  # a driver that is missing, too old or broken
        return f"no CUDA device: {error}"
    return "" if count else "no CUDA device"


def build_at_import() -> None:
    """Build the default set where there is a device and the user has not asked to be lazy. Never raises."""
    global _import_report
    mode = os.environ.get(MODE_VARIABLE, "import")
    if mode not in ("import", "lazy"):
        warnings.warn(f"{MODE_VARIABLE}: expected 'import' or 'lazy', got {mode!r}; using 'import'", stacklevel=3)
    if mode == "lazy":
        _import_report = f"nothing built at import: {MODE_VARIABLE}=lazy"
        return
    begin = time.perf_counter()
    try:
        if importlib.util.find_spec("cupy") is None or not _driver_sees_device():
            return
        _build_default_set()
    except Exception as error:  # told again, in full, by the first call that needs the kernel
        _import_report = f"the build at import failed: {str(error).splitlines()[0]}"
    else:
        seconds = time.perf_counter() - begin
        _import_report = f"{len(_kernels)} kernels built or read from the cache at import, in {seconds:.2f} s"


def _build_default_set() -> None:
    """One module for each source file and block size class, compiled side by side."""
    import cupy

    device = cupy.cuda.Device()
    groups: dict[tuple[str, int], list[Instance]] = {}
    for number, instance in enumerate(default_instances()):
        # Groups of a few kernels: small enough to spread over cores, large enough to share parsing the headers.
        key = (instance.source, number // _GROUP)
        groups.setdefault(key, []).append(instance)

    def compile_group(group: list[Instance]) -> None:
        with device:
            compile_instances(group)

    with ThreadPoolExecutor(max(1, min(len(groups), os.cpu_count() or 1))) as pool:
        list(pool.map(compile_group, groups.values()))


#: Kernels that are compiled as one module at import, at most.
_GROUP = 12


def _driver_sees_device() -> bool:
    """Ask the driver for its devices without importing CuPy, which takes most of a second."""
    try:
        driver = ctypes.CDLL(_DRIVER_LIBRARY)
        count = ctypes.c_int()
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False
