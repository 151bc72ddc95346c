"""What two recorded runs of networks say of the same masks: ``python -m bench.compare FOLDER``. Needs no GPU.

FOLDER has ``conv.json`` and ``bottleneck.json`` of another run of ``python -m bench``, for example of an older commit.
Compared are the times of every mask with every block size that both have, and of every mask at the size that was best
for it in each. Records are of different cards, and of different samples: ``bench.versions`` takes turns on one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .record import RESULTS
from .versions import THIS, Timed, recorded, summary

#: Roles of rows with a block size: of a sweep, and the best one of a mask.
ROLES = ("sweep", "curve", "mask")


def at_the_best_size(rows: Sequence[Timed]) -> list[Timed]:
    """The fastest of each mask, whatever its block size."""
    best: dict[tuple[str, ...], Timed] = {}
    for row in sorted(rows, key=lambda row: row.us):
        best.setdefault((row.kind, row.network, row.mask, row.version), row._replace(bsize=0))
    return list(best.values())


def in_both(rows: Sequence[Timed]) -> list[Timed]:
    """Those whose case every version has."""
    versions = {row.version for row in rows}
    of_case: dict[tuple[str, str, str, int], set[str]] = {}
    for row in rows:
        of_case.setdefault(row.case, set()).add(row.version)
    return [row for row in rows if of_case[row.case] == versions]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the other record")
    parser.add_argument("--record", type=Path, default=RESULTS, help="this record (default: bench/results)")
    options = parser.parse_args(arguments)
    rows = recorded(ROLES, options.folder, "the other record") + recorded(ROLES, options.record, THIS)
    print("every block size that both have", *summary(in_both(rows)), sep="\n")
    print("each mask at its best block size (0: whichever)", *summary(in_both(at_the_best_size(rows))), sep="\n")


if __name__ == "__main__":
    main()
