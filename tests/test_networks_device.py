"""Convolutions and bottlenecks on a GPU: real sizes, TF32, synchronisation, and CuPy's cuBLAS handle."""

from __future__ import annotations

import time

import networks
import numpy as np
import pytest
from test_device import SPIN, random_image, random_mask

import sbnet_cupy
from sbnet_cupy import BottleneckWeights

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu


def on_device(weights: BottleneckWeights) -> BottleneckWeights:
    return BottleneckWeights(**{name: a if a is None else cupy.asarray(a) for name, a in vars(weights).items()})


@pytest.mark.parametrize("engine", ["fused", "composed"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("size", "channels", "inner"), [((57, 70), 96, 24), ((50, 88), 384, 96), ((41, 33), 30, 13)])
def test_stages_of_a_resnet(size: tuple[int, int], channels: int, inner: int, dtype: str, engine: str) -> None:
    x = random_image((1, *size, channels), dtype)
    weights = BottleneckWeights.random(channels, inner, dtype=dtype)
    params = sbnet_cupy.calc_block_params_res_block(x.shape, (18, 14), weights.ksizes, 1, "SAME")
    mask = cupy.asarray(random_mask((1, *size), 0.3))
    indices = sbnet_cupy.block_indices(mask, params)
    expected = networks.bottleneck(x, weights, (1, 1))
    device_x, device_weights = cupy.asarray(x), on_device(weights)
    expected.assert_near(sbnet_cupy.res_block_bottleneck(device_x, device_weights), np.ones((1, *size), bool))
    y = sbnet_cupy.sparse_res_block_bottleneck(device_x, device_weights, indices, params, engine=engine)
    covered = networks.tiles(indices, params, x.shape)
    expected.assert_near(y, covered)
    assert np.array_equal(y.get()[~covered], x[~covered])
    assert 0 < covered.mean() < 1


def test_float32_is_ieee_unless_tf32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUPY_TF32", raising=False)
    # Sums of few terms: their float32 bound is far below the error of TF32.
    x, w = random_image((1, 64, 64, 32), "float32"), random_image((1, 1, 32, 64), "float32", 1)
    everywhere = np.ones((1, 64, 64), bool)
    exact = networks.convolved(networks.exactly(x), w, (1, 1), "SAME", x.dtype)
    coarse = networks.convolved(networks.exactly(x), w, (1, 1), "SAME", x.dtype, tf32=True)
    arguments = cupy.asarray(x), cupy.asarray(w)
    handle = cupy.cuda.device.get_cublas_handle()
    cublas = pytest.importorskip("cupy_backends.cuda.libs.cublas")
    mode = cublas.getMathMode(handle)
    try:
        for set_mode in (0, 3):  # CUBLAS_DEFAULT_MATH, CUBLAS_TF32_TENSOR_OP_MATH
            cublas.setMathMode(handle, set_mode)  # what a user chose for other products is neither taken over nor lost
            exact.assert_near(sbnet_cupy.conv2d(*arguments), everywhere)
            assert cublas.getMathMode(handle) == set_mode
    finally:
        cublas.setMathMode(handle, mode)
    found = sbnet_cupy.conv2d(*arguments, allow_tf32=True)
    coarse.assert_near(found, everywhere)
    if int(cupy.cuda.Device().compute_capability) >= 80:  # the first with TF32
        with pytest.raises(AssertionError, match="beyond the bound"):
            exact.assert_near(found, everywhere)
    monkeypatch.setenv("CUPY_TF32", "1")
    assert bool((sbnet_cupy.conv2d(*arguments) == found).all())


def test_half_sums_are_not_rounded_on_the_way() -> None:
    """The first kernel position adds up to 4096, each other one to 1, which would be lost on 4096 in float16."""
    x = cupy.ones((1, 8, 8, 8), np.float16)
    w = cupy.full((3, 3, 8, 8), 0.125, np.float16)
    w[0, 0] = 512
    assert bool((sbnet_cupy.conv2d(x, w, padding="VALID") == 4104).all())


@pytest.mark.parametrize("engine", ["fused", "composed"])
def test_nothing_waits_for_the_device(engine: str) -> None:
    spin = cupy.RawKernel(SPIN, "spin")
    x = cupy.asarray(random_image((1, 60, 76, 16), "float16"))
    weights = on_device(BottleneckWeights.random(16, 8, dtype="float16"))
    params = sbnet_cupy.calc_block_params_res_block(x.shape, (18, 18), weights.ksizes, 1, "SAME")
    strided = sbnet_cupy.calc_block_params(x.shape, (17, 17), weights.conv2.shape, 2, "SAME")
    conv = cupy.asarray(random_image((3, 3, 16, 8), "float16"))
    mask = cupy.asarray(random_mask(x.shape[:3], 0.5))

    def work() -> float:
        begin = time.perf_counter()
        indices = sbnet_cupy.block_indices(mask, params, capacity=20)
        packed = sbnet_cupy.pack_weights(weights) if engine == "fused" else weights
        sbnet_cupy.sparse_res_block_bottleneck(x, packed, indices, params, out=x, engine=engine)
        few = sbnet_cupy.block_indices(mask, strided, capacity=7)
        sbnet_cupy.sparse_conv2d(x, conv, few, strided, strides=2, engine=engine)
        sbnet_cupy.res_block_bottleneck(x, weights)
        return time.perf_counter() - begin

    with cupy.cuda.Stream(non_blocking=True) as stream:
        work()  # compile, and fill the memory pool
        stream.synchronize()
        spin((1,), (1,), (np.int64(300_000_000),))
        assert work() < 0.2
        stream.synchronize()


@pytest.mark.parametrize("engine", ["fused", "composed"])
def test_two_runs_agree_to_the_bit(engine: str) -> None:
    x = cupy.asarray(random_image((1, 60, 76, 32), "float32"))
    weights = on_device(BottleneckWeights.random(32, 16))
    params = sbnet_cupy.calc_block_params_res_block(x.shape, (18, 18), weights.ksizes, 1, "SAME")
    indices = sbnet_cupy.block_indices(cupy.asarray(random_mask(x.shape[:3], 0.5)), params)
    first = sbnet_cupy.sparse_res_block_bottleneck(x, weights, indices, params, engine=engine)
    for _ in range(5):
        again = sbnet_cupy.sparse_res_block_bottleneck(x, weights, indices, params, engine=engine)
        assert bool((again == first).all())
