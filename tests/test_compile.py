"""Every instantiation compiles for every architecture without spills, within its kernel's registers. Needs no GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("cupy")

from nvrtc import ARCHITECTURES, CompileException, Resources, compile_for

from sbnet_cupy import _instances
from sbnet_cupy._instances import Instance, Walk
from sbnet_cupy._sources import kernel_folder

#: Instantiations in one program: headers are parsed once for all of them, and threads still share the work.
GROUP = 40


def all_instances() -> list[Instance]:
    """The size table, the default set, everything for float16, the widest words of every dtype, and 64-bit counting."""
    half, single = np.dtype(np.float16), np.dtype(np.float32)
    dtypes = [np.dtype(name) for name in _instances.SUM_DTYPES if name != "bfloat16"]
    dtypes += [np.dtype(bool), np.dtype(ml_dtypes.bfloat16)]
    found = [instance for size in _instances.SIZE_TABLE for instance in _instances.table_instances(size)]
    found += _instances.default_instances()
    found += _instances.instances_for([(16, 16)], [half])
    for dtype in dtypes:
        lanes, *_ = _instances.tile_lanes(dtype.itemsize)
        word = _instances.max_word(dtype, True)
        for walk in (Walk("rows", word), Walk("tiled", dtype.itemsize, True, lanes, lanes)):
            found.append(_instances.scatter_instance(walk, (10, 7), dtype, dtype.kind != "b"))
        if dtype.kind != "c":
            found += [
                _instances.activity_instance(dtype, avgpool, pixels)
                for avgpool in (False, True)
                for pixels in _instances.mask_lanes(dtype)
            ]
        found += _instances.activate_instances(dtype)
    found.append(_instances.activate_instance(single, half, 4, True))
    for walk in _instances.walks_for(single):
        wide = walk._replace(wide=True)
        found.append(_instances.gather_instance(wide, (46341, 46341)))
        found.append(_instances.scatter_instance(wide, (46341, 46341), single, False))
    return list(dict.fromkeys(found))


def register_bounds() -> dict[str, int]:
    """The bound that stands in the comment directly above each kernel."""
    pattern = (
        r"// Registers: at most (\d+)\.\n(?:template <[^{]*?>\n)?__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\("
    )
    text = "".join(path.read_text() for path in sorted(kernel_folder().glob("*.cu")))
    return {name: int(bound) for bound, name in re.findall(pattern, text)}


def kernel_of(instance: Instance) -> str:
    return instance.expression.removeprefix("sbnet::").partition("<")[0]


def compile_all(architecture: str, instances: Iterable[Instance]) -> list[Resources]:
    by_source = groupby(sorted(instances), key=lambda instance: instance.source)
    groups = []
    for _, members in by_source:
        listed = list(members)
        groups += [listed[k : k + GROUP] for k in range(0, len(listed), GROUP)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [found for group in pool.map(lambda group: compile_for(architecture, group), groups) for found in group]


def test_every_kernel_has_a_register_bound() -> None:
    text = "".join(path.read_text() for path in kernel_folder().glob("*.cu"))
    assert sorted(register_bounds()) == sorted(
        re.findall(r"__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(", text)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compile_matrix(architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    resources = compile_all(architecture, all_instances())
    bounds = register_bounds()
    assert {kernel_of(found.instance) for found in resources} == set(bounds)
    with capsys.disabled():
        print(f"\n{architecture}: {len(resources)} instantiations")
        print(f"  {'kernel':<16}{'count':>6}{'registers':>12}{'bound':>7}{'spills':>8}{'shared':>8}")
        for kernel, bound in sorted(bounds.items()):
            of_kernel = [found for found in resources if kernel_of(found.instance) == kernel]
            registers = sorted(found.registers for found in of_kernel)
            print(
                f"  {kernel:<16}{len(of_kernel):>6}{f'{registers[0]} to {registers[-1]}':>12}{bound:>7}"
                f"{max(found.spill_bytes for found in of_kernel):>8}{max(found.shared_bytes for found in of_kernel):>8}"
            )
    assert [found for found in resources if found.spill_bytes] == []
    assert [found for found in resources if found.registers > bounds[kernel_of(found.instance)]] == []


def test_headers_compile_alone() -> None:
    """Each header includes what it needs."""
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy.cuda.compiler import _NVRTCProgram

    from sbnet_cupy._jit import compile_options

    options = (*assemble_cupy_compiler_options(compile_options()), "--device-as-default-execution-space", "-arch=sm_90")
    for path in sorted(kernel_folder().iterdir()):
        if path.suffix in (".cu", ".cuh"):
            _NVRTCProgram(f'#include "{path.name}"\n', "alone.cu", method="cubin").compile(options)


def test_a_spill_would_be_seen() -> None:
    """The assembler's report is parsed: a kernel that must use its stack says so."""
    program = (
        "template <int n> __global__ void stacked(int* p, int i) { volatile int a[n]; a[i] = 1; p[0] = a[i + 1]; }"
    )
    found = compile_for("sm_90", [Instance("gather.cu", "stacked<64>")], extra=program)
    assert found[0].stack_bytes >= 256


def test_errors_name_file_and_line() -> None:
    with pytest.raises(CompileException, match=r"gather\.cu\(\d+\)|vec\.cuh\(\d+\)"):
        compile_for("sm_90", [Instance("gather.cu", "sbnet::gather<3, unsigned int, 4, 4, sbnet::Order::kRows>")])
