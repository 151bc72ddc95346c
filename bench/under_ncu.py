"""Why kernels take as long as they do: cases that miss their goals, one call each, for NVIDIA's profiler.

``python -m bench.under_ncu`` starts ``ncu`` on itself, prints what bounds each kernel, and writes
``bench/results/ncu.csv``.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cases import CASE_L, Mask, Transfer
from .data import Expected, make_inputs, make_mask
from .gather_scatter import library
from .network_data import Scene
from .networks import Sparse
from .record import RESULTS
from .reduce_mask import library as mask_library
from .stages import GOAL_SPARSITY, PRECISIONS, STAGES, Network, top_left_case

#: Metrics of the profiler, and what they are called in the table.
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "dram__bytes_read.sum": "read MB",
    "dram__bytes_write.sum": "written MB",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": "L2 %",
    "l1tex__throughput.avg.pct_of_peak_sustained_elapsed": "L1 %",
    "sm__inst_issued.avg.pct_of_peak_sustained_elapsed": "issue %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
}
#: Units of the profiler, by their names in its older and newer versions, in those of the table.
SCALE = {
    **dict.fromkeys(("ns", "nsecond"), 1e-3),
    **dict.fromkeys(("us", "usecond"), 1.0),
    **dict.fromkeys(("ms", "msecond"), 1e3),
    **{"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3},
    **{"%": 1.0, "register/thread": 1.0},
}

_TILE: dict[str, Any] = {"bsize": (16, 16), "boffset": (0, 0)}
_SMALL: dict[str, Any] = {"shape": (1, 400, 700, 96), "density": 0.1}
_FEW: dict[str, Any] = {"shape": (32, 1024, 1024, 3)}
_BYTES: dict[str, Any] = {"shape": (8, 1024, 1024, 128), "dtype": "uint8"}

CASES = [
    Transfer("case L: gather, transpose", "gather", CASE_L, transpose=True),
    Transfer("case L: scatter", "scatter", CASE_L, **_TILE),
    Transfer("case L: scatter, transpose", "scatter", CASE_L, transpose=True, **_TILE),
    Transfer("400x700x96: gather", "gather", **_SMALL),
    Transfer("400x700x96: scatter", "scatter", **_SMALL, **_TILE),
    Transfer("gather, NCHW memory", "gather", CASE_L, nchw=True),
    Transfer("gather, NCHW memory, transpose", "gather", CASE_L, nchw=True, transpose=True),
    Transfer("blocks 18: scatter, NCHW memory, transpose", "scatter", nchw=True, transpose=True, bstride=(18, 18)),
    Transfer("C = 3: scatter, add, overlapping", "add", **_FEW),
    Transfer("blocks 3: scatter, add, overlapping", "add", bsize=(3, 3), bstride=(2, 2)),
    Transfer("uint8: gather, transpose", "gather", **_BYTES, transpose=True),
    Transfer("uint8: scatter, add", "add", **_BYTES, **_TILE),
]
MASKS = [Mask("mask 1x400x700, capacity", (1, 400, 700), 0.1)]

#: Kind and stage of a network, and the size of its blocks.
_NETWORKS = [("conv", 0, 18), ("conv", 1, 10), *(("bottleneck", k, size) for k, size in enumerate((18, 10, 8, 5)))]
NETWORKS = [
    (Network(kind, STAGES[stage], precision), bsize) for kind, stage, bsize in _NETWORKS for precision in PRECISIONS[1:]
]


#: A case ends with one of these kernels; before it come those that prepare for it.
LAST_KERNEL = re.compile(
    r"\b(gather|gather_tiled|scatter|scatter_tiled|compact_active|conv|conv_wgmma|bottleneck|bottleneck_wgmma)\b"
)


def run_cases() -> None:
    """Call each case twice, the second time under the profiler's eyes."""
    import cupy

    for case in CASES:
        inputs = make_inputs(cupy, case, 1)
        profile_second(library(case, inputs, Expected(cupy, case, inputs)).calls[0])
        del inputs
        cupy.get_default_memory_pool().free_all_blocks()
    for case in MASKS:
        mask, blocks = make_mask(cupy, case, 0)
        profile_second(mask_library(case, [mask], [blocks], True).calls[0])
    for network, bsize in NETWORKS:
        mask = top_left_case(GOAL_SPARSITY).make(*network.shape[1:3])
        profile_second(Sparse(Scene(cupy, network), mask, network.params(bsize)).contender().calls[0])


def profile_second(call: Callable[[], Any]) -> None:
    """Call twice: the first call compiles."""
    import cupy

    call()
    cupy.cuda.Device().synchronize()
    cupy.cuda.profiler.start()
    call()
    cupy.cuda.Device().synchronize()
    cupy.cuda.profiler.stop()


def profile(output: Path) -> None:
    """Run the cases under the profiler, with the clocks and the caches as they are."""
    command = ["ncu", "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off", "--csv"]
    command += ["--metrics", ",".join(METRICS), sys.executable, "-m", "bench.under_ncu", "--cases"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = table([line for line in done.stdout.splitlines() if line.startswith('"')])
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["case", "kernel", *METRICS.values()])
        writer.writeheader()
        writer.writerows(rows)
    print(output.read_text())


def table(lines: list[str]) -> list[dict[str, str]]:
    """A row for each kernel, from the profiler's CSV of a row for each metric."""
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        metric, unit = row["Metric Name"], row["Metric Unit"]
        if unit not in SCALE:
            raise ValueError(f"{metric}: expected a unit of {', '.join(SCALE)}, got {unit!r}")
        kernel[METRICS[metric]] = f"{float(row['Metric Value'].replace(',', '')) * SCALE[unit]:.1f}"
    names = iter([*(case.name for case in [*CASES, *MASKS]), *(f"{n.kind} {n.name}" for n, _ in NETWORKS)])
    name = next(names)
    for kernel in kernels.values():
        kernel["case"] = name
        if LAST_KERNEL.search(kernel["kernel"]):
            name = next(names, "")
    return list(kernels.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", action="store_true", help="only run the cases")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV file (default: bench/results)")
    options = parser.parse_args()
    if options.cases:
        run_cases()
    else:
        profile(options.output / "ncu.csv")


if __name__ == "__main__":
    main()
