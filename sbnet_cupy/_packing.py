"""Weights of convolutions in the order in which the fused kernels take them.

What a kernel sums over, channels at kernel positions, is cut into pieces of 16 bytes: 8 halves or 4 float32. Channels
come in chunks of so many pieces; the pieces of a chunk at all kernel positions follow each other, padded with zeros to
whole steps of four. For 8 features and a step, lane ``4*g + t`` of a warp takes word t of each of the four pieces, of
feature g: 16 bytes.

The same weights follow in an order for warpgroups, which take matrices of pieces as they are: the pieces of a pixel,
each at all kernel positions, filled up with zeros to pairs; and of each all features, filled up to groups of 8. A
thread of a warpgroup gets two sums of each 8 columns: where columns come in fours of 8, halves are packed so that its 8
sums are neighbouring features: column ``8*n + 2*t + i`` of 32 is feature ``8*t + 2*n + i``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from . import _device
from ._validate import Spec

#: Bytes of a piece, words in it, pieces of a step, and features that lie together.
PIECE_BYTES, PIECE_WORDS, STEP_PIECES, COLUMNS = 16, 4, 4, 8

#: Pieces of all kernel positions up to which one chunk holds all channels, if a pixel has no more than so many.
_ONE_CHUNK, _ONE_CHUNK_PIXEL = 216, 64

#: Else: pieces of all kernel positions that a chunk aims at, and pieces of a pixel at most and at least.
_CHUNK, _MOST, _LEAST = 72, 16, 4


class Order(Enum):
    """Who takes packed weights."""

    WARPS = "warps"
    WARPGROUPS = "warpgroups"


@dataclass(frozen=True)
class Packing:
    """How the weights of a convolution are packed."""

    positions: int
    channels: int
    features: int
    #: Numbers in a piece.
    lanes: int
    #: Pieces of a pixel in a chunk.
    chunk: int
    chunks: int
    #: Steps of a chunk.
    steps: int
    #: Groups of 8 features.
    columns: int

    @property
    def warp_shape(self) -> tuple[int, ...]:
        """Of the part for warps, in 4-byte words."""
        return self.columns, self.chunks, self.steps, COLUMNS, PIECE_WORDS, STEP_PIECES

    @property
    def pixel_pieces(self) -> int:
        """Pieces of a pixel."""
        return math.ceil(self.channels / self.lanes)

    @property
    def warpgroup_shape(self) -> tuple[int, ...]:
        """Of the part for warpgroups, in 4-byte words."""
        pieces = self.pixel_pieces * self.positions
        return pieces + pieces % 2, math.ceil(self.features / COLUMNS) * COLUMNS, PIECE_WORDS

    @property
    def together(self) -> int:
        """Groups of 8 columns for warpgroups among which features are turned."""
        return 4 if self.lanes == 8 and self.warpgroup_shape[1] % (4 * COLUMNS) == 0 else 1

    def words_in(self, order: Order) -> int:
        """Words of one part."""
        return math.prod(self.warp_shape if order is Order.WARPS else self.warpgroup_shape)

    def offset(self, order: Order) -> int:
        """Bytes in front of that part."""
        return 0 if order is Order.WARPS else 4 * self.words_in(Order.WARPS)

    @property
    def words(self) -> int:
        """Of the packed array, which has one dimension."""
        return sum(map(self.words_in, Order))


def packing_of(shape: tuple[int, ...], itemsize: int) -> Packing:
    """How weights of a shape ``(kh, kw, C, K)`` are packed."""
    positions, channels, features = shape[0] * shape[1], shape[2], shape[3]
    lanes = PIECE_BYTES // itemsize
    pieces = math.ceil(channels / lanes)
    if pieces * positions <= _ONE_CHUNK and pieces <= _ONE_CHUNK_PIXEL:
        chunk = pieces
    else:
        chunk = _MOST
        while chunk > _LEAST and chunk * positions > _CHUNK:
            chunk //= 2
    chunk = max(1, min(chunk, pieces))
    columns = math.ceil(features / COLUMNS)
    if columns > 4 and columns % 3 and columns % 4:  # so that warps can take several, and none is left over
        columns += -columns % 4
    steps = math.ceil(positions * chunk / STEP_PIECES)
    return Packing(positions, channels, features, lanes, chunk, max(1, math.ceil(pieces / chunk)), steps, columns)


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """Weights of a convolution, as :func:`pack_weights` makes them: to be passed in place of the array.

    Attributes
    ----------
    source : ndarray, shape (kh, kw, C, K)
        The weights themselves.
    words : ndarray of uint32
        The same, packed, on a device; empty for a NumPy array.
    packing : Packing
        In which order.
    tf32 : bool
        Whether float32 numbers were rounded to TF32.
    """

    source: Any
    words: Any
    packing: Packing
    tf32: bool

    def __post_init__(self) -> None:
        packing = packing_of(self.shape, _packed_itemsize(self.dtype))
        wanted = (packing.words,) if _has_words(self.source) else (0,)
        if (self.packing, tuple(self.words.shape), self.words.dtype) != (packing, wanted, np.uint32):
            raise ValueError("PackedWeights: expected what pack_weights makes of an array, got something else")

    @property
    def shape(self) -> tuple[int, ...]:
        """``(kh, kw, C, K)``."""
        return tuple(self.source.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the numbers."""
        return self.source.dtype  # type: ignore[no-any-return]


def is_whole(spec: Spec, size: int = PIECE_BYTES) -> bool:
    """Whether every pixel of a tensor [N, H, W, C] is aligned pieces of so many bytes."""
    outer = zip(spec.strides[:3], spec.shape[:3])
    return (
        (spec.shape[3] * spec.itemsize) % size == 0
        and spec.strides[3] == spec.itemsize
        and spec.misalignment % size == 0
        and all(n == 1 or s % size == 0 for s, n in outer)
    )


def pack(w: np.ndarray[Any, Any], packing: Packing, tf32: bool = False) -> np.ndarray[Any, Any]:
    """The packed words of NumPy weights: the definition that the kernel is compared with."""
    if tf32:
        w = round_tf32(w)
    return np.concatenate([_pack_for_warps(w, packing).ravel(), _pack_for_warpgroups(w, packing).ravel()])


def _pack_for_warps(w: np.ndarray[Any, Any], packing: Packing) -> np.ndarray[Any, Any]:
    pieces = packing.chunks * packing.chunk
    room = np.zeros((packing.positions, pieces * packing.lanes, packing.columns * COLUMNS), w.dtype)
    room[:, : packing.channels, : packing.features] = w.reshape(packing.positions, *w.shape[2:])
    cut = room.reshape(packing.positions, packing.chunks, packing.chunk, packing.lanes, packing.columns * COLUMNS)
    # -> [features, chunks, positions, pieces of the chunk, lanes]
    pieces = packing.positions * packing.chunk
    rows = cut.transpose(4, 1, 0, 2, 3).reshape(packing.columns * COLUMNS, packing.chunks, pieces, packing.lanes)
    steps = np.zeros((*rows.shape[:2], packing.steps * STEP_PIECES, packing.lanes), w.dtype)
    steps[:, :, :pieces] = rows
    words = steps.view(np.uint32).reshape(
        packing.columns, COLUMNS, packing.chunks, packing.steps, STEP_PIECES, PIECE_WORDS
    )
    return words.transpose(0, 2, 3, 1, 5, 4)


def _pack_for_warpgroups(w: np.ndarray[Any, Any], packing: Packing) -> np.ndarray[Any, Any]:
    count, features, _ = packing.warpgroup_shape
    pieces, positions = packing.pixel_pieces, packing.positions
    room = np.zeros((positions, pieces * packing.lanes, features), w.dtype)
    room[:, : packing.channels, : packing.features] = w.reshape(positions, *w.shape[2:])
    cut = room.reshape(positions, pieces, packing.lanes, features).transpose(1, 0, 3, 2)
    packed = np.zeros((count, features, packing.lanes), w.dtype)
    turns = features // (COLUMNS * packing.together), COLUMNS // 2, packing.together, 2
    turned = cut.reshape(pieces * positions, *turns, packing.lanes).swapaxes(2, 3)
    packed[: pieces * positions] = turned.reshape(pieces * positions, features, packing.lanes)
    return packed.view(np.uint32)


def round_tf32(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 numbers rounded to the 10 bits of mantissa that TF32 has, ties away from zero."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(numbers), rounded.view(np.float32), numbers)


def pack_array(w: Any, tf32: bool, orders: tuple[Order, ...] = tuple(Order)) -> PackedWeights:
    """:class:`PackedWeights` of one convolution; for one call, perhaps only in the order that it takes."""
    tf32 = tf32 and w.dtype == np.float32
    packing = packing_of(tuple(w.shape), _packed_itemsize(w.dtype))
    words = _device.fused().pack(w, packing, tf32, orders) if _has_words(w) else np.empty(0, np.uint32)
    return PackedWeights(w, words, packing, tf32)


def _has_words(w: Any) -> bool:
    """Whether there is anything to pack: the fused kernels take arrays of a device, and no float64."""
    return not isinstance(w, np.ndarray) and w.dtype.itemsize <= 4


def _packed_itemsize(dtype: np.dtype[Any]) -> int:
    return min(dtype.itemsize, 4)
