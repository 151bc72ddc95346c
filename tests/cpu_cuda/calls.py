"""Calls of the ops that take every kernel through its paths, on NumPy arrays or on the stand-in's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import DTYPES, INT32, LAYOUTS, MASK_DTYPES, Array, Case, MaskCase, identical, lay_out, random_bits

import sbnet_cupy
from sbnet_cupy import _device, _instances, _plan, _reference
from sbnet_cupy._affine import Affine
from sbnet_cupy._geometry import BlockGrid
from sbnet_cupy._instances import Instance, channel_lane_counts

from . import KernelFault, Order, device, guarded, recording, standin

#: Few, since each is compiled for every word and order.
BLOCK_SIZES = ((3, 3), (4, 7), (5, 2))

FLOAT32 = np.dtype(np.float32)

#: What a call changes in the host code, as (dotted name, value): smaller bounds, for instance, so that a small
#: case does what a large one would.
Patches = tuple[tuple[str, Any], ...]


#: Small cases are to do what large ones do: to turn in tiles, though they have few channels; to share CTAs, though they
#: have few rows; and to share out the rows of a block.
LIKE_LARGE: Patches = (
    ("sbnet_cupy._plan._GATHER_TILED_CHANNELS", 4),
    ("sbnet_cupy._plan._GATHER_TILED_CHANNELS_NCHW", 4),
    ("sbnet_cupy._plan._SCATTER_TILED_CHANNELS", 4),
    ("sbnet_cupy._plan.LISTED_ROWS", 1),
    ("sbnet_cupy._plan._LEAST_LINES", 6),
)


class Difference(Exception):
    """A kernel's result is not that of NumPy."""


@dataclass(frozen=True)
class Call:
    """One call of an op: `run` makes it on arrays of a namespace, and returns the results."""

    name: str
    run: Callable[[Any], list[Any]]
    nan_payloads: bool = True
    patches: Patches = ()

    def kernels(self) -> list[Instance]:
        """What it would launch."""
        with recording() as found, self.patched():
            self.run(standin)
        return list(found)

    @contextmanager
    def patched(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in LIKE_LARGE + self.patches:
                patch.setattr(name, value)
            yield

    def check(self, order: Order, kernels: Path | None = None) -> None:
        """Raise `KernelFault` or `Difference` unless the kernels compute what NumPy does."""
        expected = self.run(np)
        with device(order, kernels) as xp, self.patched():
            try:
                found = self.run(xp)
            except KernelFault as fault:
                raise KernelFault(f"{self.name}: {fault}") from None
            if any(slab.owner.bytes().any() for slab in counters()):
                raise Difference(f"{self.name}: a counter is not left at zero")
        for number, (ours, theirs) in enumerate(zip(found, expected)):
            with np.errstate(invalid="ignore"):
                agree = identical(ours, theirs, nan_payloads=self.nan_payloads)
            if not agree:
                raise Difference(f"{self.name}: result {number}:\n{_first_difference(ours.get(), theirs)}")


def counters() -> list[Any]:
    """Memory of the counters that kernels find at zero and leave so."""
    from sbnet_cupy import _meetings  # needs CuPy, or its stand-in

    return _meetings.meetings.slabs


def _first_difference(found: Array, expected: Array) -> str:
    if found.shape != expected.shape:
        return f"shape {found.shape} instead of {expected.shape}"
    unequal = np.argwhere((found != expected) & ~((found != found) & (expected != expected)))
    where = tuple(map(int, unequal[0])) if len(unequal) else ()
    return f"{len(unequal)} elements differ; {where}: {found[where]} instead of {expected[where]}"


def _close(xp: Any) -> Any:
    """The namespace, with arrays that touch a guard page whatever their size: users' arrays may begin anywhere."""
    if xp is not standin:
        return xp
    return SimpleNamespace(empty=functools.partial(xp.empty, alignment=1), asarray=xp.asarray)


def gather_call(case: Case, name: str, patches: Patches = ()) -> Call:
    def run(xp: Any) -> list[Any]:
        x, blocks, bin_counts, indices = case.arrays(_close(xp))
        blocks[...] = xp.asarray(case.stack.transpose(0, 3, 1, 2) if case.transpose else case.stack)
        with guarded(xp, (x, bin_counts, indices), blocks):
            sbnet_cupy.sparse_gather(x, bin_counts, indices, **case.grid, transpose=case.transpose, out=blocks)
        return [blocks]

    return Call(f"gather-{name}", run, patches=patches)


def scatter_call(case: Case, name: str, add: bool, patches: Patches = ()) -> Call:
    def run(xp: Any) -> list[Any]:
        x, blocks, bin_counts, indices = case.arrays(_close(xp))
        with guarded(xp, (blocks, bin_counts, indices), x):
            sbnet_cupy.sparse_scatter_var(
                blocks, bin_counts, indices, x, **case.grid, add=add, atomic=add, transpose=case.transpose
            )
        return [x]

    return Call(f"{'add' if add else 'scatter'}-{name}", run, nan_payloads=not add, patches=patches)


def scatter_copy_call(case: Case, name: str, out_layout: str | None = None) -> Call:
    """Scatter that leaves the image as it is: into a new one, or into memory that is given."""

    def run(xp: Any) -> list[Any]:
        x, blocks, bin_counts, indices = case.arrays(_close(xp))
        out = None if out_layout is None else lay_out(np.zeros_like(case.x), out_layout, _close(xp))
        with guarded(xp, (x, blocks, bin_counts, indices), out):
            y = sbnet_cupy.sparse_scatter(
                blocks, bin_counts, indices, x, **case.grid, transpose=case.transpose, out=out
            )
        order = np.argsort([-abs(s) for s in y.strides], kind="stable")
        return [y, xp.asarray(order)]

    return Call(f"scatter-copy-{name}", run)


def activate_call(case: Case, name: str, source: str | None = None, image: bool = False, patches: Patches = ()) -> Call:
    """The element-wise step on a stack on the case's grid, or on its image; from `source` numbers, or else in place."""

    def run(xp: Any) -> list[Any]:
        x, blocks, bin_counts, indices = case.arrays(_close(xp))
        channels, wide = case.x.shape[3], np.float64 if case.x.dtype.itemsize == 8 else np.float32
        rng = np.random.default_rng(channels)
        scale, shift = (_values(rng, (channels,), np.dtype(wide)) for _ in range(2))
        affine = Affine(*(None if channels == n else xp.asarray(a) for n, a in ((4, scale), (3, shift))), channels != 2)
        stack = x if image else blocks
        target = stack if source is None else lay_out(case.x if image else case.stack, "nhwc", xp)
        stack = stack if source in (None, case.x.dtype.name) else stack.astype(source)
        with guarded(xp, (bin_counts, indices), target):
            if image and xp is np:
                target[...] = _reference.activate(stack, affine, target.dtype)
            elif image:
                _device.activation().activate_image(stack, target, affine)
            elif xp is np:
                grid = BlockGrid(case.bsize, case.boffset, case.bstride)
                _reference.activate_blocks(stack, case.count, case.indices, grid, case.x.shape, affine, target)
            else:
                grid = BlockGrid(case.bsize, case.boffset, case.bstride)
                _device.activation().activate(stack, target, affine, bin_counts, indices, grid, case.x.shape)
        return [target]

    return Call(f"activate-{name}", run, nan_payloads=False, patches=patches)


def affine_gather_call(case: Case, name: str) -> Call:
    def run(xp: Any) -> list[Any]:
        x, blocks, bin_counts, indices = case.arrays(_close(xp))
        rng = np.random.default_rng(0)
        wide = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
        scale, shift = (xp.asarray(_values(rng, (case.x.shape[3],), wide)) for _ in range(2))
        how: dict[str, Any] = {**case.grid, "transpose": case.transpose, "activation": "relu"}
        with guarded(xp, (x, bin_counts, indices, scale, shift), blocks):
            sbnet_cupy.sparse_gather(x, bin_counts, indices, **how, scale=scale, shift=shift, out=blocks)
        return [blocks]

    return Call(f"affine-gather-{name}", run, nan_payloads=False)


def mask_call(case: MaskCase, name: str, patches: Patches = ()) -> Call:
    def run(xp: Any) -> list[Any]:
        mask = case.array(_close(xp))
        with guarded(xp, (mask,)):
            return list(sbnet_cupy.reduce_mask(mask, case.bcount, **case.arguments))

    return Call(f"mask-{name}", run, patches=patches)


def mask_call_into(case: MaskCase, name: str) -> Call:
    """Into memory that is given."""

    def run(xp: Any) -> list[Any]:
        mask = case.array(_close(xp))
        rows = case.mask.shape[0] * case.bcount[0] * case.bcount[1] if case.capacity is None else case.capacity
        out = sbnet_cupy.BlockIndices(xp.full((rows, 3), 7, np.int32), xp.full(1, 7, np.int32))
        with guarded(xp, (mask,)):
            return list(sbnet_cupy.reduce_mask(mask, case.bcount, **case.arguments, out=out))

    return Call(f"mask-into-{name}", run)


def mask_calls_in_turn(cases: list[MaskCase], name: str) -> Call:
    """Calls of which the later find what the earlier leave behind."""
    single = [mask_call(case, name) for case in cases]
    return Call(f"mask-{name}", lambda xp: [array for call in single for array in call.run(xp)])


def random_case(
    seed: int,
    dtype: np.dtype[Any],
    channels: int,
    *,
    transpose: bool = False,
    layouts: tuple[str, str] = ("nhwc", "nhwc"),
    bsize: tuple[int, int] | None = None,
    rows: int = 45,
    size: tuple[int, int] = (10, 13),
    bstride: tuple[int, int] | None = None,
    overlaps: bool | None = None,
    rows_are: str = "random",
) -> Case:
    """A small batch with blocks over every edge, neighbours, equal blocks, hostile indices and rows out of use.

    Or if its rows are "ascending", about half of all blocks of the grid, as they come from ``reduce_mask``; or those
    "shuffled". Unless told, blocks overlap or do not.
    """
    rng = np.random.default_rng(seed)
    bsize = bsize or BLOCK_SIZES[seed % len(BLOCK_SIZES)]
    bstride = bstride or _draw_stride(rng, bsize, overlaps)
    boffset = (int(rng.integers(-bsize[0], 3)), int(rng.integers(-bsize[1], 3)))
    last = [(extent - offset) // stride + 1 for extent, offset, stride in zip(size, boffset, bstride)]
    indices = rng.integers((-1, -1, -1), (3, last[0] + 1, last[1] + 1), (rows, 3)).astype(np.int32)
    if rows_are != "random":
        indices = np.argwhere(rng.random((2, last[0] + 1, last[1] + 1)) < 0.6).astype(np.int32)
        indices = rng.permutation(indices) if rows_are == "shuffled" else indices
        rows = len(indices)
    elif rows:
        indices[rng.integers(0, rows, 3)] = indices[rng.integers(0, rows, 3)]
        hostile, extremes = rng.permutation(rows)[:4], [INT32.min, -(2**30), 2**30, INT32.max]
        indices[hostile] = rng.choice([*extremes, 0], (4, 3))
        indices[hostile[2]] = 1, rng.choice(extremes), 0  # and one of the numbers alone
        indices[hostile[3]] = 1, 0, rng.choice(extremes)
        # The first row out of use, where there are such; else the last in use.
        indices[-3 if seed % 3 == 0 else -1] = [1, last[0] // 2, last[1] // 2]
    return Case(
        x=_values(rng, (2, *size, channels), dtype),
        stack=_values(rng, (rows, *bsize, channels), dtype),
        indices=indices,
        count=(rows - 3, rows, INT32.max)[seed % 3],
        bsize=bsize,
        boffset=boffset,
        bstride=bstride,
        transpose=transpose,
        layouts=layouts,
    )


def _draw_stride(rng: np.random.Generator, bsize: tuple[int, int], overlaps: bool | None) -> tuple[int, int]:
    height, width = bsize
    if overlaps is None:
        return int(rng.integers(max(1, height // 2), height + 2)), int(rng.integers(1, width + 2))
    if overlaps:  # down or across, or both
        return int(rng.integers(max(1, height // 2), height + 1)), int(rng.integers(1, width))
    return int(rng.integers(height, height + 2)), int(rng.integers(width, width + 2))


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Any bits; but most floating numbers of one magnitude, so that the order of a sum shows."""
    bits = random_bits(rng, shape, dtype)
    if dtype.kind not in "fcV":
        return bits
    return np.where(rng.random(shape) < 0.2, bits, rng.standard_normal(shape).astype(dtype))


def random_mask(
    seed: int,
    dtype: np.dtype[Any],
    avgpool: bool,
    *,
    bsize: tuple[int, int] = (5, 4),
    size: tuple[int, int] = (13, 40),
    bcount: tuple[int, int] = (6, 14),
    capacity: int | None = None,
    layout: str = "nhwc",
    bstride: tuple[int, int] | None = None,
    density: float = 0.05,
) -> MaskCase:
    """A mask whose sums are exact in any order; some pixels and some averages meet `tol` exactly."""
    rng = np.random.default_rng(seed)
    eighths = np.where(rng.random((2, *size)) < density, rng.integers(0, 9, (2, *size)), 0)
    mask = eighths.astype(dtype)
    if dtype.kind in "iu":  # numbers of all magnitudes
        mask[eighths > 6] = np.iinfo(dtype).max
        mask[eighths == 1] = np.iinfo(dtype).min
    elif dtype.kind != "b":
        mask /= dtype.type(8)
    tol = {"b": 0.0, "i": 3.0, "u": 3.0}.get(dtype.kind, 0.375)
    return MaskCase(
        mask=mask,
        bcount=bcount,
        bsize=bsize,
        boffset=(int(rng.integers(-bsize[0] - 1, 2)), int(rng.integers(-bsize[1] - 1, 2))),
        bstride=bstride or (int(rng.integers(2, bsize[0] + 2)), int(rng.integers(2, bsize[1] + 2))),
        tol=tol / (bsize[0] * bsize[1]) if avgpool else tol,
        avgpool=avgpool,
        capacity=capacity,
        layout=layout,
    )


#: How a case is laid out: transpose, layouts of image and stack, channels, block size (or any).
_Walk = tuple[bool, tuple[str, str], int, tuple[int, int] | None]

#: Of each element size, the dtype that goes all ways. For copies, others of the size are the same.
_SIZES = ("uint8", "float16", "float32", "float64", "complex128")

#: Channels that so many lanes divide, but no more; none of those, and blocks whose pixels fill 16 bytes or do not.
_CHANNELS = {1: 9, 2: 10, 4: 12, 8: 8, 16: 16}
_EVEN, _ODD = (4, 4), (3, 3)


def _walks(itemsize: int) -> tuple[list[_Walk], list[_Walk]]:
    """All ways in which kernels walk over elements of a size: word by word, and through tiles that turn."""
    straight: list[_Walk] = [(False, ("nhwc", "nhwc"), channels, None) for channels in (1, 2, 3, 4, 8, 16)]
    straight += [(False, ("reversed", "nhwc"), channels, None) for channels in (2, 3, 4, 8, 16)]
    straight += [(True, ("nchw", "nhwc"), 3, None), (False, ("sliced", "nhwc"), 8, None)]
    straight += [(False, ("nhwc", "reversed"), 1, None), (True, ("strided", "misaligned"), 2, None)]
    turned: list[_Walk] = []
    for lanes in channel_lane_counts(itemsize):
        channels = _CHANNELS[lanes]
        turned.append((False, ("nchw", "nhwc"), channels, None))
        turned.append((True, ("nhwc", "nhwc"), channels, _EVEN))
        # Groups of pixels that reach into the next channel; and a stack with gaps, which is moved pixel by pixel.
        turned += [(True, ("nhwc", layout), channels, _ODD) for layout in ("nhwc", "sliced")]
    return straight, turned


def walk_calls() -> list[Call]:
    """Every kernel of gather and scatter with every element size, order and word; and every dtype a few times."""
    calls = []
    for number, dtype in enumerate(DTYPES):
        straight, turned = _walks(dtype.itemsize)
        some_tile = number % len(turned)
        for walk, (transpose, layouts, channels, bsize) in enumerate(straight + turned):
            sampled = walk % 8 == number % 8
            # Sums take long to compile. Signed integers are added as unsigned ones, and of tiles, a few will do.
            tile = walk - len(straight)
            thorough = dtype.kind not in "bi" and (tile <= 0 or tile == some_tile)
            for overlaps in (False, True):
                case = random_case(
                    100 * number + walk,
                    dtype,
                    channels,
                    transpose=transpose,
                    layouts=layouts,
                    bsize=bsize,
                    rows=30,
                    overlaps=overlaps,
                )
                name = f"{dtype}-{walk}-{'overlapping' if overlaps else 'apart'}"
                if dtype.name in _SIZES or sampled:
                    calls += [scatter_call(case, name, add=False)]
                    if overlaps == bool(walk % 2):
                        calls += [gather_call(case, name)]
                if thorough or (sampled and dtype.kind != "b"):
                    calls.append(scatter_call(case, name, add=True))
    return calls


def _count_in_64_bits(*arguments: Any) -> _plan.TransferPlan:
    """The plan, as if the block had more than 2^31 words."""
    plan = _plan.plan_transfer(*arguments)
    return replace(plan, walk=plan.walk._replace(wide=True))


#: One CTA for all columns or tiles of a row, so that its threads take several.
FEW_CTAS: Patches = (("sbnet_cupy._plan._ENOUGH_CTAS", 1), ("sbnet_cupy._plan._MOST_CTAS", 1))
BY_MAP: Patches = (("sbnet_cupy._transfer.LISTED_ROWS", 0), ("sbnet_cupy._transfer.LISTED_OVERLAPS", 0))
BY_LIST: Patches = (("sbnet_cupy._plan.LISTED_ROWS", 1024),)
WIDE: Patches = (("sbnet_cupy._transfer.plan_transfer", _count_in_64_bits),)


def transfer_calls(case: Case, name: str, patches: Patches = ()) -> list[Call]:
    return [
        gather_call(case, name, patches),
        scatter_call(case, name, add=False, patches=patches),
        scatter_call(case, name, add=True, patches=patches),
    ]


def overlap_calls(add: bool, transpose: bool, bsize: tuple[int, int] = (4, 7)) -> list[Call]:
    """Scatter where blocks share no pixel but those of equal blocks, few, or many; and in the grid's order or not.

    "near" blocks have all 3 x 3 zones, "half" ones no zone in the middle, and "far" ones reach beyond their neighbours.
    """
    strides = {"apart": (6, 8), "beside": bsize, "near": (3, 5), "near-down": (3, 7), "half": (2, 4), "far": (1, 2)}
    calls = []
    for seed, (name, bstride) in enumerate(strides.items()):
        for rows_are in ("random", "ascending", "shuffled"):
            case = random_case(
                seed,
                FLOAT32,
                9 if transpose else 3,
                transpose=transpose,
                bsize=bsize,
                bstride=bstride,
                rows_are=rows_are,
            )
            how = f"{name}-{rows_are}-{'tiled' if transpose else 'direct'}"
            calls.append(scatter_call(case, f"{how}-mapped", add=add, patches=BY_MAP))
            calls.append(scatter_call(case, f"{how}-listed", add=add, patches=BY_LIST))
    return calls


#: Of each way to walk: transpose, and the layouts of image and stack.
_ORDERS: dict[str, tuple[bool, tuple[str, str]]] = {
    "direct": (False, ("nhwc", "nhwc")),
    "columns": (True, ("nchw", "nhwc")),
    "tiled": (True, ("nhwc", "nhwc")),
    "back": (False, ("nchw", "nhwc")),
}


def large_cases(order: str, dtype: np.dtype[Any] = FLOAT32) -> dict[str, tuple[Case, Patches]]:
    """What takes more than one of something: CTAs, columns, lines, tiles, parts of a block, or blocks in a tile."""
    transpose, layouts = _ORDERS[order]
    make = functools.partial(random_case, dtype=dtype, transpose=transpose, layouts=layouts)
    found: dict[str, tuple[Case, Patches]] = {}
    for seed, overlaps in ((1, False), (2, True)):
        how = "overlapping" if overlaps else "apart"
        # Several CTAs along a block, whose lines they share; the same with one CTA. The last tile has few channels.
        several = make(seed, channels=70, bsize=(8, 8), size=(20, 23), overlaps=overlaps)
        found[f"several-ctas-{how}"] = several, ()
        found[f"few-ctas-{how}"] = several, FEW_CTAS
        # Several rows in a CTA with threads to spare, and several blocks in a tile, but fewer in the last.
        found[f"several-rows-{how}"] = make(seed, channels=5, bsize=(6, 12), size=(20, 40), overlaps=overlaps), ()
        # More pixels than a tile holds, and lines that CTAs do not share evenly.
        large = make(seed, channels=36, bsize=(23, 20), rows=25, size=(60, 50), overlaps=overlaps)
        found[f"parts-{how}"] = large, ()
        found[f"parts-few-ctas-{how}"] = large, FEW_CTAS
        odd = make(seed, channels=8, bsize=(19, 19), rows=25, size=(50, 50), overlaps=overlaps)
        found[f"odd-parts-{how}"] = odd, ()
        found[f"wide-{how}"] = make(seed, channels=9, bsize=(3, 3), overlaps=overlaps), WIDE
    zones = make(5, channels=70, bsize=(8, 8), size=(22, 23), bstride=(5, 6), rows_are="ascending")
    found["zones-overlapping"] = zones, ()
    found["zones-few-ctas-overlapping"] = zones, FEW_CTAS
    for name, bstride in (("near", (3, 5)), ("far", (1, 2))):
        ordered = make(4, channels=5, bsize=(4, 7), bstride=bstride, rows_are="shuffled")
        found[f"ends-{name}-overlapping"] = _at_the_ends(ordered), ()
    return found


def _at_the_ends(case: Case) -> Case:
    """Half of a case's blocks, with indices such that none can follow them down, and none come before them across."""
    _, down, across = case.indices.max(axis=0) // 2
    kept = (case.indices[:, 1] <= down) & (case.indices[:, 2] >= across)
    shift = INT32.max - int(down), INT32.min - int(across)
    boffset = tuple(offset - k * stride for offset, k, stride in zip(case.boffset, shift, case.bstride))
    indices = (case.indices[kept].astype(np.int64) + np.array([0, *shift])).astype(np.int32)
    return replace(case, indices=indices, stack=case.stack[kept], boffset=boffset)


def twin_cases(order: str) -> dict[str, tuple[Case, Patches]]:
    """Equal blocks, found in the list of rows or in the map, alone in a CTA or many; some of their rows out of use."""
    transpose, layouts = _ORDERS[order]
    make = functools.partial(random_case, dtype=FLOAT32, transpose=transpose, layouts=layouts)
    apart: dict[str, Any] = {"bsize": (14, 13), "bstride": (14, 13), "size": (20, 30)}
    small: dict[str, Any] = {"bsize": (2, 2), "size": (5, 6), "channels": 4, "rows": 600}
    return {
        "twins-by-list-apart": (make(0, channels=70, rows=60, **apart), ()),
        "twins-by-map-apart": (make(0, channels=70, rows=60, **apart), BY_MAP),
        "twins-by-long-list-apart": (make(3, channels=44, rows=300, **apart), ()),
        "many-twins-apart": (make(9, bstride=(2, 2), **small), ()),
        "many-twins-overlapping": (make(9, bstride=(1, 2), **small), ()),
        "long-list-overlapping": (make(3, channels=5, rows=512, bsize=(4, 7), bstride=(3, 4), size=(33, 70)), ()),
    }


def with_lookups(name: str, patches: Patches) -> dict[str, Patches]:
    """How a large case of blocks that overlap finds other rows: by the map and, where the list is short, without."""
    if not name.endswith("overlapping"):
        return {name: patches}
    return {f"{name}-mapped": (*patches, *BY_MAP), f"{name}-listed": (*patches, *BY_LIST)}


def large_calls() -> list[Call]:
    """Beyond one CTA, tile or row; overlaps and repeated blocks of all kinds; nothing at all."""
    calls = []
    for order in _ORDERS:
        for name, (case, patches) in {**large_cases(order), **twin_cases(order)}.items():
            for way, changes in with_lookups(name, patches).items():
                calls += transfer_calls(case, f"{way}-{order}", changes)
    for name, (case, patches) in large_cases("tiled", np.dtype(np.float16)).items():
        calls.append(gather_call(case, f"{name}-tiled-half", patches))
    for transpose in (False, True):
        calls += overlap_calls(False, transpose) + overlap_calls(True, transpose)
    calls += transfer_calls(random_case(9, FLOAT32, 1, bsize=(1, 1), rows=40), "many-rows-in-a-cta")
    for name, part in (("no-rows", {"rows": 0}), ("no-channels", {"channels": 0}), ("no-pixels", {"size": (0, 5)})):
        arguments: dict[str, Any] = {"channels": 4, **part}
        calls += transfer_calls(random_case(10, FLOAT32, **arguments), name)
    return calls


def activate_calls() -> list[Call]:
    """Every number of lanes of every dtype, in place and to a half type; many words and pixels for a CTA; images."""
    calls = []
    for number, dtype in enumerate(dtype for dtype in DTYPES if dtype.name in _instances.ACTIVATED):
        planes = random_case(number, dtype, 3, transpose=True, layouts=("nchw", "nhwc"))
        calls.append(affine_gather_call(planes, f"{dtype}-columns"))
        for channels in (16, 12, 6, 4, 3, 2):
            case = random_case(10 * number + channels, dtype, channels)
            calls.append(affine_gather_call(case, f"{dtype}-{channels}"))
            calls.append(activate_call(case, f"{dtype}-{channels}"))
            if dtype.itemsize == 2:
                calls.append(activate_call(case, f"{dtype}-{channels}-from-float32", source="float32"))
    float32 = np.dtype(np.float32)
    layouts: dict[str, dict[str, Any]] = {
        "strided": {"layouts": ("nhwc", "strided")},
        "reversed": {"layouts": ("nhwc", "reversed")},
        "misaligned": {"layouts": ("nhwc", "misaligned")},
        "channels-first": {"layouts": ("nhwc", "nchw")},
        "many-words": {"channels": 1100, "rows": 8, "bsize": (3, 3)},
        "many-pixels": {"bsize": (17, 19), "rows": 12, "size": (40, 41)},
        "far-apart": {"bsize": (3, 3), "bstride": (7, 9)},
        "no-rows": {"rows": 0},
        "no-channels": {"channels": 0},
        "no-pixels": {"size": (0, 5)},
    }
    for seed, (name, options) in enumerate(layouts.items()):
        case = random_case(seed, float32, **{"channels": 8, **options})
        calls.append(activate_call(case, name))
        calls.append(activate_call(case, f"{name}-image", image=True))
    pixels = random_case(5, float32, 40, bsize=(17, 19), rows=5, size=(40, 41))
    calls.append(activate_call(pixels, "one-cta-a-row", patches=(("sbnet_cupy._activate._ENOUGH_CTAS", 1),)))
    calls.append(activate_call(pixels, "wide", patches=(("sbnet_cupy._activate._WIDE_PIXELS", 1),)))
    case = random_case(6, float32, 3, layouts=("nhwc", "strided"))
    calls.append(activate_call(case, "from-strided", source="float32"))
    half = random_case(3, np.dtype(np.float16), 8)
    calls.append(activate_call(half, "image-from-float32", source="float32", image=True))
    for transpose in (False, True):
        case = random_case(4, np.dtype(np.float16), 8, transpose=transpose)
        calls.append(affine_gather_call(case, "transposed" if transpose else "direct"))
    return calls


def copy_calls() -> list[Call]:
    """Copies of images in every layout: of the same form as the copy, or of another; and of nothing."""
    calls = []
    for seed, layout in enumerate(LAYOUTS):
        case = random_case(seed, FLOAT32, 4, layouts=(layout, "nhwc"))
        for out_layout in (None, *LAYOUTS):
            calls.append(scatter_copy_call(case, f"{layout}-to-{out_layout or 'new'}", out_layout))
    case = random_case(7, FLOAT32, 4, size=(0, 5))
    return calls + [scatter_copy_call(case, f"nothing-{out_layout}", out_layout) for out_layout in (None, "nhwc")]


def _host(**numbers: int) -> Patches:
    return tuple((f"sbnet_cupy._pooling.{name}", number) for name, number in numbers.items())


#: Bounds of the host code that make few words take the ways of many.
COMPACTIONS = {
    "one-tile": _host(_FUSED_WORDS=0, _FEW_TILE=1000),
    "few-words": _host(_FUSED_WORDS=0),
    "more-words": _host(_FUSED_WORDS=0, _FEW_WORDS=0),
    "counted": _host(_FUSED_WORDS=0, _MANY_WORDS=0),
    "counted-one-tile": _host(_FUSED_WORDS=0, _MANY_WORDS=0, _MOST_TILES=1),
    "counted-tiles": _host(_FUSED_WORDS=0, _MANY_WORDS=0, _MOST_TILES=3),
    "apart": _host(_FUSED_WORDS=0, _MANY_WORDS=0, _SMALL_SCRATCH=0),
    "fused": _host(_FUSED_WORDS=10**6),
}


def mask_calls() -> list[Call]:
    """Every kind of pooling on every dtype, wide strips, and compaction in one tile and in several."""
    calls = []
    for number, dtype in enumerate(MASK_DTYPES):
        for avgpool in (False, True):
            pooling, capacity = "avg" if avgpool else "max", None if number % 2 else 200
            case = random_mask(number, dtype, avgpool, capacity=capacity, bstride=(4, 3))
            calls.append(mask_call(case, f"{dtype}-{pooling}"))
            case = random_mask(number, dtype, avgpool, capacity=capacity, size=(13, 37))  # single pixels
            calls.append(mask_call(case, f"{dtype}-{pooling}-odd"))
        if dtype.kind in "iu":  # sums beyond the range of the dtype
            case = replace(random_mask(number, dtype, True, density=0.5), tol=np.iinfo(dtype).max / 8.0)
            calls.append(mask_call(case, f"{dtype}-avg-high"))
    uint8 = np.dtype(np.uint8)
    for layout in ("sliced", "reversed", "strided", "misaligned"):
        calls.append(mask_call(random_mask(1, uint8, False, layout=layout), layout))
    shapes: dict[str, dict[str, Any]] = {
        "wide-blocks": {"bsize": (3, 300), "bstride": (3, 100), "size": (7, 700), "bcount": (3, 6)},
        "wide-gaps": {"bsize": (2, 260), "bstride": (4, 300), "size": (7, 700), "bcount": (2, 4)},
        "narrow-gaps": {"bsize": (3, 5), "bstride": (4, 27), "size": (13, 320), "bcount": (4, 13), "density": 0.2},
        "several-row-threads": {
            "bsize": (17, 4),
            "bstride": (13, 3),
            "size": (40, 72),
            "bcount": (4, 25),
            "density": 0.01,
        },
        "several-strips": {"size": (7, 704), "bcount": (2, 400), "bstride": (3, 2), "density": 0.01},
        "tall": {"bsize": (300, 2), "size": (310, 40), "bcount": (2, 14), "density": 0.002},
        "no-blocks": {"bcount": (0, 3)},
        "none-active": {"density": 0.0},
        "all-active": {"density": 1.0},
    }
    few_ctas = _host(_ENOUGH_CTAS=1)
    for name, shape in shapes.items():
        for avgpool in (False, True):
            case, pooling = random_mask(2, uint8, avgpool, **shape), "avg" if avgpool else "max"
            calls.append(mask_call(case, f"{name}-{pooling}"))
            if name in ("several-strips", "wide-blocks"):
                calls.append(mask_call(case, f"{name}-few-ctas-{pooling}", few_ctas))
    pixels: dict[str, Any] = {"bsize": (1, 1), "bstride": (1, 1), "size": (48, 100), "density": 0.3}
    # One tile for all words; a few; and some that a kernel of its own counts.
    for name, patches in COMPACTIONS.items():
        for capacity in (None, 0, 100, 12000):
            case = random_mask(3, uint8, False, **pixels, bcount=(50, 83), capacity=capacity)
            calls.append(mask_call(case, f"compact-{name}-capacity-{capacity}", patches))
    for capacity in (None, 0, 100, 12000):
        case = random_mask(3, uint8, False, **pixels, bcount=(50, 83), capacity=capacity)
        calls.append(mask_call_into(case, f"capacity-{capacity}"))
    calls.append(mask_call_into(random_mask(3, uint8, False, bcount=(0, 3)), "no-blocks"))
    for avgpool in (False, True):  # blocks without a pixel are active
        case = replace(
            random_mask(4, uint8, avgpool, bcount=(3, 71), bstride=(3, 2), size=(9, 104)), tol=-1.0, capacity=500
        )
        calls.append(mask_call(case, f"negative-{'avg' if avgpool else 'max'}"))
    few: dict[str, Any] = {
        "bsize": (4, 30),
        "bstride": (3, 30),
        "size": (13, 904),
        "bcount": (5, 30),
    }  # blocks of a word
    calls.append(mask_calls_in_turn([random_mask(seed, uint8, False, **few) for seed in range(3)], "fused-in-turn"))
    return calls
