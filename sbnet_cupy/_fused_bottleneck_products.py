"""The three products of the fused bottleneck: how the warps of a CTA may share each, and what it takes then."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from ._fused_clocks import BOTTLENECK_PLAIN, BOTTLENECK_TENSOR, Clocks, plain_rates, product_clocks
from ._fused_plan import MOST_SUMS, Pair
from ._packing import COLUMNS, PIECE_BYTES, STEP_PIECES, Packing, packing_of
from ._warps import ROWS, WARPS, WarpLayout, warp_layouts

#: Sums of 16 x 8 numbers of a warp next to another CTA, which has half of the registers, at most: more would spill.
_FEW_SUMS = 9

#: Sums of 16 x 8 numbers of a warp in one pass over the channels of the last product. Bottlenecks of 96/24 channels on
#: an H200 took 14.4 us in TF32 with 8, 15.4 with 6 and 15.0 with 12; 9.7 us in float16 with 8, and 10.3 with 12.
_PASS_SUMS = 8

#: Bytes of the weights of a product up to which they are kept in shared memory, where several warps read the same. All
#: of them have to be there before the first step, and all CTAs ask for them at once; larger ones are faster read step
#: by step. On an H100, of 18 KiB: 9.4 against 8.5 us; of 20 KiB: 14.5 against 14.2; of 9 KiB, of two products: 14.6
#: against 15.3; of 10 KiB: the same. Next to another CTA, which works meanwhile, far ones take too many registers.
_NEAR_BYTES = {1: 12 << 10, 2: 25 << 10}

#: Bytes of images in a clock that a multiprocessor brings or writes.
IMAGES = 32.1

#: Instructions that activate a word of a matrix on its way into a product.
_ACTIVATION = 7

#: Bytes in a clock of a product's weights, for each further warp that reads the same from far, all at once: of the
#: second, and of the third in TF32, whose lanes take columns in another order.
_COPIES = 79

#: Clocks of an exchange of sums of the second product, besides those of any. Fitted: why it takes longer is not known.
_SECOND_EXCHANGE = 565


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

    def may_be_near(self, resident: int) -> bool:
        """Whether its weights may be kept in shared memory, by the CTAs that a multiprocessor holds."""
        return self.weight_bytes <= _NEAR_BYTES[resident]

    @property
    def is_last(self) -> bool:
        """Whether it is the one that goes over its columns in passes, and shares no depth."""
        return self.number == 2

    def clocks(self, layout: WarpLayout, row_tiles: int, is_near: bool, resident: int) -> Clocks:
        """All passes, and what comes with them."""
        rates = BOTTLENECK_TENSOR if self.uses_tensor_cores else plain_rates(BOTTLENECK_PLAIN, layout, resident)
        passes = self.columns // layout.columns
        clocks = product_clocks(layout, self.steps, self.itemsize, rates, is_near=is_near) * passes
        if self.number == 0:
            clocks += Clocks(0, _activation_clocks(layout, self.steps))
        if self.uses_tensor_cores and not is_near and (self.number == 1 or (self.is_last and self.itemsize == 4)):
            clocks += Clocks(0, self.weight_bytes * (layout.warps_m - 1) / _COPIES)
        if self.number == 1 and self.uses_tensor_cores and layout.depth > 1:
            clocks += Clocks(_SECOND_EXCHANGE, 0)
        if self.is_last:  # rows of results are written in parts of a warp's columns: about a sector more for each
            clocks += Clocks(0, row_tiles * ROWS * self.columns // (layout.n * COLUMNS) * 32 / IMAGES)
        return clocks


@functools.lru_cache(maxsize=64)
def products_of(
    channels: int, inner: int, itemsize: int, ksize: Pair, uses_tensor_cores: bool
) -> tuple[Product, Product, Product]:
    """The products of a bottleneck."""
    shapes = ((1, 1, channels, inner), (*ksize, inner, inner), (1, 1, inner, channels))
    first, second, third = (
        Product(number, packing_of(shape, itemsize), shape[3], itemsize, uses_tensor_cores)
        for number, shape in enumerate(shapes)
    )
    return first, second, third


@functools.lru_cache(maxsize=4096)
def ranked_layouts(product: Product, row_tiles: int, resident: int) -> tuple[WarpLayout, ...]:
    """Layouts by the clocks for all columns: at once, or for the last product in passes."""
    column_tiles, tensor = product.columns // COLUMNS, product.uses_tensor_cores
    most = MOST_SUMS if resident == 1 else _FEW_SUMS
    # Next to another CTA, weights from far take too many registers in a share of the depth.
    may_be_deep = not product.is_last and (resident == 1 or product.may_be_near(resident) or not tensor)
    fitting = [
        layout
        for layout in warp_layouts(row_tiles, column_tiles, tensor, min(most, _PASS_SUMS) if product.is_last else most)
        if (product.is_last or layout.n * layout.warps_n == column_tiles) and (may_be_deep or layout.depth == 1)
    ]
    fitting.sort(key=lambda layout: product.clocks(layout, row_tiles, product.may_be_near(resident), resident).alone)
    return tuple(fitting)


def _activation_clocks(layout: WarpLayout, steps: int) -> float:
    """Clocks in which warps activate what they read; those that share rows do it each for itself."""
    words = math.ceil(steps / layout.depth) * 8 * layout.m
    return WARPS / 4 * words * _ACTIVATION
