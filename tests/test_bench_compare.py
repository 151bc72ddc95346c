"""Two recorded runs, beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import compare, versions
from bench.record import RESULTS
from bench.table import OURS


def write(folder: Path, times: dict[tuple[str, int], float], kind: str = "conv", **others: Any) -> Path:
    """A record of one network, by mask and block size."""
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "case": f"a {kind}, {mask}",
            "implementation": OURS,
            "median_us": us,
            "check": "equal",
            "parameters": {"role": "sweep", "mask": mask, "bsize": bsize},
            **others,
        }
        for (mask, bsize), us in times.items()
    ]
    for each in ("conv", "bottleneck"):
        results = rows if each == kind else []
        (folder / f"{each}.json").write_text(json.dumps({"machine": {"device": "a card"}, "results": results}))
    return folder


def test_what_became_slower_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(
        tmp_path / "before", {("roads", 18): 10.0, ("roads", 20): 8.0, ("vessels", 18): 5.0, ("all", 6): 1.0}
    )
    after = write(
        tmp_path / "after", {("roads", 18): 5.0, ("roads", 20): 16.0, ("vessels", 18): 5.0, ("roads", 7): 4.0}
    )
    compare.main([str(before), "--record", str(after)])
    assert capsys.readouterr().out.splitlines() == [
        "every block size that both have",
        "conv, 3 rows: 1.000 of the time of the other record (geometric mean); more than 5 % faster: 1, slower: 1",
        "  2.000  a conv, roads, blocks of 20",
        "each mask at its best block size (0: whichever)",
        "conv, 2 rows: 0.707 of the time of the other record (geometric mean); more than 5 % faster: 1, slower: 0",
    ]


@pytest.mark.parametrize(
    "others",
    [
        {"implementation": "dense"},
        {"median_us": None},
        {"parameters": {"role": "detail", "mask": "roads", "bsize": 18}},
    ],
)
def test_other_figures_are_left_out(tmp_path: Path, others: dict[str, Any]) -> None:
    assert len(versions.recorded(compare.ROLES, write(tmp_path, {("roads", 18): 5.0}))) == 1
    assert not versions.recorded(compare.ROLES, write(tmp_path, {("roads", 18): 5.0}, **others))


def test_the_committed_record_can_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """With itself: nothing differs, and every stage of both kinds is in it."""
    compare.main([str(RESULTS)])
    lines = [line for line in capsys.readouterr().out.splitlines() if ", " in line]
    assert len(lines) == 4
    assert all("rows: 1.000 of the time" in line and line.endswith("faster: 0, slower: 0") for line in lines)
