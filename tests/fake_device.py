"""NumPy in the place of a device: the whole path of a benchmark, done at once."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

from bench import networks, record, stages, timing


def fake_run() -> timing.Run:
    return timing.Run(FakeStream(), True, timing.Timing(2 * timing.COPY_BYTES / 4e6, 1, 1, 20, "events"))


class FakeStream:
    """What timing asks of a stream, done at once."""

    ptr = 0

    def __init__(self, **_: Any) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def begin_capture(self) -> None:
        pass

    def end_capture(self) -> Any:
        return types.SimpleNamespace(launch=lambda stream: None)


class FakeDevice(types.ModuleType):
    """NumPy in the place of CuPy; every two events lie 50 us apart."""

    def __init__(self) -> None:
        super().__init__("cupy")
        event = types.SimpleNamespace(record=lambda stream: None)
        pool = types.SimpleNamespace(malloc=None, free_all_blocks=lambda: None)
        self.cuda = types.SimpleNamespace(
            Device=FakeStream,
            Stream=FakeStream,
            get_current_stream=FakeStream,
            Event=lambda: event,
            get_elapsed_time=lambda begin, end: 0.05,
            MemoryPool=lambda: pool,
            using_allocator=lambda malloc: FakeStream(),
        )
        self.get_default_memory_pool = lambda: pool

    def RawModule(self, code: str) -> Any:
        assert 'extern "C"' in code
        return types.SimpleNamespace(get_function=lambda name: lambda grid, block, arguments: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let benchmarks find NumPy when they import CuPy."""
    monkeypatch.setitem(sys.modules, "cupy", FakeDevice())
    monkeypatch.setattr(timing, "time_copy", lambda repeats, stream: fake_run().ceiling)
    monkeypatch.setattr(record, "machine", lambda: {"device": "a device", "cupy": "1.0"})
    monkeypatch.setattr("bench.__main__.no_device", lambda: "")
    monkeypatch.setattr("bench.networks._device_name", lambda xp: "a device")


#: A main stage and another, on images that their blocks do not divide.
TINY_STAGES = (
    stages.Stage("resnet-v2", 21, 26, 8, 4, (5, 7)),
    stages.Stage("resnet-50", 17, 12, 12, 8, (5, 7)),
)


def shrink_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the benchmarks of networks measure tiny stages, in few calls."""
    monkeypatch.setattr(stages, "STAGES", TINY_STAGES)
    monkeypatch.setattr(networks, "networks", lambda kind, quick: stages.networks(kind, quick=False)[2:4])
    monkeypatch.setattr(networks, "MOST_IMAGES", 2)
    monkeypatch.setattr(networks, "ENGINES", networks.ENGINES[1:])  # NumPy arrays are never fused
    monkeypatch.setattr(timing, "GRAPH_US", 1.0)
