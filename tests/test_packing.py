"""How weights are packed: by the formula, in any memory layout, on NumPy arrays and by the kernel."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import cpu_cuda
import ml_dtypes
import numpy as np
import pytest
from cases import LAYOUTS, identical, lay_out
from hypothesis import given
from hypothesis import strategies as st

from sbnet_cupy import BottleneckWeights, PackedWeights, pack_weights
from sbnet_cupy._packing import Order, Packing, is_whole, pack, pack_array, packing_of, round_tf32
from sbnet_cupy._validate import Spec

HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
DTYPES = [*HALVES, np.dtype(np.float32)]

shapes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 300), st.integers(0, 90))


@given(shapes | st.tuples(st.just(1), st.just(1), st.integers(500, 5000), st.integers(1, 600)), st.sampled_from([2, 4]))
def test_packing_has_room_for_all_and_wastes_little(shape: tuple[int, int, int, int], itemsize: int) -> None:
    packing = packing_of(shape, itemsize)
    pieces = -(-shape[2] * itemsize // 16)
    assert packing.lanes * itemsize == 16
    assert (packing.positions, packing.channels, packing.features) == (shape[0] * shape[1], *shape[2:])
    assert packing.chunk * packing.chunks >= max(1, pieces) > packing.chunk * (packing.chunks - 1)
    assert 4 * packing.steps >= packing.positions * packing.chunk > 4 * (packing.steps - 1)
    assert 8 * packing.columns >= shape[3] > 8 * (packing.columns - 4)
    # A thread stages one piece of a pixel, and a kernel unrolls what one chunk takes.
    assert packing.chunk <= 64
    assert packing.steps <= 54 or packing.chunk <= 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 40), st.integers(0, 50))
    | st.sampled_from([(1, 1, 600, 9), (3, 3, 130, 3), (7, 7, 40, 8)])
)
def test_each_number_lies_where_the_formula_says(shape: tuple[int, int, int, int], dtype: Any) -> None:
    """Word by word, from the module's description; nothing else but zeros."""
    w = np.arange(1, 1 + np.prod(shape)).reshape(shape).astype(dtype)
    packing = packing_of(shape, dtype.itemsize)
    expected = np.zeros((*packing.warp_shape, 4 // dtype.itemsize), dtype)
    groups = np.zeros((*packing.warpgroup_shape, 4 // dtype.itemsize), dtype)
    turned = dtype.itemsize == 2 and shape[3] > 0 and -(-shape[3] // 8) % 4 == 0
    for position, (y, x) in enumerate(np.ndindex(shape[:2])):
        for channel in range(shape[2]):
            piece, lane = divmod(channel, 16 // dtype.itemsize)
            chunk, within = divmod(piece, packing.chunk)
            step, place = divmod(position * packing.chunk + within, 4)
            word, part = divmod(lane * dtype.itemsize, 4)
            features = np.arange(shape[3])
            expected[features // 8, chunk, step, features % 8, word, place, part // dtype.itemsize] = w[y, x, channel]
            columns = features // 32 * 32 + features % 8 // 2 * 8 + features % 32 // 8 * 2 + features % 2
            columns = columns if turned else features
            number = piece * packing.positions + position
            groups[number, columns, word, part // dtype.itemsize] = w[y, x, channel]
    found = pack(w, packing)
    assert found.dtype == np.uint32
    assert [packing.offset(order) for order in Order] == [0, 4 * np.prod(packing.warp_shape)]
    assert identical(found, np.concatenate([expected.view(np.uint32).ravel(), groups.view(np.uint32).ravel()]))


def test_tf32_is_rounded_to_the_nearest_and_ties_go_away_from_zero() -> None:
    """Against exact rational arithmetic: numbers of 10 bits of mantissa, as many exponents as float32 has."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 3000, np.uint32)
    bits[:1000] = bits[:1000] & 0xFFFFE000 | rng.choice([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF], 1000).astype(np.uint32)
    numbers = np.concatenate([bits.view(np.float32), np.array([0.0, -0.0, 1e-45, 3.4028235e38], np.float32)])
    numbers = numbers[np.isfinite(numbers)]
    for number, rounded in zip(numbers, round_tf32(numbers)):
        below = int(abs(number).view(np.uint32)) & 0xFFFFE000
        low, high = (_value(magnitude) for magnitude in (below, below + 0x2000))
        exact = Fraction(float(abs(number)))
        wanted = low if exact - low < high - exact else high
        assert (Fraction(2**128) if np.isinf(rounded) else abs(Fraction(float(rounded)))) == wanted
        assert np.signbit(rounded) == np.signbit(number)
    special = np.array([np.inf, -np.inf, np.nan], np.float32)
    assert identical(round_tf32(special), special)


def _value(bits: int) -> Fraction:
    """Of a float32 that is not negative; what follows the largest one is 2**128."""
    exponent, mantissa = divmod(bits, 2**23)
    return Fraction(mantissa + (2**23 if exponent else 0)) * Fraction(2) ** (max(exponent, 1) - 150)


def test_whole_pixels() -> None:
    spec = Spec.contiguous((2, 3, 4, 24), np.dtype(np.float16), 0)
    assert is_whole(spec)
    assert is_whole(spec, 2)
    # Channels, their stride, the address, a row's stride; of an axis of one, the stride does not matter.
    assert not is_whole(Spec.contiguous((2, 3, 4, 20), spec.dtype, 0))
    assert not is_whole(spec._replace(strides=(576, 192, 48, 4)))
    assert not is_whole(spec._replace(misalignment=8))
    assert not is_whole(spec._replace(strides=(576, 200, 48, 2)))
    assert is_whole(spec._replace(shape=(2, 1, 4, 24), strides=(576, 200, 48, 2)))


# On a device ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """CuPy, or what stands in for it."""
    if request.param == "gpu":
        yield pytest.importorskip("cupy")
        return
    if cpu_cuda.why_unavailable() and not os.environ.get("CI"):
        pytest.skip(cpu_cuda.why_unavailable())
    with cpu_cuda.device() as xp:
        yield xp


ARITHMETICS = [(dtype, False) for dtype in DTYPES] + [(np.dtype(np.float32), True)]


@pytest.mark.parametrize(("dtype", "tf32"), ARITHMETICS, ids=lambda value: str(value))
def test_the_kernel_packs_as_numpy_does(dtype: Any, tf32: bool, device: Any) -> None:
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(3, 3, 24, 16), (2, 3, 5, 9), (1, 1, 600, 70), (7, 7, 9, 3), (1, 1, 0, 8)]):
        w = rng.standard_normal(shape).astype(dtype)
        w.reshape(-1)[:3] = np.array([np.nan, np.inf, -0.0])[: min(3, w.size)]
        for layout in (LAYOUTS[number % len(LAYOUTS)], "nhwc"):
            packed = pack_weights(lay_out(w, layout, device), allow_tf32=tf32)
            assert packed.shape == shape
            assert packed.dtype == dtype
            assert packed.tf32 is tf32
            assert identical(packed.words, pack(w, packed.packing, tf32))


@pytest.mark.parametrize("order", Order)
def test_one_order_is_packed_alone(order: Order, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its place, as with the other; nothing is written elsewhere."""
    for dtype, shape in itertools.product((np.float16, np.float32), ((3, 3, 24, 16), (1, 1, 40, 72))):
        w = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        on_device, packing = device.asarray(w), packing_of(shape, w.itemsize)
        begin, end = (packing.offset(order) // 4 + n for n in (0, packing.words_in(order)))
        expected = np.full(packing.words, 0xA5A5A5A5, np.uint32)
        memory = device.asarray(expected)
        expected[begin:end] = pack(w, packing, dtype is np.float32)[begin:end]
        with monkeypatch.context() as patch:
            patch.setattr(device, "empty", lambda *_, found=memory: found)
            assert identical(pack_array(on_device, True, (order,)).words, expected)


def test_a_bottleneck_is_packed(device: Any) -> None:
    for dtype in DTYPES:
        plain = BottleneckWeights.random(16, 5, ksize=(3, 1), out_channels=9, dtype=dtype, seed=1)
        on_device = {name: a if a is None else device.asarray(a) for name, a in vars(plain).items()}
        packed = pack_weights(BottleneckWeights(**on_device))
        for found, w in zip(packed.convs, (plain.conv1, plain.conv2, plain.conv3)):
            assert identical(found.words, pack(w, packing_of(w.shape, dtype.itemsize)))
        names = ("scale1", "shift1", "scale2", "shift2", "scale3", "shift3")
        assert identical(packed.channels, np.concatenate([getattr(plain, name) for name in names]))
        on_device["scale1"] = on_device["shift1"] = None
        channels = pack_weights(BottleneckWeights(**on_device)).channels.get()
        assert channels[:32].tolist() == [1] * 16 + [0] * 16


def test_numpy_arrays_and_float64_pass_through(device: Any) -> None:
    plain = BottleneckWeights.random(4, 3)
    for w in (plain.conv2, plain.conv2.astype(np.float64), device.asarray(plain.conv2.astype(np.float64))):
        packed = pack_weights(w)
        assert packed.source is w
        assert packed.words.size == 0
    assert pack_weights(plain).weights is plain
    assert pack_weights(plain).channels is None


def test_errors(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.ones((3, 3, 4, 5), np.float32)
    for bad, kind, message in (
        (w[0], ValueError, "w: expected shape (kh, kw, C, K), got (3, 4, 5)"),
        (w[:0], ValueError, "w: expected shape (kh, kw, C, K), got (0, 3, 4, 5)"),
        (w.astype(np.int32), TypeError, "w: expected float16, bfloat16, float32 or float64, got int32"),
        (w.tolist(), TypeError, "w: expected a NumPy or CuPy array, got list"),
    ):
        with pytest.raises(kind, match="^" + re.escape(message)):
            pack_weights(bad)
    with pytest.raises(TypeError, match=r"^allow_tf32: expected a bool or None, got int"):
        pack_weights(w, allow_tf32=1)  # type: ignore[arg-type]
    packed = pack_weights(device.asarray(w))
    for changes in ({"words": packed.words[:0]}, {"packing": packing_of((3, 3, 4, 50), 4)}, {"source": w}):
        with pytest.raises(ValueError, match=r"^PackedWeights: expected what pack_weights makes"):
            replace(packed, **changes)
    assert isinstance(packed, PackedWeights)
    assert isinstance(packed.packing, Packing)
    on_device = device.asarray(w)
    bottleneck = BottleneckWeights(
        *(device.asarray(a) for a in list(vars(BottleneckWeights.random(4, 3)).values())[:9])
    )
    monkeypatch.setattr(device.cuda.runtime, "getDevice", lambda: 1)
    for name, bad in (("w", on_device), ("conv1", bottleneck)):
        with pytest.raises(
            ValueError, match=rf"^{name}: expected an array on the current device 1, got one on device 0"
        ):
            pack_weights(bad)
