"""The benchmark of PyTorch models, on a CPU with small images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_device import fake_run

torch = pytest.importorskip("torch")

from bench import torch_model  # noqa: E402
from bench.table import OURS  # noqa: E402
from bench.timing import Timing  # noqa: E402
from bench.torch_model import DENSE, ModelCase, Scene  # noqa: E402

CASES = [replace(case, shape=(1, 8, 40, 50), tile=8) for case in torch_model.cases(quick=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_contenders_are_right_and_mistakes_are_noticed(case: ModelCase) -> None:
    scene = Scene(case, "cpu")
    assert 0 < scene.capacity < 35
    with torch.no_grad():
        shifted = scene.dense(torch.roll(scene.x, 1, 3))
    assert scene.error(shifted) > 10 * scene.tolerance > 0
    for name in (OURS, DENSE[0]):
        contender = scene.contender(name)
        (y,) = [call() for call in contender.calls]
        assert contender.check([y])
        wrong = y.clone()
        wrong[0, 0, 0, 0] += 1.01 * scene.tolerance + scene.error(y)
        assert not contender.check([wrong])
        beside = y.clone()
        beside[0, 0, -1, -1] += 1  # which is not active
        assert contender.check([beside])


def test_speedups_are_over_the_faster_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def scene(case: ModelCase, device: str) -> Any:
        assert device == "cuda"
        return Scene(case, "cpu")

    times = iter([Timing(us, us, us, 5, "events") for us in (50.0, 100.0, 80.0)])
    monkeypatch.setattr(torch_model, "find_torch", lambda: torch)
    monkeypatch.setattr(torch_model, "Scene", scene)
    monkeypatch.setattr(Scene, "names", (OURS, *DENSE))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch_model, "event_clock", lambda calls, run: next(times))
    rows = torch_model.measure(CASES[0], fake_run())
    assert [(row.implementation, row.speedup, row.check) for row in rows] == [
        (OURS, 80 / 50, "equal"),
        (DENSE[0], 80 / 100, "equal"),
        (DENSE[1], 1.0, "equal"),
    ]


def test_without_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_model, "find_torch", lambda: None)
    rows = [row for _, work in torch_model.tasks(fake_run()) for row in work()]
    assert {row.note for row in rows} == {"PyTorch not installed"}
    assert len(rows) == 6
    assert not any(row.failed for row in rows)


@pytest.mark.gpu
def test_a_quick_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.timing import start_run

    monkeypatch.setattr(torch_model, "cases", lambda quick: CASES)
    with start_run(quick=True) as run:
        rows = [row for _, work in torch_model.tasks(run) for row in work()]
    assert len(rows) == 8
    assert {row.check for row in rows} == {"equal"}
    assert all(row.speedup for row in rows)
