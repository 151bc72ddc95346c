"""How many instructions the compiler makes of kernels that run for microseconds. Needs no GPU.

Such kernels take as long as their instructions: twice, some hundred more went unnoticed until times showed them. Bounds
are 3 to 12 % above what CUDA 13.5 makes of them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("cupy")

from cuda.pathfinder import find_nvidia_binary_utility
from cupy.cuda import nvrtc
from nvrtc import instructions_of

from sbnet_cupy._fused_wgmma_plan import GroupLayout
from sbnet_cupy._instances import (
    Instance,
    bottleneck_instance,
    conv_instance,
    products_of,
    wgmma_bottleneck_instance,
    wgmma_instance,
)
from sbnet_cupy._warps import WarpLayout


class Bounds(NamedTuple):
    """Instructions of a kernel, at most."""

    instance: Instance
    #: In all, and from the last product to the last result. Behind that are ways out, also of a CTA without a tile.
    total: int
    results: int
    #: From a product to the next one. Those of warps load matrices in between.
    step: int | None = None


HALF, FLOAT = np.dtype(np.float16), np.dtype(np.float32)


def conv_wgmma(dtype: np.dtype[Any], layout: GroupLayout, shape: tuple[int, ...]) -> Instance:
    return wgmma_instance(dtype, layout.expression, shape, several=False, resident=1)


def bottleneck(dtype: np.dtype[Any], numbers: tuple[int, ...], layouts: list[WarpLayout], near: int) -> Instance:
    first, second, third = (layout.expression for layout in layouts)
    return bottleneck_instance(products_of(dtype, True), numbers, (first, second, third), near, parts=1, resident=1)


#: What the networks of the benchmark launch where 90 % of the image is not active, on an H200.
KERNELS = {
    "conv 400x700x24 float16": Bounds(
        conv_instance(
            products_of(HALF, True),
            WarpLayout(2, 3, 8, 1).expression,
            (16, 16, 3, 3, 1, 1, 3),
            (True, True, False, False, False),
            resident=1,
        ),
        1050,
        325,
    ),
    "conv 200x350x48 tf32": Bounds(
        conv_wgmma(FLOAT, GroupLayout((1, 1), 1, 6, groups_m=1, depth=2), (3, 3, 12, 1, 1)), 1260, 204, 5
    ),
    "conv 200x350x48 float16": Bounds(
        conv_wgmma(HALF, GroupLayout((1, 1), 1, 3, groups_m=1, depth=1), (3, 3, 6, 1, 1)), 880, 143, 5
    ),
    "bottleneck 400x700x96/24 float16": Bounds(
        bottleneck(
            HALF,
            (96, 24, 16, 16, 3, 3, 12, 3, 3),
            [WarpLayout(3, 3, 8, 1), WarpLayout(2, 3, 8, 1), WarpLayout(2, 4, 8, 1)],
            near=7,
        ),
        1900,
        222,
    ),
    "bottleneck 200x350x192/48 tf32": Bounds(
        wgmma_bottleneck_instance(
            FLOAT,
            (192, 48, 3, 3),
            (GroupLayout((1, 1), 1, 6, 1, 2).expression, GroupLayout((1, 1), 1, 12, 1, 1).expression),
            (1, 1),
        ),
        3150,
        493,
    ),
}


@pytest.mark.skipif(nvrtc.getVersion() < (13, 0), reason="bounds are of the compiler of CUDA 13")
@pytest.mark.skipif(find_nvidia_binary_utility("nvdisasm") is None, reason="no nvdisasm, which the test extra brings")
@pytest.mark.parametrize("name", KERNELS)
def test_no_more_instructions(name: str) -> None:
    bounds = KERNELS[name]
    found = instructions_of("sm_90", bounds.instance)
    products = [k for k, instruction in enumerate(found) if instruction.startswith(("HMMA", "HGMMA"))]
    steps = [after - before for before, after in itertools.pairwise(products)]
    behind = [instruction.split()[0] for instruction in found[products[-1] :]]
    # Most are of one kind; a bottleneck's counts of a meeting are of another.
    (store, _), *_ = Counter(kind for kind in behind if kind.startswith("STG")).most_common()
    results = len(behind) - 1 - behind[::-1].index(store)
    print(f"{name}: {len(found)} instructions, {results} behind {len(products)} products")
    assert len(found) <= bounds.total
    assert results <= bounds.results
    assert bounds.step is None or max(steps) <= bounds.step
