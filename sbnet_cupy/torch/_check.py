"""Checks of tensors, in PyTorch's order of axes. The library checks the rest on the arrays that tensors become."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_image(name: str, x: torch.Tensor) -> None:
    """Raise unless it has the axes N, C, H, W."""
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}")


def check_mask(mask: torch.Tensor) -> None:
    """Raise unless it has the axes N, H, W and perhaps one channel."""
    if mask.dim() != 3 and not (mask.dim() == 4 and mask.shape[1] == 1):
        raise ValueError(f"mask: expected shape (N, H, W) or (N, 1, H, W), got {tuple(mask.shape)}")


def check_tensors(**named: object) -> None:
    """Raise unless all are tensors with strides."""
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected a PyTorch tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{name}: expected a tensor with strides, got layout {value.layout}")


def check_devices(first: str, x: torch.Tensor, **others: torch.Tensor) -> None:
    """Raise unless all are on the device of `x`, the argument `first`."""
    for name, tensor in others.items():
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device} like {first}, got one on {tensor.device}")


def check_rows(x: torch.Tensor, bin_counts: torch.Tensor, active_block_indices: torch.Tensor) -> None:
    """Raise unless the indices are on the device of `x`."""
    check_devices("x", x, bin_counts=bin_counts, active_block_indices=active_block_indices)


def check_blocks(blocks: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, bsize: Sequence[int]) -> None:
    """Raise unless it is a stack of blocks of `x`."""
    if blocks.dtype != x.dtype:
        raise TypeError(f"blocks: expected dtype {x.dtype} like x, got {blocks.dtype}")
    shape = (indices.shape[0], x.shape[1], *bsize)
    if tuple(blocks.shape) != shape:
        raise ValueError(f"blocks: expected shape {shape} (M, C, height, width), got {tuple(blocks.shape)}")
