"""What the tests of ``sbnet_cupy.torch`` share: devices, memory formats, random tensors."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

#: Ways in which a tensor [N, C, H, W] may lie in memory.
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")

#: Blocks of 8 pixels, and the same with a halo of one.
TILES: dict[str, Any] = {"bsize": (8, 8), "bstride": (8, 8)}
HALO: dict[str, Any] = {"bsize": (10, 10), "boffset": (-1, -1), "bstride": (8, 8)}


def random_tensor(*shape: int, seed: int = 0, dtype: Any = torch.float32, device: Any = "cpu") -> Any:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(device, dtype)


def random_mask(n: int, h: int, w: int, density: float = 0.3, seed: int = 0, device: Any = "cpu") -> Any:
    """Active in about `density` of the tiles of 8 x 8 pixels."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.rand(n, -(-h // 8), -(-w // 8), generator=generator) < density
    tiles[:, 0, -1] = tiles[:, -1, 0] = True  # at the borders in any case
    return tiles.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :h, :w].contiguous().to(device)


def lay_out(tensor: Any, layout: str) -> Any:
    """The same numbers, laid out as named."""
    n, c, h, w = tensor.shape
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        room = tensor.new_zeros(n, h + 1, w + 2, c + 3)
        view = room[:, 1:, 2:, 1 : c + 1].permute(0, 3, 1, 2)
        view.copy_(tensor)
        return view
    return tensor[:, :1].contiguous().expand(n, c, h, w)


def random_state(module: Any, seed: int = 0) -> Any:
    """Random parameters and statistics: no batch norm is the identity, and no ReLU takes all away."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                values = torch.rand(tensor.shape, generator=generator)
                if tensor.dim() > 1:
                    tensor.copy_(2 * values - 1)
                else:
                    tensor.copy_(values + 0.5 if name.endswith(("weight", "var")) else values - 0.3)
    return module
