"""The picture that the demonstration writes: what was skipped, and what both networks found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ._conv_geometry import Pair
from ._demo import Outcome, tile_pixels
from ._demo_errors import MissingDependency
from ._demo_network import BOTTLENECKS, COLOURS, DIRECTIONS

Array = np.ndarray[Any, Any]

#: One colour per direction, around the colour wheel: 2 + 4 cos(angle - angle of red, green or blue). Edges
#: excite neighbouring directions too; what is negative keeps their sum from turning white.
_HUES = [(6, 0, 0), (5, 3, -2), (2, 5, -1), (-1, 6, 1), (-2, 4, 4), (-1, 1, 6), (2, -1, 5), (5, -2, 3)]
#: Lightens faint features: display values are fractions of the strongest ones to this power.
_GAMMA = 0.7
#: Where the sparse network has to equal the dense one.
_EQUAL = np.array((20, 60, 50), np.uint8)
_OUTLINE = "#ffb000"
#: Outlines of more blocks would hide the picture.
_MOST_OUTLINES = 20_000
#: Height and width of the detail, as a share of the picture, and in tiles at least.
_DETAIL, _DETAIL_TILES = 0.16, 6


def require_matplotlib() -> None:
    """Raise, before any work is done, where :func:`draw` could not draw."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependency.of("matplotlib", error) from error


def draw(outcome: Outcome, path: Path) -> None:
    """Write a PNG of six panels: the whole picture above, a detail of both networks' features below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    height, width = outcome.mask.shape
    top, left, bottom, right = detail(outcome)
    panel_height = min(max(6.2 * height / width, 1.5), 12)  # inches, for a width of 6.2
    figure = Figure(figsize=(19, 2 * panel_height + 1.8), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    frame = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    outlines = block_outlines(outcome.active, outcome.tile)
    if len(outlines) > _MOST_OUTLINES:
        outlines = []
    axes = figure.subplots(2, 3)
    for ax, (title, image) in zip(axes.flat, panels(outcome), strict=True):
        ax.imshow(image)
        ax.set_title(title, fontsize=17)
        ax.set_axis_off()
    for ax in (axes[0, 1], *axes[1]):
        thin = 0.4 if ax is axes[0, 1] else 0.8
        ax.add_collection(LineCollection(outlines, colors=_OUTLINE, linewidths=thin), autolim=False)
    for ax in axes[0]:
        ax.add_collection(LineCollection([frame], colors="white", linewidths=2), autolim=False)
    for ax in axes[1]:
        ax.set_xlim(left, right)
        ax.set_ylim(bottom, top)
    figure.suptitle(headline(outcome), fontsize=23)
    figure.savefig(path, format="png", dpi=80)


def panels(outcome: Outcome) -> list[tuple[str, Array]]:
    """Title and pixels of each panel; those of a detail are whole, too."""
    height, width = outcome.mask.shape
    pixels = tile_pixels(outcome.active, outcome.tile, outcome.mask.shape)[:, :, np.newaxis]
    dense, sparse = colour(outcome.dense), colour(outcome.sparse)
    brightest = max(float(np.percentile(sparse.max(axis=2)[outcome.mask], 90)) if outcome.mask.any() else 0.0, 1.0)
    difference = levels(np.abs(dense - sparse), brightest)
    shaded = np.maximum(difference, outcome.certain[:, :, np.newaxis] * _EQUAL)
    rows, columns = outcome.tile
    blocks = f"{outcome.active_blocks} of {outcome.active.size}, each {columns} x {rows}"
    return [
        (f"Picture: {width} x {height} pixels", outcome.picture),
        (f"Active blocks: {blocks}", np.where(pixels, outcome.picture, outcome.picture // 4)),
        ("Result: contours, coloured by direction", levels(sparse, brightest)),
        ("Detail, sparse network", levels(sparse, brightest)),
        ("Detail, dense network", levels(dense, brightest)),
        ("Difference: none in the shaded area", shaded),
    ]


def colour(features: Array) -> Array:
    """A colour ``[H, W, 3]`` for each pixel's features, by direction."""
    by_direction = features.reshape(*features.shape[:2], COLOURS, DIRECTIONS).sum(axis=2)
    colours: Array = by_direction @ np.array(_HUES, features.dtype)
    return colours


def levels(image: Array, brightest: float) -> Array:
    """The image in 256 levels."""
    shares: Array = np.clip(image / brightest, 0, 1) ** _GAMMA
    return (255 * shares).astype(np.uint8)


def detail(outcome: Outcome) -> tuple[float, float, float, float]:
    """Edges (top, left, bottom, right) of the part with the most features, in the coordinates of ``imshow``."""
    strength = outcome.sparse.sum(axis=2, dtype=np.float64)
    size = [min(n, max(round(_DETAIL * n), _DETAIL_TILES * t)) for n, t in zip(strength.shape, outcome.tile)]
    sums = np.pad(strength, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    rows = sums[size[0] :] - sums[: -size[0]]
    windows = rows[:, size[1] :] - rows[:, : -size[1]]
    top, left = np.unravel_index(int(windows.argmax()), windows.shape)
    return top - 0.5, left - 0.5, top + size[0] - 0.5, left + size[1] - 0.5


def block_outlines(blocks: Array, tile: Pair) -> list[Any]:
    """A closed line around each active block, in the coordinates of ``imshow``."""
    lines = []
    for i, j in np.argwhere(blocks).tolist():
        top, left = i * tile[0] - 0.5, j * tile[1] - 0.5
        bottom, right = top + tile[0], left + tile[1]
        lines.append([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)])
    return lines


def headline(outcome: Outcome) -> str:
    """The picture's title: what was skipped, and whether the result agrees."""
    skipped = 1 - outcome.active_blocks / outcome.active.size
    if outcome.differing_pixels:
        return f"{skipped:.0%} of the blocks skipped, but the result is wrong in {outcome.differing_pixels} pixels"
    work = f"{BOTTLENECKS} bottlenecks, {skipped:.0%} of the blocks skipped"
    return f"{work}: exactly the dense network's result where it matters"
