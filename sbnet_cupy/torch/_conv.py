"""``SparseConv2d``: a convolution of the active tiles."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import sbnet_cupy

from .._conv_geometry import BlockParams, calc_block_params_res_block
from ._arrays import as_array, as_image, at, channels_last
from ._check import check_image, check_rows
from ._common import ROWS_SCHEMA, autocast, new_images, takes_gradients
from ._folding import FoldsInEval, library_order
from ._grid import Margin, SparseBlockGrid
from ._operator import operator
from ._packing import PACKED_SCHEMA, conv_weights


class SparseConv2d(torch.nn.Conv2d, FoldsInEval):
    """A convolution of the active tiles of images, with the parameters and the state dict of ``torch.nn.Conv2d``.

    In active tiles its result is that of ``torch.nn.Conv2d``, borders of the image included; elsewhere it is `base`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, padding, dilation, groups, bias, device, dtype
        As in ``torch.nn.Conv2d``. The padding must keep the size of the image, as ``'same'`` does, which is the default
        here; the stride is 1.

    Raises
    ------
    ValueError
        For a padding that does not keep the size of the image, or one of other numbers than zeros.

    Notes
    -----
    Without gradients, kernels without dilation and groups go to :func:`sbnet_cupy.sparse_conv2d`, which picks the
    engine; TF32 is allowed where PyTorch allows it for convolutions. Otherwise it is gather, PyTorch's convolution and
    scatter. Both round as convolutions do, so that they may differ from each other, and from the dense convolution, by
    rounding. In eval mode, weights are packed for the fused kernels once.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        padding: Any = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.margin = same_margin(self, "SparseConv2d")

    def fold(self) -> list[Tensor]:
        """The weights in the library's order of axes."""
        return [library_order(self.weight)]

    def forward(self, x: Tensor, grid: SparseBlockGrid | None = None, base: Tensor | None = None) -> Tensor:
        """Convolve the active tiles.

        Parameters
        ----------
        x : Tensor, shape (N, C, H, W)
            Images, in any memory format.
        grid : SparseBlockGrid, optional
            The active tiles. None: the whole images, as ``torch.nn.Conv2d``.
        base : Tensor, shape (N, K, H, W), optional
            The result outside of active tiles, 0 where it is None; not changed.

        Returns
        -------
        Tensor, shape (N, K, H, W)
        """
        if grid is None:
            return super().forward(x)
        grid.check("x", x)
        if base is not None:
            grid.check("base", base)
        simple = self.groups == 1 and tuple(self.dilation) == (1, 1)
        if simple and not takes_gradients((x, self.weight, self.bias, base)):
            return self._infer(x, grid, base)
        stack = grid.gather(x, self.margin)
        tiles = torch.nn.functional.conv2d(stack, self.weight, self.bias, 1, 0, self.dilation, self.groups)
        return grid.onto_zeros(tiles) if base is None else grid.scatter(tiles, base)

    def _infer(self, x: Tensor, grid: SparseBlockGrid, base: Tensor | None) -> Tensor:
        (weight,), words, tf32 = self.folded()
        (x,) = autocast(x)
        bias = None if self.bias is None else self.bias.to(_wide(x.dtype))
        base = None if base is None else base.to(x.dtype)
        return conv2d_op(x, weight, words, tf32, bias, base, *grid.rows[::-1], list(grid.tile), list(self.margin))


def _wide(dtype: Any) -> Any:
    """In what the library takes numbers for each channel."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_margin(conv: torch.nn.Conv2d, name: str) -> Margin:
    """The pixels around the image that a convolution pads, if that keeps the size of the image."""
    if tuple(conv.stride) != (1, 1):
        raise ValueError(f"{name}: expected stride 1, got {tuple(conv.stride)}")
    if conv.padding_mode != "zeros":
        raise ValueError(f"{name}: expected padding_mode 'zeros', got {conv.padding_mode!r}")
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
    if conv.padding == "valid":
        padding: tuple[int, ...] = (0, 0)
    elif conv.padding == "same":
        # As PyTorch: the odd pixel behind the image.
        return Margin(total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    else:
        padding = tuple(conv.padding)
    if [2 * p for p in padding] != total:
        wanted = "'same' padding, which keeps the size of the image"
        raise ValueError(
            f"{name}: expected {wanted}, got padding {conv.padding!r} for kernel_size {tuple(conv.kernel_size)} and "
            f"dilation {tuple(conv.dilation)}"
        )
    return Margin(padding[0], padding[0], padding[1], padding[1])


@functools.lru_cache(maxsize=1024)
def tile_params(
    shape: tuple[int, ...], tile: tuple[int, int], ksizes: tuple[tuple[int, int], ...], paddings: tuple[Any, ...]
) -> BlockParams:
    """The blocks of a chain of convolutions whose output tiles are given."""
    reach = [sum(k[axis] - 1 for k in ksizes) for axis in (0, 1)]
    bsize = tile[0] + reach[0], tile[1] + reach[1]
    return calc_block_params_res_block(shape, bsize, ksizes, 1, paddings)


@operator(
    f"conv2d(Tensor x, Tensor weight, {PACKED_SCHEMA}, Tensor? bias, Tensor? base, {ROWS_SCHEMA}, int[] tile, "
    "int[] margin) -> Tensor"
)
def conv2d_op(
    x: Any,
    weight: Any,
    words: Any,
    tf32: Any,
    bias: Any,
    base: Any,
    bin_counts: Any,
    active_block_indices: Any,
    tile: Any,
    margin: Any,
) -> Any:
    check_image("x", x)
    check_rows(x, bin_counts, active_block_indices)
    y = _new_result(x, weight)
    image = as_image(x)
    top, bottom, left, right = margin
    padding = (top, bottom), (left, right)
    params = tile_params(image.shape, tuple(tile), (tuple(weight.shape[:2]),), (padding,))
    w, tf32 = conv_weights(weight, words, tf32)
    with at(x.device):
        sbnet_cupy.sparse_conv2d(
            image,
            w,
            sbnet_cupy.BlockIndices(as_array(active_block_indices), as_array(bin_counts)),
            params,
            padding=padding,
            base=None if base is None else as_image(base),
            bias=None if bias is None else as_array(bias),
            out=as_image(y),
            allow_tf32=tf32,
        )
    return y


@torch.library.register_fake(conv2d_op)
def _(x: Any, weight: Any, *_: Any) -> Any:
    return _new_result(x, weight)


def _new_result(x: Tensor, weight: Tensor) -> Tensor:
    """Memory for the convolution of `x` with weights ``[kh, kw, C, K]``."""
    return new_images(x, (x.shape[0], weight.shape[3], *x.shape[2:]), channels_last(x))
