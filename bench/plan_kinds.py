"""The fused kernels whose plans are measured: what each may follow, and how long its model expects that to take.

No device is needed here.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from sbnet_cupy import _fused_conv_plan, _fused_wgmma_bottleneck_plan, _fused_wgmma_plan
from sbnet_cupy._fused_bottleneck_plan import (
    BottleneckPlan,
    BottleneckProblem,
    WholePlan,
    bottleneck_clocks,
    bottleneck_plans,
    scatter_clocks,
    tile_clocks,
)
from sbnet_cupy._fused_clocks import Clocks, LaunchClocks
from sbnet_cupy._fused_conv_plan import ConvPlan, ConvProblem, conv_plans
from sbnet_cupy._fused_plan import DeviceLimits, Pair, are_enough, launch_clocks
from sbnet_cupy._fused_wgmma_bottleneck_plan import WgmmaBottleneckPlan, wgmma_bottleneck_plans
from sbnet_cupy._fused_wgmma_plan import GroupLayout, WgmmaPlan, wgmma_plans
from sbnet_cupy._packing import packing_of
from sbnet_cupy._warps import WarpLayout

from .stages import Network

#: Plans of a case that are measured, and those with the same tile and the same number of CTAs on a multiprocessor, at
#: most.
MOST_PLANS, MOST_ALIKE = 8, 2


class Case(NamedTuple):
    """A network on so many active blocks."""

    network: Network
    bsize: int
    rows: int

    @property
    def itemsize(self) -> int:
        return np.dtype(self.network.precision.dtype).itemsize

    @property
    def uses_tensor_cores(self) -> bool:
        return self.network.precision.name != "float32"

    @property
    def convs(self) -> tuple[ConvProblem, ...]:
        """What the models of convolutions are asked for each of the network's."""
        shapes, params = self.network.layers, self.network.params(self.bsize)
        last, whole = len(shapes) - 1, (params.bsize, params.bsize_out)
        return tuple(
            ConvProblem(
                packing=packing_of(shape, self.itemsize),
                ksize=shape[:2],
                strides=(1, 1),
                block=whole[number > 0 or last == 0],
                uses_tensor_cores=self.uses_tensor_cores,
                activates=number == 0 < last,
                adds=number == last > 0,
            )
            for number, shape in enumerate(shapes)
        )

    @property
    def bottleneck(self) -> BottleneckProblem:
        """What the model of whole bottlenecks is asked."""
        (_, second, third), block = self.network.layers, self.network.params(self.bsize).bsize_out
        return BottleneckProblem(third[3], third[2], self.itemsize, second[:2], block, self.uses_tensor_cores)


@dataclass(frozen=True)
class Kind(ABC):
    """A way to compute a network, whose plans are measured."""

    #: Precisions of the networks.
    precisions: tuple[str, ...]

    #: Kind of the networks that it computes, and what chooses its plans, in sbnet_cupy._fused.
    network: ClassVar[str]
    planner: ClassVar[str]

    #: What it counts for, of what is expected, where it is held against other ways.
    counted: ClassVar[float] = 1

    @abstractmethod
    def promising(self, case: Case, limits: DeviceLimits) -> list[Any]:
        """The plans that the model takes for fastest, the first one first."""

    @abstractmethod
    def clocks(self, plans: Sequence[Any], case: Case, limits: DeviceLimits) -> list[float]:
        """Clocks by the model as it is."""

    @abstractmethod
    def read(self, numbers: Iterator[int]) -> Any:
        """A plan of the numbers that it consists of, but for its clocks."""

    def answer(self, plan: Any, case: Case, problem: Any) -> Any:
        """What the planner is to say of a problem of this case."""
        return plan


class OneLaunch(Kind):
    """One kernel."""

    @abstractmethod
    def plans(self, case: Case, limits: DeviceLimits) -> Iterable[Any]:
        """All plans."""

    def promising(self, case: Case, limits: DeviceLimits) -> list[Any]:
        plans = [plan for plan in self.plans(case, limits) if are_enough(case.rows * plan.ctas, plan.resident, limits)]
        return fastest_of(plans, self.clocks(plans, case, limits))


def fastest_of(plans: Sequence[Any], clocks: Sequence[float]) -> list[Any]:
    """The plans that take least, not too many of them alike."""
    found, alike = list[Any](), Counter[Any]()
    for _, _, plan in sorted((took, k, plans[k]) for k, took in enumerate(clocks)):
        likeness = numbers_of(plan)[:2], plan.resident
        alike[likeness] += 1
        if alike[likeness] <= MOST_ALIKE:
            found.append(plan)
    return found[:MOST_PLANS]


class Conv(OneLaunch):
    """The convolution."""

    network, planner = "conv", "plan_conv"

    def plans(self, case: Case, limits: DeviceLimits) -> Iterable[ConvPlan]:
        return conv_plans(case.convs[0], limits)

    def clocks(self, plans: Sequence[ConvPlan], case: Case, limits: DeviceLimits) -> list[float]:
        return _conv_clocks(plans, case.convs[0], case.rows, limits)

    def read(self, numbers: Iterator[int]) -> ConvPlan:
        return _read_conv(numbers)


class Wgmma(OneLaunch):
    """The convolution by warpgroups."""

    network, planner = "conv", "plan_wgmma"

    def plans(self, case: Case, limits: DeviceLimits) -> Iterable[WgmmaPlan]:
        return wgmma_plans(case.convs[0], limits)

    def clocks(self, plans: Sequence[WgmmaPlan], case: Case, limits: DeviceLimits) -> list[float]:
        return _listed_clocks(plans, self.plans(case, limits), case.rows, limits, _fused_wgmma_plan.LAUNCH)

    def read(self, numbers: Iterator[int]) -> WgmmaPlan:
        return WgmmaPlan(_groups(numbers), _pair(numbers), *numbers, Clocks(0, 0))


class Bottleneck(OneLaunch):
    """The bottleneck in one launch, in place or, where that is not possible, to a stack."""

    network, planner = "bottleneck", "plan_bottleneck"

    def plans(self, case: Case, limits: DeviceLimits) -> Iterable[BottleneckPlan]:
        return bottleneck_plans(case.bottleneck, limits)

    def clocks(self, plans: Sequence[BottleneckPlan], case: Case, limits: DeviceLimits) -> list[float]:
        # The model lists only the best layouts, by its own numbers: so these are asked for by name.
        problem = case.bottleneck
        timed = (
            plan._replace(clocks=tile_clocks(plan.tile, plan.layouts, plan.near, plan.resident, problem))
            for plan in plans
        )
        return [_whole_clocks(plan, case, limits) for plan in timed]

    def read(self, numbers: Iterator[int]) -> BottleneckPlan:
        tile, tiles, layouts = _pair(numbers), _pair(numbers), (_warps(numbers), _warps(numbers), _warps(numbers))
        return BottleneckPlan(tile, tiles, layouts, *numbers, Clocks(0, 0))


class WgmmaBottleneck(OneLaunch):
    """The bottleneck by warpgroups, in one launch."""

    network, planner = "bottleneck", "plan_wgmma_bottleneck"
    counted = _fused_wgmma_bottleneck_plan.COUNTED

    def plans(self, case: Case, limits: DeviceLimits) -> Iterable[WgmmaBottleneckPlan]:
        return wgmma_bottleneck_plans(case.bottleneck, limits)

    def clocks(self, plans: Sequence[WgmmaBottleneckPlan], case: Case, limits: DeviceLimits) -> list[float]:
        return [_whole_clocks(plan, case, limits) for plan in _as_listed(plans, self.plans(case, limits))]

    def read(self, numbers: Iterator[int]) -> WgmmaBottleneckPlan:
        layouts = _groups(numbers), _groups(numbers)
        return WgmmaBottleneckPlan(layouts, _pair(numbers), *numbers, Clocks(0, 0))


Layers = tuple[ConvPlan, ConvPlan, ConvPlan]


class LayersOfBottleneck(Kind):
    """The bottleneck in three launches of the convolution, whose plans are one."""

    network, planner = "bottleneck", "plan_conv"

    def promising(self, case: Case, limits: DeviceLimits) -> list[Layers]:
        # The fastest plans, and others for the first launch, or for the last: the second is that of `Conv`.
        ranked = []
        for problem in case.convs:
            plans = [p for p in conv_plans(problem, limits) if are_enough(case.rows * p.ctas, p.resident, limits)]
            ranked.append(fastest_of(plans, _conv_clocks(plans, problem, case.rows, limits)))
        best = tuple(plans[0] for plans in ranked)
        others = ((number, plan) for number in (0, 2) for plan in ranked[number][1:MOST_ALIKE])
        return [best, *((*best[:number], plan, *best[number + 1 :]) for number, plan in others)]

    def clocks(self, plans: Sequence[Layers], case: Case, limits: DeviceLimits) -> list[float]:
        each = [
            _conv_clocks([layers[number] for layers in plans], problem, case.rows, limits)
            for number, problem in enumerate(case.convs)
        ]
        return [sum(steps) for steps in zip(*each)]

    def read(self, numbers: Iterator[int]) -> Layers:
        first, second, third = (_read_conv(itertools.islice(numbers, _CONV_NUMBERS)) for _ in range(3))
        return first, second, third

    def answer(self, plan: Layers, case: Case, problem: ConvProblem) -> ConvPlan:
        return plan[case.convs.index(problem)]


#: By what they are called on the command line.
KINDS: dict[str, Kind] = {
    "conv": Conv(("tf32", "float16")),
    "conv-float32": Conv(("float32",)),
    "wgmma": Wgmma(("tf32", "float16")),
    "bottleneck": Bottleneck(("tf32", "float16")),
    "bottleneck-float32": Bottleneck(("float32",)),
    "wgmma-bottleneck": WgmmaBottleneck(("tf32", "float16")),
    "layers": LayersOfBottleneck(("tf32", "float16")),
    "layers-float32": LayersOfBottleneck(("float32",)),
}


def _whole_clocks(plan: WholePlan, case: Case, limits: DeviceLimits) -> float:
    """Of a bottleneck in one launch: to a stack, where its CTAs are too many to run all at once, in place."""
    problem = case.bottleneck
    clocks = bottleneck_clocks(plan, problem, case.rows, case.network.shape[1:3], limits)
    in_place = case.rows * plan.ctas <= plan.resident * limits.multiprocessors
    return clocks + (0 if in_place else scatter_clocks(problem, case.rows, limits))


def _conv_clocks(plans: Sequence[ConvPlan], problem: ConvProblem, rows: int, limits: DeviceLimits) -> list[float]:
    return _listed_clocks(plans, conv_plans(problem, limits), rows, limits, _fused_conv_plan.LAUNCH)


def _listed_clocks(
    plans: Sequence[Any], every: Iterable[Any], rows: int, limits: DeviceLimits, launch: LaunchClocks
) -> list[float]:
    """Of plans that are among those that the model lists."""
    return [launch_clocks(plan, rows, limits, launch) for plan in _as_listed(plans, every)]


def _as_listed(plans: Sequence[Any], every: Iterable[Any]) -> Iterator[Any]:
    """Plans with their clocks, from among those that the model lists: clocks are a plan's last field."""
    found = {plan[:-1]: plan for plan in every}
    return (found[plan[:-1]] for plan in plans)


def numbers_of(plan: Any) -> tuple[int, ...]:
    """The numbers that a plan consists of, one after another, but for its clocks."""

    def flat(value: Any) -> Iterator[int]:
        if isinstance(value, tuple):
            yield from itertools.chain.from_iterable(map(flat, value))
        elif not isinstance(value, Clocks):
            yield value

    return tuple(flat(plan))


#: Numbers of a plan of a convolution.
_CONV_NUMBERS = 11


def _read_conv(numbers: Iterator[int]) -> ConvPlan:
    return ConvPlan(_pair(numbers), _pair(numbers), _warps(numbers), *numbers, Clocks(0, 0))


def _pair(numbers: Iterator[int]) -> Pair:
    return next(numbers), next(numbers)


def _warps(numbers: Iterator[int]) -> WarpLayout:
    return WarpLayout(*itertools.islice(numbers, 4))


def _groups(numbers: Iterator[int]) -> GroupLayout:
    return GroupLayout(_pair(numbers), *itertools.islice(numbers, 4))
