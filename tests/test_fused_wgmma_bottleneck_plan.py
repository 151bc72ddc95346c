"""How the bottleneck by warpgroups is cut, and where it is taken: pure functions, no kernel runs."""

from __future__ import annotations

import math
import os
from typing import Any

import cpu_cuda
import numpy as np
import pytest
from cpu_cuda import standin
from hypothesis import given
from hypothesis import strategies as st
from test_fused_plan import LIMITS, blocks, counts, images, pairs

from sbnet_cupy import BlockIndices, BottleneckWeights, calc_block_params_res_block, sparse_res_block_bottleneck
from sbnet_cupy._fused_bottleneck_plan import BottleneckProblem, bottleneck_clocks
from sbnet_cupy._fused_plan import DeviceLimits
from sbnet_cupy._fused_wgmma_bottleneck_plan import (
    COUNTED,
    WgmmaBottleneckPlan,
    plan_wgmma_bottleneck,
    wgmma_bottleneck_plans,
)


@st.composite
def problems(draw: st.DrawFn) -> BottleneckProblem:
    channels = draw(st.integers(1, 40)) * draw(st.sampled_from([8, 8, 8, 3]))
    inner = draw(st.integers(1, 16)) * draw(st.sampled_from([8, 8, 8, 5]))
    ksize, itemsize = draw(pairs | st.just((3, 3))), draw(st.sampled_from([2, 4]))
    return BottleneckProblem(channels, inner, itemsize, ksize, draw(blocks), True)


def check(plan: WgmmaBottleneckPlan, problem: BottleneckProblem, limits: DeviceLimits) -> None:
    second, third = plan.layouts
    for squares, count, whole in zip(second.squares, plan.tiles, problem.block):
        assert (count - 1) * 8 * squares < whole <= count * 8 * squares
    assert plan.tile == (8 * second.squares[0], 8 * second.squares[1])
    assert plan.ctas == math.prod(plan.tiles)
    # Two groups, which share squares, columns or the depth; products of columns that the instructions take.
    columns = (1, 2, 3, 4, 6, 8, 12, 16)
    for layout in plan.layouts:
        assert layout.squares == second.squares
        assert layout.m * layout.groups_m == math.prod(layout.squares)
        assert (layout.groups_m, layout.depth) in ((1, 1), (2, 1), (1, 2))
        assert layout.n in columns
        assert layout.sums <= 96
    assert second.columns == problem.inner  # whole: the next product reads all of them
    assert problem.inner // 8 in columns  # those of the first product, which are not shared
    assert third.depth == 1
    assert problem.channels % third.columns == 0
    together = problem.products[2].packing.together
    assert third.n % together == 0 or together % third.n == 0
    # What kernels/bottleneck_wgmma.cu asks of the depths.
    lanes = 16 // problem.itemsize
    assert problem.channels % (2 * lanes) == 0
    assert (
        second.depth == 1
        or problem.inner // lanes // 2 * math.prod(problem.ksize) % 2 == 0 == problem.inner // lanes % 2
    )
    # What it lays out: norms, the second weights and what comes between the convolutions; and the window with the first
    # weights, or the last weights, the tile, half of the sums that are exchanged, and the shortcut.
    halo = math.prod(t + k - 1 for t, k in zip(plan.tile, problem.ksize))
    pixels, size = math.prod(plan.tile), problem.itemsize
    weights = [
        k * c * size for k, c in ((problem.inner, problem.channels), (problem.inner**2, math.prod(problem.ksize)))
    ]
    later = weights[0] + pixels * (problem.inner + problem.channels) * size
    later += (second.depth - 1) * 256 * second.m * second.n * 4 // 2 * 4
    least = 16 * problem.inner + weights[1] + halo * problem.inner * size
    least += max(later, halo * problem.channels * size + weights[0])
    assert least <= plan.shared <= limits.cta_shared
    assert limits.multiprocessor_shared // (plan.shared + 1024) <= 1 == plan.resident


@given(problems(), counts, images, st.sampled_from([LIMITS[0], LIMITS[3]]), st.booleans())
def test_plans(
    problem: BottleneckProblem, rows: int, image: tuple[int, int], limits: DeviceLimits, in_place: bool
) -> None:
    plans = wgmma_bottleneck_plans(problem, limits)
    for plan in plans:
        check(plan, problem, limits)
    timed = [
        (plan, COUNTED * bottleneck_clocks(plan, problem, rows, image, limits))
        for plan in plans
        if not in_place or rows * plan.ctas <= limits.multiprocessors
    ]
    best = min(timed, key=lambda pair: pair[1], default=(None, math.inf))
    assert plan_wgmma_bottleneck(problem, rows, image, limits, in_place) == best
    if problem.channels % 8 or problem.inner % 8:
        assert not plans


def test_stages_have_plans() -> None:
    """Those of the benchmark whose weights fit; the others are wider than a multiprocessor."""

    def tiles(channels: int, inner: int, itemsize: int) -> set[tuple[int, int]]:
        problem = BottleneckProblem(channels, inner, itemsize, (3, 3), (16, 16), True)
        return {plan.tile for plan in wgmma_bottleneck_plans(problem, LIMITS[0])}

    assert tiles(192, 48, 4) == {(8, 8)}
    assert tiles(192, 48, 2) == {(8, 8), (8, 16), (16, 8)}
    assert tiles(256, 64, 2) == {(8, 8), (8, 16), (16, 8)}
    assert tiles(256, 64, 4) == tiles(384, 96, 2) == set()


def test_more_work_takes_longer() -> None:
    for itemsize in (2, 4):
        clocks = []
        for channels, rows in ((64, 60), (64, 600), (128, 600), (192, 600), (192, 6000)):
            problem = BottleneckProblem(channels, channels // 4, itemsize, (3, 3), (8, 8), True)
            clocks.append(plan_wgmma_bottleneck(problem, rows, (800, 800), LIMITS[0])[1])
        assert clocks == sorted(clocks)
        assert clocks[-1] > 10 * clocks[0]


def kernels(limits: DeviceLimits, dtype: str, channels: int, inner: int, tf32: bool = False) -> set[str]:
    """Sources that a bottleneck in place of 110 blocks of 8 x 8 launches on a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpu_cuda.LIMITS", limits)
        with cpu_cuda.recording() as found:
            x = standin.empty((1, 200, 350, channels), dtype)
            plain = BottleneckWeights.random(channels, inner, dtype=dtype)
            weights: dict[str, Any] = {k: a if a is None else standin.asarray(a) for k, a in vars(plain).items()}
            params = calc_block_params_res_block(x.shape, (10, 10), plain.ksizes, 1, "SAME")
            rows, count = np.full((110, 3), -1, np.int32), np.zeros(1, np.int32)
            indices = BlockIndices(standin.asarray(rows), standin.asarray(count))
            sparse_res_block_bottleneck(
                x, BottleneckWeights(**weights), indices, params, out=x, engine="fused", allow_tf32=tf32
            )
    return {instance.source for instance in found} - {"pack.cu"}


@pytest.mark.skipif(bool(cpu_cuda.why_unavailable()) and not os.environ.get("CI"), reason="no kernels on a CPU here")
def test_where_it_is_taken() -> None:
    """On Hopper, by tensor cores, where it is ahead: where the weights are many for a tile."""
    hopper, ada = LIMITS[0], LIMITS[1]
    blackwell = DeviceLimits(148, 227 << 10, 228 << 10, 100)
    assert kernels(hopper, "float32", 192, 48, True) == {"bottleneck_wgmma.cu"}
    assert kernels(hopper, "float32", 192, 48) != {"bottleneck_wgmma.cu"}
    for limits in (ada, blackwell):
        assert "bottleneck_wgmma.cu" not in kernels(limits, "float32", 192, 48, True)
    assert kernels(hopper, "float16", 96, 24) == {"bottleneck.cu"}
