"""Convolutions and bottlenecks by the fused kernels: whether they can, and their launches. Arguments are checked."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import _device
from ._affine import IDENTITY, Affine
from ._bottleneck_weights import affines_of
from ._conv_geometry import BlockParams, Layer, stack_grids
from ._engine import (
    ConvSize,
    Route,
    bottleneck_routes,
    kind_obstacle,
    offset_obstacle,
    prefers_fused,
    size_obstacle,
    takes_fused,
)
from ._pack_weights import PackedBottleneck
from ._packing import PackedWeights, is_whole, packing_of
from ._reduce_mask import BlockIndices
from ._scatter import sparse_scatter_var
from ._validate import Spec, current_device

#: What it is that no plan fits.
_NO_PLAN = "a kernel, a stride or channels for which shared memory has no room"


class _Tensor(NamedTuple):
    """One side of a convolution."""

    spec: Spec
    is_stack: bool = False


@dataclass(frozen=True)
class FusedBlocks:
    """The form of a call on the active blocks of a chain of convolutions, whose weights have these shapes."""

    xp: ModuleType
    device: int
    index_strides: tuple[int, ...]
    rows: int
    batch: int
    layers: tuple[Layer, ...]
    params: BlockParams
    shapes: tuple[tuple[int, ...], ...]
    tf32: bool

    @classmethod
    def of(
        cls,
        xp: ModuleType,
        indices: BlockIndices,
        batch: int,
        layers: tuple[Layer, ...],
        params: BlockParams,
        *how: Any,
    ) -> FusedBlocks:
        """That of some indices; `how` is the last two fields."""
        rows = indices.active_block_indices
        return cls(xp, current_device(xp), tuple(rows.strides), rows.shape[0], batch, layers, params, *how)

    @property
    def sizes(self) -> list[ConvSize]:
        """How much each convolution multiplies."""
        return [ConvSize.of(shape) for shape in self.shapes]

    def take_fused(self, engine: str, x: Spec, *others: Spec) -> bool:
        """Whether the fused kernels are to be taken for these tensors, if there is a plan."""
        if engine == "composed":
            return False
        obstacle = (
            kind_obstacle(self.xp, x.dtype)
            or size_obstacle(self.layers, self.params, self.sizes, self.rows)
            or offset_obstacle((x, *others), self.layers, self.params)
        )
        pixels = self.rows * self.params.bsize_out[0] * self.params.bsize_out[1]
        preferred = not obstacle and prefers_fused(x.dtype, self.tf32, self.sizes, is_whole(x), pixels)
        return takes_fused(engine, obstacle, preferred)

    def stack(self, step: int, dtype: np.dtype[Any]) -> Spec:
        """The stack of tiles that convolution number `step` puts out."""
        grid = stack_grids(self.layers, self.params)[step + 1]
        return Spec.contiguous((self.rows, *grid.bsize, self.shapes[step][3]), dtype, self.device)

    def conv_call(
        self, step: int, source: _Tensor, target: _Tensor, residual: Spec | None, before: Affine, after: Affine
    ) -> Any:
        """The launch of convolution number `step`."""
        fused = _device.fused()
        return fused.ConvCall(
            source=fused.Side(*source),
            target=fused.Side(*target),
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

    def bottleneck_call(self, x: Spec, target: _Tensor, in_place: bool, activates: bool) -> Any:
        """The launch of a whole bottleneck."""
        return _device.fused().BottleneckCall(
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


@functools.lru_cache(maxsize=1024)
def plan_conv(engine: str, blocks: FusedBlocks, x: Spec, out: Spec, after: Affine) -> Any:
    """The launch of a convolution, if the fused kernel is to do it, or None. Of `after`, only the form matters."""
    if not blocks.take_fused(engine, x, out):
        return None
    call = blocks.conv_call(0, _Tensor(x), _Tensor(out), None, IDENTITY, after)
    if _device.fused().conv_fits(call):
        return call
    takes_fused(engine, _NO_PLAN, False)
    return None


def run_conv(call: Any, x: Any, w: PackedWeights, out: Any, indices: BlockIndices, after: Affine) -> Any:
    """Write the active tiles of a convolution to `out`."""
    counts, rows = indices.bin_counts, indices.active_block_indices
    _device.fused().convolve(call, x, out, w, counts, rows, after=after.aligned())
    return out


class BottleneckPlan(NamedTuple):
    """A way to run a bottleneck, and its launches."""

    route: Route
    calls: tuple[Any, ...]


@functools.lru_cache(maxsize=1024)
def plan_bottleneck(
    engine: str, blocks: FusedBlocks, x: Spec, out: Spec, in_place: bool, activates: bool, projects: bool
) -> BottleneckPlan | None:
    """The best way in which the fused kernels run a bottleneck, if they are to, or None.

    `activates` tells whether batch norm and ReLU come first, and `projects` whether the shortcut is already in `out`.
    """
    stacks = (blocks.stack(0, x.dtype), blocks.stack(1, x.dtype))
    if not blocks.take_fused(engine, x, out, *stacks):
        return None
    strides = blocks.layers[1].strides
    fused = _device.fused()
    for route in bottleneck_routes(blocks.shapes, strides, projects, in_place):
        if route is Route.LAYERS:
            calls = _layer_calls(blocks, x, out, stacks, activates, out if projects else x)
            fits = all(map(fused.conv_fits, calls))
        else:
            target = _Tensor(out) if route is Route.DIRECT else _Tensor(blocks.stack(2, x.dtype), True)
            waits = in_place and route is Route.DIRECT
            calls = (blocks.bottleneck_call(x, target, waits, activates),)
            fits = fused.bottleneck_fits(calls[0])
        if fits:
            return BottleneckPlan(route, calls)
    takes_fused(engine, _NO_PLAN, False)
    return None


def _layer_calls(
    blocks: FusedBlocks, x: Spec, out: Spec, stacks: tuple[Spec, Spec], activates: bool, shortcut: Spec
) -> tuple[Any, ...]:
    """Launches from the image to a stack, from there to another, and to the image, where the shortcut is added."""
    relu, (first, second) = Affine(relu=True), stacks
    before = relu if activates else IDENTITY
    return (
        blocks.conv_call(0, _Tensor(x), _Tensor(first, True), None, before, relu),
        blocks.conv_call(1, _Tensor(first, True), _Tensor(second, True), None, IDENTITY, relu),
        blocks.conv_call(2, _Tensor(second, True), _Tensor(out), shortcut, IDENTITY, IDENTITY),
    )


def run_bottleneck(
    plan: BottleneckPlan, x: Any, packed: PackedBottleneck, out: Any, indices: BlockIndices, params: BlockParams
) -> Any:
    """Write the active tiles of a bottleneck to `out`, which is `x`, or holds the shortcut."""
    counts, rows = indices.bin_counts, indices.active_block_indices
    fused = _device.fused()
    if plan.route is Route.LAYERS:
        return _run_layers(plan.calls, x, packed, out, indices)
    (call,) = plan.calls
    target = out
    if plan.route is Route.STACK:
        target = fused.cupy.empty(call.target.shape, x.dtype)
    fused.bottleneck(call, x, target, packed.convs, counts, rows, packed.channels)
    if target is not out:
        sparse_scatter_var(target, counts, rows, out, **params.grid_out._asdict())
    return out


def _run_layers(calls: tuple[Any, ...], x: Any, packed: PackedBottleneck, out: Any, indices: BlockIndices) -> Any:
    """Three launches. Only the last one writes to the image, each pixel after it was read: so `out` may be `x`."""
    fused = _device.fused()
    first, *between, _ = (affine.aligned() for affine in affines_of(packed.weights))
    shortcut = x if packed.weights.project is None else out
    source = x
    for call, w, before, after in zip(calls, packed.convs, (first, IDENTITY, IDENTITY), (*between, IDENTITY)):
        last = call is calls[-1]
        target = out if last else fused.cupy.empty(call.target.spec.shape, x.dtype)
        fused.convolve(
            call,
            source,
            target,
            w,
            indices.bin_counts,
            indices.active_block_indices,
            before=before,
            after=after,
            residual=shortcut if last else None,
        )
        source = target
    return out
