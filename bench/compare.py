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
from .versions import THIS, recorded, summary

#: Roles of rows with a block size: of a sweep, and the best one of a mask.
ROLES = ("sweep", "curve", "mask")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the other record")
    parser.add_argument("--record", type=Path, default=RESULTS, help="this record (default: bench/results)")
    options = parser.parse_args(arguments)
    rows = recorded(ROLES, options.folder, "the other record") + recorded(ROLES, options.record, THIS)
    print("every block size that both have", *summary(rows), sep="\n")
    whichever = [row._replace(bsize=0) for row in rows]
    print("each mask at its best block size (0: whichever)", *summary(whichever), sep="\n")


if __name__ == "__main__":
    main()
