"""Convolutions and bottlenecks: dense against the oracle, sparse against the same on active tiles, exact outside."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cpu_cuda
import networks
import numpy as np
import pytest
from cases import identical, lay_out
from cpu_cuda.products import HOST_CUDNN, HostMultiplier
from hypothesis import given
from hypothesis import strategies as st
from networks import DEVICE_CASES, DTYPES, Geometry, geometries

import sbnet_cupy
from sbnet_cupy import (
    BlockIndices,
    BottleneckWeights,
    _device,
    _stack_conv,
    block_indices,
    calc_block_params,
    calc_block_params_res_block,
    conv2d,
    fold_batch_norm,
    res_block_bottleneck,
    sparse_conv2d,
    sparse_gather,
    sparse_res_block_bottleneck,
)
from sbnet_cupy._stack_conv import choose_engine, use_tf32

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    return rng.standard_normal(shape).astype(dtype)


def indices_of(case: Geometry, params: Any) -> BlockIndices:
    count = int(block_indices(case.mask(), params).bin_counts[0])
    return block_indices(case.mask(), params, capacity=networks.capacity(case.spare, count))


def check_conv(case: Geometry, dtype: Any, features: int, bias: bool, activation: str | None, xp: Any = np) -> None:
    """Dense and sparse, on arrays of `xp`, with a base and without."""
    rng = np.random.default_rng(case.seed)
    x = random_array(rng, case.shape, dtype)
    w = random_array(rng, (*case.ksize, case.shape[3], features), dtype)
    wide = np.float64 if dtype.itemsize == 8 else np.float32
    shift = random_array(rng, (features,), wide) if bias else None
    expected = networks.convolved(networks.exactly(x), w, case.strides, case.padding, dtype)
    expected = networks.activated(expected, None, shift, activation == "relu", dtype)

    how: dict[str, Any] = {"strides": case.strides, "padding": case.padding, "activation": activation}
    how["bias"] = None if shift is None else xp.asarray(shift)
    on = (xp.asarray(x), xp.asarray(w))
    dense = conv2d(*on, **how)
    assert dense.dtype == dtype
    assert dense.flags.c_contiguous
    everywhere = np.ones(expected.value.shape[:3], bool)
    expected.assert_near(dense, everywhere)

    how["engine"] = "composed"
    params = calc_block_params(x.shape, case.block(case.ksize, case.strides), w.shape, case.strides, case.padding)
    indices = BlockIndices(*map(xp.asarray, indices_of(case, params)))
    covered = networks.tiles(indices, params, expected.value.shape)
    base = random_array(rng, expected.value.shape, dtype)
    for given_base in (None, base):
        sparse = sparse_conv2d(*on, indices, params, **how, base=None if given_base is None else xp.asarray(given_base))
        expected.assert_near(sparse, covered)
        outside = np.zeros_like(base) if given_base is None else base
        assert identical(networks.to_host(sparse)[~covered], outside[~covered])
    for given_base in (None, base):  # into an array full of other numbers, and in place
        out = xp.asarray(random_array(rng, base.shape, dtype))
        on_base = None if given_base is None else xp.asarray(given_base)
        assert sparse_conv2d(*on, indices, params, **how, base=on_base, out=out) is out
        outside = np.zeros_like(base) if given_base is None else base
        assert identical(networks.to_host(out)[~covered], outside[~covered])
        expected.assert_near(out, covered)
    assert sparse_conv2d(*on, indices, params, **how, base=out, out=out) is out
    expected.assert_near(out, covered)
    assert identical(networks.to_host(out)[~covered], base[~covered])


@dtypes
@given(geometries(), st.integers(1, 5), st.booleans(), st.sampled_from([None, "relu"]))
def test_convolution(dtype: Any, case: Geometry, features: int, bias: bool, activation: str | None) -> None:
    check_conv(case, dtype, features, bias, activation)


def random_bottleneck(
    rng: np.random.Generator, channels: int, features: int, ksizes: Any, dtype: Any, first: bool, project: bool
) -> BottleneckWeights:
    """Weights of any kernel sizes; most shifts leave ReLU above 0, so that a border that is not zeroed shows."""
    inner = (int(rng.integers(1, 5)), int(rng.integers(1, 5)))
    widths = (channels, *inner, features)
    wide = np.float64 if np.dtype(dtype).itemsize == 8 else np.float32
    arrays: dict[str, Any] = {}
    for number, (ksize, before, after) in enumerate(zip(ksizes, widths, widths[1:]), 1):
        arrays[f"conv{number}"] = random_array(rng, (*ksize, before, after), dtype)
        arrays[f"scale{number}"] = random_array(rng, (before,), wide)
        arrays[f"shift{number}"] = random_array(rng, (before,), wide) + wide(1)
    if not first:
        arrays["scale1"] = arrays["shift1"] = None
    return BottleneckWeights(
        **arrays, project=random_array(rng, (1, 1, channels, features), dtype) if project else None
    )


def on_device(weights: BottleneckWeights, xp: Any) -> BottleneckWeights:
    arrays = {name: value if value is None else xp.asarray(value) for name, value in vars(weights).items()}
    return BottleneckWeights(**arrays)


def check_bottleneck(case: Geometry, dtype: Any, ksizes: Any, first: bool, project: bool, xp: Any = np) -> None:
    """Dense and sparse, on arrays of `xp`, into a new array, into a given one and in place."""
    rng = np.random.default_rng(case.seed)
    strides = case.strides if project else (1, 1)
    x = random_array(rng, case.shape, dtype)
    features = int(rng.integers(1, 5)) if project else case.shape[3]
    weights = random_bottleneck(rng, case.shape[3], features, ksizes, dtype, first, project)
    expected = networks.bottleneck(x, weights, strides)

    on_x, on_weights = xp.asarray(x), on_device(weights, xp)
    dense = res_block_bottleneck(on_x, on_weights, strides=strides)
    assert dense.dtype == dtype
    expected.assert_near(dense, np.ones(expected.value.shape[:3], bool))

    k = [
        1 + (a - 1) + (b - 1) + s * (c - 1) for a, b, c, s in zip(*ksizes, strides)
    ]  # the second convolution has the strides
    params = calc_block_params_res_block(x.shape, case.block((k[0], k[1]), strides), weights.ksizes, strides, "SAME")
    indices = BlockIndices(*map(xp.asarray, indices_of(case, params)))
    covered = networks.tiles(indices, params, expected.value.shape)
    shortcut = networks.to_host(conv2d(on_x, on_weights.project, strides)) if project else x

    def check(found: Any) -> None:
        expected.assert_near(found, covered)
        assert identical(networks.to_host(found)[~covered], shortcut[~covered])

    arguments = (on_weights, indices, params)
    how: dict[str, Any] = {"strides": strides, "engine": "composed"}
    check(sparse_res_block_bottleneck(on_x, *arguments, **how))
    assert identical(on_x, x)
    out = xp.asarray(random_array(rng, dense.shape, dtype))
    assert sparse_res_block_bottleneck(on_x, *arguments, **how, out=out) is out
    check(out)
    if not project:
        assert sparse_res_block_bottleneck(on_x, *arguments, **how, out=on_x) is on_x
        check(on_x)


kernels = st.sampled_from(
    [((1, 1), (3, 3), (1, 1)), ((1, 1), (3, 3), (1, 1)), ((1, 1), (5, 2), (1, 1)), ((3, 2), (2, 3), (2, 4))]
)


@dtypes
@given(geometries(same_padding=True), kernels, st.booleans(), st.booleans())
def test_bottleneck(dtype: Any, case: Geometry, ksizes: Any, first: bool, project: bool) -> None:
    check_bottleneck(case, dtype, ksizes, first, project)


# On a device: CuPy on a GPU, and CuPy's host code with kernels that run on the CPU ------------------------------------


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """CuPy, or what stands in for it: then NumPy multiplies in place of cuBLAS, at the same addresses."""
    if request.param == "gpu":
        yield pytest.importorskip("cupy")
        return
    if cpu_cuda.why_unavailable() and not os.environ.get("CI"):
        pytest.skip(cpu_cuda.why_unavailable())
    with cpu_cuda.device() as xp:
        monkeypatch.setattr("sbnet_cupy._cublas.Multiplier", HostMultiplier)
        yield xp


#: All cases in float32 and float16; float64 and bfloat16 share their code, so two will do.
ON_DEVICE = [
    pytest.param(name, dtype, id=f"{name}-{dtype}")
    for name in DEVICE_CASES
    for dtype in DTYPES
    if dtype.name in ("float32", "float16") or name in ("3x3", "3x3-stride")
]


@pytest.mark.parametrize(("name", "dtype"), ON_DEVICE)
def test_convolution_on_a_device(name: str, dtype: Any, device: Any) -> None:
    case = DEVICE_CASES[name]
    check_conv(case, dtype, 4, bias=case.seed % 2 == 0, activation=(None, "relu")[case.seed % 3 == 0], xp=device)


@pytest.mark.parametrize(("name", "dtype"), [p for p in ON_DEVICE if "3x3" in str(p.id) and "all" not in str(p.id)])
def test_bottleneck_on_a_device(name: str, dtype: Any, device: Any) -> None:
    case, ksizes = DEVICE_CASES[name], ((1, 1), (3, 3), (1, 1))
    check_bottleneck(case, dtype, ksizes, first=case.seed != 1, project="stride" in name or case.seed == 2, xp=device)


@pytest.mark.parametrize("strides", [1, 2])
def test_any_memory_layout(strides: int, device: Any) -> None:
    """An NCHW image, weights and vectors that are views, on odd addresses."""
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 14, 15, 8), "w": (3, 3, 8, 4), "base": (2, 14 // strides, -(-15 // strides), 4)}
    values = {name: random_array(rng, shape, np.float16) for name, shape in shapes.items()}
    vector = random_array(rng, (8,), np.float32)
    options: dict[str, Any] = {"strides": strides, "activation": "relu"}
    expected = networks.convolved(
        networks.exactly(values["x"]), values["w"], (strides, strides), "SAME", np.dtype(np.float16)
    )
    expected = networks.activated(expected, None, vector[1::2], True, np.dtype(np.float16))
    params = calc_block_params((2, 14, 15, 8), (5, 7), (3, 3), strides, "SAME")
    indices = BlockIndices(*map(device.asarray, block_indices(rng.random((2, 14, 15)) < 0.05, params)))
    covered = networks.tiles(indices, params, expected.value.shape)
    for layout in ("nchw", "misaligned", "strided", "reversed"):
        x, w, base = (lay_out(array, layout, device) for array in values.values())
        options["bias"] = device.asarray(vector)[1::2]
        sparse = sparse_conv2d(x, w, indices, params, **options, base=base, engine="composed")
        expected.assert_near(sparse, covered)
        assert identical(networks.to_host(sparse)[~covered], values["base"][~covered])
        expected.assert_near(conv2d(x, w, **options), np.ones_like(covered))


def _forget_engines() -> None:
    _device.stack_conv.cache_clear()
    _stack_conv._engine.cache_clear()


@pytest.fixture
def cudnn(request: pytest.FixtureRequest, device: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The device, with cuDNN as its engine, or what stands in for that."""
    module = "sbnet_cupy._stack_conv_cudnn"
    if device.__name__ != "cupy":
        monkeypatch.setitem(sys.modules, "cudnn", HOST_CUDNN)
        monkeypatch.delitem(sys.modules, module, raising=False)
    else:
        try:
            pytest.importorskip("cudnn").create_handle()
        except Exception as error:  # the frontend is there, but cuDNN itself is not
            pytest.skip(f"cuDNN does not start: {error}")
    _forget_engines()
    monkeypatch.setenv("SBNET_CUPY_CONV", "cudnn")
    yield device
    _forget_engines()
    if device.__name__ != "cupy":
        sys.modules.pop(module, None)


@pytest.mark.parametrize(("name", "dtype"), ON_DEVICE)
def test_cudnn(name: str, dtype: Any, cudnn: Any) -> None:
    case, ksizes = DEVICE_CASES[name], ((1, 1), (3, 3), (1, 1))
    check_conv(case, dtype, 4, bias=case.seed % 2 == 0, activation=None, xp=cudnn)
    if name in ("3x3-spare-rows", "3x3-stride"):
        check_bottleneck(case, dtype, ksizes, first=True, project="stride" in name, xp=cudnn)


def test_few_sizes_of_stacks(cudnn: Any) -> None:
    chosen = [choose_engine(cudnn, dtype, (3, 3)).__name__ for dtype in DTYPES]  # type: ignore[attr-defined]
    assert [name.removeprefix("sbnet_cupy._stack_conv_") for name in chosen] == ["cublas", "cudnn", "cudnn", "cudnn"]
    room = _device.stack_conv("cudnn").room
    assert [room(rows) for rows in range(14)] == [0, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert room(1000) == 1024
    assert room(700) == 768
    for rows in range(1, 2000):
        assert rows <= room(rows) <= 1.5 * rows


def test_the_engine_can_be_named(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    for environment, argument, expected in (
        (None, None, "cublas"),
        ("auto", None, "cublas"),
        ("cublas", None, "cublas"),
        ("cudnn", "cublas", "cublas"),
    ):
        monkeypatch.delenv("SBNET_CUPY_CONV", raising=False)
        if environment:
            monkeypatch.setenv("SBNET_CUPY_CONV", environment)
        found = choose_engine(device, np.dtype(np.float32), (3, 3), engine=argument)
        assert found.__name__ == f"sbnet_cupy._stack_conv_{expected}"  # type: ignore[attr-defined]
    monkeypatch.setenv("SBNET_CUPY_CONV", "cudn")
    with pytest.raises(ValueError, match=r"^SBNET_CUPY_CONV: expected one of auto, cublas, cudnn, got 'cudn'"):
        choose_engine(device, np.dtype(np.float32), (3, 3))
    assert choose_engine(np, np.dtype(np.float32), (3, 3)).room(5) == 5


def test_tf32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in ((None, False), ("0", False), ("", False), ("1", True)):
        monkeypatch.delenv("CUPY_TF32", raising=False)
        if value is not None:
            monkeypatch.setenv("CUPY_TF32", value)
        assert use_tf32(None) is expected
        assert use_tf32(True) is True
        assert use_tf32(False) is False
    # CUBLAS_COMPUTE_32F, _64F and _32F_FAST_TF32, which only float32 takes.
    pytest.importorskip("cupy")
    from sbnet_cupy._cublas import compute_type

    kinds = [compute_type(dtype, tf32) for dtype in DTYPES for tf32 in (False, True)]
    assert kinds == [70, 70, 68, 77, 68, 68, 68, 68]


def test_a_chain_of_blocks_that_share_a_mask() -> None:
    """All blocks active: the chain of dense blocks, to the last border. None active: nothing changes."""
    x = random_array(np.random.default_rng(0), (1, 21, 30, 6), np.float64)
    blocks = [BottleneckWeights.random(6, 4, seed=seed, dtype=np.float64) for seed in range(3)]
    params = calc_block_params_res_block(x.shape, (9, 8), blocks[0].ksizes, 1, "SAME")
    expected = x
    for weights in blocks:
        expected = res_block_bottleneck(expected, weights)
    for mask, wanted in ((np.ones(x.shape[:3], bool), expected), (np.zeros(x.shape[:3], bool), x)):
        indices = block_indices(mask, params, capacity=20)
        y = x.copy()
        for weights in blocks:
            sparse_res_block_bottleneck(y, weights, indices, params, out=y)
        assert np.allclose(y, wanted, rtol=1e-12, atol=1e-12)
    assert not np.allclose(x, expected, atol=0.1)


def test_zeroes_come_after_the_activation() -> None:
    """By hand: what the original got wrong. All pixels are 1 behind batch norm and ReLU, and the border has fewer."""
    x = np.zeros((1, 4, 4, 1), np.float32)
    one, ones = np.ones(1, np.float32), np.ones((1, 1, 1, 1), np.float32)
    weights = BottleneckWeights(ones, np.ones((3, 3, 1, 1), np.float32), ones, one, one, one, 0 * one, one, 0 * one)
    expected = np.array([[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]], np.float32)[None, ..., None]
    params = calc_block_params_res_block(x.shape, (5, 4), weights.ksizes, 1, "SAME")
    indices = block_indices(np.ones((1, 4, 4), bool), params)
    assert np.array_equal(res_block_bottleneck(x, weights), expected)
    assert np.array_equal(sparse_res_block_bottleneck(x, weights, indices, params), expected)


def test_convolution_by_hand() -> None:
    x = np.arange(1, 7, dtype=np.float32).reshape(1, 2, 3, 1)
    w = np.array([[1, 10], [100, 1000]], np.float32).reshape(2, 2, 1, 1)
    # SAME pads an even kernel behind: the last row and column meet zeros.
    same = [[1 + 20 + 400 + 5000, 2 + 30 + 500 + 6000, 3 + 600], [4 + 50, 5 + 60, 6]]
    assert conv2d(x, w)[0, :, :, 0].tolist() == same
    assert conv2d(x, w, padding="VALID")[0, :, :, 0].tolist() == [same[0][:2]]
    assert conv2d(x, w, 2)[0, :, :, 0].tolist() == [[same[0][0], same[0][2]]]
    explicit = conv2d(x, w, (2, 3), ((1, 0), (1, 0)), bias=np.array([-300], np.float32), activation="relu")
    assert explicit[0, :, :, 0].tolist() == [[1000.0 - 300]]  # of the corner, 1 meets 1000
    two = conv2d(x, np.concatenate([w, -w], 3), 2, activation="relu")
    assert two[0, 0].tolist() == [[same[0][0], 0], [same[0][2], 0]]


# sparse_gather with an element-wise step ------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("what", ["scale", "shift", "relu", "scale shift", "scale shift relu"])
@pytest.mark.parametrize("transpose", [False, True])
def test_gather_activates_pixels_of_the_image(dtype: Any, what: str, transpose: bool) -> None:
    rng = np.random.default_rng(0)
    x = random_array(rng, (2, 7, 9, 3), dtype)
    x[0, 0, 0] = [np.nan, np.inf, -0.0]
    x[1, 2] = np.finfo(np.float32).smallest_subnormal * 3 if dtype == np.float32 else -1
    wide = np.float64 if dtype.itemsize == 8 else np.float32
    options: dict[str, Any] = {}
    if "scale" in what:
        options["scale"] = random_array(rng, (3,), wide)
    if "shift" in what:
        options["shift"] = random_array(rng, (3,), wide)
    if "relu" in what:
        options["activation"] = "relu"
    # Pixel by pixel: multiply, add, cut off; rounded after each.
    y = np.empty_like(x)
    for place in np.ndindex(x.shape):
        value = wide(x[place])
        value = value if "scale" not in what else wide(value * options["scale"][place[3]])
        value = value if "shift" not in what else wide(value + options["shift"][place[3]])
        y[place] = dtype.type(wide(0) if "relu" in what and value < 0 else value)
    indices = np.array([[0, 0, 0], [1, 1, 2], [0, 1, 1], [-1, -1, -1]], np.int32)
    grid: dict[str, Any] = {"bsize": (4, 5), "boffset": (-1, -2), "bstride": (3, 4), "transpose": transpose}
    counts = np.array([3], np.int32)
    found = sparse_gather(x, counts, indices, **grid, **options)
    assert identical(found, sparse_gather(y, counts, indices, **grid), nan_payloads=False)


def test_errors_of_an_activated_gather() -> None:
    x, counts, indices = np.zeros((1, 4, 4, 3), np.float16), np.array([1], np.int32), np.zeros((1, 3), np.int32)
    good = np.ones(3, np.float32)

    def gather(x: Any = x, **options: Any) -> Any:
        return sparse_gather(x, counts, indices, bsize=(2, 2), bstride=(2, 2), **options)

    gather(scale=good, shift=good, activation="relu")
    for options, kind, message in (
        ({"scale": good.astype(np.float16)}, TypeError, "scale: expected dtype float32 for a tensor of float16, got"),
        ({"shift": good[:2]}, ValueError, "shift: expected shape (3,), one number for each channel, got (2,)"),
        ({"activation": "tanh"}, ValueError, "activation: expected None or 'relu', got 'tanh'"),
        ({"scale": [1, 2, 3]}, TypeError, "scale: expected a NumPy or CuPy array, got list"),
        ({"x": x.astype(np.int32), "activation": "relu"}, TypeError, "x: expected float16, bfloat16, float32 or"),
        ({"x": x.astype(np.float64), "scale": good}, TypeError, "scale: expected dtype float64 for a tensor of"),
    ):  # fmt: skip
        with pytest.raises(kind, match="^" + re.escape(message)):
            gather(**options)
    both = np.zeros(40, np.float32)
    with pytest.raises(ValueError, match=r"^out: expected memory of its own, got an array that overlaps scale"):
        gather(x.astype(np.float32), scale=both[5:8], out=both[:12].reshape(1, 2, 2, 3))


# Errors ---------------------------------------------------------------------------------------------------------------


class Network:
    """Good arguments, to spoil one at a time."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.x = random_array(rng, (1, 12, 14, 4), np.float32)
        self.w = random_array(rng, (3, 3, 4, 5), np.float32)
        self.params = calc_block_params(self.x.shape, (6, 6), self.w.shape, 1, "SAME")
        self.indices = block_indices(np.ones((1, 12, 14), bool), self.params)
        self.weights = BottleneckWeights.random(4, 3)

    def conv(self, **options: Any) -> Any:
        return sparse_conv2d(self.x, self.w, self.indices, self.params, **options)

    def block(self, **options: Any) -> Any:
        return sparse_res_block_bottleneck(self.x, self.weights, self.indices, self.params, **options)


def expect(kind: type[Exception], message: str, call: Any, **options: Any) -> None:
    with pytest.raises(kind, match="^" + re.escape(message)):
        call(**options)


def test_errors_of_convolutions() -> None:
    good = Network()
    good.conv(), good.block()
    dense = lambda **options: conv2d(good.x, good.w, **options)  # noqa: E731
    for call in (good.conv, dense):
        expect(ValueError, "padding: expected 'SAME', 'VALID' or", call, padding="FULL")
        expect(ValueError, "strides: expected two integers", call, strides=0)
        expect(TypeError, "bias: expected dtype float32", call, bias=np.zeros(5))
        expect(ValueError, "bias: expected shape (5,)", call, bias=np.zeros(4, np.float32))
        expect(ValueError, "activation: expected None or 'relu', got 'elu'", call, activation="elu")
        expect(TypeError, "allow_tf32: expected a bool or None, got int", call, allow_tf32=1)
    expect(ValueError, "params: expected BlockParams(bsize=(6, 6)", good.conv, padding="VALID")
    expect(ValueError, "params: bsize: expected a height that holds a kernel of 3", good.conv, strides=2)
    expect(TypeError, "base: expected dtype float32 like x, got float64", good.conv, base=np.zeros((1, 12, 14, 5)))
    expect(ValueError, "base: expected shape (1, 12, 14, 5) (N, H_out, W_out, K)", good.conv, base=good.x)
    both = np.zeros((1, 13, 14, 5), np.float32)
    message = "out: expected memory of its own, got an array that overlaps base"
    expect(ValueError, message, good.conv, base=both[:, 1:], out=both[:, :-1])
    expect(TypeError, "out: expected dtype float32 like x, got float16", good.conv, out=both[:, 1:].astype(np.float16))
    good.w = good.w.astype(np.float64)
    expect(TypeError, "w: expected dtype float32 like x, got float64", good.conv)
    expect(TypeError, "w: expected dtype float32 like x, got float64", dense)
    good.w = np.zeros((3, 3, 5, 5), np.float32)
    expect(ValueError, "w: expected shape (kh, kw, 4, K) for an x of shape (1, 12, 14, 4)", dense)
    good = Network()
    good.x = good.x.astype(np.int32)
    expect(TypeError, "x: expected float16, bfloat16, float32 or float64, got int32", good.conv)
    good = Network()
    good.indices = tuple(good.indices)  # type: ignore[assignment]
    for call in (good.conv, good.block):
        expect(TypeError, "indices: expected BlockIndices, as block_indices returns, got tuple", call)
    good = Network()
    good.indices = good.indices._replace(bin_counts=good.indices.bin_counts.astype(np.int64))
    for call in (good.conv, good.block):
        expect(TypeError, "bin_counts: expected dtype int32, got int64", call)
    good = Network()
    good.params = good.params.bsize  # type: ignore[assignment]
    for call in (good.conv, good.block):
        expect(TypeError, "params: expected BlockParams, got tuple", call)


def test_errors_of_bottlenecks() -> None:
    good = Network()
    expect(
        ValueError,
        "project: expected a projection for strides (2, 2) and 4 to 4 channels, got None",
        good.block,
        strides=2,
    )
    expect(ValueError, "out: expected shape (1, 12, 14, 4)", good.block, out=good.x[:, :5])
    expect(ValueError, "out: expected memory of its own, got an array that overlaps x", good.block, out=good.x[:, ::-1])
    expect(TypeError, "out: expected dtype float32 like x", good.block, out=good.x.astype(np.float64))
    before = good.x.copy()
    good.x.flags.writeable = False
    expect(ValueError, "out: expected a writable array, got a read-only one", good.block, out=good.x)
    assert np.array_equal(good.x, before)
    good = Network()
    good.x = good.x[..., :3]
    expect(ValueError, "x: expected 4 channels, as conv1 has, got shape (1, 12, 14, 3)", good.block)
    good = Network()
    good.x = good.x.astype(np.float16)
    expect(TypeError, "x: expected dtype float32 like the weights, got float16", good.block)
    good.weights = None  # type: ignore[assignment]
    expect(TypeError, "weights: expected BottleneckWeights or PackedBottleneck, got NoneType", good.block)
    good = Network()
    good.weights = BottleneckWeights.random(4, 3, out_channels=4)
    expect(ValueError, "out: expected memory of its own where there is a projection", good.block, out=good.x)


def test_errors_of_weights() -> None:
    good = BottleneckWeights.random(4, 3)
    for changes, kind, message in (
        ({"conv2": good.conv2[0]}, ValueError, "conv2: expected shape (kh, kw, C_in, C_out), got (3, 3, 3)"),
        ({"conv2": good.conv2.astype(np.float16)}, TypeError, "conv2: expected dtype float32 like conv1, got float16"),
        ({"conv3": good.conv1}, ValueError, "conv3: expected 3 channels of input, as conv2 puts out"),
        ({"scale1": None}, TypeError, "scale1: expected a NumPy or CuPy array, got NoneType"),
        ({"shift3": None}, TypeError, "shift3: expected a NumPy or CuPy array, got NoneType"),
        ({"scale2": good.scale1}, ValueError, "scale2: expected shape (3,)"),
        ({"shift2": good.shift2.astype(np.float64)}, TypeError, "shift2: expected dtype float32"),
        ({"project": good.conv1}, ValueError, "project: expected shape (1, 1, 4, 4), got (1, 1, 4, 3)"),
    ):
        with pytest.raises(kind, match="^" + re.escape(message)):
            replace(good, **changes)
    replace(good, scale1=None, shift1=None)
    with pytest.raises(AttributeError):
        good.conv1 = None  # type: ignore[misc]


def test_random_weights() -> None:
    a, b = (BottleneckWeights.random(8, 4, ksize=(5, 3), out_channels=6, seed=1, dtype=np.float16) for _ in range(2))
    assert [w.shape for w in (a.conv1, a.conv2, a.conv3, a.project)] == [
        (1, 1, 8, 4), (5, 3, 4, 4), (1, 1, 4, 6), (1, 1, 8, 6)
    ]  # fmt: skip
    assert a.conv1.dtype == np.float16
    assert a.shift3.dtype == np.float32
    assert all(np.array_equal(vars(a)[name], vars(b)[name]) for name in vars(a))
    assert not np.array_equal(a.conv1, BottleneckWeights.random(8, 4, seed=2, dtype=np.float16).conv1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_batch_norm_is_folded(dtype: str) -> None:
    rng = np.random.default_rng(0)
    gamma, beta, mean = (random_array(rng, (7,), dtype) for _ in range(3))
    var = rng.random(7).astype(dtype)
    scale, shift = fold_batch_norm(gamma, beta, mean, var, 1e-3)
    assert scale.dtype == shift.dtype == (np.float64 if dtype == "float64" else np.float32)
    x = rng.standard_normal((5, 7))
    expected = gamma.astype(float) * (x - mean) / np.sqrt(var.astype(float) + 1e-3) + beta
    assert np.allclose(x * scale.astype(float) + shift, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^mean: expected shape \(C,\), the same for all four, got \(6,\)"):
        fold_batch_norm(gamma, beta, mean[:6], var, 1e-3)
    with pytest.raises(TypeError, match=r"^beta: expected float16, bfloat16, float32 or float64, got int64"):
        fold_batch_norm(gamma, beta.astype(np.int64), mean, var, 1e-3)


def test_exported() -> None:
    names = "BlockParams BottleneckWeights block_indices calc_block_params calc_block_params_res_block conv2d "
    names += "PackedBottleneck PackedWeights pack_weights "
    names += "fold_batch_norm res_block_bottleneck sparse_conv2d sparse_res_block_bottleneck"
    assert set(names.split()) <= set(sbnet_cupy.__all__)
