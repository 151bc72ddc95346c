"""What a user would run without this library: a dense network in PyTorch, or a submanifold sparse one.

PyTorch and spconv are imported when a rival is made, and so need not be installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from . import rivals
from .network_data import Bounded, Scene, is_near
from .rivals import NOT_INSTALLED, Absent, Contender
from .stages import Precision

Array = np.ndarray[Any, Any]

#: What PyTorch's batch norm adds to variances: it must not be 0.
EPSILON = 2.0**-20

EAGER = "PyTorch, channels_last, eager"
CAPTURED = "PyTorch, channels_last, captured"
COMPILED = "PyTorch, channels_last, compiled + captured"
SUBMANIFOLD = "submanifold"

#: Packages of submanifold convolutions, best first. The second needs compiled kernels for the CUDA at hand.
PACKAGES = ("spconv_triton", "spconv")
NO_PACKAGE = "not installed: pip install spconv-triton (Triton; any PyTorch >= 2.4), or a spconv-cu1xx wheel that fits"
#: Narrowest and widest tile in channels, and largest in pixels, that spconv-triton's autotuner may choose: it compiles
#: and times each, and all of them would take a minute a shape. The stages' channels are 24 to 96, their pixels few.
TILE_CHANNELS = (32, 64)
TILE_PIXELS = 128


@contextlib.contextmanager
def torch_arithmetic(precision: Precision) -> Iterator[None]:
    """Let PyTorch multiply as `precision` says, without gradients, with the fastest algorithms that it finds."""
    torch = rivals.find_torch()
    if torch is None:
        yield
        return
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, cublas.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32, cublas.allow_tf32 = True, precision.tf32, precision.tf32
    try:
        with torch.no_grad():
            yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, cublas.allow_tf32 = before


def capture_torch(calls: Sequence[Callable[[], Any]], rounds: int, _: Any) -> Any:
    """A CUDA graph of `rounds` times all calls, with PyTorch's own memory, on PyTorch's current stream."""
    torch = rivals.find_torch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _round in range(rounds):
            for call in calls:
                call()
    return types.SimpleNamespace(launch=lambda stream: graph.replay())


def torch_network(torch: Any, scene: Scene) -> Callable[[Any], Any]:
    """The dense network as a function of an NCHW tensor, in inference form."""
    functional = torch.nn.functional
    kernels = [_kernel(torch, w) for w in scene.convs]
    if scene.network.kind == "conv":
        return lambda x: functional.conv2d(x, kernels[0], padding=1)
    scales, shifts = ([torch.from_dlpack(a) for a in arrays] for arrays in (scene.scales, scene.shifts))
    # A batch norm whose statistics are those of numbers that need no normalization: the variance and the number that is
    # added to it are exactly 1 together.
    means = [torch.zeros_like(scale) for scale in scales]
    variances = [torch.full_like(scale, 1 - EPSILON) for scale in scales]

    def forward(x: Any) -> Any:
        inner = x
        for k, kernel in enumerate(kernels):
            inner = functional.batch_norm(inner, means[k], variances[k], scales[k], shifts[k], False, 0.0, EPSILON)
            inner = functional.conv2d(functional.relu(inner), kernel, padding=kernel.shape[2] // 2)
        return x + inner

    return forward


def dense_contender(name: str, scene: Scene) -> Contender | Absent:
    """The dense network, eager or compiled."""
    torch = rivals.find_torch()
    if torch is None:
        return Absent(name, NOT_INSTALLED)
    forward = torch_network(torch, scene)
    if name == COMPILED:
        if scene.network.kind == "conv":
            return Absent(name, "compiling leaves a single convolution as it is")
        if not scene.network.is_detailed:
            return Absent(name, "not compiled: ten seconds a shape")
        torch.compiler.reset()  # else shapes past the eighth would run eagerly
        forward = torch.compile(forward, dynamic=False)
    x = torch.from_dlpack(scene.image).permute(0, 3, 1, 2)  # channels_last memory

    def check(got: list[Any]) -> bool:
        return all(scene.is_right(_array(scene.xp, y.permute(0, 2, 3, 1))) for y in got)

    return Contender(name, [functools.partial(forward, x)], check)


def _kernel(torch: Any, w: Any) -> Any:
    """Weights ``[kh, kw, C, K]`` as PyTorch wants them, in channels_last memory."""
    return torch.from_dlpack(w).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)


def _array(xp: Any, tensor: Any) -> Any:
    return xp.from_dlpack(tensor.detach())


@functools.cache
def find_submanifold() -> tuple[Any, Any] | None:
    """A package of submanifold convolutions and its module for PyTorch; None where there is none that works."""
    for name in PACKAGES:
        # A wheel for another CUDA or PyTorch fails in ways of its own.
        with contextlib.suppress(Exception):
            return importlib.import_module(name), importlib.import_module(f"{name}.pytorch")
    return None


def submanifold_contender(name: str, scene: Scene, mask: Array, cached: bool) -> Contender | Absent:
    """The network on the mask's pixels alone; `cached`: with the table of neighbours made before the timed part.

    Its 3x3 convolution takes pixels outside of the mask as 0, and is checked against a dense network that does, too.
    """
    torch = rivals.find_torch()
    if torch is None:
        return Absent(name, NOT_INSTALLED)
    found = find_submanifold()
    if found is None:
        return Absent(name, NO_PACKAGE)
    package, spconv = found
    package.constants.SPCONV_ALLOW_TF32 = scene.network.precision.tf32
    _narrow_tiles(scene.convs[len(scene.convs) // 2].shape[3])
    pixels = np.stack(np.nonzero(mask > 0.5), axis=1)
    where = scene.xp.asarray(pixels)
    rows = tuple(where.T)
    features = torch.from_dlpack(scene.xp.ascontiguousarray(scene.image[rows]))
    places = torch.from_dlpack(where.astype(np.int32))
    layer = _submanifold_layer(torch, spconv, scene)
    neighbours: dict[str, Any] = {}

    def convolve(features: Any) -> Any:
        shape = list(scene.network.shape[1:3])
        sparse = spconv.SparseConvTensor(features, places, shape, 1, indice_dict=dict(neighbours))
        result = layer(sparse)
        if cached:
            neighbours.update(result.indice_dict)
        return result.features

    expected = scene.expect(keep=scene.xp.asarray(mask))
    wanted = Bounded(expected.value[rows], expected.error[rows])

    def check(got: list[Any]) -> bool:
        return all(bool(is_near(scene.xp, _array(scene.xp, y), wanted).all()) for y in got)

    call = functools.partial(_submanifold_network(torch, scene, convolve), features)
    table = "made before" if cached else "made in each call"
    note = f"{package.__name__}; table of neighbours {table}; pixels in and out, no image; border pixels see zeros"
    return Contender(name, [call], check, note)


def _submanifold_layer(torch: Any, spconv: Any, scene: Scene) -> Any:
    """The 3x3 convolution with the scene's weights, which spconv keeps as [K, kh, kw, C]."""
    w = scene.convs[len(scene.convs) // 2]
    weight = torch.from_dlpack(w).permute(3, 0, 1, 2).contiguous()
    layer = spconv.SubMConv2d(w.shape[2], w.shape[3], 3, padding=1, bias=False, indice_key="mask")
    layer = layer.to(device=weight.device, dtype=weight.dtype).eval()
    layer.weight.copy_(weight)
    return layer


def _submanifold_network(torch: Any, scene: Scene, convolve: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The network as a function of the features [P, C] of the mask's pixels."""
    if scene.network.kind == "conv":
        return convolve
    first, last = (torch.from_dlpack(scene.convs[k][0, 0]) for k in (0, 2))
    scales, shifts = ([torch.from_dlpack(a).to(first.dtype) for a in arrays] for arrays in (scene.scales, scene.shifts))

    def forward(features: Any) -> Any:
        inner = torch.relu(torch.addcmul(shifts[0], features, scales[0])) @ first
        inner = convolve(torch.relu(torch.addcmul(shifts[1], inner, scales[1])))
        return torch.addmm(features, torch.relu(torch.addcmul(shifts[2], inner, scales[2])), last)

    return forward


def _narrow_tiles(channels: int) -> None:
    """Leave spconv-triton's autotuner the tiles that suit so many channels, one pipeline depth of each."""
    with contextlib.suppress(ImportError, AttributeError):  # spconv itself, or another version
        kernel = importlib.import_module("spconv_triton.pytorch._impl.gemm")._gather_gemm_kernel
        every = getattr(kernel, "every_config", kernel.configs)
        kernel.every_config = every  # whatever an earlier shape has left out
        widest = min(TILE_CHANNELS[1], max(TILE_CHANNELS[0], 1 << (channels - 1).bit_length()))
        chosen: dict[Any, Any] = {}
        for config in every:
            pixels, *sides = (config.kwargs[size] for size in ("BLOCK_M", "BLOCK_N", "BLOCK_R"))
            if pixels <= TILE_PIXELS and all(TILE_CHANNELS[0] <= side <= widest for side in sides):
                chosen.setdefault((pixels, *sides), config)
        kernel.configs = list(chosen.values()) or every
