"""The ops on PyTorch tensors: registered with PyTorch, so that autograd and ``torch.compile`` know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import sbnet_cupy

from .._geometry import parse_grid
from .._grad import Rows
from .._reduce_mask import BlockIndices
from ._arrays import as_array, as_image, at, channels_last, memory_format, namespace
from ._check import check_blocks, check_devices, check_image, check_mask, check_rows, check_tensors

#: Of the schemas: the active blocks, and the grid that they belong to.
ROWS_SCHEMA = "Tensor bin_counts, Tensor active_block_indices"
_GRID_SCHEMA = "int[] bsize, int[] boffset, int[] bstride"


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
    grid = _grid(bsize, boffset, bstride)
    return BlockIndices(*_reduce_mask(mask.detach(), list(bcount), *grid, float(tol), bool(avgpool), capacity))


@torch.library.custom_op(
    "sbnet_cupy::reduce_mask",
    mutates_args=(),
    schema=f"(Tensor mask, int[] bcount, {_GRID_SCHEMA}, float tol, bool avgpool, int? capacity) -> (Tensor, Tensor)",
)
def _reduce_mask(
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
    return indices[: found.active_block_indices.shape[0]], counts


@_reduce_mask.register_fake
def _(mask: Any, bcount: Any, bsize: Any, boffset: Any, bstride: Any, tol: Any, avgpool: Any, capacity: Any) -> Any:
    check_mask(mask)
    return _new_rows(mask, torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity)


def _new_rows(mask: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Indices of `rows` blocks, and their count."""
    return mask.new_empty((rows, 3), dtype=torch.int32), mask.new_empty(1, dtype=torch.int32)


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
    return _gather(x, bin_counts, active_block_indices, *_grid(bsize, boffset, bstride))


@torch.library.custom_op(
    "sbnet_cupy::gather", mutates_args=(), schema=f"(Tensor x, {ROWS_SCHEMA}, {_GRID_SCHEMA}) -> Tensor"
)
def _gather(x: Any, bin_counts: Any, active_block_indices: Any, bsize: Any, boffset: Any, bstride: Any) -> Any:
    check_image("x", x)
    check_rows(x, bin_counts, active_block_indices)
    stack = _new_stack(x, active_block_indices, bsize)
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


@_gather.register_fake
def _(x: Any, bin_counts: Any, active_block_indices: Any, bsize: Any, boffset: Any, bstride: Any) -> Any:
    check_image("x", x)
    return _new_stack(x, active_block_indices, bsize)


def _new_stack(x: Tensor, indices: Tensor, bsize: Sequence[int]) -> Tensor:
    """Memory for the blocks of `x`."""
    return _empty(x, (indices.shape[0], x.shape[1], *bsize), channels_last(x))


def _empty(like: Tensor, shape: Sequence[int], is_last: bool) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(is_last))


def _gather_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, bin_counts, active_block_indices, *ctx.grid = inputs
    ctx.save_for_backward(bin_counts, active_block_indices)
    ctx.shape, ctx.is_last = x.shape, channels_last(x)


def _gather_backward(ctx: Any, grad: Any) -> Any:
    grad_x = _gather_grad(grad, *ctx.saved_tensors, ctx.shape, *ctx.grid, ctx.is_last)
    return grad_x, None, None, None, None, None


_gather.register_autograd(_gather_backward, setup_context=_gather_setup)


@torch.library.custom_op(
    "sbnet_cupy::gather_grad",
    mutates_args=(),
    schema=f"(Tensor grad_blocks, {ROWS_SCHEMA}, SymInt[] x_shape, {_GRID_SCHEMA}, bool channels_last) -> Tensor",
)
def _gather_grad(
    grad_blocks: Any,
    bin_counts: Any,
    active_block_indices: Any,
    x_shape: Any,
    bsize: Any,
    boffset: Any,
    bstride: Any,
    channels_last: Any,
) -> Any:
    grad_x = _empty(grad_blocks, x_shape, channels_last)
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


@_gather_grad.register_fake
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
    return _empty(grad_blocks, x_shape, channels_last)


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
    grid = _grid(bsize, boffset, bstride)
    return _scatter(blocks, bin_counts, active_block_indices, x, *grid, bool(add), bool(atomic))


@torch.library.custom_op(
    "sbnet_cupy::scatter",
    mutates_args=(),
    schema=f"(Tensor blocks, {ROWS_SCHEMA}, Tensor x, {_GRID_SCHEMA}, bool add, bool atomic) -> Tensor",
)
def _scatter(
    blocks: Any,
    bin_counts: Any,
    active_block_indices: Any,
    x: Any,
    bsize: Any,
    boffset: Any,
    bstride: Any,
    add: Any,
    atomic: Any,
) -> Any:
    _check_scatter(blocks, bin_counts, active_block_indices, x, bsize)
    y = x.detach().clone()
    _write(blocks, bin_counts, active_block_indices, y, (bsize, boffset, bstride), add, atomic)
    return y


@_scatter.register_fake
def _(
    blocks: Any,
    bin_counts: Any,
    active_block_indices: Any,
    x: Any,
    bsize: Any,
    boffset: Any,
    bstride: Any,
    add: Any,
    atomic: Any,
) -> Any:
    check_image("x", x)
    return torch.empty_like(x)


def _check_scatter(blocks: Tensor, bin_counts: Tensor, indices: Tensor, x: Tensor, bsize: Sequence[int]) -> None:
    check_image("x", x)
    check_rows(x, bin_counts, indices)
    check_devices("x", x, blocks=blocks)
    check_blocks(blocks, x, indices, bsize)


def _write(blocks: Tensor, bin_counts: Tensor, indices: Tensor, x: Tensor, grid: Any, add: bool, atomic: bool) -> None:
    """Write the blocks over `x` or add them to it, in its memory."""
    bsize, boffset, bstride = grid
    with at(x.device):
        sbnet_cupy.sparse_scatter_var(
            as_image(blocks),
            as_array(bin_counts),
            as_array(indices),
            as_image(x),
            bsize=bsize,
            boffset=boffset,
            bstride=bstride,
            add=add,
            atomic=atomic,
        )


def _scatter_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, bin_counts, active_block_indices, _, *ctx.grid, ctx.add, _ = inputs
    ctx.save_for_backward(bin_counts, active_block_indices)


def _scatter_backward(ctx: Any, grad: Any) -> Any:
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
        grad_blocks = (_gather if add else _scatter_grad_blocks)(grad, *rows, *grid)
    if needs_x:
        grad_x = grad if add else _scatter_grad_x(grad, *rows, *grid)
    return grad_blocks, grad_x


_scatter.register_autograd(_scatter_backward, setup_context=_scatter_setup)


@torch.library.custom_op(
    "sbnet_cupy::scatter_grad_blocks",
    mutates_args=(),
    schema=f"(Tensor grad_y, {ROWS_SCHEMA}, {_GRID_SCHEMA}) -> Tensor",
)
def _scatter_grad_blocks(
    grad_y: Any, bin_counts: Any, active_block_indices: Any, bsize: Any, boffset: Any, bstride: Any
) -> Any:
    stack = _new_stack(grad_y, active_block_indices, bsize)
    with at(grad_y.device):
        rows = _rows(grad_y, bin_counts, active_block_indices, (bsize, boffset, bstride))
        rows.grad_of_blocks(as_image(grad_y), add=False, transpose=False, out=as_image(stack))
    return stack


@_scatter_grad_blocks.register_fake
def _(grad_y: Any, bin_counts: Any, active_block_indices: Any, bsize: Any, boffset: Any, bstride: Any) -> Any:
    return _new_stack(grad_y, active_block_indices, bsize)


@torch.library.custom_op(
    "sbnet_cupy::scatter_grad_x", mutates_args=(), schema=f"(Tensor grad_y, {ROWS_SCHEMA}, {_GRID_SCHEMA}) -> Tensor"
)
def _scatter_grad_x(
    grad_y: Any, bin_counts: Any, active_block_indices: Any, bsize: Any, boffset: Any, bstride: Any
) -> Any:
    grad_x = grad_y.detach().clone()
    with at(grad_y.device):
        rows = _rows(grad_y, bin_counts, active_block_indices, (bsize, boffset, bstride))
        rows.clear(as_image(grad_x))
    return grad_x


@_scatter_grad_x.register_fake
def _(grad_y: Any, bin_counts: Any, active_block_indices: Any, bsize: Any, boffset: Any, bstride: Any) -> Any:
    return torch.empty_like(grad_y)


def _rows(like: Tensor, bin_counts: Tensor, indices: Tensor, grid: Any) -> Rows:
    return Rows(namespace(like.device), as_array(bin_counts), as_array(indices), parse_grid(*grid))


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

    Notes
    -----
    Gradients flow as for any in-place op of PyTorch. Under ``torch.compile`` with gradients, it is a
    :func:`sparse_scatter` copied over `x`. Under autocast, `blocks` are converted to the dtype of `x`.
    """
    check_tensors(blocks=blocks, bin_counts=bin_counts, active_block_indices=active_block_indices, x=x)
    if _is_autocasting(x) and blocks.is_floating_point() and x.is_floating_point():
        blocks = blocks.to(x.dtype)
    rows, grid = (bin_counts, active_block_indices), _grid(bsize, boffset, bstride)
    if not (torch.is_grad_enabled() and (blocks.requires_grad or x.requires_grad)):
        _scatter_var(blocks, *rows, x, *grid, bool(add), bool(atomic))
        return x
    if torch.compiler.is_compiling():
        return x.copy_(_scatter(blocks, *rows, x, *grid, bool(add), bool(atomic)))
    changed: Tensor = _InPlaceScatter.apply(blocks, x, rows, grid, bool(add), bool(atomic))
    return changed


@torch.library.custom_op(
    "sbnet_cupy::scatter_",
    mutates_args=("x",),
    schema=f"(Tensor blocks, {ROWS_SCHEMA}, Tensor(a!) x, {_GRID_SCHEMA}, bool add, bool atomic) -> ()",
)
def _scatter_var(
    blocks: Any,
    bin_counts: Any,
    active_block_indices: Any,
    x: Any,
    bsize: Any,
    boffset: Any,
    bstride: Any,
    add: Any,
    atomic: Any,
) -> None:
    _check_scatter(blocks, bin_counts, active_block_indices, x, bsize)
    _write(blocks, bin_counts, active_block_indices, x, (bsize, boffset, bstride), add, atomic)


@_scatter_var.register_fake
def _(
    blocks: Any,
    bin_counts: Any,
    active_block_indices: Any,
    x: Any,
    bsize: Any,
    boffset: Any,
    bstride: Any,
    add: Any,
    atomic: Any,
) -> None:
    check_image("x", x)


class _InPlaceScatter(torch.autograd.Function):
    """Autograd of the op that changes its input, which custom ops cannot register."""

    @staticmethod
    def forward(ctx: Any, blocks: Any, x: Any, rows: Any, grid: Any, add: Any, atomic: Any) -> Any:
        _scatter_var(blocks, *rows, x, *grid, add, atomic)
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


def _grid(bsize: Sequence[int], boffset: Sequence[int], bstride: Sequence[int]) -> tuple[list[int], ...]:
    """The arguments of an op that say where blocks lie, of a form that PyTorch takes."""
    if not torch.compiler.is_compiling():  # which would trace the checks; the op makes them as well
        return tuple(map(list, parse_grid(bsize, boffset, bstride)))
    return list(bsize), list(boffset), list(bstride)


def autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """What autocast makes of the inputs of a convolution."""
    if not _is_autocasting(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def _is_autocasting(x: Tensor) -> bool:
    kind = x.device.type
    return kind in ("cpu", "cuda") and bool(torch.is_autocast_enabled(kind))
