"""Where a figure came from: machine and versions, and the files that keep both."""

from __future__ import annotations

import csv
import dataclasses
import json
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from .rivals import find_torch
from .table import Row

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """Device, driver and versions of what takes part in a measurement."""
    import cupy
    import numpy

    import sbnet_cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    torch = find_torch()
    return {
        "date": date.today().isoformat(),
        "device": properties["name"].decode(),
        "cuda_driver": str(runtime.driverGetVersion()),
        "cuda_runtime": str(runtime.runtimeGetVersion()),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "sbnet_cupy": sbnet_cupy.__version__,
        "cupy": cupy.__version__,
        "numpy": numpy.__version__,
        "torch": str(torch.__version__) if torch else "not installed",
        "python": platform.python_version(),
    }


def save(name: str, rows: Any, folder: Path | None = None, **more: Any) -> Path:
    """Write `rows`, :func:`machine` and whatever else is given to ``NAME.json``, by default in ``bench/results``."""
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **more, "results": rows}, indent=2) + "\n")
    return path


def save_rows(name: str, rows: Sequence[Row], folder: Path, quick: bool) -> list[Path]:
    """Write ``NAME.json`` and ``NAME.csv``."""
    path = save(name, [dataclasses.asdict(row) for row in rows], folder, quick=quick)
    table = folder / f"{name}.csv"
    write_csv(table, rows, {**json.loads(path.read_text())["machine"], "quick": quick})
    return [path, table]


def write_csv(path: Path, rows: Sequence[Row], common: dict[str, Any]) -> None:
    """One line for each row: its fields, its parameters, and what is `common` to all."""
    lines = []
    for row in rows:
        fields = dataclasses.asdict(row)
        lines.append({**fields.pop("parameters"), **fields, **common})
    # Parameters differ from row to row: their columns come last but for the common ones.
    columns = [field.name for field in dataclasses.fields(Row) if field.name != "parameters"]
    columns += sorted({key for line in lines for key in line} - {*columns, *common})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *common], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
