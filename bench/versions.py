"""Times of the recorded networks by other versions of this library, on one machine: what became slower, what faster.

``python -m bench.versions NAME=FOLDER...`` takes every mask of the recorded networks, at its block size, with the
package of each of these checkouts and with this one, each in a process of its own, and all of them twice. What is there
after each process is in ``bench/results/versions.csv``. The benchmark is this checkout's, whatever the package.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .network_data import Scene
from .networks import Sparse, compile_ahead
from .options import no_device
from .record import RESULTS, machine
from .stages import REAL_MASKS, SPARSITIES, networks, top_left_case
from .table import OURS
from .timing import free_memory, start_run, time_captured

#: This version's name, and samples of a figure.
THIS, REPEATS = "this", 9

#: By how much two times differ that are told apart: repeated on one machine, nine of ten are within 1.6 %.
APART = 1.05


class Timed(NamedTuple):
    """A row of the record."""

    kind: str
    network: str
    mask: str
    bsize: int
    version: str
    us: float
    right: bool
    device: str

    @property
    def case(self) -> tuple[str, str, str, int]:
        """Of what it is the time."""
        return self.kind, self.network, self.mask, self.bsize


def recorded(roles: Collection[str], folder: Path = RESULTS, version: str = THIS) -> list[Timed]:
    """Times of the library in the recorded networks: of a call in place that is there for one of some roles."""
    found = []
    for kind in ("conv", "bottleneck"):
        record = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        for row in record["results"]:
            has, us, right = row["parameters"], row["median_us"], row["check"] == "equal"
            if row["implementation"] == OURS and has.get("role") in roles and us:
                network, device = row["case"].split(", ")[0], record["machine"]["device"]
                found.append(Timed(kind, network, has["mask"], has["bsize"], version, us, right, device))
    return found


def recorded_cases(folder: Path = RESULTS) -> list[tuple[str, str, str, int]]:
    """Kind, network, mask and block size of every figure of a mask in the recorded networks."""
    return list(dict.fromkeys(row.case for row in recorded(("curve", "mask"), folder)))


def time_cases() -> None:
    """Read cases from standard input, time them with whatever `sbnet_cupy` is found, and write what was found."""
    import cupy

    by_network: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for kind, name, mask, bsize in json.load(sys.stdin):
        by_network.setdefault((kind, name), []).append((mask, bsize))
    named = {
        (kind, network.name): network for kind in ("conv", "bottleneck") for network in networks(kind, quick=False)
    }
    masks = {mask.name: mask for mask in (*REAL_MASKS, *map(top_left_case, SPARSITIES))}
    found = []
    with start_run(quick=True) as run:
        for key, cases in tqdm(by_network.items(), unit="network"):
            network = named[key]
            scene = Scene(cupy, network)
            sparse = [
                Sparse(scene, masks[mask].make(*network.shape[1:3]), network.params(bsize)) for mask, bsize in cases
            ]
            compile_ahead(sparse, run.stream)
            for case, each in zip(cases, sparse):
                contender = each.contender()
                right = contender.check([call() for call in contender.calls])
                timing = time_captured(contender.calls, REPEATS, run.stream, before=each.restore)
                found.append((*key, *case, timing.median_us, right))
            del sparse, scene
            free_memory()
    json.dump(found, sys.stdout)


def run_version(folder: Path, code: str, given: str = "") -> str:
    """What Python code prints that takes `sbnet_cupy` from a checkout, and `bench` from here."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "bench").symlink_to(Path(__file__).parent, target_is_directory=True)
        path = os.pathsep.join((str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])))
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=given,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=place,
            env={**os.environ, "PYTHONPATH": path},
        )
    return done.stdout


def summary(rows: Sequence[Timed]) -> list[str]:
    """For each other version and kind: how this one's times are to its, and which are longer.

    Of the cases that both have; the least time of a case counts.
    """
    least: dict[str, dict[tuple[str, str, str, int], float]] = {}
    for row in rows:
        of_version = least.setdefault(row.version, {})
        of_version[row.case] = min(row.us, of_version.get(row.case, math.inf))
    mine, lines = least.pop(THIS), []
    for version, kind in itertools.product(least, dict.fromkeys(row.kind for row in rows)):
        ratios = {case: mine[case] / us for case, us in least[version].items() if case[0] == kind and case in mine}
        if not ratios:
            continue
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        slower = sorted(((ratio, case) for case, ratio in ratios.items() if ratio > APART), reverse=True)
        faster = sum(ratio < 1 / APART for ratio in ratios.values())
        lines.append(
            f"{kind}, {len(ratios)} rows: {mean:.3f} of the time of {version} (geometric mean); more than 5 % faster: "
            f"{faster}, slower: {len(slower)}"
        )
        lines += [f"  {ratio:.3f}  {network}, {mask}, blocks of {bsize}" for ratio, (_, network, mask, bsize) in slower]
    return lines


def parse_version(text: str) -> tuple[str, Path]:
    """``NAME=FOLDER`` of a command line."""
    name, _, folder = text.partition("=")
    if not name or name == THIS or not folder or not (Path(folder) / "sbnet_cupy").is_dir():
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, of a checkout, got {text!r}")
    return name, Path(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Returns 1 where a result of this version was wrong, or there is no device."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", type=parse_version, nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (default: bench/results)")
    options = parser.parse_args(arguments)
    reason = no_device()
    if reason:
        print(f"bench.versions: error: versions are timed on a CUDA device: {reason}", file=sys.stderr)
        return 1
    versions, rows = [*options.versions, (THIS, Path(__file__).parents[1])], list[Timed]()
    cases, device, path = json.dumps(recorded_cases()), machine()["device"], options.output / "versions.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    for name, folder in versions * 2:
        print(name, file=sys.stderr)
        found = json.loads(run_version(folder, "from bench.versions import time_cases; time_cases()", cases))
        rows += [Timed(*case, name, round(us, 3), right, device) for *case, us, right in found]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([Timed._fields, *rows])
    print(path, *summary(rows), sep="\n")
    wrong = [row for row in rows if row.version == THIS and not row.right]
    if wrong:
        print(f"bench.versions: error: {len(wrong)} results were wrong, the first of {wrong[0]}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
