"""``sparse_gather``: image tensor to block stack."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _device, _reference
from ._affine import IDENTITY, Affine, check_channels, check_floating, parse_activation
from ._geometry import BlockGrid, parse_grid
from ._validate import (
    Look,
    Reach,
    Spec,
    array_namespace,
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


def sparse_gather(
    x: Any,
    bin_counts: Any,
    active_block_indices: Any,
    *,
    bsize: Sequence[int],
    boffset: Sequence[int] = (0, 0),
    bstride: Sequence[int],
    transpose: bool = False,
    out: Any = None,
    scale: Any = None,
    shift: Any = None,
    activation: str | None = None,
) -> Any:
    """Copy blocks of an image tensor into a dense stack.

    Row ``b`` of the stack is the block ``(n, i, j) = active_block_indices[b]``: the pixels
    ``x[n, y:y + bsize[0], z:z + bsize[1], :]`` with ``y = boffset[0] + i*bstride[0]`` and
    ``z = boffset[1] + j*bstride[1]``. Pixels outside of the image are 0.

    With `scale`, `shift` or `activation`, pixels of the image become ``act(x*scale + shift)`` on the way, while those
    outside stay 0: what a convolution with zero padding sees behind a batch norm and an activation.

    Parameters
    ----------
    x : ndarray, shape (N, H, W, C)
        Image tensor of any numeric or bool dtype and any strides. A transposed view of NCHW memory is
        read as it lies, without a copy.
    bin_counts : ndarray, shape (1,), int32
        Number of rows of `active_block_indices` in use; a count above M means M.
    active_block_indices : ndarray, shape (M, 3), int32
        Blocks to copy, as rows ``(n, i, j)``. They may repeat and come in any order.
    bsize, boffset, bstride : (int, int)
        Size of a block, pixel of block (0, 0), and distance between blocks: (height, width) in pixels.
    transpose : bool
        Return blocks as ``[M, C, bsize[0], bsize[1]]`` instead of ``[M, bsize[0], bsize[1], C]``.
    out : ndarray, optional
        Stack to write to, of the result's shape and the dtype of `x`, in any strides.
    scale, shift : ndarray, shape (C,), optional
        Factor and summand for each channel: float32, or float64 for an `x` of float64. Takes an `x` of float16,
        bfloat16, float32 or float64.
    activation : None or 'relu'
        ``'relu'`` makes negative numbers 0 and leaves NaN. Takes the dtypes that `scale` takes.

    Returns
    -------
    ndarray, shape (M, bsize[0], bsize[1], C), or (M, C, bsize[0], bsize[1])
        The stack (`out` where it was given), of the dtype of `x`. Rows at or past ``bin_counts[0]``, and rows
        whose `n` is outside of the batch, are 0.

    Raises
    ------
    TypeError
        Arrays of different kinds, or an unsupported or wrong dtype.
    ValueError
        A wrong rank or shape, an array on another device than the current one, an `out` that is
        read-only or overlaps an input, or a size or stride below 1.

    Notes
    -----
    Copies bits: ``-0.0``, NaN payloads and infinities stay as they are. ``act(x*scale + shift)`` is computed in float32
    (float64 for float64), each operation rounded, and then rounded to the dtype of `x` once: the same to the bit in
    NumPy and CuPy, but for the payload of NaNs.

    With CuPy arrays, work runs on the current stream, without synchronisation, in one kernel; in two, if there is
    `scale`, `shift` or `activation` and one of image and stack is contiguous along channels, the other along pixels.
    The only allocation is the stack, besides copies of `scale` and `shift` where their elements do not lie side by side
    from a multiple of 16 bytes on. The result is bitwise reproducible.
    """
    inputs = {"x": x, "bin_counts": bin_counts, "active_block_indices": active_block_indices}
    affine = IDENTITY
    if not (scale is None and shift is None and activation is None):
        affine = Affine(scale, shift, parse_activation(activation))
        inputs.update(affine.arrays)
    xp = array_namespace(inputs, out)
    grid, transpose = parse_grid(bsize, boffset, bstride), bool(transpose)
    looks = (look_at(x), look_at(bin_counts), look_at(active_block_indices), affine.spec)
    given = None if out is None else look_at(out)
    call = _prepare(*looks, given, grid, transpose, current_device(xp))
    if out is None:
        out = xp.ndarray(call.shape, x.dtype)
        if xp is not np and out.data.ptr % 16:  # from an allocator with other manners than CuPy's
            call = _prepare(*looks, look_at(out), grid, transpose, current_device(xp))
    else:
        check_separate("out", out, call.reach, inputs, call.input_reaches)
    stack = out.transpose(0, 2, 3, 1) if transpose and (xp is np or not call.is_whole) else out
    if xp is np:
        _reference.gather(x, int(bin_counts[0]), active_block_indices, grid, affine, stack)
        return out
    if call.launch is not None:
        _device.transfer().gather(call.launch, x, bin_counts, active_block_indices, out, affine)
    if not call.is_whole:
        _device.activation().activate(stack, stack, affine, bin_counts, active_block_indices, grid, x.shape)
    return out


@dataclass(frozen=True)
class _Call:
    """What calls that look alike share."""

    shape: tuple[int, ...]  # of the stack
    reach: Reach  # of the stack
    input_reaches: tuple[Reach, ...]
    launch: Any  # of kernels/gather.cu; None on the host, and if there is nothing to write
    is_whole: bool  # it does all that is asked for


@functools.lru_cache(maxsize=1024)
def _prepare(
    image: Look,
    counts: Look,
    rows: Look,
    affine: Affine,
    given: Look | None,
    grid: BlockGrid,
    transpose: bool,
    device: int,
) -> _Call:
    """Raise unless the arguments fit together, and choose how to do it."""
    x, bin_counts, indices = Spec(*image), Spec(*counts), Spec(*rows)
    check_image("x", x)
    check_indices(bin_counts, indices)
    if not affine.is_identity:
        check_floating("x", x)
        check_channels("scale", affine.scale, x.dtype, x.shape[3], device)
        check_channels("shift", affine.shift, x.dtype, x.shape[3], device)
    shape = stack_shape(indices.shape[0], x.shape[3], grid, transpose)
    out = Spec.contiguous(shape, x.dtype, device) if given is None else Spec(*given)
    check_like("out", out, x.dtype, shape, stack_axes(transpose))
    inputs = {"x": x, "bin_counts": bin_counts, "active_block_indices": indices, **affine.arrays}
    for name, spec in {"out": out, **inputs}.items():
        check_place(name, spec, device)
    launch = None
    if device >= 0:
        launch = _device.transfer().prepare_gather(x, out, indices.strides, grid, transpose, affine)
    return _Call(
        shape,
        output_reach("out", out),
        tuple(map(reach_of, inputs.values())),
        launch,
        is_whole=affine.is_identity or launch is None or launch.activates,
    )
