"""The fused kernels where only a GPU shows it: neighbours in place, streams, size, and the same bits in every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import networks
import numpy as np
import pytest
from cases import identical
from test_device import random_image, random_mask
from test_networks_device import on_device

import sbnet_cupy
from sbnet_cupy import BlockIndices, BlockParams, BottleneckWeights, _bottleneck, _conv, _fused, _fused_network
from sbnet_cupy._engine import Route, bottleneck_routes
from sbnet_cupy._validate import spec_of

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def routes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Route]]:
    """Ways through a bottleneck that are considered, however long they take: one launch, and perhaps a scatter."""
    allowed = [Route.DIRECT, Route.STACK]
    monkeypatch.setattr(
        _fused_network, "bottleneck_routes", lambda *form: tuple(r for r in bottleneck_routes(*form) if r in allowed)
    )
    _bottleneck.prepare.cache_clear()
    yield allowed
    _bottleneck.prepare.cache_clear()


ARITHMETICS = [("float16", False), ("float32", True), ("float32", False)]


class Bottleneck:
    """A packed bottleneck on an image, all of whose blocks of 8 x 8 are active unless a mask says otherwise."""

    def __init__(
        self, size: tuple[int, int], channels: int, inner: int, dtype: str, tf32: bool, mask: Any = None
    ) -> None:
        self.x = random_image((1, *size, channels), dtype)
        self.weights = BottleneckWeights.random(channels, inner, dtype=dtype)
        self.tf32 = tf32
        self.packed = sbnet_cupy.pack_weights(on_device(self.weights), allow_tf32=tf32)
        self.params: BlockParams = sbnet_cupy.calc_block_params_res_block(
            self.x.shape, (10, 10), self.weights.ksizes, 1, "SAME"
        )
        mask = np.ones((1, *size), bool) if mask is None else mask
        self.indices: BlockIndices = sbnet_cupy.block_indices(cupy.asarray(mask), self.params)

    def run(self, x: Any, out: Any = None) -> Any:
        return sbnet_cupy.sparse_res_block_bottleneck(
            x, self.packed, self.indices, self.params, out=out, engine="fused", allow_tf32=self.tf32
        )

    @property
    def route(self) -> Route:
        """How it runs in place."""
        spec, rows = spec_of(cupy.asarray(self.x)), self.indices.active_block_indices
        shapes = tuple(conv.shape for conv in self.packed.convs)
        layers = _layers(self.x.shape)
        blocks = _fused_network.FusedBlocks(0, rows.strides, len(rows), 1, layers, self.params, shapes, self.tf32)
        plan = _fused_network.plan_bottleneck("fused", blocks, spec, spec, True, True, False)
        assert plan is not None
        return plan.route


def _layers(shape: tuple[int, ...]) -> tuple[Any, ...]:
    from sbnet_cupy._conv_geometry import make_chain

    ksizes = [(1, 1), (3, 3), (1, 1)]
    return tuple(make_chain((shape[1], shape[2]), ksizes, [(1, 1)] * 3, ["SAME"] * 3))


@pytest.mark.parametrize(("dtype", "tf32"), ARITHMETICS)
@pytest.mark.parametrize(
    ("size", "route"), [((40, 57), Route.DIRECT), ((400, 330), Route.STACK), ((40, 57), Route.LAYERS)]
)
def test_neighbours_in_place(size: tuple[int, int], route: Route, dtype: str, tf32: bool, routes: list[Route]) -> None:
    """No tile sees what another has written: in place and out of place give the same bits, time and again."""
    if route is Route.LAYERS:
        routes[:] = [route]
    case = Bottleneck(size, 96, 24, dtype, tf32)
    assert case.route is route or cupy.cuda.Device().attributes["MultiProcessorCount"] < 132
    x = cupy.asarray(case.x)
    apart = case.run(x)
    if size == (40, 57):  # the oracle takes its time
        expected = networks.bottleneck(case.x, case.weights, (1, 1), tf32, wide_sums=True)
        expected.assert_near(apart, np.ones((1, *size), bool))
    assert identical(x, case.x)
    for _ in range(30):
        y = x.copy()
        assert case.run(y, out=y) is y
        assert bool((y == apart).all())


def one_by_one_and_at_once(
    chain: Callable[[list[Any], bool], None], new_images: Callable[[], list[Any]], captured: bool
) -> tuple[list[Any], list[Any]]:
    """What a chain of calls makes of images where each link waits for the one before, and where none does."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        expected, found = new_images(), new_images()
        chain(expected, True)
        if captured:
            stream.begin_capture()
            chain(found, False)
            stream.end_capture().launch(stream)
        else:
            chain(found, False)
        stream.synchronize()
    return expected, found


@pytest.mark.parametrize("captured", [False, True])
def test_a_kernel_that_starts_early_sees_all_that_was_before_it(captured: bool) -> None:
    """Each link reads the whole image that the one before wrote, and overwrites what the one before that has read."""
    case = Bottleneck((120, 130), 96, 24, "float16", False)
    first, links = cupy.asarray(case.x), 30
    quarter = cupy.float16(0.25)

    def chain(images: list[Any], wait: bool) -> None:
        for k in range(links):
            source, target = images[k % 2], images[(k + 1) % 2]
            case.run(source, out=target)
            if k % 2:  # with a kernel of another kind between
                cupy.multiply(target, quarter, out=target)
            if wait:
                cupy.cuda.get_current_stream().synchronize()

    expected, found = one_by_one_and_at_once(chain, lambda: [first.copy(), cupy.empty_like(first)], captured)
    assert bool((found[links % 2] == expected[links % 2]).all())
    assert bool(cupy.isfinite(found[links % 2]).all())


@pytest.mark.parametrize(("dtype", "tf32"), ARITHMETICS[:2])
@pytest.mark.parametrize("captured", [False, True])
def test_a_list_that_changes_just_before(
    captured: bool, dtype: str, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolutions that look at the list of blocks before earlier kernels are done see what these make of it."""
    plan_wgmma = _fused.plan_wgmma  # by warpgroups where there are any: others look later
    monkeypatch.setattr(_fused, "plan_wgmma", lambda *form: (plan_wgmma(*form)[0], 0.0))
    _conv.prepare.cache_clear()
    x, w = random_image((1, 120, 130, 24), dtype), random_image((3, 3, 24, 24), dtype, 1)
    params = sbnet_cupy.calc_block_params(x.shape, (10, 10), w.shape, 1, "SAME")
    shares = (0.1, 0.5, 0.0, 0.2)
    masks = [cupy.asarray(random_mask(x.shape[:3], share, seed)) for seed, share in enumerate(shares)]
    device_x, packed = cupy.asarray(x), sbnet_cupy.pack_weights(cupy.asarray(w), allow_tf32=tf32)
    shared, links = sbnet_cupy.block_indices(masks[0], params, capacity=300), 12
    grid = {"bsize": params.bsize_out, "bstride": params.bsize_out, "capacity": 300}

    def chain(images: list[Any], wait: bool) -> None:
        for k, image in enumerate(images):
            sbnet_cupy.reduce_mask(masks[k % 4], params.bcount, out=shared, **grid)
            sbnet_cupy.sparse_conv2d(
                device_x, packed, shared, params, base=image, out=image, engine="fused", allow_tf32=tf32
            )
            if wait:
                cupy.cuda.get_current_stream().synchronize()

    expected, found = one_by_one_and_at_once(chain, lambda: [cupy.zeros_like(device_x) for _ in range(links)], captured)
    for k, (image, wanted) in enumerate(zip(found, expected)):
        assert bool((image == wanted).all())
        assert bool(image.any()) == (k % 4 != 2)
    _conv.prepare.cache_clear()


def test_two_streams_at_once() -> None:
    """Chains in place on one stream each, of CTAs that wait for each other, do not disturb one another."""
    cases = [Bottleneck((40, 56), 64, 16, "float16", False), Bottleneck((56, 40), 64, 16, "float16", False)]
    expected = []
    for case in cases:
        y = cupy.asarray(case.x)
        for _ in range(40):
            y = case.run(y)
            y *= cupy.float16(0.5)
        expected.append(y)
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in cases]
    found = [cupy.asarray(case.x) for case in cases]
    cupy.cuda.Device().synchronize()
    for _ in range(40):
        for case, y, stream in zip(cases, found, streams):
            with stream:
                case.run(y, out=y)
                cupy.multiply(y, cupy.float16(0.5), out=y)
    for stream in streams:
        stream.synchronize()
    for y, wanted in zip(found, expected):
        assert bool((y == wanted).all())
        assert bool(cupy.isfinite(y).all())


@pytest.mark.parametrize(("dtype", "tf32"), ARITHMETICS)
@pytest.mark.parametrize("ksize", [(1, 1), (3, 3), (5, 5)])
def test_two_runs_agree_to_the_bit(ksize: tuple[int, int], dtype: str, tf32: bool) -> None:
    x, w = random_image((1, 100, 140, 64), dtype), random_image((*ksize, 64, 96), dtype, 1)
    params = sbnet_cupy.calc_block_params(x.shape, (7 + ksize[0], 7 + ksize[1]), ksize, 1, "SAME")
    mask = random_mask(x.shape[:3], 0.3)
    indices = sbnet_cupy.block_indices(cupy.asarray(mask), params)
    packed = sbnet_cupy.pack_weights(cupy.asarray(w), allow_tf32=tf32)
    device_x = cupy.asarray(x)
    runs = [sbnet_cupy.sparse_conv2d(device_x, packed, indices, params, engine="fused") for _ in range(5)]
    assert all(bool((run == runs[0]).all()) for run in runs)
    expected = networks.convolved(networks.exactly(x), w, (1, 1), "SAME", np.dtype(np.float32), tf32)
    networks.rounded(expected, x.dtype).assert_near(runs[0], networks.tiles(indices, params, x.shape))


def test_more_than_2_to_the_31_elements() -> None:
    """Blocks at both ends of 4.5 GB: read and written in place, where 32 bits would lead elsewhere."""
    shape = (9, 2048, 2048, 64)
    assert np.prod(shape) > 2**31
    x = cupy.zeros(shape, np.float16)
    small = random_image((1, 24, 24, 64), "float16")
    x[8, -24:, -24:], x[0, :24, :24] = cupy.asarray(small[0]), cupy.asarray(small[0])
    weights = BottleneckWeights.random(64, 16, dtype="float16")
    params = sbnet_cupy.calc_block_params_res_block(shape, (10, 10), weights.ksizes, 1, "SAME")
    rows = [[0, 0, 0], [0, 1, 1], [8, 254, 254], [8, 255, 255]]
    indices = BlockIndices(cupy.asarray(rows, cupy.int32), cupy.asarray([4], cupy.int32))
    packed = sbnet_cupy.pack_weights(on_device(weights))

    crop = sbnet_cupy.calc_block_params_res_block(small.shape, (10, 10), weights.ksizes, 1, "SAME")
    expected = {}
    for corner, tiles in ((0, [[0, 0, 0], [0, 1, 1]]), (8, [[0, 1, 1], [0, 2, 2]])):
        # With as much room, so that the plan is the same, and with it the order of the sums.
        of_crop = BlockIndices(cupy.asarray(tiles + [[-1] * 3] * 2, cupy.int32), cupy.asarray([2], cupy.int32))
        image = cupy.asarray(small)
        expected[corner] = sbnet_cupy.sparse_res_block_bottleneck(image, packed, of_crop, crop, engine="fused")[0]
    y = sbnet_cupy.sparse_res_block_bottleneck(x, packed, indices, params, out=x, engine="fused")
    assert bool((y[0, :24, :24] == expected[0]).all())
    assert bool((y[8, -24:, -24:] == expected[8]).all())
    assert not bool(y[4].any())

    w = random_image((1, 1, 64, 8), "float16")
    conv = sbnet_cupy.calc_block_params(shape, (8, 8), w.shape, 1, "SAME")
    z = sbnet_cupy.sparse_conv2d(y, cupy.asarray(w), indices, conv, engine="fused")
    corner = y[8:, -8:, -8:].get()
    products = networks.convolved(networks.exactly(corner), w, (1, 1), "SAME", np.dtype(np.float32))
    networks.rounded(products, corner.dtype).assert_near(z[8:, -8:, -8:], np.ones((1, 8, 8), bool))
    assert not bool(z[:, 24:-24].any())


def test_half_sums_are_not_rounded_on_the_way() -> None:
    """The first kernel position adds up to 4096, each other one to 1, which would be lost on 4096 in float16."""
    x = cupy.ones((1, 8, 8, 8), np.float16)
    w = cupy.full((3, 3, 8, 8), 0.125, np.float16)
    w[0, 0] = 512
    params = sbnet_cupy.calc_block_params(x.shape, (8, 8), w.shape, 1, "VALID")
    indices = sbnet_cupy.block_indices(cupy.ones((1, 8, 8), bool), params)
    assert bool((sbnet_cupy.sparse_conv2d(x, w, indices, params, padding="VALID", engine="fused") == 4104).all())


def test_float32_is_ieee_unless_tf32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUPY_TF32", raising=False)
    # Sums of few terms: their float32 bound is far below the error of TF32.
    x, w = random_image((1, 64, 64, 32), "float32"), random_image((1, 1, 32, 64), "float32", 1)
    everywhere = np.ones((1, 64, 64), bool)
    exact, coarse = (
        networks.convolved(networks.exactly(x), w, (1, 1), "SAME", x.dtype, tf32=tf32) for tf32 in (False, True)
    )
    params = sbnet_cupy.calc_block_params(x.shape, (16, 16), w.shape, 1, "SAME")
    indices = sbnet_cupy.block_indices(cupy.asarray(everywhere), params)
    arguments = cupy.asarray(x), cupy.asarray(w), indices, params
    exact.assert_near(sbnet_cupy.sparse_conv2d(*arguments, engine="fused"), everywhere)
    found = sbnet_cupy.sparse_conv2d(*arguments, engine="fused", allow_tf32=True)
    coarse.assert_near(found, everywhere)
    if int(cupy.cuda.Device().compute_capability) >= 80:  # the first with TF32
        with pytest.raises(AssertionError, match="beyond the bound"):
            exact.assert_near(found, everywhere)
    monkeypatch.setenv("CUPY_TF32", "1")
    assert bool((sbnet_cupy.sparse_conv2d(*arguments, engine="fused") == found).all())
