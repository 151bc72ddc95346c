"""How the fused bottleneck cuts its work: pure functions of the problem and of the device."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from ._fused_bottleneck_products import IMAGES, Product, products_of, ranked_layouts
from ._fused_clocks import Clocks
from ._fused_plan import DeviceLimits, Pair, TilePlan, alone, are_enough, may_share, room_beside, tiles_of, window_bytes
from ._packing import COLUMNS, PIECE_BYTES, STEP_PIECES
from ._warps import ROWS, WarpLayout

Layouts = tuple[WarpLayout, WarpLayout, WarpLayout]

#: Bytes of a window from which it comes in parts, and parts at most.
_PART_BYTES, _MOST_PARTS = 1 << 14, 4

#: Clocks that a tile waits: for its place, for its window, at barriers; and between two products.
_WAITS, _BETWEEN = 1770, 800

#: How likely it is that a mask has its share of the blocks that reach beyond the image.
_HAS_LAST = 0.25

#: Clocks of a scatter, and bytes that each multiprocessor reads and writes in one.
_SCATTER, _SCATTERED = 804, 26.1


@dataclass(frozen=True)
class BottleneckProblem:
    """What decides how a bottleneck may be cut, whatever the number of its blocks."""

    channels: int
    inner: int
    itemsize: int
    #: Kernel of the second convolution; the others are 1x1.
    ksize: Pair
    #: Output pixels of a block.
    block: Pair
    uses_tensor_cores: bool

    @property
    def products(self) -> tuple[Product, Product, Product]:
        """The products of a tile."""
        return products_of(self.channels, self.inner, self.itemsize, self.ksize, self.uses_tensor_cores)


class BottleneckPlan(NamedTuple):
    """How a bottleneck is cut, whatever the number of its blocks."""

    tile: Pair
    tiles: Pair
    layouts: Layouts
    #: Bit k tells that the weights of product k are kept in shared memory.
    near: int
    #: Parts of its channels in which the input is brought.
    parts: int
    shared: int
    #: CTAs that a multiprocessor holds at a time.
    resident: int
    #: What a CTA takes.
    clocks: Clocks

    @property
    def ctas(self) -> int:
        """CTAs of a block."""
        return self.tiles[0] * self.tiles[1]


def plan_bottleneck(
    problem: BottleneckProblem, rows: int, image: Pair, limits: DeviceLimits, in_place: bool = False
) -> tuple[BottleneckPlan | None, float]:
    """The plan that the model takes for fastest for so many blocks, and its clocks; None if none fits.

    `image`: the pixels of an image. In place, all CTAs have to run at the same time.
    """
    return fastest_whole(bottleneck_plans(problem, limits), problem, rows, image, limits, in_place)


class WholePlan(TilePlan, Protocol):
    """How a whole bottleneck is cut."""

    @property
    def tile(self) -> Pair:
        """Pixels of a tile."""


Whole = TypeVar("Whole", bound=WholePlan)


def fastest_whole(
    plans: Iterable[Whole], problem: BottleneckProblem, rows: int, image: Pair, limits: DeviceLimits, in_place: bool
) -> tuple[Whole | None, float]:
    """The plan that the model takes for fastest for so many blocks, and its clocks; None if there is none."""
    timed = (
        (plan, bottleneck_clocks(plan, problem, rows, image, limits))
        for plan in plans
        if are_enough(rows * plan.ctas, plan.resident, limits)
        and not (in_place and rows * plan.ctas > plan.resident * limits.multiprocessors)
    )
    return min(timed, key=lambda pair: pair[1], default=(None, math.inf))


def bottleneck_clocks(
    plan: WholePlan, problem: BottleneckProblem, rows: int, image: Pair, limits: DeviceLimits
) -> float:
    """The model of a bottleneck, whose mask has its share of the blocks that reach beyond the image, or none."""
    inside = tiles_in_image(rows, plan.tile, problem.block, image)
    every, fewer = (plan.clocks.of(ctas, plan.resident, limits.multiprocessors) for ctas in (rows * plan.ctas, inside))
    return (1 - _HAS_LAST) * every + _HAS_LAST * fewer


def scatter_clocks(problem: BottleneckProblem, rows: int, limits: DeviceLimits) -> float:
    """The model of the scatter of a stack of so many blocks of results."""
    numbers = rows * math.prod(problem.block) * problem.channels
    return _SCATTER + 2 * numbers * problem.itemsize / (_SCATTERED * limits.multiprocessors)


def tiles_in_image(rows: int, tile: Pair, block: Pair, image: Pair) -> int:
    """How many tiles of so many blocks have pixels of the image, if all of its blocks are as likely active.

    The others are left out. Blocks cut the image from its first pixel on, so that the last ones may reach beyond it.
    """
    inside, blocks = 1, 1
    for size, step, extent in zip(tile, block, image):
        whole, rest = divmod(extent, step)
        inside *= whole * math.ceil(step / size) + math.ceil(rest / size)
        blocks *= math.ceil(extent / step)
    return math.ceil(rows * inside / blocks)


@functools.lru_cache(maxsize=1024)
def bottleneck_plans(problem: BottleneckProblem, limits: DeviceLimits) -> tuple[BottleneckPlan, ...]:
    """All plans that fit, with the best layouts for each size of tiles."""
    if problem.channels % COLUMNS or problem.inner % COLUMNS:
        return ()
    residents = (1, 2) if may_share(limits) else (1,)
    tiles = itertools.product(tiles_of(problem.block), residents)
    return tuple(itertools.chain.from_iterable(_plans_of(tile, resident, problem, limits) for tile, resident in tiles))


def _plans_of(tile: Pair, resident: int, problem: BottleneckProblem, limits: DeviceLimits) -> Iterator[BottleneckPlan]:
    """Plans with tiles of a size, with the weights near for which their layouts leave room."""
    products, rows = problem.products, rows_of(tile, problem.ksize)
    tiles = (math.ceil(problem.block[0] / tile[0]), math.ceil(problem.block[1] / tile[1]))
    whole = limits.cta_shared if resident == 1 else room_beside(limits)
    room = whole - _fixed_bytes(tile, problem)
    weights = sum(product.weight_bytes for product in products if product.may_be_near(resident))
    # What warps exchange takes room from weights that could be near: with all of the room, and with what is left.
    for layouts in dict.fromkeys(_layouts(tile, resident, most, problem) for most in (room, room - weights)):
        if layouts is None:
            continue
        near, left = 0, room - max(layout.exchanged_bytes for layout in layouts)
        for product, layout in zip(products, layouts):
            if layout.warps_m > 1 and product.may_be_near(resident) and product.weight_bytes <= left:
                near |= 1 << product.number
                left -= product.weight_bytes
        if resident > 1 and not _takes_half_the_registers(near, problem):
            continue
        parts = window_parts(products[0], rows[0]) if near & 1 else 1
        shared = alone(whole - left, limits) if resident == 1 else whole - left
        clocks = tile_clocks(tile, layouts, near, resident, problem)
        yield BottleneckPlan(tile, tiles, layouts, near, parts, shared, resident, clocks)


def _fixed_bytes(tile: Pair, problem: BottleneckProblem) -> int:
    """Shared memory that tiles of a size take with any layouts."""
    lanes = PIECE_BYTES // problem.itemsize
    steps = sum(product.steps for product in problem.products)
    table = PIECE_BYTES * (1 + steps) + 8 * problem.channels + 16 * problem.inner
    whole = halo_of(tile, problem.ksize)
    middle = window_bytes(problem.inner // lanes, whole, tile[1])
    return table + middle + window_bytes(problem.channels // lanes, whole, whole[1])


def _layouts(tile: Pair, resident: int, room: int, problem: BottleneckProblem) -> Layouts | None:
    """The best layouts that exchange what they do in so many bytes; None if there are none."""
    found = []
    for product, rows in zip(problem.products, rows_of(tile, problem.ksize)):
        layouts = ranked_layouts(product, math.ceil(rows / ROWS), resident)
        layout = next((layout for layout in layouts if layout.exchanged_bytes <= room), None)
        if layout is None:
            return None
        found.append(layout)
    return found[0], found[1], found[2]


def _takes_half_the_registers(near: int, problem: BottleneckProblem) -> bool:
    """Whether none spill next to another CTA: TF32 takes registers to convert, and weights from far to wait for."""
    return not problem.uses_tensor_cores or (problem.itemsize == 2 and bool(near & 1))


def window_parts(first: Product, halo: int) -> int:
    """In how many parts of whole steps the channels of a window of so many pixels come."""
    pieces = math.ceil(first.packing.channels / first.packing.lanes)
    if first.steps * STEP_PIECES != pieces:  # packed with more than the pixels have
        return 1
    for parts in range(_MOST_PARTS, 1, -1):
        if first.steps % parts == 0 and halo * pieces * PIECE_BYTES >= parts * _PART_BYTES:
            return parts
    return 1


def halo_of(tile: Pair, ksize: Pair) -> Pair:
    """Size of a tile with its halo."""
    return tile[0] + ksize[0] - 1, tile[1] + ksize[1] - 1


def rows_of(tile: Pair, ksize: Pair) -> tuple[int, int, int]:
    """Rows of the three products: pixels of a tile and its halo, and those of the tile."""
    pixels = tile[0] * tile[1]
    return math.prod(halo_of(tile, ksize)), pixels, pixels


def tile_clocks(tile: Pair, layouts: Layouts, near: int, resident: int, problem: BottleneckProblem) -> Clocks:
    """What a tile takes."""
    rows = rows_of(tile, problem.ksize)
    clocks = Clocks(_WAITS + 2 * _BETWEEN, (rows[0] + 2 * rows[1]) * problem.channels * problem.itemsize / IMAGES)
    for product, layout, count in zip(problem.products, layouts, rows):
        clocks += product.clocks(layout, math.ceil(count / ROWS), bool(near >> product.number & 1), resident)
    return clocks
