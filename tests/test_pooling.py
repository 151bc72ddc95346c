"""How ``reduce_mask`` cuts its work into CTAs, words and launches: pure functions of shapes and grids."""

from __future__ import annotations

from typing import Any

import cpu_cuda
import numpy as np
import pytest
from cpu_cuda.calls import mask_call, random_mask
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cupy")

from sbnet_cupy import _pooling
from sbnet_cupy._geometry import BlockGrid
from sbnet_cupy._instances import COMPACT_ACTIVE, COUNT_ACTIVE, mask_lanes
from sbnet_cupy._plan import division
from sbnet_cupy._validate import Spec

needs_compiler = pytest.mark.skipif(bool(cpu_cuda.why_unavailable()), reason=cpu_cuda.why_unavailable())

sizes = st.integers(1, 40) | st.integers(1, 3000) | st.just(2**61)
UINT8 = np.dtype(np.uint8)


@given(st.integers(1, 5000), st.integers(1, 5000), sizes, sizes, sizes, st.sampled_from([1, 2, 4, 8]))
def test_strips_fit_a_cta_and_cover_the_grid(
    grid_rows: int, blocks: int, height: int, width: int, stride: int, lanes: int
) -> None:
    strips = _pooling._choose_strips(grid_rows, blocks, BlockGrid((height, width), (0, 0), (1, stride)), lanes)
    threads = strips.columns * strips.row_threads
    assert threads <= 256
    assert strips.columns % 32 == 0
    assert 1 <= strips.blocks <= threads
    assert strips.blocks == strips.words * strips.word_blocks
    assert strips.words == 1 or strips.word_blocks == 32
    assert strips.word_blocks <= 32
    assert (strips.count - 1) * strips.blocks < blocks <= strips.count * strips.blocks
    assert (strips.row_words - 1) * strips.word_blocks < blocks <= strips.row_words * strips.word_blocks
    # The kernel counts columns of a strip in 32 bits, because several blocks are never wider than the threads take in.
    assert strips.blocks == 1 or (strips.blocks - 1) * stride + width + lanes - 1 <= strips.columns * lanes


@given(st.integers(1, 2**31 - 1) | st.integers(1, 50_000), st.integers(0, 1000))
def test_memory_is_laid_out_without_overlaps(words: int, rows: int) -> None:
    tile, tiles = _pooling._choose_tiles(words)
    assert (tiles - 1) * tile < words <= tiles * tile
    layout = _pooling._memory(words, tiles, rows)
    counted = words > _pooling._MANY_WORDS
    assert layout["tile_counts_offset"] == (4 * words if counted else 0)
    scratch = 4 * words + 4 * tiles * counted
    if layout["scratch_bytes"]:
        assert layout["scratch_bytes"] == scratch
        assert scratch > 12 * rows
        assert layout["count_offset"] == 0
    else:
        assert layout["count_offset"] == scratch
    assert layout["indices_offset"] >= layout["count_offset"] + 4
    assert layout["indices_offset"] % 16 == 0
    assert layout["result_bytes"] == layout["indices_offset"] + 12 * rows
    # With memory for the result, all of scratch lies apart.
    assert _pooling._memory(words, tiles, rows, given=True)["scratch_bytes"] == scratch
    # The work of CTAs that count for themselves stays small.
    assert tiles <= _pooling._MOST_TILES
    assert counted or words <= 16384


def test_the_goal_cases() -> None:
    """What the launches of the benchmarks look like: nothing idles, and all rows of a block are in flight at once."""

    def ready(shape: tuple[int, int, int], bcount: tuple[int, int], capacity: int | None) -> Any:
        strides = (4 * shape[1] * shape[2], 4 * shape[2], 4)
        spec = Spec(shape, strides, np.dtype(np.float32), 0, 0)
        return _pooling.prepare(spec, bcount, BlockGrid((18, 18), (-1, -1), (16, 16)), 0.5, False, capacity)

    large = ready((8, 2048, 2048), (128, 128), 131072)
    assert (large.grid, large.block, large.tiles) == ((8 * 128 * 5, 1, 1), (128, 2, 1), (160, 1, 1))
    assert large.block[1] * _pooling._ROWS == 18
    small = ready((1, 400, 700), (25, 44), 1100)
    assert (small.grid, small.block, small.tiles) == ((75, 1, 1), (64, 2, 1), (10, 1, 1))
    assert not small.fused
    assert ready((1, 400, 700), (25, 44), None).fused


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({"capacity": None}, ["block_activity"]),
        ({"capacity": 7}, ["block_activity", "compact_active"]),
        ({"bsize": (1, 1), "bstride": (1, 1), "bcount": (200, 150)}, ["block_activity", "compact_active"]),
        (
            {"bsize": (1, 1), "bstride": (1, 1), "bcount": (1000, 1000)},
            ["block_activity", "count_active", "compact_active"],
        ),
        ({"bcount": (0, 3)}, []),
    ],
)
@needs_compiler
def test_launches(options: dict[str, Any], kernels: list[str]) -> None:
    found = mask_call(random_mask(0, UINT8, False, **options), "launches").kernels()
    assert [instance.expression.removeprefix("sbnet::").partition("<")[0] for instance in found] == kernels
    assert {COUNT_ACTIVE, COMPACT_ACTIVE} & set(found) == {i for i in found if "<" not in i.expression}


@needs_compiler
def test_nothing_is_launched_where_no_pixel_can_be_active() -> None:
    with cpu_cuda.recording() as found:
        from cpu_cuda import standin

        import sbnet_cupy

        mask = standin.asarray(np.full((1, 8, 8), 255, np.uint8))
        for capacity in (None, 5):
            active = sbnet_cupy.reduce_mask(mask, (2, 2), bsize=(4, 4), bstride=(4, 4), tol=255, capacity=capacity)
            assert active.bin_counts.get().tolist() == [0]
            assert active.active_block_indices.get().tolist() == [[-1, -1, -1]] * (capacity or 0)
    assert not found


@given(st.integers(-50, 50), st.integers(0, 60), st.integers(1, 9), st.integers(1, 9), st.integers(0, 100))
def test_the_blocks_of_an_axis_that_have_pixels(offset: int, extent: int, size: int, stride: int, blocks: int) -> None:
    _, axis = BlockGrid((1, size), (0, offset), (1, stride)).axes(1, extent)
    first, end, start, *_ = _pooling._block_axis(axis, blocks)
    inside = [k for k in range(blocks) if offset + k * stride < extent and offset + k * stride + size > 0]
    assert list(range(first, end)) == inside if extent else first == end
    if inside and extent:
        assert start == offset + first * stride


@pytest.mark.parametrize("divisor", [1, 2, 3, 15, 128, 2**31 - 1])
def test_divisors(divisor: int) -> None:
    assert _pooling._divisor(divisor) == (divisor, *division(divisor))


def test_lanes_need_alignment_and_whole_rows() -> None:
    lanes, *_ = mask_lanes(UINT8)
    assert _pooling._choose_lanes(Spec((1, 4, 16), (64, 16, 1), UINT8, 0, 0)) == lanes
    assert _pooling._choose_lanes(Spec((1, 4, 16), (64, 16, 1), UINT8, 8, 0)) == lanes
    for spec in (
        Spec((1, 4, 15), (60, 15, 1), UINT8, 0, 0),
        Spec((1, 4, 16), (64, 16, 1), UINT8, 4, 0),
        Spec((1, 4, 16), (80, 20, 1), UINT8, 0, 0),
        Spec((1, 4, 16), (64, 32, 2), UINT8, 0, 0),
    ):
        assert _pooling._choose_lanes(spec) == 1
