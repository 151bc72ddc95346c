"""One contender of one case: call, check, time, and what comes of it as a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .rivals import Absent, Contender
from .table import CORRECT, WRONG, Row, timed_row
from .timing import Call, Run, Timing, time_device, time_events, time_host

#: How calls are timed: a function of the calls and the run.
Clock = Callable[[Sequence[Call], Run], Timing]

#: What a row says about its case, also where there is no figure.
ABOUT = {"description", "byte_model", "original", "parameters"}


def device_clock(calls: Sequence[Call], run: Run) -> Timing:
    """Device time, whatever the host takes."""
    return time_device(calls, run.repeats, run.stream)


def event_clock(calls: Sequence[Call], run: Run) -> Timing:
    """Events around calls from Python: gaps count in which the device waits for the host."""
    return time_events(calls, run.repeats, run.stream)


def host_clock(calls: Sequence[Call], run: Run) -> Timing:
    """Python's time until the call returns."""
    return time_host(calls[0], run.host_repeats, run.stream)


def wall_clock(calls: Sequence[Call], run: Run) -> Timing:
    """The same for calls that wait for a number from the device."""
    return time_host(calls[0], run.host_repeats, run.stream, "wall")


def explain(error: Exception) -> str:
    """A failure in one line, for the column of the checks."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def attempt(case: str, name: str, make: Callable[[], Contender | Absent], clock: Clock, run: Run, **fields: Any) -> Row:
    """Make a contender and let it compete. What goes wrong in the making is told in the row as well."""
    try:
        contender = make()
    except Exception as error:
        about = {key: fields[key] for key in ABOUT & fields.keys()}
        return Row(case, name, check=explain(error), **about)
    return compete(case, contender, clock, run, **fields)


def compete(case: str, contender: Contender | Absent, clock: Clock, run: Run, **fields: Any) -> Row:
    """Check and time one contender.

    Whatever goes wrong is told in the row, so that one failure does not lose the other figures.
    """
    about = {key: fields[key] for key in ABOUT & fields.keys()}
    if isinstance(contender, Absent):
        return Row(case, contender.name, note=contender.note, **about)
    try:
        correct = contender.check([call() for call in contender.calls])
        timing = clock(contender.calls, run)
    except Exception as error:
        return Row(case, contender.name, check=explain(error), note=contender.note, **about)
    check = CORRECT if correct else WRONG
    return timed_row(
        case, contender.name, timing, ceiling_tbps=run.ceiling_tbps, check=check, note=contender.note, **fields
    )
