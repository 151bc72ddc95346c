"""``sparse_gather`` on PyTorch tensors, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import sbnet_cupy

from ._arrays import as_image, at, channels_last
from ._check import check_image, check_rows, check_tensors
from ._common import GRID_SCHEMA, ROWS_SCHEMA, Blocks, autocast, new_images, parse_blocks
from ._operator import operator


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


@operator(f"gather(Tensor x, {ROWS_SCHEMA}, {GRID_SCHEMA}) -> Tensor")
def gather_op(x: Any, *rows_and_grid: Any) -> Any:
    blocks = Blocks(*rows_and_grid)
    check_image("x", x)
    check_rows(x, blocks.bin_counts, blocks.active_block_indices)
    stack = blocks.new_stack(x)
    with at(x.device):
        sbnet_cupy.sparse_gather(as_image(x), *blocks.rows, **blocks.grid, out=as_image(stack))
    return stack


@torch.library.register_fake(gather_op)
def _(x: Any, *rows_and_grid: Any) -> Any:
    check_image("x", x)
    return Blocks(*rows_and_grid).new_stack(x)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, bin_counts, active_block_indices, *ctx.grid = inputs
    ctx.save_for_backward(bin_counts, active_block_indices)
    ctx.shape, ctx.is_last = x.shape, channels_last(x)


def _backward(ctx: Any, grad: Any) -> Any:
    grad_x = gather_grad_op(grad, *ctx.saved_tensors, ctx.shape, *ctx.grid, ctx.is_last)
    return grad_x, None, None, None, None, None


torch.library.register_autograd(gather_op, _backward, setup_context=_setup)


@torch.library.custom_op(
    "sbnet_cupy::gather_grad",
    mutates_args=(),
    schema=f"(Tensor grad_blocks, {ROWS_SCHEMA}, SymInt[] x_shape, {GRID_SCHEMA}, bool channels_last) -> Tensor",
)
def gather_grad_op(grad_blocks: Any, bin_counts: Any, indices: Any, x_shape: Any, *grid_and_layout: Any) -> Any:
    *grid, is_last = grid_and_layout
    blocks = Blocks(bin_counts, indices, *grid)
    grad_x = new_images(grad_blocks, x_shape, is_last)
    n, c, h, w = x_shape
    with at(grad_blocks.device):
        sbnet_cupy.sparse_gather_grad(
            as_image(grad_blocks), *blocks.rows, (n, h, w, c), **blocks.grid, out=as_image(grad_x)
        )
    return grad_x


@gather_grad_op.register_fake
def _(grad_blocks: Any, bin_counts: Any, indices: Any, x_shape: Any, *grid_and_layout: Any) -> Any:
    return new_images(grad_blocks, x_shape, grid_and_layout[-1])
