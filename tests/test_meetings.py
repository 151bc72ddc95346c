"""Which counters a launch gets: those of its stream, or its own in a captured graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import cpu_cuda
import numpy as np
import pytest
from cpu_cuda import standin

import sbnet_cupy

if cpu_cuda.why_unavailable():
    pytest.skip(cpu_cuda.why_unavailable(), allow_module_level=True)


class Streams:
    """What the current stream is."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.be(0)

    def be(self, ptr: int, capturing: bool = False) -> None:
        stream = SimpleNamespace(ptr=ptr, is_capturing=lambda: capturing, synchronize=lambda: None)
        self._patch.setattr(standin.cuda, "get_current_stream", lambda: stream)


@pytest.fixture
def streams() -> Iterator[Streams]:
    with cpu_cuda.device(), pytest.MonkeyPatch.context() as patch:
        yield Streams(patch)


@pytest.fixture
def meetings(streams: Streams) -> Any:
    from sbnet_cupy import _meetings

    return _meetings.Meetings()


def test_a_stream_has_one_pair_on_each_device(meetings: Any, streams: Streams) -> None:
    found: dict[tuple[int, int], int] = {}
    for _ in range(2):
        for stream in (0, 1, 640, 1280):
            streams.be(stream)
            for device in (0, 1):
                place = meetings.place(device)
                assert found.setdefault((stream, device), place) == place
    assert len(set(found.values())) == 8
    assert min(abs(a - b) for a in found.values() for b in found.values() if a != b) >= 8


def test_threads_do_not_share_the_stream_that_each_has_for_itself(meetings: Any, streams: Streams) -> None:
    streams.be(2)
    found: list[int] = []
    for _ in range(3):  # one after another: their numbers may be the same
        thread = threading.Thread(target=lambda: found.extend([meetings.place(0), meetings.place(0)]))
        thread.start()
        thread.join()
    assert found[::2] == found[1::2]
    assert len(set(found)) == 3


def test_a_captured_launch_has_a_pair_of_its_own(meetings: Any, streams: Streams) -> None:
    streams.be(640)
    found = [meetings.place(0)]
    streams.be(640, capturing=True)
    found += [meetings.place(0), meetings.place(0), meetings.place(0, needed=False)]
    streams.be(640)
    assert len(set(found)) == 4
    assert meetings.place(0) == found[0]


def test_no_pair_is_given_twice_when_a_slab_is_full(meetings: Any, streams: Streams) -> None:
    meetings._pairs = 2
    streams.be(640, capturing=True)
    assert meetings.place(0, needed=False) == 0  # the driver would have to be asked
    assert meetings.slabs == []
    found = [meetings.place(0) for _ in range(5)]
    assert len(set(found)) == 5
    assert len(meetings.slabs) == 3
    assert meetings.place(0, needed=False) not in (0, *found)
    assert meetings.place(0, needed=False) == 0


def test_masks_are_reduced_without_a_counter_too(streams: Streams) -> None:
    """In a capture that comes before every other call, a second kernel does what the last CTA would."""
    host = np.random.default_rng(0).random((2, 40, 50)) < 0.05
    mask = standin.asarray(host)
    options: dict[str, Any] = {"bsize": (6, 6), "boffset": (-1, -1), "bstride": (4, 4), "capacity": 170}
    expected = sbnet_cupy.reduce_mask(host, (10, 13), **options)
    for capturing in (True, False, True):
        streams.be(640, capturing)
        found = sbnet_cupy.reduce_mask(mask, (10, 13), **options)
        assert np.array_equal(found.bin_counts.get(), expected.bin_counts)
        assert np.array_equal(found.active_block_indices.get(), expected.active_block_indices)
