"""Random images and weights, what a network must make of them, and how far rounding may take it from that.

Works on NumPy and CuPy alike (`xp`). Expected results come from float64 matrix products on a padded image, and active
blocks from sums over the mask: they share no code with the library. Errors are bounded as in N. Higham, Accuracy and
Stability of Numerical Algorithms, 2002, section 3.1: a sum of n products, in any order, is off by at most ``gamma_n``
times the sum of their magnitudes, with ``gamma_n = n*u / (1 - n*u)``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbnet_cupy import BlockParams, BottleneckWeights

from .data import random_words
from .stages import Network, Precision

Array = np.ndarray[Any, Any]

#: What a bottleneck adds to its input, as a part of what weights of usual size would add: blocks that work in place,
#: again and again, then stay far from overflow.
RESIDUAL_GAIN = 0.1
#: Roundings of a batch norm: a product, a sum, and where a framework takes one, of each to the dtype.
BATCH_NORM_ROUNDINGS = 4


def uniform(xp: Any, shape: tuple[int, ...], low: float, high: float, dtype: str, seed: int) -> Any:
    """Random numbers of [low, high), always the same for one seed."""
    fraction = (random_words(xp, math.prod(shape), seed) >> np.uint32(8)).astype(np.float32)
    fraction *= np.float32((high - low) * 2.0**-24)
    fraction += np.float32(low)
    return fraction.reshape(shape).astype(dtype)


@dataclass(frozen=True)
class Bounded:
    """Exact values, and how far from them a computation may come out; both float64 of one shape."""

    value: Any
    error: Any


class Scene:
    """The inputs of one network, and the expected results, which are made when a check first asks for them."""

    def __init__(self, xp: Any, network: Network) -> None:
        self.xp = xp
        self.network = network
        dtype = network.precision.dtype
        self.image = uniform(xp, network.shape, -1, 1, dtype, 1)
        self.convs = [_conv_weights(xp, shape, dtype, 2 + k) for k, shape in enumerate(network.layers)]
        if network.kind == "bottleneck":
            self.convs[-1] *= self.convs[-1].dtype.type(RESIDUAL_GAIN)
        channels = [shape[2] for shape in network.layers]
        self.scales = [uniform(xp, (c,), 0.5, 1.5, "float32", 10 + k) for k, c in enumerate(channels)]
        # Shifts of either sign: a zero outside of the image is no zero after the batch norm.
        self.shifts = [uniform(xp, (c,), -0.5, 0.5, "float32", 20 + k) for k, c in enumerate(channels)]
        #: What a convolution's result is written over. A bottleneck adds to its input.
        self.base = uniform(xp, network.shape, -1, 1, dtype, 30) if network.kind == "conv" else self.image

    @functools.cached_property
    def weights(self) -> BottleneckWeights:
        """The weights of a bottleneck."""
        arrays = {f"conv{k}": w for k, w in enumerate(self.convs, 1)}
        arrays |= {f"scale{k}": scale for k, scale in enumerate(self.scales, 1)}
        arrays |= {f"shift{k}": shift for k, shift in enumerate(self.shifts, 1)}
        return BottleneckWeights(**arrays)

    @functools.cached_property
    def expected(self) -> Bounded:
        """What the dense network gives."""
        return self.expect()

    def expect(self, keep: Any = None) -> Bounded:
        """What the network gives; with `keep` [1, H, W] the 3x3 convolution sees 0 wherever that is 0."""
        xp, precision = self.xp, self.network.precision
        image = Bounded(self.image.astype(np.float64), xp.zeros(self.image.shape))
        if self.network.kind == "conv":
            return convolved(xp, kept(image, keep), self.convs[0], precision)
        inner = image
        for k, (w, scale, shift) in enumerate(zip(self.convs, self.scales, self.shifts)):
            inner = normalized(xp, inner, scale, shift, precision)
            inner = convolved(xp, kept(inner, keep) if k == 1 else inner, w, precision)
        total = image.value + inner.value
        return rounded(xp, Bounded(total, inner.error), precision)

    def is_right(self, result: Any, inside: Any = None, base: Any = None) -> bool:
        """Whether `result` is near the dense one where `inside` [1, H, W] says so, and has `base`'s bits elsewhere.

        Without `inside`, all of it must be near; without `base`, it is the one of the scene.
        """
        xp, expected = self.xp, self.expected
        if result.shape != expected.value.shape or result.dtype != self.image.dtype:
            return False
        near = is_near(xp, result, expected)
        if inside is None:
            return bool(near.all())
        bits = f"u{result.dtype.itemsize}"
        same = result.view(bits) == (self.base if base is None else base).view(bits)
        return bool(xp.where(xp.asarray(inside)[..., None], near, same).all())


def _conv_weights(xp: Any, shape: tuple[int, int, int, int], dtype: str, seed: int) -> Any:
    """Weights that keep the magnitude of what passes through them and ReLU: of variance 2 / (kh*kw*C)."""
    bound = math.sqrt(3 * 2 / math.prod(shape[:3]))  # of a uniform distribution with that variance
    return uniform(xp, shape, -bound, bound, dtype, seed)


def is_near(xp: Any, result: Any, expected: Bounded) -> Any:
    """Element by element; NaN is near nothing."""
    # The expected value is off by a part of the bound too, at most 2**-28 of it: float64 against float32.
    return xp.abs(result.astype(np.float64) - expected.value) <= (1 + 2.0**-20) * expected.error


def kept(x: Bounded, keep: Any) -> Bounded:
    """`x` where `keep` is not 0."""
    if keep is None:
        return x
    factor = (keep != 0)[..., None]
    return Bounded(x.value * factor, x.error * factor)


def convolved(xp: Any, x: Bounded, w: Any, precision: Precision) -> Bounded:
    """A convolution with zero padding that keeps the image's size."""
    weights = w.astype(np.float64)
    terms = math.prod(w.shape[:3])
    gamma = terms * precision.sums / (1 - terms * precision.sums)
    relative = gamma + (1 + gamma) * ((1 + precision.factors) ** 2 - 1)
    value = correlate(xp, x.value, weights)
    error = correlate(xp, x.error + relative * (xp.abs(x.value) + x.error), xp.abs(weights))
    return rounded(xp, Bounded(value, error), precision)


def normalized(xp: Any, x: Bounded, scale: Any, shift: Any, precision: Precision) -> Bounded:
    """``relu(x*scale + shift)``: ReLU enlarges no error."""
    scale, shift = scale.astype(np.float64), shift.astype(np.float64)
    error = x.error * xp.abs(scale)
    size = xp.abs(x.value * scale) + error + xp.abs(shift)
    error += BATCH_NORM_ROUNDINGS * (precision.results * size + precision.smallest)
    return Bounded(xp.maximum(x.value * scale + shift, 0), error)


def rounded(xp: Any, x: Bounded, precision: Precision) -> Bounded:
    """A result as it is stored."""
    return Bounded(x.value, x.error + precision.results * (xp.abs(x.value) + x.error) + precision.smallest)


def correlate(xp: Any, x: Any, w: Any) -> Any:
    """The convolution of neural networks, as a matrix product for each pixel of the kernel."""
    (kh, kw, channels, features), (n, height, width, _) = w.shape, x.shape
    padded = xp.zeros((n, height + kh - 1, width + kw - 1, channels))
    padded[:, kh // 2 : kh // 2 + height, kw // 2 : kw // 2 + width] = x
    total = xp.zeros((n * height * width, features))
    for dy in range(kh):
        for dx in range(kw):
            shifted = padded[:, dy : dy + height, dx : dx + width]
            total += shifted.reshape(-1, channels) @ w[dy, dx]
    return total.reshape(n, height, width, features)


def active_blocks(mask: Array, params: BlockParams) -> Array:
    """Which blocks have a pixel of the mask [1, H, W], halo included: bool ``bcount``. On the host."""
    _, height, width = mask.shape
    before = np.zeros((height + 1, width + 1), np.int64)
    before[1:, 1:] = (mask[0] > 0.5).cumsum(0).cumsum(1)
    spans = []
    for axis, extent in enumerate((height, width)):
        begin = params.boffset[axis] + np.arange(params.bcount[axis]) * params.bstrides[axis]
        spans.append((np.clip(begin, 0, extent), np.clip(begin + params.bsize[axis], 0, extent)))
    (top, bottom), (left, right) = spans
    rows = before[bottom] - before[top]
    active: Array = rows[:, right] - rows[:, left] > 0
    return active


def tile_pixels(active: Array, params: BlockParams, height: int, width: int) -> Array:
    """Which pixels lie in the tiles of these blocks: bool ``[1, H, W]``."""
    pixels = active.repeat(params.bsize_out[0], axis=0).repeat(params.bsize_out[1], axis=1)
    return pixels[np.newaxis, :height, :width]
