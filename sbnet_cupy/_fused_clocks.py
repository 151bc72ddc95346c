"""A model of the time of the fused kernels: what a tile takes on a multiprocessor of an H200, in clocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ._packing import PIECE_BYTES, STEP_PIECES
from ._warps import WARPS, WarpLayout


class Rates(NamedTuple):
    """What the products of an arithmetic take on a multiprocessor."""

    #: Products of 4-byte numbers in a clock, and by how much there are more of halves.
    products: float
    halves: float = 1
    #: Clocks of a step of a warp, whatever it holds: what is loaded is only then multiplied.
    step: float = 0
    #: Clocks until weights from far are there, which the steps for which a warp asks ahead have in common.
    late: float = 0
    #: Clocks in which a warp reads 16 rows of a step; and the weights of 8 columns, from far and from shared memory.
    rows: float = 0
    weights: float = 0
    near: float = 0
    #: Clocks of an exchange of sums, of each turn of the warps in it, and bytes that it moves in a clock.
    exchange: float = 0
    turn: float = 0
    exchanged: float = math.inf


# `python -m bench.fit` fits the model to what `python -m bench.plans` has measured on H200s: stages of ResNets in three
# arithmetics. docs/performance.md says how near it is, and how good the plans are that it picks.

#: Of convolutions and of bottlenecks, on tensor cores and without them.
CONV_TENSOR = Rates(products=790, halves=2.75, late=476, rows=6.25, turn=206, exchanged=104)
CONV_PLAIN = Rates(products=178, step=179, rows=7.3, weights=100, exchange=199, exchanged=27)
BOTTLENECK_TENSOR = Rates(
    products=770, halves=2, step=125, rows=2.5, weights=1.36, near=3.7, exchange=200, exchanged=48
)
BOTTLENECK_PLAIN = Rates(products=178, step=275, rows=7.3, weights=82, near=82, exchange=2320)


@dataclass(frozen=True)
class Clocks:
    """What a tile takes: clocks in which other tiles of the multiprocessor can work, and those in which none can."""

    waits: float
    works: float
    #: Clocks of what all multiprocessors share, the L2 cache, if each has such a tile: of fewer tiles, it takes less.
    shares: float = 0

    def __add__(self, other: Clocks) -> Clocks:
        return Clocks(self.waits + other.waits, self.works + other.works, self.shares + other.shares)

    def __mul__(self, count: float) -> Clocks:
        return Clocks(self.waits * count, self.works * count, self.shares * count)

    @property
    def alone(self) -> float:
        """Clocks of a tile that has a multiprocessor for itself."""
        return self.waits + self.works

    def together(self, count: int) -> float:
        """Clocks of so many tiles that are on a multiprocessor at a time."""
        return self.waits + count * self.works

    def of(self, ctas: int, resident: int, multiprocessors: int) -> float:
        """Clocks of so many tiles, each a CTA, of which each multiprocessor holds some at a time."""
        rounds, rest = divmod(math.ceil(ctas / multiprocessors), resident)
        own = rounds * self.together(resident) + (self.together(rest) if rest else 0.0)
        return own + self.shares * ctas / multiprocessors


class LaunchClocks(NamedTuple):
    """What a launch takes besides its tiles."""

    takes: float
    #: Clocks of its first tiles that pass while the launch before ends, where that leaves every multiprocessor idle.
    hidden: float = 0


def product_clocks(
    layout: WarpLayout, steps: int, itemsize: int, rates: Rates, *, chunks: int = 1, is_near: bool = False
) -> Clocks:
    """Of a product of a CTA over chunks of so many steps, whose weights may be in shared memory."""
    own = chunks * math.ceil(steps / layout.depth)  # of the warp that has most: in short chunks, others have none
    products = layout.rows * layout.columns * chunks * steps * STEP_PIECES * PIECE_BYTES // itemsize
    works = products / (rates.products * (rates.halves if itemsize == 2 else 1))
    works += WARPS * own * (layout.m * rates.rows + layout.n * (rates.near if is_near else rates.weights))
    waits = own * (rates.step + (0 if is_near else rates.late / steps_ahead(layout.n)))
    if layout.depth > 1:
        waits += rates.exchange + rates.turn * math.ceil(layout.m * layout.n / layout.depth)
    return Clocks(waits, works + layout.exchanged_bytes / rates.exchanged)


def plain_rates(rates: Rates, layout: WarpLayout, resident: int) -> Rates:
    """Those of plain arithmetic in a layout, by so many CTAs on a multiprocessor. Mirrored by kWords of products.cuh.

    It reads a piece of a row in one go or several. Two CTAs do not wait at each step: the other one works.
    """
    if resident == 1:
        return rates._replace(rows=rates.rows * (2 if layout.n > 3 else 1))
    return rates._replace(rows=rates.rows * (4 if layout.m * layout.n > 5 else 2), step=0)


def steps_ahead(columns: int) -> int:
    """Steps for whose weights a warp asks ahead. Mirrored by DistantWeights of kernels/products.cuh."""
    if columns > 4:
        return 1 if columns > 6 else 2
    return {1: 8, 2: 6}.get(columns, 3)
