"""``tune_block_size``: the model on NumPy masks, the choice, the errors; on a device, that it measures."""

from __future__ import annotations

import math
import re
from typing import Any

import cpu_cuda
import ml_dtypes
import numpy as np
import pytest
from cpu_cuda import standin
from fused_cases import host_products

import sbnet_cupy
from sbnet_cupy import BlockIndices, BlockTuning, block_indices, calc_block_params_res_block, tune_block_size
from sbnet_cupy import _tune as tune
from sbnet_cupy._conv_geometry import block_params, make_chain

BOTTLENECK = [(1, 1), (3, 3), (1, 1)]
HALF = np.dtype(np.float16)


def full(height: int = 200, width: int = 300) -> Any:
    return np.ones((1, height, width), bool)


def scattered(height: int = 200, width: int = 300) -> Any:
    """Single pixels, 40 apart."""
    mask = np.zeros((1, height, width), bool)
    mask[:, 20::40, 20::40] = True
    return mask


def sizes(tuning: BlockTuning) -> list[tuple[int, int]]:
    return [row.bsize for row in tuning.table]


class TestModel:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16, np.float32])
    @pytest.mark.parametrize("make", [full, scattered])
    def test_the_choice_is_the_best_of_the_table(self, make: Any, dtype: Any) -> None:
        tuning = tune_block_size(make(), 32, BOTTLENECK, dtype=dtype)
        assert not tuning.measured
        best = min(tuning.table, key=lambda row: row.seconds)
        assert tuning.params.bsize == best.bsize
        assert tuning.params == calc_block_params_res_block((1, 200, 300, 32), best.bsize, BOTTLENECK, 1, "SAME")
        assert tuning == tune_block_size(make(), 32, BOTTLENECK, dtype=dtype)

    def test_the_table(self) -> None:
        mask = scattered()
        tuning = tune_block_size(mask, 8, [(5, 3)], dtype="float32", candidates=[8, (9, 17), np.int64(20)])
        assert sizes(tuning) == [(8, 8), (9, 17), (20, 20)]
        for row in tuning.table:
            params = calc_block_params_res_block((1, 200, 300, 8), row.bsize, [(5, 3)], 1, "SAME")
            assert row.active_blocks == int(block_indices(mask, params).bin_counts[0]) > 0
            assert row.gathered_pixels == row.active_blocks * math.prod(row.bsize)

    def test_seconds(self) -> None:
        """One 3x3 convolution from 4 to 2 channels on one block of 6 x 6 pixels, by hand."""
        mask = np.zeros((1, 40, 40), np.uint8)
        mask[0, 5, 5] = 1  # in the second tile of 4, and in no other's halo
        (row,) = tune_block_size(mask, [4, 2], [(3, 3)], dtype="float64", candidates=[6]).table
        assert (row.active_blocks, row.gathered_pixels) == (1, 36)
        elements = 2 * 36 * 4 + (36 * 4 + 16 * 2 + 9 * 4 * 2) + 2 * 16 * 2
        assert row.seconds == pytest.approx(3 * (0.53e-6 + 2e-9) + elements * 8 / 4.08e12)

    def test_seconds_of_many_channels(self) -> None:
        """The same with so many channels that multiplications take longer than bytes."""
        mask = np.zeros((1, 40, 40), np.float32)
        mask[0, 5, 5] = 1
        (row,) = tune_block_size(mask, 1024, [(3, 3)], dtype="float32", candidates=[18]).table
        blocks, moved = row.active_blocks, 2 * (18 * 18 + 16 * 16) * 1024 * 4 / 4.08e12
        computed = 2 * 16 * 16 * 9 * 1024 * 1024 / 67e12
        assert row.seconds == pytest.approx(3 * 0.53e-6 + blocks * (3 * 2e-9 + moved + computed))

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_halos_cost(self, dtype: str) -> None:
        """On a full mask, small blocks gather more pixels for the same result."""
        tuning = tune_block_size(full(), 64, [(3, 3), (3, 3)], dtype=dtype)
        seconds = {row.bsize[0]: row.seconds for row in tuning.table}
        assert seconds[8] > seconds[10] > seconds[12] > seconds[20]
        assert tuning.params.bsize[0] >= 20

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_inactive_pixels_cost(self, dtype: str) -> None:
        """On a mask of single pixels, large blocks gather more pixels around them."""
        tuning = tune_block_size(scattered(), 64, [(3, 3)], dtype=dtype)
        # Up to tiles of 8, how many of them a pixel and its halo touch counts as much.
        assert tuning.params.bsize[0] <= 10
        best, large = min(tuning.table, key=lambda row: row.seconds), [row for row in tuning.table if row.bsize[0] > 16]
        assert [row.seconds for row in large] == sorted(row.seconds for row in large)
        assert large[0].seconds > 1.4 * best.seconds
        assert large[-1].seconds > 5 * best.seconds

    def test_all_channels_alike_may_be_one_number(self) -> None:
        one = tune_block_size(full(), 16, BOTTLENECK, dtype="float32")
        assert one == tune_block_size(full(), [16, 16, 16, 16], BOTTLENECK, dtype="float32")
        assert one != tune_block_size(full(), [16, 16, 16, 8], BOTTLENECK, dtype="float32")

    def test_wider_dtypes_take_longer(self) -> None:
        seconds = [tune_block_size(full(), 16, [(3, 3)], dtype=t).table[0].seconds for t in ("float16", "float32")]
        assert seconds[0] < seconds[1]

    def test_kernel_sizes_may_be_those_of_weights(self) -> None:
        pairs = tune_block_size(full(), [3, 8], [(5, 3)], dtype="float32")
        assert pairs == tune_block_size(full(), [3, 8], [[5, 3, 3, 8]], dtype="float32")

    def test_masks_of_one_channel(self) -> None:
        assert tune_block_size(full(), 4, [(3, 3)], dtype="float32") == tune_block_size(
            full()[..., None], 4, [(3, 3)], dtype="float32"
        )

    def test_default_candidates(self) -> None:
        assert sizes(tune_block_size(full(), 4, [(5, 3)], dtype="float32")) == [(t + 4, t + 2) for t in tune.TILES]
        # A tile of 12 covers the image, so that larger ones are no different.
        assert sizes(tune_block_size(full(9, 11), 4, [(1, 1)], dtype="float32")) == [(4, 4), (6, 6), (8, 8), (12, 12)]

    @pytest.mark.parametrize("mask", [np.zeros((2, 20, 20), bool), np.ones((0, 20, 20)), np.ones((1, 0, 7))])
    def test_nothing_active(self, mask: Any) -> None:
        tuning = tune_block_size(mask, 4, [(3, 3)], dtype="float32", candidates=[5, 8])
        assert [row[1:3] for row in tuning.table] == [(0, 0), (0, 0)]
        assert tuning.params.bsize == (5, 5)  # the first of the equally fast

    def test_pixels_are_active_above_a_half(self) -> None:
        mask = np.full((1, 30, 30), 0.5)
        assert tune_block_size(mask, 4, [(3, 3)], dtype="float32").table[0].active_blocks == 0
        mask[0, 0, 0] = 0.6
        assert tune_block_size(mask, 4, [(3, 3)], dtype="float32").table[0].active_blocks == 1

    def test_it_is_public(self) -> None:
        assert {"tune_block_size", "BlockTuning", "BlockCandidate"} <= set(sbnet_cupy.__all__)


GOOD: dict[str, Any] = {"mask": full(), "channels": 4, "ksize_list": [(3, 3)], "dtype": "float32", "candidates": [8]}

ERRORS = [
    ({"mask": [[1]]}, TypeError, "mask: expected a NumPy or CuPy array, got list"),
    ({"mask": np.ones((4, 4))}, ValueError, r"mask: expected shape (N, H, W) or (N, H, W, 1), got (4, 4)"),
    ({"mask": np.ones((1, 4, 4), complex)}, TypeError, "mask: expected a bool, integer or floating dtype"),
    ({"channels": 0}, ValueError, "channels: expected an integer or 2 of them"),
    ({"channels": [4]}, ValueError, "channels: expected an integer or 2 of them"),
    ({"channels": [4, 4, 4]}, ValueError, "got [4, 4, 4]"),
    ({"channels": 4.0}, TypeError, "channels: expected an integer or 2 of them"),
    ({"channels": True}, TypeError, "got True"),
    ({"channels": "4"}, TypeError, "got '4'"),
    ({"channels": None}, TypeError, "got None"),
    ({"ksize_list": []}, ValueError, "ksize_list: expected at least one kernel size, got none"),
    ({"ksize_list": 3}, TypeError, "ksize_list: expected a sequence of kernel sizes, got int"),
    ({"ksize_list": [3]}, ValueError, "ksize_list: expected two integers (height, width), each >= 1, got 3"),
    ({"ksize_list": [(3, 0)]}, ValueError, "ksize_list: expected two integers (height, width), each >= 1, got (3, 0)"),
    ({"dtype": "int32"}, TypeError, "dtype: expected float16, bfloat16, float32 or float64, got int32"),
    ({"dtype": None}, TypeError, "dtype: expected float16, bfloat16, float32 or float64, got None"),
    ({"dtype": "single-ish"}, TypeError, "dtype: expected float16, bfloat16, float32 or float64, got 'single-ish'"),
    ({"candidates": []}, ValueError, "candidates: expected at least one block size, got none"),
    ({"candidates": 8}, TypeError, "candidates: expected an iterable of block sizes or None, got int"),
    ({"candidates": [8, 0]}, ValueError, "candidates: expected two integers (height, width), each >= 1, got (0, 0)"),
    ({"candidates": [8.0]}, ValueError, "candidates: expected two integers (height, width), each >= 1, got (8.0, 8.0)"),
    ({"candidates": [(8, 8, 8)]}, ValueError, "candidates: expected two integers (height, width), each >= 1"),
    ({"engine": "quick"}, ValueError, "engine: expected 'auto', 'fused' or 'composed', got 'quick'"),
    ({"engine": "fused"}, ValueError, "engine: expected 'auto' or 'composed' for NumPy arrays, got 'fused'"),
    (
        {"candidates": [(8, 2)]},
        ValueError,
        "candidates: expected sizes of at least the receptive field (3, 3) of the convolutions, got (8, 2)",
    ),
]


@pytest.mark.parametrize(("changed", "kind", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {**GOOD, **changed}
    with pytest.raises(kind, match=re.escape(message)):
        tune_block_size(**arguments)


def test_good_arguments_are_good() -> None:
    assert tune_block_size(**GOOD).params.bsize == (8, 8)


def test_the_model_is_of_the_composed_engine() -> None:
    assert tune_block_size(**GOOD, engine="composed") == tune_block_size(**GOOD)


@pytest.mark.parametrize(
    ("dtype", "ksizes", "channels", "why"),
    [
        (HALF, [(3, 3)], [8, 8], ""),
        (HALF, BOTTLENECK, [16, 8, 8, 16], ""),
        (np.dtype(np.float64), [(3, 3)], [8, 8], "float64"),
        (HALF, BOTTLENECK, [16, 8, 8, 24], "a chain that is neither one convolution nor a bottleneck"),
        (HALF, [(3, 3), (1, 1), (1, 1)], [8] * 4, "a chain that is neither one convolution nor a bottleneck"),
    ],
)
def test_what_no_fused_kernel_does(dtype: Any, ksizes: Any, channels: Any, why: str) -> None:
    for engine in ("auto", "composed", *([] if why else ["fused"])):
        tune._check_engine(engine, 0, dtype, ksizes, channels)
    if why:
        with pytest.raises(ValueError, match=f"^engine: expected 'auto' or 'composed' for {why}, got 'fused'$"):
            tune._check_engine("fused", 0, dtype, ksizes, channels)


def test_made_up_numbers() -> None:
    found = tune._numbers(np, (50, 40), 0.25, np.dtype(np.float16))
    assert (found.shape, found.dtype) == ((50, 40), np.float16)
    assert abs(found.astype(float).mean()) < 0.01
    assert 0.24 < np.abs(found).max() <= 0.25
    assert len(np.unique(found)) > 500


#: What every composed call launches of ours; batch norms on stacks take another kernel.
COMPOSED = {"gather.cu", "scatter.cu"}


@pytest.mark.parametrize(
    ("channels", "ksizes", "engine", "kernels"),
    [
        (8, [(3, 3)], "auto", {"conv.cu"}),
        (8, [(3, 3)], "fused", {"conv.cu"}),
        (8, [(3, 3)], "composed", COMPOSED),
        (640, [(1, 1)], "auto", COMPOSED),  # more channels than the fused kernels are the faster ones for
        (640, [(1, 1)], "fused", {"conv.cu"}),
        # In place, on more tiles than run at a time.
        ([16, 8, 8, 16], BOTTLENECK, "auto", {"bottleneck.cu", "scatter.cu"}),
        ([16, 8, 8, 16], BOTTLENECK, "fused", {"bottleneck.cu", "scatter.cu"}),
        ([16, 8, 8, 16], BOTTLENECK, "composed", {*COMPOSED, "activate.cu"}),
        ([16, 8, 8, 24], BOTTLENECK, "auto", COMPOSED),
        (8, [(3, 3), (3, 3)], "auto", COMPOSED),
        (8, [(3, 3), (3, 3)], "composed", COMPOSED),
    ],
)
def test_what_is_measured(channels: Any, ksizes: Any, engine: str, kernels: set[str]) -> None:
    """The functions of the library that do a chain at once, where there are such, with the engine that is asked for."""
    layers = tuple(make_chain((40, 40), ksizes, [(1, 1)] * len(ksizes), ["SAME"] * len(ksizes)))
    widths = tune._parse_channels(channels, len(ksizes))
    with cpu_cuda.recording() as found, host_products():
        weights = [standin.zeros((*k, c, d), HALF) for k, c, d in zip(ksizes, widths, widths[1:])]
        images = [standin.zeros((1, 40, 40, c), HALF) for c in (widths[0], widths[-1])]
        indices = BlockIndices(standin.zeros((9, 3), np.int32), standin.zeros((1,), np.int32))
        inputs = tune._ChainInputs(standin, layers, images[0], weights, images[1], engine)
        call = tune._call_of(inputs, block_params(layers, (10, 10)), indices)
        found.clear()
        call()
    ours = {instance.source for instance in found}
    assert kernels <= ours
    assert ours.isdisjoint({"conv.cu", "bottleneck.cu"} - kernels)


@pytest.mark.gpu
class TestDevice:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
    def test_it_measures(self, dtype: str) -> None:
        import cupy

        mask = cupy.asarray(scattered())
        tuning = tune_block_size(mask, [16, 8, 8, 16], BOTTLENECK, dtype=dtype, candidates=[6, (10, 18), 34])
        assert tuning.measured
        on_host = tune_block_size(scattered(), [16, 8, 8, 16], BOTTLENECK, dtype=dtype, candidates=[6, (10, 18), 34])
        assert [row[:3] for row in tuning.table] == [row[:3] for row in on_host.table]
        assert all(0 < row.seconds < 0.1 for row in tuning.table)
        assert tuning.params.bsize == min(tuning.table, key=lambda row: row.seconds).bsize

    @pytest.mark.parametrize("engine", ["fused", "composed"])
    def test_it_measures_either_engine(self, engine: str) -> None:
        import cupy

        mask = cupy.asarray(scattered())
        for channels, ksizes in ((16, [(3, 3)]), ([16, 8, 8, 16], BOTTLENECK)):
            tuning = tune_block_size(mask, channels, ksizes, dtype="float16", candidates=[6, 18], engine=engine)
            assert tuning.measured
            assert all(0 < row.seconds < 0.1 for row in tuning.table)

    def test_extremes(self) -> None:
        """Where one block size computes many times as much as another, it is not chosen."""
        import cupy

        many = tune_block_size(cupy.asarray(full(512, 512)), 64, [(3, 3)], dtype="float32", candidates=[3, 34])
        assert many.params.bsize == (34, 34)
        few = cupy.asarray(scattered(2000, 2000))
        assert tune_block_size(few, 64, [(3, 3)], dtype="float32", candidates=[6, 42]).params.bsize == (6, 6)

    def test_nothing_active(self) -> None:
        import cupy

        tuning = tune_block_size(cupy.zeros((1, 40, 40), bool), 4, [(3, 3)], dtype="float32", candidates=[5, 8])
        assert [row.active_blocks for row in tuning.table] == [0, 0]

    def test_the_current_stream_and_memory_stay(self) -> None:
        import cupy

        mask = cupy.asarray(scattered())
        before = cupy.cuda.get_current_stream()
        tune_block_size(mask, 8, [(3, 3)], dtype="float32", candidates=[10])
        assert cupy.cuda.get_current_stream() == before
        pool = cupy.get_default_memory_pool()
        used = pool.used_bytes()
        tune_block_size(mask, 8, [(3, 3)], dtype="float32", candidates=[10])
        assert pool.used_bytes() == used
