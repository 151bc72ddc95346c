"""Residual bottlenecks with pre-activation, of whole images and of their active blocks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _device
from ._affine import IDENTITY
from ._bottleneck_weights import BottleneckWeights, WeightsForm, affines_of, convs_of
from ._conv import check_blocks, check_params
from ._conv_geometry import BlockParams, Layer, Pair, bottleneck_strides, make_chain, make_layer, parse_strides
from ._engine import parse_engine
from ._fused_network import BottleneckPlan, FusedBlocks, plan_bottleneck, run_bottleneck
from ._pack_weights import PackedBottleneck, pack_bottleneck, unpack_bottleneck
from ._reduce_mask import BlockIndices
from ._stack import Arithmetic, BlockStacks, activate_image, convolve_image
from ._stack_conv import use_tf32
from ._validate import (
    Look,
    Reach,
    Spec,
    array_namespace,
    check_image,
    check_indices,
    check_like,
    check_place,
    check_separate,
    current_device,
    look_at,
    output_reach,
    reach_of,
    same_memory,
    spec_of,
)


def res_block_bottleneck(
    x: Any, weights: BottleneckWeights, *, strides: Any = 1, allow_tf32: bool | None = None
) -> Any:
    """Run a bottleneck on whole images: the reference of :func:`sparse_res_block_bottleneck`, and its baseline.

    ``y = shortcut(x) + conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x)))))))))``, with ``bn(x) = x*scale + shift``; the
    shortcut is `x` itself or its projection (K. He et al., Identity Mappings in Deep Residual Networks, 2016). All
    convolutions have ``'SAME'`` padding, and the second one has the strides, as the projection has.

    Parameters
    ----------
    x : ndarray, shape (N, H, W, C)
        Images of the dtype of the convolutions, in any strides.
    weights : BottleneckWeights
        Arrays of the kind of `x`.
    strides : int, (int, int), or [1, height, width, 1]
        Other than 1 takes a projection.
    allow_tf32 : bool, optional
        As in :func:`conv2d`.

    Returns
    -------
    ndarray, shape (N, ceil(H / strides[0]), ceil(W / strides[1]), K)
        A new array of the dtype of `x`.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit together.

    Notes
    -----
    Rounding, reproducibility, stream and allocations are those of :func:`conv2d` for each of the convolutions.
    Half types are rounded to their dtype after each batch norm and after the last convolution; the shortcut is added in
    float32 and the sum rounded once.
    """
    if not isinstance(weights, BottleneckWeights):
        raise TypeError(f"weights: expected BottleneckWeights, got {type(weights).__name__}")
    xp = array_namespace({"x": x, "conv1": weights.conv1})
    layers = _parse_layers(spec_of(x), weights.form, parse_strides(strides), current_device(xp))
    how = Arithmetic(xp, use_tf32(allow_tf32))
    first, *norms = affines_of(weights)
    inner = x
    if not first.is_identity:
        inner = xp.empty(x.shape, x.dtype)
        activate_image(x, inner, first, xp)
    for layer, w, affine in zip(layers, convs_of(weights), norms):
        inner = convolve_image(inner, w, layer, affine, how)
    with np.errstate(all="ignore"):
        return xp.add(inner, _shortcut(x, weights, layers, how), out=inner)


def sparse_res_block_bottleneck(
    x: Any,
    weights: BottleneckWeights | PackedBottleneck,
    indices: BlockIndices,
    params: BlockParams,
    *,
    strides: Any = 1,
    out: Any = None,
    allow_tf32: bool | None = None,
    engine: str = "auto",
) -> Any:
    """Run a bottleneck on the active blocks of images: equal to :func:`res_block_bottleneck` there, else the shortcut.

    Parameters
    ----------
    x, strides, allow_tf32
        As in :func:`res_block_bottleneck`. With packed weights, `allow_tf32` is what they were packed with, or None.
    weights : BottleneckWeights or PackedBottleneck
        Arrays of the kind of `x`, or what :func:`pack_weights` made of them.
    indices : BlockIndices
        Active blocks, from :func:`block_indices` with the same `params`.
    params : BlockParams
        What :func:`calc_block_params_res_block` returns for ``x.shape``, ``weights.ksizes``, `strides` and ``'SAME'``;
        its block size is free.
    out : ndarray, optional
        Where to put the result: of its shape and the dtype of `x`, in any strides. It shares no memory with an input or
        is `x` itself, where the shortcut is the identity: that touches the active tiles only, and saves a copy.
    engine : 'auto', 'fused' or 'composed'
        As in :func:`sparse_conv2d`.

    Returns
    -------
    ndarray, shape (N, ceil(H / strides[0]), ceil(W / strides[1]), K)
        The result, of the dtype of `x` (`out` where it was given).

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit together, or that `engine` cannot take. Nothing is changed then.

    Notes
    -----
    Exact at the borders of the image: pixels outside of it are 0 before each convolution, after the batch norm
    and ReLU, as in the dense network. Rounding is that of :func:`res_block_bottleneck`, except that the fused engine
    rounds batch norms once (fused multiply-add) and sums of half types only where they are stored. Both engines give
    the same bits in every run on the same GPU.

    With CuPy arrays, work runs on the current stream, without synchronisation, and can be captured in a CUDA graph
    after a first call. It allocates the result unless `out` is given; what follows goes back to CuPy's pool on return.
    Fused, a bottleneck of 1x1, any and 1x1 kernels, without strides and projection, is one launch that needs no more
    memory. In place, its CTAs wait for each other before they write, so all of them have to run at the same time
    (a cooperative launch); if they do not fit on the device, the tiles go to a stack and are scattered in a second
    launch. Other bottlenecks, and those for which it is estimated to be faster (most of them in IEEE float32), take a
    launch for each convolution, and a stack of blocks for each of the first two.
    Weights that are not packed are packed in every call: three launches and six small copies. Composed, it takes what
    :func:`sparse_conv2d` does for each of the three convolutions. A projection is computed on the whole image, as
    :func:`conv2d` does it.

    `indices` name each block once, as :func:`block_indices` leaves them: if one came twice, the fused engine might add
    its result to that of the other in place, or might not.

    Examples
    --------
    A chain of blocks that share one mask, in place:

    >>> import numpy as np
    >>> from sbnet_cupy import BottleneckWeights, block_indices, calc_block_params_res_block
    >>> from sbnet_cupy import sparse_res_block_bottleneck
    >>> x = np.ones((1, 40, 40, 8), np.float32)
    >>> chain = [BottleneckWeights.random(8, 4, seed=seed) for seed in range(3)]
    >>> params = calc_block_params_res_block(x.shape, (10, 10), chain[0].ksizes, 1, "SAME")
    >>> indices = block_indices(np.eye(40, dtype=bool)[None], params)
    >>> for weights in chain:
    ...     y = sparse_res_block_bottleneck(x, weights, indices, params, out=x)
    """
    check_blocks(indices, params)
    plain, packed, tf32 = unpack_bottleneck(weights, allow_tf32)
    rows, counts = indices
    arrays = {"x": x, "conv1": plain.conv1, "active_block_indices": rows, "bin_counts": counts}
    xp = array_namespace(arrays, out)
    in_place = out is not None and same_memory(x, out)
    looks, given = (look_at(x), look_at(rows), look_at(counts)), None if out is None else look_at(out)
    how = parse_strides(strides), tf32, parse_engine(engine), current_device(xp)
    call = prepare(*looks, plain.form, given, in_place, params, *how)
    if out is not None:
        inputs = {"active_block_indices": rows, "bin_counts": counts, **plain.arrays}
        check_separate("out", out, call.reach, inputs if in_place else {"x": x, **inputs}, call.input_reaches)
    arithmetic = Arithmetic(xp, tf32)
    if call.fused is not None:
        packed = packed or pack_bottleneck(plain, tf32, call.fused.orders)
        out = out if in_place else _put_shortcut(x, plain, call.layers, out, arithmetic)
        return run_bottleneck(call.fused, x, packed, out, indices, params)
    stacks = BlockStacks(indices, call.layers, params, x.shape[0], arithmetic)
    stack = _run_stacks(stacks, x, plain)
    out = out if in_place else _put_shortcut(x, plain, call.layers, out, arithmetic)
    return stacks.scatter(stack, out, add=True)


@dataclass(frozen=True)
class _Call:
    """What calls that look alike share."""

    layers: tuple[Layer, ...]
    reach: Reach  # of the result
    input_reaches: tuple[Reach, ...]
    fused: BottleneckPlan | None  # None for the composed engine


@functools.lru_cache(maxsize=1024)
def prepare(
    image: Look,
    rows: Look,
    counts: Look,
    weights: WeightsForm,
    given: Look | None,
    in_place: bool,
    params: BlockParams,
    strides: Pair,
    tf32: bool,
    engine: str,
    device: int,
) -> _Call:
    """Raise unless the arguments fit together, and choose how to do it."""
    x, indices = Spec(*image), Spec(*rows)
    layers = _parse_layers(x, weights, strides, device)
    check_params(params, layers)
    check_indices(Spec(*counts), indices)
    projects, shapes = "project" in weights.specs, tuple(conv.shape for conv in weights.convs)
    target = (x.shape[0], *layers[-1].out_size, shapes[2][3])
    out = Spec.contiguous(target, x.dtype, device) if given is None else Spec(*given)
    check_like("out", out, x.dtype, target, "N, H_out, W_out, K")
    check_place("out", out, device)
    if in_place and projects:
        raise ValueError("out: expected memory of its own where there is a projection, got x itself")
    blocks = FusedBlocks(device, indices.strides, indices.shape[0], x.shape[0], layers, params, shapes, tf32)
    fused = plan_bottleneck(engine, blocks, x, out, in_place, "scale1" in weights.specs, projects)
    inputs = [indices, Spec(*counts), *weights.specs.values()]
    reaches = map(reach_of, inputs if in_place else [x, *inputs])
    return _Call(layers, output_reach("out", out), tuple(reaches), fused)


def _run_stacks(stacks: BlockStacks, x: Any, weights: BottleneckWeights) -> Any:
    """The blocks of what is added to the shortcut."""
    first, *norms = affines_of(weights)
    stack = stacks.gather(x, first, weights.conv1)
    for step, (w, affine) in enumerate(zip(convs_of(weights), norms)):
        stack = stacks.convolve(step, stack, w, affine)
    return stack


def _put_shortcut(x: Any, weights: BottleneckWeights, layers: tuple[Layer, ...], out: Any, how: Arithmetic) -> Any:
    """The shortcut, in `out` if it is given, in memory of its own."""
    shortcut = _shortcut(x, weights, layers, how)
    if out is not None:
        _device.memory(how.xp).copyto(out, shortcut)
        return out
    return shortcut.copy() if shortcut is x else shortcut


def _shortcut(x: Any, weights: BottleneckWeights, layers: tuple[Layer, ...], how: Arithmetic) -> Any:
    """`x` itself, or its projection."""
    if weights.project is None:
        return x
    strides = layers[1].strides
    return convolve_image(x, weights.project, make_layer(x.shape[1:3], (1, 1), strides, "SAME"), IDENTITY, how)


def _parse_layers(x: Spec, weights: WeightsForm, strides: Pair, device: int) -> tuple[Layer, ...]:
    """The geometry; raise unless the image fits the weights."""
    conv1, _, conv3 = weights.convs
    check_image("x", x)
    if x.dtype != conv1.dtype:
        raise TypeError(f"x: expected dtype {conv1.dtype} like the weights, got {x.dtype}")
    if x.shape[3] != conv1.shape[2]:
        raise ValueError(f"x: expected {conv1.shape[2]} channels, as conv1 has, got shape {x.shape}")
    if "project" not in weights.specs and (strides != (1, 1) or x.shape[3] != conv3.shape[3]):
        change = f"strides {strides} and {x.shape[3]} to {conv3.shape[3]} channels"
        raise ValueError(f"project: expected a projection for {change}, got None")
    check_place("x", x, device)
    check_place("conv1", conv1, device)
    height, width = x.shape[1:3]
    ksizes = [(conv.shape[0], conv.shape[1]) for conv in weights.convs]
    return tuple(make_chain((height, width), ksizes, bottleneck_strides(strides), ["SAME"] * 3))
