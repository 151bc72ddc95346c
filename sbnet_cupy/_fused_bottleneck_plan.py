"""How the fused bottleneck cuts its work: pure functions of the problem and of the device."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ._fused_clocks import BETWEEN, BOTTLENECK_TENSOR, IMAGES, PLAIN, WAITS, Clocks, product_clocks
from ._fused_plan import (
    FEW_SUMS,
    MOST_SUMS,
    DeviceLimits,
    Pair,
    alone,
    are_enough,
    may_share,
    room_beside,
    tiles_in_image,
    tiles_of,
    window_bytes,
)
from ._packing import COLUMNS, PIECE_BYTES, STEP_PIECES, Packing, packing_of
from ._warps import ROWS, WARPS, WarpLayout, warp_layouts

#: Sums of 16 x 8 numbers of a warp in one pass over the channels of the last product. Bottlenecks of 96/24 channels on
#: an H200 took 14.4 us in TF32 with 8, 15.4 with 6 and 15.0 with 12; 9.7 us in float16 with 8, and 10.3 with 12.
_PASS_SUMS = 8

#: Bytes of the weights of a product up to which they are kept in shared memory, where several warps read the same. All
#: of them have to be there before the first step; larger ones are faster read step by step. On an H200, of 18 KiB: 9.7
#: against 10.3 us; of 36 and 32 KiB: 15.3 against 14.2, and 8.4 against 8.1.
_NEAR_BYTES = 25 << 10

#: Bytes of a window from which it comes in parts, and parts at most.
_PART_BYTES, _MOST_PARTS = 1 << 14, 4

#: Instructions that activate a word of a matrix on its way into a product, by the size of a number.
_ACTIVATION = {2: 8, 4: 4}

#: Bytes in a clock of the second product's weights, for each further warp that reads the same from far, all at once.
_COPIES = 120

#: How much longer a tile takes next to another one, besides what it waits for it.
_BESIDE = 1.06

#: Clocks of a scatter, besides its traffic.
SCATTER = 4800


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
        return _products_of(self.channels, self.inner, self.itemsize, self.ksize, self.uses_tensor_cores)


class BottleneckPlan(NamedTuple):
    """How a bottleneck is cut, whatever the number of its blocks."""

    tile: Pair
    tiles: Pair
    layouts: tuple[WarpLayout, WarpLayout, WarpLayout]
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


class Product(NamedTuple):
    """One of the three products of a tile, and what does not depend on the tile."""

    number: int
    #: What it sums over, and what it puts out.
    packing: Packing
    columns: int
    itemsize: int
    uses_tensor_cores: bool

    @property
    def steps(self) -> int:
        """Steps over its depth."""
        return self.packing.chunks * self.packing.steps

    @property
    def weight_bytes(self) -> int:
        """Its packed weights."""
        return self.columns * self.steps * STEP_PIECES * PIECE_BYTES

    @property
    def may_be_near(self) -> bool:
        """Whether its weights may be kept in shared memory."""
        return self.weight_bytes <= _NEAR_BYTES

    @property
    def is_last(self) -> bool:
        """Whether it is the one that goes over its columns in passes, and shares no depth."""
        return self.number == 2


@functools.lru_cache(maxsize=64)
def _products_of(
    channels: int, inner: int, itemsize: int, ksize: Pair, uses_tensor_cores: bool
) -> tuple[Product, Product, Product]:
    """The products of a bottleneck."""
    shapes = ((1, 1, channels, inner), (*ksize, inner, inner), (1, 1, inner, channels))
    first, second, third = (
        Product(number, packing_of(shape, itemsize), shape[3], itemsize, uses_tensor_cores)
        for number, shape in enumerate(shapes)
    )
    return first, second, third


def plan_bottleneck(
    problem: BottleneckProblem, rows: int, limits: DeviceLimits, image: Pair | None = None, in_place: bool = False
) -> tuple[BottleneckPlan | None, float]:
    """The plan that the model takes for fastest for so many blocks, and its clocks; None if none fits.

    `image` has the pixels of an image: tiles outside of it are left out. In place, all CTAs run at the same time.
    """
    timed = (
        (plan, bottleneck_clocks(plan, problem, rows, limits, image))
        for plan in bottleneck_plans(problem, limits)
        if are_enough(rows * plan.ctas, plan.resident, limits)
        and not (in_place and rows * plan.ctas > plan.resident * limits.multiprocessors)
    )
    return min(timed, key=lambda pair: pair[1], default=(None, math.inf))


def bottleneck_clocks(
    plan: BottleneckPlan, problem: BottleneckProblem, rows: int, limits: DeviceLimits, image: Pair | None
) -> float:
    """The model of a bottleneck."""
    inside = tiles_in_image(rows, plan.tile, problem.block, image)
    return plan.clocks.of_mask(rows * plan.ctas, inside, plan.resident, limits.multiprocessors)


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
    weights = sum(product.weight_bytes for product in products if product.may_be_near)
    # What warps exchange takes room from weights that could be near: with all of the room, and with what is left.
    for layouts in dict.fromkeys(_layouts(tile, resident, most, problem) for most in (room, room - weights)):
        if layouts is None:
            continue
        near, left = 0, room - max(map(_exchanged_bytes, products, layouts))
        for product, layout in zip(products, layouts):
            if layout.warps_m > 1 and product.may_be_near and product.weight_bytes <= left:
                near |= 1 << product.number
                left -= product.weight_bytes
        if resident > 1 and not _takes_half_the_registers(near, problem):
            continue
        parts = window_parts(products[0], rows[0]) if near & 1 else 1
        shared = alone(whole - left, limits) if resident == 1 else whole - left
        clocks = _tile_clocks(tile, layouts, near, problem) * (_BESIDE if resident > 1 else 1)
        yield BottleneckPlan(tile, tiles, layouts, near, parts, shared, resident, clocks)


Layouts = tuple[WarpLayout, WarpLayout, WarpLayout]


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
        layouts = _ranked_layouts(product, math.ceil(rows / ROWS), resident)
        layout = next((layout for layout in layouts if _exchanged_bytes(product, layout) <= room), None)
        if layout is None:
            return None
        found.append(layout)
    return found[0], found[1], found[2]


@functools.lru_cache(maxsize=4096)
def _ranked_layouts(product: Product, row_tiles: int, resident: int) -> tuple[WarpLayout, ...]:
    """Layouts by the clocks for all columns: at once, or for the last product in passes."""
    column_tiles, tensor = product.columns // COLUMNS, product.uses_tensor_cores
    most = MOST_SUMS if resident == 1 else FEW_SUMS
    # Next to another CTA, weights from far take too many registers in a share of the depth.
    may_be_deep = not product.is_last and (resident == 1 or product.may_be_near or not tensor)
    fitting = [
        layout
        for layout in warp_layouts(row_tiles, column_tiles, tensor, min(most, _PASS_SUMS) if product.is_last else most)
        if (product.is_last or layout.n * layout.warps_n == column_tiles) and (may_be_deep or layout.depth == 1)
    ]
    fitting.sort(key=lambda layout: _product_clocks(product, layout, row_tiles, product.may_be_near).alone)
    return tuple(fitting)


def _exchanged_bytes(product: Product, layout: WarpLayout) -> int:
    """Shared memory in which warps exchange parts of sums or, of the last product, lay out results."""
    return layout.result_bytes if product.is_last else layout.exchanged_bytes


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


def _product_clocks(product: Product, layout: WarpLayout, row_tiles: int, is_near: bool) -> Clocks:
    """All passes of a product, and what comes with it."""
    rates = BOTTLENECK_TENSOR if product.uses_tensor_cores else PLAIN
    passes = product.columns // layout.columns
    clocks = product_clocks(layout, product.steps, product.itemsize, rates, is_near) * passes
    if product.number == 0:
        clocks += Clocks(0, _activation_clocks(layout, product.steps, product.itemsize))
    if product.number == 1 and product.uses_tensor_cores and not is_near:
        clocks += Clocks(0, product.weight_bytes * (layout.warps_m - 1) / _COPIES)
    if product.is_last:  # rows of results are written in parts of a warp's columns: about a sector more for each
        clocks += Clocks(0, row_tiles * ROWS * product.columns // (layout.n * COLUMNS) * 32 / IMAGES)
    return clocks


def _activation_clocks(layout: WarpLayout, steps: int, itemsize: int) -> float:
    """Clocks in which warps activate what they read; those that share rows do it each for itself."""
    words = steps / layout.depth * 8 * layout.m
    return WARPS / 4 * words * _ACTIVATION[itemsize]


def _tile_clocks(tile: Pair, layouts: Layouts, near: int, problem: BottleneckProblem) -> Clocks:
    """What a tile takes that has a multiprocessor for itself."""
    rows = rows_of(tile, problem.ksize)
    clocks = Clocks(WAITS + 2 * BETWEEN, (rows[0] + 2 * rows[1]) * problem.channels * problem.itemsize / IMAGES)
    for product, layout, count in zip(problem.products, layouts, rows):
        clocks += _product_clocks(product, layout, math.ceil(count / ROWS), bool(near >> product.number & 1))
    return clocks
