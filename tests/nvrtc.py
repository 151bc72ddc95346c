"""Compiles kernel instantiations for any architecture, with the library's own options and without a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cupy._core.core import assemble_cupy_compiler_options
from cupy.cuda import nvrtc
from cupy.cuda.compiler import CompileException, _NVRTCProgram

from sbnet_cupy._instances import Instance
from sbnet_cupy._jit import architecture_options, compile_options, compile_text

#: One architecture of each generation that the library supports: Turing, Ampere, Hopper, two Blackwells.
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Resources:
    """What the assembler says that one kernel takes, in registers and bytes."""

    instance: Instance
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def compile_for(architecture: str, instances: Sequence[Instance], extra: str = "") -> list[Resources]:
    """Compile instantiations of one source file, and `extra` text, as one module.

    Raises `CompileException` with NVRTC's log.
    """
    expressions = tuple(instance.expression for instance in instances)
    program = _NVRTCProgram(
        compile_text(instances[0].source) + extra, "sbnet_cupy.cu", name_expressions=expressions, method="cubin"
    )
    # What CuPy adds for a RawModule: include folders of its own and of the toolkit, and two options.
    options = assemble_cupy_compiler_options((*compile_options(), *architecture_options(instances[0].source)))
    options += ("-ftz=true", "--device-as-default-execution-space")
    options += (f"-arch={architecture}", "--ptxas-options=-v")
    _, names = program.compile(options)
    log = nvrtc.getProgramLog(program.ptr)
    return [_parse(log, instance, names[instance.expression]) for instance in instances]


def _parse(log: str, instance: Instance, name: str) -> Resources:
    _, _, text = log.partition(f"Compiling entry function '{name}'")
    text, _, _ = text.partition("Compiling entry function")
    return Resources(
        instance,
        registers=int(re.search(r"Used (\d+) registers", text)[1]),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", text))),
        stack_bytes=int(re.search(r"(\d+) bytes stack frame", text)[1]),
        shared_bytes=int(m[1]) if (m := re.search(r"(\d+) bytes smem", text)) else 0,
    )


__all__ = ["ARCHITECTURES", "CompileException", "Resources", "compile_for"]
