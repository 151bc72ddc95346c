"""``sparse_scatter`` and ``sparse_scatter_var``: block stack to image tensor."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _device, _reference
from ._geometry import BlockGrid, parse_grid
from ._validate import (
    Look,
    Reach,
    Spec,
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


def sparse_scatter(
    blocks: Any,
    bin_counts: Any,
    active_block_indices: Any,
    x: Any,
    *,
    bsize: Sequence[int],
    boffset: Sequence[int] = (0, 0),
    bstride: Sequence[int],
    add: bool = False,
    atomic: bool = False,
    transpose: bool = False,
    out: Any = None,
) -> Any:
    """Write blocks over a copy of an image tensor, or add them to it.

    The opposite of :func:`sparse_gather`: block ``b`` goes to the pixels that
    ``active_block_indices[b]`` names. `x` is not changed; :func:`sparse_scatter_var` changes it in place
    and saves the copy.

    Parameters
    ----------
    blocks : ndarray, shape (M, bsize[0], bsize[1], C), or (M, C, bsize[0], bsize[1]) with `transpose`
        Block stack of the dtype of `x`, in any strides. Pixels outside of the image are dropped.
    bin_counts : ndarray, shape (1,), int32
        Number of rows of `active_block_indices` in use; a count above M means M.
    active_block_indices : ndarray, shape (M, 3), int32
        Rows ``(n, i, j)``. Rows at or past ``bin_counts[0]``, and rows outside of the batch or of the image,
        are ignored.
    x : ndarray, shape (N, H, W, C)
        Base tensor, in any strides.
    bsize, boffset, bstride : (int, int)
        Size of a block, pixel of block (0, 0), and distance between blocks: (height, width) in pixels.
    add : bool
        Add the blocks to the base instead of writing them over it. Takes integers (they wrap around),
        float16, bfloat16, float32, float64 and complex. Half types are summed in float32 and rounded once.
    atomic : bool
        With `add`, says that blocks may overlap and asks that overlaps are summed. It is a wish about the result:
        no atomics are used.
    transpose : bool
        Blocks are ``[M, C, bsize[0], bsize[1]]``.
    out : ndarray, optional
        Where to put the result: shape and dtype of `x`, in any strides, and no memory of an input.

    Returns
    -------
    ndarray, shape (N, H, W, C)
        The new tensor (`out` where it was given), in the memory order of `x`.

    Raises
    ------
    TypeError
        Arrays of different kinds, or an unsupported or wrong dtype.
    ValueError
        A wrong rank or shape, an array on another device than the current one, an `out` that is read-only
        or overlaps an input, a size or stride below 1, or ``add=True`` on a grid whose blocks
        overlap without ``atomic=True``. Nothing is changed then.

    Notes
    -----
    Where blocks overlap or repeat, they act in the order of the indices: without `add` the later
    one wins, with `add` each is added in turn, as a loop over the rows would do in NumPy. The result is the same
    to the bit in every run.

    With CuPy arrays, work runs on the current stream, without synchronisation. Besides the result and the
    copy into it, it allocates a map of 4 bytes for each block of the grid that touches the image, and
    with `add` 4 bytes for each row of the indices, both given back to CuPy's pool on return. Up to 1024 rows, or 512
    where blocks overlap, need no map, unless the blocks are so small that several share a CTA, or overlap and are
    turned on the way between an image that is contiguous along channels and a stack along pixels, or the reverse.
    """
    inputs = {"blocks": blocks, "bin_counts": bin_counts, "active_block_indices": active_block_indices}
    xp = array_namespace({**inputs, "x": x}, out)
    grid, flags = parse_grid(bsize, boffset, bstride), (bool(add), bool(atomic), bool(transpose))
    looks, base, device = tuple(map(look_at, inputs.values())), look_at(x), current_device(xp)
    call = _prepare(*looks, base, grid, *flags, device)
    if out is None:
        out = _device.memory(xp).copy_of(x)
    else:
        reach = _check_out(look_at(out), base, device)
        check_separate("out", out, reach, {**inputs, "x": x}, (*call.input_reaches, call.reach))
        _device.memory(xp).copyto(out, x)
    given = look_at(out)
    if given != base:
        call = _prepare(*looks, given, grid, *flags, device)
    _run(call, xp, inputs, grid, out, flags)
    return out


def sparse_scatter_var(
    blocks: Any,
    bin_counts: Any,
    active_block_indices: Any,
    x: Any,
    *,
    bsize: Sequence[int],
    boffset: Sequence[int] = (0, 0),
    bstride: Sequence[int],
    add: bool = False,
    atomic: bool = False,
    transpose: bool = False,
) -> Any:
    """Write blocks over an image tensor in place, or add them to it, and return the tensor.

    The same as :func:`sparse_scatter`, without its copy: touches the pixels of the active blocks and no others.

    Parameters
    ----------
    blocks, bin_counts, active_block_indices, bsize, boffset, bstride, add, atomic, transpose
        As in :func:`sparse_scatter`.
    x : ndarray, shape (N, H, W, C)
        Tensor to change, writable, in any strides that give each element an address of its own; shares no
        memory with the other arrays.

    Returns
    -------
    ndarray, shape (N, H, W, C)
        `x` itself.

    Raises
    ------
    TypeError, ValueError
        As in :func:`sparse_scatter`. Nothing is changed then.

    Notes
    -----
    Order, reproducibility, synchronisation and allocations are those of :func:`sparse_scatter`, except that no
    tensor is allocated or copied.
    """
    inputs = {"blocks": blocks, "bin_counts": bin_counts, "active_block_indices": active_block_indices}
    xp = array_namespace({**inputs, "x": x})
    grid, flags = parse_grid(bsize, boffset, bstride), (bool(add), bool(atomic), bool(transpose))
    call = _prepare(*map(look_at, inputs.values()), look_at(x), grid, *flags, current_device(xp), True)
    check_separate("x", x, call.reach, inputs, call.input_reaches)
    _run(call, xp, inputs, grid, x, flags)
    return x


@dataclass(frozen=True)
class _Call:
    """What calls that look alike share."""

    reach: Reach  # of x
    input_reaches: tuple[Reach, ...]
    launch: Any  # of kernels/scatter.cu; None on the host, and if no block touches a pixel


@functools.lru_cache(maxsize=1024)
def _prepare(
    stack: Look,
    counts: Look,
    rows: Look,
    image: Look,
    grid: BlockGrid,
    add: bool,
    atomic: bool,
    transpose: bool,
    device: int,
    in_place: bool = False,
) -> _Call:
    """Raise unless the arguments fit together, and choose how to do it."""
    blocks, bin_counts, indices, x = Spec(*stack), Spec(*counts), Spec(*rows), Spec(*image)
    check_image("x", x)
    check_indices(bin_counts, indices)
    shape = stack_shape(indices.shape[0], x.shape[3], grid, transpose)
    check_like("blocks", blocks, x.dtype, shape, stack_axes(transpose))
    if add:
        check_addable("x", x)
        if grid.overlaps and not atomic:
            raise ValueError(
                f"atomic: expected True to add blocks that overlap (bsize {grid.bsize} exceeds bstride "
                f"{grid.bstride}), got {atomic!r}"
            )
    inputs = {"blocks": blocks, "bin_counts": bin_counts, "active_block_indices": indices}
    for name, spec in {**inputs, "x": x}.items():
        check_place(name, spec, device)
    launch = None
    if device >= 0:
        launch = _device.transfer().prepare_scatter(x, blocks, indices.strides, grid, add, transpose)
    reach = output_reach("x", x) if in_place else reach_of(x)
    return _Call(reach, tuple(map(reach_of, inputs.values())), launch)


@functools.lru_cache(maxsize=1024)
def _check_out(given: Look, image: Look, device: int) -> Reach:
    """Raise unless the result can be put there; return what it would reach."""
    out, x = Spec(*given), Spec(*image)
    check_like("out", out, x.dtype, x.shape, "N, H, W, C")
    check_place("out", out, device)
    return output_reach("out", out)


def _run(call: _Call, xp: Any, inputs: dict[str, Any], grid: BlockGrid, x: Any, flags: tuple[bool, bool, bool]) -> None:
    """Write the blocks over `x` or add them to it."""
    blocks, bin_counts, indices = inputs.values()
    add, _, transpose = flags
    if xp is np:
        scatter = _reference.scatter_add if add else _reference.scatter
        scatter(blocks.transpose(0, 2, 3, 1) if transpose else blocks, int(bin_counts[0]), indices, grid, x)
    elif call.launch is not None:
        _device.transfer().scatter(call.launch, blocks, bin_counts, indices, x, add)
