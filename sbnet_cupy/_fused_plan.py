"""How a fused kernel cuts its work: pure functions of the problem and of the device."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ._fused_clocks import BETWEEN, CHUNK, IMAGES, WAITS, Clocks, product_clocks
from ._packing import COLUMNS, PIECE_BYTES, STEP_PIECES, Packing, packing_of
from ._warps import ROWS, WARPS, WarpLayout, warp_layouts

Pair = tuple[int, int]

#: Sums of 16 x 8 numbers that a warp keeps, at most: 4 registers each. Fewer where windows come in chunks, and next to
#: another CTA, which has half of the registers: more would spill, or spill more than was measured to be worth it.
MOST_SUMS, _CHUNK_SUMS, _FEW_SUMS = 16, 12, 9


class DeviceLimits(NamedTuple):
    """What a plan has to know of a device."""

    multiprocessors: int
    #: Shared memory that a CTA may have, and that a multiprocessor has, in bytes.
    cta_shared: int
    multiprocessor_shared: int
    #: Compute capability, as 90 for 9.0.
    capability: int

    @property
    def has_tensor_cores(self) -> bool:
        """Whether they take all of the types that the kernels give them."""
        return self.capability >= 80


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
    #: Whether an element-wise step comes before.
    activates: bool = False


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


def row_pieces(pitch: int, width: int, tile_width: int, strides: Pair) -> int:
    """Pieces from a row of a window to the next. Mirrored by row_pieces of kernels/window.cuh, which says why."""
    least = width * pitch
    if tile_width % 8 == 0:
        return least
    padded = range(least, least + 8)
    return next((n for n in padded if (strides[0] * n - tile_width * strides[1] * pitch) % 8 == 0), least)


def window_bytes(pieces: int, window: Pair, tile_width: int, strides: Pair = (1, 1)) -> int:
    """Shared memory of a window of pixels of so many pieces, which are read by tiles. See PixelRows there."""
    return window[0] * row_pieces(pieces | 1, window[1], tile_width, strides) * PIECE_BYTES


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


#: Bytes of shared memory of each CTA that are not its own.
_RESERVED = 1024


#: The compute capability for which two CTAs on a multiprocessor were measured. For others, some of these kernels spill.
_SHARING = 90


def may_share(ctas: int, limits: DeviceLimits) -> bool:
    """Whether two of so many CTAs may be on a multiprocessor at a time, if it has room for them."""
    return limits.capability == _SHARING and ctas > limits.multiprocessors


def room_beside(limits: DeviceLimits) -> int:
    """Shared memory that a CTA may have next to another one."""
    return limits.multiprocessor_shared // 2 - _RESERVED


def alone(shared: int, limits: DeviceLimits) -> int:
    """Shared memory for a CTA that is to have a multiprocessor for itself: more than half of it.

    With room for two, CTAs that do not wait for the end of those before them come in pairs while other multiprocessors
    have none: on an H200, 126 CTAs took 5.2 us then, and 4.4 alone.
    """
    return max(shared, min(room_beside(limits) + PIECE_BYTES, limits.cta_shared))


def conv_residents(
    layout: WarpLayout, problem: ConvProblem, shared: int, ctas: int, limits: DeviceLimits
) -> Iterator[tuple[int, int]]:
    """How many CTAs a multiprocessor may hold at a time, and the shared memory that each asks for then."""
    yield 1, alone(shared, limits)
    chunks_and_more = problem.packing.chunks > 1 and (layout.depth > 1 or problem.activates)
    spills = layout.m * layout.n > _FEW_SUMS or (problem.uses_tensor_cores and chunks_and_more)
    if may_share(ctas, limits) and shared <= room_beside(limits) and not spills:
        yield 2, shared


def tiles_of(block: Pair) -> Iterator[Pair]:
    """Sizes of tiles that cut a block into about equal parts of at most 256 pixels."""

    def parts(size: int) -> list[int]:
        return list(dict.fromkeys(math.ceil(size / count) for count in range(1, min(size, 64) + 1)))

    for height, width in itertools.product(parts(block[0]), parts(block[1])):
        if height * width <= 256 and (height * width >= ROWS or (height, width) == block):
            yield height, width


def conv_clocks(plan: ConvPlan, problem: ConvProblem, limits: DeviceLimits) -> float:
    """The model of a convolution."""
    packing, layout = problem.packing, plan.layout
    itemsize = PIECE_BYTES // packing.lanes
    results = plan.tile[0] * plan.tile[1] * layout.columns * itemsize
    images = (packing.chunks * plan.window_bytes + results) / IMAGES
    tile = Clocks(WAITS + (packing.chunks - 1) * CHUNK, images)
    tile += product_clocks(layout, packing.chunks * packing.steps, itemsize, problem.uses_tensor_cores)
    return tile.of(plan.grid[0] * plan.grid[1], plan.resident, limits.multiprocessors)


@dataclass(frozen=True)
class BottleneckProblem:
    """What decides how a bottleneck is cut."""

    channels: int
    inner: int
    itemsize: int
    #: Kernel of the second convolution; the others are 1x1.
    ksize: Pair
    #: Output pixels of a block.
    block: Pair
    rows: int
    uses_tensor_cores: bool
    #: Whether more tiles than run at the same time need a stack, and a scatter.
    in_place: bool = False


@dataclass(frozen=True)
class BottleneckPlan:
    """How a bottleneck is cut."""

    tile: Pair
    tiles: Pair
    layouts: tuple[WarpLayout, WarpLayout, WarpLayout]
    #: Bit k tells that the weights of product k are kept in shared memory.
    near: int
    #: Parts of its channels in which the input is brought.
    parts: int
    shared: int
    ctas: int
    #: CTAs that a multiprocessor holds at a time.
    resident: int


#: Sums of 16 x 8 numbers of a warp in one pass over the channels of the last product. Bottlenecks of 96/24 channels on
#: an H200 took 14.4 us in TF32 with 8, 15.4 with 6 and 15.0 with 12; 9.7 us in float16 with 8, and 10.3 with 12.
_PASS_SUMS = 8

#: Bytes of the weights of a product up to which they are kept in shared memory, where several warps read the same. All
#: of them have to be there before the first step; larger ones are faster read step by step. On an H200, of 18 KiB: 9.7
#: against 10.3 us; of 36 and 32 KiB: 15.3 against 14.2, and 8.4 against 8.1.
_NEAR_BYTES = 25 << 10


@functools.lru_cache(maxsize=1024)
def plan_bottleneck(problem: BottleneckProblem, limits: DeviceLimits) -> BottleneckPlan | None:
    """The plan that the model takes for fastest; None if none fits into the shared memory of a CTA."""
    plans = list(bottleneck_plans(problem, limits))
    return min(plans, key=lambda plan: bottleneck_clocks(plan, problem, limits), default=None)


def bottleneck_plans(problem: BottleneckProblem, limits: DeviceLimits) -> Iterator[BottleneckPlan]:
    """All plans that fit, with the best layouts for each size of tiles."""
    if problem.channels % COLUMNS or problem.inner % COLUMNS:
        return
    for tile, resident in itertools.product(tiles_of(problem.block), (1, 2)):
        for deep in (True, False):
            plan = _bottleneck_plan(tile, resident, deep, problem, limits)
            if plan is not None:
                yield plan


def _bottleneck_plan(
    tile: Pair, resident: int, deep: bool, problem: BottleneckProblem, limits: DeviceLimits
) -> BottleneckPlan | None:
    """The plan with such tiles, of which a multiprocessor holds so many; None if they do not fit.

    `deep`: warps may share the depth of a product, which takes shared memory to exchange their sums.
    """
    halo, pixels = halo_pixels(tile, problem.ksize), tile[0] * tile[1]
    tiles = (math.ceil(problem.block[0] / tile[0]), math.ceil(problem.block[1] / tile[1]))
    ctas = problem.rows * tiles[0] * tiles[1]
    if resident > 1 and not may_share(ctas, limits):
        return None
    layouts = [
        layout
        for number, rows in enumerate((halo, pixels, pixels))
        if (layout := _best_layout(number, math.ceil(rows / ROWS), resident, deep, problem)) is not None
    ]
    if len(layouts) < 3:
        return None
    first, second, third = layouts
    lanes, steps = PIECE_BYTES // problem.itemsize, bottleneck_steps(problem)
    table = PIECE_BYTES * (1 + sum(steps)) + 8 * problem.channels + 16 * problem.inner
    whole = (tile[0] + problem.ksize[0] - 1, tile[1] + problem.ksize[1] - 1)
    middle = window_bytes(problem.inner // lanes, whole, tile[1])
    window = window_bytes(problem.channels // lanes, whole, whole[1])
    shared = table + middle + window + max(first.exchanged_bytes, second.exchanged_bytes, third.result_bytes)
    room = limits.cta_shared if resident == 1 else room_beside(limits)
    near = 0
    for number, layout in enumerate(layouts):
        weights = bottleneck_weight_bytes(number, problem)
        if layout.warps_m > 1 and weights <= _NEAR_BYTES and shared + weights <= room:
            near |= 1 << number
            shared += weights
    if shared > room or (resident > 1 and not _takes_half_the_registers(near, problem)):
        return None
    shared = alone(shared, limits) if resident == 1 else shared
    parts = window_parts(problem, halo) if near & 1 else 1
    return BottleneckPlan(tile, tiles, (first, second, third), near, parts, shared, ctas, resident)


def _takes_half_the_registers(near: int, problem: BottleneckProblem) -> bool:
    """Whether none spill next to another CTA: TF32 takes registers to convert, and weights from far to wait for."""
    return not problem.uses_tensor_cores or (problem.itemsize == 2 and bool(near & 1))


#: Bytes of a window from which it comes in parts, and parts at most.
_PART_BYTES, _MOST_PARTS = 1 << 14, 4


def window_parts(problem: BottleneckProblem, halo: int) -> int:
    """In how many parts of whole steps the channels of a window come."""
    pieces = problem.channels * problem.itemsize // PIECE_BYTES
    steps = bottleneck_steps(problem)[0]
    if steps * STEP_PIECES != pieces:  # packed with more than the pixels have
        return 1
    for parts in range(_MOST_PARTS, 1, -1):
        if steps % parts == 0 and halo * pieces * PIECE_BYTES >= parts * _PART_BYTES:
            return parts
    return 1


def halo_pixels(tile: Pair, ksize: Pair) -> int:
    """Pixels of a tile and its halo."""
    return (tile[0] + ksize[0] - 1) * (tile[1] + ksize[1] - 1)


@functools.lru_cache(maxsize=1024)
def bottleneck_packings(problem: BottleneckProblem) -> tuple[Packing, Packing, Packing]:
    """How the weights of the three products are packed."""
    outer, inner, itemsize = problem.channels, problem.inner, problem.itemsize
    return (
        packing_of((1, 1, outer, inner), itemsize),
        packing_of((*problem.ksize, inner, inner), itemsize),
        packing_of((1, 1, inner, outer), itemsize),
    )


def bottleneck_steps(problem: BottleneckProblem) -> tuple[int, int, int]:
    """Steps of the three products."""
    first, second, third = (packing.chunks * packing.steps for packing in bottleneck_packings(problem))
    return first, second, third


def bottleneck_weight_bytes(number: int, problem: BottleneckProblem) -> int:
    """Packed weights of product `number`."""
    columns = (problem.inner, problem.inner, problem.channels)[number] // COLUMNS
    return columns * bottleneck_steps(problem)[number] * STEP_PIECES * PIECE_BYTES * COLUMNS


def _best_layout(
    number: int, row_tiles: int, resident: int, deep: bool, problem: BottleneckProblem
) -> WarpLayout | None:
    """The layout of product `number` with the fewest clocks for all columns: at once, or for the last one in passes."""
    column_tiles = (problem.inner, problem.inner, problem.channels)[number] // COLUMNS
    is_near = bottleneck_weight_bytes(number, problem) <= _NEAR_BYTES
    most = _FEW_SUMS if resident > 1 else MOST_SUMS
    # The last product has no depth to share. Next to another CTA, weights from far take too many registers in a share.
    deep = deep and number < 2 and (resident == 1 or is_near or not problem.uses_tensor_cores)

    def clocks(layout: WarpLayout) -> float:
        return bottleneck_product_clocks(number, layout, row_tiles, is_near, problem).alone

    fitting = (
        layout
        for layout in warp_layouts(
            row_tiles, column_tiles, problem.uses_tensor_cores, min(most, _PASS_SUMS) if number == 2 else most
        )
        if (number == 2 or layout.n * layout.warps_n == column_tiles) and (deep or layout.depth == 1)
    )
    return min(fitting, key=clocks, default=None)


#: Instructions that activate a word of a matrix on its way into a product, by the size of a number.
_ACTIVATION = {2: 8, 4: 4}


def activation_clocks(layout: WarpLayout, steps: int, itemsize: int) -> float:
    """Clocks in which warps activate what they read; those that share rows do it each for itself."""
    words = steps / layout.depth * 8 * layout.m
    return WARPS / 4 * words * _ACTIVATION[itemsize]


def bottleneck_product_clocks(
    number: int, layout: WarpLayout, row_tiles: int, is_near: bool, problem: BottleneckProblem
) -> Clocks:
    """Of product `number`: all of its passes, and what comes with it."""
    tensor, itemsize, steps = problem.uses_tensor_cores, problem.itemsize, bottleneck_steps(problem)[number]
    columns = (problem.inner, problem.inner, problem.channels)[number]
    clocks = product_clocks(layout, steps, itemsize, tensor, is_near) * (columns // layout.columns)
    if number == 0:
        clocks += Clocks(0, activation_clocks(layout, steps, itemsize))
    if number == 1 and tensor and not is_near:
        clocks += Clocks(0, bottleneck_weight_bytes(number, problem) * (layout.warps_m - 1) / _COPIES)
    if number == 2:  # rows of results are written in parts of a warp's columns: about a sector more for each
        clocks += Clocks(0, row_tiles * ROWS * columns // (layout.n * COLUMNS) * 32 / IMAGES)
    return clocks


#: Bytes in a clock of the second product's weights, for each further warp that reads the same from far, all at once.
_COPIES = 120

#: Clocks of a scatter, besides its traffic.
_SCATTER = 4800


def bottleneck_clocks(plan: BottleneckPlan, problem: BottleneckProblem, limits: DeviceLimits) -> float:
    """The model of a bottleneck."""
    halo, pixels = halo_pixels(plan.tile, problem.ksize), plan.tile[0] * plan.tile[1]
    tile = Clocks(WAITS + 2 * BETWEEN, (halo + 2 * pixels) * problem.channels * problem.itemsize / IMAGES)
    for number, (layout, rows) in enumerate(zip(plan.layouts, (halo, pixels, pixels))):
        is_near = bool(plan.near >> number & 1)
        tile += bottleneck_product_clocks(number, layout, math.ceil(rows / ROWS), is_near, problem)
    clocks = tile.of(plan.ctas, plan.resident, limits.multiprocessors)
    scatters = problem.in_place and plan.ctas > plan.resident * limits.multiprocessors
    return clocks + (_SCATTER if scatters else 0)
