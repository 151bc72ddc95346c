"""CUDA graphs: captured once, replayed on other masks, with work in proportion to the active blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import identical
from test_device import HALO, TILES, random_image, random_mask

import sbnet_cupy

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu


def test_the_chain_is_captured_by_pytorch() -> None:
    """CuPy's work runs on PyTorch's capturing stream, and takes its memory from a pool of the graph's own."""
    torch = pytest.importorskip("torch")
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


def host_us(run: Callable[[], Any]) -> float:
    """Python's time of a call while the device has next to nothing to do: the median of batches of ten."""
    for _ in range(20):
        run()
    times = []
    for _ in range(40):
        cupy.cuda.get_current_stream().synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            run()
        times.append(1e5 * (time.perf_counter() - begin))
    return float(np.median(times))


def test_a_call_costs_the_host_little_more_than_a_launch() -> None:
    """On an H200's host a launch of CuPy's with 12 arguments took 6 us, a call of gather or scatter 11 to 12."""
    launch = cupy.RawKernel(
        'extern "C" __global__ void f(float*, float*, float*, float*, int, int, int, int, int, int, int, int) {}', "f"
    )
    x = cupy.zeros((1, 64, 64, 32), cupy.float32)
    indices = cupy.asarray([[0, 0, 0], [0, 1, 2], [0, 3, 3]], cupy.int32)
    count = cupy.asarray([3], cupy.int32)
    stack, tiles = cupy.zeros((3, 18, 18, 32), cupy.float32), cupy.zeros((3, 16, 16, 32), cupy.float32)
    bare = host_us(lambda: launch((1,), (32,), (x, x, x, x, *range(8))))
    gather = host_us(lambda: sbnet_cupy.sparse_gather(x, count, indices, **HALO, out=stack))
    scatter = host_us(lambda: sbnet_cupy.sparse_scatter_var(tiles, count, indices, x, **TILES))
    add = host_us(lambda: sbnet_cupy.sparse_scatter_var(tiles, count, indices, x, **TILES, add=True))
    assert max(gather, scatter, add) < 3 * bare
