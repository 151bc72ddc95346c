"""Weights as operators take them: tensors, with the same packed for the fused kernels, of which the library's are made.

An operator takes tensors alone. What the library wants is made of them again in each call; for tensors of a device it
is kept by where these lie, so that a second call with the same ones makes nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sbnet_cupy

from .._pack_weights import PackedBottleneck
from .._packing import PackedWeights, packing_of
from ._arrays import Place, as_array, at, on_host
from ._common import allow_tf32
from ._operator import operator

#: Of the schemas: the same weights packed, or nothing, and whether for TF32. None: as PyTorch allows it now.
PACKED_SCHEMA = "Tensor[] words, bool? tf32"


def is_packed(weight: Tensor) -> bool:
    """Whether there is anything to pack: the fused kernels take tensors of a device, and no float64."""
    return not on_host(weight) and weight.element_size() <= 4


@operator("pack_weight(Tensor weight, bool tf32) -> Tensor")
def pack_weight_op(weight: Any, tf32: Any) -> Any:
    """Pack weights ``[kh, kw, C, K]``: int32, in the order that ``packing_of`` describes."""
    words = _new_words(weight)
    with at(weight.device):
        as_array(words)[...] = sbnet_cupy.pack_weights(as_array(weight), allow_tf32=tf32).words.view(np.int32)
    return words


@torch.library.register_fake(pack_weight_op)
def _(weight: Any, tf32: Any) -> Any:
    return _new_words(weight)


def _new_words(weight: Tensor) -> Tensor:
    words = packing_of(tuple(weight.shape), weight.element_size()).words if is_packed(weight) else 0
    return weight.new_empty(words, dtype=torch.int32)


def conv_weights(weight: Tensor, words: list[Tensor], tf32: bool | None) -> tuple[Any, bool]:
    """What :func:`sbnet_cupy.sparse_conv2d` takes, and whether TF32 may be used."""
    tf32 = allow_tf32() if tf32 is None else tf32
    if on_host(weight):
        return as_array(weight), tf32
    return _conv_weights_at(Place.of(weight), tuple(map(Place.of, words)), tf32), tf32


@functools.lru_cache(maxsize=1024)
def _conv_weights_at(weight: Place, words: tuple[Place, ...], tf32: bool) -> Any:
    array = weight.array()
    return _packed(array, words[0], tf32) if words else array


def _packed(weight: Any, words: Place, tf32: bool) -> PackedWeights:
    packing = packing_of(tuple(weight.shape), weight.dtype.itemsize)
    return PackedWeights(weight, words.array().view(np.uint32), packing, tf32 and weight.dtype == np.float32)


def bottleneck_weights(weights: list[Tensor], words: list[Tensor], tf32: bool | None) -> tuple[Any, bool]:
    """What :func:`sbnet_cupy.sparse_res_block_bottleneck` takes, and whether TF32 may be used.

    `weights` are those of the three convolutions; scales and shifts in one tensor, one after another; and those of the
    shortcut, if it is a convolution.
    """
    tf32 = allow_tf32() if tf32 is None else tf32
    if on_host(weights[0]):
        return _bottleneck_weights(*map(as_array, weights)), tf32
    return _bottleneck_weights_at(tuple(map(Place.of, weights)), tuple(map(Place.of, words)), tf32), tf32


@functools.lru_cache(maxsize=1024)
def _bottleneck_weights_at(weights: tuple[Place, ...], words: tuple[Place, ...], tf32: bool) -> Any:
    arrays = [place.array() for place in weights]
    plain = _bottleneck_weights(*arrays)
    if not words:
        return plain
    conv1, conv2, conv3 = (_packed(array, place, tf32) for array, place in zip(arrays, words, strict=False))
    return PackedBottleneck(plain, conv1, conv2, conv3, arrays[3])


def _bottleneck_weights(conv1: Any, conv2: Any, conv3: Any, channels: Any, *project: Any) -> Any:
    parts, begin = [], 0
    for size in (conv1.shape[2], conv2.shape[2], conv3.shape[2]):
        parts += [channels[begin : begin + size], channels[begin + size : begin + 2 * size]]
        begin += 2 * size
    return sbnet_cupy.BottleneckWeights(conv1, conv2, conv3, *parts, *project)
