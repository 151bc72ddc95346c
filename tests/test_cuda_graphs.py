"""CUDA graphs: chains with `capacity=` are captured by CuPy and PyTorch, follow their mask, and cost what is active."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import networks
import numpy as np
import pytest
from cases import identical
from test_device import TILES, random_image
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


CAPTURES = [capture_with_cupy, capture_with_torch, capture_with_torch_memory]


def mask_of(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray[Any, Any]:
    """A mask with one pixel set, away from the edges, in each of `count` tiles of 16 x 16, drawn anew for each seed."""
    rows, columns = -(-shape[1] // 16), -(-shape[2] // 16)
    chosen = np.random.default_rng(seed).permutation(shape[0] * rows * columns)[:count]
    n, i, j = np.unravel_index(chosen, (shape[0], rows, columns))
    mask = np.zeros(shape, bool)
    mask[n, 16 * i + 8, 16 * j + 8] = True
    return mask


@pytest.mark.parametrize("capture", CAPTURES)
def test_the_ops_are_captured_and_follow_their_mask(capture: Callable[..., Captured]) -> None:
    capacity, shape = 40, (1, 128, 160, 8)
    host_x = random_image(shape, "float32")
    x, mask, out = cupy.asarray(host_x), cupy.zeros(shape[:3], bool), cupy.empty(shape, np.float32)

    def step() -> tuple[BlockIndices, Any]:
        active = sbnet_cupy.reduce_mask(mask, (8, 10), **TILES, capacity=capacity)
        arguments = (active.bin_counts, active.active_block_indices)
        stack = sbnet_cupy.sparse_gather(x, *arguments, **TILES)
        sbnet_cupy.sparse_scatter(2 * stack, *arguments, x, **TILES, out=out)
        return active, sbnet_cupy.sparse_scatter_var(stack, *arguments, out, **TILES, add=True)

    captured = capture(step)
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


@pytest.mark.parametrize("capture", [capture_with_torch, capture_with_torch_memory])
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


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_chain_of_bottlenecks_is_captured_and_follows_its_mask(dtype: str, capture: Callable[..., Captured]) -> None:
    capacity, shape = 9, (1, 60, 76, 16)
    x = random_image(shape, dtype)
    chain = [on_device(BottleneckWeights.random(16, 8, seed=seed, dtype=dtype)) for seed in range(3)]
    params = sbnet_cupy.calc_block_params_res_block(shape, (18, 18), chain[0].ksizes, 1, "SAME")
    original, y, mask = cupy.asarray(x), cupy.empty(shape, dtype), cupy.zeros(shape[:3], bool)

    def run(image: Any) -> BlockIndices:
        indices = sbnet_cupy.block_indices(mask, params, capacity=capacity)
        for weights in chain:
            sbnet_cupy.sparse_res_block_bottleneck(image, weights, indices, params, out=image)
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


#: Calls in a graph whose time is taken: the launch of the graph is a small part of it then.
ROUNDS = 5


def test_time_goes_with_the_active_blocks_not_with_the_capacity() -> None:
    """Scatter of 1 % of the rows takes less than a tenth of the time of all; gather, which owes zeros, not more."""
    shape, blocks = (8, 512, 512, 64), 8 * 32 * 32
    rng = cupy.random.default_rng(0)
    x = rng.standard_normal(shape, dtype=np.float32)  # 537 MB, as the stacks are
    stack = rng.standard_normal((blocks, 16, 16, 64), dtype=np.float32)
    gathered, image, mask = cupy.empty_like(stack), cupy.empty_like(x), cupy.zeros(shape[:3], bool)
    find = capture_with_cupy(lambda: sbnet_cupy.reduce_mask(mask, (32, 32), **TILES, capacity=blocks))
    find.replay()
    arguments = (find.result.bin_counts, find.result.active_block_indices)

    def scatter() -> None:
        for _ in range(ROUNDS):
            sbnet_cupy.sparse_scatter_var(stack, *arguments, image, **TILES)

    def gather() -> None:
        for _ in range(ROUNDS):
            sbnet_cupy.sparse_gather(x, *arguments, **TILES, out=gathered)

    graphs = {"scatter": capture_with_cupy(scatter), "gather": capture_with_cupy(gather)}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for count in (blocks, 82):
        mask.set(mask_of(count, shape[:3]))
        image.fill(0)
        find.replay()
        assert int(arguments[0][0]) == count
        for name, graph in graphs.items():
            seconds[name].append(median_seconds(graph) / ROUNDS)
        n, i, j = arguments[1][:count].T
        assert bool((tiles_of(image)[n, i, j] == stack[:count]).all())
        assert int(cupy.count_nonzero(tiles_of(image).any(axis=(3, 4, 5)))) == count
        assert bool((gathered[:count] == tiles_of(x)[n, i, j]).all())
        assert not bool(gathered[count:].any())
    (scatter_all, scatter_few), (gather_all, gather_few) = seconds["scatter"], seconds["gather"]
    assert scatter_few < scatter_all / 10, seconds
    assert gather_few <= gather_all, seconds


def tiles_of(image: Any) -> Any:
    """A view [N, block row, block column, 16, 16, C]."""
    n, height, width, channels = image.shape
    return image.reshape(n, height // 16, 16, width // 16, 16, channels).transpose(0, 1, 3, 2, 4, 5)


def median_seconds(graph: Captured) -> float:
    """Of 15 replays, by events on the device."""
    graph.replay()
    events = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(15)]
    for begin, end in events:
        begin.record(graph.stream)
        graph.launch()
        end.record(graph.stream)
    graph.stream.synchronize()
    return 1e-3 * statistics.median(cupy.cuda.get_elapsed_time(begin, end) for begin, end in events)
