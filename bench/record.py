"""Where a figure came from: machine and versions, and the file that keeps both."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """Device, driver and versions of what takes part in a measurement."""
    import cupy
    import numpy

    import sbnet_cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    return {
        "date": date.today().isoformat(),
        "device": properties["name"].decode(),
        "cuda_driver": str(runtime.driverGetVersion()),
        "cuda_runtime": str(runtime.runtimeGetVersion()),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "sbnet_cupy": sbnet_cupy.__version__,
        "cupy": cupy.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def save(name: str, rows: Any, folder: Path | None = None) -> Path:
    """Write `rows` and :func:`machine` to ``NAME.json`` in `folder`, ``bench/results`` by default."""
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "results": rows}, indent=2) + "\n")
    return path
