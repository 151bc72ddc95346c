"""The models by which ``auto`` chooses an engine, beside what the benchmark has recorded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cpu_cuda
import numpy as np
import pytest

from bench import composed
from bench.fit import H200, MHZ
from bench.plan_kinds import Case
from bench.stages import Network, networks
from sbnet_cupy import _fused_network, _jit
from sbnet_cupy._affine import IDENTITY
from sbnet_cupy._composed_clocks import ConvSize, StackConv, composed_clocks
from sbnet_cupy._validate import Spec

if cpu_cuda.why_unavailable() and not os.environ.get("CI"):
    pytest.skip(cpu_cuda.why_unavailable(), allow_module_level=True)

RESULTS = Path(__file__).parents[1] / "bench" / "results"


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let plans be those for an H200."""
    with cpu_cuda.device():
        monkeypatch.setattr(_jit, "device_limits", lambda device: H200)
        monkeypatch.setattr(_jit, "ctas_that_fit", lambda *arguments: 2)
        yield


def blocks_of(network: Network, row: dict[str, Any]) -> tuple[_fused_network.FusedBlocks, Spec]:
    """The form of the call that a recorded row has timed, and its image."""
    blocks = composed.blocks_of(Case(network, row["parameters"]["bsize"], int(row["parameters"]["active_blocks"])))
    return blocks, Spec.contiguous(network.shape, np.dtype(network.precision.dtype), 0)


def fused_clocks(network: Network, row: dict[str, Any]) -> float:
    blocks, x = blocks_of(network, row)
    if network.kind == "conv":
        out = Spec.contiguous((*x.shape[:3], blocks.shapes[0][3]), x.dtype, 0)
        return float(_fused_network.plan_conv("fused", blocks, x, out, IDENTITY).clocks)
    plan = _fused_network.plan_bottleneck("fused", blocks, x, x, True, True, False)
    assert plan is not None
    return float(sum(step.clocks for step in plan.steps))


def recorded(kind: str, engine: str) -> Iterator[tuple[Network, dict[str, Any]]]:
    """Rows that name an engine."""
    rows = json.loads((RESULTS / f"{kind}.json").read_text())["results"]
    by_name = {network.name: network for network in networks(kind, False)}
    for row in rows:
        if row["implementation"] == f"sbnet_cupy, {engine} engine" and row["median_us"]:
            yield by_name[row["case"].split(", ")[0]], row


def assert_near(found: list[tuple[float, float]]) -> None:
    """Raise AssertionError unless clocks agree with microseconds: each within a third, all within an eighth."""
    errors = [math.log(clocks / MHZ / us) for clocks, us in found]
    assert max(map(abs, errors)) < math.log(4 / 3), errors
    assert abs(np.mean(errors)) < math.log(9 / 8), errors


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("kind", ["conv", "bottleneck"])
def test_the_model_of_the_fused_engine_agrees_with_the_record(kind: str) -> None:
    found = [(fused_clocks(*named), named[1]["median_us"]) for named in recorded(kind, "fused")]
    assert len(found) == 12
    assert_near(found)


@pytest.mark.usefixtures("h200")
def test_the_model_of_the_composed_engine_agrees_with_the_record() -> None:
    """Where a row has the library that the engine takes: cuDNN for 3x3 kernels on tensor cores, else cuBLAS."""
    found = []
    for kind, engine in (("conv", "cudnn"), ("conv", "cublas"), ("bottleneck", "cublas")):
        for network, row in recorded(kind, engine):
            if (network.precision.name == "float32") == (engine == "cublas"):
                blocks, x = blocks_of(network, row)
                found.append((blocks.composed_clocks(x.itemsize), row["median_us"]))
    assert len(found) == 16
    assert_near(found)


def test_clocks_of_the_composed_engine() -> None:
    """More work takes longer; features fill up the tiles of the libraries' kernels: those of cuDNN are wider."""
    small = StackConv(ConvSize(9, 64, 64), 3000, 2000)

    def clocks(*convs: StackConv, itemsize: int = 4, tf32: bool = True, multiprocessors: int = 132) -> float:
        return composed_clocks(convs, itemsize, tf32, multiprocessors)

    usual = clocks(small)
    assert clocks(small._replace(target=2001)) > usual
    assert clocks(small._replace(source=3001)) > usual
    assert clocks(small, small) > usual
    large = small._replace(source=30000, target=20000)  # a small one takes cuDNN as long in halves: the launch is most
    assert clocks(large) > 1.2 * clocks(large, itemsize=2)
    assert clocks(small, itemsize=2, tf32=False) == clocks(small, itemsize=2)
    assert clocks(small, multiprocessors=66) > usual
    narrow, wide = (StackConv(ConvSize(9, 64, features), 10**6, 10**6) for features in (1, 128))
    assert clocks(narrow) / clocks(wide) > 0.5 > clocks(narrow, tf32=False) / clocks(wide, tf32=False)


def test_clocks_of_the_composed_engine_in_float32() -> None:
    """cuBLAS takes a product for each pixel of a kernel, of all pixels of the stack: those of a stride lie together."""
    small = StackConv(ConvSize(9, 64, 64), 3000, 2000)

    def clocks(*convs: StackConv) -> float:
        return composed_clocks(convs, 4, False, 132)

    usual = clocks(small)
    assert usual > composed_clocks([small], 4, True, 132)
    assert clocks(small._replace(target=2001)) > usual
    assert clocks(small, small) > usual > clocks(small._replace(strides=(2, 2)))
    shallow = small._replace(size=ConvSize(1, 9 * 64, 64))  # as many products, but one matrix
    assert clocks(shallow) < usual - 8 * 2000
    large, larger = (StackConv(ConvSize(9, 64, 64), source, 10**6) for source in (10**6, 2 * 10**6))
    assert clocks(larger) > 1.8 * clocks(large)
