"""Device time of calls: replays of CUDA graphs, between CUDA events."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any


def time_captured(
    cupy: Any, calls: Sequence[Callable[[], Any]], *, rounds: int, repeats: int
) -> tuple[list[Any], list[float]]:
    """What each call returned when it was captured, and the median seconds of one of `rounds` calls in a CUDA graph.

    The graphs take turns on a stream and with memory of their own; what is returned has been computed by a replay.
    """
    cupy.cuda.get_current_stream().synchronize()  # what the calls read was made there
    stream = cupy.cuda.Stream(non_blocking=True)
    pool = cupy.cuda.MemoryPool()  # keeps what the captured calls allocate for as long as the graphs are replayed
    with stream, cupy.cuda.using_allocator(pool.malloc):
        for call in calls:
            call()  # compiles
        captured = [_capture(call, rounds, stream) for call in calls]
        for graph, _ in captured:
            graph.launch(stream)
        events = [[(cupy.cuda.Event(), cupy.cuda.Event()) for _ in calls] for _ in range(repeats)]
        for turn in events:
            for (graph, _), (begin, end) in zip(captured, turn):
                begin.record(stream)
                graph.launch(stream)
                end.record(stream)
        stream.synchronize()
    turns = [[cupy.cuda.get_elapsed_time(begin, end) for begin, end in turn] for turn in events]
    return [result for _, result in captured], [float(statistics.median(ms)) * 1e-3 / rounds for ms in zip(*turns)]


def _capture(call: Callable[[], Any], rounds: int, stream: Any) -> tuple[Any, Any]:
    """A CUDA graph of several calls, and the result of the last."""
    stream.begin_capture()
    try:
        for _ in range(rounds):
            result = call()
    except BaseException:
        # A stream whose capture has not ended is of no use; that may fail for the same reason.
        with contextlib.suppress(Exception):
            stream.end_capture()
        raise
    return stream.end_capture(), result
