"""Random inputs, and what the ops must make of them.

Every function works on NumPy and CuPy alike (`xp`). Expected results come from advanced indexing on a padded image,
which shares no code with the library.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cases import Mask, Pair, Transfer, active_indices

#: Random inputs of one case span at least this many bytes, several times the 60 MB of an H200's L2.
ROTATED_BYTES = 512e6
#: Buffer sets to rotate among, at most.
MOST_SETS = 24


@dataclass(frozen=True)
class Blocks:
    """One set of active blocks and their stack. A gather's stack is random too, until it is written."""

    indices: Any
    bin_counts: Any
    stack: Any


@dataclass(frozen=True)
class Inputs:
    """An image tensor, and the sets of blocks that calls rotate among."""

    image: Any
    sets: list[Blocks]


def sets_needed(case: Transfer) -> int:
    """Number of block sets whose stacks, read and written, exceed the L2 several times."""
    return max(1, min(MOST_SETS, math.ceil(ROTATED_BYTES / (2 * case.stack_bytes))))


def make_inputs(xp: Any, case: Transfer, sets: int) -> Inputs:
    """Random image and stacks: any finite bits for copies, small whole numbers for sums, which then are exact."""
    values = small_integers if case.op in ("add", "gather_grad") else finite_values
    n, h, w, c = case.shape
    image = values(xp, (n, c, h, w), case.dtype, 1).transpose(0, 2, 3, 1) if case.nchw else None
    if image is None:
        image = values(xp, case.shape, case.dtype, 1)
    made = []
    for seed in range(sets):
        indices = active_indices(n, case.bcount, case.blocks, seed)
        stack = values(xp, case.stack_shape, case.dtype, 2 + seed)
        made.append(Blocks(xp.asarray(indices), xp.asarray([case.blocks], dtype=np.int32), stack))
    return Inputs(image, made)


def random_words(xp: Any, count: int, seed: int) -> Any:
    """`count` random uint32, always the same for one seed: a mixed counter."""
    words = xp.arange(count, dtype=np.uint32)
    words += np.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words ^= words >> np.uint32(shift)
        words *= np.uint32(factor)
    words ^= words >> np.uint32(16)
    return words


def finite_values(xp: Any, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    """Random bits, of which floats keep all but the top one of the exponent: none is NaN or infinite."""
    kind = np.dtype(dtype)
    words = random_words(xp, math.ceil(math.prod(shape) * kind.itemsize / 4), seed)
    if kind.kind == "f":
        words &= np.uint32({2: 0xBFFFBFFF, 4: 0xBFFFFFFF}[kind.itemsize])
    return words.view(kind)[: math.prod(shape)].reshape(shape)


def small_integers(xp: Any, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    """Random whole numbers from 0 to 15: sums of a few are exact in every dtype."""
    words = random_words(xp, math.ceil(math.prod(shape) / 4), seed)
    words &= np.uint32(0x0F0F0F0F)
    return words.view(np.uint8)[: math.prod(shape)].reshape(shape).astype(dtype)


def make_mask(xp: Any, case: Mask, seed: int) -> tuple[Any, Any]:
    """A mask of random numbers in [0, 0.5) but for one pixel of 0.75 in each active block, and these blocks.

    The pixel lies where no other block reaches, so that the blocks are known without reducing the mask; images
    that leave the last block no such pixel are a ValueError.
    """
    indices = active_indices(case.shape[0], case.bcount, case.blocks, seed)
    rng = np.random.default_rng(seed)
    mask = (random_words(xp, math.prod(case.shape), seed) >> np.uint32(8)).astype(np.float32)
    mask *= np.float32(2.0**-25)
    mask = mask.reshape(case.shape)
    place = [indices[:, 0]]
    for axis in (0, 1):
        begin = case.boffset[axis] + indices[:, 1 + axis] * case.bstride[axis]
        # Alone in its block: past the end of the block before, and ahead of the begin of the next.
        low = np.maximum(begin + max(0, case.bsize[axis] - case.bstride[axis]), 0)
        high = np.minimum(begin + min(case.bstride[axis], case.bsize[axis]), case.shape[1 + axis])
        place.append(rng.integers(low, high))
    mask[tuple(xp.asarray(p, dtype=np.int64) for p in place)] = np.float32(0.75)
    return mask, xp.asarray(indices)


def pad_image(xp: Any, image: Any, margins: tuple[Pair, Pair]) -> Any:
    """A contiguous copy of `image` with zeros all around, as far as the grid hangs over."""
    (top, bottom), (left, right) = margins
    n, h, w, c = image.shape
    padded = xp.zeros((n, top + h + bottom, left + w + right, c), image.dtype)
    padded[:, top : top + h, left : left + w] = image
    return padded


def crop_image(padded: Any, case: Transfer) -> Any:
    """The image inside of its padding."""
    (top, _), (left, _) = case.margins
    return padded[:, top : top + case.shape[1], left : left + case.shape[2]]


def pixel_index(xp: Any, case: Transfer, indices: Any) -> tuple[Any, Any, Any]:
    """Advanced index of the pixels of the blocks in the padded image: broadcasts to ``[M, h, w]``."""
    where = indices.astype(np.int64)
    (top, _), (left, _) = case.margins
    rows = (where[:, 1] * case.bstride[0] + case.boffset[0] + top)[:, None] + xp.arange(case.bsize[0])
    columns = (where[:, 2] * case.bstride[1] + case.boffset[1] + left)[:, None] + xp.arange(case.bsize[1])
    return where[:, 0][:, None, None], rows[:, :, None], columns[:, None, :]


def channels_last(case: Transfer, stack: Any) -> Any:
    """A stack of the case as ``[M, h, w, C]``."""
    return stack.transpose(0, 2, 3, 1) if case.transpose else stack


def expected_stacks(xp: Any, case: Transfer, inputs: Inputs) -> list[Any]:
    """What gather must return for each set, as ``[M, h, w, C]``."""
    padded = pad_image(xp, inputs.image, case.margins)
    return [padded[pixel_index(xp, case, blocks.indices)] for blocks in inputs.sets]


def expected_image(xp: Any, case: Transfer, inputs: Inputs) -> Any:
    """What scatter must make of the image once all sets are written over it, or added to it, in turn."""
    # Sums in 32 bits: atomics, on which `add.at` rests on a device, know no smaller types.
    wide = {"f": np.float32, "u": np.uint32}[np.dtype(case.dtype).kind] if case.op == "add" else case.dtype
    padded = pad_image(xp, inputs.image.astype(wide), case.margins)
    for blocks in inputs.sets:
        index, stack = pixel_index(xp, case, blocks.indices), channels_last(case, blocks.stack)
        if case.op == "add":
            xp.add.at(padded, index, stack.astype(wide))
        else:
            padded[index] = stack
    return crop_image(padded, case).astype(case.dtype)


def expected_gather_grads(xp: Any, case: Transfer, inputs: Inputs) -> list[Any]:
    """The sum of all stacks' pixels in each image pixel, for each set."""
    found = []
    for blocks in inputs.sets:
        padded = pad_image(xp, xp.zeros(case.shape, np.float32), case.margins)
        stack = channels_last(case, blocks.stack).astype(np.float32)
        xp.add.at(padded, pixel_index(xp, case, blocks.indices), stack)
        found.append(crop_image(padded, case).astype(case.dtype))
    return found


def expected_scatter_grads(xp: Any, case: Transfer, inputs: Inputs) -> list[tuple[Any, Any]]:
    """For each set: the image in the blocks' pixels, where no later block lies, as ``[M, h, w, C]``; and the rest."""
    found = []
    for blocks in inputs.sets:
        index = pixel_index(xp, case, blocks.indices)
        padded = pad_image(xp, inputs.image, case.margins)
        rows = xp.arange(1, case.blocks + 1, dtype=np.int32)[:, None, None]
        last = xp.zeros(padded.shape[:3], np.int32)
        # The largest row number is that of the last block.
        xp.maximum.at(last, index, xp.broadcast_to(rows, (case.blocks, *case.bsize)))
        stack = xp.where((last[index] == rows)[..., None], padded[index], padded.dtype.type(0))
        rest = xp.where(last[..., None] > 0, padded.dtype.type(0), padded)
        found.append((stack, crop_image(rest, case)))
    return found


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays are equal in shape, dtype and every bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = f"u{a.dtype.itemsize}"
    return bool((a.view(bits) == b.view(bits)).all())


class Expected:
    """The expected results of one case, made when a check first asks and kept for the next."""

    def __init__(self, xp: Any, case: Transfer, inputs: Inputs) -> None:
        self._arguments = xp, case, inputs

    @functools.cached_property
    def stacks(self) -> list[Any]:
        return expected_stacks(*self._arguments)

    @functools.cached_property
    def image(self) -> Any:
        return expected_image(*self._arguments)

    @functools.cached_property
    def grads(self) -> list[Any]:
        make = expected_gather_grads if self._arguments[1].op == "gather_grad" else expected_scatter_grads
        return make(*self._arguments)

    def check(self, results: list[Any]) -> bool:
        """Whether the results of one call for each set are right.

        These are stacks ``[M, h, w, C]``, images, or pairs of both.
        """
        case = self._arguments[1]
        if case.op == "gather":
            return all(same_bits(a, b) for a, b in zip(results, self.stacks, strict=True))
        if case.op == "gather_grad":
            return all(same_bits(a, b) for a, b in zip(results, self.grads, strict=True))
        if case.op == "scatter_grad":
            pairs = zip(results, self.grads, strict=True)
            return all(same_bits(a, b) for found, wanted in pairs for a, b in zip(found, wanted, strict=True))
        return same_bits(results[-1], self.image)
