"""The convolution of a stack in NumPy: the definition that the other engines are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._affine import wide_dtype

Array = np.ndarray[Any, Any]


def room(rows: int) -> int:
    """Any number of rows is as good as another."""
    return rows


def convolve(stack: Array, w: Array, strides: tuple[int, int], tf32: bool) -> Array:
    """The sum over kernel positions of shifted pixels times weights, in float32 at least, not rounded after."""
    wide = wide_dtype(stack.dtype)
    (kh, kw), (sh, sw) = w.shape[:2], strides
    height, width = (stack.shape[1] - kh) // sh + 1, (stack.shape[2] - kw) // sw + 1
    total = np.zeros((stack.shape[0], max(0, height), max(0, width), w.shape[3]), wide)
    if total.size == 0:
        return total
    with np.errstate(all="ignore"):
        for dy in range(kh):
            for dx in range(kw):
                pixels = stack[:, dy : dy + (height - 1) * sh + 1 : sh, dx : dx + (width - 1) * sw + 1 : sw]
                total += pixels.astype(wide) @ w[dy, dx].astype(wide)
    return total
