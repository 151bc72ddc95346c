"""How the warps of a CTA of the fused kernels share a product. Mirrored by kernels/window.cuh."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from ._packing import COLUMNS

#: Threads of a CTA, warps, and rows of a product of a warp, as in kernels/window.cuh and kernels/products.cuh.
THREADS, WARPS, ROWS = 256, 8, 16


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
    def expression(self) -> str:
        """Its C++ type."""
        return f"sbnet::Warps<{self.m}, {self.n}, {self.warps_m}, {self.warps_n}>"


def warp_layouts(row_tiles: int, column_tiles: int, tensor: bool, most: int) -> Iterator[WarpLayout]:
    """Layouts that hold so many tiles of rows, and a divisor of the tiles of columns, with up to `most` sums a warp."""
    powers = [1 << k for k in range(WARPS.bit_length())]
    for warps_m, warps_n in itertools.product(powers, powers):
        if warps_m * warps_n > WARPS:
            continue
        m = math.ceil(row_tiles / warps_m)
        for n in (1, 2, 3, 4, 6, 8, 12) if tensor else (1, 2, 3, 4):  # plain arithmetic holds more of the weights
            if m <= 6 and m * n <= most and column_tiles % (n * warps_n) == 0:
                yield WarpLayout(m, n, warps_m, warps_n)
