"""What the registered ops share: pieces of their schemas, their arguments, memory for their results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._geometry import parse_grid
from ._arrays import as_array, channels_last

#: Of the schemas: the active blocks, and the grid that they belong to.
ROWS_SCHEMA = "Tensor bin_counts, Tensor active_block_indices"
GRID_SCHEMA = "int[] bsize, int[] boffset, int[] bstride"


class Blocks(NamedTuple):
    """Active blocks: rows of indices, and the grid that they belong to, in the order of the schemas."""

    bin_counts: Tensor
    active_block_indices: Tensor
    bsize: Sequence[int]
    boffset: Sequence[int]
    bstride: Sequence[int]

    @property
    def rows(self) -> tuple[Any, Any]:
        """Count and indices, as the library takes them."""
        return as_array(self.bin_counts), as_array(self.active_block_indices)

    @property
    def grid(self) -> dict[str, Any]:
        """Where blocks lie, as the library takes it."""
        return {"bsize": self.bsize, "boffset": self.boffset, "bstride": self.bstride}

    def new_stack(self, x: Tensor) -> Tensor:
        """Memory for the blocks of `x`."""
        shape = (self.active_block_indices.shape[0], x.shape[1], *self.bsize)
        return new_images(x, shape, channels_last(x))


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
    dtype = autocasting_to(x.device)
    return x.dtype if dtype is None or not x.is_floating_point() or x.dtype == torch.float64 else dtype


def autocasting_to(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device, or None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else None


def allow_tf32() -> bool:
    """Whether PyTorch lets convolutions round float32 to TF32."""
    settings = getattr(torch.backends.cudnn, "conv", None)  # since PyTorch 2.9
    if settings is None:
        return bool(torch.backends.cudnn.allow_tf32)
    return bool(settings.fp32_precision == "tf32")


def takes_gradients(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd follows what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def new_images(like: Tensor, shape: Sequence[int], is_last: bool) -> Tensor:
    """Memory for images or stacks: with the channels of a pixel side by side, or contiguous."""
    order = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)
