"""The benchmark of PyTorch models, on a CPU with small images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fake_device import fake_run

torch = pytest.importorskip("torch")

from bench import torch_model  # noqa: E402
from bench.table import OURS, Row  # noqa: E402
from bench.timing import Timing  # noqa: E402
from bench.torch_model import DENSE, ModelCase, Scene, Way, ways  # noqa: E402

CASES = [replace(case, shape=(1, 8, 40, 50), tile=8) for case in torch_model.cases(quick=True)[1:]]
SPARSE = Way(True)


def small(case: ModelCase, device: str) -> Scene:
    assert device == "cuda"
    return Scene(case, "cpu")


def replayed(call: Callable[[], Any]) -> Callable[[], Any]:
    """What a graph does: every replay writes the same tensor."""
    y = call().clone()
    return lambda: y.copy_(call())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
@pytest.mark.parametrize("captured", [False, True])
def test_contenders_are_right_and_mistakes_are_noticed(
    case: ModelCase, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_model, "capture", replayed)
    scene = Scene(case, "cpu")
    assert 0 < scene.counts[1] < scene.counts[0] < scene.capacity < 35
    for way, exact in ((SPARSE, scene.sparse[0]), (DENSE[0], scene.dense)):
        contender = scene.contender(replace(way, is_captured=captured))
        (y,) = [call() for call in contender.calls]
        assert contender.check([y])
        y = contender.calls[0]().clone()
        step = 1.01 * torch_model.TOLERANCE * float(exact.abs().max())
        for place in ((0, 0, 0, 0), (0, 0, -1, -1)):  # of an active tile, and of none
            wrong = y.clone()
            wrong[place] = exact[place] + step
            assert not contender.check([wrong])
            wrong[place] = exact[place] + 0.9 * step
            assert contender.check([wrong])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_what_is_expected_of_active_tiles(case: ModelCase) -> None:
    """That of the dense model far from inactive tiles, nothing elsewhere, and neither of the other mask."""
    scene = Scene(case, "cpu")
    wide = scene.x.double()
    for mask, exact in zip(scene.masks, scene.sparse, strict=True):
        tiles = torch_model.active_tiles(mask, 8)
        pixels = tiles.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :40, :50]
        assert bool((pixels[:, 0] >= mask).all())
        outside = torch.nn.functional.pad((~pixels).double(), (4,) * 4)
        far = torch.nn.functional.max_pool2d(outside, 9, 1) == 0
        assert far.any()
        torch.testing.assert_close(exact * far, scene.dense * far)
        left = exact if case.kind == "blocks" else exact - wide
        assert float((left * ~pixels).abs().max()) < 1e-6
        assert float((left * pixels).abs().max()) > 0.1


def test_a_graph_that_does_not_follow_the_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was captured with the number of tiles of the first mask."""

    def frozen(call: Callable[[], Any]) -> Callable[[], Any]:
        y = call()
        return lambda: y

    for case in CASES:
        scene = Scene(case, "cpu")
        for capture, right in ((replayed, True), (frozen, False)):
            monkeypatch.setattr(torch_model, "capture", capture)
            contender = scene.contender(Way(True, is_captured=True))
            assert contender.check([contender.calls[0]()]) is right
            assert torch.equal(scene.mask, scene.masks[0])


def test_too_little_room_is_noticed() -> None:
    scene = Scene(CASES[0], "cpu")
    scene.capacity = scene.counts[1]
    contender = scene.contender(SPARSE)
    assert not contender.check([contender.calls[0]()])


def test_models_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, compiled = Scene(CASES[1], "cpu"), []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    monkeypatch.setattr(torch_model, "capture", replayed)
    for way in ways(scene.case):
        contender = scene.contender(way)
        assert contender.check([call() for call in contender.calls])
    assert len(compiled) == 2
    assert scene.model in compiled


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured ones are compared with captured dense ones, the others with the others."""
    times = {Way(True): 50.0, Way(True, is_captured=True): 10.0}
    times |= dict(zip(DENSE, (100.0, 80.0, 60.0, 30.0), strict=True))
    clocks: list[tuple[str, bool]] = []

    def clock(captured: bool) -> Any:
        def time(calls: Any, run: Any) -> Timing:
            us = [times[way] for way in ways(CASES[0])][len(clocks)]
            clocks.append(("graph" if captured else "events", captured))
            return Timing(us, us, us, 5, clocks[-1][0])

        return time

    monkeypatch.setattr(torch_model, "find_torch", lambda: torch)
    monkeypatch.setattr(torch_model, "Scene", small)
    monkeypatch.setattr(torch_model, "capture", replayed)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch_model, "event_clock", clock(False))
    monkeypatch.setattr(torch_model, "replay_clock", clock(True))
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    rows = torch_model.measure(CASES[0], fake_run())
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32) == before
    dense = "PyTorch dense"
    assert [(row.implementation, row.clock, row.speedup, row.check) for row in rows] == [
        (OURS, "events", 80 / 50, "equal"),
        (f"{OURS}, captured", "graph", 30 / 10, "equal"),
        (dense, "events", 80 / 100, "equal"),
        (f"{dense}, compiled", "events", 1.0, "equal"),
        (f"{dense}, captured", "graph", 30 / 60, "equal"),
        (f"{dense}, compiled, captured", "graph", 1.0, "equal"),
    ]
    assert all("captured over the fastest captured" in row.description for row in rows)


def test_speedups_where_a_dense_model_failed() -> None:
    found = [Way(True), Way(True, is_captured=True), *DENSE]
    times = [10.0, 5.0, 40.0, None, None, None]
    rows = torch_model.with_speedups(found, [Row("case", w.name, median_us=us) for w, us in zip(found, times)])
    assert [row.speedup for row in rows] == [4.0, None, 1.0, None, None, None]


def test_a_scene_that_fails_is_told_in_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: ModelCase, device: str) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(torch_model, "find_torch", lambda: torch)
    monkeypatch.setattr(torch_model, "Scene", fail)
    rows = torch_model.measure(CASES[0], fake_run())
    assert [row.check for row in rows] == ["failed: RuntimeError: no memory"] * 6


def test_without_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_model, "find_torch", lambda: None)
    rows = [row for _, work in torch_model.tasks(fake_run()) for row in work()]
    assert {row.note for row in rows} == {"PyTorch not installed"}
    assert len(rows) == 6 + 6 + 8
    assert not any(row.failed for row in rows)


@pytest.mark.gpu
def test_a_quick_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.timing import start_run

    monkeypatch.setattr(torch_model, "cases", lambda quick: CASES)
    with start_run(quick=True) as run:
        rows = [row for _, work in torch_model.tasks(run) for row in work()]
    assert len(rows) == 6 + 8
    assert {row.check for row in rows} == {"equal"}
    assert {row.clock for row in rows} == {"events", "graph"}
    assert all(row.speedup for row in rows)
