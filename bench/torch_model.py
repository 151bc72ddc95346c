"""A PyTorch model on active tiles, beside the dense model as it is and compiled.

What a user of ``sbnet_cupy.torch`` gains without capturing anything: events around calls from Python, the mask's
reduction included. Every result is compared with the model in float64.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .contest import attempt, event_clock
from .rivals import NOT_INSTALLED, Absent, Contender, find_torch
from .table import OURS, Row, Task
from .timing import Run

#: How far from float64 a result may be, as a part of its largest number: TF32 and float16 keep 10 bits of each factor,
#: and a chain rounds a few times. A pixel that was computed from a wrong neighbour is off by far more.
TOLERANCE = 2.0**-7
DENSE = ("PyTorch dense", "PyTorch dense, compiled")


@dataclass(frozen=True)
class ModelCase:
    """A model, the images that it runs on, and which part of them is active: a rectangle at the top left."""

    name: str
    kind: str  # "blocks": two residual blocks under BlockSparse; "bottleneck": one SparseBottleneck
    shape: tuple[int, int, int, int]  # N, C, H, W
    tile: int
    dtype: str
    density: float = 0.1

    def describe(self) -> str:
        """Shape, dtype and density in a few words."""
        shape = "x".join(map(str, self.shape))
        return f"{shape} (N, C, H, W) {self.dtype}, tiles of {self.tile}, {self.density:.0%} of the pixels active"


def cases(quick: bool) -> list[ModelCase]:
    """The models that are measured."""
    found = []
    for dtype in ("float32",) if quick else ("float32", "float16"):
        found.append(ModelCase(f"two basic blocks, {dtype}", "blocks", (1, 64, 512, 1024), 32, dtype))
        found.append(ModelCase(f"one bottleneck, {dtype}", "bottleneck", (1, 256, 256, 512), 16, dtype))
    return found


def tasks(run: Run) -> Iterator[Task]:
    """Name and work of each model."""
    for case in cases(run.quick):
        yield case.name, functools.partial(measure, case, run)


def measure(case: ModelCase, run: Run) -> list[Row]:
    """All rows of one model, with the speed-up over the faster dense one."""
    about: dict[str, Any] = {"description": case.describe(), "parameters": dataclasses.asdict(case)}
    if find_torch() is None:
        return [
            attempt(case.name, name, functools.partial(Absent, name, NOT_INSTALLED), event_clock, run, **about)
            for name in (OURS, *DENSE)
        ]
    scene = Scene(case, "cuda")
    rows = [
        attempt(case.name, name, functools.partial(scene.contender, name), event_clock, run, **about)
        for name in scene.names
    ]
    times = [row.median_us for row in rows if row.implementation in DENSE and row.median_us is not None]
    return [
        dataclasses.replace(row, speedup=min(times) / row.median_us) if times and row.median_us else row for row in rows
    ]


class Scene:
    """A model with its images, its mask, and the result in float64."""

    names = (OURS, f"{OURS}, compiled", *DENSE)

    def __init__(self, case: ModelCase, device: str) -> None:
        import torch

        from sbnet_cupy.torch import SparseBlockGrid

        torch.manual_seed(0)
        n, _, h, w = case.shape
        self.case, self.dense = case, make_model(case).eval()
        x, side = torch.randn(case.shape), math.sqrt(case.density)
        self.mask = torch.zeros((n, h, w), dtype=torch.bool, device=device)
        self.mask[:, : round(h * side), : round(w * side)] = True
        grid = SparseBlockGrid.from_mask(self.mask, case.tile)
        self.capacity, self.active = len(grid.rows.active_block_indices), grid.pixels()
        with torch.no_grad():
            self.exact = copy.deepcopy(self.dense).double().to(device)(x.double().to(device))
            dtype = getattr(torch, case.dtype)
            self.dense = self.dense.to(device, dtype, memory_format=torch.channels_last)
            self.x = x.to(device, dtype, memory_format=torch.channels_last)
        self.tolerance = TOLERANCE * float(self.exact.abs().max())

    def error(self, y: Any) -> float:
        """The largest distance from float64 in active pixels."""
        return float(((y.double() - self.exact).abs() * self.active).max())

    def contender(self, name: str) -> Contender:
        """One way to run the model."""
        import torch

        run: Callable[..., Any] = self.sparse() if name.startswith(OURS) else self.dense
        arguments = (self.x, self.mask) if name.startswith(OURS) else (self.x,)
        if name.endswith("compiled"):
            torch._dynamo.reset()
            run = torch.compile(run)

        def call() -> Any:
            with torch.no_grad():
                return run(*arguments)

        return Contender(name, [call], lambda got: self.error(got[0]) <= self.tolerance)

    def sparse(self) -> Callable[..., Any]:
        """The model on active tiles: a function of images and mask, which waits for nothing."""
        from sbnet_cupy.torch import BlockSparse, SparseBlockGrid

        if self.case.kind == "blocks":
            return BlockSparse(self.dense, self.case.tile, capacity=self.capacity)

        def run(x: Any, mask: Any) -> Any:
            return self.dense(x, SparseBlockGrid.from_mask(mask, self.case.tile, capacity=self.capacity))

        return run


def make_model(case: ModelCase) -> Any:
    """The dense model, whose batch norms are none that do nothing."""
    import torch
    from torch import nn

    from sbnet_cupy.torch import SparseBottleneck

    class BasicBlock(nn.Module):
        """Two 3x3 convolutions beside an identity."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)

        def forward(self, x: Any) -> Any:
            y = torch.relu(self.bn1(self.conv1(x)))
            return torch.relu(self.bn2(self.conv2(y)) + x)

    channels = case.shape[1]
    if case.kind == "blocks":
        model: Any = nn.Sequential(BasicBlock(channels), BasicBlock(channels))
    else:
        model = SparseBottleneck(channels, channels // 4)  # without a grid, a dense one
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight.data, layer.running_var):
                values.uniform_(0.5, 1.5)
            for values in (layer.bias.data, layer.running_mean):
                values.uniform_(-0.3, 0.7)
    return model
