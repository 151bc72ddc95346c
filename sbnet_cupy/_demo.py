"""The demonstration: find edges in the interesting blocks of a photograph, and skip the rest.

The work in short, for ``tile = (8, 8)`` and a mask with one value per pixel (:func:`sparse_edges`)::

    indices, counts = reduce_mask(mask, bcount, bsize=(8, 8), bstride=(8, 8), tol=tol)
    stack = sparse_gather(picture, counts, indices, bsize=(10, 10), boffset=(-1, -1), bstride=(8, 8))
    result = sparse_scatter(edges(stack), counts, indices, picture, bsize=(8, 8), bstride=(8, 8))
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._gather import sparse_gather
from ._reduce_mask import BlockIndices, reduce_mask
from ._scatter import sparse_scatter

Array = np.ndarray[Any, Any]

#: The Hubble deep field, from scikit-image's wheel: galaxies in some of the blocks, dark sky in most.
DEFAULT_IMAGE = "hubble_deep_field.jpg"
#: Of 8, 12, 16 and 24 pixels, 8 convolves the fewest pixels of the default picture, halos included: 22 %, and
#: 16 convolves 45 %. Its galaxies are small.
DEFAULT_BSIZE = 8
#: 0.5 cuts through the faint rims of galaxies; 0.3 takes in 30 % more blocks, many of them noise.
DEFAULT_TOL = 0.4
#: Timed runs of each kind, after one to warm up. The median of these is reported.
RUNS = 7
#: A 3x3 convolution reads one pixel beyond its tile on each side.
HALO = 1
#: Channel weights of brightness, (R + 2 G + B) / 4.
BRIGHTNESS = np.array([1, 2, 1], np.float32)


class DemoError(Exception):
    """A failure that the user can mend; the text is one line for stderr."""


class MissingDependency(DemoError):
    """An optional package is not installed."""


def _compass() -> Array:
    """Weights ``[3, 3, 3, 8]``: a Sobel filter on brightness, turned in eight steps of 45 degrees."""
    ring = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
    sobel = (1, 2, 1, 0, -1, -2, -1, 0)
    filters = np.zeros((3, 3, 8), np.float32)
    for turn in range(8):
        for (row, column), weight in zip(ring, np.roll(sobel, turn), strict=True):
            filters[row, column, turn] = weight
    return filters[:, :, np.newaxis, :] * BRIGHTNESS[:, np.newaxis]


#: One colour per direction, around the colour wheel: 2 + 4 cos(angle - angle of red, green or blue). Edges
#: excite neighbouring directions too; what is negative keeps their sum from turning white.
_HUES = [(6, 0, 0), (5, 3, -2), (2, 5, -1), (-1, 6, 1), (-2, 4, 4), (-1, 1, 6), (2, -1, 5), (5, -2, 3)]
#: The two layers of the network. Pixels are whole levels 0 to 255 and all weights small whole numbers, so
#: every float32 sum in it is exact (below 2**24), whatever order a matrix product adds in. That is why the
#: check can ask for equality, not closeness.
WEIGHTS = (_compass(), np.array(_HUES, np.float32).reshape(1, 1, 8, 3))


def convolve(x: Any, weights: Any, xp: Any) -> Any:
    """Convolve ``x [N, h, w, C]`` with ``weights [kh, kw, C, K]``, without padding."""
    kh, kw, channels, features = weights.shape
    n, height, width = x.shape[0], x.shape[1] - kh + 1, x.shape[2] - kw + 1
    total = xp.zeros((n * height * width, features), x.dtype)
    for dy in range(kh):
        for dx in range(kw):
            shifted = x[:, dy : dy + height, dx : dx + width]
            total += shifted.reshape(-1, channels) @ weights[dy, dx]
    return total.reshape(n, height, width, features)


def edges(x: Any, weights: tuple[Any, Any], xp: Any) -> Any:
    """Edges of ``x [N, h + 2, w + 2, 3]``, coloured by direction: ``[N, h, w, 3]``.

    A small network: a 3x3 convolution to eight directions, ReLU, a 1x1 convolution to a colour.
    """
    compass, hues = weights
    directions = xp.maximum(convolve(x, compass, xp), 0)
    return xp.clip(convolve(directions, hues, xp) / 32, 0, 255)


def whole_edges(picture: Any, weights: tuple[Any, Any], xp: Any) -> Any:
    """:func:`edges` of a whole picture ``[1, H, W, 3]``, zero-padded to keep its size."""
    return edges(xp.pad(picture, ((0, 0), (HALO, HALO), (HALO, HALO), (0, 0))), weights, xp)


def sparse_edges(
    picture: Any, mask: Any, tile: tuple[int, int], tol: float, weights: tuple[Any, Any], xp: Any
) -> tuple[Any, BlockIndices]:
    """:func:`edges` in the active tiles of a picture ``[1, H, W, 3]``; the plain picture elsewhere."""
    bcount = block_count(picture.shape[1:3], tile)
    active = reduce_mask(mask, bcount, bsize=tile, bstride=tile, tol=tol)
    stack = sparse_gather(
        picture,
        active.bin_counts,
        active.active_block_indices,
        bsize=(tile[0] + 2 * HALO, tile[1] + 2 * HALO),
        boffset=(-HALO, -HALO),
        bstride=tile,
    )
    result = sparse_scatter(
        edges(stack, weights, xp),
        active.bin_counts,
        active.active_block_indices,
        picture,
        bsize=tile,
        bstride=tile,
    )
    return result, active


def block_count(size: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """Number of tiles that cover `size` pixels; the last ones may hang over the edge."""
    return -(-size[0] // tile[0]), -(-size[1] // tile[1])


def content_mask(picture: Array) -> Array:
    """How far each pixel's brightness is from the picture's median: ``[1, H, W]``, 0 to 1."""
    brightness = picture @ BRIGHTNESS / BRIGHTNESS.sum()
    distance: Array = np.abs(brightness - np.median(brightness)) / 255
    return distance.astype(np.float32)[np.newaxis]


@dataclass(frozen=True)
class Outcome:
    """What one run of the demonstration found. Arrays are on the host."""

    picture: Array  # uint8 [H, W, 3]
    mask: Array  # bool [H, W]
    active: Array  # bool, one element per block
    result: Array  # uint8 [H, W, 3]
    tile: tuple[int, int]
    whole_seconds: float
    sparse_seconds: float
    differing_pixels: int
    largest_difference: float

    @property
    def active_blocks(self) -> int:
        return int(np.count_nonzero(self.active))

    @property
    def convolved_pixels(self) -> int:
        """Pixels of the gathered blocks, halos included."""
        return self.active_blocks * (self.tile[0] + 2 * HALO) * (self.tile[1] + 2 * HALO)


def run(picture: Array, bsize: int, tol: float, xp: Any) -> Outcome:
    """Find the edges both ways, time both, and compare.

    Parameters
    ----------
    picture : ndarray, shape (H, W, 3), uint8
        Picture on the host.
    bsize : int
        Height and width of a block in pixels; cut to the picture's size where it is larger.
    tol : float
        A block is active if any of its pixels has a brightness further than this from the median, as a
        fraction of full brightness.
    xp : module
        ``numpy`` or ``cupy``: where the work is done.
    """
    height, width = picture.shape[:2]
    tile = (min(bsize, height), min(bsize, width))
    mask = content_mask(picture)
    x, device_mask = xp.asarray(picture[np.newaxis], np.float32), xp.asarray(mask)
    weights = (xp.asarray(WEIGHTS[0]), xp.asarray(WEIGHTS[1]))

    (whole, (result, indices)), (whole_seconds, sparse_seconds) = time_in_turn(
        [
            lambda: whole_edges(x, weights, xp),
            lambda: sparse_edges(x, device_mask, tile, tol, weights, xp),
        ],
        xp,
    )
    result = to_host(result)[0]
    expected = expected_result(picture, mask[0] > tol, tile, to_host(whole)[0])
    difference = np.abs(result - expected).max(axis=2)
    active = np.zeros(block_count((height, width), tile), bool)
    active[tuple(to_host(indices.active_block_indices)[:, 1:].T)] = True
    return Outcome(
        picture=picture,
        mask=mask[0] > tol,
        active=active,
        result=result.astype(np.uint8),
        tile=tile,
        whole_seconds=whole_seconds,
        sparse_seconds=sparse_seconds,
        differing_pixels=int(np.count_nonzero(difference)),
        largest_difference=float(difference.max()),
    )


def expected_result(picture: Array, mask: Array, tile: tuple[int, int], whole: Array) -> Array:
    """`whole` in each tile that has a pixel of `mask`, `picture` elsewhere: NumPy, and none of the ops."""
    rows, columns = block_count((mask.shape[0], mask.shape[1]), tile)
    padding = (rows * tile[0] - mask.shape[0], columns * tile[1] - mask.shape[1])
    padded = np.pad(mask, ((0, padding[0]), (0, padding[1])))
    active = padded.reshape(rows, tile[0], columns, tile[1]).any(axis=(1, 3))
    pixels = active.repeat(tile[0], axis=0).repeat(tile[1], axis=1)[: mask.shape[0], : mask.shape[1]]
    return np.where(pixels[:, :, np.newaxis], whole, picture)


def time_in_turn(works: Sequence[Callable[[], Any]], xp: Any) -> tuple[list[Any], list[float]]:
    """Results of `works`, and the median time of each, from the call until the device has finished.

    They take turns, so that whatever else the machine does slows all of them alike.
    """
    results = [work() for work in works]  # warms up: compiles kernels and fills the memory pool
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(RUNS):
        for work, record in zip(works, seconds, strict=True):
            synchronize(xp)
            start = time.perf_counter()
            work()
            synchronize(xp)
            record.append(time.perf_counter() - start)
    return results, [statistics.median(record) for record in seconds]


def synchronize(xp: Any) -> None:
    """Wait for the device, where there is one."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def to_host(array: Any) -> Array:
    """`array` as a NumPy array."""
    host: Array = array if isinstance(array, np.ndarray) else array.get()
    return host


def choose_backend() -> tuple[Any, str]:
    """CuPy where it has a usable device, else NumPy, and a line that says which and why."""
    from ._jit import why_unavailable

    reason = why_unavailable()
    if reason:
        return np, f"NumPy {np.__version__} ({reason.splitlines()[0]})"
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    return cupy, f"CuPy {cupy.__version__} on {name}"


def load_picture(path: Path | None) -> tuple[str, Array]:
    """Name and pixels (uint8 ``[H, W, 3]``) of the image at `path`, or of the default picture."""
    if path is not None and not os.path.isfile(path):
        kind = "the directory " if os.path.isdir(path) else "no file: "
        raise DemoError(f"--image: expected an image file, got {kind}{str(path)!r}")
    try:
        import skimage
        from skimage.io import imread
    except ImportError as error:
        raise _missing("scikit-image", error) from error
    if path is None:
        path = Path(skimage.__file__).parent / "data" / DEFAULT_IMAGE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata and large files; the pixels are what counts
            raw = np.asarray(imread(path))
        if raw.ndim == 3 and raw.shape[2] == 4 and path.suffix.lower() in (".jpg", ".jpeg"):
            raw = cmyk_to_rgb(raw)  # JPEG has no alpha
        return path.name, to_rgb(raw)
    except Exception as error:  # each decoder raises its own kinds
        raise DemoError(f"--image: expected a readable image, got {str(path)!r}: {brief(error)}") from error


def cmyk_to_rgb(raw: Array) -> Array:
    """Inks (uint8 ``[H, W, 4]``: cyan, magenta, yellow, black) as uint8 ``[H, W, 3]`` on white paper."""
    light = 255 - raw.astype(np.uint32)
    return (light[:, :, :3] * light[:, :, 3:] // 255).astype(np.uint8)


def to_rgb(raw: Array) -> Array:
    """Decoded image of any kind as uint8 ``[H, W, 3]``: the first frame, without alpha."""
    while raw.ndim > 3 or (raw.ndim == 3 and raw.shape[2] > 4):
        raw = raw[0]
    if raw.ndim not in (2, 3) or raw.size == 0:
        raise ValueError(f"no picture in an array of shape {raw.shape}")
    levels = to_levels(raw)
    if levels.ndim == 3 and levels.shape[2] >= 3:
        return np.ascontiguousarray(levels[:, :, :3])
    gray = levels if levels.ndim == 2 else levels[:, :, 0]
    return np.repeat(gray[:, :, np.newaxis], 3, axis=2)


def to_levels(raw: Array) -> Array:
    """`raw` in 256 levels. Signed and floating images have no fixed white: their range is stretched."""
    if raw.dtype.kind == "b":
        levels = raw.astype(np.uint8) * np.uint8(255)
    elif raw.dtype.kind == "u":
        levels = raw >> (8 * raw.dtype.itemsize - 8)
    else:
        finite = np.nan_to_num(raw.astype(np.float64), posinf=0, neginf=0)
        low, high = finite.min(), finite.max()
        levels = (finite - low) * (255 / (high - low) if high > low else 0)
    return levels.astype(np.uint8)


def require_matplotlib() -> None:
    """Raise, before any work is done, where :func:`draw` could not draw."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise _missing("matplotlib", error) from error


def draw(outcome: Outcome, tol: float, path: Path) -> None:
    """Write a PNG of four panels: picture, mask, active blocks, result."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    height, width = outcome.mask.shape
    tile, blocks = outcome.tile, outcome.active
    pixels = blocks.repeat(tile[0], axis=0).repeat(tile[1], axis=1)[:height, :width, np.newaxis]
    dimmed = np.where(pixels, outcome.picture, outcome.picture // 4)
    panels = (
        (f"Picture: {width} x {height} pixels", outcome.picture),
        (f"Mask: brightness more than {tol:g} from the median", outcome.mask),
        (f"Active blocks: {outcome.active_blocks} of {blocks.size}, each {tile[1]} x {tile[0]}", dimmed),
        ("Result: edges coloured by direction, in active blocks", outcome.result),
    )
    panel_height = min(max(6.5 * height / width, 1.5), 13)  # inches, for a width of 6.5
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(13.5, 2 * panel_height + 1.3), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    for ax, (title, image) in zip(axes.flat, panels, strict=True):
        ax.imshow(image, cmap="gray", vmin=0, vmax=1 if image.dtype == bool else 255)
        ax.set_title(title, fontsize=13)
        ax.set_axis_off()
    if outcome.active_blocks <= 20_000:  # beyond it, outlines would hide the picture
        outlines = LineCollection(block_outlines(blocks, tile), colors="#ffb000", linewidths=0.4)
        axes[1, 0].add_collection(outlines, autolim=False)
    figure.suptitle(headline(outcome), fontsize=16)
    figure.savefig(path, format="png", dpi=150)


def block_outlines(blocks: Array, tile: tuple[int, int]) -> list[Any]:
    """A closed line around each active block, in the coordinates of ``imshow``."""
    lines = []
    for i, j in np.argwhere(blocks).tolist():
        top, left = i * tile[0] - 0.5, j * tile[1] - 0.5
        bottom, right = top + tile[0], left + tile[1]
        lines.append([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)])
    return lines


def headline(outcome: Outcome) -> str:
    """The picture's title: what was skipped, how fast it was, and whether it agrees."""
    skipped = 1 - outcome.active_blocks / outcome.active.size
    verdict = "but the result differs from" if outcome.differing_pixels else "and the same result as"
    return f"{skipped:.0%} of the blocks skipped, {verdict} on the whole picture"


def _missing(package: str, error: ImportError) -> MissingDependency:
    return MissingDependency(f'{package} is needed: pip install "sbnet-cupy[demo]" ({brief(error)})')


def brief(error: BaseException) -> str:
    """First line of an error's message, or its kind where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
