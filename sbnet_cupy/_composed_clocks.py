"""A model of the time of the composed engine on an H200, in clocks, to compare with that of the fused kernels.

It gathers the blocks, convolves the stack with cuDNN or cuBLAS, step by step, and scatters the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


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


# Fitted to 674 problems of the benchmark (see _fused_clocks.py) with cuDNN installed, within 10 to 12 % (root mean
# square). Where the faster engine is chosen by both models, calls take 1.000 (TF32), 1.001 (half types) and 1.002 (IEEE
# float32) of the better engine's time on average.
_RATES = {
    "half": _Rates(11450, 6340, 7.0, 1713, 17.7, 128),
    "tf32": _Rates(8130, 7970, 7.2, 661, 18.7, 128),
    "float32": _Rates(58950, 3180, 9.3, 63.2, 14.1, 1),
}


def composed_clocks(convs: Sequence[StackConv], itemsize: int, tf32: bool, multiprocessors: int) -> float:
    """Clocks of a chain of convolutions on active blocks."""
    rates = _RATES["half" if itemsize == 2 else "tf32" if tf32 else "float32"]
    products = sum(
        conv.target * conv.size.kernel_pixels * conv.size.channels * _filled(conv.size.features, rates.features)
        for conv in convs
    )
    works = products / rates.products + itemsize * _numbers_moved(convs) / rates.bytes
    terms = sum(conv.size.kernel_pixels * conv.size.channels for conv in convs)
    return rates.call + rates.conv * len(convs) + rates.term * terms + works / multiprocessors


def _filled(number: int, group: int) -> int:
    return math.ceil(number / group) * group


def _numbers_moved(convs: Sequence[StackConv]) -> int:
    """Read and written: gathered, by each convolution, by the step behind each but the last, and scattered."""
    first, last = convs[0], convs[-1]
    ends = 2 * first.source * first.size.channels + 2 * last.target * last.size.features
    own = sum(conv.source * conv.size.channels + conv.target * conv.size.features for conv in convs)
    return ends + own + sum(2 * conv.target * conv.size.features for conv in convs[:-1])
