"""How the convolution by warpgroups is cut, and where it is taken: pure functions, no kernel runs."""

from __future__ import annotations

import math
import os
from typing import Any

import cpu_cuda
import numpy as np
import pytest
from cpu_cuda import standin
from hypothesis import assume, given
from hypothesis import strategies as st
from test_fused_plan import LIMITS, blocks, counts, fastest, is_crowded, launch_clocks, pairs

from sbnet_cupy import BlockIndices, _fused_plan, calc_block_params, sparse_conv2d
from sbnet_cupy._fused_conv_plan import ConvProblem
from sbnet_cupy._fused_plan import DeviceLimits
from sbnet_cupy._fused_wgmma_plan import LAUNCH, WgmmaPlan, plan_wgmma, wgmma_plans
from sbnet_cupy._packing import packing_of


@st.composite
def problems(draw: st.DrawFn) -> ConvProblem:
    ksize, itemsize = draw(pairs | st.just((3, 3)) | st.just((1, 1))), draw(st.sampled_from([2, 4]))
    channels, features = draw(st.integers(1, 100)) * 16 // itemsize, 8 * draw(st.integers(1, 40))
    return ConvProblem(packing_of((*ksize, channels, features), itemsize), ksize, (1, 1), draw(blocks), True)


def check(plan: WgmmaPlan, problem: ConvProblem, limits: DeviceLimits) -> None:
    packing, layout = problem.packing, plan.layout
    for squares, count, whole in zip(layout.squares, plan.tiles, problem.block):
        assert (count - 1) * 8 * squares < whole <= count * 8 * squares
    # Two groups, which share squares, columns or the depth; a product has columns that the instructions take.
    assert layout.m * layout.groups_m == math.prod(layout.squares)
    assert (layout.groups_m, layout.depth) in ((1, 1), (2, 1), (1, 2))
    assert layout.columns == 8 * layout.n * 2 // (layout.groups_m * layout.depth)
    assert layout.n in (1, 2, 3, 4, 6, 8, 12, 16)
    assert plan.splits * layout.columns == packing.warpgroup_shape[1]
    # Neighbouring features that lanes have together are not cut.
    assert layout.n % packing.together == 0 or packing.together % layout.n == 0
    # Chunks are whole, and of pairs where there are several.
    assert plan.chunk * plan.chunks == packing.pixel_pieces
    assert plan.chunks == 1 or plan.chunk * packing.positions % 2 == 0
    # Groups that share the depth have as many whole steps each.
    steps, left = divmod(plan.chunk * packing.positions, 2 * layout.depth)
    assert plan.parts <= steps + (left > 0)
    assert layout.depth == 1 or left == 0 == plan.chunk % 2
    # What kernels/conv_wgmma.cu lays out: scales and shifts, for each stage planes and rows of weights, and half of the
    # sums of all threads where they are exchanged.
    height, width = (8 * squares + k - 1 for squares, k in zip(layout.squares, problem.ksize))
    pieces = plan.chunk * packing.positions
    least = 16 * (height * width * (plan.chunk + pieces % 2) + (pieces + pieces % 2) * layout.columns)
    least *= min(2, plan.chunks)
    least += 8 * layout.columns + (layout.depth - 1) * 4 * 256 * layout.m * layout.n * 4 // 2
    assert least <= plan.shared <= limits.cta_shared
    beside = limits.multiprocessor_shared // (plan.shared + 1024)
    assert plan.resident == 2 <= beside if plan.resident > 1 else beside <= 1
    assert plan.ctas == math.prod(plan.tiles) * plan.splits


@given(problems(), counts, st.sampled_from([LIMITS[0], LIMITS[3]]))
def test_plans(problem: ConvProblem, rows: int, limits: DeviceLimits) -> None:
    plans = list(wgmma_plans(problem, limits))
    assume(plans)
    for plan in plans:
        check(plan, problem, limits)
    timed = [(plan, launch_clocks(plan, rows, limits, LAUNCH)) for plan in plans if is_crowded(plan, rows, limits)]
    best, clocks = plan_wgmma(problem, rows, limits)
    assert (best, clocks) == (fastest(timed)[0], pytest.approx(fastest(timed)[1]))


def test_a_launch_hides_what_it_can() -> None:
    """The more multiprocessors its last CTAs leave idle, the less it takes; none, and it hides nothing."""
    problem = ConvProblem(packing_of((3, 3, 24, 24), 2), (3, 3), (1, 1), (8, 16), True)
    plan = next(plan for plan in wgmma_plans(problem, LIMITS[0]) if plan.ctas == plan.resident == 1)
    hidden = LAUNCH._replace(hidden=0)
    for rows, idle in ((132, 0), (66, 0.5), (33, 0.75), (264, 0), (198, 0.5)):
        taken = [_fused_plan.launch_clocks(plan, rows, LIMITS[0], launch) for launch in (LAUNCH, hidden)]
        assert taken[1] - taken[0] == pytest.approx(idle * LAUNCH.hidden)


def test_more_work_takes_longer() -> None:
    for itemsize in (2, 4):
        clocks = []
        for channels, rows in ((64, 60), (64, 600), (128, 600), (256, 600), (256, 6000)):
            packing = packing_of((3, 3, channels, channels), itemsize)
            clocks.append(plan_wgmma(ConvProblem(packing, (3, 3), (1, 1), (16, 16), True), rows, LIMITS[0])[1])
        assert clocks == sorted(clocks)
        assert clocks[-1] > 50 * clocks[0]


def kernels(limits: DeviceLimits, dtype: str, channels: int, features: int, **options: Any) -> set[str]:
    """Sources that a convolution of 200 blocks of 16 x 16 launches on a device."""
    strides = options.get("strides", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpu_cuda.LIMITS", limits)
        with cpu_cuda.recording() as found:
            x = standin.empty((1, 400, 700, channels), dtype)
            w = standin.empty((3, 3, channels, features), dtype)
            params = calc_block_params(x.shape, (15 * strides + 3,) * 2, w.shape, strides, "SAME")
            rows, count = np.full((200, 3), -1, np.int32), np.zeros(1, np.int32)
            indices = BlockIndices(standin.asarray(rows), standin.asarray(count))
            sparse_conv2d(x, w, indices, params, engine="fused", **options)
    return {instance.source for instance in found}


@pytest.mark.skipif(bool(cpu_cuda.why_unavailable()) and not os.environ.get("CI"), reason="no kernels on a CPU here")
def test_where_it_is_taken() -> None:
    """On Hopper, by tensor cores, where it is ahead: with wide inputs, of whole pixels, without strides."""
    hopper, ada = LIMITS[0], LIMITS[1]
    blackwell = DeviceLimits(148, 227 << 10, 228 << 10, 100)
    wgmma, conv = {"pack.cu", "conv_wgmma.cu"}, {"pack.cu", "conv.cu"}
    assert kernels(hopper, "float16", 256, 256) == wgmma
    assert kernels(hopper, "float32", 256, 256, allow_tf32=True) == wgmma
    assert kernels(hopper, "float32", 256, 256, allow_tf32=False) == conv
    assert kernels(ada, "float16", 256, 256) == kernels(blackwell, "float16", 256, 256) == conv
    assert kernels(hopper, "float16", 256, 256, strides=2) == conv
    assert kernels(hopper, "float16", 256, 252) == kernels(hopper, "float16", 60, 256) == conv
