"""The active tiles of a batch of images, which all layers of a network share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._geometry import parse_pair
from .._reduce_mask import BlockIndices
from ._common import Blocks, autocast
from ._gather import gather_op
from ._reduce_mask import reduce_mask
from ._scatter import onto_zeros_op, scatter_op


class Margin(NamedTuple):
    """Pixels around a tile that come with it."""

    top: int
    bottom: int
    left: int
    right: int

    def __bool__(self) -> bool:
        return any(self)

    def plus(self, other: Margin) -> Margin:
        """Both margins together."""
        return Margin(*(a + b for a, b in zip(self, other)))

    def union(self, other: Margin) -> Margin:
        """The smallest margin that holds both."""
        return Margin(*(max(a, b) for a, b in zip(self, other)))


NO_MARGIN = Margin(0, 0, 0, 0)


class SparseBlockGrid(NamedTuple):
    """The active tiles of a batch of images: made from a mask once, and shared by all layers that keep the image size.

    Tile (n, i, j) covers the pixels ``[i*tile[0]:(i + 1)*tile[0], j*tile[1]:(j + 1)*tile[1]]`` of image n. Layers read
    the pixels around it that they need, and write the tile.

    Made by :meth:`from_mask`.

    Attributes
    ----------
    batch : int
        Number of images.
    size : (int, int)
        Pixels of an image: (height, width).
    tile : (int, int)
        Pixels of a tile.
    rows : BlockIndices
        The active tiles, as :func:`reduce_mask` returns them.
    """

    batch: int
    size: tuple[int, int]
    tile: tuple[int, int]
    rows: BlockIndices

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        tile: int | tuple[int, int] = 16,
        *,
        reach: int = 0,
        tol: float = 0.5,
        avgpool: bool = False,
        capacity: int | None = None,
    ) -> SparseBlockGrid:
        """Find the tiles in which a mask is active.

        Parameters
        ----------
        mask : Tensor, shape (N, H, W) or (N, 1, H, W)
            A value for each pixel.
        tile : int or (int, int)
            Pixels of a tile; an int stands for a square.
        reach : int
            A tile is active also where the mask is so within this many pixels of it.
        tol, avgpool, capacity
            As in :func:`sbnet_cupy.reduce_mask`. With `capacity` nothing waits for the device.

        Returns
        -------
        SparseBlockGrid

        Raises
        ------
        TypeError, ValueError
            As :func:`reduce_mask`.

        Notes
        -----
        Synchronisation, stream and memory are those of :func:`reduce_mask`.
        """
        pair = (tile, tile) if isinstance(tile, int) else tile
        height, width = pair if torch.compiler.is_compiling() else parse_pair("tile", pair, minimum=1)
        size = mask.shape[-2], mask.shape[-1]
        rows = reduce_mask(
            mask,
            (-(-size[0] // height), -(-size[1] // width)),
            bsize=(height + 2 * reach, width + 2 * reach),
            boffset=(-reach, -reach),
            bstride=(height, width),
            tol=tol,
            avgpool=avgpool,
            capacity=capacity,
        )
        return cls(mask.shape[0], size, (height, width), rows)

    def gather(self, x: Tensor, margin: Margin = NO_MARGIN) -> Tensor:
        """The tiles of `x` ``[N, C, H, W]`` with the pixels around them: ``[M, C, ...]``, 0 outside of the image."""
        self.check("x", x)
        return gather_op(*autocast(x), *self._blocks(margin))

    def scatter(self, tiles: Tensor, base: Tensor, *, add: bool = False) -> Tensor:
        """A copy of `base` ``[N, C, H, W]`` with the tiles written over it, or added."""
        self.check("base", base)
        tiles, base = autocast(tiles, base)
        counts, indices, *grid = self._blocks(NO_MARGIN)
        return scatter_op(tiles, counts, indices, base, *grid, add, False)

    def onto_zeros(self, tiles: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` that are the tiles there and 0 elsewhere, in the memory format of `tiles`."""
        counts, indices, *grid = self._blocks(NO_MARGIN)
        return onto_zeros_op(tiles, counts, indices, (self.batch, *self.size), *grid)

    def inside(self, margin: Margin = NO_MARGIN) -> Tensor:
        """Which pixels of gathered tiles lie in an image: bool ``[M, 1, ...]``, False in unused rows."""
        indices = self.rows.active_block_indices
        if not torch.compiler.is_compiling():
            one = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=indices.device)
            return gather_op(one.expand(self.batch, 1, *self.size), *self._blocks(margin))
        # The compiler makes one kernel of this, together with what it is for.
        n, i, j = indices.long().unbind(1)
        row = torch.arange(n.shape[0], device=n.device)
        used = (row < self.rows.bin_counts) & (n >= 0) & (n < self.batch)
        vertical = _inside(i, self.tile[0], self.size[0], margin.top, margin.bottom) & used[:, None]
        horizontal = _inside(j, self.tile[1], self.size[1], margin.left, margin.right)
        return vertical[:, None, :, None] & horizontal[:, None, None, :]

    def pixels(self) -> Tensor:
        """Which pixels of the images lie in an active tile: bool ``[N, 1, H, W]``."""
        ones = self.rows.bin_counts.new_ones((self.rows.active_block_indices.shape[0], 1, *self.tile), dtype=torch.bool)
        return self.onto_zeros(ones)

    def check(self, name: str, x: Tensor) -> None:
        """Raise unless `x` is a batch of these images."""
        if x.dim() != 4 or x.shape[0] != self.batch or tuple(x.shape[2:]) != tuple(self.size):
            wanted = f"({self.batch}, C, {self.size[0]}, {self.size[1]})"
            raise ValueError(f"{name}: expected shape {wanted} like the mask's, got {tuple(x.shape)}")

    def _blocks(self, margin: Margin) -> Blocks:
        """The tiles with a margin, as the ops take them."""
        indices, counts = self.rows
        (height, width), (top, bottom, left, right) = self.tile, margin
        bsize = [height + top + bottom, width + left + right]
        return Blocks(counts, indices, bsize, [-top, -left], [height, width])


def _inside(index: Tensor, tile: int, extent: int, before: int, after: int) -> Tensor:
    """Which pixels along an axis lie in the image: bool ``[M, before + tile + after]``."""
    pixel = index[:, None] * tile + torch.arange(-before, tile + after, device=index.device)
    return (pixel >= 0) & (pixel < extent)


def crop(stack: Tensor, margin: Margin, wanted: Margin) -> Tensor:
    """A view of tiles with less around them, or the tiles themselves."""
    if margin == wanted:
        return stack
    top, bottom, left, right = (a - b for a, b in zip(margin, wanted))
    return stack[:, :, top : stack.shape[2] - bottom, left : stack.shape[3] - right]
