"""``precompile`` of convolutions and bottlenecks: the kernels that calls ask for, and that they compile."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cpu_cuda
import ml_dtypes
import numpy as np
import pytest
from cpu_cuda import standin
from fused_cases import host_products
from test_jit import python

import sbnet_cupy
from sbnet_cupy import (
    BlockIndices,
    BottleneckWeights,
    SparseCall,
    _jit,
    calc_block_params,
    calc_block_params_res_block,
    pack_weights,
    precompile,
    sparse_conv2d,
    sparse_res_block_bottleneck,
)
from sbnet_cupy._instances import Instance
from sbnet_cupy._plan import LISTED_ROWS
from sbnet_cupy._precompile import instances_of

HALF, SINGLE, DOUBLE = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
BRAIN = np.dtype(ml_dtypes.bfloat16)


def conv(
    dtype: Any = HALF, channels: int = 8, features: int = 16, ksize: Any = (3, 3), blocks: int = 2, **how: Any
) -> SparseCall:
    shape = (1, 19, 23, channels)
    strides, padding = how.get("strides", 1), how.get("padding", "SAME")
    size = ksize[0] + 4, ksize[1] + 6  # so that a stride of 1 or 2 fits
    params = calc_block_params(shape, size, ksize, strides, padding)
    return SparseCall(shape, np.zeros((*ksize, channels, features), dtype), params, blocks, **how)


def block(
    dtype: Any = HALF, channels: int = 16, inner: int = 8, blocks: int = 2, out_channels: Any = None, **how: Any
) -> SparseCall:
    shape = (1, 19, 23, channels)
    weights = BottleneckWeights.random(channels, inner, out_channels=out_channels, dtype=dtype)
    params = calc_block_params_res_block(shape, (7, 9), weights.ksizes, how.get("strides", 1), "SAME")
    return SparseCall(shape, weights, params, blocks, **how)


#: Both kinds in all arithmetics; whole pixels or not; split, strided, projected; in place, on few tiles and on many.
CALLS = {
    "conv": conv(),
    "conv-bfloat16": conv(BRAIN),
    "conv-float32": conv(SINGLE),
    "conv-tf32": conv(SINGLE, allow_tf32=True),
    "conv-ragged": conv(channels=5, features=7),
    "conv-wide": conv(SINGLE, channels=300, features=24),
    "conv-strides": conv(strides=2, padding="VALID"),
    "conv-pads": conv(ksize=(5, 3), padding=((1, 0), (2, 2))),
    "conv-many": conv(blocks=90),
    "conv-crowd": conv(blocks=LISTED_ROWS + 1),  # rows that scatter lists in a cover map
    "conv-none": conv(blocks=0),
    "conv-float64": conv(DOUBLE),
    "block": block(),
    "block-bfloat16": block(BRAIN),
    "block-float32": block(SINGLE),
    "block-tf32": block(SINGLE, allow_tf32=True),
    "block-ragged": block(channels=12, inner=5),
    "block-projects": block(out_channels=24),
    "block-strides": block(out_channels=24, strides=2),
    "block-in-place": block(in_place=True),
    "block-in-place-many": block(in_place=True, blocks=90),
    "block-in-place-crowd": block(in_place=True, blocks=LISTED_ROWS + 1),
    "block-ragged-in-place": block(channels=12, inner=5, in_place=True),
    "block-float64": block(DOUBLE),
}


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUPY_TF32", raising=False)
    if cpu_cuda.why_unavailable() and not os.environ.get("CI"):
        pytest.skip(cpu_cuda.why_unavailable())


def launched(call: SparseCall, engine: str, packs: bool) -> set[Instance]:
    """What the real call launches, with weights that are packed in it or before it."""
    with cpu_cuda.recording() as found, host_products():
        x = standin.zeros(call.x_shape, dtype_of(call))
        indices = BlockIndices(standin.zeros((call.blocks, 3), np.int32), standin.zeros((1,), np.int32))
        is_conv = isinstance(call.weights, np.ndarray)
        if is_conv:
            weights: Any = standin.asarray(call.weights)
        else:
            weights = BottleneckWeights(**{name: standin.asarray(a) for name, a in call.weights.arrays.items()})
        if packs:
            weights = pack_weights(weights, allow_tf32=call.allow_tf32)
        how: dict[str, Any] = {"strides": call.strides, "allow_tf32": call.allow_tf32, "engine": engine}
        if is_conv:
            sparse_conv2d(x, weights, indices, call.params, padding=call.padding, **how)
        else:
            out = x if call.in_place else None
            sparse_res_block_bottleneck(x, weights, indices, call.params, out=out, **how)
    return set(found)


def dtype_of(call: SparseCall) -> Any:
    return getattr(call.weights, "dtype", None) or call.weights.conv1.dtype


def named(call: SparseCall, engine: str) -> set[Instance]:
    with cpu_cuda.recording():
        found = instances_of(call, engine, 0)
    assert len(set(found)) == len(found)
    return set(found)


FUSED = [name for name, call in CALLS.items() if dtype_of(call) != DOUBLE]


@pytest.mark.parametrize("name", FUSED)
def test_fused_calls_launch_what_is_named_and_nothing_else(name: str) -> None:
    call = CALLS[name]
    expected = launched(call, "fused", packs=False) | launched(call, "fused", packs=True)
    if call.blocks:
        assert {instance.source for instance in expected} & {"conv.cu", "conv_wgmma.cu", "bottleneck.cu"}
    found = named(call, "fused")
    assert expected <= found
    # A projection may have to be rounded, by one of these.
    projects = getattr(call.weights, "project", None) is not None
    assert {instance.source for instance in found - expected} <= ({"activate.cu"} if projects else set())


@pytest.mark.parametrize("name", CALLS)
def test_composed_calls_launch_what_is_named(name: str) -> None:
    call = CALLS[name]
    expected, found = launched(call, "composed", packs=False), named(call, "composed")
    assert expected <= found
    assert {instance.source for instance in found - expected} <= {"activate.cu"}
    assert ("cover.cu" in {instance.source for instance in expected}) == ("crowd" in name)
    if call.blocks:
        assert {"gather.cu", "scatter.cu"} <= {instance.source for instance in expected}


@pytest.mark.parametrize("name", CALLS)
def test_auto_is_the_engine_of_the_call(name: str) -> None:
    call = CALLS[name]
    expected = launched(call, "auto", packs=False)
    assert expected <= named(call, "auto")
    sources = {"conv.cu", "conv_wgmma.cu", "bottleneck.cu", "pack.cu"}
    engine = "fused" if {i.source for i in expected} & sources else "composed"
    assert named(call, "auto") == named(call, engine)


def test_weights_may_be_packed() -> None:
    for call in (CALLS["conv-tf32"], CALLS["block-tf32"]):
        packed = replace(call, weights=pack_weights(call.weights, allow_tf32=True), allow_tf32=None)
        assert named(packed, "auto") == named(call, "auto")


class _Device:
    """``cupy.cuda.Device``, as a context."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Instance]]:
    """Collect what is to be compiled, as on a machine with a device."""
    done: list[Instance] = []
    with cpu_cuda.recording():
        monkeypatch.setattr(standin.cuda, "Device", _Device, raising=False)
        monkeypatch.setattr(_jit, "why_unavailable", lambda: "")
        monkeypatch.setattr(_jit, "compile_instances", done.extend)
        monkeypatch.setattr(_jit, "_kernels", {})
        yield done


def test_what_is_named_compiles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By NVRTC for Hopper, which takes no device."""
    nvrtc = pytest.importorskip("nvrtc", exc_type=ImportError)
    calls = [CALLS["conv"], CALLS["block-in-place-many"], CALLS["conv"]]
    with compiling(monkeypatch) as done:
        count = precompile(dtypes=(), calls=calls, engine="fused")
    assert f"{count}/{count}" in capsys.readouterr().err  # the progress bar
    assert len(done) == len(set(done)) == count
    expected = named(calls[0], "fused") | named(calls[1], "fused")
    assert expected < set(done)  # and what reduces masks
    for instance in sorted(expected):
        (found,) = nvrtc.compile_for("sm_90", [instance])
        assert found.instance == instance
        assert found.registers > 0


def test_what_is_there_is_not_compiled_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with compiling(monkeypatch) as done:
        everything = {*sbnet_cupy._instances.instances_for([], []), *instances_of(CALLS["conv"], "auto", 0)}
        left = next(instance for instance in everything if instance.source.startswith("conv"))  # by either kernel
        monkeypatch.setattr(_jit, "_kernels", dict.fromkeys(everything - {left}))
        assert precompile(dtypes=(), calls=iter([CALLS["conv"]]), progress=False) == len(everything)
    assert done == [left]
    assert capsys.readouterr().err == ""


ERRORS: list[tuple[Any, type[Exception], str]] = [
    (("conv",), TypeError, "calls: expected SparseCall, got str"),
    ([replace(CALLS["conv"], params=(6, 6))], TypeError, "params: expected BlockParams, got tuple"),
    (
        [replace(CALLS["conv"], x_shape=(19, 23, 8))],
        ValueError,
        "x_shape: expected 4 sizes (N, H, W, C), got (19, 23, 8)",
    ),
    ([replace(CALLS["conv"], x_shape=(1, 19, 23, 8.0))], TypeError, "x_shape: expected integers >= 0, got 8.0"),
    ([replace(CALLS["conv"], blocks=-1)], ValueError, "blocks: expected integers >= 0, got -1"),
    ([replace(CALLS["conv"], blocks=True)], ValueError, "blocks: expected integers >= 0, got True"),
    ([replace(CALLS["conv"], weights=(3, 3, 8, 8))], TypeError, "weights: expected an array, BottleneckWeights, or "),
    ([replace(CALLS["conv"], weights=np.zeros((3, 3, 8, 8), int))], TypeError, "weights: expected float16, bfloat16, "),
    ([replace(CALLS["conv"], in_place=True)], ValueError, "in_place: expected False for a convolution, got True"),
    ([replace(CALLS["block"], padding="VALID")], ValueError, "padding: expected 'SAME' for a bottleneck, got 'VALID'"),
    ([replace(CALLS["conv"], x_shape=(1, 19, 23, 9))], ValueError, "w: expected shape (kh, kw, 9, K)"),
    ([replace(CALLS["conv"], x_shape=(1, 90, 23, 8))], ValueError, "params: expected BlockParams("),
    ([replace(CALLS["block"], x_shape=(1, 19, 23, 9))], ValueError, "x: expected 16 channels, as conv1 has"),
    ([replace(CALLS["block-projects"], in_place=True)], ValueError, "out: expected "),
    ([CALLS["conv-float64"]], ValueError, "engine: expected 'auto' or 'composed' for float64, got 'fused'"),
]


@pytest.mark.parametrize(("calls", "kind", "message"), ERRORS, ids=lambda value: str(value)[-40:])
def test_errors_come_before_anything_is_compiled(
    calls: Any, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with compiling(monkeypatch) as done, pytest.raises(kind, match=f"^{re.escape(message)}"):
        precompile(calls=[*calls], engine="fused")
    assert done == []


def test_the_engine_is_checked() -> None:
    with pytest.raises(ValueError, match=r"^engine: expected 'auto', 'fused' or 'composed', got 'quick'$"):
        precompile(calls=[CALLS["conv"]], engine="quick")


@pytest.mark.gpu
def test_calls_find_their_kernels_in_the_disk_cache(tmp_path: Path) -> None:
    setup = """
import cupy, numpy as np, sbnet_cupy
from sbnet_cupy import BottleneckWeights, SparseCall
shape, count = (1, 60, 70, 32), 8
w, block = cupy.ones((3, 3, 32, 24), np.float16), BottleneckWeights.random(32, 8, dtype=np.float16, xp=cupy)
params = sbnet_cupy.calc_block_params(shape, (18, 18), w.shape, 1, "SAME")
block_params = sbnet_cupy.calc_block_params_res_block(shape, (18, 18), block.ksizes, 1, "SAME")
"""
    compiles = """
calls = [SparseCall(shape, w, params, count)]
calls += [SparseCall(shape, block, block_params, count, in_place=place) for place in (False, True)]
print(sum(sbnet_cupy.precompile(dtypes=["float16", "bool"], calls=calls, engine=engine, progress=False)
          for engine in ("fused", "composed")))
"""
    uses = """
x, mask = cupy.ones(shape, np.float16), cupy.zeros(shape[:3], bool)
for engine in ("fused", "composed"):
    active = sbnet_cupy.block_indices(mask, params, capacity=count)
    sbnet_cupy.sparse_conv2d(x, w, active, params, engine=engine)
    active = sbnet_cupy.block_indices(mask, block_params, capacity=count)
    sbnet_cupy.sparse_res_block_bottleneck(x, block, active, block_params, engine=engine)
    sbnet_cupy.sparse_res_block_bottleneck(x, block, active, block_params, out=x, engine=engine)
"""
    lazy = {"SBNET_CUPY_JIT": "lazy", "CUPY_CACHE_DIR": str(tmp_path)}
    assert int(python(setup + compiles, **lazy).stdout) > 0
    before = {path.name for path in tmp_path.iterdir()}
    python(setup + uses, **lazy)
    later = {path.name for path in tmp_path.iterdir()} - before
    text = "".join((tmp_path / name).read_bytes().decode("latin1") for name in later)
    assert "sbnet" not in text  # CuPy's own kernels may have come, none of ours
