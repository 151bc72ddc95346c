"""Runs all ops with hostile indices, for a memory checker to watch: ``compute-sanitizer python tests/hostile.py``.

Each array has an allocation of its own, so that one element beyond its end is an error, not a neighbour. With the
argument ``own-kernels`` it leaves out what goes through cuBLAS: initcheck takes the results of cuBLAS for unwritten.
"""

from __future__ import annotations

import sys
from typing import Any

import cupy
import numpy as np
from cases import LAYOUTS, Case, identical, lay_out, random_bits
from fused_cases import BOTTLENECKS, CONVS, planned

import sbnet_cupy

INT32 = np.iinfo(np.int32)
DTYPES = ("uint8", "float16", "float32", "complex128")


def indices_for(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Extremes, their neighbours, values just outside of the grid, and blocks inside, some of them repeated."""
    extremes = [INT32.min, INT32.min + 1, -(2**30), -2, -1, 0, 1, 2, 3, 4, 2**30, INT32.max - 1, INT32.max]
    wild = rng.choice(extremes, (40, 3))
    wild[:20, 0] = rng.integers(0, 2, 20)
    inside = np.stack([rng.integers(0, 2, 12), rng.integers(-1, 4, 12), rng.integers(-1, 5, 12)], 1)
    rows = np.concatenate([wild, inside, inside[:4]])
    return rng.permutation(rows).astype(np.int32)


def hostile_cases() -> list[Case]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(32):
        dtype = np.dtype(DTYPES[number % len(DTYPES)])
        channels = (1, 3, 8, 40)[number // 4 % 4]
        bsize = ((5, 4), (8, 8))[number // 2 % 2]
        bstride = (bsize, (3, 2), (9, 11), (2**40, 1))[number // 3 % 4]
        indices = indices_for(rng)
        found.append(
            Case(
                x=random_bits(rng, (2, 19, 23, channels), dtype),
                stack=random_bits(rng, (len(indices), *bsize, channels), dtype),
                indices=indices,
                count=(len(indices), INT32.max, 30, -5)[number % 4 if number % 3 else 0],
                bsize=bsize,
                boffset=((-1, -2), (0, 0), (-(2**33), 2**33))[number % 3],
                bstride=bstride,
                transpose=bool(number & 1),
                layouts=(LAYOUTS[number % 6], LAYOUTS[number // 2 % 6]),
            )
        )
    return found


def run(case: Case, xp: Any) -> list[Any]:
    x, blocks, bin_counts, indices = case.arrays(xp)
    options: dict[str, Any] = {**case.grid, "transpose": case.transpose}
    results = [sbnet_cupy.sparse_gather(x, bin_counts, indices, **options)]
    for add in (False, True):
        how = {**options, "add": add, "atomic": add}
        results.append(sbnet_cupy.sparse_scatter(blocks, bin_counts, indices, x, **how))
    return results


def main() -> None:
    cupy.cuda.set_allocator(None)
    checked = 0
    for case in hostile_cases():
        for found, expected in zip(run(case, cupy), run(case, np)):
            if not identical(found, expected, nan_payloads=False):
                raise SystemExit(f"wrong result: {case}")
            checked += 1
    rng = np.random.default_rng(1)
    for number, dtype in enumerate(("bool", "int64", "float16", "float32") * 3):
        mask = random_bits(rng, (2, 33, 300, 1), np.dtype(dtype))
        grid: dict[str, Any] = {"bsize": (5, 270 if number % 2 else 4), "boffset": (-3, 2), "bstride": (3, 7)}
        options = {**grid, "capacity": (None, 0, 50, 3000)[number % 4], "avgpool": number % 3 == 0}
        for layout in ("nhwc", "reversed"):
            found = sbnet_cupy.reduce_mask(lay_out(mask, layout, cupy), (20, 45), **options)
            expected = sbnet_cupy.reduce_mask(mask, (20, 45), **options)
            if not all(map(identical, found, expected)):
                raise SystemExit(f"wrong result: reduce_mask of {dtype} with {options}")
            checked += 1
    fused = [*CONVS, *BOTTLENECKS]  # among them such with hostile indices
    if "own-kernels" in sys.argv:
        fused = [case for case in fused if getattr(case, "projects", None) is None]
    for case in fused:
        with planned(case.plan):
            case.assert_right(case.run(cupy))
        checked += 1
    print(f"{checked} results are right")


if __name__ == "__main__":
    main()
