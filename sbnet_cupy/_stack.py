"""Convolutions with what follows them, of whole images and of stacks of blocks. Arguments are already checked."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from . import _device, _reference
from ._affine import Affine
from ._conv_geometry import BlockParams, Layer, stack_grids
from ._gather import sparse_gather
from ._reduce_mask import BlockIndices
from ._scatter import sparse_scatter_var
from ._stack_conv import Engine, choose_engine


@dataclass(frozen=True)
class Arithmetic:
    """How to convolve: on which library's arrays, with which engine (None: the fastest), and whether in TF32."""

    xp: ModuleType
    tf32: bool
    engine: str | None = None

    def engine_for(self, w: Any) -> Engine:
        """What convolves with weights `w`."""
        return choose_engine(self.xp, w.dtype, w.shape[:2], self.tf32, self.engine)


def convolve_image(x: Any, w: Any, layer: Layer, affine: Affine, how: Arithmetic) -> Any:
    """``affine(conv(x, w))`` of whole images [N, H, W, C]: a new, contiguous array."""
    result = how.engine_for(w).convolve(_pad(x, layer, how.xp), w, layer.strides, how.tf32)
    out = result if result.dtype == x.dtype and result.flags.c_contiguous else how.xp.empty(result.shape, x.dtype)
    if out is not result or not affine.is_identity:
        activate_image(result, out, affine, how.xp)
    return out


def activate_image(x: Any, out: Any, affine: Affine, xp: ModuleType) -> None:
    """Write ``affine(x)`` of every pixel to `out`, which may be `x`."""
    if xp is np:
        out[...] = _reference.activate(x, affine, out.dtype)
    else:
        _device.activation().activate_image(x, out, affine)


def _pad(x: Any, layer: Layer, xp: ModuleType) -> Any:
    """Images with the zeros around them that a convolution reads; `x` itself where it reads none."""
    (top, left), (bottom, right) = layer.pad_before, layer.pad_after
    if top == left == bottom == right == 0:
        return xp.ascontiguousarray(x)
    height, width = layer.in_size
    padded = xp.zeros((x.shape[0], top + height + bottom, left + width + right, x.shape[3]), x.dtype)
    padded[:, top : top + height, left : left + width] = x
    return padded


@dataclass(frozen=True)
class BlockStacks:
    """Active blocks of a chain of convolutions, whose stacks go from one step to the next."""

    indices: BlockIndices
    layers: tuple[Layer, ...]
    params: BlockParams
    batch: int
    how: Arithmetic

    def gather(self, x: Any, affine: Affine, w: Any) -> Any:
        """``affine(x)`` in the blocks of the first convolution, whose weights are `w`; 0 outside of the image."""
        room = self.how.engine_for(w).room(self._rows)
        stack = self.how.xp.empty((room, *self.params.bsize, x.shape[3]), x.dtype)
        sparse_gather(
            x,
            self.indices.bin_counts,
            self.indices.active_block_indices,
            **self.params.grid_in._asdict(),
            out=stack[: self._rows],
            scale=affine.scale,
            shift=affine.shift,
            activation="relu" if affine.relu else None,
        )
        return stack

    def convolve(self, step: int, stack: Any, w: Any, affine: Affine) -> Any:
        """``affine(conv(stack, w))`` by convolution number `step`; 0 where the dense network's next one would pad.

        After the last convolution, what lies outside of the image is dropped by scatter, and may be anything.
        """
        layer = self.layers[step]
        result = self.how.engine_for(w).convolve(stack, w, layer.strides, self.how.tf32)
        is_last = step == len(self.layers) - 1
        same = result.dtype == stack.dtype
        if is_last and same and affine.is_identity:
            return result
        out = result if same and result.flags.c_contiguous else self.how.xp.empty(result.shape, stack.dtype)
        self._activate(result[: self._rows], out[: self._rows], affine, step)
        return out

    def scatter(self, stack: Any, y: Any, *, add: bool) -> Any:
        """The tiles of the last convolution, written over the image `y` or added to it."""
        return sparse_scatter_var(
            stack[: self._rows],
            self.indices.bin_counts,
            self.indices.active_block_indices,
            y,
            **self.params.grid_out._asdict(),
            add=add,
        )

    @property
    def _rows(self) -> int:
        return int(self.indices.active_block_indices.shape[0])

    def _activate(self, stack: Any, out: Any, affine: Affine, step: int) -> None:
        grid = stack_grids(self.layers, self.params)[step + 1]
        shape = (self.batch, *self.layers[step].out_size)
        counts, rows = self.indices.bin_counts, self.indices.active_block_indices
        if self.how.xp is np:
            _reference.activate_blocks(stack, int(counts[0]), rows, grid, shape, affine, out)
        else:
            _device.activation().activate(stack, out, affine, counts, rows, grid, shape)
