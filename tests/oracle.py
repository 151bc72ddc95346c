"""The ops once more, pixel by pixel in plain Python, from the specification alone: what NumPy is checked with.

Slow on purpose. Nothing is shared with the package, so a mistake in its geometry cannot hide here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Pair = tuple[int, int]


def block_pixels(
    n: int, i: int, j: int, shape: tuple[int, ...], bsize: Pair, boffset: Pair, bstride: Pair
) -> Iterator[tuple[Pair, tuple[int, int, int]]]:
    """Position in the block and position in the image of each in-image pixel of block (n, i, j)."""
    if not 0 <= n < shape[0]:
        return
    top, left = boffset[0] + i * bstride[0], boffset[1] + j * bstride[1]
    for r in range(bsize[0]):
        for c in range(bsize[1]):
            y, x = top + r, left + c
            if 0 <= y < shape[1] and 0 <= x < shape[2]:
                yield (r, c), (n, y, x)


def gather(x: Array, count: int, indices: Array, bsize: Pair, boffset: Pair, bstride: Pair) -> Array:
    stack = np.zeros((len(indices), *bsize, x.shape[3]), x.dtype)
    for row, (n, i, j) in enumerate(indices.tolist()):
        if row < count:
            for part, pixel in block_pixels(n, i, j, x.shape, bsize, boffset, bstride):
                stack[(row, *part)] = x[pixel]
    return stack


def scatter(
    stack: Array, count: int, indices: Array, x: Array, bsize: Pair, boffset: Pair, bstride: Pair, add: bool
) -> Array:
    writes: dict[tuple[int, int, int], list[Array]] = defaultdict(list)
    for row, (n, i, j) in enumerate(indices.tolist()):
        if row < count:
            for part, pixel in block_pixels(n, i, j, x.shape, bsize, boffset, bstride):
                writes[pixel].append(stack[(row, *part)])
    y = x.copy()
    half = x.dtype.kind not in "iu" and x.dtype.itemsize == 2
    with np.errstate(all="ignore"):
        for pixel, values in writes.items():
            if not add:
                y[pixel] = values[-1]
                continue
            total = x[pixel].astype(np.float32) if half else x[pixel].copy()
            for value in values:
                total = total + (value.astype(np.float32) if half else value)
            y[pixel] = total.astype(x.dtype)
    return y


def pool(
    mask: Array, bcount: Pair, bsize: Pair, boffset: Pair, bstride: Pair, tol: float, avgpool: bool
) -> tuple[Array, Array]:
    """Activity of each block, and whether rounding may decide it: bool ``[N, bcount[0], bcount[1]]`` each."""
    active = np.zeros((mask.shape[0], *bcount), bool)
    unsure = np.zeros_like(active)
    integer = mask.dtype.kind in "biu"
    for n, i, j in np.ndindex(active.shape):
        pixels = [mask[p] for _, p in block_pixels(n, i, j, mask.shape, bsize, boffset, bstride)]
        if not avgpool:
            with np.errstate(all="ignore"):
                limit = tol if integer else float(mask.dtype.type(tol))
            active[n, i, j] = any((int(v) if integer else float(v)) > limit for v in pixels)
            continue
        area = float(bsize[0] * bsize[1])
        if integer:
            active[n, i, j] = float(sum(int(v) for v in pixels)) / area > tol
            continue
        values = [float(v) for v in pixels]
        if all(map(math.isfinite, values)):
            average = math.fsum(values) / area
            # Any order of summation in float64 is off by less than this.
            error = 2.0**-52 * (len(values) + 2) * math.fsum(map(abs, values)) / area
            unsure[n, i, j] = 0 < abs(average - tol) <= error
        else:
            average = sum(values)
        active[n, i, j] = average > tol
    return active, unsure
