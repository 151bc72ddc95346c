"""Times of the composed engine, to which its model is fitted.

``python -m bench.composed`` measures it for every network of the benchmark, with cuDNN if that is installed, and writes
``bench/results/plans/composed.csv``. With ``--fit``, it reads that, which needs no GPU, and prints for each arithmetic
how near the model is, and its numbers as they would be nearest; they are taken over into
``sbnet_cupy/_composed_clocks.py`` by hand. See ``bench.plans`` and ``bench.fit``, which do the same for the fused one.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sbnet_cupy import _composed_clocks
from sbnet_cupy._composed_clocks import composed_clocks
from sbnet_cupy._conv_geometry import make_chain
from sbnet_cupy._fused_network import FusedBlocks

from .fit import H200, MHZ, Array, Number, print_fit
from .fit import Measured as MeasuredPlans
from .network_data import Scene
from .networks import Sparse, compile_ahead
from .options import no_device
from .plan_kinds import KINDS, Case
from .plans import REPEATS, cases_of
from .record import RESULTS, machine
from .stages import Network, networks
from .timing import Run, free_memory, start_run, time_captured

PATH = RESULTS / "plans" / "composed.csv"

COLUMNS = ("network", "bsize", "rows", "us", "right", "device")

_EVERY = ("call", "conv", "term", "products", "bytes")

#: What is fitted, by precision.
NUMBERS = {
    "float32": [Number(_composed_clocks, "_FLOAT32", part) for part in (*_EVERY, "matrix", "matrix_bytes")],
    "tf32": [Number(_composed_clocks, "_TF32", part) for part in _EVERY],
    "float16": [Number(_composed_clocks, "_HALF", part) for part in _EVERY],
}


def every_network() -> list[Network]:
    """Those that are measured."""
    return [network for kind in ("conv", "bottleneck") for network in networks(kind, quick=False)]


def measure(network: Network, run: Run) -> Iterator[tuple[str, ...]]:
    """Rows of the record for a network, but for the device."""
    import cupy

    scene = Scene(cupy, network)
    work = [
        (case, Sparse(scene, mask, network.params(case.bsize), engine="composed")) for case, mask in cases_of(network)
    ]
    compile_ahead([sparse for _, sparse in work], run.stream)
    for case, sparse in work:
        contender = sparse.contender()
        right = contender.check([call() for call in contender.calls])
        timing = time_captured(contender.calls, REPEATS, run.stream, before=sparse.restore)
        yield network.name, str(case.bsize), str(case.rows), f"{timing.median_us:.3f}", str(right)


def blocks_of(case: Case) -> FusedBlocks:
    """The form of a call, of which the library asks its models."""
    network, shapes = case.network, tuple(case.network.layers)
    image, count = (network.shape[1], network.shape[2]), len(shapes)
    layers = tuple(make_chain(image, [shape[:2] for shape in shapes], [(1, 1)] * count, ["SAME"] * count))
    is_tf32 = network.precision.name == "tf32"
    return FusedBlocks(0, (12, 4), case.rows, 1, layers, network.params(case.bsize), shapes, is_tf32)


def composed(case: Case) -> float:
    """Clocks by the model as it is."""
    blocks = blocks_of(case)
    return composed_clocks(blocks.stack_convs, case.itemsize, blocks.tf32, H200.multiprocessors)


class Measured:
    """The record of a precision."""

    def __init__(self, path: Path, precision: str) -> None:
        by_name = {network.name: network for network in every_network() if network.precision.name == precision}
        rows = [row for row in csv.DictReader(path.read_text().splitlines()) if row["network"] in by_name]
        self.cases = [Case(by_name[row["network"]], int(row["bsize"]), int(row["rows"])) for row in rows]
        self.times: Array = np.array([float(row["us"]) for row in rows])
        self.folder, self.precision = path.parent, precision

    @functools.cached_property
    def weights(self) -> Array:
        """How much each problem counts: the more, the nearer the fused engine is, as far as its plans were measured."""
        fused: dict[Case, float] = {}
        for name, kind in KINDS.items():
            plans = self.folder / f"{name}.csv"
            if self.precision in kind.precisions and plans.exists():
                for (case, _), (_, times) in MeasuredPlans(name, plans).cases.items():
                    fused[case] = min(fused.get(case, math.inf), *times)
        return np.minimum([fused.get(case, math.inf) / us for case, us in zip(self.cases, self.times)], 1)

    def expected(self) -> Array:
        """Microseconds by the model as it is."""
        return np.array([composed(case) for case in self.cases]) / MHZ

    def report(self) -> str:
        """How near the model is."""
        errors = np.log(self.expected() / self.times)
        return (
            f"{len(errors)} problems: expected {np.exp(errors.mean()):.3f} of the time, root mean square error "
            f"{np.sqrt((errors**2).mean()):.3f}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or fit. Returns 1 where a result was wrong, or there is no device to measure."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.composed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", action="store_true", help="fit the model to the record")
    parser.add_argument("--record", type=Path, default=PATH, metavar="FILE", help="(default: bench/results/plans/...)")
    options = parser.parse_args(arguments)
    if options.fit:
        for precision, numbers in NUMBERS.items():
            print(precision)
            print_fit(numbers, Measured(options.record, precision))
        return 0
    reason = no_device()
    if reason:
        print(f"bench.composed: error: the engine is timed on a CUDA device: {reason}", file=sys.stderr)
        return 1
    rows, device = [], machine()["device"]
    with start_run(quick=True) as run:
        for network in tqdm(every_network(), unit="network"):
            rows += [(*row, device) for row in measure(network, run)]
            free_memory()
    options.record.parent.mkdir(parents=True, exist_ok=True)
    with options.record.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    wrong = [row for row in rows if row[COLUMNS.index("right")] != "True"]
    print(f"{options.record}: {len(rows)} problems")
    if wrong:
        print(f"bench.composed: error: {len(wrong)} results were wrong, the first of {wrong[0]}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
