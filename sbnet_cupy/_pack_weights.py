"""``pack_weights``: weights prepared once for many calls of the fused kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._affine import check_floating
from ._bottleneck_weights import BottleneckWeights, convs_of
from ._packing import Order, PackedWeights, pack_array
from ._stack_conv import use_tf32
from ._validate import array_namespace, check_place, current_device, spec_of


@dataclass(frozen=True, eq=False)
class PackedBottleneck:
    """Weights of a bottleneck, as :func:`pack_weights` makes them: to be passed in place of the weights.

    Attributes
    ----------
    weights : BottleneckWeights
        The weights themselves.
    conv1, conv2, conv3 : PackedWeights
        Those of the convolutions, packed.
    channels : ndarray of float32, or None
        On a device, one after another: scale1, shift1, scale2, shift2, scale3, shift3; ones and zeros where scale1 and
        shift1 are None. None for NumPy arrays and float64, which nothing is packed for.
    """

    weights: BottleneckWeights
    conv1: PackedWeights
    conv2: PackedWeights
    conv3: PackedWeights
    channels: Any

    @property
    def convs(self) -> tuple[PackedWeights, PackedWeights, PackedWeights]:
        """Those of the three convolutions."""
        return self.conv1, self.conv2, self.conv3


def pack_weights(w: Any, *, allow_tf32: bool | None = None) -> Any:
    """Prepare weights for the fused kernels, once for many calls.

    Parameters
    ----------
    w : ndarray, shape (kh, kw, C, K), or BottleneckWeights
        Weights of a convolution, or of a bottleneck: float16, bfloat16, float32 or float64.
    allow_tf32 : bool, optional
        Whether float32 is rounded to TF32 (10 bits), as in :func:`conv2d`. Calls with these weights do the same.

    Returns
    -------
    PackedWeights or PackedBottleneck
        For :func:`sparse_conv2d`, or :func:`sparse_res_block_bottleneck`, in place of `w`. It holds `w` as well, which
        is not to be written to any more: only what does not go through the fused kernels would see it. NumPy arrays
        and float64 have nothing to be packed for, and pass through.

    Raises
    ------
    TypeError, ValueError
        Not weights, or an array on another device than the current one. Nothing is launched then.

    Notes
    -----
    With CuPy arrays, work runs on the current stream, without synchronisation, and can be captured in a CUDA graph
    after a first call: a kernel for each convolution and, for a bottleneck, six small copies of its scales and shifts.
    It allocates what it returns: about twice the size of `w`, in two orders, with channels filled up to 16 bytes and
    features to a multiple of 8. Two runs give the same bits. Weights that are not packed are packed in every call of
    the fused kernels.

    Examples
    --------
    >>> import numpy as np
    >>> from sbnet_cupy import block_indices, calc_block_params, pack_weights, sparse_conv2d
    >>> x, w = np.ones((1, 40, 40, 8), np.float32), np.ones((3, 3, 8, 16), np.float32)
    >>> params = calc_block_params(x.shape, (10, 10), w.shape, 1, "SAME")
    >>> indices = block_indices(np.eye(40, dtype=bool)[None], params)
    >>> packed = pack_weights(w)
    >>> y = sparse_conv2d(x, packed, indices, params)
    """
    tf32 = use_tf32(allow_tf32)
    if isinstance(w, BottleneckWeights):
        xp = array_namespace({"conv1": w.conv1})
        check_place("conv1", spec_of(w.conv1), current_device(xp))
        return pack_bottleneck(w, tf32)
    xp, spec = array_namespace({"w": w}), spec_of(w)
    check_floating("w", spec)
    if len(w.shape) != 4 or min(w.shape[:2]) < 1:
        raise ValueError(f"w: expected shape (kh, kw, C, K), got {w.shape}")
    check_place("w", spec, current_device(xp))
    return pack_array(w, tf32)


def pack_bottleneck(
    weights: BottleneckWeights, tf32: bool, orders: Iterable[tuple[Order, ...]] = (tuple(Order),) * 3
) -> PackedBottleneck:
    """:class:`PackedBottleneck` of weights that have been checked, each in its orders."""
    conv1, conv2, conv3 = (pack_array(array, tf32, own) for array, own in zip(convs_of(weights), orders))
    return PackedBottleneck(weights, conv1, conv2, conv3, _join_channels(weights))


def _join_channels(weights: BottleneckWeights) -> Any:
    """Scales and shifts, one after another; slice by slice, which a CUDA graph can capture."""
    if isinstance(weights.conv1, np.ndarray) or weights.conv1.dtype.itemsize > 4:
        return None
    xp = array_namespace({"conv1": weights.conv1})
    sizes = [conv.shape[2] for conv in convs_of(weights)]
    joined, begin = xp.empty(2 * sum(sizes), np.float32), 0
    for number, size in enumerate(sizes, 1):
        for name, neutral in (("scale", 1), ("shift", 0)):
            array = getattr(weights, f"{name}{number}")
            joined[begin : begin + size] = neutral if array is None else array
            begin += size
    return joined


def unpack(w: Any, allow_tf32: bool | None) -> tuple[Any, PackedWeights | None, bool]:
    """Of what was passed as weights: the array, the same packed or None, and whether TF32 may be used."""
    if not isinstance(w, PackedWeights):
        return w, None, use_tf32(allow_tf32)
    return w.source, w, _tf32_of(w, allow_tf32)


def unpack_bottleneck(weights: Any, allow_tf32: bool | None) -> tuple[BottleneckWeights, PackedBottleneck | None, bool]:
    """The same of what was passed as weights of a bottleneck."""
    if isinstance(weights, PackedBottleneck):
        return weights.weights, weights, _tf32_of(weights.conv1, allow_tf32)
    if not isinstance(weights, BottleneckWeights):
        raise TypeError(f"weights: expected BottleneckWeights or PackedBottleneck, got {type(weights).__name__}")
    return weights, None, use_tf32(allow_tf32)


def _tf32_of(packed: PackedWeights, allow_tf32: bool | None) -> bool:
    """What the weights were packed for; raise if the call asks for something else."""
    if allow_tf32 is None:
        return packed.tf32
    tf32 = use_tf32(allow_tf32)
    if tf32 != packed.tf32 and packed.dtype == np.float32:
        raise ValueError(f"allow_tf32: expected {packed.tf32}, with which the weights were packed, got {tf32}")
    return tf32
