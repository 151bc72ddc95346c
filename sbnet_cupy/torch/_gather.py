"""``sparse_gather`` on PyTorch tensors, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import sbnet_cupy

from ._arrays import as_array, as_image, at, channels_last
from ._check import check_image, check_rows, check_tensors
from ._common import GRID_SCHEMA, ROWS_SCHEMA, autocast, new_images, new_stack, parse_blocks


def sparse_gather(
    x: Tensor,
    bin_counts: Tensor,
    active_block_indices: Tensor,
    *,
    bsize: Sequence[int],
    boffset: Sequence[int] = (0, 0),
    bstride: Sequence[int],
) -> Tensor:
    """Copy blocks of images into a dense stack: :func:`sbnet_cupy.sparse_gather` on tensors, with its gradient.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images of any dtype that NumPy has, or bfloat16, in any strides: read as they lie, without a copy.
    bin_counts, active_block_indices : Tensor, shapes (1,) and (M, 3), int32
        As from :func:`reduce_mask`, on the device of `x`.
    bsize, boffset, bstride
        As in :func:`sbnet_cupy.sparse_gather`.

    Returns
    -------
    Tensor, shape (M, C, bsize[0], bsize[1])
        The stack: in ``channels_last`` memory where the channels of `x` lie side by side, else contiguous.

    Raises
    ------
    TypeError, ValueError
        As :func:`sbnet_cupy.sparse_gather`.

    Notes
    -----
    Work runs on PyTorch's current stream of the device of `x`, without synchronisation; memory comes from PyTorch's
    allocator: the stack and nothing else. Under autocast, `x` is converted to autocast's dtype first, as the input of a
    convolution is: a copy of the images. The gradient is :func:`sbnet_cupy.sparse_gather_grad`, bitwise reproducible;
    it has none of its own.
    """
    check_tensors(x=x, bin_counts=bin_counts, active_block_indices=active_block_indices)
    (x,) = autocast(x)
    return gather_op(x, bin_counts, active_block_indices, *parse_blocks(bsize, boffset, bstride))


@torch.library.custom_op(
    "sbnet_cupy::gather", mutates_args=(), schema=f"(Tensor x, {ROWS_SCHEMA}, {GRID_SCHEMA}) -> Tensor"
)
def gather_op(x: Any, bin_counts: Any, active_block_indices: Any, bsize: Any, boffset: Any, bstride: Any) -> Any:
    check_image("x", x)
    check_rows(x, bin_counts, active_block_indices)
    stack = new_stack(x, active_block_indices, bsize)
    with at(x.device):
        sbnet_cupy.sparse_gather(
            as_image(x),
            as_array(bin_counts),
            as_array(active_block_indices),
            bsize=bsize,
            boffset=boffset,
            bstride=bstride,
            out=as_image(stack),
        )
    return stack


@gather_op.register_fake
def _(x: Any, bin_counts: Any, active_block_indices: Any, bsize: Any, boffset: Any, bstride: Any) -> Any:
    check_image("x", x)
    return new_stack(x, active_block_indices, bsize)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, bin_counts, active_block_indices, *ctx.grid = inputs
    ctx.save_for_backward(bin_counts, active_block_indices)
    ctx.shape, ctx.is_last = x.shape, channels_last(x)


def _backward(ctx: Any, grad: Any) -> Any:
    grad_x = gather_grad_op(grad, *ctx.saved_tensors, ctx.shape, *ctx.grid, ctx.is_last)
    return grad_x, None, None, None, None, None


gather_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(
    "sbnet_cupy::gather_grad",
    mutates_args=(),
    schema=f"(Tensor grad_blocks, {ROWS_SCHEMA}, SymInt[] x_shape, {GRID_SCHEMA}, bool channels_last) -> Tensor",
)
def gather_grad_op(
    grad_blocks: Any,
    bin_counts: Any,
    active_block_indices: Any,
    x_shape: Any,
    bsize: Any,
    boffset: Any,
    bstride: Any,
    channels_last: Any,
) -> Any:
    grad_x = new_images(grad_blocks, x_shape, channels_last)
    n, c, h, w = x_shape
    with at(grad_blocks.device):
        sbnet_cupy.sparse_gather_grad(
            as_image(grad_blocks),
            as_array(bin_counts),
            as_array(active_block_indices),
            (n, h, w, c),
            bsize=bsize,
            boffset=boffset,
            bstride=bstride,
            out=as_image(grad_x),
        )
    return grad_x


@gather_grad_op.register_fake
def _(
    grad_blocks: Any,
    bin_counts: Any,
    active_block_indices: Any,
    x_shape: Any,
    bsize: Any,
    boffset: Any,
    bstride: Any,
    channels_last: Any,
) -> Any:
    return new_images(grad_blocks, x_shape, channels_last)
