"""Plans that are measured, and models that are fitted to them."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cpu_cuda
import numpy as np
import pytest
from fake_device import fake_run

from bench import fit, networks, plan_kinds, plans, stages, timing
from bench.network_data import Scene
from bench.plan_kinds import KINDS, Case, Kind, numbers_of
from bench.stages import PRECISIONS, Network
from sbnet_cupy import _fused, _jit
from sbnet_cupy._fused_bottleneck_plan import BottleneckPlan
from sbnet_cupy._fused_wgmma_bottleneck_plan import WgmmaBottleneckPlan

every_kind = pytest.mark.parametrize("name", KINDS)
HALF = PRECISIONS[2]


def precision_of(name: str) -> stages.Precision:
    return next(precision for precision in PRECISIONS if precision.name == name)


def cases(kind: Kind, chosen: Any = stages.STAGES[1:2]) -> list[Case]:
    measured = [Network(kind.network, stage, precision_of(name)) for stage in chosen for name in kind.precisions]
    return [case for network in measured for case, _ in plans.cases_of(network)]


def test_cases_are_told_apart_by_their_blocks() -> None:
    found = [case for case, _ in plans.cases_of(Network("conv", stages.STAGES[0], HALF))]
    assert len(found) == len(set(found)) > 10
    assert {case.bsize for case in found} <= set(found[0].network.block_sizes(quick=False))
    problem = Case(Network("conv", stages.STAGES[0], HALF), 18, 7).convs[0]
    assert (problem.block, problem.ksize, problem.packing.channels) == ((16, 16), (3, 3), 24)
    problem = Case(Network("bottleneck", stages.STAGES[0], HALF), 18, 7).bottleneck
    assert (problem.block, problem.channels, problem.inner, problem.itemsize) == ((16, 16), 96, 24, 2)


@every_kind
def test_promising_plans_differ_and_the_fastest_comes_first(name: str) -> None:
    kind = KINDS[name]
    for case in cases(kind):
        found = kind.promising(case, fit.H200)
        assert 0 < len(found) <= plan_kinds.MOST_PLANS
        assert len({numbers_of(plan) for plan in found}) == len(found)
        clocks = kind.clocks(found, case, fit.H200)
        assert clocks[0] == min(clocks)
        if "layers" not in name:
            alike = Counter((numbers_of(plan)[:2], plan.resident) for plan in found)
            assert max(alike.values()) <= plan_kinds.MOST_ALIKE


@every_kind
def test_numbers_say_all_of_a_plan_but_its_clocks(name: str) -> None:
    kind = KINDS[name]
    for case in cases(kind)[:3]:
        for plan in kind.promising(case, fit.H200):
            numbers = numbers_of(plan)
            assert all(isinstance(number, int) for number in numbers)
            assert numbers_of(kind.read(iter(numbers))) == numbers
            # The model answers alike for what was read again.
            read = kind.read(iter(numbers))
            assert kind.clocks([read], case, fit.H200) == kind.clocks([plan], case, fit.H200)


on_a_cpu = pytest.mark.skipif(
    bool(cpu_cuda.why_unavailable()) and not os.environ.get("CI"), reason="no kernels on a CPU here"
)

#: A network that is small enough for a CPU.
SMALL = stages.Stage("resnet-v2", 20, 24, 16, 16, (10, 10))


def scene_on(xp: Any, network: Network) -> Scene:
    """A scene whose arrays lie on what stands in for a device, which has no arithmetic; results are checked here."""
    host, scene = Scene(np, network), Scene(np, network)
    scene.xp, scene.image, scene.base = xp, xp.asarray(host.image), xp.asarray(host.base)
    for name in ("convs", "scales", "shifts"):
        setattr(scene, name, list(map(xp.asarray, getattr(host, name))))
    scene.is_right = lambda result, inside: host.is_right(result.get(), inside)  # type: ignore[method-assign]
    return scene


def layouts_of(plan: Any) -> list[tuple[Any, ...]]:
    """Of each launch."""
    if isinstance(plan, (BottleneckPlan, WgmmaBottleneckPlan)):
        return [plan.layouts]
    return [(step.layout,) for step in ((plan,) if hasattr(plan, "layout") else plan)]


@on_a_cpu
@every_kind
def test_a_plan_is_followed(name: str) -> None:
    """Whatever the model says of it; and no longer than it is to be."""
    kind = KINDS[name]
    network = Network(kind.network, SMALL, precision_of(kind.precisions[-1]))
    with cpu_cuda.recording() as launched:
        planners = [getattr(_fused, each.planner) for each in KINDS.values()]
        (case, mask), *_ = plans.cases_of(network)
        sparse = networks.Sparse(
            scene_on(sys.modules["cupy"], network), mask, network.params(case.bsize), engine="fused"
        )
        found = list(kind.promising(case, _jit.device_limits(0)))
        for plan in (*found, *found[::-1]):
            launched.clear()
            with plans.followed(kind, case, plan):
                sparse.in_place(0, sparse.indices)
            expressions = [one.expression for one in launched if re.search(r"conv|bottleneck", one.source)]
            for expression, layouts in zip(expressions, layouts_of(plan), strict=True):
                assert all(layout.expression in expression for layout in layouts)
        assert [getattr(_fused, each.planner) for each in KINDS.values()] == planners


@on_a_cpu
@every_kind
def test_plans_are_checked_and_recorded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By kernels on a CPU, with a clock that stands still."""
    kind = KINDS[name]
    monkeypatch.setattr(stages, "STAGES", (SMALL,))
    monkeypatch.setattr(plans, "FEW_SPARSITIES", (0.9,))
    monkeypatch.setattr(plan_kinds, "MOST_PLANS", 2)
    monkeypatch.setattr(plans, "start_run", lambda quick: contextlib.nullcontext(fake_run()))
    monkeypatch.setattr(plans, "free_memory", lambda: None)
    monkeypatch.setattr(plans, "no_device", lambda: "")
    monkeypatch.setattr(plans, "machine", lambda: {"device": "a device"})
    monkeypatch.setattr(plans, "time_captured", lambda *_, **__: timing.Timing(12.3456, 1, 1, 5, "graph"))
    monkeypatch.setattr(plans, "Scene", scene_on)
    with cpu_cuda.device():
        monkeypatch.setattr(_jit, "ctas_that_fit", lambda *_: 0)  # to a stack: CTAs do not run at the same time here
        ahead, launch, launched = list[Any](), _jit.launch_early, dict[Any, None]()
        monkeypatch.setattr(_jit, "compile_all", lambda instances, progress: ahead.extend(instances))
        monkeypatch.setattr(_jit, "launch_early", lambda *args: launched.setdefault(args[0]) or launch(*args))
        assert plans.main([name, "--output", str(tmp_path)]) == 0
        assert ahead == [instance for instance in launched if instance.source != "reduce_mask.cu"]
        monkeypatch.setattr(networks.Sparse, "_are_right", lambda *_: False)
        assert plans.main([name, "--output", str(tmp_path)]) == 0  # nothing is measured again
        only = kind.precisions[-1]
        assert plans.main([name, "--only", only, "--output", str(tmp_path / "wrong")]) == 1
    each = 3 if "layers" in name else 1 if name == "wgmma-bottleneck" else 2  # of which tiles have one size
    count = each * len(kind.precisions)
    printed = "".join(capsys.readouterr())
    for text in (f"{count} plans added to 0", f"0 plans added to {count}", f"{each} of {each} results were wrong"):
        assert text in printed
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
    assert list(rows[0]) == list(plans.COLUMNS)
    assert {(row["right"], row["us"], row["device"]) for row in rows} == {("True", "12.346", "a device")}
    assert [row["network"].split()[-1] for row in rows] == [name for name in kind.precisions for _ in range(each)]


def test_mistakes_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plans.main(["conv", "--only", "("])
    assert "--only: expected a regular expression, got '('" in capsys.readouterr().err
    monkeypatch.setattr(plans, "no_device", lambda: "it is gone")
    assert plans.main(["conv"]) == 1
    assert capsys.readouterr().err == "bench.plans: error: plans need a CUDA device: it is gone\n"


@pytest.mark.parametrize("name", [name for name, numbers in fit.NUMBERS.items() if numbers])
def test_numbers_are_found_again(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times that the model itself gives, with some numbers changed: they are what fits, and nothing stays changed."""
    kind, numbers = KINDS[name], fit.NUMBERS[name]
    measured = [(case, kind.promising(case, fit.H200)) for case in cases(kind, stages.STAGES[:4])[::5]]
    before, changed = [number.value for number in numbers], numbers[:1]
    with fit.as_they_were(numbers), (tmp_path / f"{name}.csv").open("w", newline="") as file:
        for number in changed:
            number.put(number.value * 1.3)
        writer = csv.writer(file)
        writer.writerow(plans.COLUMNS)
        for case, found in measured:
            for plan, clocks in zip(found, kind.clocks(found, case, fit.H200)):
                text = " ".join(map(str, numbers_of(plan)))
                writer.writerow([case.network.name, case.bsize, case.rows, text, clocks / fit.MHZ, True, "a device"])
    assert [number.value for number in numbers] == before
    record = fit.Measured(name, tmp_path / f"{name}.csv")
    error = float(np.abs(np.log(record.expected() / record.times)).mean())
    assert error > 0.002
    with fit.as_they_were(numbers):
        fit.fit(changed, record)
        assert [number.value for number in changed] == pytest.approx([1.3 * before[0]], rel=0.01)
        assert "expected 1.000 of the time" in record.report()
        assert "choice 1.0000 of the best" in record.report()
    fit.main([name, "--plans", str(tmp_path)]) if name == "bottleneck" else None
    assert [number.value for number in numbers] == before
    capsys.readouterr()


def test_a_kind_without_numbers_of_its_own_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    fit.main(["layers-float32"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("as it is: ")


#: What docs/performance.md calls the kinds.
ROWS = {
    "conv": "convolutions",
    "conv-float32": "convolutions, IEEE float32",
    "wgmma": "by warpgroups",
    "bottleneck": "bottlenecks",
    "bottleneck-float32": "bottlenecks, IEEE float32",
    "wgmma-bottleneck": "bottlenecks by warpgroups",
    "layers": "bottlenecks in three launches",
    "layers-float32": "in three launches, IEEE float32",
}


@every_kind
def test_the_record_is_as_good_as_the_page_says(name: str) -> None:
    root = Path(__file__).parents[1]
    record = root / "bench" / "results" / "plans" / f"{name}.csv"
    numbers = re.findall(r"[\d.]+", fit.Measured(name, record).report().replace("90th percentile", ""))
    plans_, problems, mean, error, pick, high = (number.rstrip(".") for number in numbers)
    cells = [plans_, problems, mean, error, f"{float(pick):.3f}, {high}"]
    assert f"| {ROWS[name]} | {' | '.join(cells)} |" in (root / "docs" / "performance.md").read_text(encoding="utf-8")
