"""``precompile``: kernels for CuPy's disk cache, named by what calls will ask for."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _bottleneck, _conv, _device, _jit
from ._affine import IDENTITY, Affine, check_floating
from ._bottleneck_weights import BottleneckWeights, WeightsForm, affines_of
from ._conv_geometry import BlockParams, Padding, parse_padding, parse_strides
from ._engine import Route, parse_engine
from ._geometry import parse_pair
from ._instances import Instance, activate_instances, cover_instance, instances_for
from ._pack_weights import PackedBottleneck, unpack, unpack_bottleneck
from ._packing import PackedWeights
from ._validate import Spec, current_device


@dataclass(frozen=True, eq=False)
class SparseCall:
    """The form of calls of :func:`sparse_conv2d` or :func:`sparse_res_block_bottleneck`, for :func:`precompile`.

    Image and result are C-contiguous, of the dtype of the weights.

    Attributes
    ----------
    x_shape : (int, int, int, int)
        Shape of the images, ``(N, H, W, C)``.
    weights : ndarray of shape (kh, kw, C, K), PackedWeights, BottleneckWeights or PackedBottleneck
        Weights of a convolution, or of a bottleneck. Only shapes and dtypes matter: NumPy arrays do on a machine that
        has no weights yet, ``np.empty((3, 3, 64, 64), np.float16)`` for instance.
    params : BlockParams
        As in those functions.
    blocks : int
        Rows of the indices: the `capacity` of :func:`block_indices`, or without one about the number of active blocks.
    strides, padding, allow_tf32
        As in those functions; bottlenecks have ``'SAME'`` padding.
    in_place : bool
        Whether a bottleneck's `out` is `x` itself.
    """

    x_shape: tuple[int, int, int, int]
    weights: Any
    params: BlockParams
    blocks: int
    strides: Any = 1
    padding: Padding = "SAME"
    in_place: bool = False
    allow_tf32: bool | None = None


def precompile(
    bsizes: Iterable[int | tuple[int, int]] = (),
    dtypes: Iterable[Any] = (np.float32,),
    *,
    calls: Iterable[SparseCall] = (),
    engine: str = "auto",
    progress: bool = True,
) -> int:
    """Compile the kernels that some block sizes, dtypes, convolutions and bottlenecks need, into CuPy's disk cache.

    Calls then find them there, in this process and in later ones: useful before a measurement, or when a container
    image is built. For `bsizes` and `dtypes`, that is whatever gather, scatter and ``reduce_mask`` can ask for, with
    any number of channels and any memory layout. For `calls`, it is what a convolution or bottleneck of this form runs.

    Parameters
    ----------
    bsizes : iterable of int or (int, int)
        Block sizes in pixels; an int stands for a square. Name the sizes of gather and those of scatter.
    dtypes : iterable of dtype
        Dtypes of image tensors and of masks. Without `bsizes`, that is the kernels of ``reduce_mask`` and of
        activations.
    calls : iterable of SparseCall
        Convolutions and bottlenecks. How the fused kernels cut a problem depends on the number of blocks and on the
        device: where the number varies, give a call for each of a few.
    engine : 'auto', 'fused' or 'composed'
        For `calls`, as in :func:`sparse_conv2d`. Of what is composed, the kernels that gather, activate and scatter;
        cuBLAS and cuDNN bring their own.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    int
        Number of kernels that are ready.

    Raises
    ------
    RuntimeError
        Without CuPy or without a CUDA device, whose architecture decides what is compiled.
    TypeError, ValueError
        A block size that is no size, a dtype that the ops do not take, or a call whose arguments do not fit together or
        that `engine` cannot do.
    KernelCompileError
        If a kernel does not compile.

    Notes
    -----
    Compiles in as many threads as there are CPU cores; one kernel takes a tenth to half of a second of a core, a fused
    one up to one and a half. A bottleneck in place is compiled before the others: how many of its CTAs the device holds
    decides what runs it. Does not synchronise.
    """
    sizes = [_parse_size(bsize) for bsize in bsizes]
    instances = instances_for(sizes, [_parse_dtype(dtype) for dtype in dtypes])
    calls, engine = [_check_call(call) for call in calls], parse_engine(engine)
    reason = _jit.why_unavailable()
    if reason:
        raise RuntimeError(f"precompile needs CuPy and a CUDA device: {reason}")
    import cupy

    device = current_device(cupy)
    for call in calls:
        instances += instances_of(call, engine, device)
    instances = list(dict.fromkeys(instances))
    _jit.compile_all(instances, progress)
    return len(instances)


def instances_of(call: SparseCall, engine: str, device: int) -> list[Instance]:
    """The kernels of a call on a device. Raises unless its arguments fit together."""
    if isinstance(call.weights, (BottleneckWeights, PackedBottleneck)):
        return _bottleneck_instances(call, engine, device)
    return _conv_instances(call, engine, device)


def _conv_instances(call: SparseCall, engine: str, device: int) -> list[Instance]:
    w, _, tf32 = unpack(call.weights, call.allow_tf32)
    x, rows, counts = _inputs(call, w.dtype, device)
    specs = x, Spec.contiguous(tuple(w.shape), w.dtype, device), rows, counts
    how = parse_strides(call.strides), parse_padding(call.padding), False, tf32, engine
    names = ("x", "w", "active_block_indices", "bin_counts")
    ready = _conv.prepare(names, specs, None, call.params, *how, device).fused
    if ready is None:
        return _composed_instances(call.params, x, rows, w.shape[3], IDENTITY, add=False)
    return [*_launched([ready]), _device.fused().packing_instance(w.dtype, tf32)]


def _bottleneck_instances(call: SparseCall, engine: str, device: int) -> list[Instance]:
    weights, _, tf32 = unpack_bottleneck(call.weights, call.allow_tf32)
    dtype = weights.conv1.dtype
    x, rows, counts = _inputs(call, dtype, device)
    arrays = weights.arrays.items()
    form = WeightsForm(tuple((name, Spec.contiguous(tuple(a.shape), a.dtype, device)) for name, a in arrays))
    how = parse_strides(call.strides), tf32, engine, device
    plan = _bottleneck.prepare(x, rows, counts, form, None, call.in_place, call.params, *how).fused
    if plan is None:
        first = affines_of(weights)[0]
        return _composed_instances(call.params, x, rows, weights.conv3.shape[3], first, add=True)
    found = [*_launched(plan.steps), _device.fused().packing_instance(dtype, tf32)]
    if weights.project is not None:  # which cuBLAS or cuDNN convolves, perhaps to be rounded to its dtype
        found += activate_instances(dtype)
    if plan.route is Route.STACK:
        found += _scatter_instances(x, Spec.contiguous(plan.stacks[0], dtype, device), rows, call.params, add=False)
    return found


def _inputs(call: SparseCall, dtype: np.dtype[Any], device: int) -> tuple[Spec, Spec, Spec]:
    """Image, indices and count."""
    int32 = np.dtype(np.int32)
    shapes = (call.x_shape, dtype), ((call.blocks, 3), int32), ((1,), int32)
    x, rows, counts = (Spec.contiguous(shape, kind, device) for shape, kind in shapes)
    return x, rows, counts


def _launched(steps: Iterable[Any]) -> list[Instance]:
    """Kernels of the fused engine; there is none where there is nothing to write."""
    return [ready.launch.instance for ready in steps if ready.launch is not None]


def _composed_instances(
    params: BlockParams, x: Spec, rows: Spec, features: int, affine: Affine, *, add: bool
) -> list[Instance]:
    """What gathers from images, perhaps behind a batch norm, what follows convolutions, and what scatters."""
    stack = Spec.contiguous((rows.shape[0], *params.bsize, x.shape[3]), x.dtype, x.device)
    result = Spec.contiguous((rows.shape[0], *params.bsize_out, features), x.dtype, x.device)
    height, width = (count * size for count, size in zip(params.bcount, params.bsize_out))
    out = Spec.contiguous((x.shape[0], height, width, features), x.dtype, x.device)
    gather = _device.transfer().prepare_gather(x, stack, rows.strides, params.grid_in, False, affine)
    found = [] if gather is None else [gather.instance]
    return found + activate_instances(x.dtype) + _scatter_instances(out, result, rows, params, add=add)


def _scatter_instances(out: Spec, stack: Spec, rows: Spec, params: BlockParams, *, add: bool) -> list[Instance]:
    """What puts tiles into an image, or adds them to it."""
    launch = _device.transfer().prepare_scatter(out, stack, rows.strides, params.grid_out, add, False)
    if launch is None:
        return []
    return [launch.instance, *([cover_instance(add)] if launch.cells else [])]


def _check_call(call: Any) -> SparseCall:
    """Raise unless a call says what is needed to look into it."""
    if not isinstance(call, SparseCall):
        raise TypeError(f"calls: expected SparseCall, got {type(call).__name__}")
    if not isinstance(call.params, BlockParams):
        raise TypeError(f"params: expected BlockParams, got {type(call.params).__name__}")
    shape = tuple(_size("x_shape", n) for n in call.x_shape)
    if len(shape) != 4:
        raise ValueError(f"x_shape: expected 4 sizes (N, H, W, C), got {call.x_shape!r}")
    _size("blocks", call.blocks)
    if isinstance(call.weights, (BottleneckWeights, PackedBottleneck)):
        if call.padding != "SAME":
            raise ValueError(f"padding: expected 'SAME' for a bottleneck, got {call.padding!r}")
    else:
        _check_conv(call)
    return call


def _check_conv(call: SparseCall) -> None:
    w = call.weights
    if not isinstance(w, PackedWeights) and not (hasattr(w, "dtype") and hasattr(w, "shape")):
        raise TypeError(f"weights: expected an array, BottleneckWeights, or packed ones, got {type(w).__name__}")
    check_floating("weights", Spec.contiguous(tuple(w.shape), w.dtype, -1))
    if call.in_place:
        raise ValueError("in_place: expected False for a convolution, got True")


def _size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected integers >= 0, got {value!r}") from None
    if isinstance(value, bool) or size < 0:
        raise ValueError(f"{name}: expected integers >= 0, got {value!r}")
    return size


def _parse_size(bsize: Any) -> tuple[int, int]:
    pair = (bsize, bsize) if np.ndim(bsize) == 0 else bsize
    return parse_pair("bsizes", pair, minimum=1)


def _parse_dtype(dtype: Any) -> np.dtype[Any]:
    parsed: np.dtype[Any] = np.dtype(dtype)
    if (parsed.kind not in "biufc" and parsed.name != "bfloat16") or parsed.itemsize > 16:
        raise TypeError(f"dtypes: expected numeric or bool dtypes that CuPy has, got {dtype!r}")
    return parsed
