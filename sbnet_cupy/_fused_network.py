"""Convolutions and bottlenecks by the fused kernels: whether they can, and their launches. Arguments are checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import _device, _jit
from ._affine import IDENTITY, Affine
from ._bottleneck_weights import affines_of
from ._composed_clocks import ConvSize, StackConv, composed_clocks
from ._conv_geometry import BlockParams, Layer, stack_grids
from ._engine import (
    Route,
    bottleneck_routes,
    kind_obstacle,
    may_fuse,
    offset_obstacle,
    prefers_gathering,
    size_obstacle,
)
from ._fused_form import BottleneckCall, ConvCall, Side
from ._pack_weights import PackedBottleneck
from ._packing import Order, PackedWeights, is_whole, packing_of
from ._reduce_mask import BlockIndices
from ._scatter import sparse_scatter_var
from ._validate import Spec

#: What it is that no plan fits.
_NO_PLAN = "a kernel, a stride or channels for which shared memory has no room"


@dataclass(frozen=True)
class FusedBlocks:
    """The form of a call on the active blocks of a chain of convolutions, whose weights have these shapes."""

    #: Number of the device, or -1 for the host.
    device: int
    index_strides: tuple[int, ...]
    rows: int
    batch: int
    layers: tuple[Layer, ...]
    params: BlockParams
    shapes: tuple[tuple[int, ...], ...]
    tf32: bool

    @property
    def sizes(self) -> list[ConvSize]:
        """How much each convolution multiplies."""
        return [ConvSize.of(shape) for shape in self.shapes]

    def most_clocks(self, engine: str, x: Spec, *others: Spec) -> float | None:
        """How long the fused kernels may take for these tensors; None if they are not to be taken at all."""
        obstacle = (
            kind_obstacle(self.device, x.dtype)
            or size_obstacle(self.layers, self.params, self.sizes, self.rows)
            or offset_obstacle((x, *others), self.layers, self.params)
        )
        if not may_fuse(engine, obstacle):
            return None
        if engine == "fused":
            return math.inf
        return None if prefers_gathering(x.shape[3], is_whole(x)) else self.composed_clocks(x.itemsize)

    @property
    def stack_convs(self) -> list[StackConv]:
        """The convolutions of stacks that the composed engine takes."""
        pixels = [self.rows * math.prod(grid.bsize) for grid in stack_grids(self.layers, self.params)]
        return list(map(StackConv, self.sizes, pixels, pixels[1:], (layer.strides for layer in self.layers)))

    def composed_clocks(self, itemsize: int) -> float:
        """How long the composed engine takes."""
        limits = _jit.device_limits(self.device)
        tf32 = self.tf32 and limits.has_tensor_cores
        return composed_clocks(self.stack_convs, itemsize, tf32, limits.multiprocessors)

    def stack(self, step: int, dtype: np.dtype[Any]) -> Spec:
        """The stack of tiles that convolution number `step` puts out."""
        grid = stack_grids(self.layers, self.params)[step + 1]
        return Spec.contiguous((self.rows, *grid.bsize, self.shapes[step][3]), dtype, self.device)

    def conv_call(
        self, step: int, source: Side, target: Side, residual: Spec | None, before: Affine, after: Affine
    ) -> ConvCall:
        """The launch of convolution number `step`."""
        return ConvCall(
            source=source,
            target=target,
            residual=residual,
            index_strides=self.index_strides,
            rows=self.rows,
            batch=self.batch,
            grid=stack_grids(self.layers, self.params)[step + 1],
            bcount=self.params.bcount,
            layer=self.layers[step],
            packing=packing_of(self.shapes[step], source.spec.itemsize),
            tf32=self.tf32,
            activates=not before.is_identity,
            source_relu=before.relu,
            target_relu=after.relu,
            device=self.device,
        )

    def bottleneck_call(self, x: Spec, target: Side, in_place: bool, activates: bool) -> BottleneckCall:
        """The launch of a whole bottleneck."""
        return BottleneckCall(
            source=x,
            target=target.spec,
            is_stack=target.is_stack,
            in_place=in_place,
            index_strides=self.index_strides,
            rows=self.rows,
            grid=self.params.grid_out,
            bcount=self.params.bcount,
            layer=self.layers[1],
            inner=self.shapes[1][2],
            activates=activates,
            tf32=self.tf32,
            device=self.device,
        )


def plan_conv(engine: str, blocks: FusedBlocks, x: Spec, out: Spec, after: Affine) -> Any:
    """What runs a convolution, if the fused kernel is to do it, or None. Of `after`, only the form matters."""
    most = blocks.most_clocks(engine, x, out)
    if most is None:
        return None
    call = blocks.conv_call(0, Side(x), Side(out), None, IDENTITY, after)
    ready = _device.fused().prepare_conv(call, most)
    if ready is None:
        may_fuse(engine, _NO_PLAN)
    return ready


def run_conv(ready: Any, x: Any, w: PackedWeights, out: Any, indices: BlockIndices, after: Affine) -> Any:
    """Write the active tiles of a convolution to `out`."""
    counts, rows = indices.bin_counts, indices.active_block_indices
    _device.fused().convolve(ready, x, out, w, counts, rows, after=after.aligned())
    return out


class BottleneckPlan(NamedTuple):
    """A way to run a bottleneck, and what runs it."""

    route: Route
    #: For each launch.
    steps: tuple[Any, ...]
    #: Shapes of the stacks that they write on the way.
    stacks: tuple[tuple[int, ...], ...]

    @property
    def orders(self) -> tuple[tuple[Order, ...], ...]:
        """In which order the weights of each convolution are taken."""
        return tuple((step.order,) for step in (self.steps if self.route is Route.LAYERS else 3 * self.steps))


def plan_bottleneck(
    engine: str, blocks: FusedBlocks, x: Spec, out: Spec, in_place: bool, activates: bool, projects: bool
) -> BottleneckPlan | None:
    """The best way in which the fused kernels run a bottleneck, if they are to, or None.

    `activates` tells whether batch norm and ReLU come first, and `projects` whether the shortcut is already in `out`.
    """
    first, second, third = (blocks.stack(step, x.dtype) for step in range(3))
    most = blocks.most_clocks(engine, x, out, first, second)
    if most is None:
        return None
    best, stacks = None, {Route.LAYERS: (first, second), Route.STACK: (third,), Route.DIRECT: ()}
    for route in bottleneck_routes(blocks.shapes, blocks.layers[1].strides, projects, in_place):
        if route is Route.LAYERS:
            calls = _layer_calls(blocks, x, out, (first, second), activates, out if projects else x)
            steps = _prepare_layers(calls, most)
        else:
            target = Side(out) if route is Route.DIRECT else Side(third, True)
            call = blocks.bottleneck_call(x, target, in_place and route is Route.DIRECT, activates)
            step = _device.fused().prepare_bottleneck(call, most)
            steps = () if step is None else (step,)
        if steps:  # no slower than the best way so far
            best = BottleneckPlan(route, steps, tuple(stack.shape for stack in stacks[route]))
            most = sum(step.clocks for step in steps)
    if best is None:
        may_fuse(engine, _NO_PLAN)
    return best


def _prepare_layers(calls: tuple[ConvCall, ...], most_clocks: float) -> tuple[Any, ...]:
    """What runs one convolution after another, if all of them take no more together; else nothing."""
    steps: list[Any] = []
    for call in calls:
        step = _device.fused().prepare_conv(call, most_clocks)
        if step is None:
            return ()
        steps.append(step)
        most_clocks -= step.clocks
    return tuple(steps)


def _layer_calls(
    blocks: FusedBlocks, x: Spec, out: Spec, stacks: tuple[Spec, Spec], activates: bool, shortcut: Spec
) -> tuple[ConvCall, ConvCall, ConvCall]:
    """Launches from the image to a stack, from there to another, and to the image, where the shortcut is added."""
    relu, (first, second) = Affine(relu=True), stacks
    before = relu if activates else IDENTITY
    return (
        blocks.conv_call(0, Side(x), Side(first, True), None, before, relu),
        blocks.conv_call(1, Side(first, True), Side(second, True), None, IDENTITY, relu),
        blocks.conv_call(2, Side(second, True), Side(out), shortcut, IDENTITY, IDENTITY),
    )


def run_bottleneck(
    plan: BottleneckPlan, x: Any, packed: PackedBottleneck, out: Any, indices: BlockIndices, params: BlockParams
) -> Any:
    """Write the active tiles of a bottleneck to `out`, which is `x`, or holds the shortcut."""
    counts, rows = indices.bin_counts, indices.active_block_indices
    fused = _device.fused()
    if plan.route is Route.LAYERS:
        return _run_layers(plan, x, packed, out, indices)
    target = out
    if plan.route is Route.STACK:
        target = fused.cupy.empty(plan.stacks[0], x.dtype)
    fused.bottleneck(plan.steps[0], x, target, packed.convs, counts, rows, packed.channels)
    if target is not out:
        sparse_scatter_var(target, counts, rows, out, **params.grid_out._asdict())
    return out


def _run_layers(plan: BottleneckPlan, x: Any, packed: PackedBottleneck, out: Any, indices: BlockIndices) -> Any:
    """Three launches. Only the last one writes to the image, each pixel after it was read: so `out` may be `x`."""
    fused, rows = _device.fused(), (indices.bin_counts, indices.active_block_indices)
    first, second, third, _ = (affine.aligned() for affine in affines_of(packed.weights))
    inner, middle = (fused.cupy.empty(shape, x.dtype) for shape in plan.stacks)
    to_inner, to_middle, to_image = plan.steps
    fused.convolve(to_inner, x, inner, packed.conv1, *rows, before=first, after=second)
    fused.convolve(to_middle, inner, middle, packed.conv2, *rows, after=third)
    shortcut = x if packed.weights.project is None else out
    fused.convolve(to_image, middle, out, packed.conv3, *rows, residual=shortcut)
    return out
