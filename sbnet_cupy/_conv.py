"""``conv2d`` and ``sparse_conv2d``: a convolution of whole images, and of their active blocks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from . import _device
from ._affine import IDENTITY, Affine, check_channels, check_floating, parse_activation
from ._conv_geometry import (
    BlockParams,
    Layer,
    Padding,
    Pair,
    block_params,
    make_layer,
    parse_padding,
    parse_strides,
)
from ._engine import parse_engine
from ._fused_network import FusedBlocks, plan_conv, run_conv
from ._pack_weights import unpack
from ._packing import PackedWeights, pack_array
from ._reduce_mask import BlockIndices
from ._stack import Arithmetic, BlockStacks, convolve_image
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


def conv2d(
    x: Any,
    w: Any,
    strides: Any = 1,
    padding: Padding = "SAME",
    *,
    bias: Any = None,
    activation: str | None = None,
    allow_tf32: bool | None = None,
) -> Any:
    """Convolve whole images: the reference of :func:`sparse_conv2d`, and its baseline.

    As usual in neural networks it is a cross-correlation:
    ``y[n, i, j, k] = act(sum(x[n, i*sh + a - top, j*sw + b - left, c] * w[a, b, c, k]) + bias[k])``, over all a, b and
    c, with 0 for pixels outside of the image.

    Parameters
    ----------
    x : ndarray, shape (N, H, W, C)
        Images of float16, bfloat16, float32 or float64, in any strides.
    w : ndarray, shape (kh, kw, C, K)
        Weights of the dtype of `x`.
    strides : int, (int, int), or [1, height, width, 1]
        Distance between output pixels, in input pixels.
    padding : 'SAME', 'VALID' or ((top, bottom), (left, right))
        As in :func:`calc_block_params`.
    bias : ndarray, shape (K,), optional
        Summand for each output channel: float32, or float64 for an `x` of float64.
    activation : None or 'relu'
        ``'relu'`` makes negative numbers 0 and leaves NaN.
    allow_tf32 : bool, optional
        Let a device round float32 factors to TF32 (10 bits) before it multiplies them. The default asks the environment
        variable CUPY_TF32, as CuPy does: without it, float32 is IEEE float32.

    Returns
    -------
    ndarray, shape (N, H_out, W_out, K)
        A new array of the dtype of `x`.

    Raises
    ------
    TypeError
        Arrays of different kinds, or an unsupported or wrong dtype.
    ValueError
        A wrong rank or shape, an array on another device than the current one, or a bad stride, padding or activation.

    Notes
    -----
    Sums are float32 (float64 for float64), in no specified order: they differ from the exact ones by at most
    ``n*u/(1 - n*u)`` times the sum of the absolute products, for ``n = kh*kw*C`` and unit roundoff u (N. Higham,
    Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). Half types are rounded to their dtype
    at the end, and with CuPy perhaps also before `bias`.

    With CuPy arrays, work runs on the current stream, without synchronisation. It allocates the result, the padded
    images, the result for the padded images (in float32 for half types), with strides other than 1 the pixels of the
    padded images once more, and 32 MiB for cuBLAS (or what cuDNN asks for). cuBLAS promises the same bits in every
    run on the same GPU with the same version.
    """
    xp, layer, affine = _parse(x, w, strides, padding, bias, activation)
    return convolve_image(x, w, layer, affine, Arithmetic(xp, use_tf32(allow_tf32)))


def sparse_conv2d(
    x: Any,
    w: Any | PackedWeights,
    indices: BlockIndices,
    params: BlockParams,
    *,
    strides: Any = 1,
    padding: Padding = "SAME",
    base: Any = None,
    out: Any = None,
    bias: Any = None,
    activation: str | None = None,
    allow_tf32: bool | None = None,
    engine: str = "auto",
) -> Any:
    """Convolve the active blocks of images: there equal to :func:`conv2d`, and to `base` elsewhere.

    Parameters
    ----------
    x, strides, padding, bias, activation, allow_tf32
        As in :func:`conv2d`. With packed weights, `allow_tf32` is what they were packed with, or None.
    w : ndarray, shape (kh, kw, C, K), or PackedWeights
        Weights of the dtype of `x`, or what :func:`pack_weights` made of them.
    indices : BlockIndices
        Active blocks, from :func:`block_indices` with the same `params`.
    params : BlockParams
        What :func:`calc_block_params` returns for ``x.shape``, the shape of `w`, `strides` and `padding`, with any
        block size.
    base : ndarray, shape (N, H_out, W_out, K), optional
        Values outside of the active tiles, of the dtype of `x`; 0 where it is None.
    out : ndarray, optional
        Where to put the result: of its shape and the dtype of `x`, in any strides. It shares no memory with an input or
        is `base` itself: that touches the active tiles only, and saves a copy.
    engine : 'auto', 'fused' or 'composed'
        For CuPy arrays: ``'fused'`` is one kernel from image to image, for float16, bfloat16 and float32;
        ``'composed'`` gathers the blocks, multiplies them with cuBLAS or cuDNN, and scatters the results; ``'auto'``
        takes the one that is estimated to be faster, by what was measured on an H200. NumPy arrays are always composed.

    Returns
    -------
    ndarray, shape (N, H_out, W_out, K)
        The result, of the dtype of `x` (`out` where it was given). `base` is not changed, unless it is `out`.

    Raises
    ------
    TypeError, ValueError
        As in :func:`conv2d`; and where `indices`, `params`, `base` or `out` do not fit, `engine` cannot do it, or
        weights were packed with another `allow_tf32`. Nothing is changed then.

    Notes
    -----
    Borders are as in :func:`conv2d`: pixels outside of the image are 0. Sums and their error bound are those of
    :func:`conv2d`; the order of the sums is another for each engine and block size, so that results differ by rounding.
    Both engines give the same bits in every run on the same GPU. Fused half types are rounded once, at the end.

    With CuPy arrays, work runs on the current stream, without synchronisation, and can be captured in a CUDA graph
    after a first call. It allocates the result unless `out` is given; what follows goes back to CuPy's pool on return.
    Fused, it is one launch and no more memory with packed weights; others are packed first, in every call, which takes
    a launch and about twice the size of `w`. Composed, it takes the stack of gathered blocks, that of the results (in
    float32 for half types and kernels larger than 1x1), one more of the results where they have to be rounded or
    something follows, with strides other than 1 the gathered pixels once more, and 32 MiB for cuBLAS (or what cuDNN
    asks for).
    """
    check_blocks(indices, params)
    w, packed, tf32 = unpack(w, allow_tf32)
    inputs = _name_inputs(x, w, indices, bias, base)
    xp = array_namespace(inputs, out)
    in_place = out is not None and base is not None and same_memory(base, out)
    if in_place:
        del inputs["base"]
    relu, device = parse_activation(activation), current_device(xp)
    how = parse_strides(strides), parse_padding(padding), relu, tf32, parse_engine(engine)
    looks, given = tuple(map(look_at, inputs.values())), None if out is None else look_at(out)
    call = prepare(tuple(inputs), looks, given, params, *how, device)
    if out is not None:
        check_separate("out", out, call.reach, inputs, call.input_reaches)
    affine = Affine(None, bias, relu)
    if call.fused is not None:
        packed = packed or pack_array(w, tf32, (call.fused.order,))
        out = out if in_place else _start(call.shape, x.dtype, base, out, xp)
        return run_conv(call.fused, x, packed, out, indices, affine)
    stacks = BlockStacks(indices, (call.layer,), params, x.shape[0], Arithmetic(xp, tf32))
    stack = stacks.convolve(0, stacks.gather(x, IDENTITY, w), w, affine)
    out = out if in_place else _start(call.shape, x.dtype, base, out, xp)
    return stacks.scatter(stack, out, add=False)


def _name_inputs(x: Any, w: Any, indices: BlockIndices, bias: Any, base: Any) -> dict[str, Any]:
    """The arrays that there are, by name."""
    rows, counts = indices
    inputs = {"x": x, "w": w, "active_block_indices": rows, "bin_counts": counts}
    if bias is not None:
        inputs["bias"] = bias
    if base is not None:
        inputs["base"] = base
    return inputs


def _start(shape: tuple[int, ...], dtype: Any, base: Any, out: Any, xp: ModuleType) -> Any:
    """`out`, or a new array, with the values outside of active tiles."""
    memory = _device.memory(xp)
    if out is None:
        return memory.zeros(shape, dtype) if base is None else base.copy()
    if base is None:
        memory.clear(out)
    else:
        memory.copyto(out, base)
    return out


@dataclass(frozen=True)
class _Call:
    """What calls that look alike share."""

    layer: Layer
    shape: tuple[int, ...]  # of the result
    reach: Reach  # of the result
    input_reaches: tuple[Reach, ...]
    fused: Any  # what runs it in one kernel; None for the composed engine


@functools.lru_cache(maxsize=1024)
def prepare(
    names: tuple[str, ...],
    looks: tuple[Look, ...],
    given: Look | None,
    params: BlockParams,
    strides: Pair,
    padding: Any,
    relu: bool,
    tf32: bool,
    engine: str,
    device: int,
) -> _Call:
    """Raise unless the arguments fit together, and choose how to do it."""
    inputs = {name: Spec(*look) for name, look in zip(names, looks)}
    x, w = inputs["x"], inputs["w"]
    check_weights(x, w, inputs.get("bias"), device)
    layer = make_layer(x.shape[1:3], w.shape[:2], strides, padding)
    check_params(params, (layer,))
    check_indices(inputs["bin_counts"], inputs["active_block_indices"])
    shape = (x.shape[0], *layer.out_size, w.shape[3])
    out = Spec.contiguous(shape, x.dtype, device) if given is None else Spec(*given)
    targets = [("base", inputs["base"])] if "base" in inputs else []
    for name, spec in [*targets, ("out", out)]:
        check_like(name, spec, x.dtype, shape, "N, H_out, W_out, K")
        check_place(name, spec, device)
    rows = inputs["active_block_indices"]
    blocks = FusedBlocks(device, rows.strides, rows.shape[0], x.shape[0], (layer,), params, (w.shape,), tf32)
    fused = plan_conv(engine, blocks, x, out, Affine(relu=relu))
    return _Call(layer, shape, output_reach("out", out), tuple(map(reach_of, inputs.values())), fused)


def check_blocks(indices: Any, params: Any) -> None:
    """Raise unless these are what ``block_indices`` and ``calc_block_params`` return."""
    if not isinstance(indices, BlockIndices):
        raise TypeError(f"indices: expected BlockIndices, as block_indices returns, got {type(indices).__name__}")
    if not isinstance(params, BlockParams):
        raise TypeError(f"params: expected BlockParams, got {type(params).__name__}")


@functools.lru_cache(maxsize=1024)
def check_params(params: BlockParams, layers: tuple[Layer, ...]) -> None:
    """Raise unless these are the blocks of a chain of convolutions."""
    try:
        expected = block_params(layers, params.bsize)
    except ValueError as error:
        raise ValueError(f"params: {error}") from None
    if params != expected:
        raise ValueError(f"params: expected {expected} for this image, kernel, stride and padding, got {params}")


def _parse(x: Any, w: Any, strides: Any, padding: Any, bias: Any, activation: Any) -> tuple[Any, Layer, Affine]:
    """The namespace, the geometry and what follows the convolution, of arguments that fit together."""
    affine = Affine(None, bias, parse_activation(activation))
    named = {"x": x, "w": w, **({} if bias is None else {"bias": bias})}
    xp = array_namespace(named)
    device = current_device(xp)
    check_weights(spec_of(x), spec_of(w), None if bias is None else spec_of(bias), device)
    layer = make_layer(x.shape[1:3], w.shape[:2], parse_strides(strides), parse_padding(padding))
    return xp, layer, affine


@functools.lru_cache(maxsize=1024)
def check_weights(x: Spec, w: Spec, bias: Spec | None, device: int) -> None:
    """Raise unless images, weights and bias fit together."""
    check_image("x", x)
    check_floating("x", x)
    if len(w.shape) != 4 or min(w.shape[:2]) < 1 or w.shape[2] != x.shape[3]:
        raise ValueError(f"w: expected shape (kh, kw, {x.shape[3]}, K) for an x of shape {x.shape}, got {w.shape}")
    if w.dtype != x.dtype:
        raise TypeError(f"w: expected dtype {x.dtype} like x, got {w.dtype}")
    check_channels("bias", bias, x.dtype, w.shape[3], device)
    for name, spec in (("x", x), ("w", w)):
        check_place(name, spec, device)
