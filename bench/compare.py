"""What two recorded runs of networks say of the same masks: ``python -m bench.compare FOLDER``. Needs no GPU.

FOLDER has ``conv.json`` and ``bottleneck.json`` of another run of ``python -m bench``, for example of an older commit.
Compared are the times of every mask with every block size that both have, and of every mask at the size that was best
for it in each. Records are of different cards, and of different samples: ``bench.versions`` takes turns on one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .record import RESULTS
from .table import OURS
from .versions import THIS, Timed, summary

_KINDS = ("conv", "bottleneck")


def recorded(folder: Path, version: str) -> list[Timed]:
    """Times of the library in place, with every block size of every mask."""
    found = []
    for kind in _KINDS:
        record = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        for row in record["results"]:
            has = row["parameters"]
            if row["implementation"] == OURS and has.get("role") in ("sweep", "curve", "mask") and row["median_us"]:
                network, right, device = (
                    row["case"].split(", ")[0],
                    row["check"] == "equal",
                    record["machine"]["device"],
                )
                found.append(Timed(kind, network, has["mask"], has["bsize"], version, row["median_us"], right, device))
    return found


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
    rows = recorded(options.folder, "the other record") + recorded(options.record, THIS)
    print("every block size that both have", *summary(in_both(rows)), sep="\n")
    print("each mask at its best block size (0: whichever)", *summary(in_both(at_the_best_size(rows))), sep="\n")


if __name__ == "__main__":
    main()
