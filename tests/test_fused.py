"""The fused kernels behind the public functions, executed on a CPU and, where there is one, on a GPU."""

from __future__ import annotations

import os
from typing import Any

import cpu_cuda
import pytest
from fused_cases import BottleneckCase, ConvCase, FusedCase
from networks import Geometry

if cpu_cuda.why_unavailable() and not os.environ.get("CI"):
    pytest.skip(cpu_cuda.why_unavailable(), allow_module_level=True)


def conv(
    name: str, arithmetic: str, size: tuple[int, int], channels: int, features: int, ksize: tuple[int, int],
    strides: tuple[int, int], tile: tuple[int, int], padding: Any = "SAME", *, batch: int = 2, density: float = 0.02,
    spare: int | None = None, **options: Any,
) -> ConvCase:  # fmt: skip
    shape = (batch, *size, channels)
    geometry = Geometry(shape, ksize, strides, padding, tile, density, spare, len(name))
    return ConvCase(name, arithmetic, geometry, features=features, **options)


EXPLICIT = ((1, 0), (3, 2))

#: Between them: every arithmetic; strides and kernels of all kinds; channels and features that fill pieces and groups,
#: or do not; one chunk and several; ragged tiles; each kind of result and memory; rows to spare, and too few.
CONVS = [
    conv("3x3", "float16", (20, 23), 24, 40, (3, 3), (1, 1), (8, 8), bias=True, relu=True),
    conv("3x3-ragged", "tf32", (13, 17), 24, 24, (3, 3), (1, 1), (5, 7), target="out", spare=4),
    conv("pads", "float32", (13, 16), 8, 5, (3, 3), (1, 1), (4, 5), EXPLICIT, spare=-2, density=0.1, target="place"),
    conv("nchw-stride", "bfloat16", (14, 15), 5, 8, (3, 3), (2, 2), (4, 5), layout="nchw", target="out", bias=True),
    conv("1x1", "float16", (11, 12), 64, 64, (1, 1), (1, 1), (5, 7), target="place", relu=True),
    conv("stem", "tf32", (18, 21), 3, 64, (7, 7), (2, 2), (4, 4), bias=True, relu=True, packed=False),
    conv("5x5-valid", "float16", (15, 14), 40, 24, (5, 5), (1, 1), (6, 4), "VALID", batch=1),
    conv("2x5", "float32", (14, 15), 8, 3, (2, 5), (3, 1), (2, 2), EXPLICIT, layout="sliced", target="out"),
    conv("1x1-stride", "bfloat16", (14, 15), 8, 64, (1, 1), (2, 2), (2, 3), density=0.1),
    conv("misaligned", "tf32", (9, 12), 40, 8, (3, 3), (1, 1), (4, 5), layout="misaligned", target="place", bias=True),
    conv("reversed", "float16", (9, 12), 3, 3, (3, 3), (1, 1), (4, 5), layout="reversed", target="out", density=1.0),
    conv("chunks", "tf32", (10, 9), 600, 40, (1, 1), (1, 1), (4, 5), "VALID", batch=1),
    conv("chunks-5x5", "float16", (9, 11), 104, 8, (5, 5), (1, 1), (3, 6), batch=1, relu=True, target="place"),
    conv("none-active", "float16", (9, 12), 8, 8, (3, 3), (1, 1), (4, 5), density=0.0, spare=3, target="out"),
    conv("no-channels", "float16", (9, 12), 0, 8, (3, 3), (1, 1), (4, 5), bias=True),
]  # fmt: skip


def bottleneck(
    name: str, arithmetic: str, size: tuple[int, int], channels: int, inner: int, tile: tuple[int, int], *,
    ksize: tuple[int, int] = (3, 3), strides: tuple[int, int] = (1, 1), batch: int = 2, density: float = 0.02,
    spare: int | None = None, **options: Any,
) -> BottleneckCase:  # fmt: skip
    shape = (batch, *size, channels)
    geometry = Geometry(shape, ksize, strides, "SAME", tile, density, spare, len(name))
    return BottleneckCase(name, arithmetic, geometry, inner=inner, **options)


#: Blocks that do not touch: on a CPU, where CTAs do not run at the same time, others would read what is written.
APART = ((0, 0, 0), (0, 2, 1), (1, 4, 5))

BOTTLENECKS = [
    bottleneck("direct", "float16", (20, 23), 32, 8, (8, 8), spare=2),
    bottleneck("direct-tf32", "tf32", (14, 15), 48, 16, (5, 7), target="out"),
    bottleneck("direct-float32", "float32", (14, 13), 24, 8, (5, 4), activates=False, packed=False, batch=1),
    bottleneck("direct-3x5", "bfloat16", (13, 16), 40, 24, (5, 4), ksize=(3, 5), density=0.05, spare=-2),
    bottleneck("direct-in-place", "float16", (20, 23), 32, 8, (4, 4), target="place", triples=APART),
    bottleneck("stack", "tf32", (20, 23), 16, 8, (8, 8), target="place", density=0.05),
    bottleneck("layers-stride", "float16", (13, 15), 16, 8, (3, 4), strides=(2, 2), projects=24, spare=3),
    bottleneck("layers-kernels", "tf32", (12, 13), 8, 8, (4, 5), outer=((3, 1), (2, 3)), target="place", batch=1),
    bottleneck("layers-odd", "float32", (12, 13), 5, 3, (4, 5), target="place", density=0.05, spare=-3),
    bottleneck("layers-nchw", "bfloat16", (12, 13), 16, 8, (4, 5), middle=16, layout="nchw", target="out", batch=1),
    bottleneck("layers-plain", "float16", (12, 13), 8, 8, (4, 5), activates=False, layout="misaligned", target="out"),
]

CASES: list[FusedCase] = [*CONVS, *BOTTLENECKS]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="session")
def built(request: pytest.FixtureRequest) -> None:
    """Compile what the selected tests need, all at once."""
    selected = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    cpu_cuda.build({instance for case in selected if isinstance(case, FusedCase) for instance in case.kernels()})


@cases
@pytest.mark.usefixtures("built")
def test_on_a_cpu(case: FusedCase) -> None:
    case.check(cpu_cuda.ORDERS[0])


@pytest.mark.gpu
@cases
def test_on_a_gpu(case: FusedCase) -> None:
    cupy = pytest.importorskip("cupy")
    case.assert_right(case.run(cupy))
