"""Which engine works on active blocks: decided from the form of a call alone.

``fused``: one kernel reads windows of the image, multiplies and writes the image. ``composed``: blocks are gathered,
multiplied by cuBLAS or cuDNN (by NumPy, for its arrays), and scattered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from ._conv_geometry import BlockParams, Layer, Pair
from ._packing import COLUMNS
from ._validate import Spec

ENGINES = ("auto", "fused", "composed")

#: Up to how many channels times features ``auto`` takes the fused kernels, by the arithmetic: pairs of a number of
#: kernel pixels, from which on the second number holds. On an H200, with cuDNN for the composed engine, 90 % sparse,
#: the fused kernels took this part of its time: 3x3 convolutions of 64, 128, 256 and 512 channels 0.59, 0.69, 0.94 and
#: 0.71 in float16, of 128, 256 and 512 channels 0.89, 1.75 and 1.17 in TF32; of 64, 96, 128 and 512 channels 0.41,
#: 0.68, 1.6 and 1.4 in float32, whose plain arithmetic shares too little of what it reads; bottlenecks of 96/24,
#: 384/96, 512/128, 1024/256 and 2048/512 channels 0.33, 0.41, 0.69, 1.11 and 1.06 in float16, and of 96/24, 384/96 and
#: 2048/512 channels 0.40, 0.58 and 1.33 in TF32; of 96/24, 192/48, 256/64 and 384/96 channels 0.75, 0.86, 1.4 and 2.9
#: in float32.
_MOST_WEIGHTS: dict[str, tuple[tuple[int, float], ...]] = {
    "float16": ((1, 512 * 128), (9, math.inf)),
    "bfloat16": ((1, 512 * 128), (9, math.inf)),
    "tf32": ((1, 384 * 96), (9, 128 * 128)),
    "float32": ((1, 192 * 48), (9, 96 * 96)),
}

#: Products beyond which ``auto`` leaves the work to cuDNN or cuBLAS, which are closer to the peak of tensor cores where
#: there is enough for all of them: with 4.1 thousand million (60 % sparse), the fused kernels took 1.05 to 1.4 of their
#: time in the cases above of 128 channels and more; with 1.1 in bottlenecks of 96/24 channels, 0.70 to 0.85. In IEEE
#: float32, with 1.1, they took 1.05 to 1.13 in convolutions of 64 channels, and 1.17 in bottlenecks of 192/48.
_MOST_PRODUCTS, _MOST_PLAIN_PRODUCTS = 2.5e9, 1e9

#: From so many channels on, ``auto`` gathers pixels that are not whole pieces of 16 bytes, which the fused kernels read
#: number by number.
_GATHERED_CHANNELS = 64

#: Pixels of a tile along an axis, at most, and numbers by which the last chunk of channels may exceed them.
_MOST_TILE, _MOST_CHUNK = 256, 128

#: Bounds of what the kernels count in 32 bits: coordinates of pixels, offsets within a window, tiles, channels.
_COORDINATES, _OFFSETS, _TILES, _CHANNELS = 2**30, 2**31, 2**31, 2**18


class ConvSize(NamedTuple):
    """How much a convolution multiplies for an output pixel."""

    kernel_pixels: int
    channels: int
    features: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> ConvSize:
        """That of weights of a shape ``(kh, kw, C, K)``."""
        return cls(shape[0] * shape[1], shape[2], shape[3])


class Route(Enum):
    """How the fused kernels run a bottleneck."""

    #: One launch from image to image; in place, all of its CTAs have to run at the same time.
    DIRECT = "direct"
    #: One launch to a stack of output tiles, which are scattered then.
    STACK = "stack"
    #: One launch for each convolution, with stacks between them.
    LAYERS = "layers"


def parse_engine(engine: Any) -> str:
    """The name of an engine."""
    if not isinstance(engine, str) or engine not in ENGINES:
        raise ValueError(f"engine: expected 'auto', 'fused' or 'composed', got {engine!r}")
    return engine


def takes_fused(engine: str, obstacle: str, preferred: bool) -> bool:
    """Whether the fused kernels do it. `obstacle` says for what they cannot; empty where they can."""
    if engine == "fused" and obstacle:
        raise ValueError(f"engine: expected 'auto' or 'composed' for {obstacle}, got 'fused'")
    return not obstacle and (engine == "fused" or (engine == "auto" and preferred))


def prefers_fused(dtype: np.dtype[Any], tf32: bool, sizes: Iterable[ConvSize], whole: bool, pixels: int) -> bool:
    """Whether ``auto`` takes the fused kernels, by what was measured.

    `whole`: pixels are whole pieces of 16 bytes. `pixels`: those of the output in all blocks.
    """
    arithmetic = "tf32" if tf32 and dtype == np.float32 else dtype.name
    limits = _MOST_WEIGHTS[arithmetic]
    products = _MOST_PLAIN_PRODUCTS if arithmetic == "float32" else _MOST_PRODUCTS
    sizes = list(sizes)
    if not whole and sizes[0].channels >= _GATHERED_CHANNELS:
        return False
    if pixels * sum(math.prod(size) for size in sizes) > products:
        return False
    return all(
        size.channels * size.features <= [most for pixels, most in limits if pixels <= size.kernel_pixels][-1]
        for size in sizes
    )


def kind_obstacle(device: int, dtype: np.dtype[Any]) -> str:
    """For which kind of arrays the fused kernels cannot be taken; empty where they can. Device -1 is the host."""
    if device < 0:
        return "NumPy arrays"
    return "float64" if dtype.itemsize > 4 else ""


def size_obstacle(layers: Iterable[Layer], params: BlockParams, sizes: Iterable[ConvSize], rows: int) -> str:
    """What exceeds the numbers that the kernels count in 32 bits; empty where nothing does."""
    layers = tuple(layers)
    for axis in range(2):
        pads = sum(layer.pad_before[axis] + layer.pad_after[axis] for layer in layers)
        blocks = (params.bcount[axis] + 1) * params.bstrides[axis] + params.bsize[axis]
        if max(layers[0].in_size[axis], blocks) + pads >= _COORDINATES:
            return "2**30 or more pixels along an axis"
    if rows * params.bsize_out[0] * params.bsize_out[1] >= _TILES:
        return "2**31 or more pixels in all blocks"
    if any(max(size.channels, size.features) + COLUMNS >= _CHANNELS for size in sizes):
        return "2**18 or more channels"
    return ""


def offset_obstacle(specs: Iterable[Spec], layers: Iterable[Layer], params: BlockParams) -> str:
    """Whether offsets within a window of some tensors need more than 32 bits; empty where they do not."""
    layers = tuple(layers)
    spans = [
        min(params.bsize[axis], max(_MOST_TILE * layer.strides[axis] + layer.ksize[axis] for layer in layers))
        for axis in range(2)
    ]
    fit = all(_reach(spec, (spans[0], spans[1])) < _OFFSETS for spec in specs)
    return "" if fit else "strides that lead 2**31 numbers away within a block"


def _reach(spec: Spec, span: Pair) -> int:
    """Numbers from the first to the last of a window."""
    row, column, channel = (abs(s) // spec.itemsize if n > 1 else 0 for s, n in zip(spec.strides[1:], spec.shape[1:]))
    return row * span[0] + column * span[1] + channel * (spec.shape[3] + _MOST_CHUNK)


def bottleneck_routes(
    shapes: tuple[tuple[int, ...], ...], strides: Pair, projects: bool, in_place: bool
) -> tuple[Route, ...]:
    """Ways to run a bottleneck with convolutions of these shapes, the best first, as far as its form decides it."""
    first, second, third = shapes
    pointwise = first[:2] == third[:2] == (1, 1)
    if not pointwise or strides != (1, 1) or projects or second[2] != second[3]:
        return (Route.LAYERS,)
    return (Route.DIRECT, Route.STACK, Route.LAYERS) if in_place else (Route.DIRECT, Route.LAYERS)
