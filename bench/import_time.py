"""What ``import sbnet_cupy`` costs beyond ``import cupy`` and the CUDA context: ``python -m bench.import_time``.

Cold: CuPy's disk cache is empty, so the default set of kernels is compiled. Warm: it is read from the cache.
Lazy: nothing is built. Each figure is the median of several fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from .record import save

RUNS = 7

MEASURE = """
import json, time
begin = time.perf_counter()
import cupy
imported = time.perf_counter()
cupy.zeros(1)
cupy.cuda.Device().synchronize()
context = time.perf_counter()
import sbnet_cupy
done = time.perf_counter()
from sbnet_cupy import _jit
kernels = len(_jit.compiled())
print(json.dumps({"import cupy": imported - begin, "context": context - imported,
                  "import sbnet_cupy": done - context, "kernels": kernels}))
"""


def run(mode: str, cache: str) -> dict[str, float]:
    """Seconds of each stage in one fresh process."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env={**os.environ, "SBNET_CUPY_JIT": mode, "CUPY_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    times: dict[str, float] = json.loads(result.stdout)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for the JSON file (default: bench/results)")
    output = parser.parse_args().output
    rows = []
    with tempfile.TemporaryDirectory() as warm:
        run("import", warm)
        for case, mode in (("cold", "import"), ("warm", "import"), ("lazy", "lazy")):
            times = []
            for _ in range(RUNS):
                with tempfile.TemporaryDirectory() as empty:
                    times.append(run(mode, empty if case == "cold" else warm))
            seconds = sorted(time["import sbnet_cupy"] for time in times)
            row = {
                "case": case,
                "kernels": times[0]["kernels"],
                "median_s": statistics.median(seconds),
                "min_s": seconds[0],
                "max_s": seconds[-1],
                "import_cupy_s": statistics.median(time["import cupy"] for time in times),
                "context_s": statistics.median(time["context"] for time in times),
            }
            rows.append(row)
            print(
                f"{case:<5} {row['kernels']:>3.0f} kernels  {row['median_s']:.3f} s "
                f"({row['min_s']:.3f} to {row['max_s']:.3f}) beyond import cupy {row['import_cupy_s']:.2f} s "
                f"and context {row['context_s']:.2f} s"
            )
    print(save("import_time", rows, output))


if __name__ == "__main__":
    main()
