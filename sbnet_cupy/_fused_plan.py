"""How a fused kernel cuts its work: pure functions of the problem and of the device."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ._packing import COLUMNS, PIECE_BYTES, STEP_PIECES, Packing

Pair = tuple[int, int]

#: Threads of a CTA, warps, and rows of a product of a warp, as in kernels/window.cuh and kernels/products.cuh.
THREADS, WARPS, ROWS = 256, 8, 16

#: Sums of 16 x 8 numbers that a warp keeps, at most: 4 registers each.
MOST_SUMS = 16


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


class WarpLayout(NamedTuple):
    """How the warps of a CTA share the sums of a product. Mirrored by Warps of kernels/window.cuh."""

    #: 16 x 8 sums of a warp.
    m: int
    n: int
    #: Warps along rows and columns; those that are left share the depth.
    warps_m: int
    warps_n: int

    @property
    def depth(self) -> int:
        """Warps that share the same sums."""
        return WARPS // (self.warps_m * self.warps_n)

    @property
    def rows(self) -> int:
        """Rows of all warps."""
        return self.m * self.warps_m * ROWS

    @property
    def columns(self) -> int:
        """Columns of all warps."""
        return self.n * self.warps_n * COLUMNS

    @property
    def exchanged_bytes(self) -> int:
        """Shared memory for the parts of sums that warps exchange."""
        return WARPS * self.m * self.n * 512 if self.depth > 1 else 0

    @property
    def result_bytes(self) -> int:
        """Shared memory in which each warp lays 16 rows of its sums out."""
        pitch = self.n * COLUMNS + (COLUMNS if self.n % 2 == 0 else 0)
        return WARPS * ROWS * pitch * 4

    @property
    def expression(self) -> str:
        """Its C++ type."""
        return f"sbnet::Warps<{self.m}, {self.n}, {self.warps_m}, {self.warps_n}>"


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
    #: Bytes of a staged pixel, of a staged window, and of shared memory in all.
    pitch: int
    window_bytes: int
    shared: int
    grid: tuple[int, int, int]


def pitch_of(pieces: int) -> int:
    """Bytes from a staged pixel to the next: an odd number of pieces, so that eight pixels meet different banks."""
    return (pieces | 1) * PIECE_BYTES


@functools.lru_cache(maxsize=1024)
def plan_conv(problem: ConvProblem, limits: DeviceLimits) -> ConvPlan | None:
    """The plan that the model takes for fastest; None if none fits."""
    plans = list(conv_plans(problem, limits))
    return min(plans, key=lambda plan: conv_clocks(plan, problem, limits), default=None)


def conv_plans(problem: ConvProblem, limits: DeviceLimits) -> Iterator[ConvPlan]:
    """All plans that fit."""
    packing = problem.packing
    table = PIECE_BYTES + packing.steps * STEP_PIECES * 4
    pitch = pitch_of(packing.chunk)
    for tile in tiles_of(problem.block):
        tiles = (math.ceil(problem.block[0] / tile[0]), math.ceil(problem.block[1] / tile[1]))
        window = tuple((t - 1) * s + k for t, s, k in zip(tile, problem.strides, problem.ksize))
        window_bytes = window[0] * window[1] * pitch
        for layout in warp_layouts(math.ceil(tile[0] * tile[1] / ROWS), packing.columns, problem.uses_tensor_cores):
            channels = 8 * layout.columns
            if problem.activates:
                channels += 8 * packing.chunk * packing.chunks * packing.lanes
            shared = table + channels + max(window_bytes * min(2, packing.chunks), layout.exchanged_bytes)
            if shared > limits.cta_shared:
                continue
            ctas = problem.rows * tiles[0] * tiles[1]
            grid = (max(1, min(ctas, 2**31 - 1)), packing.columns * COLUMNS // layout.columns, 1)
            yield ConvPlan(tile, tiles, layout, (window[0], window[1]), pitch, window_bytes, shared, grid)


def tiles_of(block: Pair) -> Iterator[Pair]:
    """Sizes of tiles that cut a block into about equal parts of at most 256 pixels."""

    def parts(size: int) -> list[int]:
        return list(dict.fromkeys(math.ceil(size / count) for count in range(1, min(size, 64) + 1)))

    for height, width in itertools.product(parts(block[0]), parts(block[1])):
        if height * width <= 256 and (height * width >= ROWS or (height, width) == block):
            yield height, width


def warp_layouts(row_tiles: int, column_tiles: int, tensor: bool, most: int = MOST_SUMS) -> Iterator[WarpLayout]:
    """Layouts that hold so many tiles of rows, and a divisor of the tiles of columns, with up to `most` sums a warp."""
    powers = [1 << k for k in range(WARPS.bit_length())]
    for warps_m, warps_n in itertools.product(powers, powers):
        if warps_m * warps_n > WARPS:
            continue
        m = math.ceil(row_tiles / warps_m)
        for n in (1, 2, 3, 4, 6, 8, 12) if tensor else (1, 2, 3, 4):  # plain arithmetic holds more of the weights
            if m <= 6 and m * n <= most and column_tiles % (n * warps_n) == 0:
                yield WarpLayout(m, n, warps_m, warps_n)


#: The model's rates, for each multiprocessor and clock of an H200: products of tensor cores of 16-bit numbers (half as
#: many of TF32) and of plain arithmetic; bytes of shared memory or the L1 cache, of the L2 cache, and of global memory
#: if all multiprocessors ask at once.
_TENSOR, _PLAIN, _SHARED, _L2, _GLOBAL = 1024, 128, 128, 48, 20

#: Clocks that a tile waits: for its place, for its window, at barriers.
_WAITS = 2500

#: Clocks of an exchange of sums, besides its traffic, and of a pass over the channels of a result.
_EXCHANGE, _PASS = 500, 600

#: Clocks of a step, whatever it moves: what a warp loads is only then multiplied.
_STEP = 80


def exchange_clocks(layout: WarpLayout) -> float:
    """Clocks in which warps add up their parts."""
    return _EXCHANGE + 2 * layout.exchanged_bytes / _SHARED if layout.depth > 1 else 0


def product_clocks(layout: WarpLayout, steps: int, itemsize: int, tensor: bool, copies: float = 1) -> float:
    """Clocks of a product of a CTA by what bounds it: arithmetic, shared memory, or the way of `copies` of weights."""
    depth = steps * STEP_PIECES * PIECE_BYTES // itemsize
    rate = (_TENSOR * 2 // itemsize) if tensor else _PLAIN
    arithmetic = layout.rows * layout.columns * depth / rate
    per_step = layout.m * 1024 + layout.n * 512
    traffic = WARPS / layout.depth * steps * per_step / _SHARED
    weights = copies * layout.columns * depth * itemsize / _L2
    return max(arithmetic, traffic, weights) + 0.25 * (arithmetic + traffic) + _STEP * steps / layout.depth


#: Instructions that activate a word of a matrix on its way into a product, by the size of a number.
_ACTIVATION = {2: 8, 4: 4}


def activation_clocks(layout: WarpLayout, steps: int, itemsize: int) -> float:
    """Clocks in which warps activate what they read; those that share rows do it each for itself."""
    words = steps / layout.depth * 8 * layout.m
    return WARPS / 4 * words * _ACTIVATION[itemsize]


def conv_clocks(plan: ConvPlan, problem: ConvProblem, limits: DeviceLimits) -> float:
    """The model: clocks of all tiles, as far as they run one after another."""
    packing = problem.packing
    itemsize = PIECE_BYTES // packing.lanes
    resident = min(4, max(1, limits.multiprocessor_shared // (plan.shared + 1024)))
    ctas = plan.grid[0] * plan.grid[1]
    waves = math.ceil(ctas / (limits.multiprocessors * resident))
    together = min(resident, math.ceil(ctas / limits.multiprocessors))
    product = packing.chunks * product_clocks(plan.layout, packing.steps, itemsize, problem.uses_tensor_cores)
    load = packing.chunks * plan.window_bytes / min(_L2, _GLOBAL * max(1.0, limits.multiprocessors / ctas))
    out = exchange_clocks(plan.layout)
    out += plan.tile[0] * plan.tile[1] * plan.layout.columns * itemsize / _GLOBAL
    return waves * (_WAITS + together * (product + load + out))


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
    for tile in tiles_of(problem.block):
        halo, pixels = halo_pixels(tile, problem.ksize), tile[0] * tile[1]
        layouts = tuple(
            _best_layout(math.ceil(rows / ROWS), features // COLUMNS, steps, bound, activates, problem)
            for (rows, features, steps, bound, activates) in zip(
                (halo, pixels, pixels),
                (problem.inner, problem.inner, problem.channels),
                bottleneck_steps(problem),
                (None, None, _PASS_SUMS),
                (True, False, False),
            )
        )
        if None in layouts:
            continue
        lanes = PIECE_BYTES // problem.itemsize
        table = PIECE_BYTES * (1 + sum(bottleneck_steps(problem))) + 8 * problem.channels + 16 * problem.inner
        middle = halo * pitch_of(problem.inner // lanes)
        window = halo * pitch_of(problem.channels // lanes)
        first, second, third = layouts
        exchanged = max(first.exchanged_bytes, second.exchanged_bytes, third.result_bytes)  # type: ignore[union-attr]
        shared = table + middle + window + exchanged
        near = 0
        features = (problem.inner, problem.inner, problem.channels)
        for number, (count, steps) in enumerate(zip(features, bottleneck_steps(problem))):
            weights = weight_bytes(count // COLUMNS, steps)
            shares = layouts[number].warps_m > 1  # type: ignore[union-attr]
            if shares and weights <= _NEAR_BYTES and shared + weights <= limits.cta_shared:
                near |= 1 << number
                shared += weights
        if shared <= limits.cta_shared:
            tiles = (math.ceil(problem.block[0] / tile[0]), math.ceil(problem.block[1] / tile[1]))
            ctas = problem.rows * tiles[0] * tiles[1]
            parts = window_parts(problem, halo) if near & 1 else 1
            yield BottleneckPlan(tile, tiles, layouts, near, parts, shared, ctas)  # type: ignore[arg-type]


#: Bytes of a window from which it comes in parts, and parts at most.
_PART_BYTES, _MOST_PARTS = 1 << 14, 4


def window_parts(problem: BottleneckProblem, halo: int) -> int:
    """In how many parts of whole steps the channels of a window come."""
    pieces = problem.channels * problem.itemsize // PIECE_BYTES
    for parts in range(_MOST_PARTS, 1, -1):
        if pieces % (parts * STEP_PIECES) == 0 and halo * pieces * PIECE_BYTES >= parts * _PART_BYTES:
            return parts
    return 1


def halo_pixels(tile: Pair, ksize: Pair) -> int:
    """Pixels of a tile and its halo."""
    return (tile[0] + ksize[0] - 1) * (tile[1] + ksize[1] - 1)


def bottleneck_steps(problem: BottleneckProblem) -> tuple[int, int, int]:
    """Steps of the three products."""
    lanes = PIECE_BYTES // problem.itemsize
    channels, inner = problem.channels // lanes, problem.inner // lanes
    depths = (channels, inner * problem.ksize[0] * problem.ksize[1], inner)
    first, second, third = (math.ceil(pieces / STEP_PIECES) for pieces in depths)
    return first, second, third


def weight_bytes(columns: int, steps: int) -> int:
    """Packed weights of so many groups of 8 columns."""
    return columns * steps * STEP_PIECES * PIECE_BYTES * COLUMNS


def weight_copies(layout: WarpLayout, columns: int, steps: int) -> float:
    """How often a product's weights come from the L2 cache, in effect: the L1 cache catches some that warps share."""
    return 1 if weight_bytes(columns, steps) <= _NEAR_BYTES else 1 + 0.75 * (layout.warps_m - 1)


def _best_layout(
    row_tiles: int,
    column_tiles: int,
    steps: int,
    most: int | None,
    activates: bool,
    problem: BottleneckProblem,
) -> WarpLayout | None:
    """The layout with the fewest clocks for all columns: all at once, unless `most` bounds the sums of a pass."""

    def clocks(layout: WarpLayout) -> float:
        passes = column_tiles // (layout.n * layout.warps_n)
        copies = weight_copies(layout, column_tiles, steps)
        product = product_clocks(layout, steps, problem.itemsize, problem.uses_tensor_cores, copies)
        product += activation_clocks(layout, steps, problem.itemsize) if activates else 0.0
        # What is read and written in rows of fewer bytes than a few sectors of memory takes longer.
        row = layout.n * COLUMNS * problem.itemsize
        rows = 0.0 if most is None else row_tiles * ROWS * column_tiles * COLUMNS * problem.itemsize / 24 * 32 / row
        return passes * (product + exchange_clocks(layout) + _PASS) + rows

    found = warp_layouts(row_tiles, column_tiles, problem.uses_tensor_cores, most or MOST_SUMS)
    fitting = [
        layout
        for layout in found
        if (most is None and layout.n * layout.warps_n == column_tiles)
        or (most is not None and layout.m * layout.n <= most and layout.depth == 1)
    ]
    return min(fitting, key=clocks, default=None)


def bottleneck_clocks(plan: BottleneckPlan, problem: BottleneckProblem, limits: DeviceLimits) -> float:
    """The model: clocks of all tiles, as far as they run one after another."""
    resident = min(4, max(1, limits.multiprocessor_shared // (plan.shared + 1024)))
    waves = math.ceil(plan.ctas / (limits.multiprocessors * resident))
    together = min(resident, math.ceil(plan.ctas / limits.multiprocessors))
    tensor, itemsize = problem.uses_tensor_cores, problem.itemsize
    clocks = 0.0
    for number, (layout, steps) in enumerate(zip(plan.layouts, bottleneck_steps(problem))):
        passes = problem.channels // layout.columns if number == 2 else 1
        columns = (problem.channels if number == 2 else problem.inner) // COLUMNS
        product = product_clocks(layout, steps, itemsize, tensor, weight_copies(layout, columns, steps))
        clocks += passes * (product + exchange_clocks(layout) + _PASS)
    clocks += activation_clocks(plan.layouts[0], bottleneck_steps(problem)[0], itemsize)
    pixels = halo_pixels(plan.tile, problem.ksize) + 2 * plan.tile[0] * plan.tile[1]
    share = min(_L2, _GLOBAL * max(1.0, limits.multiprocessors / max(1, plan.ctas)))
    clocks += pixels * problem.channels * itemsize / share
    return waves * (_WAITS + together * clocks)
