"""A model of the time of the fused kernels: what a tile takes on a multiprocessor of an H200, in clocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ._packing import PIECE_BYTES, STEP_PIECES
from ._warps import WARPS, WarpLayout


class _Rates(NamedTuple):
    """What the products of an arithmetic take on a multiprocessor."""

    #: Products of 4-byte numbers in a clock. Twice as many of halves on tensor cores.
    products: float
    #: Clocks of a step of a warp, whatever it holds: what is loaded is only then multiplied.
    step: int
    #: Clocks in which a warp reads 16 rows, and the weights of 8 columns, of a step.
    rows: float
    weights: float


# The model was fitted to 2299 plans of 474 convolutions and 3017 of 435 bottlenecks on an H200: stages of ResNets in
# three arithmetics, with all block sizes, masks and sparsities of the benchmark. Its root mean square error is 8 %. Of
# the plans that were measured for a problem, the one it picks takes 1.02 (convolutions) and 1.01 (bottlenecks) of the
# best one's time on average, and 1.06 and 1.03 at the 90th percentile.

_TENSOR = _Rates(465, 130, 1.6, 0)
_PLAIN = _Rates(77, 1200, 0, 50)

#: Clocks that a tile waits: for its place, for its window, at barriers; for each further chunk of its channels; between
#: two products of a bottleneck; and for an exchange of sums, besides its traffic.
WAITS, CHUNK, BETWEEN, _EXCHANGE = 2950, 1600, 800, 500

#: Groups of 8 columns beyond which a warp has registers for the weights of the next step only (DistantWeights of
#: kernels/products.cuh), and clocks of a step by which they are late.
_NEXT_STEP_ONLY, _LATE = 6, 150

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


def product_clocks(layout: WarpLayout, steps: int, itemsize: int, tensor: bool, is_near: bool = False) -> Clocks:
    """Of a product of a CTA, whose weights may be in shared memory."""
    rates = _TENSOR if tensor else _PLAIN
    own = steps / layout.depth
    products = layout.rows * layout.columns * steps * STEP_PIECES * PIECE_BYTES // itemsize
    works = products / (rates.products * (4 // itemsize if tensor else 1))
    works += WARPS * own * (layout.m * rates.rows + layout.n * rates.weights)
    is_late = tensor and not is_near and layout.n > _NEXT_STEP_ONLY
    waits = own * (rates.step + (_LATE if is_late else 0)) + (_EXCHANGE if layout.depth > 1 else 0)
    return Clocks(waits, works + layout.exchanged_bytes / _EXCHANGED)
