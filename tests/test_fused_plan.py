"""Plans of the fused kernels: they fit, they cover what they must, and the benchmark's problems have some."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stages import STAGES
from sbnet_cupy._fused_bottleneck_plan import (
    BottleneckPlan,
    BottleneckProblem,
    bottleneck_clocks,
    bottleneck_plans,
    plan_bottleneck,
    rows_of,
    scatter_clocks,
    tiles_in_image,
)
from sbnet_cupy._fused_clocks import Clocks, LaunchClocks, Rates, plain_rates, steps_ahead
from sbnet_cupy._fused_conv_plan import LAUNCH, ConvPlan, ConvProblem, conv_plans, plan_conv
from sbnet_cupy._fused_plan import MOST_SUMS, DeviceLimits, row_pieces, tiles_of, window_bytes
from sbnet_cupy._packing import packing_of
from sbnet_cupy._warps import ROWS, WARPS, WarpLayout

#: An H200, an RTX 4090, a T4 and what tests/cpu_cuda stands for.
LIMITS = (
    DeviceLimits(132, 227 << 10, 228 << 10, 90),
    DeviceLimits(128, 99 << 10, 100 << 10, 89),
    DeviceLimits(40, 64 << 10, 64 << 10, 75),
    DeviceLimits(4, 99 << 10, 100 << 10, 90),
)

counts = st.integers(1, 5000)
pairs = st.tuples(st.integers(1, 7), st.integers(1, 7))
blocks = st.tuples(st.integers(1, 40), st.integers(1, 40))
images = st.tuples(st.integers(1, 90), st.integers(1, 90))


@st.composite
def conv_problems(draw: st.DrawFn) -> ConvProblem:
    ksize = draw(pairs)
    shape = (*ksize, draw(st.integers(1, 700)), draw(st.integers(1, 300)))
    return ConvProblem(
        packing_of(shape, draw(st.sampled_from([2, 4]))),
        ksize,
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        draw(blocks),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def check_layout(layout: WarpLayout, rows: int, columns: int) -> None:
    """All rows and a divisor of the columns, by as many warps as there are, each with the sums that it may keep."""
    assert layout.rows >= rows > layout.rows - layout.warps_m * ROWS
    assert columns % layout.columns == 0
    assert layout.warps_m * layout.warps_n * layout.depth == WARPS
    assert layout.m * layout.n <= MOST_SUMS


def check_tiles(tile: tuple[int, int], tiles: tuple[int, int], block: tuple[int, int]) -> None:
    """No fewer than cover the block, and none of them outside of it."""
    for size, count, whole in zip(tile, tiles, block):
        assert (count - 1) * size < whole <= count * size
    assert tile[0] * tile[1] <= 256


def check_conv(plan: ConvPlan, problem: ConvProblem, limits: DeviceLimits) -> None:
    packing = problem.packing
    check_tiles(plan.tile, plan.tiles, problem.block)
    check_layout(plan.layout, plan.tile[0] * plan.tile[1], 8 * packing.columns)
    height, width = ((t - 1) * s + k for t, s, k in zip(plan.tile, problem.strides, problem.ksize))
    # What kernels/conv.cu lays out, one after another.
    windows = window_bytes(packing.chunk, (height, width), plan.tile[1], problem.strides)
    windows *= 2 if packing.chunks > 1 else 1
    exchanged = WARPS * plan.layout.m * plan.layout.n * 32 * 16 if plan.layout.depth > 1 else 0
    source = 2 * 4 * packing.chunk * packing.lanes * packing.chunks if problem.activates else 0
    needed = 16 + 4 * 4 * packing.steps + 2 * 4 * plan.layout.columns + source + max(windows, exchanged)
    assert needed <= plan.shared <= limits.cta_shared
    assert plan.splits * plan.layout.columns == 8 * packing.columns
    assert plan.ctas == math.prod(plan.tiles) * plan.splits
    # As many CTAs fit beside each other as are to, and no more.
    beside = limits.multiprocessor_shared // (plan.shared + 1024)
    assert plan.resident == 2 <= beside if plan.resident > 1 else beside <= 1
    assert plan.resident == 1 or limits.capability == 90


def fastest(timed: list[tuple[Any, float]]) -> tuple[Any, float]:
    """The first plan that takes least, and its clocks."""
    return min(timed, key=lambda pair: pair[1], default=(None, math.inf))


def is_crowded(plan: Any, rows: int, limits: DeviceLimits) -> bool:
    """Whether some multiprocessor has as many CTAs as the plan is made for."""
    return plan.resident == 1 or rows * plan.ctas > limits.multiprocessors


def launch_clocks(plan: Any, rows: int, limits: DeviceLimits, launch: LaunchClocks) -> float:
    """What a launch takes by the model: less where its last CTAs leave places free."""
    places = plan.resident * limits.multiprocessors
    free = places - 1 - (rows * plan.ctas - 1) % places
    tiles = plan.clocks.of(rows * plan.ctas, plan.resident, limits.multiprocessors)
    return launch.takes - launch.hidden * (free / places) + tiles


@given(conv_problems(), counts, st.sampled_from(LIMITS))
def test_plans_of_convolutions(problem: ConvProblem, rows: int, limits: DeviceLimits) -> None:
    plans = list(conv_plans(problem, limits))
    for plan in plans:
        check_conv(plan, problem, limits)
    for count in (rows, 1, rows + 1):  # what is kept of one call serves the others
        timed = [
            (plan, launch_clocks(plan, count, limits, LAUNCH)) for plan in plans if is_crowded(plan, count, limits)
        ]
        assert plan_conv(problem, count, limits) == fastest(timed)


@st.composite
def bottleneck_problems(draw: st.DrawFn) -> BottleneckProblem:
    return BottleneckProblem(
        draw(st.integers(1, 1000)) if draw(st.booleans()) else 8 * draw(st.integers(1, 64)),
        draw(st.integers(1, 200)) if draw(st.booleans()) else 8 * draw(st.integers(1, 16)),
        draw(st.sampled_from([2, 4])),
        draw(pairs | st.just((3, 3))),
        draw(blocks),
        draw(st.booleans()),
    )


def check_bottleneck(plan: BottleneckPlan, problem: BottleneckProblem, limits: DeviceLimits) -> None:
    check_tiles(plan.tile, plan.tiles, problem.block)
    halo, pixels, _ = rows_of(plan.tile, problem.ksize)
    assert pixels == plan.tile[0] * plan.tile[1]
    assert halo == (plan.tile[0] + problem.ksize[0] - 1) * (plan.tile[1] + problem.ksize[1] - 1)
    features = (problem.inner, problem.inner, problem.channels)
    for layout, rows, columns in zip(plan.layouts, (halo, pixels, pixels), features):
        check_layout(layout, rows, columns)
    first, second, third = plan.layouts
    assert first.columns == second.columns == problem.inner  # whole: the next product reads all of them
    assert third.depth == 1
    # What kernels/bottleneck.cu lays out, one after another.
    steps, lanes = steps_of(problem), 16 // problem.itemsize
    near = sum(
        count // 8 * step * 32 * 16 for k, (count, step) in enumerate(zip(features, steps)) if plan.near >> k & 1
    )
    whole = (plan.tile[0] + problem.ksize[0] - 1, plan.tile[1] + problem.ksize[1] - 1)
    window = window_bytes(problem.channels // lanes, whole, whole[1])
    middle = window_bytes(problem.inner // lanes, whole, plan.tile[1])
    exchanged = [WARPS * layout.m * layout.n * 32 * 16 if layout.depth > 1 else 0 for layout in plan.layouts]
    tables = 16 + 16 * sum(steps) + 8 * problem.channels + 16 * problem.inner
    assert tables + near + middle + window + max(exchanged) <= plan.shared <= limits.cta_shared
    assert plan.ctas == math.prod(plan.tiles)
    assert plan.resident == 1 or limits.capability == 90


@given(bottleneck_problems(), counts, images, st.sampled_from(LIMITS), st.booleans())
def test_plans_of_bottlenecks(
    problem: BottleneckProblem, rows: int, image: tuple[int, int], limits: DeviceLimits, in_place: bool
) -> None:
    plans = list(bottleneck_plans(problem, limits))
    for plan in plans:
        check_bottleneck(plan, problem, limits)
    timed = [
        (plan, bottleneck_clocks(plan, problem, rows, image, limits))
        for plan in plans
        if is_crowded(plan, rows, limits)
    ]
    if in_place:
        timed = [pair for pair in timed if rows * pair[0].ctas <= pair[0].resident * limits.multiprocessors]
    assert plan_bottleneck(problem, rows, image, limits, in_place) == fastest(timed)
    if problem.channels % 8 or problem.inner % 8:
        assert not plans


def test_another_number_of_blocks_needs_no_other_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = ConvProblem(packing_of((3, 3, 24, 24), 2), (3, 3), (1, 1), (8, 8), True)
    block = BottleneckProblem(96, 24, 2, (3, 3), (8, 8), True)
    for rows in (100, 101):
        assert plan_conv(conv, rows, LIMITS[0])[0] is not None
        assert plan_bottleneck(block, rows, (rows, rows), LIMITS[0], bool(rows % 2))[0] is not None
        for name in ("_fused_conv_plan", "_fused_bottleneck_plan"):
            monkeypatch.setattr(f"sbnet_cupy.{name}.tiles_of", None)


@given(st.integers(1, 64), st.integers(1, 40), st.integers(1, 24), pairs, st.tuples(*[st.sampled_from([1, 3, 5])] * 2))
def test_pixels_that_are_read_at_once_lie_in_different_banks(
    pieces: int, height: int, width: int, ksize: tuple[int, int], strides: tuple[int, int]
) -> None:
    """Of eight neighbouring pixels of a tile, also where its rows end, no two share the banks of a piece."""
    pitch, whole = pieces | 1, tuple((t - 1) * s + k for t, s, k in zip((height, width), strides, ksize))
    row = row_pieces(pitch, whole[1], width, strides)
    assert whole[1] * pitch <= row < whole[1] * pitch + 8
    assert window_bytes(pieces, (whole[0], whole[1]), width, strides) == 16 * row * whole[0]
    places = [y * strides[0] * row + x * strides[1] * pitch for y in range(height) for x in range(width)]
    for first in range(0, len(places) - 7, 8):
        assert len({place % 8 for place in places[first : first + 8]}) == 8


def steps_of(problem: BottleneckProblem) -> tuple[int, ...]:
    return tuple(product.steps for product in problem.products)


def test_steps_of_a_bottleneck() -> None:
    half = BottleneckProblem(96, 24, 2, (3, 3), (8, 8), True)
    # 12 pieces; 3 pieces at 9 positions, 27, in steps of 4; 3 pieces.
    assert steps_of(half) == (3, 7, 1)
    single = BottleneckProblem(96, 24, 4, (3, 3), (8, 8), True)
    assert steps_of(single) == (6, 14, 2)
    # Packed in chunks: 66 pieces in 5 of 16; 26 pieces at 9 positions in 4 of 8, 18 steps each; 26 pieces.
    wide = BottleneckProblem(264, 104, 4, (3, 3), (8, 8), True)
    assert steps_of(wide) == (20, 72, 7)


@given(blocks)
def test_tiles_cut_blocks_evenly(block: tuple[int, int]) -> None:
    tiles = list(tiles_of(block))
    assert len(tiles) == len(set(tiles))
    assert block[0] * block[1] > 256 or block in tiles
    for tile in tiles:
        check_tiles(tile, (math.ceil(block[0] / tile[0]), math.ceil(block[1] / tile[1])), block)
        assert tile[0] * tile[1] >= ROWS or tile == block


@given(blocks, blocks, images, st.integers(1, 50))
def test_tiles_in_the_image(tile: tuple[int, int], block: tuple[int, int], image: tuple[int, int], rows: int) -> None:
    """Of all blocks of an image, as many as begin in it; of some, their share."""
    firsts = [
        [b + t for b in range(0, extent, step) for t in range(0, step, size)]
        for size, step, extent in zip(tile, block, image)
    ]
    inside = math.prod(sum(first < extent for first in axis) for axis, extent in zip(firsts, image))
    count = math.prod(math.ceil(extent / step) for extent, step in zip(image, block))
    assert tiles_in_image(count, tile, block, image) == inside
    assert tiles_in_image(rows, tile, block, image) == math.ceil(rows * inside / count)


def test_clocks_of_several_tiles() -> None:
    """A multiprocessor that holds two of them works on one while the other waits."""
    tile = Clocks(10, 4)
    assert [tile.of(ctas, 1, 2) for ctas in (1, 2, 3, 5)] == [14, 14, 28, 42]
    assert [tile.of(ctas, 2, 2) for ctas in (1, 2, 3, 5)] == [14, 14, 18, 32]
    assert tile + tile * 2 == Clocks(30, 12)
    assert [steps_ahead(n) for n in (1, 2, 3, 4, 6, 8, 12)] == [8, 6, 3, 3, 2, 1, 1]  # as in kernels/products.cuh


def test_clocks_of_what_multiprocessors_share() -> None:
    """As many as there are tiles, whatever holds them: half of the multiprocessors take half of them."""
    tile = Clocks(10, 4, 6)
    assert [tile.of(ctas, 1, 2) for ctas in (1, 2, 3)] == [14 + 3, 14 + 6, 28 + 9]
    assert [tile.of(ctas, 2, 2) for ctas in (2, 4)] == [14 + 6, 18 + 12]
    assert tile + tile * 2 == Clocks(30, 12, 18)


def test_clocks_of_a_scatter() -> None:
    """By its traffic: all blocks' results are read and written, by all multiprocessors together."""
    problem = BottleneckProblem(96, 24, 2, (3, 3), (16, 16), True)
    clocks = [scatter_clocks(problem, rows, LIMITS[0]) for rows in (0, 100, 200)]
    assert clocks[0] > 0
    assert clocks[2] - clocks[1] == pytest.approx(clocks[1] - clocks[0])
    wider = BottleneckProblem(192, 24, 4, (3, 3), (16, 16), True)
    assert scatter_clocks(wider, 50, LIMITS[0]) == pytest.approx(clocks[2])
    assert scatter_clocks(problem, 100, LIMITS[1]) > clocks[1]


def test_rates_of_plain_arithmetic() -> None:
    """Of four words, as many are read at once as kWords of kernels/products.cuh says; two CTAs do not wait."""
    rates = Rates(products=100, step=7, rows=3)
    for m, n, resident, words in ((6, 3, 1, 4), (4, 4, 1, 2), (5, 1, 2, 2), (1, 4, 2, 2), (3, 2, 2, 1), (6, 1, 2, 1)):
        found = plain_rates(rates, WarpLayout(m, n, 1, 1), resident)
        assert found == rates._replace(rows=3 * 4 // words, step=7 if resident == 1 else 0)


def test_tiles_outside_of_the_image_take_no_time() -> None:
    """Blocks of 16 pixels, in tiles of 8: of an image of 100, half of the last ones' tiles lie in it."""
    problem = BottleneckProblem(96, 24, 4, (3, 3), (16, 16), True)
    plan = next(plan for plan in bottleneck_plans(problem, LIMITS[0]) if plan.tile == (8, 8))
    small, large = (bottleneck_clocks(plan, problem, 490, image, LIMITS[0]) for image in ((100, 100), (112, 112)))
    every, fewer = (plan.clocks.of(tiles, plan.resident, 132) for tiles in (4 * 490, 13 * 13 * 10))
    assert large == every
    assert small == 0.75 * every + 0.25 * fewer < large


def test_layouts_leave_room_for_larger_tiles() -> None:
    """44 blocks in TF32 on an H200: three tiles each run at the same time, if warps exchange little."""
    problem = BottleneckProblem(256, 64, 4, (3, 3), (18, 18), True)
    plan, _ = plan_bottleneck(problem, 44, (400, 700), LIMITS[0], in_place=True)
    assert plan is not None
    assert 44 * plan.ctas == 132


ARITHMETICS = {"float16": (2, True), "tf32": (4, True), "float32": (4, False)}


def stage_problems(itemsize: int, tensor: bool) -> Iterator[ConvProblem | BottleneckProblem]:
    """What the stages of the benchmark ask for: their convolution, and their bottleneck, on every candidate's tiles."""
    for stage in STAGES:
        for block in ((8, 8), (16, 16), (5, 8), (12, 11)):
            packing = packing_of((3, 3, stage.bottleneck, stage.bottleneck), itemsize)
            yield ConvProblem(packing, (3, 3), (1, 1), block, tensor)
            yield BottleneckProblem(stage.channels, stage.bottleneck, itemsize, (3, 3), block, tensor)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_the_benchmarks_problems_have_plans(arithmetic: str) -> None:
    """On an H200, all of them but the widest bottleneck, which takes three launches."""
    limits, without = LIMITS[0], set()
    for problem in stage_problems(*ARITHMETICS[arithmetic]):
        if isinstance(problem, ConvProblem):
            assert plan_conv(problem, 200, limits)[0] is not None
        elif plan_bottleneck(problem, 200, (400, 700), limits)[0] is None:
            without.add((problem.channels, problem.inner))
    assert without == {(2048, 512)}


def test_wide_bottlenecks_have_none() -> None:
    """Their window does not fit beside the rest; three launches do it."""
    for limits in LIMITS:
        wide = BottleneckProblem(4096, 1024, 2, (3, 3), (8, 8), True)
        assert plan_bottleneck(wide, 10, (50, 88), limits) == (None, math.inf)
    # As wide as a multiprocessor of Hopper allows, but not one of Turing.
    stage = BottleneckProblem(384, 96, 4, (3, 3), (8, 8), True)
    assert plan_bottleneck(stage, 10, (50, 88), LIMITS[0])[0] is not None
    assert plan_bottleneck(stage, 10, (50, 88), LIMITS[2]) == (None, math.inf)


def test_no_layout_leaves_columns() -> None:
    """Packing fills up the groups of 8 features, so that layouts of several columns divide them."""
    for features in range(1, 400):
        columns = packing_of((1, 1, 8, features), 2).columns
        assert columns <= 4 or columns % 3 == 0 or columns % 4 == 0
