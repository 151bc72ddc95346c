"""The demonstration: a chain of sparse bottlenecks on a photograph, checked against the dense network and timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._clock import time_captured
from ._conv_geometry import Pair
from ._demo_network import BOTTLENECKS, Blocks, Network
from ._reduce_mask import block_indices

Array = np.ndarray[Any, Any]

#: Of 8, 12, 16 and 24 pixels, 8 convolves the fewest pixels of the default picture, halos included: 37 %, and
#: 16 convolves 57 %. Its galaxies are small.
DEFAULT_BSIZE = 8
#: 0.4 takes in 26 % more blocks, many of them noise. The faint rims that 0.5 cuts off lie in active blocks all the
#: same, because these reach BOTTLENECKS pixels beyond the mask.
DEFAULT_TOL = 0.5
#: Timed runs of each network in NumPy, after one to warm up, where they take no longer together than so many seconds.
RUNS, ENOUGH_SECONDS = 3, 12.0
#: Replays of each network's CUDA graph.
REPLAYS = 25
#: Channel weights of brightness, (R + 2 G + B) / 4.
BRIGHTNESS = np.array([1, 2, 1])


@dataclass(frozen=True)
class Clock:
    """Median seconds of both networks, and how they were measured."""

    dense_seconds: float
    sparse_seconds: float
    method: str


@dataclass(frozen=True)
class Outcome:
    """What one run of the demonstration found. Arrays are on the host."""

    picture: Array  # uint8 [H, W, 3]
    mask: Array  # bool [H, W]
    active: Array  # bool, one element per block
    dense: Array  # float32 [H, W, CHANNELS]
    sparse: Array  # the same
    certain: Array  # bool [H, W]: where the sparse network has to equal the dense one
    tile: Pair
    clock: Clock
    differing_pixels: int
    largest_difference: float

    @property
    def active_blocks(self) -> int:
        return int(np.count_nonzero(self.active))

    @property
    def convolved_pixels(self) -> int:
        """Pixels of the blocks that each bottleneck gathers, halos included."""
        return self.active_blocks * (self.tile[0] + 2) * (self.tile[1] + 2)


def run(picture: Array, bsize: int, tol: float, xp: Any) -> Outcome:
    """Run the network both ways, time both, and compare.

    A pixel of the result depends on those of the stem's result up to BOTTLENECKS pixels away. A tile is active if the
    mask is set in it or so near to it; so the features of masked pixels are those of the dense network. In other pixels
    of active tiles, they are those of a dense network that drops what each layer computes in inactive tiles.

    Parameters
    ----------
    picture : ndarray, shape (H, W, 3), uint8
        Picture on the host.
    bsize : int
        Height and width of a tile in pixels; cut to the picture's size where it is larger.
    tol : float
        How far a pixel's brightness has to be from the median to be in the mask, as a fraction of full brightness.
    xp : module
        ``numpy`` or ``cupy``: where the work is done.
    """
    height, width = picture.shape[:2]
    tile = (min(bsize, height), min(bsize, width))
    mask = content_mask(picture, tol)
    x, device_mask = xp.asarray(picture[np.newaxis], np.float32), xp.asarray(mask[np.newaxis])
    network = Network.on(xp)
    blocks = Blocks.of(network, x.shape, tile)
    # With a capacity, the sparse network does not wait for the device, and can be captured.
    capacity = int(block_indices(device_mask, blocks.reach).bin_counts[0])
    (dense, (sparse, _)), clock = time_both(
        [lambda: network.dense(x), lambda: network.sparse(x, device_mask, blocks, capacity)], xp
    )
    active = active_tiles(mask, tile)
    pixels = tile_pixels(active, tile, mask.shape)
    certain = ~near(~pixels, BOTTLENECKS)
    masked = to_host(network.masked(x, xp.asarray(pixels[:, :, np.newaxis])))[0]
    dense, sparse = to_host(dense)[0], to_host(sparse)[0]
    difference = np.abs(sparse - np.where(certain[:, :, np.newaxis], dense, masked)).max(axis=2)
    return Outcome(
        picture=picture,
        mask=mask,
        active=active,
        dense=dense,
        sparse=sparse,
        certain=certain,
        tile=tile,
        clock=clock,
        differing_pixels=int(np.count_nonzero(difference != 0)),
        largest_difference=float(difference.max()),
    )


def content_mask(picture: Array, tol: float) -> Array:
    """Whether each pixel's brightness is further than `tol` from the picture's median: bool ``[H, W]``."""
    brightness = picture @ BRIGHTNESS
    distance: Array = np.abs(brightness - np.median(brightness))
    mask: Array = np.greater(distance, tol * 255 * BRIGHTNESS.sum())
    return mask


def active_tiles(mask: Array, tile: Pair) -> Array:
    """Which tiles have a pixel of the mask in them or within BOTTLENECKS pixels: NumPy, and none of the ops."""
    height, width = mask.shape
    rows, columns = -(-height // tile[0]), -(-width // tile[1])
    grown = np.pad(mask, ((0, rows * tile[0] - height), (0, columns * tile[1] - width)))
    tiles = near(grown, BOTTLENECKS).reshape(rows, tile[0], columns, tile[1])
    active: Array = np.any(tiles, axis=(1, 3))
    return active


def tile_pixels(tiles: Array, tile: Pair, size: tuple[int, ...]) -> Array:
    """`tiles` for each pixel of a picture of that size."""
    return tiles.repeat(tile[0], axis=0).repeat(tile[1], axis=1)[: size[0], : size[1]]


def near(flags: Array, distance: int) -> Array:
    """Whether a flag [H, W] is set within so many rows and columns of each pixel."""
    found: Array = flags
    for axis in (0, 1):
        padding = [(distance, distance) if a == axis else (0, 0) for a in (0, 1)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(found, padding), 2 * distance + 1, axis=axis)
        found = np.any(windows, axis=-1)
    return found


def time_both(networks: Sequence[Callable[[], Any]], xp: Any) -> tuple[list[Any], Clock]:
    """Results of the dense and of the sparse network, and their times: in CUDA graphs, or by the wall clock."""
    if xp is np:
        return time_in_turn(networks)
    results, (dense, sparse) = time_captured(xp, networks, rounds=1, repeats=REPLAYS)
    return results, Clock(dense, sparse, f"CUDA events, median of {REPLAYS} replays of CUDA graphs in turn")


def time_in_turn(works: Sequence[Callable[[], Any]]) -> tuple[list[Any], Clock]:
    """The same by the wall clock. They take turns, so that whatever else the machine does slows both alike."""
    seconds: list[list[float]] = []
    while not seconds or (len(seconds) <= RUNS and sum(map(sum, seconds)) < ENOUGH_SECONDS):
        results, turn = [], []
        for work in works:
            start = time.perf_counter()
            results.append(work())
            turn.append(time.perf_counter() - start)
        seconds.append(turn)
    timed = seconds[1:] or seconds
    dense, sparse = (statistics.median(samples) for samples in zip(*timed))
    runs = "one run of each" if len(timed) == 1 else f"medians of {len(timed)} runs in turn"
    return results, Clock(dense, sparse, f"wall time, {runs}{'' if timed is seconds else ', after a warm-up'}")


def to_host(array: Any) -> Array:
    """`array` as a NumPy array."""
    host: Array = array if isinstance(array, np.ndarray) else array.get()
    return host


def choose_backend() -> tuple[Any, str]:
    """CuPy where it has a usable device, else NumPy, and a line that says which and why."""
    from ._jit import why_unavailable

    reason = why_unavailable()
    if reason:
        return np, f"NumPy {np.__version__} ({reason.splitlines()[0]})"
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    return cupy, f"CuPy {cupy.__version__} on {name}"
