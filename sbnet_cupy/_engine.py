"""What the engines can do with active blocks: decided from the form of a call alone.

``fused``: one kernel reads windows of the image, multiplies and writes the image. ``composed``: blocks are gathered,
multiplied by cuBLAS or cuDNN (by NumPy, for its arrays), and scattered. ``auto``: the one that the models of
_fused_clocks.py and _composed_clocks.py take for faster.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

import numpy as np

from ._composed_clocks import ConvSize
from ._conv_geometry import BlockParams, Layer, Pair
from ._packing import COLUMNS
from ._validate import Spec

ENGINES = ("auto", "fused", "composed")

#: From so many channels on, ``auto`` gathers pixels that are not whole pieces of 16 bytes, which the fused kernels read
#: number by number.
_GATHERED_CHANNELS = 64

#: Pixels of a tile along an axis, at most, and numbers by which the last chunk of channels may exceed them.
_MOST_TILE, _MOST_CHUNK = 256, 128

#: Bounds of what the kernels count in 32 bits: coordinates of pixels, offsets within a window, tiles, channels.
_COORDINATES, _OFFSETS, _TILES, _CHANNELS = 2**30, 2**31, 2**31, 2**18


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


def may_fuse(engine: str, obstacle: str) -> bool:
    """Whether the fused kernels may do it. `obstacle` says for what they cannot; empty where they can."""
    if engine == "fused" and obstacle:
        raise ValueError(f"engine: expected 'auto' or 'composed' for {obstacle}, got 'fused'")
    return not obstacle and engine != "composed"


def prefers_gathering(channels: int, whole: bool) -> bool:
    """Whether ``auto`` gathers images, however fast the fused kernels are otherwise.

    `whole`: pixels are whole pieces of 16 bytes.
    """
    return not whole and channels >= _GATHERED_CHANNELS


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
    """Ways to run a bottleneck with convolutions of these shapes, the most general first."""
    first, second, third = shapes
    pointwise = first[:2] == third[:2] == (1, 1)
    if not pointwise or strides != (1, 1) or projects or second[2] != second[3]:
        return (Route.LAYERS,)
    return (Route.LAYERS, Route.STACK, Route.DIRECT) if in_place else (Route.LAYERS, Route.DIRECT)
