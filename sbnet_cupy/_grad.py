"""``sparse_gather_grad`` and ``sparse_scatter_grad``: what flows back through gather and scatter."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import _device
from ._gather import sparse_gather
from ._geometry import BlockGrid, parse_grid
from ._scatter import sparse_scatter_var
from ._validate import (
    Look,
    Reach,
    Spec,
    address_of,
    array_namespace,
    check_addable,
    check_image,
    check_indices,
    check_like,
    check_place,
    check_separate,
    current_device,
    look_at,
    output_reach,
    reach_of,
    stack_axes,
    stack_shape,
)

IMAGE_AXES = "N, H, W, C"

_INT32 = np.dtype(np.int32)

#: A dtype of each size, in bytes, in which 0 is all bits 0.
_WORDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def sparse_gather_grad(
    grad_blocks: Any,
    bin_counts: Any,
    active_block_indices: Any,
    x_shape: Sequence[int],
    *,
    bsize: Sequence[int],
    boffset: Sequence[int] = (0, 0),
    bstride: Sequence[int],
    transpose: bool = False,
    out: Any = None,
) -> Any:
    """Gradient of a scalar by the image tensor, from its gradient by the stack that :func:`sparse_gather` made of it.

    Gather is linear, and this is its adjoint: ``<sparse_gather(x), b> == <x, sparse_gather_grad(b)>``. Each pixel gets
    the sum of the gradients of all its copies, in the order of the indices.

    Parameters
    ----------
    grad_blocks : ndarray, shape (M, bsize[0], bsize[1], C), or (M, C, bsize[0], bsize[1]) with `transpose`
        Gradient by the stack, in any strides: integers, float16, bfloat16, float32, float64 or complex.
    bin_counts, active_block_indices, bsize, boffset, bstride, transpose
        As they were given to :func:`sparse_gather`.
    x_shape : (N, H, W, C)
        Shape of the image tensor.
    out : ndarray, optional
        Where to put the result: of its shape and the dtype of `grad_blocks`, in any strides that give each element an
        address of its own; shares no memory with the other arrays. Its contents do not matter.

    Returns
    -------
    ndarray, shape (N, H, W, C)
        The gradient (`out` where it was given), of the dtype of `grad_blocks`; 0 where no block lies.

    Raises
    ------
    TypeError
        Arrays of different kinds, or an unsupported or wrong dtype.
    ValueError
        A wrong rank or shape, an array on another device than the current one, an `out` that is read-only
        or overlaps an input, or a size or stride below 1. Nothing is changed then.

    Notes
    -----
    Exact where blocks overlap or repeat: sums are those of :func:`sparse_scatter` with ``add=True, atomic=True``, half
    types in float32 and rounded once. The result is the same to the bit in every run.

    With CuPy arrays, work runs on the current stream, without synchronisation. It allocates the result unless `out` is
    given, fills it with zeros, and then does and allocates what :func:`sparse_scatter_var` does.
    """
    inputs = {"grad_blocks": grad_blocks, "bin_counts": bin_counts, "active_block_indices": active_block_indices}
    xp = array_namespace(inputs, out)
    grid, shape = parse_grid(bsize, boffset, bstride), _parse_shape(x_shape)
    looks, device = tuple(map(look_at, inputs.values())), current_device(xp)
    reaches = _check_stack(*looks, shape, grid, bool(transpose), device)
    if out is None:
        out = _device.memory(xp).zeros(shape, grad_blocks.dtype)
    else:
        reach = _check_out("out", look_at(out), "grad_blocks", grad_blocks.dtype, shape, IMAGE_AXES, device)
        check_separate("out", out, reach, inputs, reaches)
        _device.memory(xp).clear(out)
    options = {**grid._asdict(), "add": True, "atomic": True, "transpose": bool(transpose)}
    return sparse_scatter_var(grad_blocks, bin_counts, active_block_indices, out, **options)


class ScatterGrad(NamedTuple):
    """Gradients by the two tensors that :func:`sparse_scatter` takes, as :func:`sparse_scatter_grad` returns them.

    Attributes
    ----------
    grad_blocks : ndarray, shape (M, bsize[0], bsize[1], C), or (M, C, bsize[0], bsize[1])
        Gradient by the block stack.
    grad_x : ndarray, shape (N, H, W, C)
        Gradient by the base.
    """

    grad_blocks: Any
    grad_x: Any


def sparse_scatter_grad(
    grad_y: Any,
    bin_counts: Any,
    active_block_indices: Any,
    *,
    bsize: Sequence[int],
    boffset: Sequence[int] = (0, 0),
    bstride: Sequence[int],
    add: bool = False,
    transpose: bool = False,
    out: Sequence[Any] | None = None,
) -> ScatterGrad:
    """Gradients of a scalar by block stack and base, from its gradient by what :func:`sparse_scatter` made of them.

    With `add`, each pixel of a block gets the gradient of the image's pixel that it was added to, and the base gets
    the gradient as it is. Without, the gradient of a pixel goes to the block that wrote it last, all other blocks that
    cover it get 0 there, and so does the base.

    Parameters
    ----------
    grad_y : ndarray, shape (N, H, W, C)
        Gradient by the result of scatter, of any numeric or bool dtype and any strides.
    bin_counts, active_block_indices, bsize, boffset, bstride, add, transpose
        As they were given to :func:`sparse_scatter`.
    out : (ndarray, ndarray), optional
        Where to put the two results: of their shapes and the dtype of `grad_y`, in any strides, each with memory of its
        own.

    Returns
    -------
    ScatterGrad
        ``(grad_blocks, grad_x)``, of the dtype of `grad_y`. Rows of the stack that scatter ignores, and pixels outside
        of the image, are 0. With `add` and without `out`, `grad_x` is the array `grad_y` itself.

    Raises
    ------
    TypeError, ValueError
        As in :func:`sparse_gather_grad`. Nothing is changed then.

    Notes
    -----
    Copies bits, as gather does. Who wrote a pixel last is found by scattering row numbers: over the blocks of the grid
    where these do not overlap, over the pixels where they do. The result is the same to the bit in every run.

    With CuPy arrays, work runs on the current stream, without synchronisation. Besides the results it allocates,
    without `add`, 4 bytes for each block of the grid that touches the image and 21 for each row of the indices, or
    where blocks overlap 4 bytes for each pixel of the image and 5 for each of the stack; one block of zeros; and what
    :func:`sparse_scatter` does.
    """
    named = {"grad_y": grad_y, "bin_counts": bin_counts, "active_block_indices": active_block_indices}
    outs = (None, None) if out is None else _parse_outs(out)
    xp = array_namespace({**named, **_given(outs)})
    grid, transpose = parse_grid(bsize, boffset, bstride), bool(transpose)
    device = current_device(xp)
    reaches = _check_image(*map(look_at, named.values()), device)
    if out is not None:
        _check_outs(outs, named, reaches, grid, transpose, device)
    rows = Rows(xp, bin_counts, active_block_indices, grid)
    grad_blocks = rows.grad_of_blocks(grad_y, bool(add), transpose, outs[0])
    if not add:
        return ScatterGrad(grad_blocks, rows.grad_of_base(grad_y, outs[1]))
    if outs[1] is not None:
        _device.memory(xp).copyto(outs[1], grad_y)
    return ScatterGrad(grad_blocks, grad_y if outs[1] is None else outs[1])


class Rows(NamedTuple):
    """The rows of the indices of one call, which are already checked."""

    xp: ModuleType
    bin_counts: Any
    indices: Any
    grid: BlockGrid

    @property
    def numbers(self) -> Any:
        """The number of each row, as a stack of blocks of one pixel and one channel."""
        return self.xp.arange(self.indices.shape[0], dtype=np.int32).reshape(-1, 1, 1, 1)

    def grad_of_blocks(self, grad_y: Any, add: bool, transpose: bool, out: Any) -> Any:
        """The gradient by the stack."""
        if add:
            return self._gather(grad_y, self.grid, self.indices, transpose, out)
        if self.grid.overlaps:
            return self._gather_last(grad_y, transpose, out)
        return self._gather(grad_y, self.grid, self._without_rewritten(grad_y.shape), transpose, out)

    def grad_of_base(self, grad_y: Any, out: Any) -> Any:
        """The gradient by the base."""
        memory = _device.memory(self.xp)
        if out is None:
            out = memory.copy_of(grad_y)
        else:
            memory.copyto(out, grad_y)
        self.clear(out)
        return out

    def clear(self, x: Any) -> None:
        """Zero the pixels of the blocks in `x`."""
        xp, shape = self.xp, stack_shape(self.indices.shape[0], x.shape[3], self.grid, transpose=False)
        nothing = xp.broadcast_to(_device.memory(xp).zeros((1, *shape[1:]), x.dtype), shape)
        sparse_scatter_var(nothing, self.bin_counts, self.indices, x, **self.grid._asdict())

    def _without_rewritten(self, shape: Sequence[int]) -> Any:
        """The indices, with (-1, -1, -1) in each row whose block a later row names again: blocks do not overlap."""
        height, width = self.grid.axes(shape[1], shape[2])
        # An image with one pixel for each block of the grid.
        cells = BlockGrid((1, 1), (-height.first, -width.first), (1, 1))
        last = _device.memory(self.xp).zeros((shape[0], height.count, width.count, 1), _INT32)
        numbers = self.numbers
        sparse_scatter_var(numbers, self.bin_counts, self.indices, last, **cells._asdict())
        is_last = self._gather(last, cells, self.indices) == numbers
        return self.xp.where(is_last.reshape(-1, 1), self.indices, np.int32(-1))

    def _gather_last(self, grad_y: Any, transpose: bool, out: Any) -> Any:
        """Gather, but 0 in each pixel that a later row writes again."""
        last = _device.memory(self.xp).zeros((*grad_y.shape[:3], 1), _INT32)
        numbers = self.xp.broadcast_to(self.numbers, (self.indices.shape[0], *self.grid.bsize, 1))
        sparse_scatter_var(numbers, self.bin_counts, self.indices, last, **self.grid._asdict())
        is_rewritten = self.xp.not_equal(self._gather(last, self.grid, self.indices), numbers)
        out = self._gather(grad_y, self.grid, self.indices, transpose, out)
        stack = out.transpose(0, 2, 3, 1) if transpose else out
        self.xp.copyto(_in_wide_words(stack), False, where=is_rewritten)
        return out

    def _gather(self, x: Any, grid: BlockGrid, indices: Any, transpose: bool = False, out: Any = None) -> Any:
        return sparse_gather(x, self.bin_counts, indices, **grid._asdict(), transpose=transpose, out=out)


def _in_wide_words(stack: Any) -> Any:
    """A view of a stack whose pixels are as few words as possible: to write it takes a time for each word."""
    size = stack.dtype.itemsize
    if stack.flags.c_contiguous:
        size = math.gcd(16, stack.shape[3] * size, address_of(stack))
    return stack.view(_WORDS[size])


def _parse_shape(value: Any) -> tuple[int, ...]:
    try:
        shape = tuple(operator.index(v) for v in value)
    except TypeError:
        shape = ()
    if len(shape) != 4 or min(shape) < 0:
        raise ValueError(f"x_shape: expected 4 integers (N, H, W, C), each >= 0, got {value!r}")
    return shape


def _parse_outs(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"out: expected two arrays (grad_blocks, grad_x), got {type(value).__name__}")
    return value[0], value[1]


def _given(outs: tuple[Any, Any]) -> dict[str, Any]:
    """The results that the caller has memory for, by name."""
    return {name: out for name, out in zip(("out[0]", "out[1]"), outs) if out is not None}


@functools.lru_cache(maxsize=1024)
def _check_stack(
    blocks: Look, counts: Look, rows: Look, shape: tuple[int, ...], grid: BlockGrid, transpose: bool, device: int
) -> tuple[Reach, ...]:
    """Raise unless this is the gradient by a stack, which can be summed; return what each array reaches."""
    stack, bin_counts, indices = Spec(*blocks), Spec(*counts), Spec(*rows)
    check_indices(bin_counts, indices)
    check_addable("grad_blocks", stack)
    expected = stack_shape(indices.shape[0], shape[3], grid, transpose)
    check_like("grad_blocks", stack, stack.dtype, expected, stack_axes(transpose))
    return _check_places(device, grad_blocks=stack, bin_counts=bin_counts, active_block_indices=indices)


@functools.lru_cache(maxsize=1024)
def _check_image(image: Look, counts: Look, rows: Look, device: int) -> tuple[Reach, ...]:
    """Raise unless this is the gradient by an image tensor; return what each array reaches."""
    grad_y, bin_counts, indices = Spec(*image), Spec(*counts), Spec(*rows)
    check_image("grad_y", grad_y)
    check_indices(bin_counts, indices)
    return _check_places(device, grad_y=grad_y, bin_counts=bin_counts, active_block_indices=indices)


def _check_places(device: int, **specs: Spec) -> tuple[Reach, ...]:
    for name, spec in specs.items():
        check_place(name, spec, device)
    return tuple(map(reach_of, specs.values()))


def _check_outs(
    outs: tuple[Any, Any],
    inputs: dict[str, Any],
    reaches: tuple[Reach, ...],
    grid: BlockGrid,
    transpose: bool,
    device: int,
) -> None:
    """Raise unless the results can be put there. What the inputs reach is known already."""
    grad_y = inputs["grad_y"]
    rows = inputs["active_block_indices"].shape[0]
    shapes = (stack_shape(rows, grad_y.shape[3], grid, transpose), grad_y.shape)
    taken = dict(inputs)
    for name, out in _given(outs).items():
        number = int(name == "out[1]")
        axes = (stack_axes(transpose), IMAGE_AXES)[number]
        reach = _check_out(name, look_at(out), "grad_y", grad_y.dtype, shapes[number], axes, device)
        check_separate(name, out, reach, taken, reaches)
        taken[name], reaches = out, (*reaches, reach)


@functools.lru_cache(maxsize=1024)
def _check_out(
    name: str, look: Look, like: str, dtype: np.dtype[Any], shape: tuple[int, ...], axes: str, device: int
) -> Reach:
    """Raise unless a result can be put there; return what it would reach."""
    out = Spec(*look)
    check_like(name, out, dtype, shape, axes, like)
    check_place(name, out, device)
    return output_reach(name, out)
