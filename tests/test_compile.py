"""Instantiations compile for every architecture without spills, within their kernel's registers. Needs no GPU."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("cupy")

import cpu_cuda
from cpu_cuda import standin
from fused_cases import host_products, planned
from nvrtc import CompileException, Resources, compile_for

import sbnet_cupy
from sbnet_cupy import BlockIndices, BottleneckWeights, _fused, _instances
from sbnet_cupy._fused_bottleneck_plan import BottleneckProblem
from sbnet_cupy._fused_plan import DeviceLimits
from sbnet_cupy._fused_wgmma_bottleneck_plan import wgmma_bottleneck_plans
from sbnet_cupy._instances import Instance, Walk
from sbnet_cupy._sources import kernel_folder

#: Instantiations in one program: headers are parsed once for all of them, and threads still share the work.
GROUP = 40

DTYPES = [
    np.dtype(name) for name in dict.fromkeys((*_instances.MASK_DTYPES, *_instances.SUM_DTYPES)) if name != "bfloat16"
]
DTYPES.append(np.dtype(ml_dtypes.bfloat16))


#: By default, every eighth block size of the table and half of the fused kernels are compiled for the generations other
#: than Hopper, whose times have chosen the kernels' registers. All other instances are compiled for each generation.
SAMPLE = 1 if os.environ.get("SBNET_CUPY_TEST_ALL") else 8


def all_instances(architecture: str) -> list[Instance]:
    """What users start with, everything for float16, and of each dtype and element size what takes most registers."""
    sizes = _instances.SIZE_TABLE[:: 1 if architecture == "sm_90" else SAMPLE]
    found = [instance for size in sizes for instance in _instances.table_instances(size)]
    found += _instances.default_instances()
    found += _instances.instances_for([(16, 16)], [np.dtype(np.float16)])
    for dtype in DTYPES:
        found += widest_instances(dtype)
    for itemsize in (1, 2, 4, 8, 16):
        found += tile_instances(np.dtype(f"V{itemsize}"))
    for itemsize in (1, 2, 4):
        found += crowded_tile_instances(np.dtype(f"V{itemsize}"))
    return list(dict.fromkeys([*found, *wide_instances(), *fused_instances(architecture)]))


def widest_tiles(dtype: np.dtype[Any]) -> tuple[Walk, Walk]:
    """Both ways to turn, with the most lanes."""
    channel_lanes, *_ = _instances.channel_lane_counts(dtype.itemsize)
    pixel_lanes, *_ = _instances.pixel_lane_counts(dtype.itemsize)
    return (
        Walk("tiled", dtype.itemsize, True, channel_lanes, pixel_lanes),
        Walk("tiled", dtype.itemsize, False, channel_lanes),
    )


def widest_instances(dtype: np.dtype[Any]) -> Iterator[Instance]:
    """The widest words and groups in which blocks of `dtype` are combined with an image, and its widest poolings."""
    add = dtype.kind != "b"
    for overlaps in (False, True):
        straight = Walk("channels", _instances.max_word(dtype, add, overlaps))
        for walk in (straight, widest_tiles(dtype)[0]):
            yield _instances.scatter_instance(walk, (10, 7), dtype, add, overlaps)
    if dtype.kind != "c":
        lanes, *_ = _instances.mask_lanes(dtype)
        for avgpool in (False, True):
            yield _instances.activity_instance(dtype, avgpool, lanes)
    if dtype.name in _instances.ACTIVATED:
        yield _instances.gather_instance(Walk("channels", _instances.MAX_WORD), (18, 18), dtype)
        yield from _instances.activate_instances(dtype)


def tile_instances(dtype: np.dtype[Any]) -> Iterator[Instance]:
    """Tiles of several blocks, whose pixels do not fill pieces, and of parts of a block."""
    for bsize in ((3, 3), (65, 65)):
        for walk in (*widest_tiles(dtype), Walk("tiled", dtype.itemsize, True)):
            yield _instances.gather_instance(walk, bsize)
            yield _instances.scatter_instance(walk, bsize, dtype, False)


def crowded_tile_instances(dtype: np.dtype[Any]) -> Iterator[Instance]:
    """Tiles of as many blocks as there may be: what is known of each block takes shared memory beside the tile."""
    for bsize in ((1, 1), (2, 2)):
        for walk in widest_tiles(dtype):
            yield _instances.gather_instance(walk, bsize)
            yield _instances.scatter_instance(walk, bsize, dtype, False)


def wide_instances() -> Iterator[Instance]:
    """Blocks of more than 2^31 pixels, whose words are counted in 64 bits."""
    single, bsize = np.dtype(np.float32), (46341, 46341)
    yield _instances.activate_instance(single, np.dtype(np.float16), 4, True)
    for walk in (Walk("channels", 16, wide=True), widest_tiles(single)[0]._replace(wide=True)):
        yield _instances.gather_instance(walk, bsize)
        for overlaps in (False, True):
            for add in (False, True):
                yield _instances.scatter_instance(walk, bsize, single, add, overlaps)


#: What the fused kernels have to know of a device of each generation: an H200, an A100, an RTX 5090, a T4.
_LIMITS = {
    "sm_75": DeviceLimits(40, 64 << 10, 64 << 10, 75),
    "sm_80": DeviceLimits(108, 163 << 10, 164 << 10, 80),
    "sm_90": DeviceLimits(132, 227 << 10, 228 << 10, 90),
    "sm_100": DeviceLimits(148, 227 << 10, 228 << 10, 100),
    "sm_120": DeviceLimits(170, 99 << 10, 100 << 10, 120),
}

#: Blocks of the benchmark's stages: channels, inner channels, and the tiles that were fastest.
_STAGES = ((96, 24, (16, 16)), (192, 48, (8, 8)), (256, 64, (8, 8)), (384, 96, (6, 8)), (1024, 256, (8, 8)))

_ARITHMETICS = (("float16", False), ("bfloat16", False), ("float32", True), ("float32", False))


def fused_instances(architecture: str) -> list[Instance]:
    """What the benchmark's convolutions and bottlenecks launch on a device of the generation, and every other form."""
    whole = architecture == "sm_90" or SAMPLE == 1
    stages = _STAGES if whole else _STAGES[::2]
    plain = (("float16", False), ("float32", False))
    sample = plain if architecture == "sm_75" else (("float16", False), ("float32", True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpu_cuda.LIMITS", _LIMITS[architecture])
        with cpu_cuda.recording() as found:
            for name, tf32 in _ARITHMETICS if whole else sample:
                dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
                for channels, inner, tile in stages:
                    _fused_stage(channels, inner, tile, dtype, tf32)
                _fused_forms(dtype, tf32)
    return list(found)


def _fused_stage(channels: int, inner: int, tile: tuple[int, int], dtype: np.dtype[Any], tf32: bool) -> None:
    """A convolution and a bottleneck, out of place and in place."""
    how: dict[str, Any] = {"allow_tf32": tf32, "engine": "fused"}
    x = standin.empty((1, *tile, channels), dtype)
    _fused_conv(x[..., :inner].copy(), (3, 3), inner, tile, **how)
    plain = BottleneckWeights.random(channels, inner, dtype=dtype)
    weights = BottleneckWeights(**{k: a if a is None else standin.asarray(a) for k, a in vars(plain).items()})
    params = sbnet_cupy.calc_block_params_res_block(x.shape, (tile[0] + 2, tile[1] + 2), plain.ksizes, 1, "SAME")
    for rows in (110, 4000):  # the listed blocks of a sparse mask, and more than fit at one time
        sbnet_cupy.sparse_res_block_bottleneck(x, weights, _blocks(rows), params, out=x, **how)
        for name in ("", "groups", "groups-squares"):  # in one launch, also where three are faster
            with planned(name):
                sbnet_cupy.sparse_res_block_bottleneck(x, weights, _blocks(rows), params, out=x, **how)


def _fused_forms(dtype: np.dtype[Any], tf32: bool) -> None:
    """Kernels and strides of other sizes; channels that fill no pieces; a bottleneck in three launches."""
    how: dict[str, Any] = {"allow_tf32": tf32, "engine": "fused"}
    _fused_conv(standin.empty((1, 32, 32, 3), dtype), (7, 7), 64, (8, 8), strides=2, **how)
    _fused_conv(standin.empty((1, 16, 16, 200), dtype), (1, 1), 40, (8, 8), strides=2, **how)
    _fused_conv(standin.empty((1, 16, 16, 30), dtype), (5, 5), 29, (8, 8), **how)
    plain = BottleneckWeights.random(64, 24, out_channels=96, dtype=dtype)
    weights = BottleneckWeights(**{k: a if a is None else standin.asarray(a) for k, a in vars(plain).items()})
    x = standin.empty((1, 16, 16, 64), dtype)
    params = sbnet_cupy.calc_block_params_res_block(x.shape, (17, 17), plain.ksizes, 2, "SAME")
    with host_products():
        sbnet_cupy.sparse_res_block_bottleneck(x, weights, _blocks(110), params, strides=2, **how)


def _fused_conv(x: Any, ksize: tuple[int, int], features: int, tile: tuple[int, int], **how: Any) -> None:
    strides = how.get("strides", 1)
    w = standin.empty((*ksize, x.shape[3], features), x.dtype)
    height, width = (k + (t - 1) * strides for k, t in zip(ksize, tile))
    params = sbnet_cupy.calc_block_params(x.shape, (height, width), ksize, strides, "SAME")
    sbnet_cupy.sparse_conv2d(x, w, _blocks(110), params, **how)


def _blocks(rows: int) -> BlockIndices:
    """Room for so many."""
    return BlockIndices(standin.asarray(np.full((rows, 3), -1, np.int32)), standin.asarray(np.zeros(1, np.int32)))


def register_bounds() -> dict[str, tuple[int, int]]:
    """The bounds that stand in the comment directly above each kernel: alone, and next to a second CTA."""
    pattern = (
        r"// Registers: at most (\d+)(?:, or (\d+) where a multiprocessor is to hold two CTAs \(kCtas\))?\.\n"
        r"(?:template <[^{]*?>\n)?__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\("
    )
    text = "".join(path.read_text() for path in sorted(kernel_folder().glob("*.cu")))
    return {name: (int(alone), int(beside or alone)) for alone, beside, name in re.findall(pattern, text)}


def bound_of(instance: Instance, bounds: dict[str, tuple[int, int]]) -> int:
    """The one that is for an instance: its last argument says how many CTAs a multiprocessor is to hold."""
    alone, beside = bounds[kernel_of(instance)]
    return beside if instance.expression.endswith(", 2>") else alone


def kernel_of(instance: Instance) -> str:
    return instance.expression.removeprefix("sbnet::").partition("<")[0]


def compile_all(architecture: str, instances: Iterable[Instance]) -> list[Resources]:
    by_source = itertools.groupby(sorted(instances), key=lambda instance: instance.source)
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


def test_compile_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    """Of Hopper; test_compile_older.py and test_compile_newer.py have the others."""
    check_matrix("sm_90", capsys)


def check_matrix(architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Compile every instance for a generation, print what it takes, and raise unless it is within bounds."""
    resources = compile_all(architecture, all_instances(architecture))
    bounds = register_bounds()
    if architecture != "sm_90":
        del bounds["conv_wgmma"], bounds["bottleneck_wgmma"]
    assert {kernel_of(found.instance) for found in resources} == set(bounds)
    with capsys.disabled():
        print(f"\n{architecture}: {len(resources)} instantiations")
        print(f"  {'kernel':<17}{'count':>6}{'registers':>12}{'bound':>7}{'spills':>8}{'shared':>8}")
        for kernel, (bound, _) in sorted(bounds.items()):
            of_kernel = [found for found in resources if kernel_of(found.instance) == kernel]
            registers = sorted(found.registers for found in of_kernel)
            print(
                f"  {kernel:<17}{len(of_kernel):>6}{f'{registers[0]} to {registers[-1]}':>12}{bound:>7}"
                f"{max(found.spill_bytes for found in of_kernel):>8}{max(found.shared_bytes for found in of_kernel):>8}"
            )
    assert [found for found in resources if found.spill_bytes] == []
    assert [found for found in resources if found.registers > bound_of(found.instance, bounds)] == []


def test_headers_compile_alone() -> None:
    """Each header includes what it needs."""
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy.cuda.compiler import _NVRTCProgram

    from sbnet_cupy._jit import compile_options

    options = (*assemble_cupy_compiler_options(compile_options()), "--device-as-default-execution-space", "-arch=sm_90")
    for path in sorted(kernel_folder().iterdir()):
        if path.suffix in (".cu", ".cuh"):
            _NVRTCProgram(f'#include "{path.name}"\n', "alone.cu", method="cubin").compile(options)


def test_shared_memory_of_bottlenecks_by_warpgroups() -> None:
    """The host asks for as many bytes as the kernel lays out."""
    # Without room for a second CTA, so that none is asked for to be alone.
    limits, asserts = DeviceLimits(132, 227 << 10, 2 << 10, 90), []
    for channels, inner, ksize, itemsize in itertools.product((96, 192, 208), (24, 48), ((3, 3), (1, 2)), (2, 4)):
        problem = BottleneckProblem(channels, inner, itemsize, ksize, (24, 24), True)
        for plan in wgmma_bottleneck_plans(problem, limits):
            instance = _fused._wgmma_bottleneck_instance(problem, plan, np.dtype(f"f{itemsize}"))
            _, _, shape = instance.expression[:-1].partition(", ")
            asserts.append(f"static_assert({shape}::kBytes == {plan.shared});")
    assert len(asserts) > 50
    compile_for("sm_90", [instance], extra="\n".join(asserts))
    with pytest.raises(CompileException, match="static assertion failed"):
        compile_for("sm_90", [instance], extra=asserts[0].replace("==", "!="))


def test_a_spill_would_be_seen() -> None:
    """The assembler's report is parsed: a kernel that must use its stack says so."""
    program = (
        "template <int n> __global__ void stacked(int* p, int i) { volatile int a[n]; a[i] = 1; p[0] = a[i + 1]; }"
    )
    found = compile_for("sm_90", [Instance("gather.cu", "stacked<64>")], extra=program)
    assert found[0].stack_bytes >= 256


def test_errors_name_file_and_line() -> None:
    with pytest.raises(CompileException, match=r"gather\.cu\(\d+\)|vec\.cuh\(\d+\)"):
        compile_for(
            "sm_90",
            [Instance("gather.cu", "sbnet::gather<sbnet::Copy<3>, unsigned int, 4, 4, sbnet::Order::kChannels>")],
        )
