"""Trains a small network with sparse bottlenecks to outline galaxies in noisy pictures, and the same one densely.

The picture is the Hubble deep field that scikit-image ships. The truth is where the clean picture, smoothed, is bright;
the network sees crops with fresh noise in every step. A cheap mask, the local mean of the noisy crop, says where to
look.
The left 70 % of the picture are for training, the rest is for the score.

    python -m examples.find_galaxies --output build

prints the scores and the times of both, and writes the loss curves to ``find_galaxies.png``. What to read: ``Network``
takes the active tiles or None, and nothing else differs between sparse and dense.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage import data, filters
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange

from sbnet_cupy.torch import SparseBlockGrid, SparseBottleneck, SparseConv2d

NOISE = 0.3  # standard deviation, of a picture from 0 to 1
BRIGHT = 0.3  # above it, the smoothed picture is a source
LOOK = 0.2  # above it, the local mean of the noisy picture may be one
ROOM = 0.36  # part of the tiles that training has room for; about 0.29 are active
NOTHING = -5.0  # logit where nobody looks


@dataclass(frozen=True)
class Settings:
    """How large, how long, and where."""

    device: str = "cpu"
    channels: int = 32
    blocks: int = 3
    tile: int = 16
    crop: int = 256
    batch: int = 2
    steps: int = 200
    seed: int = 0


class Network(nn.Module):
    """A stem, bottlenecks, and a logit for each pixel."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.stem = SparseConv2d(3, channels, 3)
        self.blocks = nn.ModuleList(SparseBottleneck(channels, channels // 2) for _ in range(blocks))
        self.head = SparseConv2d(channels, 1, 3)

    def forward(self, x: Tensor, grid: SparseBlockGrid | None) -> Tensor:
        """Logits ``[N, 1, H, W]`` of images ``[N, 3, H, W]``, in the tiles of `grid`, or everywhere."""
        y = self.stem(x, grid)
        for block in self.blocks:
            y = block(y, grid)
        nothing = None if grid is None else x.new_full((len(x), 1, *x.shape[2:]), NOTHING)
        logits: Tensor = self.head(y, grid, nothing)
        return logits


@dataclass
class Outcome:
    """What came of one training."""

    score: float
    seconds: float  # the median of a training step
    losses: list[float] = field(default_factory=list)


def load() -> tuple[Tensor, Tensor]:
    """The picture ``[3, H, W]`` from 0 to 1, and where its sources are: ``[1, H, W]``, 0 or 1."""
    picture = data.hubble_deep_field().astype(np.float32) / 255
    sources = filters.gaussian(picture.mean(2), 1.5) > BRIGHT
    return torch.from_numpy(picture).permute(2, 0, 1), torch.from_numpy(sources)[None].float()


def where_to_look(x: Tensor, tile: int, room: float | None = None) -> SparseBlockGrid:
    """The tiles in which the noisy picture is bright, averaged over 7 x 7 pixels: the network's only prior.

    With `room` for a part of the tiles, every step has stacks of one size. Nothing then waits for their number, and
    cuDNN does not have to plan for new sizes, which takes longer than the convolutions.
    """
    brightness = functional.avg_pool2d(x.mean(1, keepdim=True), 7, 1, 3)
    tiles = len(x) * math.prod(-(-size // tile) for size in x.shape[2:])
    capacity = None if room is None else math.ceil(room * tiles)
    return SparseBlockGrid.from_mask(brightness, tile, tol=LOOK, capacity=capacity)


def f1(logits: Tensor, truth: Tensor) -> float:
    """Harmonic mean of precision and recall, over all pixels."""
    found, true = logits > 0, truth > 0.5
    return float(2 * (found & true).sum() / (found.sum() + true.sum()).clamp(min=1))


def train(settings: Settings, sparse: bool) -> Outcome:
    """Train on the left part of the picture, and score on the right one."""
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    picture, truth = (tensor.to(device) for tensor in load())
    border = int(0.7 * picture.shape[2])
    network = Network(settings.channels, settings.blocks).to(device, memory_format=torch.channels_last)
    # One graph for both: batch norm and ReLU then take few passes over memory, of pixels and of tiles alike.
    model: Any = torch.compile(network, fullgraph=True) if device.type == "cuda" else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=settings.steps)
    numbers = np.random.default_rng(settings.seed)
    noise = torch.Generator(device).manual_seed(settings.seed)

    def noisy(x: Tensor) -> Tensor:
        x = x + NOISE * torch.randn(x.shape, generator=noise, device=device)
        return x.contiguous(memory_format=torch.channels_last)

    losses, seconds = [], []
    for _ in trange(settings.steps, desc="sparse" if sparse else "dense", disable=None):
        x, y = crops(picture[..., :border], truth[..., :border], settings, numbers)
        x = noisy(x)
        begin = now(device)
        grid = where_to_look(x, settings.tile, ROOM) if sparse else None
        pixels = functional.binary_cross_entropy_with_logits(model(x, grid), y, reduction="none")
        loss = pixels.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(now(device) - begin)
        schedule.step()
        losses.append(loss.item())
    network.eval()
    with torch.no_grad():
        x = noisy(picture[None, :, :, border:])
        score = f1(network(x, where_to_look(x, settings.tile) if sparse else None), truth[None, :, :, border:])
    return Outcome(score, statistics.median(seconds), losses)


def crops(picture: Tensor, truth: Tensor, settings: Settings, numbers: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random crops of picture and truth."""
    size = settings.crop
    corners = [[numbers.integers(0, n - size + 1) for n in picture.shape[1:]] for _ in range(settings.batch)]
    pieces = [[t[:, i : i + size, j : j + size] for i, j in corners] for t in (picture, truth)]
    return torch.stack(pieces[0]), torch.stack(pieces[1])


def now(device: torch.device) -> float:
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def draw(outcomes: dict[str, Outcome], path: Path) -> None:
    """Write the loss curves as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, outcome in outcomes.items():
        width = max(1, len(outcome.losses) // 20)
        smooth = np.convolve(outcome.losses, np.ones(width) / width, "valid")
        axes.plot(np.arange(len(smooth)) + width, smooth, label=f"{name}: F1 {outcome.score:.3f}")
    axes.set(xlabel="step", ylabel=f"cross-entropy, mean of {width} steps", yscale="log", title="Galaxies in noise")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def run(settings: Settings, output: Path) -> dict[str, Outcome]:
    """Train both, print what came of it, and draw the curves."""
    outcomes: dict[str, Any] = {name: train(settings, name == "sparse") for name in ("sparse", "dense")}
    for name, outcome in outcomes.items():
        print(f"{name:6}  F1 {outcome.score:.3f}  {1e3 * outcome.seconds:.1f} ms a step")
    draw(outcomes, output / "find_galaxies.png")
    print(output / "find_galaxies.png")
    return outcomes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.find_galaxies", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("."), metavar="DIR", help="folder for the curves")
    for name, value in vars(Settings()).items():
        if name != "device":
            parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = vars(parser.parse_args(arguments))
    run(output=options.pop("output"), settings=Settings(**options))


if __name__ == "__main__":
    main()
