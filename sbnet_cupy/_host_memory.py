"""Whole NumPy arrays, copied and cleared: the functions of ``_memory.py``."""

from __future__ import annotations

from typing import Any

import numpy as np

zeros, copyto = np.zeros, np.copyto


def copy_of(x: Any) -> Any:
    """A copy with the axes in the same order in memory."""
    return x.copy(order="K")


def clear(target: Any) -> None:
    """Fill an array with zeros."""
    target[...] = 0
