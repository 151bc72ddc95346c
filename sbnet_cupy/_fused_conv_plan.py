"""How the fused convolution cuts its work: pure functions of the problem and of the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ._fused_clocks import CONV_PLAIN, CONV_TENSOR, Clocks, LaunchClocks, Rates, plain_rates, product_clocks
from ._fused_plan import (
    MOST_SUMS,
    DeviceLimits,
    Pair,
    alone,
    contenders,
    fastest,
    may_share,
    room_beside,
    tiles_of,
    window_bytes,
)
from ._packing import COLUMNS, PIECE_BYTES, STEP_PIECES, Packing
from ._warps import ROWS, WarpLayout, warp_layouts

#: Sums of a warp where windows come in chunks, in place of MOST_SUMS; next to another CTA, which has half of the
#: registers; and there, where windows come in chunks, without tensor cores, or on them and a residual is added.
_CHUNK_SUMS, _FEW_SUMS, _FEW_PLAIN_SUMS, _FEWEST_SUMS = 12, 12, 9, 8

#: Clocks that a tile waits: for its place, for its window, at barriers.
_WAITS = 1875

#: What a launch takes. It hides nothing: most of what a CTA does waits for the launch before.
LAUNCH = LaunchClocks(1670)

#: Clocks for which a tile waits for each further chunk of its channels: on tensor cores, there where a kernel is one
#: pixel, so that a chunk has few weights, and without them.
_CHUNK, _PIXEL_CHUNK, _PLAIN_CHUNK = 1430, 590, 258

#: Bytes of windows in a clock that a multiprocessor brings, and of results that it writes.
_BROUGHT, _WRITTEN = 20.8, 82

#: Clocks that a warp waits for the residual of 16 x 8 sums.
_RESIDUAL = 1140


@dataclass(frozen=True)
class ConvProblem:
    """What decides how a convolution may be cut, whatever the number of its blocks."""

    packing: Packing
    ksize: Pair
    strides: Pair
    #: Output pixels of a block.
    block: Pair
    uses_tensor_cores: bool
    #: Whether an element-wise step comes before, and whether a residual is added.
    activates: bool = False
    adds: bool = False


class ConvPlan(NamedTuple):
    """How a convolution is cut, whatever the number of its blocks."""

    #: Output pixels of a tile, and tiles of a block.
    tile: Pair
    tiles: Pair
    layout: WarpLayout
    #: CTAs that share the features of a tile.
    splits: int
    #: Bytes of shared memory.
    shared: int
    #: CTAs that a multiprocessor holds at a time.
    resident: int
    #: What a CTA takes.
    clocks: Clocks

    @property
    def ctas(self) -> int:
        """CTAs of a block."""
        return self.tiles[0] * self.tiles[1] * self.splits


def plan_conv(problem: ConvProblem, rows: int, limits: DeviceLimits) -> tuple[ConvPlan | None, float]:
    """The plan that the model takes for fastest for so many blocks, and its clocks; None if none fits."""
    return fastest(_contenders(problem, limits), rows, limits, LAUNCH)


@functools.lru_cache(maxsize=1024)
def _contenders(problem: ConvProblem, limits: DeviceLimits) -> tuple[ConvPlan, ...]:
    return contenders(conv_plans(problem, limits))


def conv_plans(problem: ConvProblem, limits: DeviceLimits) -> Iterator[ConvPlan]:
    """All plans that fit."""
    packing, itemsize = problem.packing, PIECE_BYTES // problem.packing.lanes
    table = PIECE_BYTES + packing.steps * STEP_PIECES * 4
    if problem.activates:
        table += 8 * packing.chunk * packing.chunks * packing.lanes
    chunk = _PLAIN_CHUNK
    if problem.uses_tensor_cores:
        chunk = _PIXEL_CHUNK if problem.ksize == (1, 1) else _CHUNK
    waits = _WAITS + (packing.chunks - 1) * chunk
    beside = room_beside(limits) if may_share(limits) else 0
    for tile in tiles_of(problem.block):
        tiles = (math.ceil(problem.block[0] / tile[0]), math.ceil(problem.block[1] / tile[1]))
        height, width = ((t - 1) * s + k for t, s, k in zip(tile, problem.strides, problem.ksize))
        staged = window_bytes(packing.chunk, (height, width), tile[1], problem.strides)
        brought = packing.chunks * staged / _BROUGHT
        pixels = tile[0] * tile[1]
        for layout, single, double in _layouts(packing, math.ceil(pixels / ROWS), problem.uses_tensor_cores):
            shared = table + 8 * layout.columns + max(staged * min(2, packing.chunks), layout.exchanged_bytes)
            if shared > limits.cta_shared:
                continue
            residual = _RESIDUAL * math.ceil(layout.m * layout.n / layout.depth) if problem.adds else 0
            clocks = Clocks(waits + residual, brought + pixels * layout.columns * itemsize / _WRITTEN)
            splits = packing.columns * COLUMNS // layout.columns
            yield ConvPlan(tile, tiles, layout, splits, alone(shared, limits), 1, clocks + single)
            if shared <= beside and not _spills(layout, problem):
                yield ConvPlan(tile, tiles, layout, splits, shared, 2, clocks + double)


@functools.lru_cache(maxsize=512)
def _layouts(packing: Packing, row_tiles: int, tensor: bool) -> tuple[tuple[WarpLayout, Clocks, Clocks], ...]:
    """Layouts for so many tiles of rows, and what the product takes in each: alone, and next to another CTA."""
    most = _CHUNK_SUMS if packing.chunks > 1 else MOST_SUMS

    def clocks(layout: WarpLayout, rates: Rates) -> Clocks:
        return product_clocks(layout, packing.steps, PIECE_BYTES // packing.lanes, rates, chunks=packing.chunks)

    found = []
    for layout in warp_layouts(row_tiles, packing.columns, tensor, most):
        if tensor:
            single = double = clocks(layout, CONV_TENSOR)
        else:
            single, double = (clocks(layout, plain_rates(CONV_PLAIN, layout, resident)) for resident in (1, 2))
        found.append((layout, single, double))
    return tuple(found)


def _spills(layout: WarpLayout, problem: ConvProblem) -> bool:
    """Whether registers spill, or may, next to another CTA."""
    most, tensor = _FEW_SUMS, problem.uses_tensor_cores
    if problem.packing.chunks > 1:
        if tensor and (layout.depth > 1 or problem.activates):
            return True
        most = (_FEWEST_SUMS if problem.adds else _FEW_SUMS) if tensor else _FEW_PLAIN_SUMS
    return layout.m * layout.n > most
