"""How the convolution by warpgroups cuts its work: pure functions of the problem and of the device."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from ._fused_clocks import Clocks, LaunchClocks
from ._fused_conv_plan import ConvProblem
from ._fused_plan import DeviceLimits, Pair, alone, contenders, fastest, may_share, room_beside
from ._packing import COLUMNS, PIECE_BYTES
from ._warps import THREADS

#: Pixels of a side of the squares that tiles are made of; squares of a tile along an axis and in all, at most.
SIDE, _MOST_SIDE, _MOST_SQUARES = 8, 4, 8

#: Warpgroups of a CTA.
GROUPS = 2

#: Groups of 8 columns that a product may have, as in kernels/ptx.cuh.
_COLUMN_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)

#: Numbers that a thread sums, at most: alone, and next to another CTA, which has half of the registers. More would
#: spill.
_MOST_SUMS, _FEW_SUMS = 128, 48

#: Pieces of a window that a thread holds in registers, at most, where they are rounded on their way: alone, and next to
#: another CTA; and squares of a group then.
_MOST_TURNS, _FEW_TURNS, _FEW_SQUARES = 14, 4, 2

#: Products that a kernel has in a row, at most: more would not fit the instruction cache.
_MOST_PRODUCTS = 160

#: Pieces of a pixel in a chunk, where there are several.
_CHUNKS = (2, 4, 8, 16, 32)

# Fitted as the rates of _fused_clocks.py are.

#: Clocks that a tile waits: for its window and at barriers, for each further chunk, and for each further part of the
#: weights.
_WAITS, _CHUNK, _PART = 2770, 252, 35

#: What a launch takes. All that follows from the list of blocks is found before the launch before is done, if there is
#: room.
LAUNCH = LaunchClocks(2370, hidden=3040)

#: Bytes of windows, by the size of a number, and of weights in a clock.
_BROUGHT, _WEIGHTS = {2: 14.6, 4: 29.9}, 158

#: Clocks of a product of each group: at least, and for each 8 columns.
_PRODUCT, _COLUMN = 23.4, 3.87

#: Bytes of results in a clock.
_WRITTEN = 14


class GroupLayout(NamedTuple):
    """How the warpgroups of a CTA share a tile. Mirrored by Warpgroups of kernels/warpgroup.cuh."""

    squares: Pair
    #: Squares of a group, and groups of 8 columns.
    m: int
    n: int
    #: Groups that differ in their squares; the others differ in their columns.
    groups_m: int

    @property
    def tile(self) -> Pair:
        """Its pixels."""
        return self.squares[0] * SIDE, self.squares[1] * SIDE

    @property
    def columns(self) -> int:
        """Columns of all groups."""
        return self.n * COLUMNS * (GROUPS // self.groups_m)

    @property
    def sums(self) -> int:
        """Numbers that a thread sums."""
        return self.m * self.n * 4

    @property
    def expression(self) -> str:
        """Its C++ type."""
        return f"sbnet::Warpgroups<{self.squares[0]}, {self.squares[1]}, {self.m}, {self.n}, {self.groups_m}>"


class WgmmaPlan(NamedTuple):
    """How a convolution is cut."""

    layout: GroupLayout
    #: Tiles of a block.
    tiles: Pair
    #: Pieces of a pixel that are staged at a time, how often, and in how many parts their weights come.
    chunk: int
    chunks: int
    parts: int
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


def plan_wgmma(problem: ConvProblem, rows: int, limits: DeviceLimits) -> tuple[WgmmaPlan | None, float]:
    """The plan that the model takes for fastest for so many blocks, and its clocks; None if none fits."""
    return fastest(_contenders(problem, limits), rows, limits, LAUNCH)


@functools.lru_cache(maxsize=1024)
def _contenders(problem: ConvProblem, limits: DeviceLimits) -> tuple[WgmmaPlan, ...]:
    return contenders(wgmma_plans(problem, limits))


def wgmma_plans(problem: ConvProblem, limits: DeviceLimits) -> Iterator[WgmmaPlan]:
    """All plans that fit."""
    packing = problem.packing
    columns = packing.warpgroup_shape[1] // COLUMNS
    beside = room_beside(limits) if may_share(limits) else 0
    for layout in group_layouts(problem.block, columns, packing.together):
        tiles = math.ceil(problem.block[0] / layout.tile[0]), math.ceil(problem.block[1] / layout.tile[1])
        splits = columns * COLUMNS // layout.columns
        for chunk in chunks_of(packing.pixel_pieces, packing.positions, layout.m):
            turns = _turns(chunk, layout, problem)
            chunks = packing.pixel_pieces // chunk
            shared = 8 * layout.columns + min(2, chunks) * _stage_bytes(chunk, layout, problem)
            few = layout.sums <= _FEW_SUMS and layout.m <= _FEW_SQUARES and turns <= _FEW_TURNS
            for parts in (1, 2):
                if 2 * parts > chunk * packing.positions:
                    continue
                clocks = _cta_clocks(layout, tiles, chunk, chunks, parts, problem)
                if shared <= limits.cta_shared and turns <= _MOST_TURNS:
                    own = alone(shared, limits)
                    yield WgmmaPlan(layout, tiles, chunk, chunks, parts, splits, own, 1, clocks)
                if shared <= beside and few:
                    yield WgmmaPlan(layout, tiles, chunk, chunks, parts, splits, shared, 2, clocks)


def group_layouts(block: Pair, columns: int, together: int) -> Iterator[GroupLayout]:
    """Layouts of tiles no larger than a block needs, and of a divisor of the columns, in groups of 8.

    Of those, `together` belong together: a warpgroup takes a divisor of them, or a multiple.
    """
    sides = [range(1, min(_MOST_SIDE, math.ceil(size / SIDE)) + 1) for size in block]
    for height, width in itertools.product(*sides):
        squares = height * width
        if squares > _MOST_SQUARES:
            continue
        for groups_m, n in itertools.product((1, 2), _COLUMN_COUNTS):
            layout = GroupLayout((height, width), squares // groups_m, n, groups_m)
            fits = squares % groups_m == 0 and columns % (n * GROUPS // groups_m) == 0
            whole = n % together == 0 or together % n == 0
            if fits and whole and layout.sums <= _MOST_SUMS:
                yield layout


def chunks_of(pieces: int, positions: int, squares: int) -> Iterator[int]:
    """Pieces of a pixel that may be staged at a time: all, or an even part."""
    most = 2 * _MOST_PRODUCTS // (positions * squares)
    if 0 < pieces <= min(most, THREADS):
        yield pieces
    yield from (chunk for chunk in _CHUNKS if chunk < pieces and chunk <= most and pieces % chunk == 0)


def _window_pixels(layout: GroupLayout, problem: ConvProblem) -> int:
    height, width = (size + k - 1 for size, k in zip(layout.tile, problem.ksize))
    return height * width


def _turns(chunk: int, layout: GroupLayout, problem: ConvProblem) -> int:
    """Pieces of a window that a thread holds in registers: none of halves, which are copied as they are."""
    rounds = problem.packing.lanes == 4
    return math.ceil(_window_pixels(layout, problem) / (THREADS // chunk)) if rounds else 0


def _stage_bytes(chunk: int, layout: GroupLayout, problem: ConvProblem) -> int:
    """Shared memory of a chunk's window and weights. Mirrored by WgmmaShape of kernels/conv_wgmma.cu."""
    shift = (chunk + 7) // chunk % 8
    plane = math.ceil((_window_pixels(layout, problem) - shift) / 8) * 8 + shift
    pieces = chunk * problem.packing.positions
    return PIECE_BYTES * (plane * (chunk + pieces % 2) + (pieces + pieces % 2) * layout.columns)


def _cta_clocks(layout: GroupLayout, tiles: Pair, chunk: int, chunks: int, parts: int, problem: ConvProblem) -> Clocks:
    packing, itemsize = problem.packing, PIECE_BYTES // problem.packing.lanes
    pieces = chunks * chunk
    works = _window_pixels(layout, problem) * pieces * PIECE_BYTES / _BROUGHT[itemsize]
    works += pieces * packing.positions * layout.columns * PIECE_BYTES / _WEIGHTS
    steps = chunks * math.ceil(chunk * packing.positions / 2)
    works += steps * layout.m * GROUPS * max(_PRODUCT, _COLUMN * layout.n)
    pixels = problem.block[0] * problem.block[1] / (tiles[0] * tiles[1])
    works += pixels * layout.columns * itemsize / _WRITTEN
    return Clocks(_WAITS + (chunks - 1) * _CHUNK + (parts - 1) * _PART, works)
