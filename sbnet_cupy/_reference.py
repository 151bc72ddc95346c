"""What each op computes, in NumPy: the definition that every kernel is compared with.

Ops on blocks write into the array that they are given last and return nothing. The arguments are
already validated; `count` is the number of rows of `indices` that are in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ._affine import Affine, wide_dtype
from ._geometry import BlockGrid

Array = np.ndarray[Any, Any]


def gather(x: Array, count: int, indices: Array, grid: BlockGrid, affine: Affine, stack: Array) -> None:
    """Copy the block of every row of `indices` from `x` to `stack`; zero whatever has no pixel."""
    stack[...] = 0
    for row, pixels, part in _placed_blocks(count, indices, grid, x.shape):
        stack[row][part] = x[pixels] if affine.is_identity else activate(x[pixels], affine, x.dtype)


def activate(x: Array, affine: Affine, dtype: np.dtype[Any]) -> Array:
    """``act(x*scale + shift)`` in float32 at least, each operation rounded; then rounded to `dtype` once.

    ReLU is 0 for negative numbers and leaves all others, NaN and -0.0 included.
    """
    y = x.astype(wide_dtype(x.dtype))
    with np.errstate(all="ignore"):
        if affine.scale is not None:
            y = y * affine.scale
        if affine.shift is not None:
            y = y + affine.shift
        if affine.relu:
            y = np.where(y < 0, y.dtype.type(0), y)
        return y.astype(dtype)


def activate_blocks(
    stack: Array, count: int, indices: Array, grid: BlockGrid, shape: tuple[int, ...], affine: Affine, out: Array
) -> None:
    """Activate the pixels of a stack that lie in an image of `shape` [N, H, W]; zero all others.

    `out` may be `stack`.
    """
    inside = np.zeros((*stack.shape[:3], 1), bool)
    for row, _, part in _placed_blocks(count, indices, grid, shape):
        inside[row][part] = True
    out[...] = np.where(inside, activate(stack, affine, out.dtype), out.dtype.type(0))


def scatter(stack: Array, count: int, indices: Array, grid: BlockGrid, x: Array) -> None:
    """Write the blocks over `x`, in the order of the indices, so that the later block wins."""
    for row, pixels, part in _placed_blocks(count, indices, grid, x.shape):
        x[pixels] = stack[row][part]


def scatter_add(stack: Array, count: int, indices: Array, grid: BlockGrid, x: Array) -> None:
    """Add the blocks to `x`, in the order of the indices. Half types: sum in float32, round once."""
    blocks = list(_placed_blocks(count, indices, grid, x.shape))
    with np.errstate(over="ignore", invalid="ignore"):
        if x.dtype.itemsize > 2 or x.dtype.kind in "iu":
            for row, pixels, part in blocks:
                x[pixels] += stack[row][part]
        else:
            total = x.astype(np.float32)
            for row, pixels, part in blocks:
                total[pixels] += stack[row][part].astype(np.float32)
            for _, pixels, _ in blocks:
                x[pixels] = total[pixels].astype(x.dtype)


def _placed_blocks(
    count: int, indices: Array, grid: BlockGrid, shape: tuple[int, ...]
) -> Iterator[tuple[int, Any, Any]]:
    """Rows in use whose block touches the image: (row, slice of the image, slice of the block)."""
    height, width = grid.axes(shape[1], shape[2])
    for row, (n, i, j) in enumerate(indices[: max(count, 0)].tolist()):
        if 0 <= n < shape[0]:
            (rows, part_rows), (cols, part_cols) = height.clip(i), width.clip(j)
            if rows.start < rows.stop and cols.start < cols.stop:
                yield row, (n, rows, cols), (part_rows, part_cols)


def block_activity(mask: Array, bcount: tuple[int, int], grid: BlockGrid, tol: float, avgpool: bool) -> Array:
    """Whether each block of the grid is active: bool ``[N, bcount[0], bcount[1]]``.

    A block is a rectangle, so it is pooled over rows first and over columns second.
    """
    height, width = grid.axes(mask.shape[1], mask.shape[2])
    if not avgpool:
        return _pool_spans(np.logical_or, above(mask, tol), bcount, height, width)
    total = block_sums(mask, bcount, grid)
    area = float(grid.bsize[0] * grid.bsize[1])
    active: Array = total / area > tol
    return active


def above(mask: Array, tol: float) -> Array:
    """``mask > tol``, with no rounding of integers, and with `tol` rounded to a floating mask's dtype."""
    if mask.dtype.kind in "biu":
        limit = integer_threshold(mask.dtype, tol)
        return np.zeros(mask.shape, bool) if limit is None else _above_integer(mask, limit)
    with np.errstate(over="ignore"):
        result: Array = mask > mask.dtype.type(tol)
        return result


def _above_integer(mask: Array, limit: int) -> Array:
    if mask.dtype.kind == "b":
        mask = mask.view(np.uint8)
    if limit < np.iinfo(mask.dtype).min:
        return np.ones(mask.shape, bool)
    result: Array = mask > mask.dtype.type(limit)
    return result


def integer_threshold(dtype: np.dtype[Any], tol: float) -> int | None:
    """The integer t for which ``pixel > tol`` is ``pixel > t`` for all pixels of an integer or bool dtype.

    It is floor(tol), clamped to one below the dtype's range; None where no pixel can be above it.
    """
    info = np.iinfo(np.uint8 if dtype.kind == "b" else dtype)
    if not tol < info.max:  # NaN included
        return None
    return int(max(np.floor(tol), info.min - 1))


def block_sums(mask: Array, bcount: tuple[int, int], grid: BlockGrid) -> Array:
    """Sum of each block's in-image pixels, as float64.

    Floating masks are summed in float64. Integers are summed exactly and rounded once: 64-bit ones as
    two halves of 32 bits, because their sum may need more than 64.
    """
    axes = grid.axes(mask.shape[1], mask.shape[2])
    if mask.dtype.kind in "iu" and mask.dtype.itemsize == 8:
        low = _pool_spans(np.add, (mask & 0xFFFFFFFF).astype(np.int64), bcount, *axes)
        high = _pool_spans(np.add, (mask >> 32).astype(np.int64), bcount, *axes)
        return high.astype(np.float64) * 2.0**32 + low.astype(np.float64)
    wide = mask.astype(np.int64 if mask.dtype.kind in "biu" else np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return _pool_spans(np.add, wide, bcount, *axes).astype(np.float64)


def _pool_spans(op: np.ufunc, image: Array, bcount: tuple[int, int], height: Any, width: Any) -> Array:
    """Reduce `image` ``[N, H, W]`` with `op` over every block: ``[N, bcount[0], bcount[1]]``."""
    rows = np.zeros((image.shape[0], bcount[0], image.shape[2]), image.dtype)
    for i in range(bcount[0]):
        op.reduce(image[:, height.clip(i)[0], :], axis=1, out=rows[:, i, :])
    blocks = np.zeros((image.shape[0], *bcount), image.dtype)
    for j in range(bcount[1]):
        op.reduce(rows[:, :, width.clip(j)[0]], axis=2, out=blocks[:, :, j])
    return blocks


def compact(active: Array) -> Array:
    """Indices ``[M, 3]`` of the active blocks, ascending: NumPy's own row-major order."""
    indices: Array = np.argwhere(active).astype(np.int32)
    return indices
