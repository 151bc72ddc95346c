"""The convolution of a stack as products of cuBLAS, one for each kernel position, without im2col.

All pixels of a stack [M, h, w, C] are one matrix X [M*h*w, C]. Kernel position (dy, dx) adds X, from its row
dy*w + dx on, times the weights [C, K] of that position. Row p of the sum is then the convolution at pixel p, except
where the kernel would reach over the end of a block's row or over its last row: those results mix pixels that are no
neighbours, and the view that is returned leaves them out.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from . import _cublas
from ._affine import wide_dtype
from ._conv_geometry import Pair, valid_size


def room(rows: int) -> int:
    """Any number of rows is as good as another."""
    return rows


def convolve(stack: Any, w: Any, strides: Pair, tf32: bool) -> Any:
    """The convolution as a view of the matrix of all sums.

    Several products add up in the result, so for half types it is float32 then. The only product of a 1x1 kernel is
    rounded by cuBLAS, once.
    """
    (kh, kw), features = w.shape[:2], w.shape[3]
    rows, height, width, channels = stack.shape
    out_size = valid_size((height, width), (kh, kw), strides)
    dtype = stack.dtype if kh == kw == 1 else wide_dtype(stack.dtype)
    if 0 in (rows, *out_size, channels, features):
        return cupy.zeros((rows, *out_size, features), dtype)
    stack, w = _matrix(stack), _matrix(w)
    phases, (height, width) = _split(stack, (kh, kw), strides)
    # So many that the farthest shift does not read beyond the stack. The last of them is the view's last pixel.
    sums = rows * height * width - (kh - 1) // strides[0] * width - (kw - 1) // strides[1]
    result = cupy.empty((sums, features), dtype)
    with _cublas.Multiplier() as cublas:
        for dy, dx in np.ndindex(kh, kw):
            phase = phases[dy % strides[0]][dx % strides[1]]
            shift = dy // strides[0] * width + dx // strides[1]
            cublas.multiply(
                phase.data.ptr + shift * channels * stack.itemsize,
                w.data.ptr + (dy * kw + dx) * channels * features * w.itemsize,
                result.data.ptr,
                (sums, channels, features),
                (stack.dtype, dtype),
                accumulate=(dy, dx) != (0, 0),
                tf32=tf32,
            )
    step = features * result.itemsize
    view_strides = (height * width * step, width * step, step, result.itemsize)
    return cupy.lib.stride_tricks.as_strided(result, (rows, *out_size, features), view_strides)


def _matrix(array: Any) -> Any:
    """The array, or a copy, so that it is dense and as aligned as its rows are long, which cuBLAS counts on."""
    if array.flags.c_contiguous and array.data.ptr % 16 == 0:
        return array
    return array.copy()


def _split(stack: Any, ksize: Pair, strides: Pair) -> tuple[list[list[Any]], Pair]:
    """The stack taken apart by the remainders of rows and columns modulo the strides; and height and width of a part.

    With a stride, a kernel position meets only pixels of one remainder. Taken apart, these lie side by side, so that
    products are as large as their results. That costs one more pass over the stack, where products of the whole would
    cost stride^2 times the work, and batches of single rows would be too small for the device. Parts are as large as
    the largest of them; what lies beyond the others' ends meets only sums that are left out.
    """
    if strides == (1, 1):
        return [[stack]], stack.shape[1:3]
    rows, height, width, channels = stack.shape
    size = (-(-height // strides[0]), -(-width // strides[1]))
    used = tuple(min(k, s) for k, s in zip(ksize, strides))
    parts = cupy.empty((*used, rows, *size, channels), stack.dtype)
    for y, x in np.ndindex(used):
        part = stack[:, y :: strides[0], x :: strides[1]]
        parts[y, x, :, : part.shape[1], : part.shape[2]] = part
    return [[parts[y, x] for x in range(used[1])] for y in range(used[0])], size
