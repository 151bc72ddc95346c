"""The examples, in a short version on a CPU and in a longer one on a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from examples import find_galaxies  # noqa: E402
from examples.find_galaxies import Settings  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Threads of small tensors wait for each other more than they work, where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def threshold_score(device: str) -> float:
    """The score of the mask itself: what a network has to beat."""
    picture, truth = (tensor.to(device) for tensor in find_galaxies.load())
    noise = torch.Generator(device).manual_seed(1)
    x = (picture + find_galaxies.NOISE * torch.randn(picture.shape, generator=noise, device=device))[None]
    brightness = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 7, 1, 3)
    return find_galaxies.f1(brightness - find_galaxies.LOOK, truth[None])


@pytest.mark.parametrize(
    "settings",
    [
        Settings(channels=16, blocks=2, crop=96, steps=60),
        pytest.param(Settings("cuda", channels=64, crop=512, batch=8, steps=300), marks=pytest.mark.gpu),
    ],
    ids=["cpu", "cuda"],
)
def test_sparse_training_scores_as_dense_training(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = find_galaxies.run(settings, tmp_path / "new")
    sparse, dense = outcomes["sparse"], outcomes["dense"]
    assert sparse.score > threshold_score(settings.device) + 0.1
    assert abs(sparse.score - dense.score) < 0.05
    for outcome in outcomes.values():
        assert len(outcome.losses) == settings.steps
        assert sum(outcome.losses[-10:]) < 0.5 * sum(outcome.losses[:10])
    assert (tmp_path / "new" / "find_galaxies.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"sparse  F1 {sparse.score:.3f}" in printed
    if settings.device == "cuda" and "PYTEST_XDIST_WORKER" not in os.environ:  # where other tests use the device, too
        assert sparse.seconds < dense.seconds


def test_a_third_of_the_tiles_is_looked_at() -> None:
    """What makes the steps of a sparse training shorter; and there is room for it."""
    picture, truth = find_galaxies.load()
    settings = Settings(crop=512, batch=8)
    x, _ = find_galaxies.crops(picture, truth, settings, np.random.default_rng(0))
    x = x + find_galaxies.NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    active = int(find_galaxies.where_to_look(x, settings.tile).rows.bin_counts[0])
    assert 0.25 < active / (8 * 32 * 32) < find_galaxies.ROOM


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(find_galaxies, "run", lambda **options: seen.update(options))
    find_galaxies.main(["--steps", "3", "--device", "cpu", "--output", str(tmp_path)])
    assert seen == {"settings": Settings(steps=3), "output": tmp_path}
