"""Times of plans that the fused kernels may follow, to which the models that choose among them are fitted.

``python -m bench.plans KIND`` measures the plans that the model of a kind takes for fastest, for every network of the
benchmark, and adds them to ``bench/results/plans/KIND.csv``; ``python -m bench.fit KIND`` reads that. A model that was
fitted anew may take others for fastest, so the two are repeated until little is added. Delete the record when a kernel
changes: what it has is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import itertools
import math
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sbnet_cupy._fused_plan import DeviceLimits

from .network_data import Scene, active_blocks
from .networks import Sparse
from .options import no_device, pattern
from .plan_kinds import KINDS, Case, Kind, numbers_of
from .record import RESULTS, machine
from .stages import FEW_SPARSITIES, Network, networks, top_left_case
from .timing import Call, Run, free_memory, start_run, time_captured

#: Of the block sizes of a network, every so many-th is measured; and samples of a figure.
SIZES, REPEATS = 3, 5

#: Columns of the record. A plan is its numbers; `right` tells whether the result was.
COLUMNS = ("network", "bsize", "rows", "plan", "us", "right", "device")


def cases_of(network: Network) -> Iterator[tuple[Case, Any]]:
    """Cases of a network, each number of blocks once, and their masks."""
    sizes, seen = network.block_sizes(quick=False)[::SIZES], set()
    for sparsity, bsize in itertools.product(FEW_SPARSITIES, sizes):
        mask = top_left_case(sparsity).make(*network.shape[1:3])
        case = Case(network, bsize, int(active_blocks(mask, network.params(bsize)).sum()))
        if case not in seen:
            seen.add(case)
            yield case, mask


@contextlib.contextmanager
def followed(kind: Kind, case: Case, plan: Any) -> Iterator[None]:
    """Let the library follow this plan for this case, whatever it expects of others."""
    from sbnet_cupy import _bottleneck, _conv, _fused

    def follow(problem: Any, *_: Any) -> tuple[Any, float]:
        return kind.answer(plan, case, problem), 0.0

    names = {each.planner for each in KINDS.values()}
    before = {name: getattr(_fused, name) for name in names}
    try:
        for name in names:
            setattr(_fused, name, follow if name == kind.planner else lambda *_: (None, math.inf))
        for module in (_conv, _bottleneck):
            module.prepare.cache_clear()
        yield
    finally:
        for name, planner in before.items():
            setattr(_fused, name, planner)
        for module in (_conv, _bottleneck):
            module.prepare.cache_clear()


def compile_plans(kind: Kind, work: Sequence[tuple[Case, Call, Sequence[Any]]]) -> None:
    """Compile what calls launch by plans, side by side: they are made with launches that only take notes."""
    from sbnet_cupy import _jit

    asked: dict[Any, None] = {}
    before = _jit.launch_early, _jit.ctas_that_fit
    _jit.launch_early = lambda instance, *_: asked.setdefault(instance)  # type: ignore[assignment]
    _jit.ctas_that_fit = lambda *_: 2  # asks the driver, once compiled
    try:
        for case, call, plans in work:
            for plan in plans:
                with followed(kind, case, plan):
                    call()
    finally:
        _jit.launch_early, _jit.ctas_that_fit = before
    _jit.compile_all(list(asked), progress=False)


def measure(
    kind: Kind, network: Network, run: Run, limits: DeviceLimits, known: Collection[tuple[str, ...]]
) -> Iterator[tuple[str, ...]]:
    """Rows of the record for a network that it has not got, but for the device."""
    import cupy

    scene, work = Scene(cupy, network), []
    for case, mask in cases_of(network):
        plans = {_row_of(case, plan): plan for plan in kind.promising(case, limits)}
        missing = {row: plan for row, plan in plans.items() if row not in known}
        if missing:
            sparse = Sparse(scene, mask, network.params(case.bsize), engine="fused")
            work.append((case, sparse, functools.partial(sparse.in_place, 0, sparse.indices), missing))
    compile_plans(kind, [(case, call, list(plans.values())) for case, _, call, plans in work])
    for case, sparse, call, plans in work:
        for row, plan in plans.items():
            with followed(kind, case, plan):
                right = sparse.contender().check([call()])
                timing = time_captured([call], REPEATS, run.stream, before=sparse.restore)
            yield *row, f"{timing.median_us:.3f}", str(right)


def _row_of(case: Case, plan: Any) -> tuple[str, ...]:
    """The first columns of the record."""
    return case.network.name, str(case.bsize), str(case.rows), " ".join(map(str, numbers_of(plan)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Returns 1 where a result was wrong, or there is no device."""
    from sbnet_cupy import _jit

    parser = argparse.ArgumentParser(
        prog="python -m bench.plans", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument(
        "--only", type=pattern, default=pattern(""), metavar="PATTERN", help="only networks whose name this finds"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "plans", help="folder (default: bench/results/plans)")
    options = parser.parse_args(arguments)
    reason = no_device()
    if reason:
        print(f"bench.plans: error: plans need a CUDA device: {reason}", file=sys.stderr)
        return 1
    kind, limits, path = KINDS[options.kind], _jit.device_limits(0), options.output / f"{options.kind}.csv"
    recorded = list(csv.reader(path.read_text().splitlines()))[1:] if path.exists() else []
    known = {tuple(row[: COLUMNS.index("us")]) for row in recorded}
    chosen = [
        network
        for network in networks(kind.network, quick=False)
        if network.precision.name in kind.precisions and options.only.search(network.name)
    ]
    added = []
    with start_run(quick=True) as run:
        for network in tqdm(chosen, options.kind, unit="network"):
            added += measure(kind, network, run, limits, known)
            free_memory()
    device = machine()["device"]
    options.output.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *recorded, *((*row, device) for row in added)])
    print(f"{path}: {len(added)} plans added to {len(recorded)}")
    wrong = [row for row in added if row[-1] != "True"]
    if wrong:
        text = f"{len(wrong)} of {len(added)} results were wrong, the first of {wrong[0]}"
        print(f"bench.plans: error: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
