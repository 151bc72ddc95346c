"""How good the choices of ``engine='auto'`` are, by the records of plans: ``python -m bench.choice``. Needs no GPU.

A problem of the benchmark may be computed in several ways: by one fused kernel or another, in one launch or in three,
or by the composed engine. The models choose the way, and its plan. For each kind of network and each precision, this
prints what was lost by that to the fastest way, each by the plan that its model picks, and to the fastest of all plans,
as far as ``bench.plans`` and ``bench.composed`` have measured them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import composed
from .fit import Measured, Pick
from .plan_kinds import KINDS, Case
from .record import RESULTS


class Choice(NamedTuple):
    """A problem, and what the model of each way picks for it, by the names of the ways."""

    case: Case
    ways: dict[str, Pick]

    @property
    def chosen(self) -> str:
        """The way that the models choose."""
        return min(self.ways, key=self.counts)

    def counts(self, way: str) -> float:
        """Microseconds for which a way counts where it is held against others."""
        return self.ways[way].expected_us * (KINDS[way].counted if way in KINDS else 1)

    @property
    def lost_to_ways(self) -> float:
        """The chosen way's time, of that of the best way."""
        return self.ways[self.chosen].us / min(pick.us for pick in self.ways.values())

    @property
    def lost_to_plans(self) -> float:
        """The chosen way's time, of that of the fastest plan of any way."""
        return self.ways[self.chosen].us / min(pick.best_us for pick in self.ways.values())


def choices(folder: Path) -> dict[tuple[str, str], list[Choice]]:
    """All problems that the composed engine and another way were measured for, by kind of network and precision."""
    fused: dict[Case, dict[str, Pick]] = {}
    for name in KINDS:
        path = folder / f"{name}.csv"
        if path.exists():
            record = Measured(name, path)
            for pick in record.picks(record.expected()):
                fused.setdefault(pick.case, {})[name] = pick
    found: dict[tuple[str, str], list[Choice]] = {}
    for precision in composed.NUMBERS:
        stacks = composed.Measured(folder / composed.PATH.name, precision)
        for case, expected, us in zip(stacks.cases, stacks.expected(), stacks.times):
            if case in fused:
                ways = {**fused[case], "composed": Pick(case, expected, us, us)}
                found.setdefault((case.network.kind, precision), []).append(Choice(case, ways))
    return found


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
    for (kind, precision), found in choices(options.plans).items():
        print(f"{kind}, {precision}: {report(found)}")
        for choice in sorted(found, key=lambda choice: choice.lost_to_ways, reverse=True)[: options.worst]:
            each = (f"{way} {pick.us:.1f} us, counts {choice.counts(way):.1f}" for way, pick in choice.ways.items())
            ways, case = "; ".join(each), choice.case
            print(f"  {choice.lost_to_ways:.3f}  {case.network.name}, {case.rows} blocks of {case.bsize}: {ways}")


if __name__ == "__main__":
    main()
