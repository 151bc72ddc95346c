"""``reduce_mask``: dense mask to the list of its active blocks."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from . import _device, _reference
from ._conv_geometry import BlockParams
from ._geometry import BlockGrid, parse_grid, parse_pair
from ._validate import (
    Look,
    Reach,
    Spec,
    array_namespace,
    check_like,
    check_mask,
    check_place,
    check_separate,
    current_device,
    look_at,
    output_reach,
    reach_of,
)

_INT32_MAX = 2**31 - 1


class BlockIndices(NamedTuple):
    """Active blocks of a mask, as :func:`reduce_mask` returns them.

    Attributes
    ----------
    active_block_indices : ndarray, shape (M, 3), int32
        Rows ``(n, i, j)`` in ascending lexicographic order: image of the batch, block row, block column.
    bin_counts : ndarray, shape (1,), int32
        Number of active blocks.
    """

    active_block_indices: Any
    bin_counts: Any


def reduce_mask(
    mask: Any,
    bcount: Sequence[int],
    *,
    bsize: Sequence[int],
    boffset: Sequence[int] = (0, 0),
    bstride: Sequence[int],
    tol: float = 0.5,
    avgpool: bool = False,
    capacity: int | None = None,
    out: BlockIndices | None = None,
) -> BlockIndices:
    """Find the blocks of a grid in which a mask is active.

    Block ``(n, i, j)`` covers the pixels ``mask[n, y:y + bsize[0], z:z + bsize[1]]`` with
    ``y = boffset[0] + i*bstride[0]`` and ``z = boffset[1] + j*bstride[1]``; the parts that hang over an edge
    have no pixels.

    Parameters
    ----------
    mask : ndarray, shape (N, H, W) or (N, H, W, 1)
        Bool, integer or floating, in any strides.
    bcount : (int, int)
        Number of blocks in height and in width, >= 0.
    bsize, boffset, bstride : (int, int)
        Size of a block, pixel of block (0, 0), and distance between blocks: (height, width) in pixels.
    tol : float
        A block is active where its pooled value is above `tol`. NaN is above nothing.
    avgpool : bool
        False: a block is active if any of its pixels is ``> tol``. As in NumPy, `tol` is rounded to the
        dtype of a floating mask; integers are compared without rounding. True: if the sum of its pixels over the
        full area ``bsize[0]*bsize[1]`` is ``> tol``. Sums are float64, exact for integers and bool.
    capacity : int, optional
        Length M of the result. Without it, M is the number of active blocks.
    out : BlockIndices, optional
        Where to put the result: contiguous arrays that share no memory with each other or with `mask`. The indices have
        `capacity` rows; without `capacity`, a row for each block of the grid, ``N*bcount[0]*bcount[1]``.

    Returns
    -------
    BlockIndices
        ``active_block_indices`` int32 ``[M, 3]`` in ascending order and ``bin_counts`` int32 ``[1]``. With
        `capacity`, rows past the count are ``(-1, -1, -1)``, and ``bin_counts`` is the true count, also where it
        exceeds `capacity`: then the first `capacity` active blocks are listed. Of `out`, where it was given: without
        `capacity`, the first M rows of its indices.

    Raises
    ------
    TypeError
        `mask` is no array or has another dtype; `tol` or `capacity` is no number; `out` is of another kind or dtype.
    ValueError
        A wrong rank, a size or stride below 1, a negative `bcount` or `capacity`, more than ``2**31 - 1``
        blocks, an array on another device than the current one, or an `out` that does not fit.

    Notes
    -----
    With CuPy arrays, work runs on the current stream. Without `capacity` it synchronises that stream once, to read
    the count (4 bytes), and the indices are a view of a buffer of 12 bytes for each block of the grid; the first such
    call on a device sets half a megabyte aside for counters, and waits until they are zero. With `capacity` it does not
    synchronise. Both results are views of one allocation, or lie in `out`. Scratch memory of 4 bytes for
    each up to 32 neighbouring blocks of a grid row lies in that allocation too where it takes less than the indices or
    4 KB, and otherwise goes back to CuPy's pool on return. The result is bitwise reproducible; for average pooling of
    floating masks, NumPy and CuPy may differ by the rounding of a float64 sum.
    """
    xp = array_namespace({"mask": mask})
    grid, device = parse_grid(bsize, boffset, bstride), current_device(xp)
    blocks, threshold, avgpool, capacity = parse_reduction(bcount, tol, avgpool, capacity)
    launch = _prepare(look_at(mask), blocks, grid, threshold, avgpool, capacity, out is not None, device)
    if out is not None:
        _check_out(out, mask, blocks, capacity, device)
    if xp is np:
        image = mask[..., 0] if mask.ndim == 4 else mask
        return _reduce_on_host(image, blocks, grid, threshold, avgpool, capacity, out)
    return BlockIndices(*_device.pooling().reduce_mask(launch, mask, capacity, device, out))


@functools.lru_cache(maxsize=1024)
def _prepare(
    look: Look,
    blocks: tuple[int, int],
    grid: BlockGrid,
    tol: float,
    avgpool: bool,
    capacity: int | None,
    given: bool,
    device: int,
) -> Any:
    """Raise unless the mask is one, and fits the grid; choose how to reduce it on a device."""
    spec = _check(Spec(*look), blocks, device)
    return None if device < 0 else _device.pooling().prepare(spec, blocks, grid, tol, avgpool, capacity, given)


def _check(mask: Spec, blocks: tuple[int, int], device: int) -> Spec:
    """Raise unless the mask is one, and fits the grid; return its spec with axes N, H, W."""
    check_mask("mask", mask)
    check_place("mask", mask, device)
    if mask.shape[0] * blocks[0] * blocks[1] > _INT32_MAX:
        raise ValueError(
            f"bcount: expected at most 2**31 - 1 blocks in the batch, got {mask.shape[0]} x {blocks[0]} x {blocks[1]}"
        )
    return mask._replace(shape=mask.shape[:3], strides=mask.strides[:3])


def _check_out(out: Any, mask: Any, blocks: tuple[int, int], capacity: int | None, device: int) -> None:
    """Raise unless the result can be put there."""
    if not isinstance(out, BlockIndices):
        raise TypeError(f"out: expected BlockIndices, got {type(out).__name__}")
    arrays = {"mask": mask, "out.active_block_indices": out.active_block_indices, "out.bin_counts": out.bin_counts}
    array_namespace(arrays)
    rows = mask.shape[0] * blocks[0] * blocks[1] if capacity is None else capacity
    reaches = _check_forms(*map(look_at, arrays.values()), rows, device)
    names = list(arrays)
    for number in (1, 2):
        name, taken = names[number], {other: arrays[other] for other in names[:number]}
        check_separate(name, arrays[name], reaches[number], taken, reaches[:number])


@functools.lru_cache(maxsize=1024)
def _check_forms(mask: Look, indices: Look, counts: Look, rows: int, device: int) -> tuple[Reach, ...]:
    """Raise unless a result of so many rows has this form; return what the mask and both parts of the result reach."""
    reaches = [reach_of(Spec(*mask))]
    for field, look, shape, axes in (
        ("active_block_indices", indices, (rows, 3), "M, 3"),
        ("bin_counts", counts, (1,), "1"),
    ):
        name, spec = f"out.{field}", Spec(*look)
        check_like(name, spec, np.dtype(np.int32), shape, axes, "the result")
        check_place(name, spec, device)
        if not spec.is_contiguous:
            raise ValueError(f"{name}: expected a contiguous array, got strides {spec.strides}")
        reaches.append(output_reach(name, spec))
    return tuple(reaches)


def parse_reduction(
    bcount: Any, tol: Any, avgpool: Any, capacity: Any
) -> tuple[tuple[int, int], float, bool, int | None]:
    """The numbers among the arguments, checked."""
    try:
        rows, columns = bcount
        return _parse_numbers(rows, columns, tol, avgpool, capacity)
    except (TypeError, ValueError):  # wrong in form or in value, or unhashable: say which
        blocks = parse_pair("bcount", bcount, minimum=0)
        return blocks, _parse_tol(tol), bool(avgpool), None if capacity is None else _parse_capacity(capacity)


# Typed, because 1, 1.0 and True are equal, and only the first is a number of blocks.
@functools.lru_cache(maxsize=1024, typed=True)
def _parse_numbers(
    rows: Any, columns: Any, tol: Any, avgpool: Any, capacity: Any
) -> tuple[tuple[int, int], float, bool, int | None]:
    blocks = parse_pair("bcount", (rows, columns), minimum=0)
    return blocks, _parse_tol(tol), bool(avgpool), None if capacity is None else _parse_capacity(capacity)


def block_indices(
    mask: Any, params: BlockParams, *, tol: float = 0.5, avgpool: bool = False, capacity: int | None = None
) -> BlockIndices:
    """Find the blocks of a convolution in which a mask is active.

    It is :func:`reduce_mask` with the numbers of `params`: a block is active if the pixels that it reads are, the
    halo included.

    Parameters
    ----------
    mask : ndarray, shape (N, H, W) or (N, H, W, 1)
        A value for each pixel of the image that the convolution reads.
    params : BlockParams
        What :func:`calc_block_params` or :func:`calc_block_params_res_block` returned for that image.
    tol, avgpool, capacity
        As in :func:`reduce_mask`.

    Returns
    -------
    BlockIndices
        As from :func:`reduce_mask`, whose errors, synchronisation, allocations and reproducibility are also these.
    """
    if not isinstance(params, BlockParams):
        raise TypeError(f"params: expected BlockParams, got {type(params).__name__}")
    return reduce_mask(
        mask,
        params.bcount,
        bsize=params.bsize,
        boffset=params.boffset,
        bstride=params.bstrides,
        tol=tol,
        avgpool=avgpool,
        capacity=capacity,
    )


def _reduce_on_host(
    mask: Any,
    bcount: tuple[int, int],
    grid: BlockGrid,
    tol: float,
    avgpool: bool,
    capacity: int | None,
    out: BlockIndices | None,
) -> BlockIndices:
    indices = _reference.compact(_reference.block_activity(mask, bcount, grid, tol, avgpool))
    bin_counts = np.array([len(indices)], np.int32)
    if capacity is not None:
        padded = np.full((capacity, 3), -1, np.int32)
        padded[: len(indices)] = indices[:capacity]
        indices = padded
    if out is None:
        return BlockIndices(indices, bin_counts)
    out.active_block_indices[: len(indices)] = indices
    out.bin_counts[...] = bin_counts
    return BlockIndices(out.active_block_indices[: len(indices)], out.bin_counts)


def _parse_tol(tol: Any) -> float:
    if not isinstance(tol, (Real, np.number, np.bool_)) or isinstance(tol, np.complexfloating):
        raise TypeError(f"tol: expected a real number, got {type(tol).__name__}")
    try:
        return float(tol)
    except OverflowError:  # an integer beyond float64: above or below every pixel alike
        return math.inf if tol > 0 else -math.inf  # type: ignore[operator]


def _parse_capacity(capacity: Any) -> int:
    try:
        if isinstance(capacity, (bool, np.bool_)):
            raise TypeError
        value = operator.index(capacity)
    except TypeError:
        raise TypeError(f"capacity: expected an integer or None, got {type(capacity).__name__}") from None
    if not 0 <= value <= _INT32_MAX:
        raise ValueError(f"capacity: expected an integer from 0 to 2**31 - 1, got {value}")
    return value
