"""Speed-up over dense as pictures: over sparsity, a line for each stage; and over block size. From a suite's JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .stages import GOAL_SPARSITY

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D")

TITLES = {
    "conv": "3x3 convolution of active blocks",
    "bottleneck": "Residual bottleneck of active blocks",
}
#: What a row is there for, the column of its place on the horizontal axis, and that axis.
PICTURES = {
    "speedup": ("curve", "sparsity", "sparsity (top-left rectangle)"),
    "block_size": ("sweep", "bsize", f"block size in pixels, halo included (sparsity {GOAL_SPARSITY:g})"),
}

Line = tuple[list[float], list[float], list[float], list[float]]


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw the JSON file of a suite of networks into PNG files in `folder`."""
    recorded = json.loads(results.read_text(encoding="utf-8"))
    paths = []
    for name, (role, column, label) in PICTURES.items():
        rows = plotted(recorded["results"], role, column)
        if rows:
            path = folder / f"{results.stem}_{name}.png"
            picture = figure(rows, column, label, recorded["machine"]["device"], ideal=column == "sparsity")
            picture.savefig(path, dpi=120)
            paths.append(path)
    return paths


def plotted(rows: Sequence[dict[str, Any]], role: str, column: str) -> list[dict[str, Any]]:
    """Rows with this role that have a place and a speed-up, and whose result was right."""
    return [
        row
        for row in rows
        if row["parameters"].get("role") == role
        and row["parameters"].get(column) is not None
        and row["speedup"] is not None
        and row["check"] == "equal"
        # Of the sweeps, only that of the goals' mask.
        and (role != "sweep" or row["parameters"]["sparsity"] == GOAL_SPARSITY)
    ]


def series(rows: Sequence[dict[str, Any]], column: str) -> dict[str, Line]:
    """By stage, in the order of the rows: places, speed-ups, and how far the 10th and the 90th percentile lie away."""
    lines: dict[str, Line] = {row["parameters"]["stage"]: ([], [], [], []) for row in rows}
    for row in sorted(rows, key=lambda row: float(row["parameters"][column])):
        x, y, below, above = lines[row["parameters"]["stage"]]
        speedup = row["speedup"]
        x.append(float(row["parameters"][column]))
        y.append(speedup)
        # A long time is a low speed-up.
        below.append(speedup * (1 - row["median_us"] / row["high_us"]))
        above.append(speedup * (row["median_us"] / row["low_us"] - 1))
    return lines


def figure(rows: Sequence[dict[str, Any]], column: str, label: str, device: str, *, ideal: bool) -> Any:
    """A panel for each network and precision, as a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    networks, precisions = (list(dict.fromkeys(row["parameters"][key] for row in rows)) for key in _PANEL)
    picture = Figure(figsize=(4.6 * len(precisions) + 1, 4.2 * len(networks) + 1), layout="constrained")
    FigureCanvasAgg(picture)
    title = TITLES[rows[0]["parameters"]["kind"]]
    picture.suptitle(f"{title}: speed-up over the fastest dense network, {device}", fontsize=12)
    panels = picture.subplots(len(networks), len(precisions), sharex=True, squeeze=False)
    for network, line_of_panels in zip(networks, panels):
        for precision, axes in zip(precisions, line_of_panels):
            chosen = [row for row in rows if tuple(row["parameters"][key] for key in _PANEL) == (network, precision)]
            _draw_panel(axes, series(chosen, column), ideal)
            axes.set_title(f"{network}, {precision}", loc="left")
            axes.set_xlabel(label)
        line_of_panels[0].set_ylabel("times as fast as dense")
    return picture


_PANEL = ("network", "precision")


def _draw_panel(axes: Any, lines: dict[str, Line], ideal: bool) -> None:
    """One line for each stage, the dense network's speed, and the ideal."""
    for k, (stage, (x, y, below, above)) in enumerate(lines.items()):
        style = {"color": _COLOURS[k % len(_COLOURS)], "marker": _MARKERS[k % len(_MARKERS)]}
        axes.errorbar(x, y, (below, above), label=stage, markersize=5, linewidth=1.5, capsize=2, **style)
    if ideal and lines:
        measured = [place for x, *_ in lines.values() for place in x]
        places = np.linspace(min(measured), max(measured), 100)
        axes.plot(places, 1 / (1 - places), "k:", label="ideal, 1 / (1 - sparsity)")
        axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=0.5)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=8, frameon=False)
