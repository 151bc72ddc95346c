"""Compiles kernels with g++ and runs them: ``RawModule`` and its kernels, in the call form of CuPy's."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .memory import describe, reserve_stacks

_FOLDER = Path(__file__).resolve().parent

#: -O0: compiles fastest, and debuggers see every variable. Undefined behaviour traps, except what takes long to compile
#: and guard pages see as well.
_FLAGS = (
    "-O0 -g -w -fPIC -shared -fvisibility=hidden -fno-gnu-unique -fno-extern-tls-init -fno-exceptions -fno-rtti "
    "-fsanitize=undefined,bounds-strict -fsanitize-undefined-trap-on-error "
    "-fno-sanitize=vptr,object-size,pointer-overflow"
).split()

#: Each edit of a kernel leaves libraries behind that nobody will ask for again.
_KEEP_SECONDS = 24 * 3600

_STACK_BYTES = 16 * mmap.PAGESIZE
_MAX_THREADS = 1024  # of a CTA
_MOST_SHARED = 227 << 10  # of a CTA, on Hopper


class CompileError(Exception):
    """g++ refused a kernel; the message is its log."""


class KernelFault(Exception):
    """A kernel did what it must not. The message names block, thread, file and line."""


def why_unavailable() -> str:
    """Why kernels cannot be compiled or run here; empty if they can."""
    if not sys.platform.startswith("linux"):
        return "kernels run on a CPU under Linux only"
    return "" if shutil.which("g++") else "g++ is not installed"


@dataclass(frozen=True)
class Order:
    """In which order threads and blocks run, and which end of each array touches a guard page."""

    name: str = "forward"
    threads_reversed: bool = False
    blocks_reversed: bool = False
    #: Whether warps take turns. Else each runs ahead of the others for as long as it can.
    warps_alternate: bool = False
    at_end: bool = True
    #: CPU time after which a launch counts as hung: ten times what the longest one takes, since machines differ.
    #: 0 waits for ever, as one wants it under a debugger.
    seconds: int = 20


#: The order of the launches to come.
order = Order()


class _Launch(ctypes.Structure):
    """``Launch`` of runtime.h."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("threads_reversed", ctypes.c_int),
        ("blocks_reversed", ctypes.c_int),
        ("warps_alternate", ctypes.c_int),
        ("seconds", ctypes.c_int),
        ("argument_count", ctypes.c_int),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("argument_bytes", ctypes.POINTER(ctypes.c_size_t)),
        ("shared_bytes", ctypes.c_size_t),
        ("stacks", ctypes.c_void_p),
        ("stack_bytes", ctypes.c_size_t),
        ("signal", ctypes.c_int),
        ("writes", ctypes.c_int),
        ("address", ctypes.c_size_t),
        ("calls", ctypes.c_size_t * 12),
        ("report", ctypes.c_char * 1024),
    ]


_stacks = functools.cache(lambda: reserve_stacks(_MAX_THREADS, _STACK_BYTES))


class RawModule:
    """Kernels of one source text, compiled together when the first is asked for."""

    def __init__(self, *, code: str, options: Sequence[str] = (), name_expressions: Sequence[str] = ()) -> None:
        self._source = code, tuple(options), tuple(name_expressions)

    @functools.cached_property
    def _library(self) -> ctypes.CDLL:
        return ctypes.CDLL(str(build(*self._source)))

    def get_function(self, name: str) -> Kernel:
        """The kernel of one of the name expressions."""
        entry = self._library[f"launch_{self._source[2].index(name)}"]
        return Kernel(entry, self._library._name)


class Kernel:
    """Call it as a CuPy kernel: ``kernel(grid, block, arguments, shared_mem=0)``."""

    def __init__(self, entry: Any, library: str) -> None:
        self._entry, self._path = entry, library
        self.max_dynamic_shared_size_bytes = 48 << 10

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], *, shared_mem: int = 0
    ) -> None:
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise ValueError(f"shared_mem: expected at most {self.max_dynamic_shared_size_bytes}, got {shared_mem}")
        data = [_bytes_of(a) for a in arguments]
        buffers = [ctypes.create_string_buffer(d, max(16, len(d))) for d in data]
        launch = _Launch(
            tuple([*grid, 1, 1][:3]),
            tuple([*block, 1, 1][:3]),
            order.threads_reversed,
            order.blocks_reversed,
            order.warps_alternate,
            order.seconds,
            len(data),
            (ctypes.c_void_p * len(data))(*map(ctypes.addressof, buffers)),
            (ctypes.c_size_t * len(data))(*map(len, data)),
            shared_mem,
            _stacks(),
            _STACK_BYTES,
        )
        self._entry(ctypes.byref(launch))
        if launch.signal:
            where = _source_lines(self._path, [offset for offset in launch.calls if offset])
            raise KernelFault(f"{launch.report.decode()}{where}: {_explain(launch)}")
        if launch.report:
            raise KernelFault(launch.report.decode())

    def early(self, grid: Sequence[int], block: Sequence[int], argument: Any, shared: int, together: bool) -> None:
        """Kernels run one after another here, and so do blocks, even such that would wait for each other."""
        self(grid, block, (argument,), shared_mem=shared)


def _bytes_of(argument: Any) -> bytes:
    """What is passed for an argument: pointers for arrays of the device, everything else by value."""
    if isinstance(argument, bytes):
        return argument
    if hasattr(argument, "data") and hasattr(argument.data, "ptr"):
        return np.uint64(argument.data.ptr).tobytes()
    if isinstance(argument, np.ndarray) and argument.size != 1:
        raise TypeError("a NumPy array as an argument is passed by value, and must have one element")
    return np.asarray(argument).tobytes()


def _explain(launch: _Launch) -> str:
    if launch.signal in (signal.SIGSEGV, signal.SIGBUS):
        return f"{('reads', 'writes', 'touches')[launch.writes]} {describe(launch.address)}"
    if launch.signal == signal.SIGVTALRM:
        return f"hangs: still busy after {order.seconds} s of CPU time"
    return f"undefined behaviour ({signal.Signals(launch.signal).name})"


def _source_lines(library: str, calls: list[int]) -> str:
    """File and line of a place in a kernel, and of the functions that led there; the shim's are left out."""
    command = ["addr2line", "-i", "-e", library, *map(hex, calls)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return f"{library}+{calls[0]:#x}"
    lines = [line.partition(" ")[0] for line in found if not re.match(rf"{_FOLDER}/|\?\?|.*<stdin>:", line)]
    return " in ".join(lines) or found[0]


def build(code: str, options: Sequence[str], expressions: Sequence[str]) -> Path:
    """Compile a program with entry points for some kernels, or find it in the cache: a shared library."""
    folders = [Path(o[2:]) for o in options if o.startswith("-I")]
    code = re.sub("^//.*\n", "", code)  # a digest of all sources: here, only those that are included count
    sources = list(_closure(code, folders))
    text = _wrap(code, expressions, "\n".join(p.read_text() for p in sources))
    options = [option for option in options if not option.startswith("-arch=")]
    command = ["g++", *options, f"-I{_FOLDER}", *_FLAGS, *_more_flags()]
    digest = hashlib.sha256(repr((command, text)).encode())
    for path in (*sources, *sorted(_FOLDER.glob("*.h"))):
        digest.update(path.read_bytes())
    result = _cache() / f"{digest.hexdigest()[:32]}.so"
    if result.exists():
        result.touch()
    else:
        partial = result.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        done = subprocess.run([*command, "-xc++", "-", "-o", str(partial)], input=text, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(done.stderr)
        partial.replace(result)
    return result


def _closure(text: str, folders: list[Path]) -> Iterator[Path]:
    """All files that a text includes from `folders`, each once."""
    waiting, seen = [text], set()
    while waiting:
        for name in re.findall(r'^#include "(.+)"', waiting.pop(), re.MULTILINE):
            path = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if path and path not in seen:
                seen.add(path)
                yield path
                waiting.append(path.read_text())


def _wrap(code: str, expressions: Sequence[str], sources: str) -> str:
    """The program, an entry point for each kernel, and what only the text of the kernels tells."""
    text = code + sources
    bounds = {name: bound for bound, name in re.findall(r"__launch_bounds__\(([^(),]*)[^()]*\)\s+(\w+)\(", text)}
    dynamic = sorted(set(re.findall(r"extern\s+__shared__[^;]*?(\w+)\s*\[\s*\]", text)))
    lines = [f"#define CPU_CUDA_DYNAMIC_BYTES {_MOST_SHARED}"] if dynamic else []
    lines += ['#include "cuda_shim.h"', code, "namespace sbnet {}", "using namespace sbnet;"]
    for name in dynamic:  # in the library's namespace or in none
        for symbol in (name, f"_ZN5sbnet{len(name)}{name}E"):
            lines.append(f'asm(".hidden {symbol}; .globl {symbol}; .set {symbol}, cpu_cuda_dynamic");')
    for number, expression in enumerate(expressions):
        bound = bounds.get(re.split(r"::|<", expression.partition("<")[0])[-1], str(_MAX_THREADS))
        lines += [
            f'extern "C" __attribute__((visibility("default"))) void launch_{number}(cpu_cuda::Launch* launch) {{',
            f"    cpu_cuda::run({expression}, {bound}, launch);",
            "}",
        ]
    return "\n".join([*lines, ""])


@functools.cache
def _more_flags() -> list[str]:
    """The user's flags, a macro with the compiler's version, and where it can (from 12 on), poison in all locals."""
    version = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    poison = ["-ftrivial-auto-var-init=pattern"] if int(version.partition(".")[0]) >= 12 else []
    return [f"-DGXX_{version.replace('.', '_')}", *poison, *os.environ.get("CPU_CUDA_FLAGS", "").split()]


@functools.cache
def _cache() -> Path:
    """Where compiled kernels stay: CPU_CUDA_CACHE, or a folder of the user's own for temporary files."""
    default = Path(tempfile.gettempdir()) / f"cpu_cuda-{os.getuid()}"
    folder = Path(os.environ.get("CPU_CUDA_CACHE") or default)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder}: expected a folder of this user's own")
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if path.stat().st_mtime < time.time() - _KEEP_SECONDS:
                path.unlink()
    return folder
