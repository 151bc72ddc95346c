"""The cases of ``reduce_mask``: device time of a large batch, and both clocks of a single mask."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import sbnet_cupy

from .cases import LARGE_MASK, MASK_MODEL, SMALL_MASK, Mask, Target
from .contest import compete, device_clock, event_clock, wall_clock
from .data import make_mask
from .gather_scatter import ceiling_row
from .rivals import Contender, equal_indices, mask_rivals
from .table import OURS, Row, Task
from .timing import Run

#: Masks that the large case rotates among: 134 MB each, so that none is in the L2 when its turn comes.
LARGE_MASKS = 3


def library(case: Mask, masks: list[Any], wanted: list[Any], capacity: bool) -> Contender:
    """The way of this library: with room for every block, or with as many rows as there are active blocks."""
    room = case.all_blocks if capacity else None

    def reduce(mask: Any) -> sbnet_cupy.BlockIndices:
        return sbnet_cupy.reduce_mask(mask, case.bcount, **case.grid, tol=0.5, capacity=room)

    def correct(got: sbnet_cupy.BlockIndices, blocks: Any) -> bool:
        rows, count = got.active_block_indices, len(blocks)
        rest = rows[count:]
        return (
            int(got.bin_counts[0]) == count
            and equal_indices(rows[:count], blocks)
            and len(rest) == (case.all_blocks - count if capacity else 0)
            and bool((rest == -1).all())
        )

    return Contender(
        f"{OURS}, capacity={case.all_blocks}" if capacity else f"{OURS}, exact",
        [functools.partial(reduce, mask) for mask in masks],
        lambda got: all(correct(a, b) for a, b in zip(got, wanted, strict=True)),
    )


def tasks(run: Run) -> Iterator[Task]:
    """Name and work of each case."""
    yield "device copy", lambda: [ceiling_row(run)]
    yield LARGE_MASK.name, functools.partial(measure_large, LARGE_MASK, run)
    yield SMALL_MASK.name, functools.partial(measure_small, SMALL_MASK, run)


def measure_large(case: Mask, run: Run) -> list[Row]:
    """Device time; the count stays on the device."""
    masks, wanted = _make(case, LARGE_MASKS)
    fields = _fields(case)
    ours = library(case, masks, wanted, capacity=True)
    return [
        compete(case.name, ours, device_clock, run, original="357 us", target=Target("us", 45), **fields),
        *(compete(case.name, rival, event_clock, run, **fields) for rival in _rivals(case, masks, wanted)),
    ]


def measure_small(case: Mask, run: Run) -> list[Row]:
    """Wall time with the count on the host, and device time in a graph without it. The mask stays in the L2."""
    masks, wanted = _make(case, 1)
    fields = {**_fields(case), "size": None, "byte_model": ""}  # bound by launches and latency, not by bytes
    exact, captured = (library(case, masks, wanted, capacity) for capacity in (False, True))
    return [
        compete(case.name, exact, wall_clock, run, original="53 us wall", target=Target("us", 25), **fields),
        *(compete(case.name, rival, wall_clock, run, **fields) for rival in _rivals(case, masks, wanted)),
        compete(
            case.name, captured, device_clock, run, original="6.1 us, kernel only", target=Target("us", 3), **fields
        ),
    ]


def _make(case: Mask, count: int) -> tuple[list[Any], list[Any]]:
    """Masks, and the active blocks of each."""
    import cupy

    made = [make_mask(cupy, case, seed) for seed in range(count)]
    return [mask for mask, _ in made], [blocks for _, blocks in made]


def _rivals(case: Mask, masks: list[Any], wanted: list[Any]) -> list[Any]:
    import cupy

    return mask_rivals(cupy, case, masks, wanted)


def _fields(case: Mask) -> dict[str, Any]:
    """What all rows of a case share."""
    return {
        "size": case.mask_bytes,
        "byte_model": MASK_MODEL,
        "description": case.describe(),
        "parameters": case.parameters(),
    }
