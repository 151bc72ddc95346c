"""Times of the composed engine in IEEE float32, to which its model is fitted.

``python -m bench.composed`` measures it for every network of the benchmark and writes
``bench/results/plans/composed-float32.csv``. With ``--fit``, it reads that, which needs no GPU, and prints how near the
model is, how good a choice it makes, and its numbers as they would be nearest; they are taken over into
``sbnet_cupy/_composed_clocks.py`` by hand. See ``bench.plans`` and ``bench.fit``, which do the same for the fused one.
"""

from __future__ import annotations

import argparse
import csv
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
from .network_data import Scene
from .networks import Sparse, compile_ahead
from .options import no_device
from .plan_kinds import KINDS, Case
from .plans import REPEATS, cases_of
from .record import RESULTS, machine
from .stages import Network, networks
from .timing import Run, free_memory, start_run, time_captured

PATH = RESULTS / "plans" / "composed-float32.csv"

COLUMNS = ("network", "bsize", "rows", "us", "right", "device")

#: What is fitted.
NUMBERS = [
    Number(_composed_clocks, "_FLOAT32", part)
    for part in ("call", "conv", "term", "products", "bytes", "matrix", "matrix_bytes")
]


def float32_networks() -> list[Network]:
    """Those that are measured."""
    return [net for kind in ("conv", "bottleneck") for net in networks(kind, False) if net.precision.name == "float32"]


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
    """Clocks by the model of the composed engine as it is."""
    return composed_clocks(blocks_of(case).stack_convs, 4, False, H200.multiprocessors)


def fused(case: Case) -> float:
    """Clocks by the model of the fused engine."""
    names = ("conv-float32",) if case.network.kind == "conv" else ("bottleneck-float32", "layers-float32")
    best = [(KINDS[name], KINDS[name].promising(case, H200)[:1]) for name in names]
    return min(clocks for kind, plans in best for clocks in kind.clocks(plans, case, H200))


class Measured:
    """The record."""

    def __init__(self, path: Path) -> None:
        by_name = {network.name: network for network in float32_networks()}
        rows = list(csv.DictReader(path.read_text().splitlines()))
        self.cases = [Case(by_name[row["network"]], int(row["bsize"]), int(row["rows"])) for row in rows]
        self.times: Array = np.array([float(row["us"]) for row in rows])
        #: That all count the same.
        self.best = self.times
        self.fused: Array = np.array([fused(case) for case in self.cases]) / MHZ

    def expected(self) -> Array:
        """Microseconds by the model as it is."""
        return np.array([composed(case) for case in self.cases]) / MHZ

    def report(self) -> str:
        """How near the model is; and how good the choice if the fused engine takes what its own model expects."""
        expected = self.expected()
        errors = np.log(expected / self.times)
        losses = np.where(self.fused < expected, self.fused, self.times) / np.minimum(self.fused, self.times)
        return (
            f"{len(errors)} problems: expected {np.exp(errors.mean()):.3f} of the time, root mean square error "
            f"{np.sqrt((errors**2).mean()):.3f}; choice {losses.mean():.4f} of the better engine's time, at most "
            f"{losses.max():.3f}"
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
        print_fit(NUMBERS, Measured(options.record))
        return 0
    reason = no_device()
    if reason:
        print(f"bench.composed: error: the engine is timed on a CUDA device: {reason}", file=sys.stderr)
        return 1
    rows, device = [], machine()["device"]
    with start_run(quick=True) as run:
        for network in tqdm(float32_networks(), unit="network"):
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
