"""Calls of the public functions that take the fused kernels, and what must come out: on a CPU and on a GPU the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import networks
import numpy as np
import pytest
from cases import Array, identical, lay_out
from cpu_cuda import KernelFault, Order, device, guarded, recording, standin
from cpu_cuda.calls import Difference, counters
from cpu_cuda.products import HostMultiplier
from networks import Bounded, Geometry, Pair

from sbnet_cupy import (
    BlockIndices,
    BlockParams,
    BottleneckWeights,
    _bottleneck,
    _conv,
    _fused_bottleneck_plan,
    _fused_conv_plan,
    _fused_wgmma_bottleneck_plan,
    _fused_wgmma_plan,
    block_indices,
    calc_block_params,
    calc_block_params_res_block,
    pack_weights,
    sparse_conv2d,
    sparse_res_block_bottleneck,
)
from sbnet_cupy._instances import Instance
from sbnet_cupy._packing import pack
from sbnet_cupy._warps import WARPS, WarpLayout

FLOAT32 = np.dtype(np.float32)
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "tf32": FLOAT32,
    "float32": FLOAT32,
}


#: Bytes in which the weights of a small product, or the results of a pass, have room.
ROOM = 16 << 10

Pick = Callable[[list[Any], Any], Any]

#: Plans that the model would not take for small problems, by name: one of all that fit, or the model's with a change.
#: A name that is of one kind alone leaves the other the model's.
CONV_PLANS: dict[str, Pick] = {
    "split": lambda plans, chosen: max(plans, key=lambda plan: plan.splits),
    "tiles": lambda plans, chosen: max(  # that hang over the block
        plans, key=lambda plan: (math.prod(plan.tiles) > 1, sum(map(math.prod, zip(plan.tile, plan.tiles))))
    ),
    "cut": lambda plans, chosen: max(plans, key=lambda plan: math.prod(plan.tiles)),
    "flat": lambda plans, chosen: max(plans, key=lambda plan: (plan.layout.depth == 1, plan.layout.n)),
}
#: The same for convolutions by warpgroups: with one of these names, those that can have no other kernel, and with one
#: of those above not this one.
WGMMA_PLANS: dict[str, Pick] = {
    "wgmma": lambda plans, chosen: chosen,
    "wgmma-parts": lambda plans, chosen: max(plans, key=lambda plan: (plan.parts, plan.chunk)),
    "wgmma-chunks": lambda plans, chosen: max(plans, key=lambda plan: (plan.chunks, plan.parts)),
    "wgmma-squares": lambda plans, chosen: max(plans, key=lambda plan: (plan.layout.m, plan.layout.groups_m)),
    "wgmma-columns": lambda plans, chosen: max(
        plans, key=lambda plan: (plan.splits, -plan.layout.groups_m, -plan.layout.depth)
    ),
    "wgmma-depth": lambda plans, chosen: max(
        plans, key=lambda plan: (plan.layout.depth, plan.layout.m, plan.chunks, plan.parts)
    ),
}
BOTTLENECK_PLANS: dict[str, Pick] = {
    "tiles": CONV_PLANS["tiles"],
    "distant": lambda plans, chosen: chosen._replace(near=0, parts=1),
    "near-second": lambda plans, chosen: chosen._replace(near=2, parts=1, shared=chosen.shared + ROOM),
    "parts": lambda plans, chosen: chosen._replace(near=chosen.near | 1, parts=2, shared=chosen.shared + ROOM),
    "passes": lambda plans, chosen: chosen._replace(
        layouts=(*chosen.layouts[:2], WarpLayout(1, 1, WARPS, 1)), shared=chosen.shared + ROOM
    ),
}
#: The same for bottlenecks by warpgroups, which only those with one of these names are.
WGMMA_BOTTLENECK_PLANS: dict[str, Pick] = {
    "groups": lambda plans, chosen: min(plans, key=lambda plan: math.prod(plan.tile)),
    "groups-squares": lambda plans, chosen: max(plans, key=lambda plan: math.prod(plan.tile)),
    "groups-wide": lambda plans, chosen: max(plans, key=lambda plan: plan.tile[1] - plan.tile[0]),
    "groups-high": lambda plans, chosen: max(plans, key=lambda plan: plan.tile[0] - plan.tile[1]),
}
#: Those that only Hopper can follow.
HOPPER_PLANS = {**WGMMA_PLANS, **WGMMA_BOTTLENECK_PLANS}


def _chosen(plans: list[Any], chosen: Any) -> Any:
    return chosen


@contextmanager
def planned(name: str) -> Iterator[None]:
    """Let the fused kernels have the plan of this name, or with an empty one the model's.

    Bottlenecks are one launch where they can be, however long it takes.
    """
    from sbnet_cupy import _fused, _fused_network

    caches = [f for module in (_conv, _bottleneck) for f in vars(module).values() if hasattr(f, "cache_clear")]

    def plan_wgmma(problem: Any, rows: int, limits: Any) -> Any:
        if name in CONV_PLANS:
            return None, math.inf
        chosen, clocks = _fused_wgmma_plan.plan_wgmma(problem, rows, limits)
        plans = list(_fused_wgmma_plan.wgmma_plans(problem, limits))
        return chosen and WGMMA_PLANS.get(name, _chosen)(plans, chosen), clocks

    def plan_conv(problem: Any, rows: int, limits: Any) -> Any:
        if name in WGMMA_PLANS and not problem.activates and not problem.adds:
            return None, math.inf
        chosen, clocks = _fused_conv_plan.plan_conv(problem, rows, limits)
        plans = list(_fused_conv_plan.conv_plans(problem, limits))
        return chosen and CONV_PLANS.get(name, _chosen)(plans, chosen), clocks

    def plan_bottleneck(problem: Any, rows: int, image: Any, limits: Any, in_place: bool) -> Any:
        chosen, clocks = _fused_bottleneck_plan.plan_bottleneck(problem, rows, image, limits, in_place)
        plans = list(_fused_bottleneck_plan.bottleneck_plans(problem, limits))
        return chosen and BOTTLENECK_PLANS.get(name, _chosen)(plans, chosen), clocks

    def plan_wgmma_bottleneck(problem: Any, rows: int, image: Any, limits: Any, in_place: bool) -> Any:
        if name not in WGMMA_BOTTLENECK_PLANS:
            return None, math.inf
        plans = _fused_wgmma_bottleneck_plan.wgmma_bottleneck_plans(problem, limits)
        return (WGMMA_BOTTLENECK_PLANS[name](list(plans), None), 0.0) if plans else (None, math.inf)

    real_layers = _fused_network._prepare_layers

    def slow_layers(calls: Any, most_clocks: float) -> tuple[Any, ...]:
        return tuple(step._replace(clocks=1e30) for step in real_layers(calls, most_clocks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused_network, "_prepare_layers", slow_layers)
        patch.setattr(_fused, "plan_conv", plan_conv)
        patch.setattr(_fused, "plan_wgmma", plan_wgmma)
        patch.setattr(_fused, "plan_bottleneck", plan_bottleneck)
        patch.setattr(_fused, "plan_wgmma_bottleneck", plan_wgmma_bottleneck)
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


@contextmanager
def host_products() -> Iterator[None]:
    """NumPy in place of cuBLAS, for projections."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sbnet_cupy._cublas.Multiplier", HostMultiplier)
        yield


@dataclass(frozen=True)
class FusedCase:
    """A call of a public function, on arrays of any namespace."""

    name: str
    #: float16, bfloat16, tf32 or float32.
    arithmetic: str
    geometry: Geometry
    #: "new": the result is a new array; "out": given, full of other numbers; "place": what was there stays.
    target: str = "new"
    #: Of the image and the result.
    layout: str = "nhwc"
    packed: bool = True
    #: Triples of active blocks, instead of those of the geometry's mask; and the count that goes with them.
    triples: tuple[tuple[int, int, int], ...] | None = None
    count: int | None = None
    #: One of CONV_PLANS or BOTTLENECK_PLANS; empty: the model's.
    plan: str = ""

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES[self.arithmetic]

    @property
    def tf32(self) -> bool:
        return self.arithmetic == "tf32"

    def random(self, seed: int, shape: tuple[int, ...], dtype: Any = None) -> Array:
        return np.random.default_rng((self.geometry.seed, seed)).standard_normal(shape).astype(dtype or self.dtype)

    def indices(self, params: BlockParams) -> BlockIndices:
        if self.triples is None:
            mask = self.geometry.mask()
            count = int(block_indices(mask, params).bin_counts[0])
            return block_indices(mask, params, capacity=networks.capacity(self.geometry.spare, count))
        rows = np.array(self.triples, np.int32).reshape(-1, 3)
        return BlockIndices(rows, np.array([len(rows) if self.count is None else self.count], np.int32))

    def run(self, xp: Any, engine: str = "fused") -> Any:
        """Make the call."""
        raise NotImplementedError

    def assert_right(self, found: Any) -> None:
        """Raise AssertionError unless that is what must come out."""
        raise NotImplementedError

    # As cpu_cuda.calls.Call:

    def kernels(self) -> list[Instance]:
        """What it would launch on a CPU."""
        with recording() as found, host_products(), planned(self.plan):
            self.run(standin)
        return list(found)

    def check(self, order: Order, kernels: Path | None = None) -> None:
        """Raise `KernelFault` or `Difference` unless it computes what it must, on a CPU."""
        with device(order, kernels) as xp, host_products(), planned(self.plan):
            try:
                found = self.run(xp).get()
                meetings = [slab.owner.bytes().any() for slab in counters()]
            except KernelFault as fault:
                raise KernelFault(f"{self.name}: {fault}") from None
        if any(meetings):
            raise Difference(f"{self.name}: the counts of a meeting are not left at zero")
        try:
            self.assert_right(found)
        except AssertionError as error:
            raise Difference(f"{self.name}: {error}") from None


@dataclass(frozen=True)
class PackCase(FusedCase):
    """A call of ``pack_weights`` for weights of the geometry's kernel."""

    features: int = 8

    @property
    def weights(self) -> Array:
        return self.random(1, (*self.geometry.ksize, self.geometry.shape[3], self.features))

    def run(self, xp: Any, engine: str = "fused") -> Any:
        w = lay_out(self.weights, self.layout, xp)
        with guarded(xp, [w]):
            return pack_weights(w, allow_tf32=self.tf32).words

    def assert_right(self, found: Any) -> None:
        packing = pack_weights(self.weights).packing
        assert identical(found, pack(self.weights, packing, self.tf32)), "packed otherwise"


@dataclass(frozen=True)
class ConvCase(FusedCase):
    """A call of ``sparse_conv2d``."""

    features: int = 8
    bias: bool = False
    relu: bool = False

    @property
    def params(self) -> BlockParams:
        g = self.geometry
        return calc_block_params(g.shape, g.block(g.ksize, g.strides), g.ksize, g.strides, g.padding)

    @property
    def weights(self) -> Array:
        shape = (*self.geometry.ksize, self.geometry.shape[3], self.features)
        return (self.random(1, shape, float) / np.sqrt(shape[0] * shape[1] * max(1, shape[2]))).astype(self.dtype)

    @property
    def shift(self) -> Array | None:
        return self.random(2, (self.features,), np.float32) if self.bias else None

    @property
    def image(self) -> Array:
        return self.random(0, self.geometry.shape)

    @property
    def base(self) -> Array:
        shape = expected_conv(self).value.shape
        return np.zeros(shape, self.dtype) if self.target == "new" else self.random(3, shape)

    def run(self, xp: Any, engine: str = "fused") -> Any:
        g, params = self.geometry, self.params
        x, w = lay_out(self.image, self.layout, xp), xp.asarray(self.weights)
        bias = None if self.shift is None else xp.asarray(self.shift)
        indices = BlockIndices(*map(xp.asarray, self.indices(params)))
        passed = pack_weights(w, allow_tf32=self.tf32) if self.packed else w
        options: dict[str, Any] = {
            "strides": g.strides, "padding": g.padding, "bias": bias, "activation": "relu" if self.relu else None,
            "allow_tf32": self.tf32, "engine": engine,
        }  # fmt: skip
        base = out = None
        if self.target != "new":
            base = xp.asarray(self.base)
            out = lay_out(self.base if self.target == "place" else self.random(4, base.shape), self.layout, xp)
        given = [array for array in (x, w, bias, *indices) if array is not None]
        with guarded(xp, given, out):
            return sparse_conv2d(
                x, passed, indices, params, base=out if self.target == "place" else base, out=out, **options
            )

    def assert_right(self, found: Any) -> None:
        expected = expected_conv(self)
        covered = networks.tiles(self.existing(), self.params, expected.value.shape)
        assert identical(networks.to_host(found)[~covered], self.base[~covered]), "inactive pixels have changed"
        expected.assert_near(found, covered)

    def existing(self) -> BlockIndices:
        return existing_blocks(self.indices(self.params), self.params, self.geometry.shape[0])


@functools.lru_cache(maxsize=256)
def expected_conv(case: ConvCase) -> Bounded:
    """In float64, with a bound that follows from the number of terms: sums are float32, rounded once at the end."""
    g = case.geometry
    sums = networks.convolved(networks.exactly(case.image), case.weights, g.strides, g.padding, FLOAT32, case.tf32)
    return networks.activated(sums, None, case.shift, case.relu, case.dtype)


def existing_blocks(indices: BlockIndices, params: BlockParams, batch: int) -> BlockIndices:
    """Those blocks that count and lie in the grid."""
    rows = indices.active_block_indices[: max(0, int(indices.bin_counts[0]))]
    inside = ((rows >= 0) & (rows < (batch, *params.bcount))).all(1)
    return BlockIndices(rows[inside], np.array([inside.sum()], np.int32))


@dataclass(frozen=True)
class BottleneckCase(FusedCase):
    """A call of ``sparse_res_block_bottleneck``; the geometry's kernel is that of the second convolution."""

    inner: int = 8
    #: Of the second and third convolution, where they differ.
    middle: int | None = None
    outer: tuple[Pair, Pair] = ((1, 1), (1, 1))
    activates: bool = True
    #: Channels of the projection's result, or None.
    projects: int | None = None

    @property
    def weights(self) -> BottleneckWeights:
        g = self.geometry
        sizes = (g.shape[3], self.inner, self.middle or self.inner, self.projects or g.shape[3])
        ksizes = (self.outer[0], g.ksize, self.outer[1])
        arrays: dict[str, Any] = {}
        for number, (ksize, channels, features) in enumerate(zip(ksizes, sizes, sizes[1:]), 1):
            shape = (*ksize, channels, features)
            scaled = self.random(10 + number, shape, float) * np.sqrt(2 / (ksize[0] * ksize[1] * channels))
            arrays[f"conv{number}"] = scaled.astype(self.dtype)
            arrays[f"scale{number}"] = self.random(20 + number, (channels,), np.float32)
            # Most shifts leave ReLU above 0, so that a border that is not zeroed shows.
            arrays[f"shift{number}"] = self.random(30 + number, (channels,), np.float32) + np.float32(1)
        if not self.activates:
            arrays["scale1"] = arrays["shift1"] = None
        project = self.random(40, (1, 1, sizes[0], sizes[3])) if self.projects else None
        return BottleneckWeights(**arrays, project=project)

    @property
    def params(self) -> BlockParams:
        g, (first, last) = self.geometry, self.outer
        k = [a + b - 1 + s * (c - 1) for a, b, c, s in zip(first, g.ksize, last, g.strides)]
        block = g.block((k[0], k[1]), g.strides)
        return calc_block_params_res_block(g.shape, block, (first, g.ksize, last), g.strides, "SAME")

    @property
    def image(self) -> Array:
        return self.random(0, self.geometry.shape)

    def run(self, xp: Any, engine: str = "fused") -> Any:
        params, plain = self.params, self.weights
        x = lay_out(self.image, self.layout, xp)
        arrays = {name: a if a is None else xp.asarray(a) for name, a in vars(plain).items()}
        weights = BottleneckWeights(**arrays)
        indices = BlockIndices(*map(xp.asarray, self.indices(params)))
        passed = pack_weights(weights, allow_tf32=self.tf32) if self.packed else weights
        out = x if self.target == "place" else None
        if self.target == "out":
            out = lay_out(self.random(4, expected_bottleneck(self).value.shape), self.layout, xp)
        given = [array for array in (*arrays.values(), *indices) if array is not None]
        options = {"strides": self.geometry.strides, "allow_tf32": self.tf32, "engine": engine}
        with guarded(xp, given if out is x else [x, *given], out):
            return sparse_res_block_bottleneck(x, passed, indices, params, out=out, **options)

    def assert_right(self, found: Any) -> None:
        expected = expected_bottleneck(self)
        indices = existing_blocks(self.indices(self.params), self.params, self.geometry.shape[0])
        covered = networks.tiles(indices, self.params, expected.value.shape)
        if not self.projects:
            assert identical(networks.to_host(found)[~covered], self.image[~covered]), "inactive pixels have changed"
        else:
            shortcut = networks.convolved(
                networks.exactly(self.image), self.weights.project, self.geometry.strides, "SAME", self.dtype, self.tf32
            )
            networks.rounded(shortcut, self.dtype).assert_near(found, ~covered)
        expected.assert_near(found, covered)


@functools.lru_cache(maxsize=256)
def expected_bottleneck(case: BottleneckCase) -> Bounded:
    """In float64, with a bound: sums are float32, and rounded between the convolutions and at the end."""
    return networks.bottleneck(case.image, case.weights, case.geometry.strides, case.tf32, wide_sums=True)


def conv(
    name: str, arithmetic: str, size: tuple[int, int], channels: int, features: int, ksize: tuple[int, int],
    strides: tuple[int, int], tile: tuple[int, int], padding: Any = "SAME", *, batch: int = 2, density: float = 0.02,
    spare: int | None = None, **options: Any,
) -> ConvCase:  # fmt: skip
    shape = (batch, *size, channels)
    geometry = Geometry(shape, ksize, strides, padding, tile, density, spare, len(name))
    return ConvCase(name, arithmetic, geometry, features=features, **options)


EXPLICIT = ((1, 0), (3, 2))

#: Blocks that are there, and others that are not: outside of the batch and of the grid.
HOSTILE = ((0, 1, 1), (-1, -1, -1), (2, 0, 0), (1, 2, 3), (0, 2**31 - 1, 0), (1, 0, -(2**31)), (1, 99, 1), (0, 0, 2))

#: Between them: every arithmetic; strides and kernels of all kinds; channels and features that fill pieces and groups,
#: or do not; one chunk and several; ragged tiles; each kind of result and memory; rows to spare, and too few.
CONVS = [
    conv("3x3", "float16", (20, 23), 24, 40, (3, 3), (1, 1), (8, 8), bias=True, relu=True),
    conv("3x3-ragged", "tf32", (13, 17), 24, 24, (3, 3), (1, 1), (5, 7), target="out", spare=4),
    conv("pads", "float32", (13, 16), 8, 5, (3, 3), (1, 1), (4, 5), EXPLICIT, spare=-2, target="place", bias=True),
    conv("nchw-stride", "bfloat16", (14, 15), 5, 8, (3, 3), (2, 2), (4, 5), layout="nchw", target="out", bias=True),
    conv("1x1", "float16", (11, 12), 64, 64, (1, 1), (1, 1), (5, 7), target="place", relu=True),
    conv("stem", "tf32", (18, 21), 3, 64, (7, 7), (2, 2), (4, 4), bias=True, relu=True, packed=False),
    conv("5x5-valid", "float16", (15, 14), 40, 24, (5, 5), (1, 1), (6, 4), "VALID", batch=1),
    conv("2x5", "float32", (14, 15), 8, 4, (2, 5), (3, 1), (2, 2), EXPLICIT, layout="sliced", target="out", bias=True),
    conv("1x1-stride", "bfloat16", (14, 15), 8, 64, (1, 1), (2, 2), (2, 3), density=0.1),
    conv("misaligned", "tf32", (9, 12), 40, 8, (3, 3), (1, 1), (4, 5), layout="misaligned", target="place", bias=True),
    conv("reversed", "float16", (9, 12), 3, 3, (3, 3), (1, 1), (4, 5), layout="reversed", target="out", density=1.0),
    conv("chunks", "tf32", (10, 9), 600, 40, (1, 1), (1, 1), (4, 5), "VALID", batch=1),
    conv("chunks-5x5", "float16", (9, 11), 104, 8, (5, 5), (1, 1), (3, 6), batch=1, relu=True, target="place"),
    conv("none-active", "float16", (9, 12), 8, 8, (3, 3), (1, 1), (4, 5), density=0.0, spare=3, target="out"),
    conv("hostile", "bfloat16", (9, 16), 8, 5, (3, 3), (1, 1), (3, 4), triples=HOSTILE, count=2**31 - 1, target="out"),
    conv("counted", "float16", (9, 16), 16, 8, (3, 3), (1, 1), (3, 4), triples=HOSTILE[::3], count=1, target="out"),
    conv("negative", "float16", (9, 16), 16, 8, (3, 3), (1, 1), (3, 4), triples=HOSTILE[::3], count=-5),
    conv("split", "float16", (9, 12), 16, 44, (3, 3), (1, 1), (4, 5), bias=True, plan="split"),
    conv("split-chunks", "tf32", (9, 12), 280, 16, (1, 1), (1, 1), (4, 5), plan="split", target="out"),
    conv("tiles", "float16", (13, 17), 8, 8, (3, 3), (1, 1), (5, 11), plan="tiles", density=0.01),
    conv("no-channels", "float16", (9, 12), 0, 8, (3, 3), (1, 1), (4, 5), bias=True),
    conv("wgmma", "float16", (20, 23), 24, 48, (3, 3), (1, 1), (8, 8), bias=True, relu=True, plan="wgmma"),
    conv(
        "wgmma-ragged", "tf32", (13, 17), 12, 20, (3, 3), (1, 1), (11, 13), target="out", spare=4, plan="wgmma-squares"
    ),
    conv("wgmma-5x5", "bfloat16", (15, 14), 40, 16, (5, 5), (1, 1), (6, 9), "VALID", target="place", plan="wgmma"),
    conv("wgmma-parts", "float16", (14, 21), 8, 16, (2, 5), (1, 1), (9, 17), EXPLICIT, bias=True, plan="wgmma-parts"),
    conv("wgmma-chunks", "tf32", (10, 9), 48, 32, (3, 3), (1, 1), (7, 9), target="out", plan="wgmma-chunks"),
    conv("wgmma-halves", "float16", (9, 11), 96, 16, (1, 1), (1, 1), (3, 6), relu=True, plan="wgmma-chunks"),
    conv(
        "wgmma-columns", "tf32", (9, 12), 20, 64, (1, 1), (1, 1), (8, 5), bias=True, plan="wgmma-columns", packed=False
    ),
    conv(
        "wgmma-depth", "tf32", (13, 17), 16, 20, (3, 3), (1, 1), (11, 13), bias=True, relu=True, plan="wgmma-depth"
    ),
    conv("wgmma-depth-halves", "bfloat16", (9, 11), 64, 32, (2, 2), (1, 1), (7, 8), target="out", plan="wgmma-depth"),
    conv(
        "wgmma-hostile", "float16", (9, 16), 8, 16, (3, 3), (1, 1), (3, 4), triples=HOSTILE, count=2**31 - 1,
        plan="wgmma",
    ),
    conv(
        "wgmma-counted", "float16", (9, 16), 16, 32, (3, 3), (1, 1), (3, 4), triples=HOSTILE[::3], count=1, plan="wgmma"
    ),
]  # fmt: skip


def bottleneck(
    name: str, arithmetic: str, size: tuple[int, int], channels: int, inner: int, tile: tuple[int, int], *,
    ksize: tuple[int, int] = (3, 3), strides: tuple[int, int] = (1, 1), batch: int = 2, density: float = 0.02,
    spare: int | None = None, **options: Any,
) -> BottleneckCase:  # fmt: skip
    shape = (batch, *size, channels)
    geometry = Geometry(shape, ksize, strides, "SAME", tile, density, spare, len(name))
    return BottleneckCase(name, arithmetic, geometry, inner=inner, **options)


#: Blocks that do not touch: on a CPU, where CTAs do not run at the same time, others would read what is written.
APART = ((0, 0, 0), (0, 2, 1), (1, 4, 5))

BOTTLENECKS = [
    bottleneck("direct", "float16", (20, 23), 32, 8, (8, 8), spare=2),
    bottleneck("direct-tf32", "tf32", (14, 15), 48, 16, (5, 7), target="out"),
    bottleneck("direct-float32", "float32", (14, 13), 24, 8, (5, 4), activates=False, packed=False, batch=1),
    bottleneck("direct-3x5", "bfloat16", (13, 16), 40, 24, (5, 4), ksize=(3, 5), density=0.05, spare=-2),
    bottleneck("direct-in-place", "float16", (20, 23), 32, 8, (4, 4), target="place", triples=APART),
    bottleneck("direct-hostile", "float16", (9, 16), 16, 8, (3, 4), triples=HOSTILE, count=2**31 - 1, target="out"),
    bottleneck("counted-in-place", "float16", (9, 16), 16, 8, (3, 4), triples=HOSTILE[:4], count=3, target="place"),
    bottleneck("layers-hostile", "float16", (9, 16), 12, 4, (3, 4), triples=HOSTILE, count=2**31 - 1, target="place"),
    bottleneck("distant", "float16", (9, 12), 24, 16, (4, 5), plan="distant"),
    bottleneck("distant-float32", "float32", (9, 12), 16, 8, (4, 5), plan="near-second", density=0.01),
    bottleneck("parts", "float16", (9, 12), 64, 8, (4, 5), plan="parts"),
    bottleneck("parts-plain", "tf32", (9, 12), 32, 8, (4, 5), plan="parts", activates=False),
    bottleneck("passes", "bfloat16", (9, 12), 32, 16, (4, 5), plan="passes"),
    bottleneck("direct-tiles", "tf32", (9, 12), 24, 8, (5, 11), plan="tiles"),
    bottleneck("chunks-of-the-middle", "tf32", (4, 4), 8, 128, (4, 4), batch=1, density=1.0),
    bottleneck("chunks-of-the-channels", "float32", (6, 7), 264, 16, (4, 3), batch=1, density=0.1),
    bottleneck("chunks-of-halves", "float16", (6, 7), 544, 16, (4, 3), batch=1, density=0.1),
    bottleneck("stack", "tf32", (20, 23), 16, 8, (8, 8), target="place", density=0.05),
    bottleneck("layers-stride", "float16", (13, 15), 16, 8, (3, 4), strides=(2, 2), projects=24, spare=3),
    bottleneck("layers-kernels", "tf32", (12, 13), 8, 8, (4, 5), outer=((3, 1), (2, 3)), target="place", batch=1),
    bottleneck("layers-tiles", "float16", (12, 13), 8, 8, (5, 11), outer=((3, 1), (1, 1)), plan="tiles"),
    bottleneck("layers-cut", "float16", (11, 11), 8, 8, (8, 8), middle=16, plan="cut", density=1.0, batch=1),
    bottleneck("layers-flat", "float16", (17, 18), 16, 8, (8, 16), middle=16, plan="flat", target="place", batch=1),
    bottleneck("layers-odd", "float32", (12, 13), 5, 3, (4, 5), target="place", density=0.05, spare=-3),
    bottleneck("layers-nchw", "bfloat16", (12, 13), 16, 8, (4, 5), middle=16, layout="nchw", target="out", batch=1),
    bottleneck(
        "layers-wgmma",
        "float16",
        (12, 13),
        16,
        32,
        (4, 5),
        outer=((3, 1), (1, 1)),
        plan="wgmma",
        target="place",
        batch=1,
        packed=False,
    ),
    bottleneck(
        "layers-wgmma-tf32", "tf32", (12, 13), 48, 16, (9, 8), outer=((1, 1), (3, 1)), plan="wgmma-chunks", target="out"
    ),
    bottleneck("groups", "tf32", (20, 23), 48, 16, (8, 8), plan="groups"),
    bottleneck("groups-halves", "float16", (20, 23), 64, 16, (8, 8), plan="groups", spare=2, packed=False),
    bottleneck("groups-columns", "float16", (21, 19), 96, 48, (7, 8), plan="groups", target="out"),
    bottleneck("groups-3x5", "bfloat16", (13, 16), 32, 16, (8, 8), ksize=(3, 5), plan="groups", density=0.05, spare=-2),
    bottleneck("groups-in-place", "tf32", (20, 23), 32, 16, (4, 4), plan="groups", target="place", triples=APART),
    bottleneck("groups-plain", "tf32", (14, 13), 32, 16, (5, 4), plan="groups", activates=False, batch=1),
    bottleneck("groups-stack", "tf32", (20, 39), 32, 16, (8, 16), plan="groups", target="place", density=0.05),
    bottleneck("groups-squares", "tf32", (21, 35), 40, 24, (15, 16), plan="groups-squares", target="out"),
    bottleneck("groups-wide", "bfloat16", (11, 35), 64, 32, (8, 24), plan="groups-wide", target="out"),
    bottleneck("groups-high", "float16", (21, 15), 64, 24, (15, 7), plan="groups-high", density=0.05),
    bottleneck(
        "groups-hostile",
        "float16",
        (9, 16),
        16,
        16,
        (3, 4),
        triples=HOSTILE,
        count=2**31 - 1,
        target="out",
        plan="groups",
    ),
    bottleneck(
        "groups-counted",
        "float16",
        (9, 16),
        16,
        16,
        (3, 4),
        triples=HOSTILE[:4],
        count=3,
        target="place",
        plan="groups",
    ),
    bottleneck("layers-plain", "float16", (12, 13), 8, 8, (4, 5), activates=False, layout="misaligned", target="out"),
]

PACKINGS = [
    PackCase("pack-3x2", "float16", Geometry((1, 1, 1, 20), (3, 2), (1, 1), "SAME", (1, 1), 0, None, 1), features=11),
    PackCase("pack-32", "bfloat16", Geometry((1, 1, 1, 9), (1, 3), (1, 1), "SAME", (1, 1), 0, None, 3), features=60),
    PackCase(
        "pack-chunks", "tf32", Geometry((1, 1, 1, 300), (3, 3), (1, 1), "SAME", (1, 1), 0, None, 2), "new", "strided"
    ),
]


def random_cases(count: int) -> list[FusedCase]:
    """Convolutions and, every third, bottlenecks of random geometry, the same ones in every run."""
    found: list[FusedCase] = []
    for number in range(count):
        rng = np.random.default_rng(number)

        def pick(*values: Any, rng: np.random.Generator = rng) -> Any:
            return values[rng.integers(len(values))]

        def pair(*values: int, pick: Callable[..., Any] = pick) -> Pair:
            return pick(*values), pick(*values)

        options: dict[str, Any] = {
            "batch": pick(1, 2, 3), "density": pick(0.01, 0.05, 1.0), "spare": pick(None, None, 3, -2),
            "layout": pick("nhwc", "nhwc", "nchw", "sliced", "reversed", "strided", "misaligned"),
            "target": pick("new", "out", "place"), "packed": pick(True, False),
        }  # fmt: skip
        arithmetic, size, tile = pick(*DTYPES), pair(5, 9, 16, 17), pair(1, 2, 4, 5, 7)
        if number % 3 == 2:
            channels, inner = pick(8, 16, 24, 5), pick(8, 8, 16, 3)
            projects = pick(None, None, 8, 5)
            strides = pair(1, 2) if projects else (1, 1)
            if options["target"] == "place":
                projects, strides = None, (1, 1)
                # On a CPU, neighbours would see what is written: a stack goes between.
                options |= {"batch": 3, "density": 1.0, "spare": None}
            more = {"outer": pick(((1, 1), (1, 1)), ((1, 1), (1, 1)), ((2, 3), (3, 1))), "activates": pick(True, False)}
            ksize = pick((3, 3), (3, 3), (1, 5), (2, 2))
            options |= {**more, "ksize": ksize, "strides": strides, "projects": projects}
            found.append(bottleneck(f"random-{number}", arithmetic, size, channels, inner, tile, **options))
        else:
            channels, features = pick(1, 3, 8, 24, 40, 64, 130), pick(1, 5, 8, 24, 40, 64)
            ksize, strides = pick((1, 1), (3, 3), (3, 3), (5, 5), (2, 4), (7, 7)), pair(1, 1, 2, 3)
            padding = pick("SAME", "SAME", ((0, 2), (1, 3)), ((4, 4), (0, 0)))
            options |= {"bias": pick(True, False), "relu": pick(True, False)}
            found.append(
                conv(f"random-{number}", arithmetic, size, channels, features, ksize, strides, tile, padding, **options)
            )
    return found
