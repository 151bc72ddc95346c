"""PyTorch models on active tiles, beside the dense models: as they are and compiled, called from Python and captured.

What a user of ``sbnet_cupy.torch`` gains, the mask's reduction included. Called from Python, most of it waits for the
host; captured in a CUDA graph, all of it runs at the device's speed. Captured rows are compared with captured dense
ones, and the others with those that are not. Every result is compared with the model in float64, for two masks
that differ in the number of active tiles: a graph that was captured with one has to be right for the other.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .contest import attempt, event_clock
from .rivals import NOT_INSTALLED, Absent, Contender, find_torch
from .table import OURS, Row, Task
from .timing import Call, Run, Timing, time_eager

#: How far from float64 a result may be, as a part of its largest number: TF32 and float16 keep 10 bits of each factor,
#: and a chain rounds a few times. A pixel that was computed from a wrong neighbour is off by far more.
TOLERANCE = 2.0**-7
#: Tiles that there is room for, as a part of those that the first mask makes active.
ROOM = 1.1
#: Bottlenecks of a stage.
DEPTH = 3
#: Calls ahead of a capture: libraries choose their algorithms, and kernels are compiled.
WARM_UP = 3


@dataclass(frozen=True)
class ModelCase:
    """A model, the images that it runs on, and which part of them is active: a rectangle at the top left."""

    name: str
    kind: str  # "blocks": two residual blocks under BlockSparse; "stage": SparseBottlenecks that share a grid
    shape: tuple[int, int, int, int]  # N, C, H, W
    tile: int
    dtype: str
    density: float = 0.1

    def describe(self) -> str:
        """Shape, dtype and density in a few words."""
        shape = "x".join(map(str, self.shape))
        dtype = f"{self.dtype}, TF32 allowed" if self.dtype == "float32" else self.dtype
        return (
            f"{shape} (N, C, H, W) {dtype}, tiles of {self.tile}, {self.density:.0%} of the pixels active, room for "
            f"{ROOM - 1:.0%} more tiles; x dense: captured over the fastest captured, others over the fastest other"
        )


@dataclass(frozen=True)
class Way:
    """A way to run a model."""

    is_sparse: bool
    is_compiled: bool = False
    is_captured: bool = False

    @property
    def name(self) -> str:
        """As tables have it."""
        parts = [OURS if self.is_sparse else "PyTorch dense"]
        return ", ".join(parts + ["compiled"] * self.is_compiled + ["captured"] * self.is_captured)


DENSE = tuple(Way(False, compiled, captured) for captured in (False, True) for compiled in (False, True))


def ways(case: ModelCase) -> list[Way]:
    """All of them. Ours is compiled where PyTorch's own layers do most of the work, and once, for it takes seconds."""
    kinds = (False, True) if (case.kind, case.dtype) == ("blocks", "float32") else (False,)
    return [*(Way(True, compiled, captured) for captured in (False, True) for compiled in kinds), *DENSE]


def cases(quick: bool) -> list[ModelCase]:
    """The models that are measured."""
    found = []
    for dtype in ("float32",) if quick else ("float32", "float16"):
        found.append(ModelCase(f"three bottlenecks of 96/24, {dtype}", "stage", (1, 96, 400, 700), 16, dtype))
        found.append(ModelCase(f"three bottlenecks of 192/48, {dtype}", "stage", (1, 192, 200, 350), 16, dtype))
        found.append(ModelCase(f"two basic blocks of 64, {dtype}", "blocks", (1, 64, 512, 1024), 32, dtype))
    return found


def tasks(run: Run) -> Iterator[Task]:
    """Name and work of each model."""
    for case in cases(run.quick):
        yield case.name, functools.partial(measure, case, run)


def measure(case: ModelCase, run: Run) -> list[Row]:
    """All rows of one model, with the speed-ups over the fastest dense ones."""
    about: dict[str, Any] = {"description": case.describe(), "parameters": dataclasses.asdict(case)}
    found = ways(case)
    if find_torch() is None:
        return [
            attempt(case.name, way.name, functools.partial(Absent, way.name, NOT_INSTALLED), event_clock, run, **about)
            for way in found
        ]
    scene = functools.cache(functools.partial(Scene, case, "cuda"))
    with fast_pytorch():
        rows = [
            attempt(
                case.name,
                way.name,
                lambda way=way: scene().contender(way),
                replay_clock if way.is_captured else event_clock,
                run,
                **about,
            )
            for way in found
        ]
    return with_speedups(found, rows)


def with_speedups(found: Sequence[Way], rows: Sequence[Row]) -> list[Row]:
    """The rows with their speed-up over the fastest dense one, captured or not as they are themselves."""
    best: dict[bool, float] = {}
    for way, row in zip(found, rows, strict=True):
        if not way.is_sparse and row.median_us is not None:
            best[way.is_captured] = min(row.median_us, best.get(way.is_captured, math.inf))
    return [
        dataclasses.replace(row, speedup=best[way.is_captured] / row.median_us)
        if row.median_us and way.is_captured in best
        else row
        for way, row in zip(found, rows, strict=True)
    ]


@contextlib.contextmanager
def fast_pytorch() -> Iterator[None]:
    """Let PyTorch round float32 to TF32, and measure which of cuDNN's algorithms is fastest."""
    import torch

    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, cublas.allow_tf32
    cudnn.benchmark = cudnn.allow_tf32 = cublas.allow_tf32 = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, cublas.allow_tf32 = before


def replay_clock(calls: Sequence[Call], run: Run) -> Timing:
    """Time of a replay among some in a row."""
    return dataclasses.replace(time_eager(calls, run.repeats, run.stream), clock="graph")


def capture(call: Call) -> Call:
    """A call as a CUDA graph: a function that replays it, and returns the tensor that every replay writes."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()

    def replay() -> Any:
        graph.replay()
        return y

    return replay


class Scene:
    """A model with its images, its masks, and the results in float64."""

    def __init__(self, case: ModelCase, device: str) -> None:
        import torch

        torch.manual_seed(0)
        self.case, self.model = case, make_model(case).eval()
        x = torch.randn(case.shape)
        self.masks = [mask.to(device) for mask in make_masks(case)]
        active = [active_tiles(mask, case.tile) for mask in self.masks]
        self.counts = [int(tiles.sum()) for tiles in active]
        self.capacity = math.ceil(ROOM * max(self.counts))
        #: The mask that is worked on, so that a graph can be given another one.
        self.mask = self.masks[0].clone()
        with torch.no_grad():
            exact, wide = copy.deepcopy(self.model).double().to(device), x.double().to(device)
            self.dense = exact(wide)
            self.sparse = [sparse_result(exact, case, wide, tiles) for tiles in active]
            dtype = getattr(torch, case.dtype)
            self.model = self.model.to(device, dtype, memory_format=torch.channels_last)
            self.x = x.to(device, dtype, memory_format=torch.channels_last)
        torch.compiler.reset()  # else shapes past the eighth would run eagerly
        self._compiled: dict[bool, Callable[..., Any]] = {}

    def is_right(self, y: Any, exact: Any) -> bool:
        """Whether a result is near the one in float64, in all pixels."""
        return bool(float((y.double() - exact).abs().max()) <= TOLERANCE * float(exact.abs().max()))

    def contender(self, way: Way) -> Contender:
        """One way to run the model."""
        import torch

        run = self._runner(way)
        arguments = (self.x, self.mask) if way.is_sparse else (self.x,)

        def call() -> Any:
            with torch.no_grad():
                return run(*arguments)

        made = capture(call) if way.is_captured else call

        def check(got: list[Any]) -> bool:
            if not way.is_sparse:
                return self.is_right(got[0], self.dense)
            return self.is_right(got[0], self.sparse[0]) and self._follows(made)

        return Contender(way.name, [made], check)

    def _follows(self, call: Call) -> bool:
        """Whether a call is right for the second mask, and then for the first again."""
        right = True
        for number in (1, 0):
            self.mask.copy_(self.masks[number])
            right = self.is_right(call(), self.sparse[number]) and right
        return right

    def _runner(self, way: Way) -> Callable[..., Any]:
        """The model as a function of tensors; compiled once for both ways to call it."""
        import torch

        plain = self._run_sparse() if way.is_sparse else self.model
        if not way.is_compiled:
            return plain
        if way.is_sparse not in self._compiled:
            self._compiled[way.is_sparse] = torch.compile(plain, dynamic=False)
        return self._compiled[way.is_sparse]

    def _run_sparse(self) -> Callable[..., Any]:
        """The model on active tiles: a function of images and mask, which waits for nothing."""
        from sbnet_cupy.torch import BlockSparse, SparseBlockGrid

        case, model, capacity = self.case, self.model, self.capacity
        if case.kind == "blocks":
            return BlockSparse(model, case.tile, capacity=capacity)
        return lambda x, mask: model(x, SparseBlockGrid.from_mask(mask, case.tile, capacity=capacity))


def make_masks(case: ModelCase) -> list[Any]:
    """A rectangle at the top left, and one of half its size at the bottom right: bool ``[N, H, W]``."""
    import torch

    n, _, h, w = case.shape
    first, second = (torch.zeros((n, h, w), dtype=torch.bool) for _ in range(2))
    side = math.sqrt(case.density)
    first[:, : round(h * side), : round(w * side)] = True
    second[:, h - round(h * side / 2) :, w - round(w * side / 2) :] = True
    return [first, second]


def active_tiles(mask: Any, tile: int) -> Any:
    """The tiles with an active pixel: bool ``[N, 1, rows, columns]``, by PyTorch's own pooling."""
    import torch

    return torch.nn.functional.max_pool2d(mask[:, None].float(), tile, tile, ceil_mode=True) > 0


def sparse_result(model: Any, case: ModelCase, x: Any, tiles: Any) -> Any:
    """What a model on active tiles is to give, of dense layers: each bottleneck adds to its input in those tiles."""
    import torch

    pixels = tiles.repeat_interleave(case.tile, 2).repeat_interleave(case.tile, 3)[:, :, : x.shape[2], : x.shape[3]]
    if case.kind == "blocks":
        return torch.where(pixels, model(x), 0)
    for block in model.blocks:
        x = torch.where(pixels, block(x), x)
    return x


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

    class Stage(nn.Module):
        """Bottlenecks that share a grid; without one, they are dense."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            # All but the first may overwrite what they are given.
            blocks = (SparseBottleneck(channels, channels // 4, inplace=k > 0) for k in range(DEPTH))
            self.blocks = nn.ModuleList(blocks)

        def forward(self, x: Any, grid: Any = None) -> Any:
            for block in self.blocks:
                x = block(x, grid)
            return x

    channels = case.shape[1]
    model: Any = Stage(channels) if case.kind == "stage" else nn.Sequential(BasicBlock(channels), BasicBlock(channels))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight.data, layer.running_var):
                values.uniform_(0.5, 1.5)
            for values in (layer.bias.data, layer.running_mean):
                values.uniform_(-0.3, 0.7)
    return model
