"""``python -m bench``: run the benchmarks, print tables, and record JSON, CSV and plots.

gather-scatter  cases of sparse_gather and sparse_scatter beside the device copy, CuPy and PyTorch
reduce-mask     cases of reduce_mask beside CuPy and PyTorch
host            what a call of each op costs Python
sweep           bandwidth over block size, channels, density and dtype, with plots
conv            3x3 convolutions of active blocks beside dense and submanifold ones, with plots
bottleneck      residual bottlenecks of active blocks beside dense and submanifold ones, with plots
torch-model     PyTorch models on active tiles beside the same models on whole images
plots           draw the plots again from the recorded results
all             everything
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from . import gather_scatter, host, network_plots, networks, plots, reduce_mask, sweep, torch_model
from .options import no_device, pattern
from .record import RESULTS, save_rows
from .table import Row, Task, format_table, format_verdicts
from .timing import Run, free_memory, start_run

#: What each command measures. Files are named like the commands, with an underscore.
SUITES: dict[str, Callable[[Run], Iterator[Task]]] = {
    "gather-scatter": gather_scatter.tasks,
    "reduce-mask": reduce_mask.tasks,
    "host": host.tasks,
    "sweep": sweep.tasks,
    "conv": functools.partial(networks.tasks, "conv"),
    "bottleneck": functools.partial(networks.tasks, "bottleneck"),
    "torch-model": torch_model.tasks,
}
#: Suites with plots, and what draws them from a suite's JSON file into a folder.
PLOTS: dict[str, Callable[[Path, Path], list[Path]]] = {
    "sweep": plots.draw,
    "conv": network_plots.draw,
    "bottleneck": network_plots.draw,
}
#: Where parts of a run go, so that they do not replace the recorded results.
PARTIAL = Path("build") / "bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what `arguments` ask for. Returns 1 where a result of the library was wrong or missing."""
    options = parse(arguments)
    folder = output_folder(options)
    if options.command == "plots":
        return draw_plots(folder)
    reason = no_device()
    if reason:
        print(f"bench: error: the benchmarks need a CUDA device: {reason}", file=sys.stderr)
        return 1
    measured: list[Row] = []
    with start_run(options.quick) as run:
        for name in SUITES if options.command == "all" else (options.command,):
            rows = run_suite(name, run, options.only)
            print(f"\n{name}\n{format_table(rows)}")
            if not rows:
                continue
            for path in save_rows(name.replace("-", "_"), rows, folder, options.quick):
                print(path)
            if name in PLOTS:
                draw_plots(folder, [name])
            measured += rows
    print(f"\n{format_verdicts(measured)}")
    failed = sum(row.failed for row in measured)
    if failed:
        print(f"bench: error: {failed} results of this library were wrong or missing", file=sys.stderr)
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line as options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=[*SUITES, "plots", "all"], default="all", help="default: all")
    parser.add_argument("--quick", action="store_true", help="fewest repeats and sizes: within a minute or two")
    parser.add_argument(
        "--only", type=pattern, metavar="PATTERN", help="only cases whose name this regular expression finds"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"folder for the results (default: bench/results; with --quick or --only: {PARTIAL})",
    )
    return parser.parse_args(arguments)


def output_folder(options: argparse.Namespace) -> Path:
    """Where the files go. Only whole runs replace the recorded results without being told to."""
    if options.output:
        return Path(options.output)
    return PARTIAL if options.quick or options.only else RESULTS


def run_suite(name: str, run: Run, only: re.Pattern[str] | None) -> list[Row]:
    """Rows of all cases whose name `only` finds, with a progress bar on stderr."""
    chosen = [(case, work) for case, work in SUITES[name](run) if only is None or only.search(case)]
    rows: list[Row] = []
    with tqdm(chosen, name, unit="case") as progress:
        for case, work in progress:
            progress.set_postfix_str(case)
            rows += work()
            free_memory()
    return rows


def draw_plots(folder: Path, names: Sequence[str] = tuple(PLOTS)) -> int:
    """Draw the recorded results of these suites. Returns 1 where there are none."""
    found = [name for name in names if (folder / f"{name}.json").exists()]
    for name in found:
        for path in PLOTS[name](folder / f"{name}.json", folder):
            print(path)
    if not found:
        wanted = " or ".join(f"{name}.json" for name in names)
        print(f"bench: error: expected the results of a suite with plots in {folder}: {wanted}", file=sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    raise SystemExit(main())
