"""Compiles kernel instantiations for any architecture, with the library's own options and without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from cuda.pathfinder import find_nvidia_binary_utility
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
    log, names, _ = _compile(architecture, instances, extra)
    return [_parse(log, instance, names[instance.expression]) for instance in instances]


def instructions_of(architecture: str, instance: Instance) -> list[str]:
    """The machine's instructions of one kernel, in their order, without predicates."""
    *_, cubin = _compile(architecture, [instance], "")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin + b"\0")  # CuPy leaves out the last byte, which the disassembler wants
        file.flush()
        command = [find_nvidia_binary_utility("nvdisasm"), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", text)


def _compile(architecture: str, instances: Sequence[Instance], extra: str) -> tuple[str, dict[str, str], bytes]:
    """NVRTC's log, the names of the instances in it, and the machine code."""
    expressions = tuple(instance.expression for instance in instances)
    program = _NVRTCProgram(
        compile_text(instances[0].source) + extra, "sbnet_cupy.cu", name_expressions=expressions, method="cubin"
    )
    # What CuPy adds for a RawModule: include folders of its own and of the toolkit, and two options.
    options = assemble_cupy_compiler_options((*compile_options(), *architecture_options(instances[0].source)))
    options += ("-ftz=true", "--device-as-default-execution-space")
    options += (f"-arch={architecture}", "--ptxas-options=-v")
    cubin, names = program.compile(options)
    return nvrtc.getProgramLog(program.ptr), names, cubin


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


__all__ = ["ARCHITECTURES", "CompileException", "Resources", "compile_for", "instructions_of"]
