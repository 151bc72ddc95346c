"""Weights in the form in which inference takes them, made once in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FoldsInEval(torch.nn.Module):
    """Base of modules that keep what inference makes of their parameters, as long as these stay the same in eval mode.

    It is made anew after ``eval()``, ``train()``, ``to()``, loading a state dict, or any change of a parameter in
    place that autograd can see. Who changes ``parameter.data`` in eval mode calls ``eval()`` once more.
    """

    _kept: tuple[Any, list[Tensor]] | None = None

    def fold(self) -> list[Tensor]:
        """What inference takes."""
        raise NotImplementedError

    def folded(self) -> list[Tensor]:
        """The result of :meth:`fold`, kept in eval mode."""
        if self.training or torch.compiler.is_compiling():
            return self._fold()
        sources = [*self.parameters(), *self.buffers()]
        if any(t.is_inference() for t in sources):  # nobody counts their changes
            return self._fold()
        key = [(id(t), t.data_ptr(), t._version) for t in sources]
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._fold()
        return self._kept[1]

    def _fold(self) -> list[Tensor]:
        with torch.no_grad():
            return self.fold()

    def train(self, mode: bool = True) -> Any:
        """As ``torch.nn.Module.train``; forgets what was kept."""
        self._kept = None
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._kept = None
        return super()._apply(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def pack_weight(weight: Tensor) -> Tensor:
    """Weights ``[K, C, kh, kw]`` of PyTorch as ``[kh, kw, C, K]``."""
    return weight.permute(2, 3, 1, 0).contiguous()


def fold_norm(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode, computed in float64: float32, or float64 where its weight is."""
    dtype = torch.float64 if norm.weight.dtype == torch.float64 else torch.float32
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = norm.bias.double() - norm.running_mean.double() * scale
    return scale.to(dtype), shift.to(dtype)


def allow_tf32() -> bool:
    """Whether PyTorch lets convolutions round float32 to TF32."""
    settings = getattr(torch.backends.cudnn, "conv", None)  # since PyTorch 2.9
    if settings is None:
        return bool(torch.backends.cudnn.allow_tf32)
    return bool(settings.fp32_precision == "tf32")


def takes_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd follows what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
