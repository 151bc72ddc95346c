"""Clocks: events on the device, a CUDA graph, and the host's own time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .data import random_words
from .rivals import free_torch_memory, torch_stream

#: Calls of at least this many microseconds are timed one by one: the host, some 20 us a call, stays ahead of the
#: device. Shorter ones are timed in a graph.
LONG_CALL = 100.0
#: Calls that one graph holds, at least.
GRAPH_CALLS = 20
#: Microseconds of calls that one graph holds, at least, if they are that long.
GRAPH_US = 2000.0
#: Calls in a row whose time from Python is taken.
EAGER_CALLS = 10
#: Calls that one sample of the host's time spans: few, so that the launch queue never fills up.
HOST_CALLS = 10
#: Bytes that the copy which sets the ceiling reads.
COPY_BYTES = 2**30

Call = Callable[[], Any]
#: Makes a graph, which has a method ``launch(stream)``, of so many rounds of calls.
Capture = Callable[[Sequence[Call], int, Any], Any]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 10th and 90th percentile of `repeats` samples, and what took them."""

    median_us: float
    low_us: float
    high_us: float
    repeats: int
    clock: str


@dataclass(frozen=True)
class Run:
    """What all measurements of one process share."""

    stream: Any
    quick: bool
    ceiling: Timing

    @property
    def repeats(self) -> int:
        """Samples of each figure of the device."""
        return 7 if self.quick else 25

    @property
    def host_repeats(self) -> int:
        """Samples of each figure of the host, which scatter more."""
        return 20 if self.quick else 100

    @property
    def ceiling_tbps(self) -> float:
        return terabytes_per_second(2 * COPY_BYTES, self.ceiling.median_us)


def terabytes_per_second(size: float, microseconds: float) -> float:
    return size / microseconds / 1e6


def summarize(samples_us: Sequence[float], clock: str) -> Timing:
    """Median and 10th to 90th percentile."""
    low, median, high = np.percentile(samples_us, (10, 50, 90))
    return Timing(float(median), float(low), float(high), len(samples_us), clock)


@contextlib.contextmanager
def start_run(quick: bool) -> Iterator[Run]:
    """Make a stream of its own current, for PyTorch too, and measure the copy ceiling on it."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, torch_stream(stream.ptr):
        ceiling = time_copy(20 if quick else 50, stream)
        free_memory()
        yield Run(stream, quick, ceiling)


def time_copy(repeats: int, stream: Any) -> Timing:
    """The plain copy from device to device, of random data."""
    import cupy

    source = random_words(cupy, COPY_BYTES // 4, 0)
    target = cupy.empty_like(source)
    copy = functools.partial(target.data.copy_from_device_async, source.data, COPY_BYTES, stream)
    time_events([copy], repeats, stream)  # until clocks and caches are as they will be
    timing = time_events([copy], repeats, stream)
    if not bool((source == target).all()):
        raise RuntimeError("the device copy, which sets the ceiling, copied wrongly")
    return timing


def free_memory() -> None:
    """Give unused device memory back, so that cases do not pile up."""
    import cupy

    free_torch_memory()
    cupy.get_default_memory_pool().free_all_blocks()


def time_events(
    calls: Sequence[Call], repeats: int, stream: Any, per_call: int = 1, before: Call | None = None
) -> Timing:
    """Events around each call, in turn; nothing waits in between.

    `per_call` is the number of operations that one call stands for. `before` is called ahead of each sample, untimed.
    """
    import cupy

    events = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(repeats)]
    for call in itertools.islice(itertools.cycle(calls), max(2, len(calls))):
        call()  # warms up, and keeps the device busy while the first timed call is queued
    for call, (begin, end) in zip(itertools.cycle(calls), events):
        if before is not None:
            before()
        begin.record(stream)
        call()
        end.record(stream)
    stream.synchronize()
    samples = [1e3 * cupy.cuda.get_elapsed_time(begin, end) / per_call for begin, end in events]
    return summarize(samples, "events")


def time_graph(
    calls: Sequence[Call],
    repeats: int,
    stream: Any,
    *,
    least: int = GRAPH_CALLS,
    before: Call | None = None,
    capturing: Capture | None = None,
) -> Timing:
    """Replays of a CUDA graph of `least` calls or more, in turn, over their number.

    `before` is called ahead of each replay, untimed; `capturing` makes the graph, by default :func:`capture`.
    """
    import cupy

    rounds = math.ceil(least / len(calls))
    pool = cupy.cuda.MemoryPool()  # holds what the captured calls allocate, for as long as the graph is replayed
    with cupy.cuda.using_allocator(pool.malloc):
        for call in calls:
            call()
        stream.synchronize()
        graph = (capturing or capture)(calls, rounds, stream)
        timing = time_events([lambda: graph.launch(stream)], repeats, stream, rounds * len(calls), before)
    return Timing(timing.median_us, timing.low_us, timing.high_us, timing.repeats, "graph")


def capture(calls: Sequence[Call], rounds: int, stream: Any) -> Any:
    """A CUDA graph of `rounds` times all calls."""
    stream.begin_capture()
    try:
        for _ in range(rounds):
            for call in calls:
                call()
    except BaseException:
        # The stream is of no use to anybody until its capture has ended, which may fail for the same reason.
        with contextlib.suppress(Exception):
            stream.end_capture()
        raise
    return stream.end_capture()


def time_device(calls: Sequence[Call], repeats: int, stream: Any) -> Timing:
    """Device time of one call: with events if it is long, in a graph else."""
    if time_events(calls, 3, stream).median_us >= LONG_CALL:
        return time_events(calls, repeats, stream)
    return time_graph(calls, repeats, stream)


def time_captured(
    calls: Sequence[Call],
    repeats: int,
    stream: Any,
    least: int = GRAPH_CALLS,
    before: Call | None = None,
    capturing: Capture | None = None,
) -> Timing:
    """Time in a graph of `least` calls, or of fewer where they are long; see :func:`time_graph`."""
    estimate = time_events(calls, 3, stream).median_us
    least = max(1, min(least, math.ceil(GRAPH_US / max(estimate, 1))))
    return time_graph(calls, repeats, stream, least=least, before=before, capturing=capturing)


def time_eager(calls: Sequence[Call], repeats: int, stream: Any, before: Call | None = None) -> Timing:
    """Time of a call among some in a row from Python: that of the device or of the host, whichever is longer."""

    def several() -> None:
        for call in itertools.islice(itertools.cycle(calls), EAGER_CALLS):
            call()

    timing = time_events([several], repeats, stream, EAGER_CALLS, before)
    return dataclasses.replace(timing, clock="eager")


def time_host(call: Call, repeats: int, stream: Any, clock: str = "host") -> Timing:
    """Host time of a call, from an idle device on; the collector of garbage waits outside."""
    for _ in range(HOST_CALLS):
        call()
    samples = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            stream.synchronize()
            begin = time.perf_counter_ns()
            for _ in range(HOST_CALLS):
                call()
            samples.append((time.perf_counter_ns() - begin) / 1e3 / HOST_CALLS)
    finally:
        if collecting:
            gc.enable()
        stream.synchronize()
    return summarize(samples, clock)
