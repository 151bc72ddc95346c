"""What plans of the fused kernels have in common: tiles, windows, and CTAs that share a multiprocessor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, TypeVar

from ._fused_clocks import Clocks, LaunchClocks
from ._packing import PIECE_BYTES
from ._warps import ROWS

Pair = tuple[int, int]

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

    @property
    def has_warpgroups(self) -> bool:
        """Whether they read matrices from shared memory themselves, by instructions of Hopper."""
        return self.capability == 90


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


def tiles_of(block: Pair) -> Iterator[Pair]:
    """Sizes of tiles that cut a block into about equal parts of at most 256 pixels."""

    def parts(size: int) -> list[int]:
        return list(dict.fromkeys(math.ceil(size / count) for count in range(1, min(size, 64) + 1)))

    for height, width in itertools.product(parts(block[0]), parts(block[1])):
        if height * width <= 256 and (height * width >= ROWS or (height, width) == block):
            yield height, width


#: Bytes of shared memory of each CTA that are not its own.
_RESERVED = 1024


#: The compute capability for which two CTAs on a multiprocessor were measured. For others, some of these kernels spill.
_SHARING = 90


def may_share(limits: DeviceLimits) -> bool:
    """Whether two CTAs may be on a multiprocessor at a time, if it has room for them."""
    return limits.capability == _SHARING


def are_enough(ctas: int, resident: int, limits: DeviceLimits) -> bool:
    """Whether there are so many CTAs that a multiprocessor holds as many at a time as a plan is made for."""
    return ctas > (resident - 1) * limits.multiprocessors


def room_beside(limits: DeviceLimits) -> int:
    """Shared memory that a CTA may have next to another one."""
    return limits.multiprocessor_shared // 2 - _RESERVED


def alone(shared: int, limits: DeviceLimits) -> int:
    """Shared memory for a CTA that is to have a multiprocessor for itself: more than half of it.

    With room for two, CTAs that do not wait for the end of those before them come in pairs while other multiprocessors
    have none: on an H200, 126 CTAs took 5.2 us then, and 4.4 alone.
    """
    return max(shared, min(room_beside(limits) + PIECE_BYTES, limits.cta_shared))


class TilePlan(Protocol):
    """How something is cut, whatever the number of blocks."""

    @property
    def ctas(self) -> int:
        """CTAs of a block."""

    @property
    def resident(self) -> int:
        """CTAs that a multiprocessor holds at a time."""

    @property
    def clocks(self) -> Clocks:
        """What a CTA takes."""


Plan = TypeVar("Plan", bound=TilePlan)


def contenders(plans: Iterable[Plan]) -> tuple[Plan, ...]:
    """The plans that are fastest for some number of blocks, in the order of all of them.

    A plan is left out if another one has as many CTAs that take no longer: neither alone, nor as many together as are
    on a multiprocessor. Of some 740 plans of a convolution of the benchmark, 40 are left.
    """
    found, least = [], dict[tuple[int, int], float]()
    for number, plan in sorted(enumerate(plans), key=lambda item: item[1].clocks.alone):
        group, together = (plan.ctas, plan.resident), plan.clocks.together(plan.resident)
        if together < least.get(group, math.inf):
            least[group] = together
            found.append((number, plan))
    found.sort(key=lambda item: item[0])
    return tuple(plan for _, plan in found)


def fastest(plans: Iterable[Plan], rows: int, limits: DeviceLimits, launch: LaunchClocks) -> tuple[Plan | None, float]:
    """The plan that the model takes for fastest for so many blocks, and its clocks; None if there is none."""
    timed = (
        (plan, launch_clocks(plan, rows, limits, launch))
        for plan in plans
        if are_enough(rows * plan.ctas, plan.resident, limits)
    )
    return min(timed, key=lambda pair: pair[1], default=(None, math.inf))


def launch_clocks(plan: TilePlan, rows: int, limits: DeviceLimits, launch: LaunchClocks) -> float:
    """The model of a launch for so many blocks, in a row of its like: the next one takes what its end leaves idle."""
    ctas, places = rows * plan.ctas, plan.resident * limits.multiprocessors
    idle = -ctas % places / places
    return launch.takes - launch.hidden * idle + plan.clocks.of(ctas, plan.resident, limits.multiprocessors)
