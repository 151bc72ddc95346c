"""Weights in the form in which inference takes them, made once in eval mode."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._common import allow_tf32, autocast, autocasting_to
from ._packing import is_packed, pack_weight_op


class Folded(NamedTuple):
    """What inference takes.

    Attributes
    ----------
    weights : list of Tensor
        As :meth:`FoldsInEval.fold` returns them, those of convolutions in the dtype that autocast gives them.
    words : list of Tensor
        Those of convolutions packed for the fused kernels; empty where that is left to each call.
    tf32 : bool, optional
        Whether they were packed for TF32. None: as PyTorch allows it when they are used.
    """

    weights: list[Tensor]
    words: list[Tensor]
    tf32: bool | None


class _Setting(NamedTuple):
    """What decides the form of weights besides their numbers."""

    autocast: torch.dtype | None
    tf32: bool | None
    #: Who works on another stream does not wait for this one, so each has weights of its own.
    stream: int

    @classmethod
    def now(cls, device: torch.device) -> _Setting:
        """The one for work on a device."""
        cast = autocasting_to(device)
        if device.type != "cuda":
            return cls(cast, None, 0)
        return cls(cast, allow_tf32(), torch.cuda.current_stream(device).cuda_stream)


class FoldsInEval(torch.nn.Module):
    """Base of modules that keep what inference makes of their parameters, as long as these stay the same in eval mode.

    It is made anew after ``eval()``, ``train()``, ``to()``, loading a state dict, or any change of a parameter in
    place that autograd can see; and once for each dtype of autocast, each setting of TF32 and each stream. Who changes
    ``parameter.data`` in eval mode calls ``eval()`` once more.

    A CUDA graph that was captured after a call in eval mode reads what was kept then, which lives as long as the
    module: it does not follow the parameters. Captured without such a call, it folds and packs in every replay, and so
    does what ``torch.compile`` makes in every call.
    """

    #: How many weights, from the first, are those of convolutions to be packed.
    packed = 1

    #: State of the sources, and what was made of it.
    _kept: tuple[Any, dict[_Setting, Folded]] | None = None
    #: What graphs read.
    _captured: list[Folded] | None = None

    def fold(self) -> list[Tensor]:
        """What inference takes: weights of convolutions to be packed, then all else."""
        raise NotImplementedError

    def folded(self) -> Folded:
        """The weights for a call now, kept in eval mode."""
        if self.training or torch.compiler.is_compiling():
            return self._fold()
        sources = _tensors_of(self)
        if any(t.is_inference() for t in sources):  # nobody counts their changes
            return self._fold()
        key = [(id(t), t.data_ptr(), t._version) for t in sources]
        if self._kept is None or self._kept[0] != key:
            self._kept = key, {}
        kept, setting = self._kept[1], _Setting.now(sources[0].device)
        if sources[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return self._capture(kept, setting)
        if setting not in kept:
            kept[setting] = self._pack(self._fold(), setting)
        return kept[setting]

    def _capture(self, kept: dict[_Setting, Folded], setting: _Setting) -> Folded:
        """Of what was kept, what a graph is to read: nothing runs while it is captured, so nothing new is kept."""
        for other, folded in kept.items():
            if other[:2] == setting[:2]:
                self._captured = [folded, *(f for f in self._captured or () if f is not folded)]
                return folded
        return self._fold()

    def _fold(self) -> Folded:
        with torch.no_grad():
            return Folded([autocast(w)[0] if w.dim() == 4 else w for w in self.fold()], [], None)

    def _pack(self, folded: Folded, setting: _Setting) -> Folded:
        """The same with what the fused kernels take."""
        tf32 = bool(setting.tf32)
        words = [pack_weight_op(w, tf32) for w in folded.weights[: self.packed] if is_packed(w)]
        return Folded(folded.weights, words, tf32) if words else folded

    def train(self, mode: bool = True) -> Any:
        """As ``torch.nn.Module.train``; forgets what was kept."""
        self._kept = None
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._kept = None
        return super()._apply(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_captured": None}


def _tensors_of(module: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module: what ``parameters()`` and ``buffers()`` give, at a sixth of their time."""
    found = [t for tensors in (module._parameters, module._buffers) for t in tensors.values() if t is not None]
    for layer in module._modules.values():
        if layer is not None:
            found += _tensors_of(layer)
    return found


def library_order(weight: Tensor) -> Tensor:
    """Weights ``[K, C, kh, kw]`` of PyTorch as ``[kh, kw, C, K]``."""
    return weight.permute(2, 3, 1, 0).contiguous()


def fold_norm(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode, computed in float64: float32, or float64 where its weight is."""
    dtype = torch.float64 if norm.weight.dtype == torch.float64 else torch.float32
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = norm.bias.double() - norm.running_mean.double() * scale
    return scale.to(dtype), shift.to(dtype)
