"""Which engine is taken, and what it says when it cannot be."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cpu_cuda
import ml_dtypes
import numpy as np
import pytest
from cases import identical, lay_out
from fused_cases import host_products

from sbnet_cupy import (
    BlockIndices,
    BottleneckWeights,
    _bottleneck,
    _conv,
    _engine,
    _fused,
    block_indices,
    calc_block_params,
    calc_block_params_res_block,
    pack_weights,
    sparse_conv2d,
    sparse_res_block_bottleneck,
)
from sbnet_cupy._composed_clocks import ConvSize
from sbnet_cupy._conv_geometry import make_layer
from sbnet_cupy._engine import Route
from sbnet_cupy._validate import Spec

HALF, SINGLE = np.dtype(np.float16), np.dtype(np.float32)
BRAIN = np.dtype(ml_dtypes.bfloat16)

#: Clocks of a scatter, where the model has no say.
SCATTER = 4800


def test_images_that_auto_gathers() -> None:
    """Where pixels are not whole pieces, copying them wins from 64 channels on."""
    for channels, whole, expected in ((63, False, False), (64, False, True), (64, True, False), (3, False, False)):
        assert _engine.prefers_gathering(channels, whole) is expected


def test_named_engines() -> None:
    for engine, obstacle, expected in (
        ("auto", "", True),
        ("auto", "float64", False),
        ("fused", "", True),
        ("composed", "", False),
        ("composed", "float64", False),
    ):
        assert _engine.may_fuse(engine, obstacle) is expected
    with pytest.raises(ValueError, match=r"^engine: expected 'auto' or 'composed' for float64, got 'fused'$"):
        _engine.may_fuse("fused", "float64")
    for bad in ("fast", None, 1):
        message = f"engine: expected 'auto', 'fused' or 'composed', got {bad!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            _engine.parse_engine(bad)


def test_what_does_not_fit_32_bits() -> None:
    layer = make_layer((100, 200), (3, 3), (1, 1), "SAME")
    params = calc_block_params((1, 100, 200, 64), (18, 34), (3, 3), 1, "SAME")
    size, spec = ConvSize(9, 64, 64), Spec.contiguous((1, 100, 200, 64), HALF, 0)
    assert _engine.size_obstacle([layer], params, [size], 70) == ""
    assert _engine.offset_obstacle([spec], [layer], params) == ""

    most = 2**31 // (16 * 32)
    assert _engine.size_obstacle([layer], params, [size], most - 1) == ""
    assert _engine.size_obstacle([layer], params, [size], most) == "2**31 or more pixels in all blocks"
    assert "2**18 or more channels" in _engine.size_obstacle([layer], params, [size._replace(features=2**18)], 1)
    for huge in (replace(params, bcount=(2**26, 1)), replace(params, bsize=(2**30, 18))):
        assert "2**30 or more pixels" in _engine.size_obstacle([layer], huge, [size], 1)
    tall = layer._replace(in_size=(2**30, 1))
    assert "2**30 or more pixels" in _engine.size_obstacle([tall], params, [size], 1)
    padded = layer._replace(pad_before=(2**29, 0), pad_after=(2**29, 0))
    assert "2**30 or more pixels" in _engine.size_obstacle([padded], params, [size], 1)

    # Rows of a block of 18 x 34, or as many as a tile of 256 x 256 reads; an axis of one has no stride.
    rows = spec._replace(strides=(0, 2 * (2**31 // 18), 128, 2))
    assert _engine.offset_obstacle([spec, rows], [layer], params) != ""
    assert _engine.offset_obstacle([rows._replace(shape=(1, 1, 200, 64))], [layer], params) == ""
    assert _engine.offset_obstacle([spec._replace(strides=(0, 128, -2 * (2**31 // 34), 2))], [layer], params) != ""
    assert _engine.offset_obstacle([spec._replace(strides=(0, 128, 2, 2 * (2**31 // 64)))], [layer], params) != ""
    large = calc_block_params((1, 100, 200, 64), (5000, 5000), (3, 3), 1, "SAME")
    assert _engine.offset_obstacle([spec._replace(strides=(0, 2 * 2**22, 2, 2))], [layer], large) == ""
    assert _engine.offset_obstacle([spec._replace(strides=(0, 2 * 2**23, 2, 2))], [layer], large) != ""


def test_routes_of_a_bottleneck() -> None:
    def routes(first: Any, second: Any, third: Any, strides: Any = (1, 1), projects: bool = False, place: bool = False):  # type: ignore[no-untyped-def]
        return _engine.bottleneck_routes((first, second, third), strides, projects, place)

    usual = (1, 1, 96, 24), (3, 3, 24, 24), (1, 1, 24, 96)
    assert routes(*usual) == (Route.LAYERS, Route.DIRECT)
    assert routes(*usual, place=True) == (Route.LAYERS, Route.STACK, Route.DIRECT)
    assert routes((1, 1, 8, 8), (5, 2, 8, 8), (1, 1, 8, 8)) == (Route.LAYERS, Route.DIRECT)
    layers = (Route.LAYERS,)
    assert routes(*usual, strides=(2, 1), projects=True) == layers
    assert routes(*usual, projects=True) == layers
    assert routes((3, 1, 96, 24), *usual[1:]) == layers
    assert routes(*usual[:2], (1, 2, 24, 96), place=True) == layers
    assert routes(usual[0], (3, 3, 24, 16), (1, 1, 16, 96)) == layers


# Of the public functions ----------------------------------------------------------------------------------------------


@pytest.fixture
def xp() -> Iterator[Any]:
    """What stands in for CuPy."""
    if cpu_cuda.why_unavailable() and not os.environ.get("CI"):
        pytest.skip(cpu_cuda.why_unavailable())
    with cpu_cuda.device() as standin, host_products():
        yield standin


class Calls:
    """Good arguments of both functions."""

    def __init__(self, xp: Any, dtype: Any = HALF, channels: int = 8, inner: int = 8) -> None:
        rng = np.random.default_rng(0)
        self.x = xp.asarray(rng.standard_normal((1, 9, 11, channels)).astype(dtype))
        plain = BottleneckWeights.random(channels, inner, dtype=dtype)
        self.weights = BottleneckWeights(**{k: a if a is None else xp.asarray(a) for k, a in vars(plain).items()})
        self.w = xp.asarray(rng.standard_normal((3, 3, channels, 8)).astype(dtype))
        self.conv_params = calc_block_params(self.x.shape, (6, 6), (3, 3), 1, "SAME")
        self.params = calc_block_params_res_block(self.x.shape, (6, 6), plain.ksizes, 1, "SAME")
        mask = np.zeros((1, 9, 11), bool)
        mask[0, 4, 5] = True
        self.indices = BlockIndices(*map(xp.asarray, block_indices(mask, self.params)))

    def conv(self, w: Any = None, **options: Any) -> Any:
        return sparse_conv2d(self.x, self.w if w is None else w, self.indices, self.conv_params, **options)

    def block(self, weights: Any = None, **options: Any) -> Any:
        weights = self.weights if weights is None else weights
        return sparse_res_block_bottleneck(self.x, weights, self.indices, self.params, **options)


def kernels_of(xp: Any, call: Any, **options: Any) -> set[str]:
    """Source files of the kernels that a call launches."""
    with cpu_cuda.recording() as found:
        call(**options)
    return {instance.source for instance in found} - {"pack.cu"}


def test_the_engine_is_taken(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = {"gather.cu", "scatter.cu"}
    for dtype in (HALF, BRAIN, SINGLE):
        calls = Calls(xp, dtype)
        for call, fused in ((calls.conv, {"conv.cu"}), (calls.block, {"bottleneck.cu"})):
            assert kernels_of(xp, call) == kernels_of(xp, call, engine="fused") == fused
            assert kernels_of(xp, call, engine="composed") >= composed
    double = Calls(xp, np.dtype(np.float64))
    assert kernels_of(xp, double.conv) >= composed
    assert kernels_of(xp, double.block) >= composed
    calls = Calls(xp)
    let_composed_take(0, monkeypatch)
    assert kernels_of(xp, calls.conv) >= composed
    assert kernels_of(xp, calls.block) >= composed
    assert kernels_of(xp, calls.conv, engine="fused") == {"conv.cu"}


def let_composed_take(clocks: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model say so of the composed engine."""
    monkeypatch.setattr("sbnet_cupy._fused_network.composed_clocks", lambda *arguments: clocks)
    _conv.prepare.cache_clear(), _bottleneck.prepare.cache_clear()


@pytest.mark.parametrize("route", [None, Route.DIRECT, Route.STACK, Route.LAYERS])
@pytest.mark.parametrize("place", [False, True])
def test_auto_takes_the_faster_engine(
    xp: Any, route: Route | None, place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the models: the fused kernels, unless all that they launch takes longer. No route: a convolution."""
    calls, took = Calls(xp), []
    call, options = (calls.conv, {}) if route is None else (calls.block, {"out": calls.x} if place else {})
    monkeypatch.setattr(_fused, "scatter_clocks", lambda *_: SCATTER)
    for name in ("plan_conv", "plan_bottleneck"):
        real = getattr(_fused, name)
        monkeypatch.setattr(_fused, name, lambda *args, real=real: took.append(real(*args)) or took[-1])
    monkeypatch.setattr("sbnet_cupy._fused_network.bottleneck_routes", lambda *arguments: (route,))
    _conv.prepare.cache_clear(), _bottleneck.prepare.cache_clear()
    fused = kernels_of(xp, call, engine="fused", **options)
    kernels = {Route.DIRECT: {"bottleneck.cu"}, Route.STACK: {"bottleneck.cu", "scatter.cu"}}
    assert fused == kernels.get(route, {"conv.cu"})  # type: ignore[arg-type]
    assert len(took) == (3 if route is Route.LAYERS else 1)
    whole = sum(clocks for _, clocks in took) + (SCATTER if route is Route.STACK else 0)
    let_composed_take(whole * 1.0001, monkeypatch)
    assert kernels_of(xp, call, **options) == fused
    let_composed_take(whole * 0.9999, monkeypatch)
    found = kernels_of(xp, call, **options)
    assert "gather.cu" in found
    assert not found & {"conv.cu", "bottleneck.cu"}


def test_the_fastest_way_through_a_bottleneck(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(xp)
    everywhere = BlockIndices(*map(xp.asarray, block_indices(np.ones((1, 9, 11), bool), calls.params)))
    conv, bottleneck = _fused.plan_conv, _fused.plan_bottleneck
    monkeypatch.setattr(_fused, "scatter_clocks", lambda *_: SCATTER)
    for indices, options, one_launch, more in (
        (calls.indices, {}, {"bottleneck.cu"}, 0),
        (calls.indices, {"out": calls.x}, {"bottleneck.cu"}, 0),
        (everywhere, {"out": calls.x}, {"bottleneck.cu", "scatter.cu"}, SCATTER),
    ):
        calls.indices = indices
        for clocks, expected in ((30 * SCATTER - more, one_launch), (30 * SCATTER - more + 1, {"conv.cu"})):
            monkeypatch.setattr(_fused, "plan_conv", lambda *args: (conv(*args)[0], 10 * SCATTER))
            monkeypatch.setattr(_fused, "plan_bottleneck", lambda *args, clocks=clocks: (bottleneck(*args)[0], clocks))
            _bottleneck.prepare.cache_clear()
            assert kernels_of(xp, calls.block, engine="fused", **options) == expected


def test_a_form_is_prepared_once(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that look alike share what follows from their form, and none makes what only the other engine needs."""
    monkeypatch.setattr("sbnet_cupy._conv.BlockStacks", None)
    monkeypatch.setattr("sbnet_cupy._bottleneck.BlockStacks", None)
    with cpu_cuda.recording():
        for prepare, name in ((_conv.prepare, "conv"), (_bottleneck.prepare, "block")):
            for turn in range(3):
                calls = Calls(xp)  # other arrays
                getattr(calls, name)(engine="fused", out=xp.zeros((1, 9, 11, 8), HALF))
                assert (prepare.cache_info().misses, prepare.cache_info().hits) == (1, turn)
            getattr(calls, name)(engine="fused", strides=np.int64(1))  # a new array, and another way to say 1
            assert prepare.cache_info().misses == 2


def test_in_place_on_too_many_tiles(xp: Any) -> None:
    """The tiles go to a stack first where their CTAs cannot all wait for each other."""
    calls = Calls(xp)
    assert kernels_of(xp, calls.block, out=calls.x) == {"bottleneck.cu"}
    everywhere = block_indices(np.ones((1, 9, 11), bool), calls.params)
    calls.indices = BlockIndices(*map(xp.asarray, everywhere))
    assert kernels_of(xp, calls.block, out=calls.x) == {"bottleneck.cu", "scatter.cu"}
    assert kernels_of(xp, calls.block) == {"bottleneck.cu"}
    odd = Calls(xp, inner=5)
    assert kernels_of(xp, odd.block) == kernels_of(xp, odd.block, out=odd.x) == {"conv.cu"}


def test_weights_of_another_arithmetic_are_refused(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUPY_TF32", raising=False)
    for namespace in (np, xp):
        calls = Calls(namespace, SINGLE)
        for call, plain in ((calls.conv, calls.w), (calls.block, calls.weights)):
            packed = pack_weights(plain, allow_tf32=True)
            call(packed), call(packed, allow_tf32=True)  # None asks for what they were packed with
            message = "allow_tf32: expected True, with which the weights were packed, got False"
            with pytest.raises(ValueError, match=f"^{message}$"):
                call(packed, allow_tf32=False)
            message = "allow_tf32: expected False, with which the weights were packed, got True"
            with pytest.raises(ValueError, match=f"^{message}$"):
                call(pack_weights(plain), allow_tf32=True)
            with pytest.raises(TypeError, match=r"^allow_tf32: expected a bool or None, got int"):
                call(packed, allow_tf32=1)
    half = Calls(xp)
    half.conv(pack_weights(half.w, allow_tf32=True), allow_tf32=False)


def test_packed_weights_in_every_engine(xp: Any) -> None:
    """Packed or not, the same bits; on NumPy arrays too."""
    for namespace in (np, xp):
        for dtype in (HALF, np.dtype(np.float64)):
            calls = Calls(namespace, dtype)
            for engine in ("auto", "composed"):
                for call, plain in ((calls.conv, calls.w), (calls.block, calls.weights)):
                    expected, found = call(engine=engine), call(pack_weights(plain), engine=engine)
                    assert identical(found, expected if namespace is np else expected.get())


def test_errors_of_the_engine(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for calls, why in ((Calls(np), "NumPy arrays"), (Calls(xp, np.dtype(np.float64)), "float64")):
        before = calls.x.copy()
        for call in (calls.conv, calls.block):
            with pytest.raises(ValueError, match=rf"^engine: expected 'auto' or 'composed' for {why}, got 'fused'$"):
                call(engine="fused")
            with pytest.raises(ValueError, match=r"^engine: expected 'auto', 'fused' or 'composed', got 'quick'$"):
                call(engine="quick")
        with pytest.raises(ValueError, match=r"^engine: "):
            calls.block(engine="fused", out=calls.x)
        assert bool((calls.x == before).all())
    # The stride of an axis of one is none, however large.
    calls = Calls(xp)
    calls.x = xp.lib.stride_tricks.as_strided(calls.x, (1, 9, 11, 8), (2**40, 0, 0, 2))
    assert "conv.cu" in kernels_of(xp, calls.conv)
    # A kernel whose window has no room.
    wide = Calls(xp)
    wide.w = xp.zeros((80, 80, 8, 8), HALF)
    wide.conv_params = calc_block_params(wide.x.shape, (80, 80), (80, 80), 1, "SAME")
    with pytest.raises(ValueError, match=r"^engine: expected 'auto' or 'composed' for a kernel, .* room, got 'fused'$"):
        wide.conv(engine="fused")
    for name in ("prepare_conv", "prepare_bottleneck"):
        monkeypatch.setattr(f"sbnet_cupy._fused.{name}", lambda call, most: None)
    _conv.prepare.cache_clear(), _bottleneck.prepare.cache_clear()
    calls = Calls(xp)
    for call in (calls.conv, calls.block):
        assert "gather.cu" in kernels_of(xp, call)
        with pytest.raises(ValueError, match=r"^engine: expected 'auto' or 'composed' for a kernel, .* room"):
            call(engine="fused")


def test_packed_weights_are_checked_as_others(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, other = Calls(xp), Calls(np)
    packed, block = pack_weights(calls.w), pack_weights(calls.weights)
    with pytest.raises(TypeError, match=r"^w: expected a .* array like x, got numpy.ndarray"):
        calls.conv(pack_weights(other.w))
    with pytest.raises(ValueError, match=r"^w: expected shape \(kh, kw, 8, K\)"):
        calls.conv(pack_weights(xp.zeros((3, 3, 9, 8), HALF)))
    with pytest.raises(TypeError, match=r"^w: expected dtype float16 like x, got float32"):
        calls.conv(pack_weights(xp.zeros((3, 3, 8, 8), SINGLE)))
    with pytest.raises(TypeError, match=r"^w: expected a NumPy or CuPy array, got .*PackedBottleneck"):
        calls.conv(block)
    with pytest.raises(TypeError, match=r"^weights: expected BottleneckWeights or PackedBottleneck, got PackedWeights"):
        calls.block(packed)
    with pytest.raises(TypeError, match=r"^conv1: expected a .* array like x, got numpy.ndarray"):
        calls.block(pack_weights(other.weights))
    shared = xp.zeros(9 * 11 * 8, HALF)
    within = pack_weights(shared[: 3 * 3 * 8 * 8].reshape(3, 3, 8, 8))
    with pytest.raises(ValueError, match=r"^out: expected memory of its own, got an array that overlaps w"):
        calls.conv(within, out=shared.reshape(1, 9, 11, 8))
    monkeypatch.setattr(xp.cuda.runtime, "getDevice", lambda: 1)
    for call, weights, name in ((calls.conv, packed, "x"), (calls.block, block, "x")):
        with pytest.raises(ValueError, match=rf"^{name}: expected an array on the current device 1"):
            call(weights)


def test_layouts_that_auto_gathers(xp: Any) -> None:
    """Where a pixel is not whole pieces of 16 bytes, the number of channels decides."""
    for channels, fused in ((56, True), (64, False)):
        calls = Calls(xp, channels=channels)
        calls.x = lay_out(calls.x.get(), "nchw", xp)
        assert ("conv.cu" in kernels_of(xp, calls.conv)) is fused
