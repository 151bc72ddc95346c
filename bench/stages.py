"""The convolutions and residual blocks that are measured: sizes, block sizes, models of their cost, figures, goals.

No device is needed here. Figures of the paper are those of M. Ren et al., SBNet: Sparse Blocks Network for Fast
Inference, CVPR 2018; those of its pipeline are of the same operations, measured on an H200.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbnet_cupy import BlockParams, calc_block_params_res_block

from .cases import Pair, Target, size_label
from .masks import road_mask, top_left_mask, vessel_mask

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Precision:
    """A dtype and how numbers of it are multiplied: relative errors of a factor, of a sum and of a result."""

    name: str
    dtype: str
    tf32: bool
    factors: float
    sums: float
    results: float

    @property
    def smallest(self) -> float:
        """What rounding may cost a result next to zero. Devices flush float32 numbers too small to be normal."""
        info = np.finfo(self.dtype)
        return float(info.smallest_normal if info.bits == 32 else info.smallest_subnormal)


#: Tensor cores keep 10 bits of a factor's fraction in TF32, and cut sums off where they do not round them.
PRECISIONS = (
    Precision("float32", "float32", False, 0.0, 2.0**-24, 2.0**-24),
    Precision("tf32", "float32", True, 2.0**-10, 2.0**-23, 2.0**-24),
    Precision("float16", "float16", False, 0.0, 2.0**-23, 2.0**-11),
)

#: Multiplications and additions a second, in 10**12, of dense matrices: NVIDIA's data sheets of the H100 and the H200
#: (SXM), whose figures for tensor cores are halved, because they count zeros of structured sparsity.
_HOPPER = {"float32": 67.0, "tf32": 494.5, "float16": 989.5}
RATES = {"H100": _HOPPER, "H200": _HOPPER}
#: Microseconds of an empty kernel in a CUDA graph of an H200.
LAUNCH_US = 0.53


@dataclass(frozen=True)
class Stage:
    """One stage of a network: its image, the channels inside of its bottlenecks, and the sizes of its blocks."""

    network: str
    height: int
    width: int
    channels: int
    bottleneck: int
    #: Smallest and largest size that the original's benchmark tried, in steps of two.
    sizes: Pair


STAGES = (
    Stage("resnet-v2", 400, 700, 96, 24, (11, 33)),
    Stage("resnet-v2", 200, 350, 192, 48, (7, 25)),
    Stage("resnet-v2", 100, 175, 256, 64, (5, 21)),
    Stage("resnet-v2", 50, 88, 384, 96, (5, 21)),
    Stage("resnet-50", 400, 700, 256, 64, (11, 33)),
    Stage("resnet-50", 200, 350, 512, 128, (7, 25)),
    Stage("resnet-50", 100, 175, 1024, 256, (5, 21)),
    Stage("resnet-50", 50, 88, 2048, 512, (5, 21)),
)
#: The network whose stages the goals are about.
MAIN_NETWORK = "resnet-v2"

#: Even sizes beside the original's odd ones: tiles of 4, 6, 8, 10, 12, 16, 18, 24 and 32 pixels, and the halo of a 3x3.
EVEN_SIZES = (6, 8, 10, 12, 14, 18, 20, 26, 34)
QUICK_SIZES = (10, 18)

SPARSITIES = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
FEW_SPARSITIES = (0.6, 0.9, 0.99)
#: The sparsity of the goals and of the sweep over all block sizes.
GOAL_SPARSITY = 0.9

#: Times in microseconds to reach with 90% sparsity, by kind: (TF32, float16) of the four stages.
GOALS_US = {
    "conv": ((6, 4), (5, 4), (5, 4), (5, 4)),
    "bottleneck": ((15, 8), (12, 8), (12, 8), (12, 8)),
}
#: The paper's speed-up over dense, by kind and mask, and on which mask it was where that was another.
PAPER_SPEEDUPS = {
    ("conv", "top-left 90%"): ((3.39, 2.47, 1.34, 0.88), ""),
    ("bottleneck", "top-left 90%"): ((8.22, 6.27, 3.73, 1.64), ""),
    ("bottleneck", "roads"): ((3.05, 2.15, 1.65, 1.14), " (road map, 75% sparse)"),
    ("bottleneck", "vessels"): ((5.21, 3.25, 2.26, 1.32), " (mask of a PSPNet, 90% sparse)"),
}
#: Microseconds of the original's pipeline with 90% sparsity in a CUDA graph, by kind and precision.
ORIGINAL_US = {
    ("conv", "tf32"): (29.7, 24.1, 18.3, 18.2),
    ("bottleneck", "float32"): (122, 94, 60, 61),
    ("bottleneck", "tf32"): (116, 81, 53, 46),
}

BYTE_MODEL = "active tiles read + written, weights read"
FLOOR_MODEL = (
    "floor: the larger of bytes over the copy's bandwidth and operations of the active tiles, without halo, over the "
    "data sheet's rate, plus one launch; checked: within the rounding error of sums that "
    "long on active tiles, bit by bit elsewhere"
)


@dataclass(frozen=True)
class Network:
    """What one task measures: a convolution or a bottleneck on one stage, in one precision."""

    kind: str  # "conv" or "bottleneck"
    stage: Stage
    precision: Precision

    @property
    def channels(self) -> int:
        """Channels of the image. The single convolutions are those inside of the bottlenecks."""
        return self.stage.bottleneck if self.kind == "conv" else self.stage.channels

    @property
    def name(self) -> str:
        stage = self.stage
        inner = "" if self.kind == "conv" else f"/{stage.bottleneck}"
        return f"{stage.network} {stage.height}x{stage.width}x{self.channels}{inner} {self.precision.name}"

    @property
    def is_main(self) -> bool:
        return self.stage.network == MAIN_NETWORK

    @property
    def is_detailed(self) -> bool:
        """Whether rivals that compile for long, all masks and all variants of a call are measured.

        The tensor cores' precisions of the main network are; for IEEE float32 they would tell the same once more.
        """
        return self.is_main and self.precision.name != "float32"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, self.stage.height, self.stage.width, self.channels

    @property
    def layers(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shapes of the convolutions' weights."""
        outer, inner = self.stage.channels, self.stage.bottleneck
        if self.kind == "conv":
            return ((3, 3, inner, inner),)
        return (1, 1, outer, inner), (3, 3, inner, inner), (1, 1, inner, outer)

    def params(self, bsize: int) -> BlockParams:
        """Blocks of `bsize` x `bsize` pixels, halo included."""
        return calc_block_params_res_block(self.shape, (bsize, bsize), self.layers, 1, "SAME")

    def block_sizes(self, quick: bool) -> tuple[int, ...]:
        """The sizes to choose the best of: of the main network's the original's and even ones, of others even ones."""
        first, last = self.stage.sizes
        even = tuple(size for size in EVEN_SIZES if first < size <= last + 1)
        if quick:
            return QUICK_SIZES
        return tuple(sorted((*range(first, last + 1, 2), *even))) if self.is_main else even

    def sparsities(self, quick: bool) -> tuple[float, ...]:
        if quick:
            return (GOAL_SPARSITY,)
        return SPARSITIES if self.is_main else FEW_SPARSITIES

    def goal(self, mask: str) -> Target | None:
        """What to reach with this mask."""
        column = {"tf32": 0, "float16": 1}.get(self.precision.name)
        if not self.is_main or column is None or mask != mask_name(GOAL_SPARSITY):
            return None
        return Target("us", GOALS_US[self.kind][STAGES.index(self.stage)][column])

    def original(self, mask: str) -> str:
        """What the paper and its pipeline reached with this mask."""
        if not self.is_main:
            return ""
        found, number = [], STAGES.index(self.stage)
        times = ORIGINAL_US.get((self.kind, self.precision.name))
        if times and mask == mask_name(GOAL_SPARSITY):
            found.append(f"{times[number]:g} us")
        speedups = PAPER_SPEEDUPS.get((self.kind, mask))
        if speedups:
            figures, which = speedups
            found.append(f"{figures[number]:.2f} x dense in the paper{which}")
        return ", ".join(found)

    def flops(self, pixels: int) -> int:
        """Multiplications and additions for this many output pixels."""
        return 2 * pixels * sum(math.prod(layer) for layer in self.layers)

    def bytes(self, pixels: int) -> int:
        """Bytes of the input and the output of this many pixels, and of the weights."""
        weights = sum(math.prod(layer) for layer in self.layers)
        each = self.layers[0][2] + self.layers[-1][3]
        return (pixels * each + weights) * np.dtype(self.precision.dtype).itemsize

    def floor_us(self, pixels: int, bandwidth_tbps: float, device: str) -> float | None:
        """The least time that :data:`FLOOR_MODEL` allows; None for a device whose rates are not listed."""
        rates = [rates for name, rates in RATES.items() if name in device]
        if not rates:
            return None
        moved = self.bytes(pixels) / (bandwidth_tbps * 1e6)
        computed = self.flops(pixels) / (rates[0][self.precision.name] * 1e6)
        return max(moved, computed) + LAUNCH_US

    def describe(self) -> str:
        what = "one 3x3 convolution" if self.kind == "conv" else "one residual bottleneck"
        return f"{what} of {'x'.join(map(str, self.shape))}, {self.precision.name}"


@dataclass(frozen=True)
class MaskCase:
    """A mask by name, how to make it for a height and a width, and the sparsity that it was asked for."""

    name: str
    make: Callable[[int, int], Array]
    sparsity: float | None = None


def mask_name(sparsity: float) -> str:
    return f"top-left {sparsity:.0%}"


def top_left_case(sparsity: float) -> MaskCase:
    return MaskCase(mask_name(sparsity), lambda height, width: top_left_mask(height, width, sparsity), sparsity)


#: Masks with the structure that masks have.
REAL_MASKS = (MaskCase("roads", road_mask), MaskCase("vessels", vessel_mask))


def networks(kind: str, quick: bool) -> list[Network]:
    """Everything of a kind, in the order in which it is measured."""
    stages = [STAGES[0], STAGES[3]] if quick else STAGES
    precisions = PRECISIONS[1:] if quick else PRECISIONS
    return [Network(kind, stage, precision) for stage in stages for precision in precisions]


def block_label(params: BlockParams) -> str:
    """Sizes of a block and of its tile: "18/16"."""
    return f"{size_label(params.bsize)}/{size_label(params.bsize_out)}"
