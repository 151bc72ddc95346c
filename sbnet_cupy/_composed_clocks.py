"""A model of the time of the composed engine on an H200, in clocks, to compare with that of the fused kernels.

It gathers the blocks, convolves the stack with cuDNN or cuBLAS, step by step, and scatters the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ._conv_geometry import Pair


class ConvSize(NamedTuple):
    """How much a convolution multiplies for an output pixel."""

    kernel_pixels: int
    channels: int
    features: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> ConvSize:
        """That of weights of a shape ``(kh, kw, C, K)``."""
        return cls(shape[0] * shape[1], shape[2], shape[3])


class StackConv(NamedTuple):
    """A convolution of a stack."""

    size: ConvSize
    #: Pixels that it reads, and that it puts out, in all blocks.
    source: int
    target: int
    strides: Pair = (1, 1)


class _Rates(NamedTuple):
    """What an arithmetic takes."""

    #: Clocks of a call, of each convolution, and of each number that a sum has: the last steps run one after another.
    call: float
    conv: float
    term: float
    #: Products, and bytes read or written, in a clock of a multiprocessor.
    products: float
    bytes: float
    #: Features to which the libraries' kernels fill up.
    features: int
    #: Where cuBLAS takes a matrix product for each pixel of a kernel: clocks of each, and bytes in a clock.
    matrix: float = 0
    matrix_bytes: float = math.inf


# Fitted by `python -m bench.composed --fit` to what that has measured on H200s: with cuDNN on tensor cores, with cuBLAS
# in IEEE float32. docs/performance.md says how near it is.
_HALF = _Rates(12800, 8010, 6.26, 1669, 18.1, 128)
_TF32 = _Rates(7820, 9720, 9.05, 819, 17.3, 128)
_FLOAT32 = _Rates(18300, 8040, 18.6, 95.7, 17.5, 64, matrix=2890, matrix_bytes=30.2)


def composed_clocks(convs: Sequence[StackConv], itemsize: int, tf32: bool, multiprocessors: int) -> float:
    """Clocks of a chain of convolutions on active blocks."""
    terms = sum(conv.size.kernel_pixels * conv.size.channels for conv in convs)
    if itemsize == 4 and not tf32:
        rates = _FLOAT32
        waits = rates.matrix * sum(conv.size.kernel_pixels for conv in convs)
        pixels = [conv.source // math.prod(conv.strides) for conv in convs]  # also where a kernel leaves its block
        moved = sum(map(_matrix_numbers, convs, pixels)) / rates.matrix_bytes
    else:
        rates, waits = _HALF if itemsize == 2 else _TF32, 0.0
        pixels = [conv.target for conv in convs]
        moved = sum(_numbers(conv) for conv in convs) / rates.bytes
    products = sum(
        count * conv.size.kernel_pixels * conv.size.channels * _filled(conv.size.features, rates.features)
        for conv, count in zip(convs, pixels)
    )
    works = products / rates.products + itemsize * (moved + _numbers_between(convs) / rates.bytes)
    return rates.call + rates.conv * len(convs) + rates.term * terms + waits + works / multiprocessors


def _filled(number: int, group: int) -> int:
    return math.ceil(number / group) * group


def _numbers(conv: StackConv) -> int:
    """Read and written by a convolution."""
    return conv.source * conv.size.channels + conv.target * conv.size.features


def _matrix_numbers(conv: StackConv, pixels: int) -> int:
    """The same where it is a matrix product for each pixel of its kernel: all but the first read what they add to."""
    kernel_pixels, channels, features = conv.size
    return pixels * (kernel_pixels * channels + (2 * kernel_pixels - 1) * features)


def _numbers_between(convs: Sequence[StackConv]) -> int:
    """Read and written: gathered, by the step behind each convolution but the last, and scattered."""
    first, last = convs[0], convs[-1]
    ends = 2 * first.source * first.size.channels + 2 * last.target * last.size.features
    return ends + sum(2 * conv.target * conv.size.features for conv in convs[:-1])
