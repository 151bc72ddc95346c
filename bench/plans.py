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
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sbnet_cupy import _fused_conv_plan, _fused_wgmma_plan
from sbnet_cupy._fused_bottleneck_plan import (
    SCATTER,
    BottleneckPlan,
    BottleneckProblem,
    bottleneck_clocks,
    bottleneck_plans,
    tile_clocks,
)
from sbnet_cupy._fused_clocks import Clocks
from sbnet_cupy._fused_conv_plan import ConvPlan, ConvProblem, conv_plans
from sbnet_cupy._fused_plan import DeviceLimits, are_enough
from sbnet_cupy._fused_wgmma_plan import GroupLayout, WgmmaPlan, wgmma_plans
from sbnet_cupy._packing import packing_of
from sbnet_cupy._warps import WarpLayout

from .network_data import Scene, active_blocks
from .networks import Sparse
from .record import RESULTS, machine
from .stages import FEW_SPARSITIES, Network, networks, top_left_case
from .timing import Call, Run, free_memory, start_run, time_captured

#: Of the block sizes of a network, every so many-th is measured; plans of each, and plans that differ in all but their
#: tile and how many of them share a multiprocessor, at most; and samples of a figure.
SIZES, MOST_PLANS, MOST_ALIKE, REPEATS = 3, 8, 2, 5


class Case(NamedTuple):
    """A network on so many active blocks."""

    network: Network
    bsize: int
    rows: int

    @property
    def itemsize(self) -> int:
        return np.dtype(self.network.precision.dtype).itemsize

    @property
    def uses_tensor_cores(self) -> bool:
        return self.network.precision.name != "float32"

    @property
    def conv(self) -> ConvProblem:
        """What the models of convolutions are asked."""
        (shape,), block = self.network.layers, self.network.params(self.bsize).bsize_out
        return ConvProblem(packing_of(shape, self.itemsize), shape[:2], (1, 1), block, self.uses_tensor_cores)

    @property
    def bottleneck(self) -> BottleneckProblem:
        """What the model of bottlenecks is asked."""
        (_, second, third), block = self.network.layers, self.network.params(self.bsize).bsize_out
        return BottleneckProblem(third[3], third[2], self.itemsize, second[:2], block, self.uses_tensor_cores)


class Kind(NamedTuple):
    """A kernel whose plans are measured."""

    #: Kind of the networks that it computes, and in which precisions.
    network: str
    precisions: tuple[str, ...]
    #: What chooses its plans, in sbnet_cupy._fused.
    planner: str
    #: All plans for a case.
    plans: Callable[[Case, DeviceLimits], Iterable[Any]]
    #: A plan of the numbers that it consists of, but for its clocks.
    read: Callable[[Iterator[int]], Any]
    #: Clocks by the model as it is, of plans of a case.
    clocks: Callable[[Sequence[Any], Case, DeviceLimits], list[float]]


def _conv_clocks(plans: Sequence[ConvPlan], case: Case, limits: DeviceLimits) -> list[float]:
    found = _listed_clocks(plans, conv_plans(case.conv, limits), case, limits)
    return [clocks + _fused_conv_plan.LAUNCH for clocks in found]


def _wgmma_clocks(plans: Sequence[WgmmaPlan], case: Case, limits: DeviceLimits) -> list[float]:
    found = _listed_clocks(plans, wgmma_plans(case.conv, limits), case, limits)
    return [clocks + _fused_wgmma_plan.LAUNCH for clocks in found]


def _listed_clocks(plans: Sequence[Any], every: Iterable[Any], case: Case, limits: DeviceLimits) -> list[float]:
    """Of plans that are among those that the model lists."""
    found = {numbers_of(plan): plan.clocks for plan in every}
    return [found[numbers_of(plan)].of(case.rows * plan.ctas, plan.resident, limits.multiprocessors) for plan in plans]


def _bottleneck_clocks(plans: Sequence[BottleneckPlan], case: Case, limits: DeviceLimits) -> list[float]:
    """The model lists only the best layouts, by its own numbers: so these are asked for by name."""
    problem, image, found = case.bottleneck, case.network.shape[1:3], []
    for plan in plans:
        plan = plan._replace(clocks=tile_clocks(plan.tile, plan.layouts, plan.near, problem))
        stack = case.rows * plan.ctas > plan.resident * limits.multiprocessors  # in place, all run at the same time
        found.append(bottleneck_clocks(plan, problem, case.rows, image, limits) + (SCATTER if stack else 0))
    return found


#: Columns of the record. A plan is its numbers; `right` tells whether the result was.
COLUMNS = ("network", "bsize", "rows", "plan", "us", "right", "device")


def numbers_of(plan: Any) -> tuple[int, ...]:
    """The numbers that a plan consists of, one after another, but for its clocks."""

    def flat(value: Any) -> Iterator[int]:
        if isinstance(value, tuple):
            yield from itertools.chain.from_iterable(map(flat, value))
        elif not isinstance(value, Clocks):
            yield value

    return tuple(flat(plan))


def _pair(numbers: Iterator[int]) -> tuple[int, int]:
    return next(numbers), next(numbers)


def _warps(numbers: Iterator[int]) -> WarpLayout:
    return WarpLayout(*itertools.islice(numbers, 4))


def _read_conv(numbers: Iterator[int]) -> ConvPlan:
    return ConvPlan(_pair(numbers), _pair(numbers), _warps(numbers), *numbers, Clocks(0, 0))


def _read_wgmma(numbers: Iterator[int]) -> WgmmaPlan:
    layout = GroupLayout(_pair(numbers), *itertools.islice(numbers, 3))
    return WgmmaPlan(layout, _pair(numbers), *numbers, Clocks(0, 0))


def _read_bottleneck(numbers: Iterator[int]) -> BottleneckPlan:
    tile, tiles, layouts = _pair(numbers), _pair(numbers), (_warps(numbers), _warps(numbers), _warps(numbers))
    return BottleneckPlan(tile, tiles, layouts, *numbers, Clocks(0, 0))


def _conv(*precisions: str) -> Kind:
    return Kind(
        "conv", precisions, "plan_conv", lambda case, limits: conv_plans(case.conv, limits), _read_conv, _conv_clocks
    )


def _wgmma(*precisions: str) -> Kind:
    return Kind(
        "conv",
        precisions,
        "plan_wgmma",
        lambda case, limits: wgmma_plans(case.conv, limits),
        _read_wgmma,
        _wgmma_clocks,
    )


def _bottleneck(*precisions: str) -> Kind:
    def plans(case: Case, limits: DeviceLimits) -> Iterable[BottleneckPlan]:
        return bottleneck_plans(case.bottleneck, limits)

    return Kind("bottleneck", precisions, "plan_bottleneck", plans, _read_bottleneck, _bottleneck_clocks)


#: By what they are called on the command line.
KINDS = {
    "conv": _conv("tf32", "float16"),
    "conv-float32": _conv("float32"),
    "wgmma": _wgmma("tf32", "float16"),
    "bottleneck": _bottleneck("tf32", "float16"),
    "bottleneck-float32": _bottleneck("float32"),
}


def cases_of(network: Network) -> Iterator[tuple[Case, Any]]:
    """Cases of a network, each number of blocks once, and their masks."""
    sizes, seen = network.block_sizes(quick=False)[::SIZES], set()
    for sparsity, bsize in itertools.product(FEW_SPARSITIES, sizes):
        mask = top_left_case(sparsity).make(*network.shape[1:3])
        case = Case(network, bsize, int(active_blocks(mask, network.params(bsize)).sum()))
        if case not in seen:
            seen.add(case)
            yield case, mask


def promising(kind: Kind, case: Case, limits: DeviceLimits) -> list[Any]:
    """The plans that the model takes for fastest, not too many of them alike."""
    plans = [plan for plan in kind.plans(case, limits) if are_enough(case.rows * plan.ctas, plan.resident, limits)]
    found, alike = list[Any](), Counter[Any]()
    for _, _, plan in sorted((clocks, k, plans[k]) for k, clocks in enumerate(kind.clocks(plans, case, limits))):
        likeness = numbers_of(plan)[:2], plan.resident
        alike[likeness] += 1
        if alike[likeness] <= MOST_ALIKE:
            found.append(plan)
    return found[:MOST_PLANS]


@contextlib.contextmanager
def followed(kind: Kind, plan: Any) -> Iterator[None]:
    """Let the library follow this plan, whatever it expects of others."""
    from sbnet_cupy import _bottleneck, _conv, _fused

    names = {k.planner for k in KINDS.values() if k.network == kind.network}
    before = {name: getattr(_fused, name) for name in names}
    try:
        for name in names:
            answer = (plan, 0.0) if name == kind.planner else (None, math.inf)
            setattr(_fused, name, lambda *_, answer=answer: answer)
        for module in (_conv, _bottleneck):
            module.prepare.cache_clear()
        yield
    finally:
        for name, planner in before.items():
            setattr(_fused, name, planner)
        for module in (_conv, _bottleneck):
            module.prepare.cache_clear()


def compile_plans(kind: Kind, work: Sequence[tuple[Call, Sequence[Any]]]) -> None:
    """Compile what calls launch by plans, side by side: they are made with launches that only take notes."""
    from sbnet_cupy import _jit

    asked: dict[Any, None] = {}
    before = _jit.launch_early, _jit.ctas_that_fit
    _jit.launch_early = lambda instance, *_: asked.setdefault(instance)  # type: ignore[assignment]
    _jit.ctas_that_fit = lambda *_: 2  # asks the driver, once compiled
    try:
        for call, plans in work:
            for plan in plans:
                with followed(kind, plan):
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
        plans = {_row_of(case, plan): plan for plan in promising(kind, case, limits)}
        missing = {row: plan for row, plan in plans.items() if row not in known}
        if missing:
            sparse = Sparse(scene, mask, network.params(case.bsize), engine="fused")
            work.append((sparse, functools.partial(sparse.in_place, 0, sparse.indices), missing))
    compile_plans(kind, [(call, list(plans.values())) for _, call, plans in work])
    for sparse, call, plans in work:
        for row, plan in plans.items():
            with followed(kind, plan):
                contender = sparse.contender()
                right = contender.check([call()])
                timing = time_captured([call], REPEATS, run.stream, before=sparse.restore)
            yield *row, f"{timing.median_us:.3f}", str(right)


def _row_of(case: Case, plan: Any) -> tuple[str, ...]:
    """The first columns of the record."""
    return case.network.name, str(case.bsize), str(case.rows), " ".join(map(str, numbers_of(plan)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Returns 1 where a result was wrong."""
    from sbnet_cupy import _jit

    parser = argparse.ArgumentParser(
        prog="python -m bench.plans", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="only networks whose name this finds")
    parser.add_argument("--output", type=Path, default=RESULTS / "plans", help="folder (default: bench/results/plans)")
    options = parser.parse_args(arguments)
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
        print(f"bench.plans: error: {len(wrong)} of {len(added)} results were wrong, the first of {wrong[0]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
