"""``sparse_scatter`` and ``sparse_scatter_`` on PyTorch tensors, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sbnet_cupy

from .._geometry import parse_grid
from .._grad import Rows
from ._arrays import as_image, at, channels_last, namespace
from ._check import check_blocks, check_devices, check_image, check_rows, check_tensors
from ._common import GRID_SCHEMA, ROWS_SCHEMA, Blocks, autocast, autocasting_to, new_images, parse_blocks
from ._gather import gather_op
from ._operator import operator


def sparse_scatter(
    blocks: Tensor,
    bin_counts: Tensor,
    active_block_indices: Tensor,
    x: Tensor,
    *,
    bsize: Sequence[int],
    boffset: Sequence[int] = (0, 0),
    bstride: Sequence[int],
    add: bool = False,
    atomic: bool = False,
) -> Tensor:
    """Write blocks over a copy of images, or add them: :func:`sbnet_cupy.sparse_scatter` on tensors, with gradients.

    Parameters
    ----------
    blocks : Tensor, shape (M, C, bsize[0], bsize[1])
        Block stack of the dtype of `x`, in any strides.
    bin_counts, active_block_indices : Tensor, shapes (1,) and (M, 3), int32
        As from :func:`reduce_mask`, on the device of `x`.
    x : Tensor, shape (N, C, H, W)
        Base tensor, in any strides.
    bsize, boffset, bstride, add, atomic
        As in :func:`sbnet_cupy.sparse_scatter`.

    Returns
    -------
    Tensor, shape (N, C, H, W)
        The new tensor, in the memory format of `x`.

    Raises
    ------
    TypeError, ValueError
        As :func:`sbnet_cupy.sparse_scatter`.

    Notes
    -----
    Work runs on PyTorch's current stream of the device of `x`, without synchronisation; memory comes from PyTorch's
    allocator: the copy of `x`, and what :func:`sbnet_cupy.sparse_scatter` names. Under autocast, both tensors are
    converted to autocast's dtype first, as the inputs of a convolution are. The gradients are those of
    :func:`sbnet_cupy.sparse_scatter_grad`, bitwise reproducible; they have none of their own.
    """
    check_tensors(blocks=blocks, bin_counts=bin_counts, active_block_indices=active_block_indices, x=x)
    blocks, x = autocast(blocks, x)
    grid = parse_blocks(bsize, boffset, bstride)
    return scatter_op(blocks, bin_counts, active_block_indices, x, *grid, bool(add), bool(atomic))


class _Arguments(NamedTuple):
    """Those of both ops, in the order of their schemas."""

    stack: Tensor
    bin_counts: Tensor
    active_block_indices: Tensor
    x: Tensor
    bsize: Sequence[int]
    boffset: Sequence[int]
    bstride: Sequence[int]
    add: bool
    atomic: bool

    @property
    def blocks(self) -> Blocks:
        """The active blocks."""
        return Blocks(self.bin_counts, self.active_block_indices, self.bsize, self.boffset, self.bstride)

    def check(self) -> None:
        """Raise unless they fit together, as far as the library does not find out."""
        check_image("x", self.x)
        check_rows(self.x, self.bin_counts, self.active_block_indices)
        check_devices("x", self.x, blocks=self.stack)
        check_blocks(self.stack, self.x, self.active_block_indices, self.bsize)

    def write_to(self, y: Tensor) -> None:
        """Write the blocks over `y` or add them to it, in its memory."""
        blocks = self.blocks
        options = {**blocks.grid, "add": self.add, "atomic": self.atomic}
        with at(y.device):
            sbnet_cupy.sparse_scatter_var(as_image(self.stack), *blocks.rows, as_image(y), **options)


@operator(f"scatter(Tensor blocks, {ROWS_SCHEMA}, Tensor x, {GRID_SCHEMA}, bool add, bool atomic) -> Tensor")
def scatter_op(*arguments: Any) -> Any:
    given = _Arguments(*arguments)
    given.check()
    y = given.x.detach().clone()
    given.write_to(y)
    return y


@torch.library.register_fake(scatter_op)
def _(*arguments: Any) -> Any:
    x = _Arguments(*arguments).x
    check_image("x", x)
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, bin_counts, active_block_indices, _, *ctx.grid, ctx.add, _ = inputs
    ctx.save_for_backward(bin_counts, active_block_indices)


def _backward(ctx: Any, grad: Any) -> Any:
    grad_blocks, grad_x = _scatter_grads(
        grad, ctx.saved_tensors, ctx.grid, ctx.add, ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    )
    return grad_blocks, None, None, grad_x, None, None, None, None, None


def _scatter_grads(
    grad: Tensor, rows: Any, grid: Any, add: bool, needs_blocks: bool, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by blocks and base, as far as they are needed."""
    grad_blocks = grad_x = None
    if needs_blocks:
        grad_blocks = (gather_op if add else scatter_grad_blocks_op)(grad, *rows, *grid)
    if needs_x:
        grad_x = grad if add else scatter_grad_x_op(grad, *rows, *grid)
    return grad_blocks, grad_x


torch.library.register_autograd(scatter_op, _backward, setup_context=_setup)


@torch.library.custom_op(
    "sbnet_cupy::scatter_grad_blocks",
    mutates_args=(),
    schema=f"(Tensor grad_y, {ROWS_SCHEMA}, {GRID_SCHEMA}) -> Tensor",
)
def scatter_grad_blocks_op(grad_y: Any, *rows_and_grid: Any) -> Any:
    blocks = Blocks(*rows_and_grid)
    stack = blocks.new_stack(grad_y)
    with at(grad_y.device):
        _rows(grad_y, blocks).grad_of_blocks(as_image(grad_y), add=False, transpose=False, out=as_image(stack))
    return stack


@scatter_grad_blocks_op.register_fake
def _(grad_y: Any, *rows_and_grid: Any) -> Any:
    return Blocks(*rows_and_grid).new_stack(grad_y)


@torch.library.custom_op(
    "sbnet_cupy::scatter_grad_x", mutates_args=(), schema=f"(Tensor grad_y, {ROWS_SCHEMA}, {GRID_SCHEMA}) -> Tensor"
)
def scatter_grad_x_op(grad_y: Any, *rows_and_grid: Any) -> Any:
    grad_x = grad_y.detach().clone()
    with at(grad_y.device):
        _rows(grad_y, Blocks(*rows_and_grid)).clear(as_image(grad_x))
    return grad_x


@scatter_grad_x_op.register_fake
def _(grad_y: Any, *rows_and_grid: Any) -> Any:
    return torch.empty_like(grad_y)


def _rows(like: Tensor, blocks: Blocks) -> Rows:
    return Rows(namespace(like.device), *blocks.rows, parse_grid(**blocks.grid))


@operator(f"onto_zeros(Tensor blocks, {ROWS_SCHEMA}, SymInt[] size, {GRID_SCHEMA}) -> Tensor")
def onto_zeros_op(stack: Any, bin_counts: Any, indices: Any, size: Any, bsize: Any, boffset: Any, bstride: Any) -> Any:
    """Images of (N, height, width) `size`, in the memory format of `stack`: its blocks, and 0 elsewhere."""
    zeros = _new_result(stack, size).zero_()
    given = _Arguments(stack, bin_counts, indices, zeros, bsize, boffset, bstride, add=False, atomic=False)
    given.check()
    given.write_to(zeros)
    return zeros


@torch.library.register_fake(onto_zeros_op)
def _(stack: Any, bin_counts: Any, indices: Any, size: Any, *grid: Any) -> Any:
    return _new_result(stack, size)


def _new_result(stack: Tensor, size: Sequence[int]) -> Tensor:
    check_image("blocks", stack)
    return new_images(stack, (size[0], stack.shape[1], *size[1:]), channels_last(stack))


def _setup_onto_zeros(ctx: Any, inputs: Any, output: Any) -> None:
    _, bin_counts, active_block_indices, _, *ctx.grid = inputs
    ctx.save_for_backward(bin_counts, active_block_indices)


def _backward_onto_zeros(ctx: Any, grad: Any) -> Any:
    return scatter_grad_blocks_op(grad, *ctx.saved_tensors, *ctx.grid), None, None, None, None, None, None


torch.library.register_autograd(onto_zeros_op, _backward_onto_zeros, setup_context=_setup_onto_zeros)


def sparse_scatter_(
    blocks: Tensor,
    bin_counts: Tensor,
    active_block_indices: Tensor,
    x: Tensor,
    *,
    bsize: Sequence[int],
    boffset: Sequence[int] = (0, 0),
    bstride: Sequence[int],
    add: bool = False,
    atomic: bool = False,
) -> Tensor:
    """Write blocks over images in place, or add them, and return the images.

    The same as :func:`sparse_scatter`, without its copy: touches the pixels of the active blocks and no others.

    Parameters
    ----------
    blocks, bin_counts, active_block_indices, bsize, boffset, bstride, add, atomic
        As in :func:`sparse_scatter`.
    x : Tensor, shape (N, C, H, W)
        Tensor to change, in any strides that give each element an address of its own.

    Returns
    -------
    Tensor, shape (N, C, H, W)
        `x` itself.

    Raises
    ------
    TypeError, ValueError
        As :func:`sbnet_cupy.sparse_scatter_var`. Nothing is changed then.
    RuntimeError
        For an `x` that is a leaf and requires grad, as from all in-place ops of PyTorch.

    Notes
    -----
    Gradients flow as for any in-place op of PyTorch. Under ``torch.compile`` with gradients, it is a
    :func:`sparse_scatter` copied over `x`. Under autocast, `blocks` are converted to the dtype of `x`.
    """
    check_tensors(blocks=blocks, bin_counts=bin_counts, active_block_indices=active_block_indices, x=x)
    if autocasting_to(x.device) and blocks.is_floating_point() and x.is_floating_point():
        blocks = blocks.to(x.dtype)
    rows, grid = (bin_counts, active_block_indices), parse_blocks(bsize, boffset, bstride)
    if not (torch.is_grad_enabled() and (blocks.requires_grad or x.requires_grad)):
        scatter_in_place_op(blocks, *rows, x, *grid, bool(add), bool(atomic))
        return x
    if torch.compiler.is_compiling():
        return x.copy_(scatter_op(blocks, *rows, x, *grid, bool(add), bool(atomic)))
    if x.is_leaf and x.requires_grad:  # which autograd would notice too late
        raise RuntimeError("x: expected no leaf that requires grad, which must not change in place, got one")
    changed: Tensor = _InPlaceScatter.apply(blocks, x, rows, grid, bool(add), bool(atomic))
    return changed


@torch.library.custom_op(
    "sbnet_cupy::scatter_",
    mutates_args=("x",),
    schema=f"(Tensor blocks, {ROWS_SCHEMA}, Tensor(a!) x, {GRID_SCHEMA}, bool add, bool atomic) -> ()",
)
def scatter_in_place_op(*arguments: Any) -> None:
    given = _Arguments(*arguments)
    given.check()
    given.write_to(given.x)


@scatter_in_place_op.register_fake
def _(*arguments: Any) -> None:
    check_image("x", _Arguments(*arguments).x)


class _InPlaceScatter(torch.autograd.Function):
    """Autograd of the op that changes its input, which custom ops cannot register."""

    @staticmethod
    def forward(ctx: Any, blocks: Any, x: Any, rows: Any, grid: Any, add: Any, atomic: Any) -> Any:
        scatter_in_place_op(blocks, *rows, x, *grid, add, atomic)
        ctx.mark_dirty(x)
        ctx.save_for_backward(*rows)
        ctx.grid, ctx.add = grid, add
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        needed = ctx.needs_input_grad[:2]
        grad_blocks, grad_x = _scatter_grads(grad, ctx.saved_tensors, ctx.grid, ctx.add, *needed)
        return grad_blocks, grad_x, None, None, None, None
