"""How the bottleneck by warpgroups cuts its work: pure functions of the problem and of the device."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from ._fused_bottleneck_plan import BottleneckProblem, fastest_whole, halo_of
from ._fused_clocks import Clocks
from ._fused_plan import DeviceLimits, Pair, alone
from ._fused_wgmma_plan import COLUMN_COUNTS, GROUPS, SIDE, GroupLayout, piece_planes, product_clocks
from ._packing import COLUMNS, PIECE_BYTES
from ._warps import THREADS

#: Squares of a tile along an axis and in all, at most.
_MOST_SIDE, _MOST_SQUARES = 3, 4

#: Numbers that a thread sums of the last product at a time, at most.
_PASS_SUMS = 96

#: Registers of a thread for its part of a window, which it keeps, and for sums of products meanwhile: more would spill.
_MOST_REGISTERS = 160

#: Bytes of the places where copies are waited for.
_GATES = 32

# Fitted as the rates of _fused_clocks.py are.

#: Clocks that a tile waits: for its place, for what it asks for first, at barriers.
_WAITS = 2960

#: Bytes in a clock of windows, by the size of a number, of weights, and of results.
_BROUGHT, _WEIGHTS, _WRITTEN = {2: 10.3, 4: 13.7}, 165, 20.3

#: Bytes in a clock, of all of these, that the L2 cache gives each multiprocessor when all of them ask.
_CACHED = 210

#: What a bottleneck counts for, of what is expected, where it is held against bottleneck.cu: of 16x16 tiles of 96
#: channels, which that one is best at, more is expected than they take (8.9 us of 7.9 in float16).
COUNTED = 1.04


class WgmmaBottleneckPlan(NamedTuple):
    """How a bottleneck is cut, whatever the number of its blocks."""

    #: Of the second and of the third product. All warpgroups share the pixels of the first.
    layouts: tuple[GroupLayout, GroupLayout]
    #: Tiles of a block.
    tiles: Pair
    #: Bytes of shared memory.
    shared: int
    #: What a CTA takes.
    clocks: Clocks

    @property
    def tile(self) -> Pair:
        """Its pixels."""
        return self.layouts[0].tile

    @property
    def ctas(self) -> int:
        """CTAs of a block."""
        return self.tiles[0] * self.tiles[1]

    @property
    def resident(self) -> int:
        """CTAs that a multiprocessor holds at a time."""
        return 1


def plan_wgmma_bottleneck(
    problem: BottleneckProblem, rows: int, image: Pair, limits: DeviceLimits, in_place: bool = False
) -> tuple[WgmmaBottleneckPlan | None, float]:
    """The plan that the model takes for fastest for so many blocks, and what its clocks count; None if none fits.

    `image`: the pixels of an image. In place, all CTAs have to run at the same time.
    """
    plan, clocks = fastest_whole(wgmma_bottleneck_plans(problem, limits), problem, rows, image, limits, in_place)
    return plan, COUNTED * clocks


@functools.lru_cache(maxsize=1024)
def wgmma_bottleneck_plans(problem: BottleneckProblem, limits: DeviceLimits) -> tuple[WgmmaBottleneckPlan, ...]:
    """All plans that fit: one for each size of tiles."""
    lanes = PIECE_BYTES // problem.itemsize
    whole = problem.channels % (2 * lanes) == 0 and problem.inner % COLUMNS == 0
    if not whole or problem.inner // COLUMNS not in COLUMN_COUNTS or problem.channels // lanes > THREADS:
        return ()
    sides = (range(1, min(_MOST_SIDE, math.ceil(size / SIDE)) + 1) for size in problem.block)
    return tuple(_plans_of(itertools.product(*sides), problem, limits))


def _plans_of(
    squares: Iterator[tuple[int, ...]], problem: BottleneckProblem, limits: DeviceLimits
) -> Iterator[WgmmaBottleneckPlan]:
    for height, width in squares:
        layouts = _layouts((height, width), problem) if height * width <= _MOST_SQUARES else None
        if layouts is None or _registers(layouts, problem) > _MOST_REGISTERS:
            continue
        shared = _shared_bytes(layouts, problem)
        if shared <= limits.cta_shared:
            tile = layouts[0].tile
            tiles = math.ceil(problem.block[0] / tile[0]), math.ceil(problem.block[1] / tile[1])
            yield WgmmaBottleneckPlan(layouts, tiles, alone(shared, limits), _cta_clocks(layouts, tiles, problem))


def _layouts(squares: Pair, problem: BottleneckProblem) -> tuple[GroupLayout, GroupLayout] | None:
    """How the last two products are shared: by squares where that is even; else the second by its depth.

    A product mostly reads its rows, whatever the columns.
    """
    count, columns = math.prod(squares), problem.inner // COLUMNS
    pieces, positions = problem.inner * problem.itemsize // PIECE_BYTES, math.prod(problem.ksize)
    if count % GROUPS == 0:
        second = GroupLayout(squares, count // GROUPS, columns, GROUPS, 1)
    elif pieces % 2 == 0 and pieces // 2 * positions % 2 == 0:
        second = GroupLayout(squares, count, columns, 1, 2)
    elif columns // 2 in COLUMN_COUNTS and columns % 2 == 0:
        second = GroupLayout(squares, count, columns // 2, 1, 1)
    else:
        return None
    together = problem.products[2].packing.together
    thirds = (GroupLayout(squares, second.m, n, second.groups_m, 1) for n in reversed(COLUMN_COUNTS))
    for third in thirds:
        whole = third.n % together == 0 or together % third.n == 0
        if whole and third.sums <= _PASS_SUMS and problem.channels % third.columns == 0:
            return second, third
    return None


def _first_rows(tile: Pair, problem: BottleneckProblem) -> int:
    """Times 64 rows of a group in the first product."""
    return math.ceil(math.prod(halo_of(tile, problem.ksize)) / (GROUPS * SIDE * SIDE))


def _registers(layouts: tuple[GroupLayout, GroupLayout], problem: BottleneckProblem) -> int:
    """What a thread keeps of its window, and has of sums meanwhile."""
    tile, pieces = layouts[0].tile, problem.channels * problem.itemsize // PIECE_BYTES
    kept = 4 * math.ceil(math.prod(halo_of(tile, problem.ksize)) / (THREADS // pieces))
    return kept + max(4 * _first_rows(tile, problem) * problem.inner // COLUMNS, layouts[0].sums)


def _shared_bytes(layouts: tuple[GroupLayout, GroupLayout], problem: BottleneckProblem) -> int:
    """Shared memory of a tile. Mirrored by WgmmaBottleneck of kernels/bottleneck_wgmma.cu."""
    second, third = layouts
    halo, pixels = math.prod(halo_of(second.tile, problem.ksize)), math.prod(second.tile)
    lanes = PIECE_BYTES // problem.itemsize
    outer, inner = problem.channels // lanes, problem.inner // lanes
    odd = inner // second.depth * math.prod(problem.ksize) % 2
    weights = _weight_bytes(problem)
    middle = piece_planes(inner, halo) * (inner + odd)
    later = weights[2] + piece_planes(inner, pixels) * (inner + inner % 2) + second.exchanged
    # Four lanes have so many pieces of a pixel side by side, and pixels are as far apart, counted around the banks.
    run = min(third.n, problem.products[2].packing.together) * COLUMNS // lanes
    later += pixels * (outer + (run - outer) % 8) * PIECE_BYTES
    first = max(piece_planes(outer, halo) * outer + weights[0], later)
    return _GATES + 4 * 4 * problem.inner + first + weights[1] + middle


def _weight_bytes(problem: BottleneckProblem) -> tuple[int, int, int]:
    """Of the three convolutions, in the order for warpgroups."""
    first, second, third = (4 * math.prod(product.packing.warpgroup_shape) for product in problem.products)
    return first, second, third


def _cta_clocks(layouts: tuple[GroupLayout, GroupLayout], tiles: Pair, problem: BottleneckProblem) -> Clocks:
    second, third = layouts
    halo = math.prod(halo_of(second.tile, problem.ksize))
    pixel_bytes = problem.channels * problem.itemsize
    weights = sum(_weight_bytes(problem))
    written = problem.block[0] * problem.block[1] / (tiles[0] * tiles[1]) * pixel_bytes
    works = halo * pixel_bytes / _BROUGHT[problem.itemsize] + weights / _WEIGHTS + written / _WRITTEN
    steps = [math.ceil(product.packing.warpgroup_shape[0] / 2) for product in problem.products]
    works += steps[0] * product_clocks(_first_rows(second.tile, problem), problem.inner // COLUMNS)
    works += steps[1] / second.depth * product_clocks(second.m, second.n)
    works += steps[2] * product_clocks(third.m, third.n) * problem.channels / third.columns
    return Clocks(_WAITS, works, (halo * pixel_bytes + weights + written) / _CACHED)
