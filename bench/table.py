"""One measured figure, and how figures are printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cases import Target
from .timing import Timing, terabytes_per_second

#: Name of this library in tables.
OURS = "sbnet_cupy"
CORRECT = "equal"
WRONG = "WRONG"


@dataclass(frozen=True)
class Row:
    """One line of a table, of the JSON and of the CSV."""

    case: str
    implementation: str
    description: str = ""
    clock: str = ""
    median_us: float | None = None
    low_us: float | None = None  # 10th percentile
    high_us: float | None = None  # 90th percentile
    repeats: int = 0
    bytes: int | None = None
    byte_model: str = ""
    tbps: float | None = None
    share: float | None = None  # of the device copy's bandwidth
    floor_us: float | None = None  # that bandwidth and arithmetic allow
    speedup: float | None = None  # over the fastest dense network
    original: str = ""  # figure of the 2018 original
    goal: str = ""
    verdict: str = ""
    check: str = ""
    note: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether this library's result was wrong, or there was none."""
        return self.implementation.startswith(OURS) and self.check not in ("", CORRECT)


def timed_row(
    case: str,
    implementation: str,
    timing: Timing,
    *,
    size: int | None = None,
    ceiling_tbps: float | None = None,
    target: Target | None = None,
    **fields: Any,
) -> Row:
    """A row of a timing, with bandwidth where `size` is given, its share of the ceiling, and a verdict on `target`."""
    tbps = terabytes_per_second(size, timing.median_us) if size is not None else None
    share = tbps / ceiling_tbps if tbps is not None and ceiling_tbps is not None else None
    return Row(
        case,
        implementation,
        clock=timing.clock,
        median_us=timing.median_us,
        low_us=timing.low_us,
        high_us=timing.high_us,
        repeats=timing.repeats,
        bytes=size,
        tbps=tbps,
        share=share,
        goal=str(target) if target else "",
        verdict=target.verdict(timing.median_us, share) if target else "",
        **fields,
    )


#: A case by name, and the work that measures it.
Task = tuple[str, Callable[[], list[Row]]]

HEADINGS = (
    "implementation",
    "clock",
    "median us",
    "p10 to p90",
    "TB/s",
    "of copy",
    "floor us",
    "x dense",
    "2018 original",
    "goal",
    "verdict",
    "check",
    "note",
)


def format_table(rows: Sequence[Row]) -> str:
    """Rows under a line for each case that says what it is and how its bytes are counted."""
    cells = [_cells(row) for row in rows]
    used = [k for k in range(len(HEADINGS)) if k < 2 or any(line[k] for line in cells)]
    widths = {k: max(len(HEADINGS[k]), *(len(line[k]) for line in cells)) for k in used} if cells else {}
    lines = ["  " + _join(HEADINGS, widths)]
    case = None
    for row, line in zip(rows, cells):
        if row.case != case:
            case = row.case
            model = f"; bytes: {row.byte_model}" if row.byte_model else ""
            lines.append(f"{case}{': ' if row.description else ''}{row.description}{model}")
        lines.append("  " + _join(line, widths))
    return "\n".join(lines)


def format_verdicts(rows: Sequence[Row]) -> str:
    """How many goals were met, and each that was not."""
    judged = [row for row in rows if row.verdict or row.failed]
    missed = [row for row in judged if row.verdict != "met" or row.failed]
    lines = [f"goals: {len(judged) - len(missed)} met, {len(missed)} not"]
    lines += [
        f"  {row.case}, {row.implementation}: {row.check if row.failed else f'{row.goal}; {row.verdict}'}"
        for row in missed
    ]
    return "\n".join(lines)


def _join(cells: Sequence[str], widths: dict[int, int]) -> str:
    # Columns 2 to 7 are numbers.
    aligned = (cells[k].rjust(w) if 2 <= k <= 7 else cells[k].ljust(w) for k, w in widths.items())
    return "  ".join(aligned).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    spread = f"{row.low_us:.1f} to {row.high_us:.1f}" if row.low_us is not None else ""
    return (
        row.implementation,
        row.clock,
        _number(row.median_us, ".1f"),
        spread,
        _number(row.tbps, ".2f"),
        _number(row.share, ".2f"),
        _number(row.floor_us, ".1f"),
        _number(row.speedup, ".2f"),
        row.original,
        row.goal,
        row.verdict,
        row.check,
        row.note,
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
