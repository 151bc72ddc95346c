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
COLUMN_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)

#: Numbers that a thread sums, at most: alone, and next to another CTA, which has half of the registers. More would
#: spill.
_MOST_SUMS, _FEW_SUMS = 128, 48

#: Pieces of a window that a thread holds in registers, at most, where they are rounded on their way: alone, and next to
#: another CTA; and squares of a group then. Where groups share the depth of a tile, no other CTA is next to theirs:
#: that was the fastest way in 4 of 210 problems, while the model took it for a tenth faster than it is.
_MOST_TURNS, _FEW_TURNS, _FEW_SQUARES = 14, 4, 2

#: Products that a kernel has in a row, at most: more would not fit the instruction cache.
_MOST_PRODUCTS = 160

#: Pieces of a pixel in a chunk, where there are several.
_CHUNKS = (2, 4, 8, 16, 32)

# Fitted as the rates of _fused_clocks.py are.

#: Clocks that a tile waits: for its window and at barriers, for each further chunk, and for each further part of the
#: weights.
_WAITS, _CHUNK, _PART = 2810, 173, 9

#: What a launch takes. All that follows from the list of blocks is found before the launch before is done, if there is
#: room.
LAUNCH = LaunchClocks(2310, hidden=2680)

#: Bytes of windows, by the size of a number, and of weights in a clock.
_BROUGHT, _WEIGHTS = {2: 16.9, 4: 30.5}, 237

#: Clocks of a product of each group: to read its rows, and 8 columns; or, where that is more, to multiply 8 columns.
_ROWS, _READ, _MULTIPLIED = 22.3, 1.71, 4.5

#: Bytes of results, and of sums that groups exchange, in a clock.
_WRITTEN, _EXCHANGED = 23.3, 41.7


class GroupLayout(NamedTuple):
    """How the warpgroups of a CTA share a tile. Mirrored by Warpgroups of kernels/warpgroup.cuh."""

    squares: Pair
    #: Squares of a group, and groups of 8 columns.
    m: int
    n: int
    #: Groups that differ in their squares, and in the part of the depth that they sum over; the others differ in their
    #: columns.
    groups_m: int
    depth: int

    @property
    def tile(self) -> Pair:
        """Its pixels."""
        return self.squares[0] * SIDE, self.squares[1] * SIDE

    @property
    def columns(self) -> int:
        """Columns of all groups."""
        return self.n * COLUMNS * (GROUPS // (self.groups_m * self.depth))

    @property
    def sums(self) -> int:
        """Numbers that a thread sums."""
        return self.m * self.n * 4

    @property
    def exchanged(self) -> int:
        """Bytes of shared memory in which groups that share the depth exchange sums: a half of all, of 4 bytes each."""
        return 0 if self.depth == 1 else THREADS * self.sums // 2 * 4

    @property
    def expression(self) -> str:
        """Its C++ type."""
        return f"sbnet::Warpgroups<{', '.join(map(str, (*self.squares, *self[1:])))}>"


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
        for chunk in chunks_of(packing.pixel_pieces, packing.positions, layout):
            turns = _turns(chunk, layout, problem)
            chunks = packing.pixel_pieces // chunk
            shared = 8 * layout.columns + min(2, chunks) * _stage_bytes(chunk, layout, problem) + layout.exchanged
            few = layout.sums <= _FEW_SUMS and layout.m <= _FEW_SQUARES and layout.depth == 1 and turns <= _FEW_TURNS
            for parts in (1, 2):
                if 2 * parts > chunk * packing.positions // layout.depth:
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
        for (groups_m, depth), n in itertools.product(((1, 1), (2, 1), (1, 2)), COLUMN_COUNTS):
            layout = GroupLayout((height, width), squares // groups_m, n, groups_m, depth)
            fits = squares % groups_m == 0 and columns * COLUMNS % layout.columns == 0
            whole = n % together == 0 or together % n == 0
            if fits and whole and layout.sums <= _MOST_SUMS:
                yield layout


def chunks_of(pieces: int, positions: int, layout: GroupLayout) -> Iterator[int]:
    """Pieces of a pixel that may be staged at a time: all, or an even part.

    Groups that share the depth take as many pieces of a pixel each, at all positions of the kernel two at a time.
    """
    most = 2 * _MOST_PRODUCTS // (positions * layout.m)
    parts = (chunk for chunk in _CHUNKS if chunk < pieces and pieces % chunk == 0)
    for chunk in (pieces, *parts) if 0 < pieces <= THREADS else parts:
        own, left = divmod(chunk, layout.depth)
        if chunk <= most and (layout.depth == 1 or left == own * positions % 2 == 0):
            yield chunk


def _window_pixels(layout: GroupLayout, problem: ConvProblem) -> int:
    height, width = (size + k - 1 for size, k in zip(layout.tile, problem.ksize))
    return height * width


def _turns(chunk: int, layout: GroupLayout, problem: ConvProblem) -> int:
    """Pieces of a window that a thread holds in registers: none of halves, which are copied as they are."""
    rounds = problem.packing.lanes == 4
    return math.ceil(_window_pixels(layout, problem) / (THREADS // chunk)) if rounds else 0


def _stage_bytes(chunk: int, layout: GroupLayout, problem: ConvProblem) -> int:
    """Shared memory of a chunk's window and weights. Mirrored by WgmmaShape of kernels/conv_wgmma.cu."""
    pieces = chunk * problem.packing.positions
    planes = piece_planes(chunk, _window_pixels(layout, problem)) * (chunk + pieces % 2)
    return planes + PIECE_BYTES * (pieces + pieces % 2) * layout.columns


def piece_planes(pieces: int, pixels: int) -> int:
    """Bytes from a piece of pixels of so many pieces to the next. Mirrored by PixelPlanes of kernels/warpgroup.cuh."""
    shift = (pieces + 7) // pieces % 8
    return PIECE_BYTES * (math.ceil((pixels - shift) / 8) * 8 + shift)


def product_clocks(m: int, n: int) -> float:
    """Clocks of a step of all groups, for so many times 64 rows and 8 columns of each."""
    return m * GROUPS * max(_ROWS + _READ * n, _MULTIPLIED * n)


def _cta_clocks(layout: GroupLayout, tiles: Pair, chunk: int, chunks: int, parts: int, problem: ConvProblem) -> Clocks:
    packing, itemsize = problem.packing, PIECE_BYTES // problem.packing.lanes
    pieces = chunks * chunk
    works = _window_pixels(layout, problem) * pieces * PIECE_BYTES / _BROUGHT[itemsize]
    works += pieces * packing.positions * layout.columns * PIECE_BYTES / _WEIGHTS
    steps = chunks * math.ceil(chunk * packing.positions / (2 * layout.depth))
    works += steps * product_clocks(layout.m, layout.n)
    pixels = problem.block[0] * problem.block[1] / (tiles[0] * tiles[1])
    works += pixels * layout.columns * itemsize / _WRITTEN
    works += layout.exchanged / _EXCHANGED
    return Clocks(_WAITS + (chunks - 1) * _CHUNK + (parts - 1) * _PART, works)
