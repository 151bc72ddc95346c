"""The forms of launches of the fused kernels: all that decides how they are launched, but for addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ._conv_geometry import Layer, Pair
from ._geometry import BlockGrid
from ._packing import Packing
from ._validate import Spec


class Side(NamedTuple):
    """One tensor of a convolution."""

    spec: Spec
    #: A stack of blocks, and not an image.
    is_stack: bool = False


@dataclass(frozen=True)
class ConvCall:
    """A convolution."""

    source: Side
    target: Side
    #: What is added, or None.
    residual: Spec | None
    index_strides: tuple[int, ...]
    rows: int
    batch: int
    #: Of the output's blocks, and how many there are.
    grid: BlockGrid
    bcount: Pair
    layer: Layer
    packing: Packing
    tf32: bool
    activates: bool
    source_relu: bool
    target_relu: bool
    device: int


@dataclass(frozen=True)
class BottleneckCall:
    """A whole bottleneck."""

    source: Spec
    target: Spec
    #: Whether the target is a stack of output tiles, and not an image.
    is_stack: bool
    in_place: bool
    index_strides: tuple[int, ...]
    rows: int
    grid: BlockGrid
    bcount: Pair
    #: The second convolution.
    layer: Layer
    inner: int
    #: Whether batch norm and ReLU come before the first convolution.
    activates: bool
    tf32: bool
    device: int
