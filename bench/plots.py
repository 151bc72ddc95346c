"""The sweeps as pictures, one for each parameter, drawn from ``sweep.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .cases import SWEEPS, VARIANTS
from .table import OURS

#: What the horizontal axis of each sweep shows.
AXES = {
    "block size": "block size in pixels (height x width where not square)",
    "channels": "channels",
    "density": "active blocks",
    "dtype": "dtype",
}
#: What the other parameters are, for the title.
HELD = {
    "block size": "128 channels, float32, half of the blocks active; overlapping ones by a ninth",
    "channels": "float32, blocks of 18 every 16 pixels (16 where scatter does not overlap), half of them active",
    "density": "128 channels, float32, blocks of 18 every 16 pixels (16 where scatter does not overlap)",
    "dtype": "128 channels, blocks of 18 every 16 pixels (16 where scatter does not overlap), half of them active",
}
PANELS = ("gather", "scatter")

# The colours of Okabe and Ito, which colour-blind readers can tell apart; rivals in greys.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v")
_GREYS = {"CuPy indexing": "#444444", "PyTorch indexing": "#777777", "PyTorch unfold + mask": "#AAAAAA"}


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw every sweep of the JSON file `results` into PNG files in `folder`."""
    recorded = json.loads(results.read_text(encoding="utf-8"))
    copy = [row["tbps"] for row in recorded["results"] if row["case"] == "device copy"]
    paths = []
    for sweep in SWEEPS:
        rows = [row for row in recorded["results"] if row["parameters"].get("sweep") == sweep and row["tbps"]]
        if rows:
            path = folder / f"sweep_{sweep.replace(' ', '_')}.png"
            figure(sweep, rows, copy[0] if copy else None, recorded["machine"]["device"]).savefig(path, dpi=120)
            paths.append(path)
    return paths


def figure(sweep: str, rows: list[dict[str, Any]], copy_tbps: float | None, device: str) -> Any:
    """One sweep as a matplotlib figure: gather on the left, scatter on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13, 6.4), layout="constrained")
    FigureCanvasAgg(picture)
    picture.suptitle(f"Bandwidth over {sweep}, {device}\n{HELD[sweep]}", fontsize=12)
    labels = list(dict.fromkeys(row["parameters"]["point"] for row in rows))
    panels = picture.subplots(1, 2, sharey=True)
    top = max([row["tbps"] for row in rows] + [copy_tbps or 0])
    for panel, axes in zip(PANELS, panels):
        lines = series([row for row in rows if row["parameters"]["variant"].startswith(panel)], labels)
        (_draw_bars if sweep == "dtype" else _draw_lines)(axes, lines, labels)
        if copy_tbps:
            axes.axhline(copy_tbps, color="black", linewidth=1, linestyle=":")
            axes.annotate(
                f"device copy: {copy_tbps:.2f} TB/s",
                (1, copy_tbps),
                (-4, 4),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
        axes.set_title(panel, loc="left")
        axes.set_xlabel(AXES[sweep])
        axes.set_xticks(range(len(labels)), labels)
        axes.set_ylim(0, 1.1 * top)
        axes.grid(axis="y", alpha=0.3)
        if lines:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=9)
    panels[0].set_ylabel("TB/s (median; bars: 10th to 90th percentile)")
    return picture


def series(rows: list[dict[str, Any]], labels: list[str]) -> dict[str, dict[str, Any]]:
    """Lines by name: places on the horizontal axis, TB/s, its spread, and how to draw the line."""
    variants = [variant for variant in VARIANTS if any(row["parameters"]["variant"] == variant for row in rows)]
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        ours = row["implementation"] == OURS
        variant = row["parameters"]["variant"]
        name = variant if ours else row["implementation"]
        if ours:
            k = variants.index(variant)
            style = {"color": _COLOURS[k % len(_COLOURS)], "marker": _MARKERS[k % len(_MARKERS)], "linestyle": "-"}
        else:
            style = {"color": _GREYS.get(name, "#777777"), "marker": "x", "linestyle": "--"}
        line = lines.setdefault(name, {"x": [], "tbps": [], "low": [], "high": [], "style": style})
        line["x"].append(labels.index(row["parameters"]["point"]))
        line["tbps"].append(row["tbps"])
        # A long time is a low bandwidth.
        line["low"].append(row["tbps"] * (1 - row["median_us"] / row["high_us"]))
        line["high"].append(row["tbps"] * (row["median_us"] / row["low_us"] - 1))
    return dict(sorted(lines.items(), key=lambda item: item[1]["style"]["linestyle"] == "--"))


def _draw_lines(axes: Any, lines: dict[str, dict[str, Any]], labels: list[str]) -> None:
    """A line through the squares or plain numbers; points alone for the rest."""
    ordered = sum("x" not in label for label in labels)
    for name, line in lines.items():
        order = np.argsort(line["x"])
        x, y, low, high = (np.array(line[key])[order] for key in ("x", "tbps", "low", "high"))
        style = {"markersize": 5, "linewidth": 1.5, "capsize": 2, **line["style"]}
        on_line = x < ordered
        axes.errorbar(x[on_line], y[on_line], (low[on_line], high[on_line]), label=name, **style)
        style["linestyle"] = ""
        axes.errorbar(x[~on_line], y[~on_line], (low[~on_line], high[~on_line]), **style)
    if ordered < len(labels):
        axes.axvline(ordered - 0.5, color="black", linewidth=0.5)


def _draw_bars(axes: Any, lines: dict[str, dict[str, Any]], labels: list[str]) -> None:
    """Bars side by side: dtypes have no order that a line could follow."""
    width = 0.85 / max(1, len(lines))
    for k, (name, line) in enumerate(lines.items()):
        x = np.array(line["x"]) + (k - (len(lines) - 1) / 2) * width
        hatch = "" if line["style"]["linestyle"] == "-" else "//"
        axes.bar(
            x,
            line["tbps"],
            width,
            yerr=(line["low"], line["high"]),
            label=name,
            color=line["style"]["color"],
            edgecolor="white",
            hatch=hatch,
            capsize=2,
        )
