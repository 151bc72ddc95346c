"""A model of the time of the fused kernels: what a tile takes on a multiprocessor of an H200, in clocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ._packing import COLUMNS, PIECE_BYTES, STEP_PIECES
from ._warps import WARPS, WarpLayout


class _Rates(NamedTuple):
    """What the products of an arithmetic take on a multiprocessor."""

    #: Products of 4-byte numbers in a clock. Twice as many of halves on tensor cores.
    products: float
    #: Clocks of a step of a warp, whatever it holds: what is loaded is only then multiplied.
    step: int
    #: More of them where registers hold the weights of one step ahead only.
    wide_step: int
    #: Clocks in which a warp reads 16 rows, and the weights of 8 columns, of a step.
    rows: float
    weights: float


# The model was fitted to 2299 plans of 474 convolutions and 3017 of 435 bottlenecks on an H200: stages of ResNets in
# three arithmetics, with all block sizes, masks and sparsities of the benchmark. Its root mean square error is 8 %. Of
# the plans that were measured for a problem, the one it picks takes 1.02 of the best one's time on average, and at the
# 90th percentile 1.07 (convolutions) and 1.05 (bottlenecks).

_TENSOR = _Rates(445, 120, 200, 2.4, 0)
_PLAIN = _Rates(77, 1200, 0, 0, 50)

#: Columns of a warp from which on its weights are one step ahead only: DistantWeights of kernels/products.cuh.
_WIDE = 7 * COLUMNS

#: Clocks that a tile waits, for its place, for its window, at barriers; for each further chunk of its channels; for an
#: exchange of sums, besides its traffic; and between two products of a bottleneck.
WAITS, CHUNK, EXCHANGE, BETWEEN = 2950, 1600, 900, 1000

#: Bytes in a clock: of images that a multiprocessor brings or writes, and of sums that its warps exchange.
IMAGES, _EXCHANGED = 25, 64


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

    def of(self, ctas: int, resident: int, multiprocessors: int) -> float:
        """Clocks of so many tiles, each a CTA, of which each multiprocessor holds some at a time."""
        rounds, rest = divmod(math.ceil(ctas / multiprocessors), resident)
        last = self.waits + rest * self.works if rest else 0.0
        return rounds * (self.waits + resident * self.works) + last


def product_clocks(layout: WarpLayout, steps: int, itemsize: int, tensor: bool) -> Clocks:
    """Of a product of a CTA."""
    rates = _TENSOR if tensor else _PLAIN
    own = steps / layout.depth
    waits = own * (rates.step + (rates.wide_step if layout.n * COLUMNS >= _WIDE else 0))
    products = layout.rows * layout.columns * steps * STEP_PIECES * PIECE_BYTES // itemsize
    works = products / (rates.products * (4 // itemsize if tensor else 1))
    works += WARPS * own * (layout.m * rates.rows + layout.n * rates.weights)
    return Clocks(waits, works + layout.exchanged_bytes / _EXCHANGED)
