"""CUDA graphs: captured once by CuPy or PyTorch, replayed on other masks, with work in proportion to the count."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import networks
import numpy as np
import pytest
from cases import identical
from test_device import HALO, TILES, random_image, random_mask
from test_networks_device import on_device

import sbnet_cupy
from sbnet_cupy import BlockIndices, BottleneckWeights

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Captured:
    """A graph, and what has to live as long as it does."""

    launch: Callable[[], object]
    stream: Any
    pool: Any
    result: Any

    def replay(self) -> None:
        """Run the graph on what its inputs hold now, and wait for it."""
        cupy.cuda.Device().synchronize()
        self.launch()
        self.stream.synchronize()


def capture_with_cupy(step: Callable[[], Any]) -> Captured:
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        step()  # compiles
        stream.synchronize()
        stream.begin_capture()
        result = step()
        graph = stream.end_capture()
    return Captured(lambda: graph.launch(stream), stream, pool, result)


def capture_with_torch(step: Callable[[], Any]) -> Captured:
    """In PyTorch's default mode, which allows no memory to be taken from the driver: CuPy's pool is filled before."""
    pool = cupy.cuda.MemoryPool()
    return _capture_with_torch(step, pool.malloc, pool)


def capture_with_torch_memory(step: Callable[[], Any]) -> Captured:
    """With CuPy's memory from PyTorch's allocator, and so from the pool of the graph."""
    torch = find_torch()

    def malloc(size: int, device: int) -> int:
        pointer: int = torch.cuda.caching_allocator_alloc(size, device, cupy.cuda.get_current_stream().ptr)
        return pointer

    def free(pointer: int, device: int) -> None:
        torch.cuda.caching_allocator_delete(pointer)

    allocator = cupy.cuda.PythonFunctionAllocator(malloc, free)
    return _capture_with_torch(step, allocator.malloc, allocator)


def _capture_with_torch(step: Callable[[], Any], malloc: Any, pool: Any) -> Captured:
    torch = find_torch()
    stream = cupy.cuda.Stream(non_blocking=True)
    torch_stream = torch.cuda.ExternalStream(stream.ptr)
    graph = torch.cuda.CUDAGraph()
    with stream, torch.cuda.stream(torch_stream), cupy.cuda.using_allocator(malloc):
        step()  # compiles, and fills the pool
        stream.synchronize()
        with torch.cuda.graph(graph, stream=torch_stream):
            result = step()

    def launch() -> None:
        with torch.cuda.stream(torch_stream):
            graph.replay()

    return Captured(launch, stream, pool, result)


def find_torch() -> Any:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    return torch


def mask_of(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray[Any, Any]:
    """A mask with one pixel set, away from the edges, in each of `count` tiles of 16 x 16, drawn anew for each seed."""
    rows, columns = -(-shape[1] // 16), -(-shape[2] // 16)
    chosen = np.random.default_rng(seed).permutation(shape[0] * rows * columns)[:count]
    n, i, j = np.unravel_index(chosen, (shape[0], rows, columns))
    mask = np.zeros(shape, bool)
    mask[n, 16 * i + 8, 16 * j + 8] = True
    return mask


def test_the_ops_are_captured_and_follow_their_mask() -> None:
    capacity, shape = 40, (1, 128, 160, 8)
    host_x = random_image(shape, "float32")
    x, mask, out = cupy.asarray(host_x), cupy.zeros(shape[:3], bool), cupy.empty(shape, np.float32)

    def step() -> tuple[BlockIndices, Any]:
        active = sbnet_cupy.reduce_mask(mask, (8, 10), **TILES, capacity=capacity)
        arguments = (active.bin_counts, active.active_block_indices)
        stack = sbnet_cupy.sparse_gather(x, *arguments, **TILES)
        sbnet_cupy.sparse_scatter(2 * stack, *arguments, x, **TILES, out=out)
        return active, sbnet_cupy.sparse_scatter_var(stack, *arguments, out, **TILES, add=True)

    captured = capture_with_cupy(step)
    active, y = captured.result
    for seed, count in enumerate((7, 0, capacity, capacity + 23, 80, 1)):
        contents = mask_of(count, shape[:3], seed)
        mask.set(contents)
        captured.replay()
        expected = sbnet_cupy.reduce_mask(contents, (8, 10), **TILES, capacity=capacity)
        assert int(active.bin_counts[0]) == count
        assert identical(active.active_block_indices, expected.active_block_indices)
        arguments = (expected.bin_counts, expected.active_block_indices)
        blocks = sbnet_cupy.sparse_gather(host_x, *arguments, **TILES)
        wanted = sbnet_cupy.sparse_scatter(2 * blocks, *arguments, host_x, **TILES)
        assert identical(y, sbnet_cupy.sparse_scatter_var(blocks, *arguments, wanted, **TILES, add=True))


TORCH_CAPTURES = [capture_with_torch, capture_with_torch_memory]


@pytest.mark.parametrize("capture", TORCH_CAPTURES)
def test_a_graph_of_pytorch_holds_work_of_both_libraries(capture: Callable[..., Captured]) -> None:
    """Tensors go back and forth without copies, between kernels of one graph."""
    torch = find_torch()
    capacity, shape = 20, (2, 64, 96, 8)
    image = torch.randn(shape, device="cuda")
    result, torch_mask = torch.empty_like(image), torch.zeros(shape[:3], dtype=torch.bool, device="cuda")
    x, y, mask = cupy.from_dlpack(image), cupy.from_dlpack(result), cupy.asarray(torch_mask)
    assert y.data.ptr == result.data_ptr()

    def step() -> BlockIndices:
        active = sbnet_cupy.reduce_mask(mask, (4, 6), **TILES, capacity=capacity)
        arguments = (active.bin_counts, active.active_block_indices)
        stack = torch.from_dlpack(sbnet_cupy.sparse_gather(x, *arguments, **TILES))
        result.copy_(image)
        sbnet_cupy.sparse_scatter_var(cupy.from_dlpack(torch.relu(stack)), *arguments, y, **TILES)
        return active

    captured = capture(step)
    host_x = image.cpu().numpy()
    for seed, count in enumerate((5, 0, capacity, 40, 1)):
        contents = mask_of(count, shape[:3], seed)
        torch_mask.copy_(torch.from_numpy(contents))
        captured.replay()
        expected = sbnet_cupy.reduce_mask(contents, (4, 6), **TILES, capacity=capacity)
        assert int(captured.result.bin_counts[0]) == count
        arguments = (expected.bin_counts, expected.active_block_indices)
        blocks = sbnet_cupy.sparse_gather(host_x, *arguments, **TILES)
        wanted = sbnet_cupy.sparse_scatter(np.maximum(blocks, 0), *arguments, host_x, **TILES)
        assert np.array_equal(result.cpu().numpy(), wanted)


def test_a_stream_of_pytorch_is_captured() -> None:
    """The other way round: CuPy's work runs on PyTorch's stream, and takes its memory from the graph's own pool."""
    torch = find_torch()
    x = random_image((1, 128, 160, 8), "float32")
    tensor, mask = torch.from_numpy(x).cuda(), torch.zeros((1, 128, 160), dtype=torch.bool, device="cuda")
    out = torch.empty_like(tensor)
    device_x, device_mask, device_out = cupy.asarray(tensor), cupy.asarray(mask), cupy.asarray(out)
    pool = cupy.cuda.MemoryPool()

    def chain() -> Any:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream), cupy.cuda.using_allocator(pool.malloc):
            active = sbnet_cupy.reduce_mask(device_mask, (8, 10), **TILES, capacity=40)
            arguments = (active.bin_counts, active.active_block_indices)
            stack = sbnet_cupy.sparse_gather(device_x, *arguments, **TILES)
        doubled = cupy.asarray(2 * torch.as_tensor(stack, device="cuda"))
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream), cupy.cuda.using_allocator(pool.malloc):
            sbnet_cupy.sparse_scatter(doubled, *arguments, device_x, **TILES, out=device_out)
        return active

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles the kernels, and fills the pool: a capture must not ask the driver
        kept = chain()
    side.synchronize()
    del kept
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        active = chain()
    for density in (0.3, 0.0, 1.0, 0.1):  # 1.0: twice as many blocks as there is room for
        contents = random_mask((1, 128, 160), density, seed=7)
        mask.copy_(torch.from_numpy(contents))
        graph.replay()
        torch.cuda.synchronize()
        expected = sbnet_cupy.reduce_mask(contents, (8, 10), **TILES, capacity=40)
        assert identical(active.bin_counts, expected.bin_counts)
        assert identical(active.active_block_indices, expected.active_block_indices)
        arguments = (expected.bin_counts, expected.active_block_indices)
        blocks = 2 * sbnet_cupy.sparse_gather(x, *arguments, **TILES)
        wanted = sbnet_cupy.sparse_scatter(blocks, *arguments, x, **TILES)
        assert np.array_equal(out.cpu().numpy(), wanted)


@pytest.mark.parametrize("capture", [capture_with_cupy, *TORCH_CAPTURES])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("engine", "packed"), [("fused", True), ("fused", False), ("composed", False)])
def test_a_chain_of_bottlenecks_is_captured_and_follows_its_mask(
    engine: str, packed: bool, dtype: str, capture: Callable[..., Captured]
) -> None:
    capacity, shape = 9, (1, 60, 76, 16)
    x = random_image(shape, dtype)
    chain: list[Any] = [on_device(BottleneckWeights.random(16, 8, seed=seed, dtype=dtype)) for seed in range(3)]
    params = sbnet_cupy.calc_block_params_res_block(shape, (18, 18), chain[0].ksizes, 1, "SAME")
    if packed:
        chain = [sbnet_cupy.pack_weights(weights) for weights in chain]
    original, y, mask = cupy.asarray(x), cupy.empty(shape, dtype), cupy.zeros(shape[:3], bool)

    def run(image: Any) -> BlockIndices:
        indices = sbnet_cupy.block_indices(mask, params, capacity=capacity)
        for weights in chain:
            sbnet_cupy.sparse_res_block_bottleneck(image, weights, indices, params, out=image, engine=engine)
        return indices

    def step() -> BlockIndices:
        y[...] = original
        return run(y)

    captured = capture(step)
    for seed, count in enumerate((3, 0, capacity, 15, 20, 1)):
        mask.set(mask_of(count, shape[:3], seed))
        captured.replay()
        assert int(captured.result.bin_counts[0]) == count
        eager = cupy.asarray(x)
        indices = run(eager)
        assert identical(y, eager.get())
        covered = networks.tiles(indices, params, shape)
        assert np.array_equal(y.get()[~covered], x[~covered])
        assert (y.get()[covered] != x[covered]).any() == (count > 0)


@pytest.mark.parametrize("capture", [capture_with_cupy, *TORCH_CAPTURES])
def test_a_fused_convolution_is_captured(capture: Callable[..., Captured]) -> None:
    capacity, shape = 9, (1, 60, 76, 16)
    x, mask = cupy.asarray(random_image(shape, "float16")), cupy.zeros(shape[:3], bool)
    w, bias = cupy.asarray(random_image((3, 3, 16, 24), "float16")), cupy.ones(24, np.float32)
    params = sbnet_cupy.calc_block_params(shape, (18, 18), w.shape, 1, "SAME")

    def step() -> Any:
        indices = sbnet_cupy.block_indices(mask, params, capacity=capacity)
        return sbnet_cupy.sparse_conv2d(x, w, indices, params, bias=bias, activation="relu", engine="fused")

    captured = capture(step)
    for seed, count in enumerate((3, 0, capacity, 15, 1)):
        mask.set(mask_of(count, shape[:3], seed))
        captured.replay()
        assert identical(captured.result, step().get())
        assert bool(captured.result.any()) == (count > 0)


def median_us(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(15):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * cupy.cuda.get_elapsed_time(begin, end))
    return float(np.median(times))


@pytest.mark.parametrize("add", [False, True])
def test_work_follows_the_count_not_the_capacity(add: bool) -> None:
    """Scatter with room for 8192 blocks, 1 GiB of stack: one in a hundred takes a small part of the time of all."""
    x = cupy.zeros((8, 512, 512, 128), cupy.float32)
    blocks = cupy.ones((8192, 16, 16, 128), cupy.float32)

    def seconds(density: float) -> float:
        mask = cupy.asarray(random_mask(x.shape, density))
        active = sbnet_cupy.reduce_mask(mask, (32, 32), **TILES, capacity=8192)
        return median_us(
            lambda: sbnet_cupy.sparse_scatter_var(blocks, active.bin_counts, active[0], x, **TILES, add=add)
        )

    assert seconds(0.01) < 0.15 * seconds(1.0)


def test_gather_owes_zeros_and_no_more() -> None:
    x = cupy.ones((8, 512, 512, 128), cupy.float32)
    out = cupy.empty((8192, 18, 18, 128), cupy.float32)

    def seconds(density: float) -> float:
        mask = cupy.asarray(random_mask(x.shape, density))
        active = sbnet_cupy.reduce_mask(mask, (32, 32), **TILES, capacity=8192)
        return median_us(lambda: sbnet_cupy.sparse_gather(x, active.bin_counts, active[0], **HALO, out=out))

    assert seconds(0.01) < 0.75 * seconds(1.0)


def host_us(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Python's time of each call while the device has next to nothing to do.

    They take turns, in batches of ten. The least one counts: in others, the machine had something else to do, too.
    """
    for run in calls.values():
        for _ in range(20):
            run()
    least = dict.fromkeys(calls, math.inf)
    for name, run in 40 * list(calls.items()):
        cupy.cuda.get_current_stream().synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            run()
        least[name] = min(least[name], 1e5 * (time.perf_counter() - begin))
    return least


def fused_calls(x: Any, out: Any) -> dict[str, Callable[[], Any]]:
    """A convolution and a bottleneck of one launch each."""
    channels = x.shape[3]
    weights = BottleneckWeights.random(channels, 8, xp=cupy)
    block = sbnet_cupy.pack_weights(weights, allow_tf32=True)
    w = sbnet_cupy.pack_weights(cupy.zeros((3, 3, channels, channels), x.dtype), allow_tf32=True)
    params = sbnet_cupy.calc_block_params(x.shape, (10, 10), w.shape, 1, "SAME")
    block_params = sbnet_cupy.calc_block_params_res_block(x.shape, (10, 10), weights.ksizes, 1, "SAME")
    mask = cupy.zeros(x.shape[:3], bool)
    mask[:, :20, :20] = True
    active, block_active = (sbnet_cupy.block_indices(mask, p) for p in (params, block_params))
    return {
        "convolution": lambda: sbnet_cupy.sparse_conv2d(x, w, active, params, base=out, out=out, engine="fused"),
        "bottleneck": lambda: sbnet_cupy.sparse_res_block_bottleneck(
            x, block, block_active, block_params, out=x, engine="fused"
        ),
    }


def test_a_call_costs_the_host_little_more_than_a_launch() -> None:
    """As multiples of a launch of CuPy's with 12 arguments: 6 us on an H200's host.

    reduce_mask is two launches, and the copy a command to the driver besides.
    """
    launch = cupy.RawKernel(
        'extern "C" __global__ void f(float*, float*, float*, float*, int, int, int, int, int, int, int, int) {}', "f"
    )
    x = cupy.zeros((1, 64, 64, 32), cupy.float32)
    mask, out = cupy.zeros(x.shape[:3], bool), cupy.zeros_like(x)
    indices = cupy.asarray([[0, 0, 0], [0, 1, 2], [0, 3, 3]], cupy.int32)
    rows = cupy.asarray([3], cupy.int32), indices
    stack, tiles = cupy.zeros((3, 18, 18, 32), cupy.float32), cupy.zeros((3, 16, 16, 32), cupy.float32)
    most: dict[str, tuple[float, Callable[[], Any]]] = {
        "gather": (2.5, lambda: sbnet_cupy.sparse_gather(x, *rows, **HALO, out=stack)),
        "scatter": (2.5, lambda: sbnet_cupy.sparse_scatter_var(tiles, *rows, x, **TILES)),
        "add": (2.5, lambda: sbnet_cupy.sparse_scatter_var(tiles, *rows, x, **TILES, add=True)),
        "overlapping": (2.5, lambda: sbnet_cupy.sparse_scatter_var(stack, *rows, x, **HALO, add=True, atomic=True)),
        "reduce_mask": (3.0, lambda: sbnet_cupy.reduce_mask(mask, (4, 4), **HALO, capacity=16)),
        "copy": (3.5, lambda: sbnet_cupy.sparse_scatter(tiles, *rows, x, **TILES, out=out)),
        **{name: (4.0, call) for name, call in fused_calls(x, out).items()},
    }
    calls = {name: call for name, (_, call) in most.items()}
    times = host_us({"launch": lambda: launch((1,), (32,), (x, x, x, x, *range(8))), **calls})
    ratios = {name: times[name] / times["launch"] for name in calls}
    assert {name: ratio for name, ratio in ratios.items() if ratio > most[name][0]} == {}
