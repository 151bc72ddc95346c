"""Hostile indices under compute-sanitizer: no access out of bounds, no race, no read of unwritten memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sbnet_cupy

pytestmark = pytest.mark.gpu
HERE = Path(__file__).parent


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_hostile_indices(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    calls = [sys.executable, str(HERE / "hostile.py"), *(["own-kernels"] if tool == "initcheck" else [])]
    result = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", *calls],
        env={**os.environ, "PYTHONPATH": str(Path(sbnet_cupy.__file__).parent.parent), "SBNET_CUPY_JIT": "lazy"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-5000:]
    assert re.search(r"\d+ results are right", output)
    assert re.search(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards", output), output[-5000:]
