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
    halves: float
    #: Clocks of a step of a warp, whatever it holds: what is loaded is only then multiplied.
    step: float
    #: Clocks until weights from far are there, which the steps for which a warp asks ahead have in common.
    late: float
    #: Clocks in which a warp reads 16 rows, and the weights of 8 columns, of a step.
    rows: float
    weights: float
    #: Clocks of an exchange of sums, of each turn of the warps in it, and bytes that it moves in a clock.
    exchange: float
    turn: float
    exchanged: float


# `python -m bench.fit` fits the model to what `python -m bench.plans` has measured on H200s: stages of ResNets in three
# arithmetics. docs/performance.md says how near it is, and how good the plans are that it picks.

#: Of convolutions and of bottlenecks, on tensor cores and without them.
CONV_TENSOR = Rates(760, 2.75, 0, 495, 6.5, 0, 0, 214, 100)
CONV_PLAIN = Rates(59.8, 1, 700, 0, 0, 53.8, 1110, 0, 135)
BOTTLENECK_TENSOR = Rates(474, 2, 84, 17, 0, 0, 440, 0, 112)
BOTTLENECK_PLAIN = Rates(81, 1, 800, 0, 0, 54, 0, 0, 70)


@dataclass(frozen=True)
class Clocks:
    """What a tile takes: clocks in which other tiles of the multiprocessor can work, and those in which none can."""

    waits: float
    works: float

    def __add__(self, other: Clocks) -> Clocks:
        return Clocks(self.waits + other.waits, self.works + other.works)

    def __mul__(self, count: float) -> Clocks:
        return Clocks(self.waits * count, self.works * count)

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
        return rounds * self.together(resident) + (self.together(rest) if rest else 0.0)


def product_clocks(
    layout: WarpLayout, steps: int, itemsize: int, rates: Rates, *, chunks: int = 1, is_near: bool = False
) -> Clocks:
    """Of a product of a CTA over chunks of so many steps, whose weights may be in shared memory."""
    own = chunks * math.ceil(steps / layout.depth)  # of the warp that has most: in short chunks, others have none
    products = layout.rows * layout.columns * chunks * steps * STEP_PIECES * PIECE_BYTES // itemsize
    works = products / (rates.products * (rates.halves if itemsize == 2 else 1))
    works += WARPS * own * (layout.m * rates.rows + layout.n * rates.weights)
    waits = own * (rates.step + (0 if is_near else rates.late / steps_ahead(layout.n)))
    if layout.depth > 1:
        waits += rates.exchange + rates.turn * math.ceil(layout.m * layout.n / layout.depth)
    return Clocks(waits, works + layout.exchanged_bytes / rates.exchanged)


def steps_ahead(columns: int) -> int:
    """Steps for whose weights a warp asks ahead. Mirrored by DistantWeights of kernels/products.cuh."""
    if columns > 4:
        return 1 if columns > 6 else 2
    return {1: 8, 2: 6}.get(columns, 3)
