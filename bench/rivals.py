"""What a user would write without this library, on the same inputs: advanced indexing, unfolding, pooling.

Padding and index arithmetic stay outside of the timed part, in the rivals' favour.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .cases import Mask, Transfer
from .data import Expected, Inputs, channels_last, crop_image, pad_image, pixel_index

NOT_INSTALLED = "PyTorch not installed"
PADDED = "pads and makes indices outside of the timed part"


@dataclass(frozen=True)
class Contender:
    """One way to do a case: `calls`, one for each set of inputs, and a check of what one round of them returned."""

    name: str
    calls: Sequence[Callable[[], Any]]
    check: Callable[[list[Any]], bool]
    note: str = ""


@dataclass(frozen=True)
class Absent:
    """A way to do a case that cannot be tried here, and why."""

    name: str
    note: str


@functools.cache
def find_torch() -> Any:
    """PyTorch, or None where it is missing, broken, or without CUDA."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch if torch.cuda.is_available() else None


@contextlib.contextmanager
def torch_stream(pointer: int) -> Iterator[None]:
    """Let PyTorch, where there is one, work on the CUDA stream at this address."""
    torch = find_torch()
    if torch is None:
        yield
    else:
        with torch.cuda.stream(torch.cuda.ExternalStream(pointer)):
            yield


def free_torch_memory() -> None:
    """Give PyTorch's unused device memory back."""
    torch = find_torch()
    if torch is not None:
        torch.cuda.empty_cache()


def from_torch(tensor: Any) -> Any:
    """The CuPy array in the memory of a tensor."""
    import cupy

    return cupy.from_dlpack(tensor.detach())


def transfer_rivals(xp: Any, case: Transfer, inputs: Inputs, expected: Expected) -> list[Contender | Absent]:
    """All rivals of a gather or scatter."""
    names = ["PyTorch indexing"] + ["PyTorch unfold + mask"] * (case.op == "gather")
    rivals: list[Contender | Absent] = [array_indexing(xp, case, inputs, expected)]
    if find_torch() is None:
        return rivals + [Absent(name, NOT_INSTALLED) for name in names]
    rivals.append(torch_indexing(case, inputs, expected))
    if case.op == "gather":
        rivals.append(torch_unfold(case, inputs, expected))
    return rivals


def array_indexing(xp: Any, case: Transfer, inputs: Inputs, expected: Expected) -> Contender:
    """Advanced indexing of CuPy: ``x[n, rows, columns]``, read, assigned, or added with ``add.at``."""
    padded = pad_image(xp, inputs.image, case.margins)
    # Rows of the index: one for each set.
    places = [pixel_index(xp, case, blocks.indices) for blocks in inputs.sets]
    name = "CuPy indexing"

    if case.op == "gather":

        def gather(place: Any) -> Any:
            stack = padded[place]
            return xp.ascontiguousarray(stack.transpose(0, 3, 1, 2)) if case.transpose else stack

        calls = [functools.partial(gather, place) for place in places]
        return Contender(name, calls, lambda got: expected.check([channels_last(case, g) for g in got]), PADDED)

    def scatter(place: Any, stack: Any) -> Any:
        if case.op == "add":
            xp.add.at(padded, place, stack)
        else:
            padded[place] = stack
        return padded

    calls = [
        functools.partial(scatter, place, channels_last(case, blocks.stack))
        for place, blocks in zip(places, inputs.sets)
    ]
    return Contender(name, calls, lambda got: expected.check([crop_image(g, case) for g in got]), PADDED)


def torch_indexing(case: Transfer, inputs: Inputs, expected: Expected) -> Contender:
    """Advanced indexing of PyTorch: read, ``index_put_``, or ``index_put_(accumulate=True)``."""
    import cupy

    torch = find_torch()
    padded = torch.from_dlpack(pad_image(cupy, inputs.image, case.margins))
    places = [
        tuple(torch.from_dlpack(cupy.ascontiguousarray(part)) for part in pixel_index(cupy, case, blocks.indices))
        for blocks in inputs.sets
    ]

    if case.op == "gather":

        def gather(place: Any) -> Any:
            stack = padded[place]
            return stack.permute(0, 3, 1, 2).contiguous() if case.transpose else stack

        def check(got: list[Any]) -> bool:
            return expected.check([channels_last(case, from_torch(stack)) for stack in got])

        return Contender("PyTorch indexing", [functools.partial(gather, place) for place in places], check, PADDED)

    def scatter(place: Any, stack: Any) -> Any:
        return padded.index_put_(place, stack, accumulate=case.op == "add")

    calls = [
        functools.partial(scatter, place, torch.from_dlpack(blocks.stack))
        if not case.transpose
        else functools.partial(scatter, place, torch.from_dlpack(blocks.stack).permute(0, 2, 3, 1))
        for place, blocks in zip(places, inputs.sets)
    ]
    return Contender(
        "PyTorch indexing",
        calls,
        lambda got: expected.check([crop_image(from_torch(image), case) for image in got]),
        PADDED,
    )


def torch_unfold(case: Transfer, inputs: Inputs, expected: Expected) -> Contender:
    """``Tensor.unfold`` makes a view of all blocks, channels first; a mask of the grid selects the active ones."""
    import cupy

    torch = find_torch()
    padded = torch.from_dlpack(pad_image(cupy, inputs.image, case.margins))
    windows = padded.unfold(1, case.bsize[0], case.bstride[0]).unfold(2, case.bsize[1], case.bstride[1])
    windows = windows[:, : case.bcount[0], : case.bcount[1]]
    masks = []
    for blocks in inputs.sets:
        mask = torch.zeros((case.shape[0], *case.bcount), dtype=torch.bool, device="cuda")
        mask[tuple(torch.from_dlpack(blocks.indices).long().T)] = True
        masks.append(mask)

    def gather(mask: Any) -> Any:
        return windows[mask]

    return Contender(
        "PyTorch unfold + mask",
        [functools.partial(gather, mask) for mask in masks],
        lambda got: expected.check([from_torch(stack.permute(0, 2, 3, 1)) for stack in got]),
        "pads outside of the timed part; gives channels first; waits for the number of blocks",
    )


def mask_rivals(xp: Any, case: Mask, masks: list[Any], wanted: list[Any]) -> list[Contender | Absent]:
    """All rivals of a mask reduction; `wanted` are the active blocks of each mask."""
    name = "PyTorch max_pool2d + nonzero"
    torch_rival = Absent(name, NOT_INSTALLED) if find_torch() is None else torch_pooling(name, case, masks, wanted)
    return [array_windows(xp, case, masks, wanted), torch_rival]


def array_windows(xp: Any, case: Mask, masks: list[Any], wanted: list[Any]) -> Contender:
    """The maximum over strided windows of a padded mask, and ``argwhere``."""
    count, size, stride = case.bcount, case.bsize, case.bstride
    padded = []
    for mask in masks:
        whole = xp.zeros((case.shape[0], *(c * s + b for c, s, b in zip(count, stride, size))), mask.dtype)
        top, left = -case.boffset[0], -case.boffset[1]
        whole[:, top : top + case.shape[1], left : left + case.shape[2]] = mask
        padded.append(whole)

    def reduce(mask: Any) -> Any:
        image, row, column = mask.strides
        windows = xp.lib.stride_tricks.as_strided(
            mask, (case.shape[0], *count, *size), (image, row * stride[0], column * stride[1], row, column)
        )
        return xp.argwhere(windows.max(axis=(3, 4)) > 0.5)

    return Contender(
        "CuPy windows + argwhere",
        [functools.partial(reduce, mask) for mask in padded],
        lambda got: all(equal_indices(a, b) for a, b in zip(got, wanted, strict=True)),
        "pads outside of the timed part; waits for the number of blocks",
    )


def torch_pooling(name: str, case: Mask, masks: list[Any], wanted: list[Any]) -> Contender:
    """Max pooling with the blocks as windows, and ``nonzero``. Padding of both sides must be the halo."""
    torch = find_torch()
    tensors = [torch.from_dlpack(mask)[:, None] for mask in masks]
    halo = -case.boffset[0], -case.boffset[1]

    def reduce(mask: Any) -> Any:
        pooled = torch.nn.functional.max_pool2d(mask, case.bsize, case.bstride, halo, ceil_mode=True)
        return (pooled[:, 0] > 0.5).nonzero()

    return Contender(
        name,
        [functools.partial(reduce, mask) for mask in tensors],
        lambda got: all(equal_indices(from_torch(a), b) for a, b in zip(got, wanted, strict=True)),
        "waits for the number of blocks",
    )


def equal_indices(a: Any, b: Any) -> bool:
    """Whether two lists of blocks are the same, whatever their integer type."""
    return a.shape == b.shape and bool((a == b).all())
