"""Runs the library's device code on a CPU: unmodified kernels under g++, launched by the library's own host code.

    with cpu_cuda.device() as xp:  # stands in for CuPy
        x = xp.asarray(...)
        sbnet_cupy.sparse_gather(x, ...)

A kernel that leaves its arrays, waits for ever, or does what C++ leaves undefined raises `KernelFault`.
docs/debugging-kernels.md tells how to debug one, and what cannot be seen here.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbnet_cupy import _jit
from sbnet_cupy._fused_plan import DeviceLimits
from sbnet_cupy._instances import Instance
from sbnet_cupy._sources import kernel_folder

from . import compiler, standin
from .compiler import CompileError, KernelFault, Order, why_unavailable
from .memory import Bytes

__all__ = [
    "ORDERS",
    "CompileError",
    "KernelFault",
    "Order",
    "build",
    "device",
    "guarded",
    "recording",
    "submit",
    "why_unavailable",
]

#: Some mistakes show in one of them only.
ORDERS = (
    Order(),
    Order("threads-reversed", threads_reversed=True, at_end=False),
    Order("blocks-reversed", blocks_reversed=True, warps_alternate=True),
)

#: Host code of the device.
_HOST_MODULES = ("_memory", "_meetings", "_transfer", "_pooling", "_activate", "_stack_conv_cublas", "_fused")

#: Modules that keep what the host code has prepared for calls.
_CALLERS = ("_gather", "_scatter", "_reduce_mask", "_conv", "_bottleneck")

#: What plans are made for: few multiprocessors, so that small problems are cut as large ones are on a GPU.
LIMITS = DeviceLimits(multiprocessors=4, cta_shared=99 << 10, multiprocessor_shared=100 << 10, capability=90)

#: Kernels that are compiled as one library, at most: enough to share the headers, few enough to share the cores.
_GROUP = 10

#: Loaded kernels of each folder.
_loaded: dict[Path, dict[Instance, Any]] = {}


@contextmanager
def device(order: Order = ORDERS[0], kernels: Path | None = None) -> Iterator[Any]:
    """Let `cupy` be the stand-in, and take kernels from a folder, by default the library's."""
    folder = kernels or kernel_folder()
    for name in _HOST_MODULES:
        with suppress(ImportError):  # what a first import binds stays: let that be CuPy itself where there is one
            importlib.import_module(f"sbnet_cupy.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", standin)
        patch.setattr(compiler, "order", order)
        patch.setattr(_jit, "kernel_folder", lambda: folder)
        patch.setattr(_jit, "_kernels", _loaded.setdefault(folder, {}))
        patch.setattr(_jit, "DirectKernel", lambda kernel: kernel)  # there is no driver
        patch.setattr(_jit, "device_limits", lambda device: LIMITS)
        patch.setattr(_jit, "ctas_that_fit", lambda *_: 1)
        modules = [importlib.import_module(f"sbnet_cupy.{name}") for name in _HOST_MODULES + _CALLERS]
        for module in modules[: len(_HOST_MODULES)]:
            patch.setattr(module, "cupy", standin, raising=False)
            for name in {"_per_thread"} & vars(module).keys():  # memory of one of the two
                patch.setattr(module, name, threading.local())
        meetings = modules[_HOST_MODULES.index("_meetings")]
        patch.setattr(meetings, "meetings", meetings.Meetings())
        _forget(modules)
        yield standin
        _forget(modules)


def _forget(modules: Iterable[Any]) -> None:
    """Empty the caches of plans, which do not know of patched constants."""
    for value in (value for module in modules for value in vars(module).values()):
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@contextmanager
def recording() -> Iterator[dict[Instance, None]]:
    """Collect the kernels that calls ask for, and run none of them. Results are poison."""
    found: dict[Instance, None] = {}
    with device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jit, "launch", lambda instance, *_: found.setdefault(instance))
        patch.setattr(_jit, "launch_early", lambda instance, *_, **__: found.setdefault(instance))
        yield found


def build(instances: Iterable[Instance], kernels: Path | None = None) -> None:
    """Compile kernels ahead of `device`, side by side on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in submit(pool, instances, kernels):
            result.result()
    with device(kernels=kernels):
        for group in _groups(instances):
            _jit.compile_instances(group)


def submit(pool: Executor, instances: Iterable[Instance], kernels: Path | None = None) -> list[Future[Path]]:
    """Let a pool compile what `build` will load."""
    with device(kernels=kernels):
        options = _jit.compile_options()
    return [
        pool.submit(compiler.build, _jit.compile_text(group[0].source), options, [i.expression for i in group])
        for group in _groups(instances)
    ]


def _groups(instances: Iterable[Instance]) -> Iterator[list[Instance]]:
    """Instances of one source each, and so many that compiling them shares work among cores."""
    for _, same_source in itertools.groupby(sorted(instances), lambda instance: instance.source):
        members = list(same_source)
        for k in range(0, len(members), _GROUP):
            yield members[k : k + _GROUP]


@contextmanager
def guarded(xp: Any, inputs: Iterable[Any] = (), output: Any = None) -> Iterator[None]:
    """Let writes to `inputs` fault, and writes beside the elements of `output`, a view, raise `KernelFault`."""
    if xp is not standin:
        yield
        return
    with ExitStack() as stack:
        for memory in {array.memory for array in inputs}:
            stack.enter_context(memory.read_only())
        before = output is not None and _beside(output)
        yield
        if output is not None and (_beside(output) != before).any():
            raise KernelFault("a kernel writes beside the elements of its output, which is a view")


def _beside(array: Any) -> Bytes:
    """The bytes of an array's memory, with 0 for its elements."""
    memory = array.memory
    copy: Bytes = memory.bytes().copy()
    offset = array.data.ptr - memory.address if array.size else 0
    np.ndarray(array.shape, array.dtype, copy, offset, array.strides)[...] = 0
    return copy
