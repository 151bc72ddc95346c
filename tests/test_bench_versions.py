"""The benchmark that compares versions: each has its own package, and what is slower is told."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import bench
from bench import versions
from bench.options import no_device
from bench.stages import REAL_MASKS, SPARSITIES, networks, top_left_case
from bench.versions import THIS, Timed

ROOT = Path(__file__).parents[1]


def timed(network: str, version: str, *times: float) -> list[Timed]:
    return [Timed("conv", network, "roads", 18, version, us, True, "a device") for us in times]


def test_cases_are_those_that_are_recorded() -> None:
    cases = versions.recorded_cases()
    assert len(cases) == len(set(cases)) > 200
    known = {(kind, network.name) for kind in ("conv", "bottleneck") for network in networks(kind, quick=False)}
    masks = {mask.name for mask in (*REAL_MASKS, *map(top_left_case, SPARSITIES))}
    assert {case[:2] for case in cases} == known
    assert {case[2] for case in cases} == masks


def test_a_version_brings_its_own_package(tmp_path: Path) -> None:
    (tmp_path / "sbnet_cupy").mkdir()
    (tmp_path / "sbnet_cupy" / "__init__.py").write_text("NAME = 'other'\n")
    (tmp_path / "bench").mkdir()
    code = "import sys, bench, sbnet_cupy; print(sbnet_cupy.NAME, bench.__file__, sys.stdin.read())"
    name, file, given = versions.run_version(tmp_path, code, "given").split()
    assert (name, given) == ("other", "given")
    assert Path(file).name == Path(bench.__file__ or "").name
    assert not Path(file).is_relative_to(tmp_path)


def test_what_is_slower_is_told() -> None:
    rows = [
        *timed("a", "old", 10.0, 9.0),
        *timed("b", "old", 4.0, 4.0),
        *timed("c", "old", 8.0),
        *timed("a", THIS, 9.0, 9.9),
        *timed("b", THIS, 6.0, 5.0),
        *timed("c", THIS, 4.0, 4.2),
        *timed("old alone", "old", 1.0),
        *timed("this alone", THIS, 2.0),
    ]
    first, *slower = versions.summary(rows)
    assert first == ("conv, 3 rows: 0.855 of the time of old (geometric mean); more than 5 % faster: 1, slower: 1")
    assert slower == ["  1.250  b, roads, blocks of 18"]


@pytest.mark.parametrize("text", ["old", "=.", f"{THIS}=.", "old=nowhere"])
def test_a_version_is_a_name_and_a_checkout(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=FOLDER"):
        versions.parse_version(text)
    assert versions.parse_version(f"old={ROOT}") == ("old", ROOT)


@pytest.mark.skipif(not no_device(), reason="for machines without a device")
def test_versions_need_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert versions.main([f"old={ROOT}"]) == 1
    assert "CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_case_is_timed() -> None:
    cases = [case for case in versions.recorded_cases() if case[:3] == ("conv", "resnet-v2 50x88x96 tf32", "roads")]
    code = "from bench.versions import time_cases; time_cases()"
    ((*case, us, right),) = json.loads(versions.run_version(ROOT, code, json.dumps(cases)))
    assert tuple(case) == cases[0]
    assert 1 < us < 1000
    assert right
