"""What an op costs the host: Python's time of a call while the device has next to nothing to do.

It is compared with what CuPy takes to launch an empty kernel with 12 arguments (4 arrays, 8 integers) or none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import sbnet_cupy

from .cases import Mask, Transfer
from .contest import compete, host_clock, wall_clock
from .data import Expected, Inputs, make_inputs, make_mask
from .gather_scatter import library
from .masks import top_left_mask
from .network_data import Scene
from .networks import Sparse
from .reduce_mask import library as mask_library
from .rivals import Contender
from .stages import PRECISIONS, Network, Stage
from .table import OURS, Row, Task, timed_row
from .timing import Run, Timing, time_host

#: A few blocks, over which the device is done long before Python has made the next call.
SHAPE = (1, 64, 64, 32)

EMPTY_KERNELS = r"""
extern "C" __global__ void no_arguments() {}
extern "C" __global__ void twelve_arguments(float*, float*, float*, float*, long long, long long, long long, long long,
                                            long long, long long, long long, long long) {}
"""


def tasks(run: Run) -> Iterator[Task]:
    """Name and work of each op."""
    launches = functools.cache(functools.partial(time_launches, run))
    yield "empty kernels", lambda: launch_rows(launches())
    for name, make in OPS.items():
        yield f"host: {name}", functools.partial(measure, f"host: {name}", make, run, launches)


def time_launches(run: Run) -> dict[str, Timing]:
    """Host time of the launches that all ops are compared with."""
    import cupy

    module = cupy.RawModule(code=EMPTY_KERNELS)
    array = cupy.zeros(4, cupy.float32)
    calls = {
        "12 arguments": functools.partial(
            module.get_function("twelve_arguments"), (1,), (32,), (array,) * 4 + tuple(range(8))
        ),
        "no arguments": functools.partial(module.get_function("no_arguments"), (1,), (32,), ()),
        "cupy.empty": functools.partial(cupy.empty, (16, 16), cupy.float32),
    }
    return {name: time_host(call, run.host_repeats, run.stream) for name, call in calls.items()}


def launch_rows(launches: dict[str, Timing]) -> list[Row]:
    """The launches as rows."""
    names = {
        "12 arguments": "RawKernel, 12 arguments",
        "no arguments": "RawKernel, no arguments",
        "cupy.empty": "cupy.empty",
    }
    return [
        with_ratios(timed_row("empty kernels", names[name], timing, description="what CuPy itself takes"), launches)
        for name, timing in launches.items()
    ]


def measure(
    name: str, make: Callable[[], tuple[Contender, bool]], run: Run, launches: Callable[[], dict[str, Timing]]
) -> list[Row]:
    """Host time of one op; `make` gives the op, and whether it waits for the device."""
    contender, waits = make()
    return [with_ratios(compete(name, contender, wall_clock if waits else host_clock, run), launches())]


def with_ratios(row: Row, launches: dict[str, Timing]) -> Row:
    """The row with its time as a multiple of the two launches."""
    if row.median_us is None:
        return row
    many, none = (row.median_us / launches[name].median_us for name in ("12 arguments", "no arguments"))
    return replace(
        row,
        note=f"{many:.2f} x a launch with 12 arguments, {none:.2f} x one with none",
        parameters={**row.parameters, "ratio_12_arguments": many, "ratio_no_arguments": none},
    )


def _prepare(op: str, **fields: Any) -> tuple[Transfer, Inputs, Expected]:
    import cupy

    case = Transfer("", op, SHAPE, **fields)
    inputs = make_inputs(cupy, case, 1)
    return case, inputs, Expected(cupy, case, inputs)


def _transfer(op: str, **fields: Any) -> tuple[Contender, bool]:
    return library(*_prepare(op, **fields)), False


def _gather_without_out() -> tuple[Contender, bool]:
    case, inputs, expected = _prepare("gather")
    blocks = inputs.sets[0]
    call = functools.partial(sbnet_cupy.sparse_gather, inputs.image, blocks.bin_counts, blocks.indices, **case.grid)
    return Contender(OURS, [call], expected.check), False


def _scatter_into_out() -> tuple[Contender, bool]:
    case, inputs, expected = _prepare("scatter", **_TILE)
    blocks = inputs.sets[0]
    call = functools.partial(
        sbnet_cupy.sparse_scatter,
        blocks.stack,
        blocks.bin_counts,
        blocks.indices,
        inputs.image,
        **case.grid,
        out=inputs.image.copy(),
    )
    return Contender(OURS, [call], expected.check), False


def _reduce(capacity: bool) -> tuple[Contender, bool]:
    import cupy

    case = Mask("", SHAPE[:3], 0.5)
    mask, blocks = make_mask(cupy, case, 0)
    return mask_library(case, [mask], [blocks], capacity), not capacity


def _network(kind: str) -> tuple[Contender, bool]:
    """A convolution or a bottleneck in place, in TF32, with packed weights."""
    import cupy

    stage = Stage("host", *SHAPE[1:3], SHAPE[3], 8, (10, 10))
    network = Network(kind, replace(stage, bottleneck=SHAPE[3]) if kind == "conv" else stage, PRECISIONS[1])
    mask = top_left_mask(SHAPE[1], SHAPE[2], 0.9)
    return Sparse(Scene(cupy, network), mask, network.params(10)).contender(), False


_TILE: dict[str, Any] = {"bsize": (16, 16), "boffset": (0, 0)}

OPS: dict[str, Callable[[], tuple[Contender, bool]]] = {
    "sparse_gather(out=)": functools.partial(_transfer, "gather"),
    "sparse_gather(out=, transpose=True)": functools.partial(_transfer, "gather", transpose=True),
    "sparse_gather": _gather_without_out,
    "sparse_scatter_var": functools.partial(_transfer, "scatter", **_TILE),
    "sparse_scatter_var(transpose=True)": functools.partial(_transfer, "scatter", transpose=True, **_TILE),
    "sparse_scatter_var(add=True)": functools.partial(_transfer, "add", **_TILE),
    "sparse_scatter_var(add=True, atomic=True)": functools.partial(_transfer, "add"),
    "sparse_scatter(out=)": _scatter_into_out,
    "reduce_mask(capacity=)": functools.partial(_reduce, True),
    "reduce_mask": functools.partial(_reduce, False),
    "sparse_conv2d(base=, out=)": functools.partial(_network, "conv"),
    "sparse_res_block_bottleneck(out=x)": functools.partial(_network, "bottleneck"),
}
