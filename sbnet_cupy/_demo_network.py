"""The network of the demonstration: it finds edges and strengthens those that continue as contours.

A 3x3 convolution, the stem, finds edges of each colour in eight directions. A chain of residual bottlenecks follows,
each of which adds up the colours of a direction, looks for contours in 3x3 pixels, and adds what it has found to the
edges of all colours. In short (:meth:`Network.sparse`)::

    indices = block_indices(mask, blocks.reach)
    y = sparse_conv2d(picture, stem, indices, blocks.stem, activation="relu")
    for weights in chain:
        y = sparse_res_block_bottleneck(y, weights, indices, blocks.bottleneck, out=y)

Pixels are whole levels 0 to 255, and weights are whole numbers and eighths. The terms of each sum are whole multiples
of a power of 2, and add up to less than 2**24 times that, which float32 holds exactly, whatever order they are added
in. So the sparse network can be asked for equality with the dense one, not for closeness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ._bottleneck import BottleneckWeights, res_block_bottleneck, sparse_res_block_bottleneck
from ._conv import conv2d, sparse_conv2d
from ._conv_geometry import BlockParams, Pair, calc_block_params, calc_block_params_res_block
from ._reduce_mask import BlockIndices, block_indices

Array = np.ndarray[Any, Any]

#: Bottlenecks in the chain.
BOTTLENECKS = 3
#: Directions of an edge, in steps of 45 degrees, and colours. A channel of the image is (colour, direction).
DIRECTIONS, COLOURS = 8, 3
CHANNELS = COLOURS * DIRECTIONS
#: Edges below this get no support from a bottleneck: twice what the noise of a dark sky excites.
_NOISE = 64

#: The pixels around the centre of a 3x3 kernel, in the order of the directions.
_RING = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
#: A Sobel filter along that ring: bright above, dark below.
_SOBEL = (1, 2, 1, 0, -1, -2, -1, 0)
#: Support for an edge in that direction: from those left and right of it, which continue it as a contour. Those
#: above and below count against it, which makes contours thin.
_SUPPORT = (0, -1, 0, 1, 0, -1, 0, 1)


@dataclass(frozen=True)
class Blocks:
    """One grid of tiles, with the halo that each step takes."""

    #: Tiles with a halo of BOTTLENECKS pixels: active if a masked pixel depends on the stem's result in the tile.
    reach: BlockParams
    stem: BlockParams
    bottleneck: BlockParams

    @classmethod
    def of(cls, network: Network, shape: tuple[int, ...], tile: Pair) -> Blocks:
        """Those for pictures of a shape [N, H, W, 3]."""
        ksizes = [ksize for weights in network.chain for ksize in weights.ksizes]
        halo, reach = (tile[0] + 2, tile[1] + 2), (tile[0] + 2 * BOTTLENECKS, tile[1] + 2 * BOTTLENECKS)
        return cls(
            calc_block_params_res_block(shape, reach, ksizes, 1, "SAME"),
            calc_block_params(shape, halo, network.stem.shape[:2], 1, "SAME"),
            calc_block_params_res_block(shape, halo, network.chain[0].ksizes, 1, "SAME"),
        )


@dataclass(frozen=True)
class Network:
    """Weights, as arrays of NumPy or of CuPy."""

    stem: Any
    chain: tuple[BottleneckWeights, ...]

    @classmethod
    def on(cls, xp: Any) -> Network:
        """The network with arrays of a module, ``numpy`` or ``cupy``."""
        return cls(xp.asarray(_stem()), tuple(_bottleneck(xp) for _ in range(BOTTLENECKS)))

    def dense(self, picture: Any) -> Any:
        """Features [1, H, W, CHANNELS] of a whole picture [1, H, W, 3]."""
        y = conv2d(picture, self.stem, activation="relu", allow_tf32=False)
        for weights in self.chain:
            y = res_block_bottleneck(y, weights, allow_tf32=False)
        return y

    def sparse(self, picture: Any, mask: Any, blocks: Blocks, capacity: int) -> tuple[Any, BlockIndices]:
        """Features in the active tiles of a picture, 0 elsewhere; and which tiles these are."""
        indices = block_indices(mask, blocks.reach, capacity=capacity)
        y = sparse_conv2d(picture, self.stem, indices, blocks.stem, activation="relu", allow_tf32=False)
        for weights in self.chain:
            sparse_res_block_bottleneck(y, weights, indices, blocks.bottleneck, out=y, allow_tf32=False)
        return y, indices

    def masked(self, picture: Any, active: Any) -> Any:
        """What :meth:`sparse` has to return, where `active` [H, W, 1] names the pixels of active tiles.

        Each layer runs on the whole picture, and what it computes in inactive tiles is dropped before the next.
        """
        y = conv2d(picture, self.stem, activation="relu", allow_tf32=False) * active
        for weights in self.chain:
            # Outside of active tiles, y is 0 from the stem on, and a bottleneck that is skipped leaves it so.
            y = res_block_bottleneck(y, weights, allow_tf32=False) * active
        return y


def _stem() -> Array:
    """Weights ``[3, 3, 3, CHANNELS]``: the Sobel filter in each direction, of each colour."""
    weights = np.zeros((3, 3, COLOURS, COLOURS, DIRECTIONS), np.float32)
    for colour in range(COLOURS):
        weights[:, :, colour, colour] = _turned(_SOBEL)
    return weights.reshape(3, 3, COLOURS, CHANNELS)


def _bottleneck(xp: Any) -> BottleneckWeights:
    """Weights that add 1/8 of the support for each direction, from all colours, to every colour."""
    same_direction = np.tile(np.eye(DIRECTIONS, dtype=np.float32), (COLOURS, 1))
    support = _turned(_SUPPORT)[:, :, np.newaxis] * np.eye(DIRECTIONS, dtype=np.float32)
    support[1, 1] = 2 * np.eye(DIRECTIONS)
    norms: dict[str, tuple[int, float]]
    norms = {"scale1": (CHANNELS, 1), "shift1": (CHANNELS, -_NOISE), "scale2": (DIRECTIONS, 1)}
    norms |= {"shift2": (DIRECTIONS, 0), "scale3": (DIRECTIONS, 1 / 8), "shift3": (DIRECTIONS, 0)}
    return BottleneckWeights(
        conv1=xp.asarray(same_direction[np.newaxis, np.newaxis]),
        conv2=xp.asarray(support),
        conv3=xp.asarray(same_direction.T[np.newaxis, np.newaxis].copy()),
        **{name: xp.full(size, value, np.float32) for name, (size, value) in norms.items()},
    )


def _turned(ring: tuple[int, ...]) -> Array:
    """Filters ``[3, 3, DIRECTIONS]`` with these numbers around their centre, turned into each direction."""
    filters = np.zeros((3, 3, DIRECTIONS), np.float32)
    for turn in range(DIRECTIONS):
        for (row, column), weight in zip(_RING, np.roll(ring, turn)):
            filters[row, column, turn] = weight
    return filters
