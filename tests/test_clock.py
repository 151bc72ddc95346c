"""The clock of calls in CUDA graphs: what it captures, and what it returns."""

from __future__ import annotations

from typing import Any

import pytest
from fake_device import FakeDevice, FakeStream

from sbnet_cupy import _clock


def test_results_and_median_seconds_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [0, 0]

    def count(which: int) -> int:
        counts[which] += 1
        return 10 * which + counts[which]

    device = FakeDevice()
    milliseconds = iter([9.0, 90.0, 1.0, 10.0, 2.0, 20.0])  # the graphs take turns
    monkeypatch.setattr(device.cuda, "get_elapsed_time", lambda begin, end: next(milliseconds))
    results, seconds = _clock.time_captured(device, [lambda: count(0), lambda: count(1)], rounds=5, repeats=3)
    assert results == [6, 16], "one call to compile, then five in the graph"
    assert seconds == pytest.approx([2e-3 / 5, 20e-3 / 5])


def test_a_failed_capture_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def end_capture(_: Any) -> None:
        events.append("end")
        raise RuntimeError("invalidated")

    monkeypatch.setattr(FakeStream, "begin_capture", lambda self: events.append("begin"))
    monkeypatch.setattr(FakeStream, "end_capture", end_capture)

    def fail() -> None:
        if events:
            raise ArithmeticError("cannot be captured")

    with pytest.raises(ArithmeticError, match="cannot be captured"):
        _clock.time_captured(FakeDevice(), [fail], rounds=1, repeats=1)
    assert events == ["begin", "end"]
