"""The fused kernels behind the public functions, executed on a CPU and, where there is one, on a GPU."""

from __future__ import annotations

import os
from dataclasses import replace

import cpu_cuda
import pytest
from fused_cases import (
    BOTTLENECKS,
    CONVS,
    HOPPER_PLANS,
    WGMMA_PLANS,
    BottleneckCase,
    FusedCase,
    planned,
    random_cases,
)

from sbnet_cupy._jit import device_limits

if cpu_cuda.why_unavailable() and not os.environ.get("CI"):
    pytest.skip(cpu_cuda.why_unavailable(), allow_module_level=True)


CASES: list[FusedCase] = [*CONVS, *BOTTLENECKS]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="session")
def built(request: pytest.FixtureRequest) -> None:
    """Compile what the selected tests need, all at once."""
    selected = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    cpu_cuda.build({instance for case in selected if isinstance(case, FusedCase) for instance in case.kernels()})


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@cases
@pytest.mark.usefixtures("built")
def test_on_a_cpu(case: FusedCase) -> None:
    case.check(cpu_cuda.ORDERS[0])


@pytest.mark.parametrize("case", [c for c in CASES if c.plan in HOPPER_PLANS], ids=lambda case: case.name)
def test_plans_by_warpgroups_are_followed(case: FusedCase) -> None:
    source = "conv_wgmma.cu" if case.plan in WGMMA_PLANS else "bottleneck_wgmma.cu"
    assert source in {instance.source for instance in case.kernels()}


#: Random geometries that run on a CPU, where each takes a second, and on a GPU.
RANDOM = 60 if os.environ.get("SBNET_CUPY_TEST_ALL") else 9


def test_random_geometry_on_a_cpu() -> None:
    found = random_cases(RANDOM)
    found += [replace(case, plan="groups") for case in found if isinstance(case, BottleneckCase)]
    cpu_cuda.build({instance for case in found for instance in case.kernels()})
    for case in found:
        case.check(cpu_cuda.ORDERS[0])


@pytest.mark.gpu
def test_random_geometry_on_a_gpu() -> None:
    cupy = pytest.importorskip("cupy")
    for case in random_cases(60):
        found = [case.run(cupy)]
        for name in ("", "groups"):
            with planned(name):
                found.append(case.run(cupy))
        for result in found:
            try:
                case.assert_right(result)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from None


#: Cases of each kernel, and of each way to share its work.
ORDERED = (
    *("chunks-5x5", "split", "2x5", "layers-odd", "direct-in-place", "distant", "parts", "passes"),
    *("wgmma", "wgmma-parts", "wgmma-chunks", "wgmma-depth", "wgmma-depth-halves"),
    *("groups", "groups-in-place", "groups-squares", "groups-wide"),
)


@pytest.mark.parametrize("order", cpu_cuda.ORDERS[1:], ids=lambda order: order.name)
@pytest.mark.usefixtures("built")
def test_orders(order: cpu_cuda.Order) -> None:
    """Some of them with threads and blocks in other orders: what one thread owes another comes to light."""
    for case in CASES:
        if case.name in ORDERED:
            case.check(order)


@pytest.mark.gpu
@cases
def test_on_a_gpu(case: FusedCase) -> None:
    cupy = pytest.importorskip("cupy")
    if case.plan in HOPPER_PLANS and not device_limits(cupy.cuda.runtime.getDevice()).has_warpgroups:
        pytest.skip("a kernel for Hopper")
    with planned(case.plan):
        case.assert_right(case.run(cupy))
