"""What only a device can show: streams, synchronisation, size, reproducibility. CUDA graphs: test_graphs.py."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from cases import identical, lay_out, random_bits

import sbnet_cupy

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu

SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
    long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - begin < nanoseconds);
}
"""

HALO: dict[str, Any] = {"bsize": (18, 18), "boffset": (-1, -1), "bstride": (16, 16)}
TILES: dict[str, Any] = {"bsize": (16, 16), "bstride": (16, 16)}


def random_image(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def random_mask(shape: tuple[int, ...], density: float, seed: int = 0) -> np.ndarray[Any, Any]:
    """Active in about `density` of the 16 x 16 tiles."""
    tiles = np.random.default_rng(seed).random((shape[0], -(-shape[1] // 16), -(-shape[2] // 16))) < density
    return tiles.repeat(16, 1).repeat(16, 2)[:, : shape[1], : shape[2]]


@pytest.mark.parametrize("layout", ["nhwc", "nchw", "misaligned"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("dtype", "channels"), [("float32", 64), ("float16", 24), ("float32", 3), ("uint8", 96)])
def test_many_blocks(dtype: str, channels: int, transpose: bool, layout: str) -> None:
    """Several CTAs a block and several blocks a CTA, in every order."""
    x = random_image((2, 200, 333, channels), dtype)
    mask = random_mask(x.shape, 0.4)
    device_x = lay_out(x, layout, cupy)
    expected = sbnet_cupy.reduce_mask(mask, (13, 21), **TILES)
    active = sbnet_cupy.reduce_mask(cupy.asarray(mask), (13, 21), **TILES)
    assert identical(active.active_block_indices, expected.active_block_indices)
    arguments = (expected.bin_counts, expected.active_block_indices)
    on_device = (active.bin_counts, active.active_block_indices)
    for grid in (HALO, TILES, {"bsize": (3, 40), "bstride": (2, 33)}):
        options = {**grid, "transpose": transpose}
        stack = sbnet_cupy.sparse_gather(device_x, *on_device, **options)
        assert identical(stack, sbnet_cupy.sparse_gather(x, *arguments, **options))
        blocks = random_image(stack.shape, dtype, 1)
        for add in (False, True):
            how = {**options, "add": add, "atomic": add}
            wanted = sbnet_cupy.sparse_scatter(blocks, *arguments, x, **how)
            found = sbnet_cupy.sparse_scatter(lay_out(blocks, layout, cupy), *on_device, device_x, **how)
            assert identical(found, wanted)


@pytest.mark.parametrize("blocks", [8000, 8192, 8193, 70_000])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.5, 1.0])
def test_compaction_over_many_tiles(blocks: int, density: float) -> None:
    mask = np.random.default_rng(blocks).random((1, 1, blocks)) < density
    grid: dict[str, Any] = {"bsize": (1, 1), "bstride": (1, 1)}
    expected = sbnet_cupy.reduce_mask(mask, (1, blocks), **grid)
    for capacity in (None, 0, 100, blocks + 5):
        found = sbnet_cupy.reduce_mask(cupy.asarray(mask), (1, blocks), **grid, capacity=capacity)
        wanted = sbnet_cupy.reduce_mask(mask, (1, blocks), **grid, capacity=capacity)
        assert identical(found.active_block_indices, wanted.active_block_indices)
        assert identical(found.bin_counts, expected.bin_counts)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_overlaps_are_reproducible_and_equal_to_numpy(dtype: str) -> None:
    x = random_image((2, 150, 170, 16), dtype)
    rng = np.random.default_rng(1)
    indices = np.stack([rng.integers(0, 2, 500), rng.integers(-2, 22, 500), rng.integers(-2, 24, 500)], 1).astype("i")
    counts = np.array([500], np.int32)
    blocks = random_image((500, 18, 18, 16), dtype, 2)
    grid: dict[str, Any] = {"bsize": (18, 18), "boffset": (-3, 2), "bstride": (8, 7)}
    arrays = [cupy.asarray(a) for a in (blocks, counts, indices, x)]
    for add in (False, True):
        expected = sbnet_cupy.sparse_scatter(blocks, counts, indices, x, **grid, add=add, atomic=add)
        for _ in range(5):
            assert identical(sbnet_cupy.sparse_scatter(*arrays, **grid, add=add, atomic=add), expected)


def test_thousands_of_equal_blocks() -> None:
    blocks = random_image((3000, 2, 2, 4), "float32")
    x, counts = np.zeros((1, 4, 4, 4), np.float32), np.array([3000], np.int32)
    indices = np.zeros((3000, 3), np.int32)
    arrays = [cupy.asarray(a) for a in (blocks, counts, indices, x)]
    grid: dict[str, Any] = {"bsize": (2, 2), "bstride": (2, 2)}
    for add in (False, True):
        expected = sbnet_cupy.sparse_scatter(blocks, counts, indices, x, **grid, add=add)
        assert identical(sbnet_cupy.sparse_scatter(*arrays, **grid, add=add), expected)


def test_more_than_2_to_the_31_elements() -> None:
    """Offsets in image and stack beyond 32 bits, gathered and scattered back."""
    shape, side = (3, 30_000, 30_000, 1), 300
    x = cupy.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)
    grid: dict[str, Any] = {"bsize": (side, side), "bstride": (side, side)}
    tiles = shape[1] // side
    active = sbnet_cupy.reduce_mask(cupy.ones((3, 1, 1), bool), (tiles, tiles), **grid, tol=-1, avgpool=True)
    assert int(active.bin_counts[0]) == 3 * tiles * tiles
    arguments = (active.bin_counts, active.active_block_indices)
    stack = sbnet_cupy.sparse_gather(x, *arguments, **grid)
    expected = x.reshape(3, tiles, side, tiles, side).transpose(0, 1, 3, 2, 4)
    assert bool((stack.reshape(expected.shape) == expected).all())
    y = sbnet_cupy.sparse_scatter_var(stack, *arguments, cupy.zeros_like(x), **grid)
    assert bool((y == x).all())
    y = sbnet_cupy.sparse_scatter_var(stack, *arguments, y, **grid, add=True)
    assert bool((y == x + x).all())


def test_a_block_of_more_than_2_to_the_31_elements() -> None:
    side = 46_400
    x = cupy.random.default_rng(0).integers(0, 256, size=(1, side, side, 1), dtype=np.uint8)
    grid: dict[str, Any] = {"bsize": (side, side), "boffset": (-1, -2), "bstride": (side, side)}
    arguments = (cupy.ones(1, np.int32), cupy.zeros((1, 3), np.int32))
    stack = sbnet_cupy.sparse_gather(x, *arguments, **grid)
    assert bool((stack[0, 1:, 2:] == x[0, :-1, :-2]).all())
    assert not bool(stack[0, 0].any())
    assert not bool(stack[0, :, :2].any())
    y = sbnet_cupy.sparse_scatter_var(stack, *arguments, cupy.zeros_like(x), **grid)
    assert bool((y[0, :-1, :-2] == x[0, :-1, :-2]).all())


def test_nothing_but_the_exact_count_waits_for_the_device() -> None:
    spin = cupy.RawKernel(SPIN, "spin")
    x = cupy.asarray(random_image((1, 100, 100, 8), "float32"))
    mask = cupy.asarray(random_mask((1, 100, 100), 0.5))
    out = cupy.empty_like(x)

    def chain(capacity: int | None) -> float:
        begin = time.perf_counter()
        active = sbnet_cupy.reduce_mask(mask, (7, 7), **HALO, capacity=capacity)
        stack = sbnet_cupy.sparse_gather(x, active.bin_counts, active.active_block_indices, **TILES)
        sbnet_cupy.sparse_scatter(stack, active.bin_counts, active.active_block_indices, x, **TILES, out=out)
        sbnet_cupy.sparse_scatter_var(stack, active.bin_counts, active.active_block_indices, out, **TILES, add=True)
        return time.perf_counter() - begin

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for capacity in (49, None):
            chain(capacity)  # compile, and fill the memory pool
        stream.synchronize()
        for capacity, waits in ((49, False), (None, True)):
            spin((1,), (1,), (np.int64(300_000_000),))
            assert (chain(capacity) > 0.2) == waits
            stream.synchronize()


def test_work_runs_on_the_current_stream() -> None:
    """A busy stream delays its own calls and no others; results are those of the inputs written before on it."""
    spin = cupy.RawKernel(SPIN, "spin")
    x = random_image((1, 64, 64, 8), "float32")
    counts, indices = cupy.asarray([1], np.int32), cupy.zeros((1, 3), np.int32)
    sbnet_cupy.sparse_gather(cupy.asarray(x), counts, indices, **TILES)
    busy, idle = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    late = cupy.zeros(x.shape, np.float32)
    for value in (1, 0):  # CuPy compiles its own kernels now, not while the stream is to be busy
        late[...] = value
    late.any()
    with busy:
        spin((1,), (1,), (np.int64(0),))
    cupy.cuda.Device().synchronize()
    with busy:
        spin((1,), (1,), (np.int64(300_000_000),))
        late[...] = 1
        stack = sbnet_cupy.sparse_gather(late, counts, indices, **TILES)
    with idle:
        other = sbnet_cupy.sparse_gather(late, counts, indices, **TILES)
        idle.synchronize()
        assert not bool(busy.done)
        assert not bool(other.any())
    busy.synchronize()
    assert bool((stack == 1).all())


def test_threads_with_streams_of_their_own() -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            x = random_image((1, 90, 110, 12), "float32", seed)
            mask = random_mask(x.shape, 0.3, seed)
            with cupy.cuda.Stream(non_blocking=True):
                device_x, device_mask = cupy.asarray(x), cupy.asarray(mask)
                for _ in range(20):
                    active = sbnet_cupy.reduce_mask(device_mask, (6, 7), **HALO)
                    stack = sbnet_cupy.sparse_gather(
                        device_x, active.bin_counts, active.active_block_indices, bsize=(7, 9), bstride=(7, 9)
                    )
                    expected = sbnet_cupy.reduce_mask(mask, (6, 7), **HALO)
                    wanted = sbnet_cupy.sparse_gather(
                        x, expected.bin_counts, expected.active_block_indices, bsize=(7, 9), bstride=(7, 9)
                    )
                    assert identical(stack, wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_masks_on_streams_side_by_side() -> None:
    """Kernels that run at the same time do not count each other's CTAs; nor does a graph that is launched meanwhile."""
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(4)]
    masks = [random_mask((1, 400, 700), 0.1 * (k + 1), k) for k in range(len(streams))]
    expected = [sbnet_cupy.reduce_mask(mask, (25, 44), **HALO, capacity=1100) for mask in masks]
    on_device = [cupy.asarray(mask) for mask in masks]
    pool = cupy.cuda.MemoryPool()
    with streams[0], cupy.cuda.using_allocator(pool.malloc):
        sbnet_cupy.reduce_mask(on_device[0], (25, 44), **HALO, capacity=1100)
        streams[0].synchronize()
        streams[0].begin_capture()
        captured = sbnet_cupy.reduce_mask(on_device[0], (25, 44), **HALO, capacity=1100)
        graph = streams[0].end_capture()
    cupy.cuda.Device().synchronize()
    found: list[list[Any]] = [[] for _ in streams]
    for _ in range(50):
        for k, stream in enumerate(streams):
            with stream:
                found[k].append(sbnet_cupy.reduce_mask(on_device[k], (25, 44), **HALO, capacity=1100))
        graph.launch(streams[-1])
    cupy.cuda.Device().synchronize()
    for results, wanted in zip([*found, [captured]], [*expected, expected[0]]):
        for result in results:
            assert identical(result.bin_counts, wanted.bin_counts)
            assert identical(result.active_block_indices, wanted.active_block_indices)


def test_arrays_of_another_device_are_refused() -> None:
    array = cupy.zeros((1, 4, 4, 4), np.float32)
    memory = cupy.cuda.UnownedMemory(array.data.ptr, array.nbytes, array, device_id=7)
    elsewhere = cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory, 0))
    counts, indices = cupy.asarray([1], np.int32), cupy.zeros((1, 3), np.int32)
    with pytest.raises(ValueError, match=r"^x: expected an array on the current device 0, got one on device 7"):
        sbnet_cupy.sparse_gather(elsewhere, counts, indices, **TILES)
    with pytest.raises(ValueError, match=r"^mask: expected an array on the current device 0, got one on device 7"):
        sbnet_cupy.reduce_mask(elsewhere[0], (1, 1), **TILES)


def test_outputs_are_written_in_full() -> None:
    """Memory that the pool hands out again is full of other bits; results must not show them."""
    shape = (1, 70, 70, 24)
    x = random_image(shape, "float32")
    mask = random_mask(shape, 0.4)
    expected = sbnet_cupy.reduce_mask(mask, (5, 5), **HALO, capacity=30)
    wanted = sbnet_cupy.sparse_gather(x, expected.bin_counts, expected.active_block_indices, **HALO)
    device_x, device_mask = cupy.asarray(x), cupy.asarray(mask)
    for seed in range(4):
        junk = [
            cupy.asarray(random_bits(np.random.default_rng(seed), (size,), np.dtype(np.uint8)))
            for size in (25, 64, 360, 512, wanted.nbytes, wanted.nbytes)
        ]
        del junk
        active = sbnet_cupy.reduce_mask(device_mask, (5, 5), **HALO, capacity=30)
        assert identical(active.active_block_indices, expected.active_block_indices)
        stack = sbnet_cupy.sparse_gather(device_x, active.bin_counts, active.active_block_indices, **HALO)
        assert identical(stack, wanted)
