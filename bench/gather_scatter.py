"""The cases of gather and scatter: bandwidth beside the device copy and the rivals."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import sbnet_cupy

from .cases import SMALL_GRAPH, SMALL_HOST, Transfer, byte_model, large_cases, small_cases
from .contest import compete, device_clock, event_clock, host_clock
from .data import Blocks, Expected, Inputs, channels_last, make_inputs, sets_needed
from .rivals import Contender, transfer_rivals
from .table import CORRECT, OURS, Row, Task, timed_row
from .timing import COPY_BYTES, Run


def library(case: Transfer, inputs: Inputs, expected: Expected, name: str = OURS) -> Contender:
    """The way of this library: gather into a given stack, scatter in place."""
    if case.op == "gather":

        def gather(blocks: Blocks) -> Any:
            return sbnet_cupy.sparse_gather(
                inputs.image,
                blocks.bin_counts,
                blocks.indices,
                **case.grid,
                transpose=case.transpose,
                out=blocks.stack,
            )

        calls = [functools.partial(gather, blocks) for blocks in inputs.sets]
        return Contender(name, calls, lambda got: expected.check([channels_last(case, stack) for stack in got]))
    if case.op in GRADIENTS:
        return gradient(case, inputs, expected, name)
    work = inputs.image.copy(order="K")

    def scatter(blocks: Blocks) -> Any:
        return sbnet_cupy.sparse_scatter_var(
            blocks.stack,
            blocks.bin_counts,
            blocks.indices,
            work,
            **case.grid,
            add=case.op == "add",
            atomic=case.op == "add" and case.overlaps,
            transpose=case.transpose,
        )

    return Contender(name, [functools.partial(scatter, blocks) for blocks in inputs.sets], expected.check)


#: Ops without rivals: frameworks make them of their own indexing, which the rivals of gather and scatter time.
GRADIENTS = ("gather_grad", "scatter_grad")


def gradient(case: Transfer, inputs: Inputs, expected: Expected, name: str = OURS) -> Contender:
    """The gradients of gather and scatter, written to memory that is given."""
    images = [inputs.image.copy(order="K") for _ in inputs.sets]  # results of their own, which are checked together
    options = {**case.grid, "transpose": case.transpose}

    def gather_grad(blocks: Blocks, image: Any) -> Any:
        stack = (blocks.stack, blocks.bin_counts, blocks.indices)
        return sbnet_cupy.sparse_gather_grad(*stack, case.shape, **options, out=image)

    def scatter_grad(blocks: Blocks, image: Any) -> Any:
        rows, out = (blocks.bin_counts, blocks.indices), (blocks.stack, image)
        found = sbnet_cupy.sparse_scatter_grad(inputs.image, *rows, **options, out=out)
        return channels_last(case, found.grad_blocks), found.grad_x

    call = gather_grad if case.op == "gather_grad" else scatter_grad
    calls = [functools.partial(call, blocks, image) for blocks, image in zip(inputs.sets, images)]
    return Contender(name, calls, expected.check)


def ceiling_row(run: Run) -> Row:
    """The device copy, to which every bandwidth is compared."""
    return timed_row(
        "device copy",
        "cudaMemcpyAsync",
        run.ceiling,
        size=2 * COPY_BYTES,
        ceiling_tbps=run.ceiling_tbps,
        description="1 GiB from device to device",
        byte_model="read + written",
        check=CORRECT,
    )


def tasks(run: Run) -> Iterator[Task]:
    """Name and work of each case."""
    yield "device copy", lambda: [ceiling_row(run)]
    for case in large_cases(run.quick):
        yield case.name, functools.partial(measure, case, run)
    for case in small_cases():
        yield case.name, functools.partial(measure_small, case, run)


def measure(case: Transfer, run: Run, rivals: bool = True, **parameters: Any) -> list[Row]:
    """Device time of one case, and of its rivals."""
    import cupy

    inputs = make_inputs(cupy, case, sets_needed(case))
    expected = Expected(cupy, case, inputs)
    fields = _fields(case, inputs, parameters)
    ours = library(case, inputs, expected)
    rows = [compete(case.name, ours, device_clock, run, target=case.target, original=case.original, **fields)]
    if rivals and case.op not in GRADIENTS:
        rows += [
            compete(case.name, rival, event_clock, run, **fields)
            for rival in transfer_rivals(cupy, case, inputs, expected)
        ]
    return rows


def measure_small(case: Transfer, run: Run) -> list[Row]:
    """A case so small that the launch counts: in a graph, from Python, and the time of Python itself."""
    import cupy

    inputs = make_inputs(cupy, case, sets_needed(case))
    one = Inputs(inputs.image, inputs.sets[:1])
    expected, expected_one = Expected(cupy, case, inputs), Expected(cupy, case, one)
    fields = _fields(case, inputs, {})
    untransferred = {**fields, "size": None}  # the host moves nothing

    def warm(name: str) -> Contender:
        return library(case, one, expected_one, f"{OURS}, {name}")

    rotating = library(case, inputs, expected, f"{OURS}, {len(inputs.sets)} sets of blocks (beyond L2)")
    original = {"original": case.original}
    rows = [
        compete(case.name, warm("same blocks (in L2)"), device_clock, run, target=SMALL_GRAPH, **original, **fields),
        compete(case.name, rotating, device_clock, run, **fields),
        compete(case.name, warm("same blocks, from Python"), event_clock, run, **original, **fields),
        compete(case.name, warm("host time of a call"), host_clock, run, target=SMALL_HOST, **untransferred),
    ]
    return rows + [
        compete(case.name, rival, event_clock, run, **fields)
        for rival in transfer_rivals(cupy, case, one, expected_one)
    ]


def _fields(case: Transfer, inputs: Inputs, parameters: dict[str, Any]) -> dict[str, Any]:
    """What all rows of a case share."""
    size, model = byte_model(case, len(inputs.sets))
    return {
        "size": size,
        "byte_model": model,
        "description": case.describe(),
        "parameters": {**case.parameters(), **parameters},
    }
