"""What is measured: shapes, block grids, densities, byte models and goals. No device is needed here.

Goals and the figures of the original are constants of this page. Figures "2018 original" are those of the original
SBNet's kernels, measured on an H200.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Pair = tuple[int, int]
Array = np.ndarray[Any, Any]

#: Image tensor of case L: 1 GiB of float32.
CASE_L = (8, 512, 512, 128)
#: One image of a network's first stage. With a tenth of its blocks active, the launch costs more than the copy.
SMALL = (1, 400, 700, 96)
#: Block stacks above this many bytes are large enough for the floor under all cases to hold.
LARGE_STACK = 100e6


@dataclass(frozen=True)
class Target:
    """A goal: a share of the device copy's bandwidth to reach, or a time in microseconds not to exceed."""

    quantity: str  # "share" or "us"
    bound: float

    def __str__(self) -> str:
        return f">= {self.bound:.2f} of copy" if self.quantity == "share" else f"<= {self.bound:g} us"

    def verdict(self, median_us: float, share: float | None) -> str:
        """Tell "met", or the figure and by which part of the bound it misses."""
        if self.quantity == "us":
            if median_us <= self.bound:
                return "met"
            return f"missed: {median_us:.1f} us, {median_us / self.bound - 1:.0%} over"
        if share is None:
            raise ValueError("share: expected a figure to compare with the goal, got None")
        if share >= self.bound:
            return "met"
        return f"missed: {share:.3f}, {1 - share / self.bound:.1%} short"


#: What no case with a large stack should fall under.
FLOOR = Target("share", 0.6)


@dataclass(frozen=True)
class Transfer:
    """One gather or scatter: an image tensor, a block grid on it, and which part of its blocks is active."""

    name: str
    op: str  # "gather", "scatter", "add", "gather_grad" or "scatter_grad"
    shape: tuple[int, int, int, int] = CASE_L
    bsize: Pair = (18, 18)
    boffset: Pair = (-1, -1)
    bstride: Pair = (16, 16)
    density: float = 0.5
    dtype: str = "float32"
    transpose: bool = False
    nchw: bool = False  # the image is a transposed view of NCHW memory
    original: str = ""
    target: Target | None = None

    @property
    def bcount(self) -> Pair:
        """Blocks of the grid in height and width: one for each stride that the image begins."""
        return math.ceil(self.shape[1] / self.bstride[0]), math.ceil(self.shape[2] / self.bstride[1])

    @property
    def blocks(self) -> int:
        """Number of active blocks."""
        return max(1, round(self.density * self.shape[0] * math.prod(self.bcount)))

    @property
    def overlaps(self) -> bool:
        return self.bsize[0] > self.bstride[0] or self.bsize[1] > self.bstride[1]

    @property
    def grid(self) -> dict[str, Any]:
        """The grid as keyword arguments of the public functions."""
        return {"bsize": self.bsize, "boffset": self.boffset, "bstride": self.bstride}

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def stack_shape(self) -> tuple[int, ...]:
        channels = self.shape[3]
        return (self.blocks, channels, *self.bsize) if self.transpose else (self.blocks, *self.bsize, channels)

    @property
    def stack_bytes(self) -> int:
        return math.prod(self.stack_shape) * self.itemsize

    @property
    def margins(self) -> tuple[Pair, Pair]:
        """Pixels by which the grid hangs over the image: (top, bottom), (left, right)."""
        return tuple(  # type: ignore[return-value]
            (max(0, -offset), max(0, offset + (count - 1) * stride + size - extent))
            for offset, count, stride, size, extent in zip(
                self.boffset, self.bcount, self.bstride, self.bsize, self.shape[1:3]
            )
        )

    def describe(self) -> str:
        """Shape, dtype, grid and density in a few words."""
        layout = " in NCHW memory" if self.nchw else ""
        return (
            f"{'x'.join(map(str, self.shape))} {self.dtype}{layout}, blocks {size_label(self.bsize)} "
            f"every {size_label(self.bstride)}, {self.blocks} active ({self.density:.0%}), "
            f"stack {self.stack_bytes / 1e6:.0f} MB"
        )

    def parameters(self) -> dict[str, Any]:
        """The columns of a CSV row that say what was measured."""
        return {
            "op": self.op,
            "shape": "x".join(map(str, self.shape)),
            "dtype": self.dtype,
            "bsize": size_label(self.bsize),
            "bstride": size_label(self.bstride),
            "density": self.density,
            "active_blocks": self.blocks,
            "transpose": self.transpose,
            "layout": "NCHW" if self.nchw else "NHWC",
            "stack_bytes": self.stack_bytes,
        }


@dataclass(frozen=True)
class Mask:
    """One reduction of a mask in which single pixels activate a part of the blocks."""

    name: str
    shape: tuple[int, int, int]
    density: float
    bsize: Pair = (18, 18)
    boffset: Pair = (-1, -1)
    bstride: Pair = (16, 16)

    @property
    def bcount(self) -> Pair:
        return math.ceil(self.shape[1] / self.bstride[0]), math.ceil(self.shape[2] / self.bstride[1])

    @property
    def all_blocks(self) -> int:
        return self.shape[0] * math.prod(self.bcount)

    @property
    def blocks(self) -> int:
        """Number of active blocks."""
        return max(1, round(self.density * self.all_blocks))

    @property
    def grid(self) -> dict[str, Any]:
        return {"bsize": self.bsize, "boffset": self.boffset, "bstride": self.bstride}

    @property
    def mask_bytes(self) -> int:
        return 4 * math.prod(self.shape)

    def describe(self) -> str:
        return (
            f"{'x'.join(map(str, self.shape))} float32, blocks {size_label(self.bsize)} every "
            f"{size_label(self.bstride)}, {self.blocks} of {self.all_blocks} active, each by one pixel"
        )

    def parameters(self) -> dict[str, Any]:
        return {
            "op": "reduce_mask",
            "shape": "x".join(map(str, self.shape)),
            "dtype": "float32",
            "bsize": size_label(self.bsize),
            "bstride": size_label(self.bstride),
            "density": self.density,
            "active_blocks": self.blocks,
        }


MASK_MODEL = "mask read once"


def size_label(pair: Pair) -> str:
    """A block size as one reads it: "18" for a square, "8x32" (height x width) else."""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def active_indices(images: int, bcount: Pair, blocks: int, seed: int) -> Array:
    """`blocks` different blocks of the grids of all images, int32 ``[blocks, 3]`` in ascending order."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(images * bcount[0] * bcount[1])[:blocks])
    return np.stack(np.unravel_index(chosen, (images, *bcount)), axis=1).astype(np.int32)


def byte_model(case: Transfer, sets: int = 1) -> tuple[int, str]:
    """Bytes that a call is held to move, and the rule that counts them, in one line.

    Where they depend on which blocks are active, the mean over the first `sets` sets of blocks.
    """
    stack = case.stack_bytes
    image = math.prod(case.shape) * case.itemsize
    if case.op == "gather_grad":
        size, model = byte_model(replace(case, op="add"), sets)
        return image + size, f"image written with zeros, {model}"
    if case.op == "scatter_grad":
        covered = _mean_covered(case, sets) * case.shape[3] * case.itemsize
        return 2 * image + covered + 2 * stack, "image copied, its covered pixels zeroed, block stack read + written"
    if case.op != "add":
        return 2 * stack, "block stack read + written"
    if not case.overlaps:
        return 3 * stack, "block stack read, as much of the image read + written"
    pixel = case.shape[3] * case.itemsize
    covered = _mean_covered(case, sets)
    return stack + 2 * covered * pixel, "block stack read, each covered image pixel read + written once"


def _mean_covered(case: Transfer, sets: int) -> int:
    """Pixels that the blocks of a set cover: the mean over the first `sets` sets."""
    chosen = [active_indices(case.shape[0], case.bcount, case.blocks, seed) for seed in range(sets)]
    return round(sum(covered_pixels(case, indices) for indices in chosen) / sets)


def covered_pixels(case: Transfer, indices: Array) -> int:
    """Image pixels that lie in at least one of the blocks `indices` [M, 3] of the case's grid."""
    count = case.bcount
    active = np.zeros((case.shape[0], *count), np.int64)
    active[tuple(indices.T)] = 1
    before = np.zeros((case.shape[0], count[0] + 1, count[1] + 1), np.int64)
    before[:, 1:, 1:] = active.cumsum(1).cumsum(2)
    rows, columns = (_pixel_classes(case, axis) for axis in (0, 1))
    total = 0
    for top, bottom, height in rows:
        band = before[:, bottom] - before[:, top]
        inside = (band[:, columns[:, 1]] - band[:, columns[:, 0]]) > 0
        total += int(height) * int((inside * columns[:, 2]).sum())
    return total


def _pixel_classes(case: Transfer, axis: int) -> Array:
    """Rows (first, past the last block that covers a pixel of this axis, number of such pixels)."""
    pixel = np.arange(case.shape[1 + axis]) - case.boffset[axis]
    past = np.minimum(pixel // case.bstride[axis] + 1, case.bcount[axis])
    first = np.maximum(-((case.bsize[axis] - 1 - pixel) // case.bstride[axis]), 0)
    spans, pixels = np.unique(np.stack([first, past], axis=1), axis=0, return_counts=True)
    covered = spans[:, 0] < spans[:, 1]
    return np.column_stack([spans, pixels])[covered]


def with_channels(channels: int, dtype: str, image_bytes: int) -> tuple[int, int, int, int]:
    """A batch of 512x512 images of about `image_bytes` in all, whatever its channels and dtype."""
    image = 512 * 512 * channels * np.dtype(dtype).itemsize
    return max(1, round(image_bytes / image)), 512, 512, channels


def _both(name: str, bsize: Pair, tile: Pair, **fields: Any) -> list[Transfer]:
    """A gather of `bsize` and a scatter of `tile`, both every `tile` pixels; the difference is the halo."""
    halo = (tile[0] - bsize[0]) // 2, (tile[1] - bsize[1]) // 2
    fields = {"target": FLOOR, **fields}
    return [
        Transfer(f"{name}: gather", "gather", bsize=bsize, boffset=halo, bstride=tile, **fields),
        Transfer(f"{name}: scatter", "scatter", bsize=tile, boffset=(0, 0), bstride=tile, **fields),
    ]


def large_cases(quick: bool) -> list[Transfer]:
    """Gathers and scatters that are bound by memory: those with goals, and those under which nothing should fall."""
    tile: dict[str, Any] = {"bsize": (16, 16), "boffset": (0, 0)}
    found = [
        Transfer("case L: gather", "gather", original="1.68 TB/s", target=Target("share", 1.00)),
        Transfer(
            "case L: gather, transpose",
            "gather",
            transpose=True,
            original="1.24 TB/s",
            target=Target("share", 0.90),
        ),
        Transfer("case L: scatter", "scatter", **tile, original="2.02 TB/s", target=Target("share", 0.95)),
        Transfer(
            "case L: scatter, transpose",
            "scatter",
            **tile,
            transpose=True,
            original="1.48 TB/s",
            target=Target("share", 0.90),
        ),
        Transfer("case L: scatter, add", "add", **tile, original="2.07 TB/s", target=Target("share", 0.95)),
        Transfer(
            "case L: scatter, add, overlapping",
            "add",
            original="1.48 TB/s, not reproducible",
            target=Target("share", 0.75),
        ),
        Transfer("case L: gradient of gather", "gather_grad", target=FLOOR),
        Transfer("case L: gradient of scatter", "scatter_grad", **tile, target=FLOOR),
        Transfer("case L: gradient of scatter, overlapping", "scatter_grad", target=FLOOR),
        *_both("float16", (18, 18), (16, 16), dtype="float16", shape=with_channels(128, "float16", 2**30)),
        *_both("C = 3", (18, 18), (16, 16), shape=with_channels(3, "float32", 2**30)),
    ]
    if quick:
        return found
    found += _both("10% active", (18, 18), (16, 16), density=0.1)
    for channels in (24, 96, 256):
        found += _both(f"C = {channels}", (18, 18), (16, 16), shape=with_channels(channels, "float32", 2**30))
    found += _both("blocks 5", (5, 5), (5, 5))
    found += _both("blocks 10/8", (10, 10), (8, 8))
    found += _both("blocks 34/32", (34, 34), (32, 32))
    found += _both("blocks 10x34/8x32", (10, 34), (8, 32))
    return found


def small_cases() -> list[Transfer]:
    """One image of 400x700x96 with 110 active blocks."""
    original = "28 us, events from Python"
    return _both("400x700x96", (18, 18), (16, 16), shape=SMALL, density=0.1, original=original, target=None)


#: Goals of :func:`small_cases`.
SMALL_GRAPH, SMALL_HOST = Target("us", 4), Target("us", 12)

LARGE_MASK = Mask("mask 8x2048x2048", (8, 2048, 2048), 0.5)
SMALL_MASK = Mask("mask 1x400x700", (1, 400, 700), 0.1)


@dataclass(frozen=True)
class Point:
    """One case of a sweep: where on the horizontal axis, and which line it belongs to."""

    sweep: str
    label: str
    variant: str
    case: Transfer

    @property
    def has_rivals(self) -> bool:
        """Rivals run beside the plain variants: one dashed line each in the plots."""
        return self.variant in ("gather", "scatter")


#: Lines of the plots: op, and what differs from the plain op.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gather": ("gather", {}),
    "gather, transpose": ("gather", {"transpose": True}),
    "gather, NCHW memory": ("gather", {"nchw": True}),
    "gather, NCHW memory, transpose": ("gather", {"nchw": True, "transpose": True}),
    "scatter": ("scatter", {}),
    "scatter, transpose": ("scatter", {"transpose": True}),
    "scatter, NCHW memory": ("scatter", {"nchw": True}),
    "scatter, NCHW memory, transpose": ("scatter", {"nchw": True, "transpose": True}),
    "scatter, add": ("add", {}),
    "scatter, add, overlapping": ("add", {"overlap": True}),
}

SWEEPS = ("block size", "channels", "density", "dtype")

BLOCK_SIZES: tuple[Pair, ...] = (
    *((n, n) for n in (3, 4, 5, 8, 10, 16, 18, 24, 32, 34, 48, 64)),
    (5, 21),
    (8, 32),
    (32, 8),
)
CHANNELS = (1, 3, 16, 24, 64, 96, 256)
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DTYPES = ("float32", "float16", "uint8")


def sweep_points(quick: bool) -> list[Point]:
    """All cases of the sweeps. Each sweep varies one parameter of case L."""
    size = 2**28 if quick else 2**30
    sizes: Sequence[Pair] = ((5, 5), (18, 18), (8, 32)) if quick else BLOCK_SIZES
    channels = (3, 96) if quick else CHANNELS
    densities = (0.01, 0.5) if quick else DENSITIES
    base = with_channels(128, "float32", size)
    found = []
    for variant in VARIANTS:
        found += [_sized(block, variant, base) for block in sizes]
        for count in channels:
            case = _halo_case(variant, with_channels(count, "float32", size))
            found.append(Point("channels", str(count), variant, case))
        for density in densities:
            case = replace(_halo_case(variant, base), density=density)
            found.append(Point("density", f"{density:.0%}", variant, case))
        for dtype in DTYPES:
            case = replace(_halo_case(variant, with_channels(128, dtype, size)), dtype=dtype)
            found.append(Point("dtype", dtype, variant, case))
    return sorted(map(_finished, found), key=lambda point: SWEEPS.index(point.sweep))


def _finished(point: Point) -> Point:
    """The point with a name, and with a goal where its stack is large."""
    case = point.case
    target = FLOOR if case.stack_bytes > LARGE_STACK else None
    return replace(point, case=replace(case, name=f"{point.sweep} {point.label}: {point.variant}", target=target))


def _halo_case(variant: str, shape: tuple[int, int, int, int]) -> Transfer:
    """Blocks of 18 every 16 where the op reads them or may overlap; of 16 where it writes them side by side."""
    op, fields = VARIANTS[variant]
    fields = dict(fields)
    if op == "gather" or fields.pop("overlap", False):
        return Transfer("", op, shape, **fields)
    return Transfer("", op, shape, (16, 16), (0, 0), **fields)


def _sized(bsize: Pair, variant: str, shape: tuple[int, int, int, int]) -> Point:
    """Blocks side by side; those that are to overlap do so by a ninth of their size, at least a pixel."""
    op, fields = VARIANTS[variant]
    fields = dict(fields)
    overlap = fields.pop("overlap", False)
    stride = (bsize[0] - max(1, bsize[0] // 9), bsize[1] - max(1, bsize[1] // 9)) if overlap else bsize
    case = Transfer("", op, shape, bsize, (0, 0), stride, **fields)
    return Point("block size", size_label(bsize), variant, case)
