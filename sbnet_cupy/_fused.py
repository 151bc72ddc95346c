"""Host side of pack.cu, conv*.cu and bottleneck*.cu: fills in their arguments and launches them."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import cupy
import numpy as np

from . import _jit, _meetings
from ._affine import IDENTITY, Affine
from ._fused_bottleneck_plan import BottleneckPlan, BottleneckProblem, plan_bottleneck, scatter_clocks
from ._fused_conv_plan import ConvPlan, ConvProblem, plan_conv
from ._fused_form import BottleneckCall, ConvCall
from ._fused_plan import DeviceLimits, Pair
from ._fused_wgmma_bottleneck_plan import WgmmaBottleneckPlan, plan_wgmma_bottleneck
from ._fused_wgmma_plan import WgmmaPlan, plan_wgmma
from ._instances import (
    Instance,
    bottleneck_instance,
    conv_instance,
    pack_instance,
    products_of,
    wgmma_bottleneck_instance,
    wgmma_instance,
)
from ._launch import Dim3, Template
from ._packing import Order, PackedWeights, Packing, is_whole
from ._plan import division
from ._transfer import MOST_IMAGES
from ._validate import Spec
from ._warps import THREADS


def pack(w: Any, packing: Packing, tf32: bool, orders: tuple[Order, ...]) -> Any:
    """Pack weights on the current device, in some orders. There is room for all of them."""
    words, count = cupy.empty(packing.words, np.uint32), sum(map(packing.words_in, orders))
    if count:
        instance = packing_instance(w.dtype, tf32)
        argument = _pack_argument(tuple(w.shape), tuple(w.strides), w.dtype.itemsize, packing, orders)
        grid = (math.ceil(count / 256), 1, 1)
        _jit.launch(instance, grid, (256, 1, 1), argument.at(w.data.ptr, words.data.ptr + packing.offset(orders[0])))
    return words


def packing_instance(dtype: np.dtype[Any], tf32: bool) -> Instance:
    """The kernel that packs weights of a dtype."""
    return pack_instance(products_of(dtype, tf32 or dtype.itemsize == 2))


@functools.lru_cache(maxsize=1024)
def _pack_argument(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, packing: Packing, orders: tuple[Order, ...]
) -> Template:
    """struct Packing of kernels/pack.cu, from the first of some orders on."""
    steps = (s // itemsize for s in strides)
    words = {order: packing.words_in(order) for order in orders}
    sizes = (packing.channels, packing.features, packing.chunk, packing.chunks, packing.steps)
    last = packing.warpgroup_shape[1], packing.together
    count = words.get(Order.WARPS, 0), sum(words.values())
    return Template(2, [*steps, shape[1], packing.positions, *sizes, *count, *last])


class Launch(NamedTuple):
    """A launch but for its addresses."""

    instance: Instance
    grid: Dim3
    #: Bytes of dynamic shared memory.
    shared: int
    argument: Template
    #: The device on which its CTAs wait for each other, so that all have to run at the same time; -1: they do not.
    meets_on: int = -1

    def run(self, *addresses: int) -> None:
        """Launch it on the current stream."""
        argument = self.argument.at(*addresses)
        _jit.launch_early(self.instance, self.grid, (THREADS, 1, 1), self.shared, argument, self.meets_on >= 0)


class Ready(NamedTuple):
    """A call that can be run; without a launch if it has nothing to write."""

    launch: Launch | None
    #: How long it takes, by the model, with what must follow it.
    clocks: float = 0
    #: In which order it takes its weights, and how many bytes of others come before them, for each convolution.
    order: Order = Order.WARPS
    skipped: tuple[int, ...] = (0, 0, 0)


def convolve(
    ready: Ready,
    source: Any,
    target: Any,
    w: PackedWeights,
    bin_counts: Any,
    indices: Any,
    *,
    before: Affine = IDENTITY,
    after: Affine = IDENTITY,
    residual: Any = None,
) -> None:
    """Run a convolution."""
    if ready.launch is not None:
        ready.launch.run(
            source.data.ptr,
            target.data.ptr,
            0 if residual is None else residual.data.ptr,
            w.words.data.ptr + ready.skipped[0],
            indices.data.ptr,
            bin_counts.data.ptr,
            *before.addresses,
            *after.addresses,
        )


def prepare_conv(call: ConvCall, most_clocks: float = math.inf) -> Ready | None:
    """What :func:`convolve` runs, or None if no plan fits, or it takes longer."""
    dtype = call.source.spec.dtype
    if 0 in (*call.target.spec.shape, call.packing.columns, call.rows):
        return Ready(None)
    limits = _jit.device_limits(call.device)
    tensor = limits.has_tensor_cores and (call.tf32 or dtype.itemsize == 2)
    problem = ConvProblem(
        packing=call.packing,
        ksize=call.layer.ksize,
        strides=call.layer.strides,
        block=call.grid.bsize,
        uses_tensor_cores=tensor,
        activates=call.activates,
        adds=call.residual is not None,
    )
    plan, clocks = plan_conv(problem, call.rows, limits)
    group_plan, group_clocks = None, math.inf
    if _is_for_warpgroups(call, tensor, limits):
        group_plan, group_clocks = plan_wgmma(problem, call.rows, limits)
    if min(clocks, group_clocks) > most_clocks:
        return None
    if group_plan is not None and group_clocks < clocks:
        return _ready_wgmma(call, group_plan, group_clocks)
    return None if plan is None or clocks > most_clocks else _ready_conv(call, plan, tensor, clocks)


def _is_for_warpgroups(call: ConvCall, tensor: bool, limits: DeviceLimits) -> bool:
    """Whether kernels/conv_wgmma.cu can do it."""
    plain = call.residual is None and not call.activates and call.layer.strides == (1, 1)
    return limits.has_warpgroups and tensor and plain and is_whole(call.source.spec) and is_whole(call.target.spec)


def _ready_conv(call: ConvCall, plan: ConvPlan, tensor: bool, clocks: float) -> Ready:
    dtype = call.source.spec.dtype
    rounds = tensor and dtype.itemsize == 4 and not call.activates
    shape = (*plan.tile, *call.layer.ksize, *call.layer.strides, call.packing.chunk)
    products, layout = products_of(dtype, tensor, rounds), plan.layout.expression
    instance = conv_instance(products, layout, shape, _conv_form(call), plan.resident)
    return Ready(_conv_launch(call, plan, instance, call.packing.chunks), clocks)


def _ready_wgmma(call: ConvCall, plan: WgmmaPlan, clocks: float) -> Ready:
    shape = (*call.layer.ksize, plan.chunk, plan.parts, call.packing.together)
    instance = wgmma_instance(call.source.spec.dtype, plan.layout.expression, shape, plan.chunks > 1, plan.resident)
    launch, order = _conv_launch(call, plan, instance, plan.chunks), Order.WARPGROUPS
    return Ready(launch, clocks, order, (call.packing.offset(order),))


def _conv_launch(call: ConvCall, plan: ConvPlan | WgmmaPlan, instance: Instance, chunks: int) -> Launch:
    """A CTA for each tile and split."""
    grid = (call.rows * math.prod(plan.tiles), plan.splits, 1)
    return Launch(instance, grid, plan.shared, _conv_argument(call, plan.tiles, chunks))


def _conv_form(call: ConvCall) -> tuple[bool, ...]:
    """ConvForm of kernels/conv.cuh."""
    targets = [spec for spec in (call.target.spec, call.residual) if spec is not None]
    paired = all(is_whole(spec, 2 * spec.itemsize) for spec in targets)
    whole, adds = is_whole(call.source.spec), call.residual is not None
    return whole, paired, call.activates, adds, call.packing.chunks > 1


def _conv_argument(call: ConvCall, tiles: Pair, chunks: int) -> Template:
    """struct Conv of kernels/conv.cuh; the first ten fields are addresses."""
    packing, source, target = call.packing, call.source.spec, call.target.spec
    return Template(
        10,
        [
            *_strides(source),
            *_strides(target),
            *_strides(call.residual or target),
            *(s // 4 for s in call.index_strides),
            call.rows,
            min(call.batch, MOST_IMAGES),
            packing.channels,
            packing.features,
            *_conv_axis(call, 0),
            *_conv_axis(call, 1),
            math.prod(tiles),
            *division(math.prod(tiles)),
            *division(tiles[1]),
            tiles[1],
            chunks,
            int(call.source.is_stack),
            int(call.target.is_stack),
            int(call.source_relu),
            int(call.target_relu),
        ],
    )


def _conv_axis(call: ConvCall, axis: int) -> tuple[int, ...]:
    """struct ConvAxis of kernels/conv.cuh."""
    layer, grid = call.layer, call.grid
    return (
        call.bcount[axis],
        grid.boffset[axis],
        grid.bstride[axis],
        grid.bsize[axis],
        layer.out_size[axis],
        layer.pad_before[axis],
        call.source.spec.shape[1 + axis],
    )


def _strides(spec: Spec) -> tuple[int, ...]:
    """Strides in numbers; that of an axis of one is free."""
    return tuple(s // spec.itemsize if n > 1 else 0 for s, n in zip(spec.strides, spec.shape))


def bottleneck(
    ready: Ready,
    source: Any,
    target: Any,
    weights: tuple[PackedWeights, PackedWeights, PackedWeights],
    bin_counts: Any,
    indices: Any,
    channels: Any,
) -> None:
    """Run a bottleneck."""
    launch = ready.launch
    if launch is not None:
        launch.run(
            source.data.ptr,
            target.data.ptr,
            *(w.words.data.ptr + skipped for w, skipped in zip(weights, ready.skipped)),
            indices.data.ptr,
            bin_counts.data.ptr,
            channels.data.ptr,
            0 if launch.meets_on < 0 else _meetings.place(launch.meets_on),
        )


def prepare_bottleneck(call: BottleneckCall, most_clocks: float = math.inf) -> Ready | None:
    """What :func:`bottleneck` runs, or None if no plan fits, it takes longer, or not all CTAs run at the same time.

    They have to in place.
    """
    if 0 in (*call.target.shape, call.rows):
        return Ready(None)
    dtype, limits = call.source.dtype, _jit.device_limits(call.device)
    tensor = limits.has_tensor_cores and (call.tf32 or dtype.itemsize == 2)
    channels = call.source.shape[3]
    if not (is_whole(call.source) and is_whole(call.target)):
        return None
    problem = BottleneckProblem(
        channels=channels,
        inner=call.inner,
        itemsize=dtype.itemsize,
        ksize=call.layer.ksize,
        block=call.grid.bsize,
        uses_tensor_cores=tensor,
    )
    image = call.layer.out_size
    plan, clocks = plan_bottleneck(problem, call.rows, image, limits, call.in_place)
    group_plan, group_clocks = None, math.inf
    if limits.has_warpgroups and tensor:
        group_plan, group_clocks = plan_wgmma_bottleneck(problem, call.rows, image, limits, call.in_place)
    scatter = scatter_clocks(problem, call.rows, limits) if call.is_stack else 0
    if min(clocks, group_clocks) + scatter > most_clocks:
        return None
    if group_plan is not None and group_clocks < clocks:
        launch = _bottleneck_launch(call, group_plan, _wgmma_bottleneck_instance(problem, group_plan, dtype), limits)
        order = Order.WARPGROUPS
        skipped = tuple(product.packing.offset(order) for product in problem.products)
        return None if launch is None else Ready(launch, group_clocks + scatter, order, skipped)
    if plan is None:
        return None
    launch = _bottleneck_launch(call, plan, _bottleneck_instance(problem, plan, dtype), limits)
    return None if launch is None else Ready(launch, clocks + scatter)


def _bottleneck_instance(problem: BottleneckProblem, plan: BottleneckPlan, dtype: np.dtype[Any]) -> Instance:
    chunks = (product.packing.chunk for product in problem.products)
    numbers = (problem.channels, problem.inner, *plan.tile, *problem.ksize, *chunks)
    first, second, third = (layout.expression for layout in plan.layouts)
    products = products_of(dtype, problem.uses_tensor_cores)
    return bottleneck_instance(products, numbers, (first, second, third), plan.near, plan.parts, plan.resident)


def _wgmma_bottleneck_instance(problem: BottleneckProblem, plan: WgmmaBottleneckPlan, dtype: np.dtype[Any]) -> Instance:
    first, _, third = (product.packing.together for product in problem.products)
    numbers = (problem.channels, problem.inner, *problem.ksize)
    layouts = plan.layouts[0].expression, plan.layouts[1].expression
    return wgmma_bottleneck_instance(dtype, numbers, layouts, (first, third))


def _bottleneck_launch(
    call: BottleneckCall, plan: BottleneckPlan | WgmmaBottleneckPlan, instance: Instance, limits: DeviceLimits
) -> Launch | None:
    """A CTA for each tile; None in place if not all of them run at the same time."""
    ctas, meets_on = call.rows * plan.ctas, call.device if call.in_place else -1
    # The driver has the last word on that. The plan has answered it already, so that no kernel is compiled here only to
    # be turned down.
    if call.in_place and ctas > _jit.ctas_that_fit(instance, THREADS, plan.shared) * limits.multiprocessors:
        return None
    return Launch(instance, (ctas, 1, 1), plan.shared, _bottleneck_argument(call, plan.tiles), meets_on)


def _bottleneck_argument(call: BottleneckCall, tiles: Pair) -> Template:
    """struct Bottleneck of kernels/bottleneck.cuh; the first nine fields are addresses."""
    axes = (
        (call.bcount[axis], call.grid.bsize[axis], call.layer.out_size[axis], call.layer.pad_before[axis])
        for axis in range(2)
    )
    count = math.prod(tiles)
    return Template(
        9,
        [
            *_strides(call.source)[:3],
            *_strides(call.target)[:3],
            *(s // 4 for s in call.index_strides),
            call.rows,
            min(call.source.shape[0], MOST_IMAGES),
            *itertools.chain(*axes),
            count,
            *division(count),
            *division(tiles[1]),
            tiles[1],
            int(call.activates),
            int(call.is_stack),
        ],
    )
