"""The benchmarks of networks: what they measure, expect, check, compare and draw. The runs are in test_bench.py."""

from __future__ import annotations

import json
import math
import os
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_device
import networks as oracle
import numpy as np
import pytest
from fake_device import TINY_STAGES, FakeStream, fake_run

import sbnet_cupy
from bench import __main__ as command
from bench import contest, masks, network_data, network_plots, network_rivals, networks, rivals, stages, table, timing
from bench.network_data import Scene
from bench.networks import Sparse
from bench.stages import PRECISIONS, Network

KINDS = ("conv", "bottleneck")
TIMING = timing.Timing(100.0, 80.0, 125.0, 25, "graph")


@pytest.fixture(autouse=True)
def _without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "find_torch", lambda: None)


every_network = pytest.mark.parametrize(
    "network",
    [Network(kind, TINY_STAGES[0], precision) for kind in KINDS for precision in PRECISIONS],
    ids=lambda network: f"{network.kind} {network.precision.name}",
)


def sparse_case(network: Network, bsize: int = 7, turns: int = 1) -> Sparse:
    """Roads, so that some blocks hang over an edge and some are inactive."""
    mask = masks.road_mask(*network.shape[1:3])
    return Sparse(Scene(np, network), mask, network.params(bsize), turns)


class TestMasks:
    def test_top_left_is_a_rectangle_of_the_image_s_proportions(self) -> None:
        mask = masks.top_left_mask(20, 40, 0.75)
        assert (mask.shape, mask.dtype) == ((1, 20, 40), np.float32)
        assert mask[0, :10, :20].all()
        assert mask.sum() == 200

    @pytest.mark.parametrize("sparsity", stages.SPARSITIES)
    def test_top_left_leaves_the_sparsity(self, sparsity: float) -> None:
        for stage in stages.STAGES:
            active = masks.top_left_mask(stage.height, stage.width, sparsity).mean()
            # Up to a row and a column more.
            assert 0 <= active - (1 - sparsity) <= 1 / stage.height + 1 / stage.width

    def test_roads_leave_three_quarters(self) -> None:
        for stage in stages.STAGES:
            mask = masks.road_mask(stage.height, stage.width)
            assert set(np.unique(mask)) == {0.0, 1.0}
            assert mask.mean() == pytest.approx(0.25, abs=0.005)
            assert mask[0, :, 0].any()
            assert mask[0, :, -1].any()

    def test_vessels_are_thin_and_everywhere(self) -> None:
        pytest.importorskip("skimage")
        mask = masks.vessel_mask(400, 700)
        assert (mask.shape, mask.dtype) == ((1, 400, 700), np.float32)
        assert 0.04 < mask.mean() < 0.1
        # In most parts of the image there are some, and nowhere is there a lake of them.
        parts = mask[0].reshape(8, 50, 10, 70).mean(axis=(1, 3))
        assert (parts > 0).mean() > 0.7
        assert parts.max() < 0.5

    def test_vessels_are_cropped_not_squeezed(self) -> None:
        pytest.importorskip("skimage")
        whole = masks.vessel_mask(1411, 1411)[0]
        wide = masks.vessel_mask(100, 200)[0]
        # Half of the photograph's height, 353 to 1058, in 100 rows; a pixel is set where any pixel in it is.
        top = 1411 / 4
        for i, j in ((20, 30), (50, 100), (81, 150)):
            rows = [y for y in range(1411) if math.floor((y - top) * 100 / (1411 / 2)) == i]
            columns = [x for x in range(1411) if math.floor(x * 200 / 1411) == j]
            assert wide[i, j] == whole[np.ix_(rows, columns)].max()


class TestStages:
    def test_goals_and_figures(self) -> None:
        mask = stages.mask_name(0.9)
        found = {
            (kind, network.stage.height, network.precision.name): (
                target.bound if (target := network.goal(mask)) else None,
                network.original(mask),
            )
            for kind in KINDS
            for network in stages.networks(kind, quick=False)
            if network.is_main
        }
        assert len(found) == 24
        assert found["conv", 400, "tf32"] == (6, "29.7 us, 3.39 x dense in the paper")
        assert found["conv", 50, "float16"] == (4, "0.88 x dense in the paper")
        assert found["bottleneck", 200, "tf32"] == (12, "81 us, 6.27 x dense in the paper")
        assert found["bottleneck", 400, "float16"] == (8, "8.22 x dense in the paper")
        assert found["bottleneck", 50, "float32"] == (None, "61 us, 1.64 x dense in the paper")

    def test_only_the_mask_of_the_goals_has_them(self) -> None:
        network = Network("bottleneck", stages.STAGES[2], PRECISIONS[1])
        assert network.goal("roads") is None
        assert network.goal(stages.mask_name(0.8)) is None
        assert network.original("roads") == "1.65 x dense in the paper (road map, 75% sparse)"
        assert network.original("vessels") == "2.26 x dense in the paper (mask of a PSPNet, 90% sparse)"
        assert network.original("other") == ""
        assert Network("conv", stages.STAGES[6], PRECISIONS[1]).original(stages.mask_name(0.9)) == ""

    def test_names_are_unique(self) -> None:
        for kind in KINDS:
            for quick in (False, True):
                names = [network.name for network in stages.networks(kind, quick)]
                assert len(set(names)) == len(names)
        assert Network("conv", stages.STAGES[0], PRECISIONS[1]).name == "resnet-v2 400x700x24 tf32"
        assert Network("bottleneck", stages.STAGES[7], PRECISIONS[2]).name == "resnet-50 50x88x2048/512 float16"

    def test_block_sizes(self) -> None:
        sizes = {
            s: Network("conv", stages.STAGES[k], PRECISIONS[0]).block_sizes(False) for k, s in ((0, 400), (2, 100))
        }
        assert {size for size in sizes[400] if size % 2} == set(range(11, 34, 2))
        assert {size for size in sizes[100] if size % 2} == set(range(5, 22, 2))
        assert {12, 18, 34} <= set(sizes[400])
        assert {6, 10, 18} <= set(sizes[100])
        other = Network("conv", stages.STAGES[5], PRECISIONS[0])
        assert other.block_sizes(False) == (8, 10, 12, 14, 18, 20, 26)
        assert other.block_sizes(True) == (10, 18)

    def test_every_size_has_blocks(self) -> None:
        for kind in KINDS:
            for network in stages.networks(kind, quick=False):
                for size in (*network.block_sizes(False), *network.block_sizes(True)):
                    params = network.params(size)
                    assert params.bsize_out == (size - 2, size - 2)
                    assert params.boffset == (-1, -1)

    def test_costs(self) -> None:
        conv = Network("conv", stages.STAGES[0], PRECISIONS[1])
        assert conv.flops(10) == 2 * 10 * 9 * 24 * 24
        assert conv.bytes(10) == 4 * (10 * 48 + 9 * 24 * 24)
        block = Network("bottleneck", stages.STAGES[0], PRECISIONS[2])
        weights = 96 * 24 + 9 * 24 * 24 + 24 * 96
        assert block.flops(10) == 2 * 10 * weights
        assert block.bytes(10) == 2 * (10 * 192 + weights)

    def test_floor(self) -> None:
        network = Network("conv", stages.STAGES[0], PRECISIONS[0])
        moved = network.bytes(28_000) / 4e6
        computed = network.flops(28_000) / 67e6
        assert moved < computed
        assert network.floor_us(28_000, 4.0, "NVIDIA H200") == pytest.approx(computed + 0.53)
        in_half = replace(network, precision=PRECISIONS[2])
        assert in_half.floor_us(28_000, 4.0, "NVIDIA H200") == pytest.approx(in_half.bytes(28_000) / 4e6 + 0.53)
        assert network.floor_us(28_000, 4.0, "another") is None


def padded_too_early(scene: Scene) -> np.ndarray[Any, Any]:
    """The bottleneck as the original computes it: zeros around the image go through batch norm and ReLU."""
    wider = np.pad(scene.image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    inner = wider.astype(np.float64)
    for k, w in enumerate(scene.convs):
        inner = np.maximum(inner * scene.scales[k] + scene.shifts[k], 0)
        inner = oracle.correlate(inner, w.astype(np.float64), (1, 1), "VALID")
    result: np.ndarray[Any, Any] = (scene.image + inner).astype(scene.image.dtype)
    return result


class TestExpectation:
    @every_network
    def test_it_is_that_of_the_specification(self, network: Network) -> None:
        scene = Scene(np, network)
        tf32, dtype = network.precision.tf32, np.dtype(network.precision.dtype)
        if network.kind == "conv":
            oracle_result = oracle.convolved(oracle.exactly(scene.image), scene.convs[0], (1, 1), "SAME", dtype, tf32)
        else:
            oracle_result = oracle.bottleneck(scene.image, scene.weights, (1, 1), tf32)
        assert np.allclose(scene.expected.value, oracle_result.value, rtol=1e-12, atol=1e-12)
        # The other bound is of one way to compute it: no looser, and of the same order.
        assert (scene.expected.error >= oracle_result.error * 0.999).all()
        assert np.median(scene.expected.error / oracle_result.error) < 8

    @every_network
    def test_errors_are_noticed(self, network: Network) -> None:
        scene = Scene(np, network)
        dtype = network.precision.dtype
        right = scene.expected.value.astype(dtype)
        assert scene.is_right(right)
        for change in (np.nan, np.inf, 3 * scene.expected.error[0, -1, -1, -1]):
            wrong = right.copy()
            wrong[0, -1, -1, -1] = scene.expected.value[0, -1, -1, -1] + change
            assert not scene.is_right(wrong)
        assert not scene.is_right(right[:, :-1])
        assert not scene.is_right(right.astype(np.float64))
        assert not scene.is_right(np.zeros_like(right))

    @every_network
    def test_a_lost_pixel_of_the_kernel_is_noticed(self, network: Network) -> None:
        scene = Scene(np, network)
        center = scene.convs[len(scene.convs) // 2]
        kept = center.copy()
        center[2, 2] = 0
        lossy = scene.expect().value.astype(network.precision.dtype)
        center[...] = kept
        assert not scene.is_right(lossy)

    @pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: precision.name)
    def test_the_original_s_border_is_noticed(self, precision: stages.Precision) -> None:
        scene = Scene(np, Network("bottleneck", TINY_STAGES[0], precision))
        result = padded_too_early(scene)
        inner = np.zeros(result.shape[:3], bool)
        inner[:, 1:-1, 1:-1] = True
        assert scene.is_right(result, inner, base=result)
        assert not scene.is_right(result)

    @every_network
    def test_outside_every_bit_counts(self, network: Network) -> None:
        scene = Scene(np, network)
        inside = np.zeros(network.shape[:3], bool)
        inside[0, :9] = True
        right = np.where(inside[..., None], scene.expected.value.astype(scene.base.dtype), scene.base)
        assert scene.is_right(right, inside)
        wrong = right.copy()
        wrong.view(f"u{wrong.itemsize}")[0, 9, 0, 0] ^= 1
        assert not scene.is_right(wrong, inside)

    @pytest.mark.parametrize("kind", KINDS)
    def test_masked_convolutions(self, kind: str) -> None:
        network = Network(kind, TINY_STAGES[0], PRECISIONS[0])
        scene = Scene(np, network)
        mask = masks.top_left_mask(*network.shape[1:3], 0.5)
        found = scene.expect(keep=mask)
        last_row, last_column = int(mask[0, :, 0].sum()) - 1, int(mask[0, 0].sum()) - 1
        deep_inside = (slice(0, 1), slice(0, last_row), slice(0, last_column))
        assert np.array_equal(found.value[deep_inside], scene.expected.value[deep_inside])
        assert not np.array_equal(found.value[:, last_row], scene.expected.value[:, last_row])
        everything = scene.expect(keep=np.ones_like(mask))
        assert np.array_equal(everything.value, scene.expected.value)


def test_random_numbers() -> None:
    found = network_data.uniform(np, (40, 50), -1, 1, "float32", 3)
    assert (found.shape, found.dtype) == ((40, 50), np.float32)
    assert (found >= -1).all()
    assert (found < 1).all()
    assert abs(found.mean()) < 0.05
    assert found.var() == pytest.approx(1 / 3, rel=0.05)
    assert np.array_equal(found, network_data.uniform(np, (40, 50), -1, 1, "float32", 3))
    scene = Scene(np, Network("bottleneck", stages.STAGES[3], PRECISIONS[0]))
    for w, gain in zip(scene.convs, (1, 1, network_data.RESIDUAL_GAIN)):
        assert w.var() * math.prod(w.shape[:3]) == pytest.approx(2 * gain**2, rel=0.05)
    assert all(shift.min() < -0.4 for shift in scene.shifts)


@pytest.mark.parametrize("bsize", [3, 6, 7, 18, 40])
@pytest.mark.parametrize("make", [masks.road_mask, lambda h, w: masks.top_left_mask(h, w, 0.9)])
def test_active_tiles_are_those_of_the_library(bsize: int, make: Callable[[int, int], Any]) -> None:
    network = Network("bottleneck", TINY_STAGES[0], PRECISIONS[0])
    mask, params = make(*network.shape[1:3]), network.params(bsize)
    active = network_data.active_blocks(mask, params)
    found = sbnet_cupy.block_indices(mask, params)
    assert np.array_equal(np.argwhere(active[np.newaxis]), found.active_block_indices)
    pixels = network_data.tile_pixels(active, params, *network.shape[1:3])
    assert np.array_equal(pixels, oracle.tiles(found, params, network.shape))


class TestContenders:
    def test_weights_are_packed_once_and_engines_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert [engine for _, engine, _ in networks.ENGINES] == ["fused", "composed", "composed"]
        calls: list[Any] = []
        for name in ("sparse_conv2d", "sparse_res_block_bottleneck"):
            monkeypatch.setattr(sbnet_cupy, name, lambda *given, **options: calls.append((given[1], options)))
        for kind, packed in (("conv", sbnet_cupy.PackedWeights), ("bottleneck", sbnet_cupy.PackedBottleneck)):
            calls.clear()
            sparse = replace(sparse_case(Network(kind, TINY_STAGES[0], PRECISIONS[1])), engine="fused")
            sparse.in_place(0), sparse.to_new_image(), replace(sparse, packs=False).in_place(0)
            assert [isinstance(weights, packed) for weights, _ in calls] == [True, True, False]
            assert all((o["engine"], o["allow_tf32"]) == ("fused", True) for _, o in calls)

    @every_network
    @pytest.mark.parametrize("bsize", [5, 8])
    def test_the_library_is_right(self, network: Network, bsize: int) -> None:
        sparse = sparse_case(network, bsize)
        for make in (
            sparse.contender,
            lambda: sparse.contender("with reduce_mask", reduce_mask=True),
            lambda: sparse.new_image_contender("to a new image"),
            lambda: replace(sparse, turns=3).contender("in turn"),
        ):
            contender = make()
            assert contender.check([call() for call in contender.calls])
            assert contender.note == f"{bsize}/{bsize - 2}"
            assert contender.name.startswith(table.OURS)
        assert len(replace(sparse, turns=3).contender().calls) == 3

    @every_network
    def test_a_result_that_is_left_out_is_noticed(self, network: Network) -> None:
        sparse = sparse_case(network)
        contender = sparse.contender()
        assert not contender.check([sparse.images[0]])
        (result,) = [call() for call in contender.calls]
        assert result is sparse.images[0]
        assert contender.check([result])
        result[0, -1, -1, 0] += result.dtype.type(1)
        assert not contender.check([result])

    @pytest.mark.parametrize("kind", KINDS)
    def test_images_are_restored(self, kind: str) -> None:
        sparse = sparse_case(Network(kind, TINY_STAGES[0], PRECISIONS[0]), turns=2)
        contender = sparse.contender()
        first = [call().copy() for call in contender.calls]
        for call in contender.calls:
            call()
        sparse.restore()
        assert all(np.array_equal(image, sparse.scene.base) for image in sparse.images)
        again = [call() for call in contender.calls]
        assert all(np.array_equal(a, b) for a, b in zip(first, again))

    def test_images_in_turn_exceed_the_cache(self) -> None:
        for kind in KINDS:
            network = Network(kind, stages.STAGES[0], PRECISIONS[1])
            turns, size = networks.images_in_turn(network, 28_000)
            assert size > 3 * 60e6
            assert 1 < turns <= networks.MOST_IMAGES
        # In place, a pixel is read and written: half of the bytes that are counted as moved.
        assert networks.images_in_turn(network, 28_000)[1] == turns * network.bytes(28_000) // 2


def row(implementation: str, median: float | None, **fields: Any) -> table.Row:
    parameters = fields.pop("parameters", {})
    return table.Row("c", implementation, median_us=median, parameters=parameters, **{"check": "equal", **fields})


class TestRows:
    def test_speedups_are_over_the_fastest_dense_of_the_same_clock(self) -> None:
        dense = {"mask": "dense"}
        rows = [
            row("eager", 300.0, clock="eager", parameters=dense),
            row("captured", 200.0, clock="graph", parameters=dense),
            row("compiled", 100.0, clock="graph", parameters=dense, check="WRONG"),
            row(table.OURS, 10.0, clock="graph", parameters=dense, check="WRONG"),
            row("absent", None, parameters=dense),
            row(table.OURS, 20.0, clock="graph"),
            row(table.OURS, 50.0, clock="eager"),
            row(table.OURS, 5.0, clock="host"),
            row(table.OURS, None, check="failed: no"),
        ]
        found = networks.with_speedups(rows)
        assert [r.speedup for r in found] == [1.0, 0.5, 1.0, 10.0, None, 5.0, 6.0, None, None]
        assert found[5].parameters == {"dense": "compiled", "dense_us": 100.0}

    def test_no_speedup_without_dense(self) -> None:
        assert networks.with_speedups([row(table.OURS, 1.0)]) == [row(table.OURS, 1.0)]

    def test_the_fastest_sizes_are_right(self) -> None:
        rows = [
            row(table.OURS, 1.0, check="WRONG", parameters={"bsize": 5}),
            row(table.OURS, None, check="failed: no", parameters={"bsize": 6}),
            row(table.OURS, 3.0, parameters={"bsize": 7}),
            row(table.OURS, 2.0, parameters={"bsize": 8}),
        ]
        assert networks.fastest_sizes(rows) == [8, 7]
        assert networks.fastest_sizes(rows[:2]) == []

    def test_a_contender_that_cannot_be_made(self) -> None:
        def broken() -> Any:
            raise MemoryError("out of\nmemory")

        found = contest.attempt("c", table.OURS, broken, lambda calls, run: TIMING, fake_run(), parameters={"a": 1})
        assert found == table.Row("c", table.OURS, check="failed: MemoryError: out of memory", parameters={"a": 1})
        assert found.failed


@pytest.fixture
def _fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(monkeypatch)


@pytest.fixture
def _tiny(_fake_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.shrink_networks(monkeypatch)


@pytest.mark.usefixtures("_tiny")
class TestRuns:
    def measure(self, kind: str = "conv", number: int = 0) -> list[table.Row]:
        run = replace(fake_run(), quick=False)
        return list(networks.tasks(kind, run))[number][1]()

    def test_what_is_measured(self) -> None:
        rows = self.measure()
        by_role = {role: [r for r in rows if r.parameters.get("role") == role] for role in ("sweep", "curve", "mask")}
        top_left = [r for r in by_role["sweep"] if r.parameters["sparsity"] == 0.9]
        assert [r.parameters["bsize"] for r in top_left] == [5, 6, 7, 8]
        assert [r.parameters["sparsity"] for r in by_role["curve"]] == [0.9, 0.6, 0.7, 0.8, 0.95, 0.99]
        assert {r.parameters["mask"] for r in by_role["mask"]} == {"roads", "vessels"}
        assert {r.parameters["reduce_mask"] for r in by_role["mask"]} == {False, True}
        assert sum(r.goal != "" for r in rows) == 1
        ours = [r for r in rows if r.implementation.startswith(table.OURS)]
        assert {r.check for r in ours} == {"equal"}
        assert all(r.speedup is not None for r in ours if r.clock == "graph")
        assert {r.clock for r in ours} == {"graph", "eager", "host"}

    def test_engines_are_measured_beside_each_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert [name for name, _, _ in networks.ENGINES] == ["cublas engine", "cudnn engine"]  # NumPy has no other
        monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)
        found = {r.implementation: r for r in self.measure("bottleneck")}
        row = found["sbnet_cupy, cublas engine"]
        assert (row.parameters["engine"], row.parameters["packs"], row.check) == ("composed", True, "equal")
        assert not found["sbnet_cupy, packed in every call"].parameters["packs"]
        assert "not installed" in found["cudnn engine"].note
        (goal,) = [r for r in self.measure("bottleneck") if r.goal]
        assert (goal.parameters["engine"], goal.parameters["packs"]) == ("auto", True)
        others = {r.implementation for r in self.measure("bottleneck", 1)}
        assert not {"sbnet_cupy, cublas engine", "cudnn engine"} & others

    def test_other_stages_are_measured_in_short(self) -> None:
        rows = self.measure(number=1)
        ours = [r for r in rows if r.implementation == table.OURS]
        assert [r.parameters["role"] for r in ours] == ["sweep", "sweep", "curve"] * 3
        assert [r.parameters["sparsity"] for r in ours] == [0.9] * 3 + [0.6] * 3 + [0.99] * 3
        assert not any(r.implementation.startswith("submanifold") for r in rows)

    def test_every_mask_is_at_the_best_size_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        best = {0.6: 8, 0.7: 8, 0.8: 7, 0.9: 7, 0.95: 6, 0.99: 5}
        attempt = networks.attempt

        def attempt_in_made_up_time(*arguments: Any, **fields: Any) -> table.Row:
            tried = fields["parameters"]
            made = attempt(*arguments, **fields)
            if tried.get("role") != "sweep" or tried["sparsity"] is None:
                return made
            return replace(made, median_us=1.0 + abs(tried["bsize"] - best[tried["sparsity"]]))

        monkeypatch.setattr(networks, "attempt", attempt_in_made_up_time)
        monkeypatch.setattr(networks, "SHORTLIST", 3)
        found = {role: {s: set() for s in best} for role in ("sweep", "curve")}
        for r in self.measure():
            if r.parameters.get("role") in found and r.parameters["sparsity"] is not None:
                found[r.parameters["role"]][r.parameters["sparsity"]].add(r.parameters["bsize"])
        assert found["sweep"] == {s: {5, 6, 7, 8} if s == 0.9 else {6, 7, 8} for s in best}
        assert found["curve"] == {0.6: {8}, 0.7: {8}, 0.8: {7}, 0.9: {7}, 0.95: {6}, 0.99: {6}}  # 5 is not on the list

    def test_a_block_size_that_fails_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Sparse.in_place

        def in_place(self: Sparse, turn: int, indices: Any = None) -> Any:
            if self.params.bsize == (6, 6):
                raise MemoryError("no room")
            return original(self, turn, indices)

        monkeypatch.setattr(Sparse, "in_place", in_place)
        rows = self.measure()
        failed = [r for r in rows if r.failed]
        assert {(r.check, r.parameters["bsize"]) for r in failed} == {("failed: MemoryError: no room", 6)}
        assert any(r.parameters.get("role") == "curve" for r in rows)

    def test_what_fails_between_contenders_is_told_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(networks, "top_left_case", lambda sparsity: 1 / 0)
        rows = self.measure()
        assert rows[-1].check == "failed: ZeroDivisionError: division by zero"
        assert rows[-1].failed
        assert rows[0].parameters["mask"] == "dense"

    def test_without_the_photograph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "skimage", None)
        masks._retina_vessels.cache_clear()
        rows = self.measure()
        (absent,) = [r for r in rows if r.implementation == "vessels"]
        assert "skimage" in absent.note
        assert not absent.failed

    def test_wrong_results_fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Scene, "is_right", lambda *arguments: False)
        rows = self.measure("bottleneck", 1)
        assert {r.check for r in rows if r.implementation.startswith(table.OURS)} == {"WRONG"}


def test_engines_are_chosen_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBNET_CUPY_CONV", raising=False)
    with networks.chosen_engine("cudnn"):
        assert os.environ["SBNET_CUPY_CONV"] == "cudnn"
        with networks.chosen_engine("cublas"):
            assert os.environ["SBNET_CUPY_CONV"] == "cublas"
        assert os.environ["SBNET_CUPY_CONV"] == "cudnn"
    assert "SBNET_CUPY_CONV" not in os.environ


class TestClocks:
    @pytest.mark.usefixtures("_fake_device")
    def test_long_calls_are_captured_less_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        captured: list[int] = []

        def capturing(calls: Any, rounds: int, stream: Any) -> Any:
            captured.append(rounds * len(calls))
            return types.SimpleNamespace(launch=lambda stream: None)

        for apart_ms in (0.01, 0.05, 0.5, 5):
            monkeypatch.setattr(sys.modules["cupy"].cuda, "get_elapsed_time", lambda a, b, ms=apart_ms: ms)
            timing.time_captured([lambda: None], 3, FakeStream(), capturing=capturing)
        assert captured == [20, 20, 4, 1]

    @pytest.mark.usefixtures("_fake_device")
    def test_inputs_are_restored_before_each_sample(self) -> None:
        order: list[str] = []
        timing.time_eager([lambda: order.append("call")], 3, FakeStream(), lambda: order.append("before"))
        once = ["before"] + ["call"] * timing.EAGER_CALLS
        assert order[-3 * len(once) :] == 3 * once

    @pytest.mark.usefixtures("_fake_device")
    def test_eager_time_is_that_of_one_call(self) -> None:
        found = timing.time_eager([lambda: None, lambda: None], 4, FakeStream())
        assert (found.clock, found.repeats, found.median_us) == ("eager", 4, pytest.approx(50 / timing.EAGER_CALLS))


class TestRivals:
    def test_reasons(self) -> None:
        scene = Scene(np, Network("conv", TINY_STAGES[0], PRECISIONS[1]))
        mask = masks.road_mask(*scene.network.shape[1:3])
        for rival in (
            network_rivals.dense_contender(network_rivals.EAGER, scene),
            network_rivals.submanifold_contender("submanifold", scene, mask, cached=True),
        ):
            assert rival == rivals.Absent(rival.name, "PyTorch not installed")

    def test_no_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rivals, "find_torch", lambda: types.ModuleType("torch"))
        monkeypatch.setattr(network_rivals, "find_submanifold", lambda: None)
        scene = Scene(np, Network("conv", TINY_STAGES[0], PRECISIONS[1]))
        rival = network_rivals.submanifold_contender("submanifold", scene, np.ones((1, 2, 2)), cached=True)
        assert "pip install spconv-triton" in rival.note

    def test_what_is_not_compiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(rivals, "find_torch", lambda: torch)
        for network, words in (
            (Network("conv", TINY_STAGES[0], PRECISIONS[0]), "as it is"),
            (Network("bottleneck", TINY_STAGES[1], PRECISIONS[1]), "ten seconds"),
            (Network("bottleneck", TINY_STAGES[0], PRECISIONS[0]), "ten seconds"),
        ):
            rival = network_rivals.dense_contender(network_rivals.COMPILED, Scene(np, network))
            assert isinstance(rival, rivals.Absent)
            assert words in rival.note

    @every_network
    def test_dense(self, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
        """PyTorch's network, on the CPU, is the one that the library is compared with."""
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(rivals, "find_torch", lambda: torch)
        scene = Scene(np, network)
        with network_rivals.torch_arithmetic(network.precision):
            assert torch.backends.cudnn.allow_tf32 == network.precision.tf32
            rival = network_rivals.dense_contender(network_rivals.EAGER, scene)
            (result,) = [call() for call in rival.calls]
            assert rival.check([result])
            assert result.is_contiguous(memory_format=torch.channels_last)
            assert not rival.check([result + 1])

    @every_network
    @pytest.mark.parametrize("cached", [False, True])
    def test_submanifold(self, network: Network, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        torch = pytest.importorskip("torch")
        package = types.SimpleNamespace(__name__="fake", constants=types.SimpleNamespace(SPCONV_ALLOW_TF32=None))
        monkeypatch.setattr(rivals, "find_torch", lambda: torch)
        monkeypatch.setattr(network_rivals, "find_submanifold", lambda: (package, fake_spconv(torch)))
        scene = Scene(np, network)
        mask = masks.road_mask(*network.shape[1:3])
        with network_rivals.torch_arithmetic(network.precision):
            rival = network_rivals.submanifold_contender("submanifold", scene, mask, cached)
            (call,) = rival.calls
            for _ in range(2):
                result = call()
                assert result.shape == (int(mask.sum()), network.channels)
                assert rival.check([result])
            assert not rival.check([result + 1])
        assert network.precision.tf32 == package.constants.SPCONV_ALLOW_TF32

    def test_tiles_of_the_autotuner(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tiles = [(64, 16, 16), (64, 32, 32), (64, 32, 32), (128, 64, 32), (256, 64, 64), (64, 32, 128), (64, 64, 64)]
        configs = [types.SimpleNamespace(kwargs=dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_R"), tile))) for tile in tiles]
        kernel = types.SimpleNamespace(configs=configs)
        module = types.SimpleNamespace(_gather_gemm_kernel=kernel)
        monkeypatch.setitem(sys.modules, "spconv_triton.pytorch._impl.gemm", module)
        for channels, wanted in ((24, [1]), (48, [1, 3, 6]), (96, [1, 3, 6]), (8, [1]), (33, [1, 3, 6])):
            network_rivals._narrow_tiles(channels)
            assert kernel.configs == [configs[k] for k in wanted]
        kernel.every_config = configs[:1]  # none that suits: better any than none
        network_rivals._narrow_tiles(48)
        assert kernel.configs == configs[:1]
        del module._gather_gemm_kernel  # another version
        network_rivals._narrow_tiles(48)


def fake_spconv(torch: Any) -> Any:
    """spconv's interface over a dense convolution: weights [K, kh, kw, C], neighbours kept by their key."""

    class SparseConvTensor:
        def __init__(self, features: Any, indices: Any, shape: Any, batch: int, indice_dict: Any = None) -> None:
            assert indices.dtype == torch.int32
            assert batch == 1
            self.features, self.indices, self.shape = features, indices, shape
            self.indice_dict = indice_dict or {}

    class SubMConv2d(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self, c: int, k: int, size: int, padding: int, bias: bool, indice_key: str) -> None:
            super().__init__()
            assert not bias
            self.weight = torch.nn.Parameter(torch.empty(k, size, size, c))
            self.key = indice_key

        def forward(self, x: Any) -> Any:
            n, rows, columns = x.indices.long().T
            dense = torch.zeros(1, *x.shape, x.features.shape[1], dtype=x.features.dtype)
            dense[n, rows, columns] = x.features
            result = torch.nn.functional.conv2d(
                dense.permute(0, 3, 1, 2), self.weight.permute(0, 3, 1, 2), padding="same"
            )
            features = result.permute(0, 2, 3, 1)[n, rows, columns]
            return SparseConvTensor(features, x.indices, x.shape, 1, {self.key: "table"})

    return types.SimpleNamespace(SparseConvTensor=SparseConvTensor, SubMConv2d=SubMConv2d)


def made_up_results(kind: str) -> dict[str, Any]:
    """The JSON of a whole run, with smooth figures."""
    rows = []
    for network in stages.networks(kind, quick=False):
        common = {
            "kind": kind,
            "network": network.stage.network,
            "stage": network.name.split()[1],
            "precision": network.precision.name,
        }
        points = [("curve", {"sparsity": s, "bsize": 18}, 0.5 / (1 - s)) for s in network.sparsities(False)]
        points += [("sweep", {"sparsity": 0.9, "bsize": b}, 5 - abs(b - 18) / 8) for b in network.block_sizes(False)]
        points += [("sweep", {"sparsity": s, "bsize": 10}, 1.0) for s in (None, 0.6)]
        points += [("detail", {"sparsity": 0.9, "bsize": 10}, 1.0)]
        for role, fields, speedup in points:
            median = 100 / speedup
            clock = timing.Timing(median, 0.8 * median, 1.25 * median, 25, "graph")
            made = table.timed_row("c", table.OURS, clock, check="equal", parameters={**common, "role": role, **fields})
            rows.append(vars(replace(made, speedup=speedup)))
    return {"machine": {"device": "A made-up device"}, "results": rows}


class TestPlots:
    @pytest.mark.parametrize("kind", KINDS)
    def test_pictures(self, kind: str, tmp_path: Path) -> None:
        (tmp_path / f"{kind}.json").write_text(json.dumps(made_up_results(kind)))
        assert command.main(["plots", "--output", str(tmp_path)]) == 0
        names = [f"{kind}_block_size.png", f"{kind}_speedup.png"]
        assert sorted(path.name for path in tmp_path.glob("*.png")) == names
        for name in names:
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    def test_lines(self) -> None:
        rows = network_plots.plotted(made_up_results("conv")["results"], "curve", "sparsity")
        rows = [r for r in rows if r["parameters"]["network"] == "resnet-v2"]
        rows = [r for r in rows if r["parameters"]["precision"] == "tf32"]
        lines = network_plots.series(rows, "sparsity")
        assert list(lines) == ["400x700x24", "200x350x48", "100x175x64", "50x88x96"]
        x, y, below, above = lines["400x700x24"]
        assert x == list(stages.SPARSITIES)
        assert y == pytest.approx([0.5 / (1 - s) for s in x])
        assert below[0] == pytest.approx(y[0] * (1 - 1 / 1.25))
        assert above[0] == pytest.approx(y[0] * (1 / 0.8 - 1))

    def test_a_stage_has_one_colour(self) -> None:
        results = made_up_results("conv")["results"]
        for role, column in (("curve", "sparsity"), ("sweep", "bsize")):
            rows = network_plots.plotted(results, role, column)
            stage = [r for r in rows if r["parameters"]["network"] == "resnet-v2"]
            assert list(network_plots.series(stage, column)) == ["400x700x24", "200x350x48", "100x175x64", "50x88x96"]

    def test_what_is_left_out(self) -> None:
        results = made_up_results("conv")["results"]
        count = len(network_plots.plotted(results, "sweep", "bsize"))
        assert count == sum(len(network.block_sizes(False)) for network in stages.networks("conv", False))
        for found in results:
            if found["parameters"]["bsize"] == 18:
                found["check"] = "WRONG"
            if found["parameters"]["bsize"] == 12:
                found["speedup"] = None
        left = {r["parameters"]["bsize"] for r in network_plots.plotted(results, "sweep", "bsize")}
        assert {10, 14} <= left
        assert not {12, 18} & left

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        (tmp_path / "conv.json").write_text(json.dumps({"machine": {"device": "d"}, "results": []}))
        assert network_plots.draw(tmp_path / "conv.json", tmp_path) == []
