"""How the fused convolution cuts its work: pure functions of the problem and of the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ._fused_clocks import CONV_TENSOR, PLAIN, WAITS, Clocks, product_clocks
from ._fused_plan import (
    FEW_SUMS,
    MOST_SUMS,
    DeviceLimits,
    Pair,
    alone,
    may_share,
    room_beside,
    tiles_of,
    window_bytes,
)
from ._packing import COLUMNS, PIECE_BYTES, STEP_PIECES, Packing
from ._warps import ROWS, WarpLayout, warp_layouts

#: Sums of a warp where windows come in chunks, in place of MOST_SUMS.
_CHUNK_SUMS = 12

#: Clocks for which a tile waits for each further chunk of its channels, on tensor cores and without them.
_CHUNK, _PLAIN_CHUNK = 800, 1600

#: Bytes of windows in a clock that a multiprocessor brings, and of results that it writes.
_BROUGHT, _WRITTEN = 22, 44

#: What the step before takes of the time in which its window is brought, and clocks that a warp waits for the residual
#: of 16 x 8 sums.
_ACTIVATION, _RESIDUAL = 2.8, 900


@dataclass(frozen=True)
class ConvProblem:
    """What decides how a convolution is cut."""

    packing: Packing
    ksize: Pair
    strides: Pair
    #: Output pixels of a block.
    block: Pair
    #: Blocks, active or not: the room of the list.
    rows: int
    uses_tensor_cores: bool
    #: Whether an element-wise step comes before, and whether a residual is added.
    activates: bool = False
    adds: bool = False


@dataclass(frozen=True)
class ConvPlan:
    """How a convolution is cut."""

    #: Output pixels of a tile, and tiles of a block.
    tile: Pair
    tiles: Pair
    layout: WarpLayout
    #: Input pixels of a tile.
    window: Pair
    #: Bytes of a staged window, and of shared memory in all.
    window_bytes: int
    shared: int
    grid: tuple[int, int, int]
    #: CTAs that a multiprocessor holds at a time.
    resident: int


@functools.lru_cache(maxsize=1024)
def plan_conv(problem: ConvProblem, limits: DeviceLimits) -> ConvPlan | None:
    """The plan that the model takes for fastest; None if none fits."""
    plans = list(conv_plans(problem, limits))
    return min(plans, key=lambda plan: conv_clocks(plan, problem, limits), default=None)


def conv_plans(problem: ConvProblem, limits: DeviceLimits) -> Iterator[ConvPlan]:
    """All plans that fit."""
    packing = problem.packing
    table = PIECE_BYTES + packing.steps * STEP_PIECES * 4
    most = _CHUNK_SUMS if problem.uses_tensor_cores and packing.chunks > 1 else MOST_SUMS
    for tile in tiles_of(problem.block):
        tiles = (math.ceil(problem.block[0] / tile[0]), math.ceil(problem.block[1] / tile[1]))
        window = tuple((t - 1) * s + k for t, s, k in zip(tile, problem.strides, problem.ksize))
        staged = window_bytes(packing.chunk, (window[0], window[1]), tile[1], problem.strides)
        row_tiles = math.ceil(tile[0] * tile[1] / ROWS)
        for layout in warp_layouts(row_tiles, packing.columns, problem.uses_tensor_cores, most):
            channels = 8 * layout.columns
            if problem.activates:
                channels += 8 * packing.chunk * packing.chunks * packing.lanes
            shared = table + channels + max(staged * min(2, packing.chunks), layout.exchanged_bytes)
            if shared > limits.cta_shared:
                continue
            ctas = problem.rows * tiles[0] * tiles[1]
            grid = (max(1, min(ctas, 2**31 - 1)), packing.columns * COLUMNS // layout.columns, 1)
            for resident, asked in conv_residents(layout, problem, shared, grid[0] * grid[1], limits):
                yield ConvPlan(tile, tiles, layout, (window[0], window[1]), staged, asked, grid, resident)


def conv_residents(
    layout: WarpLayout, problem: ConvProblem, shared: int, ctas: int, limits: DeviceLimits
) -> Iterator[tuple[int, int]]:
    """How many CTAs a multiprocessor may hold at a time, and the shared memory that each asks for then."""
    yield 1, alone(shared, limits)
    sums = layout.m * layout.n
    chunks_and_more = problem.packing.chunks > 1 and (layout.depth > 1 or problem.activates)
    steps_around = problem.adds or (problem.activates and sums > 4)
    spills = sums > FEW_SUMS or (problem.uses_tensor_cores and (chunks_and_more or steps_around))
    if may_share(ctas, limits) and shared <= room_beside(limits) and not spills:
        yield 2, shared


def conv_clocks(plan: ConvPlan, problem: ConvProblem, limits: DeviceLimits) -> float:
    """The model of a convolution."""
    packing, layout = problem.packing, plan.layout
    itemsize = PIECE_BYTES // packing.lanes
    rates, chunk = (CONV_TENSOR, _CHUNK) if problem.uses_tensor_cores else (PLAIN, _PLAIN_CHUNK)
    results = plan.tile[0] * plan.tile[1] * layout.columns * itemsize
    windows = packing.chunks * plan.window_bytes * (1 + (_ACTIVATION if problem.activates else 0))
    residual = _RESIDUAL * math.ceil(layout.m * layout.n / layout.depth) if problem.adds else 0
    tile = Clocks(WAITS + (packing.chunks - 1) * chunk + residual, windows / _BROUGHT + results / _WRITTEN)
    tile += product_clocks(layout, packing.chunks * packing.steps, itemsize, rates)
    return tile.of(plan.grid[0] * plan.grid[1], plan.resident, limits.multiprocessors)
