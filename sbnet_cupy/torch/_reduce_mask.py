"""``reduce_mask`` on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import sbnet_cupy

from .._reduce_mask import BlockIndices, parse_reduction
from ._arrays import as_array, at
from ._check import check_mask, check_tensors
from ._common import GRID_SCHEMA, parse_blocks
from ._operator import operator


def reduce_mask(
    mask: Tensor,
    bcount: Sequence[int],
    *,
    bsize: Sequence[int],
    boffset: Sequence[int] = (0, 0),
    bstride: Sequence[int],
    tol: float = 0.5,
    avgpool: bool = False,
    capacity: int | None = None,
) -> BlockIndices:
    """Find the blocks of a grid in which a mask is active: :func:`sbnet_cupy.reduce_mask` on tensors.

    Parameters
    ----------
    mask : Tensor, shape (N, H, W) or (N, 1, H, W)
        Bool, integer or floating, in any strides, on the CPU or a GPU.
    bcount, bsize, boffset, bstride, tol, avgpool, capacity
        As in :func:`sbnet_cupy.reduce_mask`.

    Returns
    -------
    BlockIndices
        Of int32 tensors on the device of `mask`. No gradient flows through them.

    Raises
    ------
    TypeError, ValueError
        As :func:`sbnet_cupy.reduce_mask`.

    Notes
    -----
    Work runs on PyTorch's current stream of the tensor's device, and memory comes from PyTorch's allocator. Without
    `capacity` it waits for that stream once, and under ``torch.compile`` the number of rows is a size that depends on
    data. The result is as reproducible as that of :func:`sbnet_cupy.reduce_mask`.
    """
    check_tensors(mask=mask)
    grid = parse_blocks(bsize, boffset, bstride)
    if not torch.compiler.is_compiling():
        bcount, tol, avgpool, capacity = parse_reduction(bcount, tol, avgpool, capacity)
    return BlockIndices(*reduce_mask_op(mask.detach(), list(bcount), *grid, float(tol), bool(avgpool), capacity))


@operator(
    f"reduce_mask(Tensor mask, int[] bcount, {GRID_SCHEMA}, float tol, bool avgpool, int? capacity) -> (Tensor, Tensor)"
)
def reduce_mask_op(
    mask: Any, bcount: Any, bsize: Any, boffset: Any, bstride: Any, tol: Any, avgpool: Any, capacity: Any
) -> Any:
    check_mask(mask)
    rows = mask.shape[0] * bcount[0] * bcount[1] if capacity is None else capacity
    indices, counts = _new_rows(mask, rows)
    with at(mask.device):
        found = sbnet_cupy.reduce_mask(
            as_array(mask if mask.dim() == 3 else mask[:, 0]),
            bcount,
            bsize=bsize,
            boffset=boffset,
            bstride=bstride,
            tol=tol,
            avgpool=avgpool,
            capacity=capacity,
            out=BlockIndices(as_array(indices), as_array(counts)),
        )
    return (indices if capacity is not None else indices[: found.active_block_indices.shape[0]]), counts


@torch.library.register_fake(reduce_mask_op)
def _(mask: Any, bcount: Any, bsize: Any, boffset: Any, bstride: Any, tol: Any, avgpool: Any, capacity: Any) -> Any:
    check_mask(mask)
    return _new_rows(mask, torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity)


def _new_rows(mask: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Indices of `rows` blocks, and their count."""
    return mask.new_empty((rows, 3), dtype=torch.int32), mask.new_empty(1, dtype=torch.int32)
