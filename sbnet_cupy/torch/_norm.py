"""Batch norm and ReLU of a stack of tiles, with the statistics of active pixels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ._grid import NO_MARGIN, Margin, SparseBlockGrid

#: All axes but that of the channels.
_PIXELS = (0, 2, 3)


class Pixels(NamedTuple):
    """Which pixels of a stack count, and for what: ``[M, 1, h, w]`` both.

    Attributes
    ----------
    own : Tensor of bool
        Those of the tiles themselves that lie in an image: together, each active pixel once.
    ceiling : Tensor of float32
        What a pixel may be at most: infinity in an image, margins of tiles included, and 0 outside.
    """

    own: Tensor
    ceiling: Tensor


def find_pixels(grid: SparseBlockGrid, margin: Margin = NO_MARGIN) -> Pixels:
    """The pixels of a stack that ``grid.gather(x, margin)`` makes."""
    top, bottom, left, right = margin
    own = functional.pad(grid.inside(), (left, right, top, bottom))
    return Pixels(own, torch.where(grid.inside(margin), torch.inf, 0.0).float())


def norm_relu(stack: Tensor, norm: torch.nn.BatchNorm2d, pixels: Pixels) -> Tensor:
    """``relu(norm(stack))`` in an image, and 0 outside of it, where a dense network pads.

    In training mode, mean and variance are those of ``pixels.own``, and the running ones of `norm` move towards them;
    where no pixel is active, they stay. Sums are of float32, or of float64 where `stack` is; the result has the dtype
    and the memory format of `stack`. Nothing waits for the device.
    """
    if not norm.training:
        y = functional.batch_norm(stack, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return functional.relu(y) * (pixels.ceiling > 0).to(y.dtype)
    y, mean, var, count = _NormReLU.apply(stack, norm.weight, norm.bias, *pixels, norm.eps)
    _move_running(norm, mean, var, count)
    return y


def _move_running(norm: torch.nn.BatchNorm2d, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Move the running statistics towards those of `count` pixels, as ``torch.nn.BatchNorm2d`` does."""
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        part = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        part = part * (count > 0)  # no active pixel, no change
        unbiased = var * count / (count - 1).clamp(min=1)
        norm.running_mean.add_(part * (mean - norm.running_mean))
        norm.running_var.add_(part * (unbiased - norm.running_var))


class _NormReLU(torch.autograd.Function):
    """Batch norm over some pixels, ReLU, and zeros outside of the image, in few passes over memory.

    S. Ioffe and C. Szegedy, Batch Normalization, 2015, with sums over ``own``. Of a stack ``x`` with the gradient ``d``
    behind the ReLU, of n pixels with mean m, and with ``s = 1/sqrt(var + eps)`` and ``c = x - m``::

        y = relu(w*s*c + b)
        dL/db = sum(d), dL/dw = s*sum(d*c)
        dL/dx = w*s*(d - own*(sum(d) + s**2*c*sum(d*c))/n)

    The sums of gradients are over all pixels, margins included: each of them saw mean and variance.
    """

    @staticmethod
    def forward(
        ctx: Any, stack: Tensor, weight: Tensor, bias: Tensor, own: Tensor, ceiling: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.float64 if stack.dtype == torch.float64 else torch.float32
        count = own.sum(dtype=wide)
        some = count.clamp(min=1)
        mean = torch.where(own, stack, 0).sum(_PIXELS, dtype=wide) / some
        centred = stack - _by_channel(mean)
        # One pass, where squares and their sum are two.
        var = torch.linalg.vector_norm(torch.where(own, centred, 0), dim=_PIXELS).square() / some
        factor = torch.rsqrt(var + eps)
        y = torch.addcmul(_by_channel(bias.to(wide)), centred, _by_channel(weight * factor))
        # ReLU, and 0 outside of the image. PyTorch 2.11, compiled, would lose the gradient of what was changed in
        # place, or passed on by a conversion that does nothing.
        y = y.clamp(torch.zeros_like(count), ceiling)
        if stack.dtype != wide:
            y = y.to(stack.dtype)
        ctx.save_for_backward(y, centred, weight, own, factor, some)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        y, centred, weight, own, factor, some = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, y, 0).to(centred.dtype)
        grad_bias = grad.sum(_PIXELS)
        grad_weight = (grad * centred).sum(_PIXELS) * factor
        scale = weight * factor
        # What mean and variance hand back to the pixels that they are of.
        shift, slope = -scale * grad_bias / some, -scale * factor * grad_weight / some
        back = torch.where(own, torch.addcmul(_by_channel(shift), centred, _by_channel(slope)), 0)
        grad_stack = back.addcmul_(grad, _by_channel(scale)).to(y.dtype)
        return grad_stack, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None


def _by_channel(values: Tensor) -> Tensor:
    """Numbers ``[C]`` so that they meet the channels of a stack."""
    return values[:, None, None]
