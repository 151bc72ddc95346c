"""``SparseBottleneck``: a residual bottleneck of the active tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import sbnet_cupy

from ._arrays import as_array, as_image, at, channels_last
from ._check import check_image, check_rows
from ._common import ROWS_SCHEMA, autocast_dtype, new_images, takes_gradients
from ._conv import same_margin, tile_params
from ._folding import FoldsInEval, fold_norm, library_order
from ._grid import SparseBlockGrid
from ._norm import find_pixels, norm_relu
from ._operator import operator
from ._packing import PACKED_SCHEMA, bottleneck_weights


class SparseBottleneck(FoldsInEval):
    """A residual bottleneck with pre-activation, of the active tiles of images.

    ``y = shortcut(x) + conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x)))))))))`` in active tiles, borders of the image
    included, and ``shortcut(x)`` elsewhere (K. He et al., Identity Mappings in Deep Residual Networks, 2016).

    Its state dict is that of a dense bottleneck whose layers are called ``bn1``, ``conv1``, ``bn2``, ``conv2``,
    ``bn3``, ``conv3`` and, where the number of channels changes, ``shortcut``: it loads the weights of one.

    Parameters
    ----------
    in_channels, bottleneck : int
        Channels of the images, and of the second convolution.
    out_channels : int, optional
        Channels of the result, `in_channels` where it is None. Where they differ the shortcut is a 1x1 convolution.
    kernel_size : int
        Of the second convolution: odd. The others are 1x1.
    eps, momentum : float
        Of the batch norms.
    inplace : bool
        Whether images may be overwritten with the result where the shortcut is the identity and no gradients are asked
        for: that touches the active tiles only, and saves a copy of the images. For all but the first of a chain.
    device, dtype
        Of the parameters.

    Notes
    -----
    **In eval mode** batch norm uses its running statistics, which are folded into a factor and a summand for each
    channel. Without gradients, all of it goes to :func:`sbnet_cupy.sparse_res_block_bottleneck`, which picks the
    engine; TF32 is allowed where PyTorch allows it for convolutions. Weights are folded and packed for the fused
    kernels once, as :class:`FoldsInEval` says. Active tiles then equal those of the dense
    bottleneck up to rounding. Where autocast would convert the images, and where there are gradients, it is made of
    gather, PyTorch's own ops and scatter instead; as in a dense network, autocast leaves the dtype of the sum alone.

    **In training mode** batch norm normalises over the pixels of active tiles only: each counts once, the margin that
    neighbouring tiles share does not count, and neither do pixels outside of the image. A dense bottleneck
    normalises over all pixels, so in training mode the two differ wherever some tile is not active; the running
    statistics become those of active pixels.

    Nothing waits for the device. Under ``DistributedDataParallel`` each process normalises over its own active pixels.
    """

    packed = 3

    def __init__(
        self,
        in_channels: int,
        bottleneck: int,
        out_channels: int | None = None,
        *,
        kernel_size: int = 3,
        eps: float = 1e-5,
        momentum: float = 0.1,
        inplace: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.inplace = inplace
        out_channels = in_channels if out_channels is None else out_channels
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        conv: dict[str, Any] = {"bias": False, **place}
        norm: dict[str, Any] = {"eps": eps, "momentum": momentum, **place}
        self.bn1 = torch.nn.BatchNorm2d(in_channels, **norm)
        self.conv1 = torch.nn.Conv2d(in_channels, bottleneck, 1, **conv)
        self.bn2 = torch.nn.BatchNorm2d(bottleneck, **norm)
        self.conv2 = torch.nn.Conv2d(bottleneck, bottleneck, kernel_size, padding=kernel_size // 2, **conv)
        self.bn3 = torch.nn.BatchNorm2d(bottleneck, **norm)
        self.conv3 = torch.nn.Conv2d(bottleneck, out_channels, 1, **conv)
        self.shortcut = torch.nn.Conv2d(in_channels, out_channels, 1, **conv) if in_channels != out_channels else None

    def fold(self) -> list[Tensor]:
        """Weights of the convolutions, factors and summands in one, and the weights of the shortcut if there is one."""
        found = [library_order(conv.weight) for conv in (self.conv1, self.conv2, self.conv3)]
        channels = [part for norm in (self.bn1, self.bn2, self.bn3) for part in fold_norm(norm)]
        shortcut = [] if self.shortcut is None else [library_order(self.shortcut.weight)]
        return [*found, torch.cat(channels), *shortcut]

    def forward(self, x: Tensor, grid: SparseBlockGrid | None = None) -> Tensor:
        """Run the bottleneck on the active tiles.

        Parameters
        ----------
        x : Tensor, shape (N, C, H, W)
            Images, in any memory format.
        grid : SparseBlockGrid, optional
            The active tiles. None: whole images, as a dense bottleneck.

        Returns
        -------
        Tensor, shape (N, K, H, W)
            A new tensor, or `x` with ``inplace=True``.
        """
        if grid is None:
            return self._dense(x)
        grid.check("x", x)
        if self.training or autocast_dtype(x) != x.dtype or self._trains(x):
            return self._composed(x, grid)
        arguments = (x, *self.folded(), *grid.rows[::-1], list(grid.tile))
        if self.inplace and self.shortcut is None and not torch.compiler.is_compiling():
            bottleneck_in_place_op(*arguments)
            return x
        return bottleneck_op(*arguments)

    def _trains(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and takes_gradients((x, *self.parameters()))

    def _dense(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.relu(self.bn1(x)))
        y = self.conv2(functional.relu(self.bn2(y)))
        return self._skip(x) + self.conv3(functional.relu(self.bn3(y)))

    def _skip(self, x: Tensor) -> Tensor:
        return x if self.shortcut is None else self.shortcut(x)

    def _composed(self, x: Tensor, grid: SparseBlockGrid) -> Tensor:
        """Of PyTorch's own ops, through which gradients flow."""
        margin = same_margin(self.conv2, "conv2")
        pixels = find_pixels(grid, margin)
        y = self.conv1(norm_relu(grid.gather(x, margin), self.bn1, pixels))
        y = functional.conv2d(norm_relu(y, self.bn2, pixels), self.conv2.weight)
        y = self.conv3(norm_relu(y, self.bn3, find_pixels(grid)))
        base = self._skip(x)
        with torch.autocast(x.device.type, enabled=False):
            return grid.scatter(y.to(base.dtype), base, add=True)


_ARGUMENTS = f"Tensor[] weights, {PACKED_SCHEMA}, {ROWS_SCHEMA}, int[] tile"


@operator(f"bottleneck(Tensor x, {_ARGUMENTS}) -> Tensor")
def bottleneck_op(x: Any, weights: Any, *others: Any) -> Any:
    check_image("x", x)
    if _keeps_channels(weights):
        # With an identity for a shortcut, the library works in place.
        y = x.detach().clone()
        _run(y, y, weights, *others)
    else:
        y = _new_result(x, weights)
        _run(x, y, weights, *others)
    return y


@operator(f"bottleneck_(Tensor(a!) x, {_ARGUMENTS}) -> ()")
def bottleneck_in_place_op(x: Any, *others: Any) -> None:
    check_image("x", x)
    _run(x, x, *others)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def _run(
    x: Tensor, y: Tensor, weights: Any, words: Any, tf32: Any, bin_counts: Any, active_block_indices: Any, tile: Any
) -> None:
    """Put the result into `y`, which may be `x`."""
    check_rows(x, bin_counts, active_block_indices)
    out = as_image(y)
    image = out if y is x else as_image(x)
    params = tile_params(image.shape, tuple(tile), tuple(tuple(w.shape[:2]) for w in weights[:3]), ("SAME",) * 3)
    with at(x.device):
        folded, tf32 = bottleneck_weights(weights, words, tf32)
        indices = sbnet_cupy.BlockIndices(as_array(active_block_indices), as_array(bin_counts))
        sbnet_cupy.sparse_res_block_bottleneck(image, folded, indices, params, out=out, allow_tf32=tf32)


@torch.library.register_fake(bottleneck_op)
def _(x: Any, weights: Any, *_: Any) -> Any:
    return torch.empty_like(x) if _keeps_channels(weights) else _new_result(x, weights)


@torch.library.register_fake(bottleneck_in_place_op)
def _(x: Any, *_: Any) -> None:
    check_image("x", x)


def _keeps_channels(weights: list[Tensor]) -> bool:
    """Whether there are none of a shortcut."""
    return len(weights) == 4


def _new_result(x: Tensor, weights: list[Tensor]) -> Tensor:
    return new_images(x, (x.shape[0], weights[2].shape[3], *x.shape[2:]), channels_last(x))
