"""``tune_block_size``: the fastest blocks for a mask and a chain of convolutions, measured or modelled."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ._affine import FLOATING, IDENTITY, wide_dtype
from ._bottleneck import sparse_res_block_bottleneck
from ._bottleneck_weights import BottleneckWeights
from ._conv import sparse_conv2d
from ._conv_geometry import BlockParams, Layer, Pair, block_params, make_chain, parse_ksize
from ._engine import kind_obstacle, may_fuse, parse_engine
from ._geometry import parse_pair
from ._pack_weights import pack_weights
from ._reduce_mask import BlockIndices, block_indices
from ._stack import Arithmetic, BlockStacks
from ._stack_conv import use_tf32
from ._validate import array_namespace, check_mask, check_place, current_device, spec_of

#: Heights and widths of the tiles that are tried without `candidates`: small ones for scattered masks, large ones for
#: masks in few pieces. Beyond 64 pixels, the halo of a 3x3 convolution is less than 7 % of the work.
TILES = (4, 6, 8, 12, 16, 24, 32, 48, 64)

# What is measured: replays of a CUDA graph that holds a few rounds, so that Python's time is no part of it.
_ROUNDS = 5
_REPEATS = 9

# The model is of one H200. Measured: bandwidth of a device-to-device copy, read and written bytes counted, and time of
# an empty kernel in a CUDA graph. From NVIDIA's data sheet: multiplications and additions a second.
_BYTES_PER_SECOND = 4.08e12
_FLOPS_PER_SECOND = {"float16": 989.5e12, "bfloat16": 989.5e12, "float32": 67e12, "float64": 67e12}
_LAUNCH_SECONDS = 0.53e-6
#: An estimate, not a measurement: a thread block lives for at least some 2 us, and 132 multiprocessors run 8 each.
_BLOCK_SECONDS = 2e-9


class BlockCandidate(NamedTuple):
    """One block size that :func:`tune_block_size` has tried.

    Attributes
    ----------
    bsize : (int, int)
        Pixels of an input block, halo included.
    active_blocks : int
        Blocks in which the mask is active.
    gathered_pixels : int
        Pixels of these blocks together, halo included.
    seconds : float
        Time of the chain: measured, or that of the model.
    """

    bsize: Pair
    active_blocks: int
    gathered_pixels: int
    seconds: float


@dataclass(frozen=True)
class BlockTuning:
    """What :func:`tune_block_size` has chosen, and from what.

    Attributes
    ----------
    params : BlockParams
        The fastest blocks.
    table : tuple of BlockCandidate
        All candidates, in the order in which they were given. The first of the fastest is chosen.
    measured : bool
        Whether their times were measured on a device, or are those of a model.
    """

    params: BlockParams
    table: tuple[BlockCandidate, ...]
    measured: bool


def tune_block_size(
    mask: Any,
    channels: int | Sequence[int],
    ksize_list: Sequence[Sequence[int]],
    *,
    dtype: Any,
    candidates: Iterable[int | Sequence[int]] | None = None,
    engine: str = "auto",
) -> BlockTuning:
    """Find the fastest blocks for a chain of convolutions on the active part of images.

    Small blocks follow the mask closely, but compute more halo; large ones do the opposite. Which are best depends on
    the mask, so tune with one that is typical.

    Parameters
    ----------
    mask : ndarray, shape (N, H, W) or (N, H, W, 1)
        Bool, integer or floating; pixels above 0.5 are active, as in :func:`block_indices`.
    channels : int or sequence of int
        Channels of the image and of every result; or those of the image and of each result in turn, one more than there
        are convolutions.
    ksize_list : sequence of (int, int), or of [height, width, C, K]
        Kernel sizes, first convolution first. All have stride 1 and ``'SAME'`` padding.
    dtype : dtype
        Of images and weights: float16, bfloat16, float32 or float64.
    candidates : iterable of int or (int, int), optional
        Block sizes to try, halo included; an integer stands for a square. By default those of tiles of 4, 6, 8, 12, 16,
        24, 32, 48 and 64 pixels, up to the first that covers the image.
    engine : 'auto', 'fused' or 'composed'
        What is measured, as in :func:`sparse_conv2d`: pass what will be passed there.

    Returns
    -------
    BlockTuning
        The fastest blocks, as :func:`calc_block_params_res_block` returns them, and the table of all candidates.

    Raises
    ------
    TypeError, ValueError
        An argument of another form, no candidates, one that is smaller than the chain's receptive field, or an `engine`
        that cannot do the chain, or a candidate: ``'fused'`` takes a CuPy mask and what one function does, see below.

    Notes
    -----
    With a CuPy mask, each candidate is measured on the current device, on made-up numbers, float32 as CUPY_TF32 says,
    captured in a CUDA graph: a single convolution as :func:`sparse_conv2d` with packed weights; a chain of 1x1, any and
    1x1 kernels back to the channels of the image as :func:`sparse_res_block_bottleneck` in place, both with `engine`;
    any other chain as gather, convolutions and scatter, without batch norm or activation. The time is the
    median of 9 replays between CUDA events; finding the blocks is not part of it. This synchronises, compiles the
    kernels of every candidate (a tenth to half of a second each, a fused one up to one and a half, once), works on a
    stream of its own, and allocates an image of the first and one of the last channels, and the stacks, all of which go
    back on return. Where times are close, the choice may differ from run to run.

    With a NumPy mask, no convolution is run, and the result is always the same. The time is that of a model of the
    composed engine on one H200: gather, each convolution and scatter take a launch, 2 ns for each block, and the longer
    of two times: that of the bytes they read and write, at 4.08 TB/s, and that of their multiplications and additions,
    at the data sheet's rate (float32: IEEE). It ranks block sizes; it does not predict the time of another machine.
    """
    xp = array_namespace({"mask": mask})
    spec = spec_of(mask)
    check_mask("mask", spec)
    check_place("mask", spec, current_device(xp))
    ksizes = _parse_ksizes(ksize_list)
    widths = _parse_channels(channels, len(ksizes))
    numbers = _parse_dtype(dtype)
    layers = tuple(make_chain(mask.shape[1:3], ksizes, [(1, 1)] * len(ksizes), ["SAME"] * len(ksizes)))
    _check_engine(parse_engine(engine), current_device(xp), numbers, ksizes, widths)
    field = _receptive_field(ksizes)
    sizes = _default_sizes(mask.shape[1:3], field) if candidates is None else _parse_candidates(candidates, field)
    rate = functools.partial(_model_seconds, layers, widths, numbers)
    if xp is not np:
        inputs = _ChainInputs.make(xp, mask.shape[0], layers, widths, numbers, engine)
        rate = functools.partial(_measure_seconds, inputs)
    geometries = [block_params(layers, size) for size in sizes]
    table = tuple(_candidate(mask, params, rate) for params in geometries)
    best = min(range(len(table)), key=lambda k: table[k].seconds)
    return BlockTuning(geometries[best], table, xp is not np)


def _candidate(mask: Any, params: BlockParams, rate: Callable[[BlockParams, BlockIndices], float]) -> BlockCandidate:
    """The row of one geometry."""
    indices = block_indices(mask, params)
    count = len(indices.active_block_indices)
    return BlockCandidate(params.bsize, count, count * math.prod(params.bsize), rate(params, indices))


def _model_seconds(
    layers: tuple[Layer, ...], channels: list[int], dtype: np.dtype[Any], params: BlockParams, indices: BlockIndices
) -> float:
    """The time of the model: see the notes of :func:`tune_block_size`."""
    size, blocks = params.bsize, len(indices.active_block_indices)
    elements = blocks * math.prod(size) * channels[0]
    seconds = _step_seconds(dtype, blocks, 2 * elements, 0)
    for layer, c, k in zip(layers, channels, channels[1:]):
        size = size[0] - layer.ksize[0] + 1, size[1] - layer.ksize[1] + 1
        result = blocks * math.prod(size) * k
        weights = math.prod(layer.ksize) * c * k
        seconds += _step_seconds(dtype, blocks, elements + result + weights, 2 * result * math.prod(layer.ksize) * c)
        elements = result
    return seconds + _step_seconds(dtype, blocks, 2 * elements, 0)


def _step_seconds(dtype: np.dtype[Any], blocks: int, elements: int, flops: int) -> float:
    """One kernel: its launch, its blocks, and what moves or computes for longer."""
    work = max(elements * dtype.itemsize / _BYTES_PER_SECOND, flops / _FLOPS_PER_SECOND[dtype.name])
    return _LAUNCH_SECONDS + blocks * _BLOCK_SECONDS + work


class _ChainInputs(NamedTuple):
    """Arrays to run a chain of convolutions on, all on one device."""

    xp: ModuleType
    layers: tuple[Layer, ...]
    x: Any
    weights: list[Any]
    y: Any
    engine: str

    @classmethod
    def make(
        cls,
        xp: ModuleType,
        batch: int,
        layers: tuple[Layer, ...],
        channels: list[int],
        dtype: np.dtype[Any],
        engine: str,
    ) -> _ChainInputs:
        """Numbers of both signs, which keep their magnitude from one convolution to the next."""
        x = _numbers(xp, (batch, *layers[0].in_size, channels[0]), 1.0, dtype)
        weights = []
        for layer, c, k in zip(layers, channels, channels[1:]):
            terms = math.prod(layer.ksize) * c
            weights.append(_numbers(xp, (*layer.ksize, c, k), terms**-0.5, dtype))
        return cls(xp, layers, x, weights, xp.zeros((batch, *layers[-1].out_size, channels[-1]), dtype), engine)


def _numbers(xp: ModuleType, shape: tuple[int, ...], bound: float, dtype: np.dtype[Any]) -> Any:
    """Numbers from -bound to bound without short periods; zeros would draw less power, and so clock higher."""
    golden = xp.arange(math.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B9)
    return ((golden.astype(np.float32) * np.float32(2.0**-31) - 1) * np.float32(bound)).astype(dtype).reshape(shape)


def _measure_seconds(inputs: _ChainInputs, params: BlockParams, indices: BlockIndices) -> float:
    """The time of the chain on active blocks, in CuPy arrays."""
    call = _call_of(inputs, params, indices)
    from ._clock import time_captured  # for a device alone

    _, (seconds,) = time_captured(inputs.xp, [call], rounds=_ROUNDS, repeats=_REPEATS)
    return seconds


def _call_of(inputs: _ChainInputs, params: BlockParams, indices: BlockIndices) -> Callable[[], Any]:
    """What a user would call for the chain: a function of the library, or step by step."""
    x, y, weights, engine = inputs.x, inputs.y, inputs.weights, inputs.engine
    tf32 = use_tf32(None)
    if len(weights) == 1:
        packed = pack_weights(weights[0], allow_tf32=tf32)
        return functools.partial(sparse_conv2d, x, packed, indices, params, base=y, out=y, engine=engine)
    if _is_bottleneck([layer.ksize for layer in inputs.layers], x.shape[3], y.shape[3]):
        ones, zeros = (functools.partial(make, dtype=wide_dtype(x.dtype)) for make in (inputs.xp.ones, inputs.xp.zeros))
        affines = [make(w.shape[2]) for w in weights for make in (ones, zeros)]
        block = pack_weights(BottleneckWeights(*weights, *affines), allow_tf32=tf32)
        return functools.partial(sparse_res_block_bottleneck, x, block, indices, params, out=x, engine=engine)
    stacks = BlockStacks(indices, inputs.layers, params, x.shape[0], Arithmetic(inputs.xp, tf32))

    def chain() -> None:
        stack = stacks.gather(x, IDENTITY, weights[0])
        for step, w in enumerate(weights):
            stack = stacks.convolve(step, stack, w, IDENTITY)
        stacks.scatter(stack, y, add=False)

    return chain


def _is_bottleneck(ksizes: Sequence[Pair], channels: int, channels_out: int) -> bool:
    """Whether a chain is what :func:`sparse_res_block_bottleneck` does without a projection."""
    return len(ksizes) == 3 and ksizes[0] == ksizes[2] == (1, 1) and channels == channels_out


def _check_engine(
    engine: str, device: int, dtype: np.dtype[Any], ksizes: Sequence[Pair], channels: Sequence[int]
) -> None:
    """Raise if the engine cannot be measured on such a chain, whatever its blocks."""
    obstacle = kind_obstacle(device, dtype)
    if not obstacle and len(ksizes) > 1 and not _is_bottleneck(ksizes, channels[0], channels[-1]):
        obstacle = "a chain that is neither one convolution nor a bottleneck"
    may_fuse(engine, obstacle)


def _receptive_field(ksizes: Sequence[Pair]) -> Pair:
    """Input pixels that one output pixel of the chain depends on."""
    return 1 + sum(k - 1 for k, _ in ksizes), 1 + sum(k - 1 for _, k in ksizes)


def _default_sizes(image: Pair, field: Pair) -> list[Pair]:
    """Blocks of square tiles, up to the first that covers the image."""
    covering = next((tile for tile in TILES if tile >= max(image)), TILES[-1])
    return [(tile + field[0] - 1, tile + field[1] - 1) for tile in TILES if tile <= covering]


def _parse_candidates(candidates: Any, field: Pair) -> list[Pair]:
    try:
        given = list(candidates)
    except TypeError:
        raise TypeError(
            f"candidates: expected an iterable of block sizes or None, got {type(candidates).__name__}"
        ) from None
    if not given:
        raise ValueError("candidates: expected at least one block size, got none")
    sizes = [parse_pair("candidates", (size, size) if np.ndim(size) == 0 else size, minimum=1) for size in given]
    for size in sizes:
        if size[0] < field[0] or size[1] < field[1]:
            raise ValueError(
                f"candidates: expected sizes of at least the receptive field {field} of the convolutions, got {size}"
            )
    return sizes


def _parse_ksizes(ksize_list: Any) -> list[Pair]:
    try:
        ksizes = [parse_ksize("ksize_list", ksize) for ksize in ksize_list]
    except TypeError:
        raise TypeError(f"ksize_list: expected a sequence of kernel sizes, got {type(ksize_list).__name__}") from None
    if not ksizes:
        raise ValueError("ksize_list: expected at least one kernel size, got none")
    return ksizes


def _parse_channels(channels: Any, count: int) -> list[int]:
    """Channels before, between and after `count` convolutions."""
    wanted = f"an integer or {count + 1} of them (before, between and after the convolutions), each >= 1"
    try:
        given = list(channels) if np.ndim(channels) else [channels] * (count + 1)
        parsed = [operator.index(c) for c in given]
    except (TypeError, ValueError):
        raise TypeError(f"channels: expected {wanted}, got {channels!r}") from None
    if any(isinstance(c, (bool, np.bool_)) for c in given):
        raise TypeError(f"channels: expected {wanted}, got {channels!r}")
    if len(parsed) != count + 1 or min(parsed) < 1:
        raise ValueError(f"channels: expected {wanted}, got {channels!r}")
    return parsed


def _parse_dtype(dtype: Any) -> np.dtype[Any]:
    wanted = f"dtype: expected {', '.join(FLOATING[:-1])} or {FLOATING[-1]}"
    if dtype is None:  # which NumPy takes for float64
        raise TypeError(f"{wanted}, got None")
    try:
        parsed: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"{wanted}, got {dtype!r}") from None
    if parsed.name not in FLOATING:
        raise TypeError(f"{wanted}, got {parsed}")
    return parsed
