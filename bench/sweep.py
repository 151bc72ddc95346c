"""Bandwidth over block size, over channels, over density and over dtype: case L with one parameter varied."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from .cases import sweep_points
from .gather_scatter import ceiling_row, measure
from .table import Task
from .timing import Run


def tasks(run: Run) -> Iterator[Task]:
    """Name and work of each case."""
    yield "device copy", lambda: [ceiling_row(run)]
    for point in sweep_points(run.quick):
        yield (
            point.case.name,
            functools.partial(
                measure,
                point.case,
                run,
                rivals=point.has_rivals,
                sweep=point.sweep,
                point=point.label,
                variant=point.variant,
            ),
        )
