"""Fit the model of a kernel's time to plans that were measured: ``python -m bench.fit KIND``, after ``bench.plans``.

Prints how near the model is, how good its choice is, and its numbers as they would be nearest; they are taken over into
the source by hand. Needs no GPU. The model is in clocks: :data:`MHZ` makes them microseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from sbnet_cupy import (
    _composed_clocks,
    _fused_bottleneck_plan,
    _fused_bottleneck_products,
    _fused_clocks,
    _fused_conv_plan,
    _fused_wgmma_bottleneck_plan,
    _fused_wgmma_plan,
)
from sbnet_cupy._fused_plan import DeviceLimits

from .plan_kinds import KINDS, Case
from .record import RESULTS
from .stages import networks

Array = np.ndarray[Any, Any]

#: The device that was measured, and its clock under load in MHz.
H200, MHZ = DeviceLimits(132, 227 << 10, 228 << 10, 90), 1755

#: How far a number may move in one fit, as a factor.
REACH = 30.0


class Number(NamedTuple):
    """A number of a model: a name in a module, and where that is a tuple or a dictionary, a part of it."""

    module: ModuleType
    name: str
    part: Any = None

    def __str__(self) -> str:
        return f"{self.module.__name__.rpartition('.')[2]}.{self.name}" + ("" if self.part is None else f" {self.part}")

    @property
    def value(self) -> float:
        whole = getattr(self.module, self.name)
        if self.part is None:
            return float(whole)
        return float(whole[self.part] if isinstance(whole, dict) else getattr(whole, self.part))

    def put(self, value: float) -> None:
        """Change it, wherever the module's users have taken it over by name."""
        before = getattr(self.module, self.name)
        whole: Any = value
        if self.part is not None:
            whole = {**before, self.part: value} if isinstance(before, dict) else before._replace(**{self.part: value})
        for module in MODULES:
            if getattr(module, self.name, None) is before:
                setattr(module, self.name, whole)
            for function in vars(module).values():  # what was kept was made of the number before
                if hasattr(function, "cache_clear"):
                    function.cache_clear()


MODULES = (
    _composed_clocks,
    _fused_clocks,
    _fused_conv_plan,
    _fused_wgmma_plan,
    _fused_bottleneck_products,
    _fused_bottleneck_plan,
    _fused_wgmma_bottleneck_plan,
)


def _numbers(module: ModuleType, *names: str, parts: Iterable[Any] = (None,)) -> list[Number]:
    return [Number(module, name, part) for name in names for part in parts]


#: What is fitted. Numbers that made no difference are left out: most of them are 0.
NUMBERS = {
    "conv": [
        *_numbers(_fused_clocks, "CONV_TENSOR", parts=("products", "halves", "late", "rows", "turn", "exchanged")),
        *_numbers(_fused_conv_plan, "_WAITS", "_CHUNK", "_BROUGHT", "_WRITTEN"),
        *_numbers(_fused_conv_plan, "LAUNCH", parts=("takes",)),
    ],
    "conv-float32": [
        *_numbers(_fused_clocks, "CONV_PLAIN", parts=("products", "step", "rows", "weights", "exchange", "exchanged")),
        *_numbers(_fused_conv_plan, "_PLAIN_CHUNK"),
    ],
    "wgmma": [
        *_numbers(_fused_wgmma_plan, "_WAITS", "_CHUNK", "_PART", "_WEIGHTS", "_ROWS", "_READ", "_MULTIPLIED"),
        *_numbers(_fused_wgmma_plan, "_WRITTEN", "_EXCHANGED"),
        *_numbers(_fused_wgmma_plan, "LAUNCH", parts=("takes", "hidden")),
        *_numbers(_fused_wgmma_plan, "_BROUGHT", parts=(2, 4)),
    ],
    "bottleneck": [
        *_numbers(
            _fused_clocks,
            "BOTTLENECK_TENSOR",
            parts=("products", "step", "rows", "weights", "near", "exchange", "exchanged"),
        ),
        *_numbers(_fused_bottleneck_products, "IMAGES", "_ACTIVATION", "_COPIES", "_SECOND_EXCHANGE"),
        *_numbers(_fused_bottleneck_plan, "_WAITS", "_SCATTER", "_SCATTERED"),
    ],
    "wgmma-bottleneck": [
        *_numbers(_fused_wgmma_bottleneck_plan, "_WAITS", "_WEIGHTS", "_WRITTEN", "_CACHED"),
        *_numbers(_fused_wgmma_bottleneck_plan, "_BROUGHT", parts=(2, 4)),
    ],
    "layers": _numbers(_fused_conv_plan, "_PIXEL_CHUNK", "_RESIDUAL"),
    "layers-float32": [],  # all of them are those of "conv-float32"
    "bottleneck-float32": _numbers(_fused_clocks, "BOTTLENECK_PLAIN", parts=("step", "weights", "near", "exchange")),
}


class Record(Protocol):
    """Problems that were measured."""

    #: Microseconds.
    times: Array

    @property
    def weights(self) -> Array:
        """How much each one counts in a fit."""

    def expected(self) -> Array:
        """Microseconds by the model as it is."""

    def report(self) -> str:
        """How near the model is, and how good its choice."""


class Pick(NamedTuple):
    """What a model picks for a case, among the plans that were measured."""

    case: Case
    #: Microseconds that it expects, and that this took; and those of the fastest plan.
    expected_us: float
    us: float
    best_us: float


class Measured:
    """The record of a kind."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = KINDS[kind]
        by_name = {network.name: network for network in networks(self.kind.network, quick=False)}
        #: Plans of each case that were measured on the same kind of device, and microseconds.
        self.cases: dict[tuple[Case, str], tuple[list[Any], list[float]]] = {}
        for row in csv.DictReader(path.read_text().splitlines()):
            case = Case(by_name[row["network"]], int(row["bsize"]), int(row["rows"]))
            plans, times = self.cases.setdefault((case, row["device"]), ([], []))
            plans.append(self.kind.read(map(int, row["plan"].split())))
            times.append(float(row["us"]))
        self.times = np.concatenate([times for _, times in self.cases.values()])

    @functools.cached_property
    def weights(self) -> Array:
        """How much each plan counts: the more, the nearer it is to the fastest one, among which a choice is made."""
        best = np.concatenate([[min(times)] * len(times) for _, times in self.cases.values()])
        return (best / self.times) ** 4

    def expected(self) -> Array:
        """Microseconds by the model as it is."""
        clocks = [self.kind.clocks(plans, case, H200) for (case, _), (plans, _) in self.cases.items()]
        return np.concatenate(clocks) / MHZ

    def picks(self, expected: Array) -> Iterator[Pick]:
        """Of each case, the plan that is expected to be fastest."""
        begin = 0
        for (case, _), (_, times) in self.cases.items():
            own = expected[begin : begin + len(times)]
            number = int(own.argmin())
            yield Pick(case, float(own[number]), times[number], min(times))
            begin += len(times)

    def report(self) -> str:
        """How near the model is, and how good its choice among the measured plans."""
        expected = self.expected()
        errors = np.log(expected / self.times)
        losses = [pick.us / pick.best_us for pick in self.picks(expected)]
        return (
            f"{len(errors)} plans of {len(losses)} problems: expected {np.exp(errors.mean()):.3f} of the time, "
            f"root mean square error {np.sqrt((errors**2).mean()):.3f}; "
            f"choice {np.mean(losses):.4f} of the best, {np.percentile(losses, 90):.3f} at the 90th percentile"
        )


@contextlib.contextmanager
def as_they_were(numbers: Sequence[Number]) -> Iterator[None]:
    """Put the numbers back in the end."""
    before = [number.value for number in numbers]
    try:
        yield
    finally:
        for number, value in zip(numbers, before):
            number.put(value)


def fit(numbers: Sequence[Number], measured: Record) -> None:
    """Change the numbers to those with which the model is nearest: least squares of logarithms. Outliers count less."""
    from scipy.optimize import least_squares

    begin = np.log([number.value for number in numbers])

    def errors(logarithms: Array) -> Array:
        for number, logarithm in zip(numbers, logarithms):
            number.put(float(np.exp(logarithm)))
        return measured.weights * np.log(measured.expected() / measured.times)

    bounds = begin - np.log(REACH), begin + np.log(REACH)
    errors(least_squares(errors, begin, bounds=bounds, loss="soft_l1", f_scale=0.1, diff_step=1e-3, max_nfev=12).x)


def print_fit(numbers: Sequence[Number], measured: Record) -> None:
    """The model as it is, and as it would be nearest."""
    print(f"as it is: {measured.report()}")
    if not numbers:
        return
    with as_they_were(numbers):
        before = [number.value for number in numbers]
        fit(numbers, measured)
        print(f"fitted:   {measured.report()}")
        for number, old in zip(numbers, before):
            print(f"  {number!s:<48}{old:>9.4g} -> {number.value:.4g}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--plans", type=Path, default=RESULTS / "plans", help="folder (default: bench/results/plans)")
    options = parser.parse_args(arguments)
    print_fit(NUMBERS[options.kind], Measured(options.kind, options.plans / f"{options.kind}.csv"))


if __name__ == "__main__":
    main()
