"""``sbnet-cupy info``: what a bug report needs to say about a machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def report() -> str:
    """Return the report, one fact a line. A fact that cannot be had says why; nothing raises."""
    facts: list[tuple[str, Callable[[], str]]] = [
        ("sbnet_cupy", _own_version),
        ("Python", lambda: f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform),
        ("NumPy", lambda: np.__version__),
        ("CuPy", lambda: str(_cupy().__version__)),
        ("CUDA runtime", lambda: _cuda_version(_cupy().cuda.runtime.runtimeGetVersion())),
        ("CUDA driver", _driver_version),
        ("NVRTC", lambda: ".".join(map(str, _cupy().cuda.nvrtc.getVersion()))),
        ("device", lambda: str(_device()["name"].decode())),
        ("compute capability", lambda: "{major}.{minor}".format(**_device())),
        ("device memory", lambda: f"{_device()['totalGlobalMem'] / 2**30:.1f} GiB"),
        ("kernels folder", _kernel_folder),
        ("CuPy kernel cache", _cache),
        ("SBNET_CUPY_JIT", _jit_mode),
        ("at import", _import_report),
        ("compiled now", _compiled),
    ]
    return "\n".join(f"{name:<20}{_guarded(fact)}" for name, fact in facts)


class _Absent(Exception):
    """Part of the machine is not there; the text says which."""


def _guarded(fact: Callable[[], str]) -> str:
    try:
        return fact()
    except _Absent as error:
        return str(error)
    except Exception as error:  # a broken installation is what the report is for
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"


def _own_version() -> str:
    from . import __version__

    return f"{__version__} ({Path(__file__).resolve().parent})"


def _cupy() -> Any:
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            raise _Absent("not installed") from None
        raise
    return cupy


def _cuda_version(number: int) -> str:
    """CUDA's ``1000*major + 10*minor``; 0 is how the runtime says that there is no driver."""
    if not number:
        raise _Absent("not installed")
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver_version() -> str:
    return _cuda_version(_cupy().cuda.runtime.driverGetVersion())


def _device() -> dict[str, Any]:
    cupy = _cupy()
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise _Absent(f"no device ({error})") from None
    if not count:
        raise _Absent("no device")
    properties: dict[str, Any] = runtime.getDeviceProperties(runtime.getDevice())
    return properties


def _kernel_folder() -> str:
    from ._sources import kernel_folder, sources_digest

    return f"{kernel_folder()} (sources {sources_digest()})"


def _cache() -> str:
    """Where CuPy keeps compiled kernels, its own and everybody's, and how much of them there is."""
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    if not folder.is_dir():
        return f"{folder} (no such folder yet)"
    sizes = [entry.stat().st_size for entry in folder.iterdir() if entry.is_file()]
    return f"{folder} ({len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB)"


def _jit_mode() -> str:
    from ._jit import MODE_VARIABLE

    return os.environ.get(MODE_VARIABLE) or "not set"


def _import_report() -> str:
    from ._jit import import_report

    return import_report()


def _compiled() -> str:
    from ._jit import compiled

    names = compiled()
    return "\n".join([f"{len(names)} kernels", *(f"  {name}" for name in names)])
