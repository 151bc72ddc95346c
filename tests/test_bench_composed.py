"""Times of the composed engine, and the model that is fitted to them."""

from __future__ import annotations

import contextlib
import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_device import fake_run

from bench import composed, fit, networks, plans, stages, timing
from bench.network_data import Scene
from bench.options import no_device
from bench.plan_kinds import Case
from sbnet_cupy._composed_clocks import ConvSize

SMALL = stages.Stage("small", 24, 32, 32, 16, (7, 9))


def write(path: Path, rows: list[tuple[Case, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(composed.COLUMNS)
        for case, us in rows:
            writer.writerow([case.network.name, case.bsize, case.rows, us, True, "a device"])


def cases(precision: str) -> list[Case]:
    found = [network for network in composed.every_network() if network.precision.name == precision]
    return [case for network in found[::3] for case, _ in plans.cases_of(network)][::4]


def test_networks_are_those_of_the_benchmark() -> None:
    found = composed.every_network()
    assert {network.kind for network in found} == {"conv", "bottleneck"}
    assert {network.precision.name for network in found} == set(composed.NUMBERS)
    assert len(found) == 2 * 3 * len(stages.STAGES)


@pytest.mark.parametrize("precision", composed.NUMBERS)
def test_numbers_are_found_again(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times that the model itself gives, with a number changed: it is what fits, and nothing stays changed."""
    numbers = composed.NUMBERS[precision]
    before, changed = [number.value for number in numbers], numbers[3:4]
    with fit.as_they_were(changed):
        changed[0].put(changed[0].value * 1.3)
        write(tmp_path / "record.csv", [(case, composed.composed(case) / fit.MHZ) for case in cases(precision)])
    record = composed.Measured(tmp_path / "record.csv", precision)
    assert float(np.abs(np.log(record.expected() / record.times)).mean()) > 0.002
    with fit.as_they_were(changed):
        fit.fit(changed, record)
        assert changed[0].value == pytest.approx(1.3 * before[3], rel=0.01)
        assert "expected 1.000 of the time" in record.report()
    assert [number.value for number in numbers] == before


def test_a_fit_is_printed_for_each_precision(capsys: pytest.CaptureFixture[str]) -> None:
    before = [number.value for numbers in composed.NUMBERS.values() for number in numbers]
    assert composed.main(["--fit"]) == 0
    assert [number.value for numbers in composed.NUMBERS.values() for number in numbers] == before
    printed = capsys.readouterr().out
    for name in (*composed.NUMBERS, "_composed_clocks._FLOAT32 matrix", "_composed_clocks._TF32 call"):
        assert name in printed


@pytest.mark.parametrize("kind", ["conv", "bottleneck"])
@pytest.mark.parametrize("precision", stages.PRECISIONS, ids=lambda precision: precision.name)
def test_the_model_is_asked_for_the_stacks_of_a_call(
    kind: str, precision: stages.Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Any]()
    monkeypatch.setattr(composed, "composed_clocks", lambda *arguments: asked.append(arguments) or 1.0)
    network = stages.Network(kind, SMALL, precision)
    assert composed.composed(Case(network, 9, 5)) == 1.0
    ((convs, itemsize, tf32, multiprocessors),) = asked
    assert (itemsize, tf32, multiprocessors) == (2 if precision.name == "float16" else 4, precision.tf32, 132)
    assert [conv.size for conv in convs] == [ConvSize.of(shape) for shape in network.layers]
    whole, tile = 5 * 9 * 9, 5 * 7 * 7
    pixels = [(whole, tile)] if kind == "conv" else [(whole, whole), (whole, tile), (tile, tile)]
    assert [(conv.source, conv.target) for conv in convs] == pixels


def test_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(stages, "STAGES", (SMALL,))
    monkeypatch.setattr(plans, "FEW_SPARSITIES", (0.9,))
    monkeypatch.setattr(composed, "start_run", lambda quick: contextlib.nullcontext(fake_run()))
    monkeypatch.setattr(composed, "free_memory", lambda: None)
    monkeypatch.setattr(composed, "no_device", lambda: "")
    monkeypatch.setattr(composed, "compile_ahead", lambda *_: None)
    monkeypatch.setattr(composed, "machine", lambda: {"device": "a device"})
    monkeypatch.setattr(composed, "time_captured", lambda *_, **__: timing.Timing(12.3456, 1, 1, 5, "graph"))
    monkeypatch.setattr(composed, "Scene", lambda _, network: Scene(np, network))
    monkeypatch.setattr(networks.Sparse, "options", {"engine": "composed"})
    path = tmp_path / "plans" / "record.csv"
    assert composed.main(["--record", str(path)]) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert list(rows[0]) == list(composed.COLUMNS)
    assert {(row["right"], row["us"], row["device"]) for row in rows} == {("True", "12.346", "a device")}
    assert len({row["network"] for row in rows}) == 2 * len(stages.PRECISIONS)
    monkeypatch.setattr(networks.Sparse, "_are_right", lambda *_: False)
    assert composed.main(["--record", str(path)]) == 1
    printed = "".join(capsys.readouterr())
    for text in (f"{path}: {len(rows)} problems", f"error: {len(rows)} results were wrong"):
        assert text in printed


@pytest.mark.skipif(not no_device(), reason="there is a device")
def test_a_device_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert composed.main([]) == 1
    assert "bench.composed: error: the engine is timed on a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("precision", composed.NUMBERS)
def test_the_record_is_as_good_as_the_page_says(precision: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    problems, mean, error = re.findall(r"\d[\d.]*\d", composed.Measured(composed.PATH, precision).report())
    assert f"| {precision} | {problems} | {mean} | {error} |" in text
