"""The JIT: the only module that compiles kernels and holds what is compiled.

Each compilation takes a text of two lines, a digest of all kernel sources and an ``#include``: NVRTC's messages then
name the real file and line, and CuPy's disk cache notices an edited header.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import threading
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._instances import Instance, default_instances
from ._launch import DRIVER_LIBRARY, Dim3, DirectKernel
from ._sources import kernel_folder, sources_digest

if TYPE_CHECKING:  # imported where it is needed, so that the package's import stays quick
    from ._fused_plan import DeviceLimits

#: Environment variable that chooses when the default set is built: ``import`` (the default) or ``lazy``.
MODE_VARIABLE = "SBNET_CUPY_JIT"

_kernels: dict[Instance, Any] = {}
_lock = threading.Lock()
_import_report = "nothing built at import"


class KernelCompileError(RuntimeError):
    """A kernel did not compile. The message carries NVRTC's log, with the file and line of each error."""


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

    from ._fused_plan import DeviceLimits

    attributes, capability = Device(device).attributes, Device(device).compute_capability
    return DeviceLimits(
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MaxSharedMemoryPerMultiprocessor"],
        int(capability),
    )


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
        options=(*compile_options(), *architecture_options(source)),
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


def architecture_options(source: str) -> tuple[str, ...]:
    """The architecture of a source file that is for one only. It goes before the one that CuPy adds."""
    return ("-arch=sm_90a",) if source in _HOPPER_SOURCES else ()


#: Sources whose kernels are for compute capability 9.0, and take what NVRTC has for no other.
_HOPPER_SOURCES = ("conv_wgmma.cu", "bottleneck_wgmma.cu")


def _explain(source: str, expressions: Sequence[str], log: str) -> str:
    message = f"{kernel_folder() / source}: NVRTC could not compile {', '.join(expressions)}\n{log}"
    if "could not open source file" in log:
        message += (
            "\nA header of the CUDA toolkit is missing: install CuPy with its toolkit extra, for instance "
            'pip install "cupy-cuda13x[ctk]"'
        )
    return message


def compile_all(instances: Sequence[Instance], progress: bool) -> None:
    """Compile what this process has not got, each as a module of its own, on all cores; perhaps with a progress bar.

    A module for each, because that is what the first call that needs a kernel looks for in the disk cache.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed

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
    from concurrent.futures import ThreadPoolExecutor

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
        driver = ctypes.CDLL(DRIVER_LIBRARY)
        count = ctypes.c_int()
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False
