"""How good the choices of ``engine='auto'`` are, by the records of plans: ``python -m bench.choice``. Needs no GPU.

A problem of the benchmark may be computed in several ways: by one fused kernel or another, in one launch or in three,
or by the composed engine. The models choose the way, and its plan. For each kind of network and each precision, this
prints what was lost by that to the fastest way, each by the plan that its model picks, and to the fastest of all plans,
as far as ``bench.plans`` and ``bench.composed`` have measured them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import composed
from .fit import Measured
from .plan_kinds import KINDS, Case
from .record import RESULTS


class Way(NamedTuple):
    """A way to compute a problem."""

    name: str
    #: Microseconds for which it counts where ways are held against each other, by its model.
    counts: float
    #: Microseconds of the plan that the model picks, and of the fastest plan.
    picked: float
    fastest: float


class Choice(NamedTuple):
    """A problem, and all ways that were measured."""

    case: Case
    ways: Sequence[Way]

    @property
    def chosen(self) -> Way:
        """The one that the models choose."""
        return min(self.ways, key=lambda way: way.counts)

    @property
    def lost_to_ways(self) -> float:
        """Its time, of that of the best way."""
        return self.chosen.picked / min(way.picked for way in self.ways)

    @property
    def lost_to_plans(self) -> float:
        """Its time, of that of the fastest plan of any way."""
        return self.chosen.picked / min(way.fastest for way in self.ways)


def choices(kind: str, precision: str, folder: Path) -> list[Choice]:
    """All problems of networks of a kind in a precision that the composed engine and another way were measured for."""
    found: dict[Case, list[Way]] = {}
    for name, each in KINDS.items():
        if each.network == kind and precision in each.precisions:
            for case, way in _fused_ways(name, folder / f"{name}.csv"):
                if case.network.precision.name == precision:
                    found.setdefault(case, []).append(way)
    record = composed.Measured(folder / composed.PATH.name, precision)
    found_both = []
    for case, expected, us in zip(record.cases, record.expected(), record.times):
        if case in found:
            found_both.append(Choice(case, [*found[case], Way("composed", expected, us, us)]))
    return found_both


def _fused_ways(name: str, path: Path) -> Iterator[tuple[Case, Way]]:
    """Of the problems in the record of a kind of plans."""
    kind, record = KINDS[name], Measured(name, path)
    expected, begin = record.expected(), 0
    for (case, _), (_, times) in record.cases.items():
        own = expected[begin : begin + len(times)]
        begin += len(times)
        pick = int(own.argmin())
        yield case, Way(name, kind.counted * float(own[pick]), times[pick], min(times))


def report(found: Sequence[Choice]) -> str:
    """What the choices lose."""
    ways, plans = ([getattr(choice, name) for choice in found] for name in ("lost_to_ways", "lost_to_plans"))
    return (
        f"{len(found)} problems: the chosen way takes {np.mean(ways):.3f} of the best one's time, at most "
        f"{max(ways):.3f}; its plan {np.mean(plans):.3f} of the fastest plan's, {np.percentile(plans, 90):.3f} at the "
        f"90th percentile"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.choice", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", type=Path, default=RESULTS / "plans", help="folder (default: bench/results/plans)")
    parser.add_argument("--worst", type=int, default=0, metavar="COUNT", help="also so many choices that lose most")
    options = parser.parse_args(arguments)
    for kind in ("conv", "bottleneck"):
        for precision in composed.NUMBERS:
            found = choices(kind, precision, options.plans)
            print(f"{kind}, {precision}: {report(found)}")
            for choice in sorted(found, key=lambda choice: choice.lost_to_ways, reverse=True)[: options.worst]:
                ways = "; ".join(f"{way.name} {way.picked:.1f} us, counts {way.counts:.1f}" for way in choice.ways)
                case = choice.case
                print(f"  {choice.lost_to_ways:.3f}  {case.network.name}, {case.rows} blocks of {case.bsize}: {ways}")


if __name__ == "__main__":
    main()
