"""What the registered ops share: pieces of their schemas, their arguments, memory for their results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._geometry import parse_grid
from ._arrays import channels_last

#: Of the schemas: the active blocks, and the grid that they belong to.
ROWS_SCHEMA = "Tensor bin_counts, Tensor active_block_indices"
GRID_SCHEMA = "int[] bsize, int[] boffset, int[] bstride"


def parse_blocks(bsize: Sequence[int], boffset: Sequence[int], bstride: Sequence[int]) -> tuple[list[int], ...]:
    """The arguments of an op that say where blocks lie, of a form that PyTorch takes."""
    if not torch.compiler.is_compiling():  # which would trace the checks; the op makes them as well
        return tuple(map(list, parse_grid(bsize, boffset, bstride)))
    return list(bsize), list(boffset), list(bstride)


def autocast(*tensors: Tensor) -> list[Tensor]:
    """What autocast makes of the inputs of a convolution."""
    return [tensor.to(autocast_dtype(tensor)) for tensor in tensors]


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives an input of a convolution."""
    if is_autocasting(x) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def is_autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    kind = x.device.type
    return kind in ("cpu", "cuda") and bool(torch.is_autocast_enabled(kind))


def new_stack(x: Tensor, indices: Tensor, bsize: Sequence[int]) -> Tensor:
    """Memory for the blocks of `x`."""
    return new_images(x, (indices.shape[0], x.shape[1], *bsize), channels_last(x))


def new_images(like: Tensor, shape: Sequence[int], is_last: bool) -> Tensor:
    """Memory for images or stacks: with the channels of a pixel side by side, or contiguous."""
    order = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)
