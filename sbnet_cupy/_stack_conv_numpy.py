"""The convolution of a stack in NumPy: the definition that the other engines are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._affine import wide_dtype
from ._conv_geometry import Pair, valid_size

Array = np.ndarray[Any, Any]


def room(rows: int) -> int:
    """Any number of rows is as good as another."""
    return rows


def convolve(stack: Array, w: Array, strides: Pair, tf32: bool) -> Array:
    """The sum over kernel positions of shifted pixels times weights, in float32 at least, not rounded after."""
    wide = wide_dtype(stack.dtype)
    (kh, kw), (sh, sw) = w.shape[:2], strides
    height, width = valid_size(stack.shape[1:3], (kh, kw), strides)
    total = np.zeros((stack.shape[0], height, width, w.shape[3]), wide)
    if total.size == 0:
        return total
    with np.errstate(all="ignore"):
        for dy in range(kh):
            for dx in range(kw):
                pixels = stack[:, dy : dy + (height - 1) * sh + 1 : sh, dx : dx + (width - 1) * sw + 1 : sw]
                total += pixels.astype(wide) @ w[dy, dx].astype(wide)
    return total
