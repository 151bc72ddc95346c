"""The table that is made of what NVIDIA's profiler prints."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import under_ncu

COLUMNS = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size"]
COLUMNS += ["Grid Size", "Device", "CC", "Section Name", "Metric Name", "Metric Unit", "Metric Value"]

#: The kernels of the first two cases, of the mask and of the first networks, with time, bytes read and bytes written
#: as the profiler says them: a number below 1000, or one with commas, and its unit.
KERNELS = [
    ("void gather_tiled<4, unsigned int, 18, 18, 1, 4, 4>(Transfer)", ("ns", "354,016"), ("byte", "600,512,320")),
    ("cover_last(Transfer, Cover)", ("us", "2.21"), ("Kbyte", "12.54")),
    ("void scatter<Overwrite<16>, unsigned int, 16, 16, 0, 0>(Transfer, Cover)", ("ms", "1.25"), ("Gbyte", "1.07")),
    ("void block_activity<float, MaxPool, 4>(Reduction)", ("nsecond", "3,456"), ("Mbyte", "1.12")),
    ("compact_active(Reduction)", ("msecond", "0.04"), ("byte", "0")),
    ("void conv_wgmma<float, Warpgroups<1, 1, 1, 3, 1>, 1>(Conv)", ("us", "5.5"), ("byte", "0")),
    ("void conv<TensorCores<__half>, Warps<1, 3, 8, 1>, 1>(Conv)", ("us", "4.5"), ("byte", "0")),
]


def output() -> str:
    """What ``ncu --csv`` prints, between words of its own and of the program: all text in quotes, a row a metric."""
    rows = [COLUMNS]
    for number, (kernel, time, read) in enumerate(KERNELS):
        values = dict.fromkeys(under_ncu.METRICS, ("%", "12.345"))
        values |= {
            "gpu__time_duration.sum": time,
            "dram__bytes_read.sum": read,
            "dram__bytes_write.sum": ("Mbyte", "1,653.84"),
            "launch__registers_per_thread": ("register/thread", "28"),
        }
        launch = ["1", "7", "(256, 1, 1)", "(4096, 1, 1)", "0", "9.0", "Command line profiler metrics"]
        for metric, value in sorted(values.items()):
            rows.append([str(number), "4242", "python3.12", "127.0.0.1", kernel, *launch, metric, *value])
    lines = [",".join(f'"{text}"' for text in row) for row in rows]
    return "\n".join(["==PROF== Connected to process 4242", *lines[:5], "hello", *lines[5:], "==PROF== Disconnected"])


def write_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    def run(command: list[str], **_: Any) -> Any:
        assert command[0] == "ncu"
        assert command[-2:] == ["bench.under_ncu", "--cases"]
        assert command[command.index("--metrics") + 1].split(",") == list(under_ncu.METRICS)
        return SimpleNamespace(stdout=output())

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(under_ncu, "CASES", under_ncu.CASES[:2])
    under_ncu.profile(folder / "ncu.csv")
    with (folder / "ncu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_each_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_table(tmp_path, monkeypatch)
    assert [row["kernel"] for row in rows] == [kernel for kernel, *_ in KERNELS]
    for row in rows:
        assert list(row) == ["case", "kernel", *under_ncu.METRICS.values()]
        assert (row["DRAM %"], row["issue %"], row["warps %"]) == ("12.3", "12.3", "12.3")
        assert (row["written MB"], row["registers"]) == ("1653.8", "28.0")


def test_units_become_microseconds_and_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_table(tmp_path, monkeypatch)
    assert [row["us"] for row in rows] == ["354.0", "2.2", "1250.0", "3.5", "40.0", "5.5", "4.5"]
    assert [row["read MB"] for row in rows] == ["600.5", "0.0", "1070.0", "1.1", "0.0", "0.0", "0.0"]


def test_a_case_ends_with_its_last_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_table(tmp_path, monkeypatch)
    assert [row["case"] for row in rows] == [
        "case L: gather, transpose",
        "case L: scatter",
        "case L: scatter",
        "mask 1x400x700, capacity",
        "mask 1x400x700, capacity",
        "conv resnet-v2 400x700x24 tf32",
        "conv resnet-v2 400x700x24 float16",
    ]


def test_an_unknown_unit_is_an_error() -> None:
    lines = [line.replace('"ns"', '"min"') for line in output().splitlines() if line.startswith('"')]
    with pytest.raises(ValueError, match=r"gpu__time_duration\.sum: expected a unit of ns, .*, got 'min'"):
        under_ncu.table(lines)
