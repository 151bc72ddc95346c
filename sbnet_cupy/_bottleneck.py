"""Residual bottlenecks with pre-activation, of whole images and of their active blocks."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ._affine import IDENTITY, Affine, check_channels, check_floating, wide_dtype
from ._conv import check_blocks, check_params
from ._conv_geometry import BlockParams, Layer, Pair, bottleneck_strides, make_chain, make_layer, parse_strides
from ._reduce_mask import BlockIndices
from ._stack import Arithmetic, BlockStacks, activate_image, convolve_image
from ._stack_conv import use_tf32
from ._validate import (
    Spec,
    array_namespace,
    check_image,
    check_indices,
    check_like,
    check_output,
    check_place,
    current_device,
    same_memory,
    spec_of,
)


@dataclass(frozen=True, eq=False)
class BottleneckWeights:
    """Weights of one bottleneck, all NumPy arrays or all CuPy arrays of one device.

    Attributes
    ----------
    conv1, conv2, conv3 : ndarray, shapes (k1h, k1w, C, B), (k2h, k2w, B, D), (k3h, k3w, D, K)
        Weights of the convolutions: usually 1x1, 3x3 and 1x1, and ``B == D``. float16, bfloat16, float32 or float64.
    scale1, shift1 : ndarray, shape (C,), or None
        Batch norm before the first convolution, as :func:`fold_batch_norm` returns it: float32, or float64 for
        convolutions of float64. Both None: neither batch norm nor ReLU there, for an input that has had them.
    scale2, shift2 : ndarray, shape (B,)
        Before the second convolution.
    scale3, shift3 : ndarray, shape (D,)
        Before the third.
    project : ndarray, shape (1, 1, C, K), or None
        Weights of the shortcut; None is the identity.

    Raises
    ------
    TypeError, ValueError
        Arrays that do not fit together.
    """

    conv1: Any
    conv2: Any
    conv3: Any
    scale1: Any
    shift1: Any
    scale2: Any
    shift2: Any
    scale3: Any
    shift3: Any
    project: Any = None

    def __post_init__(self) -> None:
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.scale1 is None and self.shift1 is None:
            del arrays["scale1"], arrays["shift1"]
        if self.project is None:
            del arrays["project"]
        array_namespace(arrays)
        _check_weights(tuple((name, spec_of(array)) for name, array in arrays.items()))

    @property
    def ksizes(self) -> tuple[Pair, Pair, Pair]:
        """Kernel sizes of the convolutions, for :func:`calc_block_params_res_block`."""
        return self.conv1.shape[:2], self.conv2.shape[:2], self.conv3.shape[:2]

    @classmethod
    def random(
        cls,
        channels: int,
        bottleneck: int,
        *,
        ksize: tuple[int, int] = (3, 3),
        out_channels: int | None = None,
        seed: int = 0,
        dtype: Any = np.float32,
        xp: Any = np,
    ) -> BottleneckWeights:
        """Random weights that keep the magnitude of activations, for tests and benchmarks.

        Parameters
        ----------
        channels, bottleneck : int
            Channels of the image, and of the second convolution.
        ksize : (int, int)
            Kernel size of the second convolution. The others are 1x1.
        out_channels : int, optional
            Channels of the result; where it is given, there is a projection.
        seed : int
            The same seed gives the same numbers in NumPy and CuPy.
        dtype : dtype
            Of the convolutions.
        xp : module
            ``numpy`` or ``cupy``: where to put them.

        Returns
        -------
        BottleneckWeights
            Convolutions are normal with variance ``2 / (kh*kw*C)`` (K. He et al., Delving Deep into Rectifiers, 2015);
            scales lie in 0.5 to 1.5 and shifts in -0.5 to 0.5.
        """
        rng = np.random.default_rng(seed)
        dtype = np.dtype(dtype)
        out = channels if out_channels is None else out_channels

        def conv(kh: int, kw: int, c: int, k: int) -> Any:
            return xp.asarray((rng.standard_normal((kh, kw, c, k)) * np.sqrt(2 / (kh * kw * c))).astype(dtype))

        def vector(low: float, high: float, size: int) -> Any:
            return xp.asarray(rng.uniform(low, high, size).astype(wide_dtype(dtype)))

        arrays = {
            "conv1": conv(1, 1, channels, bottleneck),
            "conv2": conv(*ksize, bottleneck, bottleneck),
            "conv3": conv(1, 1, bottleneck, out),
        }
        for number, size in enumerate((channels, bottleneck, bottleneck), 1):
            arrays[f"scale{number}"] = vector(0.5, 1.5, size)
            arrays[f"shift{number}"] = vector(-0.5, 0.5, size)
        return cls(**arrays, project=None if out_channels is None else conv(1, 1, channels, out))


def fold_batch_norm(gamma: Any, beta: Any, mean: Any, var: Any, eps: float) -> tuple[Any, Any]:
    """Scale and shift of a batch norm in inference form: ``gamma*(x - mean)/sqrt(var + eps) + beta = x*scale + shift``.

    Parameters
    ----------
    gamma, beta, mean, var : ndarray, shape (C,)
        Parameters and running statistics, floating.
    eps : float
        Summand of the variance, as in training.

    Returns
    -------
    scale, shift : ndarray, shape (C,)
        Computed in float64; float32, or float64 where `gamma` is float64. ``scale = gamma/sqrt(var + eps)`` and
        ``shift = beta - mean*scale``.

    Raises
    ------
    TypeError, ValueError
        Arrays of different kinds, or of other dtypes or shapes.

    Notes
    -----
    With CuPy arrays, work runs on the current stream, without synchronisation.
    """
    arrays = {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
    array_namespace(arrays)
    for name, array in arrays.items():
        check_floating(name, spec_of(array))
        if array.ndim != 1 or array.shape != gamma.shape:
            raise ValueError(f"{name}: expected shape (C,), the same for all four, got {array.shape}")
    gamma64, beta64, mean64, var64 = (array.astype(np.float64) for array in arrays.values())
    scale = gamma64 / (var64 + eps) ** 0.5
    shift = beta64 - mean64 * scale
    dtype = wide_dtype(gamma.dtype)
    return scale.astype(dtype), shift.astype(dtype)


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
    xp, layers = _parse(x, weights, strides, {})
    how = Arithmetic(xp, use_tf32(allow_tf32))
    first, *norms = _affines(weights)
    inner = x
    if not first.is_identity:
        inner = xp.empty(x.shape, x.dtype)
        activate_image(x, inner, first, xp)
    for layer, w, affine in zip(layers, _convs(weights), norms):
        inner = convolve_image(inner, w, layer, affine, how)
    with np.errstate(all="ignore"):
        return xp.add(inner, _shortcut(x, weights, layers, how), out=inner)


def sparse_res_block_bottleneck(
    x: Any,
    weights: BottleneckWeights,
    indices: BlockIndices,
    params: BlockParams,
    *,
    strides: Any = 1,
    out: Any = None,
    allow_tf32: bool | None = None,
) -> Any:
    """Run a bottleneck on the active blocks of images: equal to :func:`res_block_bottleneck` there, else the shortcut.

    Parameters
    ----------
    x, weights, strides, allow_tf32
        As in :func:`res_block_bottleneck`.
    indices : BlockIndices
        Active blocks, from :func:`block_indices` with the same `params`.
    params : BlockParams
        What :func:`calc_block_params_res_block` returns for ``x.shape``, ``weights.ksizes``, `strides` and ``'SAME'``;
        its block size is free.
    out : ndarray, optional
        Where to put the result: of its shape and the dtype of `x`, in any strides. It shares no memory with an input or
        is `x` itself, where the shortcut is the identity: that touches the active tiles only, and saves a copy.

    Returns
    -------
    ndarray, shape (N, ceil(H / strides[0]), ceil(W / strides[1]), K)
        The result, of the dtype of `x` (`out` where it was given).

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit together. Nothing is changed then.

    Notes
    -----
    Exact at the borders of the image: pixels outside of it are 0 before each convolution, after the batch norm
    and ReLU, as in the dense network. Rounding and reproducibility are those of :func:`res_block_bottleneck`.

    With CuPy arrays, work runs on the current stream, without synchronisation, and can be captured in a CUDA graph
    after a first call. It allocates the result unless `out` is given, and what :func:`sparse_conv2d` does for each of
    the three convolutions, which goes back to CuPy's pool on return. A projection is computed on the whole image, as
    :func:`conv2d` does it.

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
    xp, layers = _parse(x, weights, strides, indices._asdict(), out=out)
    check_params(params, layers)
    check_indices(spec_of(indices.bin_counts), spec_of(indices.active_block_indices))
    in_place = out is not None and same_memory(x, out)
    if out is not None:
        _check_out(out, x, weights, indices, layers[-1].out_size, in_place, xp)
    how = Arithmetic(xp, use_tf32(allow_tf32))
    first, *norms = _affines(weights)
    stacks = BlockStacks(indices, layers, params, x.shape[0], how)
    stack = stacks.gather(x, first, weights.conv1)
    for step, (w, affine) in enumerate(zip(_convs(weights), norms)):
        stack = stacks.convolve(step, stack, w, affine)
    if in_place:
        return stacks.scatter(stack, out, add=True)
    shortcut = _shortcut(x, weights, layers, how)
    if out is not None:
        xp.copyto(out, shortcut)
    else:
        out = shortcut.copy() if shortcut is x else shortcut
    return stacks.scatter(stack, out, add=True)


def _convs(weights: BottleneckWeights) -> tuple[Any, Any, Any]:
    return weights.conv1, weights.conv2, weights.conv3


def _affines(weights: BottleneckWeights) -> list[Affine]:
    """What comes before the first convolution, and after each of the three."""
    first = IDENTITY if weights.scale1 is None else Affine(weights.scale1, weights.shift1, True)
    second, third = Affine(weights.scale2, weights.shift2, True), Affine(weights.scale3, weights.shift3, True)
    return [first, second, third, IDENTITY]


def _shortcut(x: Any, weights: BottleneckWeights, layers: tuple[Layer, ...], how: Arithmetic) -> Any:
    """`x` itself, or its projection."""
    if weights.project is None:
        return x
    strides = layers[1].strides
    return convolve_image(x, weights.project, make_layer(x.shape[1:3], (1, 1), strides, "SAME"), IDENTITY, how)


def _parse(
    x: Any, weights: Any, strides: Any, others: dict[str, Any], out: Any = None
) -> tuple[Any, tuple[Layer, ...]]:
    """The namespace and the geometry, of arguments that fit together."""
    if not isinstance(weights, BottleneckWeights):
        raise TypeError(f"weights: expected BottleneckWeights, got {type(weights).__name__}")
    xp = array_namespace({"x": x, "conv1": weights.conv1, **others}, out)
    project = None if weights.project is None else weights.project.shape[3]
    parsed = parse_strides(strides)
    _check_input(spec_of(x), spec_of(weights.conv1), weights.conv3.shape[3], project, parsed, current_device(xp))
    paddings = ["SAME"] * 3
    return xp, tuple(make_chain(x.shape[1:3], weights.ksizes, bottleneck_strides(parsed), paddings))


@functools.lru_cache(maxsize=1024)
def _check_input(x: Spec, conv1: Spec, channels_out: int, project: int | None, strides: Pair, device: int) -> None:
    """Raise unless the image fits the weights."""
    check_image("x", x)
    if x.dtype != conv1.dtype:
        raise TypeError(f"x: expected dtype {conv1.dtype} like the weights, got {x.dtype}")
    if x.shape[3] != conv1.shape[2]:
        raise ValueError(f"x: expected {conv1.shape[2]} channels, as conv1 has, got shape {x.shape}")
    if project is None and (strides != (1, 1) or x.shape[3] != channels_out):
        change = f"strides {strides} and {x.shape[3]} to {channels_out} channels"
        raise ValueError(f"project: expected a projection for {change}, got None")
    check_place("x", x, device)
    check_place("conv1", conv1, device)


def _check_out(
    out: Any, x: Any, weights: BottleneckWeights, indices: BlockIndices, size: Pair, in_place: bool, xp: Any
) -> None:
    """Raise unless the result can be put there."""
    channels = weights.conv3.shape[3]
    check_like("out", spec_of(out), x.dtype, (x.shape[0], *size, channels), "N, H_out, W_out, K")
    check_place("out", spec_of(out), current_device(xp))
    inputs = {"active_block_indices": indices.active_block_indices, "bin_counts": indices.bin_counts}
    if not in_place:
        inputs["x"] = x
    elif weights.project is not None:
        raise ValueError("out: expected memory of its own where there is a projection, got x itself")
    named = {f.name: getattr(weights, f.name) for f in fields(weights)}
    check_output("out", out, **inputs, **{name: array for name, array in named.items() if array is not None})


@functools.lru_cache(maxsize=256)
def _check_weights(named: tuple[tuple[str, Spec], ...]) -> None:
    """Raise unless the arrays of a bottleneck fit together."""
    specs = dict(named)
    conv1 = specs["conv1"]
    check_floating("conv1", conv1)
    for name in ("conv1", "conv2", "conv3", "project"):
        spec = specs.get(name, conv1)
        if len(spec.shape) != 4 or min(spec.shape[:2]) < 1:
            raise ValueError(f"{name}: expected shape (kh, kw, C_in, C_out), got {spec.shape}")
        if spec.dtype != conv1.dtype:
            raise TypeError(f"{name}: expected dtype {conv1.dtype} like conv1, got {spec.dtype}")
    for name, before in (("conv2", "conv1"), ("conv3", "conv2")):
        if specs[name].shape[2] != specs[before].shape[3]:
            wanted = f"{specs[before].shape[3]} channels of input, as {before} puts out"
            raise ValueError(f"{name}: expected {wanted}, got shape {specs[name].shape}")
    wanted_shape = (1, 1, conv1.shape[2], specs["conv3"].shape[3])
    if "project" in specs and specs["project"].shape != wanted_shape:
        raise ValueError(f"project: expected shape {wanted_shape}, got {specs['project'].shape}")
    for number in "123":
        channels = specs[f"conv{number}"].shape[2]
        for name in (f"scale{number}", f"shift{number}"):
            check_channels(name, specs.get(name), conv1.dtype, channels, conv1.device)
    for name, spec in named:
        check_place(name, spec, conv1.device)
