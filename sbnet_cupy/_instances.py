"""Names of the kernels' template instantiations, and which of them exist before anybody asks.

Nothing here knows CuPy: tests compile the same instantiations on machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

#: Square block sizes that are compiled and checked ahead: those that the original SBNet was built for.
SIZE_TABLE = (*range(1, 35), 41, 48, 63, 64, 65, 81)

#: Block sizes that `import` builds: powers of two, and the same with the halo of one 3x3 convolution.
DEFAULT_SIZES = (8, 10, 16, 18, 32, 34)

#: Widest word in bytes: the widest load of a thread.
MAX_WORD = 16

INDEX = "unsigned int"
WIDE_INDEX = "unsigned long long"

# C++ names of the numbers that can be added, by NumPy's. Signed integers wrap around to the same bits as
# unsigned ones, and complex numbers are added part by part.
_SUMMANDS = {
    "int8": "unsigned char",
    "uint8": "unsigned char",
    "int16": "unsigned short",
    "uint16": "unsigned short",
    "int32": "unsigned int",
    "uint32": "unsigned int",
    "int64": "unsigned long long",
    "uint64": "unsigned long long",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
    "complex64": "float",
    "complex128": "double",
}

# C++ names of the mask's pixels.
_PIXELS = {
    "bool": "unsigned char",
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned int",
    "int64": "long long",
    "uint64": "unsigned long long",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}

MASK_DTYPES = tuple(_PIXELS)
SUM_DTYPES = tuple(_SUMMANDS)


class Instance(NamedTuple):
    """One instantiation: the file in the kernel folder and the C++ name expression."""

    source: str
    expression: str


class Walk(NamedTuple):
    """How a gather or scatter kernel goes through a block: what its template needs besides size and type."""

    #: "channels" or "columns": see Order in kernels/transfer.cuh. "tiled": turn in shared memory, see kernels/tile.cuh.
    order: str
    #: Bytes that a thread moves at once; for "tiled" those of one element.
    word: int
    #: For "tiled": whether the image, not the stack, is contiguous along channels.
    image_along_channels: bool = False
    #: For "tiled": elements that a thread moves at once along channels, and along pixels.
    channel_lanes: int = 1
    pixel_lanes: int = 1
    #: Whether a block has so many words that counting them takes 64 bits.
    wide: bool = False


def gather_instance(walk: Walk, bsize: tuple[int, int], activated: np.dtype[Any] | None = None) -> Instance:
    """The gather kernel for blocks of `bsize`: one that copies, or that activates numbers of a dtype on the way."""
    if walk.order == "tiled":
        what = str(walk.word)
    elif activated is None:
        what = f"sbnet::Copy<{walk.word}>"
    else:
        what = f"sbnet::Activated<{_SUMMANDS[activated.name]}, {walk.word // activated.itemsize}>"
    return Instance("gather.cu", _transfer_expression("gather", what, walk, bsize))


def scatter_instance(
    walk: Walk, bsize: tuple[int, int], dtype: np.dtype[Any], add: bool, overlaps: bool = False
) -> Instance:
    """The scatter kernel for blocks of `bsize`, which may overlap; `dtype` matters only to `add`."""
    if add:
        summand = _SUMMANDS[dtype.name]
        part = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
        combine = f"sbnet::Sum<{summand}, {walk.word // part}>"
    else:
        combine = f"sbnet::Overwrite<{walk.word}>"
    return Instance(
        "scatter.cu", _transfer_expression("scatter", combine, walk, bsize, "true" if overlaps else "false")
    )


def _transfer_expression(name: str, first: str, walk: Walk, bsize: tuple[int, int], *flags: str) -> str:
    index = WIDE_INDEX if walk.wide else INDEX
    if walk.order == "tiled":
        along_channels = "true" if walk.image_along_channels else "false"
        name, shape = f"{name}_tiled", f"{along_channels}, {walk.channel_lanes}, {walk.pixel_lanes}"
    else:
        shape = f"sbnet::Order::k{walk.order.capitalize()}"
    return f"sbnet::{name}<{', '.join((first, index, str(bsize[0]), str(bsize[1]), shape, *flags))}>"


def cover_instance(add: bool) -> Instance:
    """The kernel that builds the cover map: the whole lists for `add`, else the last row of each block."""
    return Instance("cover.cu", "sbnet::cover_all" if add else "sbnet::cover_last")


def activity_instance(dtype: np.dtype[Any], avgpool: bool, lanes: int) -> Instance:
    """The pooling kernel of ``reduce_mask`` for masks of `dtype`, of which a thread reads `lanes` pixels at once."""
    pool = "sbnet::AveragePool" if avgpool else "sbnet::MaxPool"
    return Instance("reduce_mask.cu", f"sbnet::block_activity<{_PIXELS[dtype.name]}, {pool}, {lanes}>")


def pack_instance(products: str) -> Instance:
    """The kernel that packs weights."""
    return Instance("pack.cu", f"sbnet::pack<{products}>")


def products_of(dtype: np.dtype[Any], tensor_cores: bool, rounds_rows: bool = False) -> str:
    """The C++ policy that multiplies numbers of a dtype."""
    rounds = ", true" if rounds_rows else ""
    return f"sbnet::{'TensorCores' if tensor_cores else 'Plain'}<{_SUMMANDS[dtype.name]}{rounds}>"


def conv_instance(
    products: str, layout: str, shape: tuple[int, ...], form: tuple[bool, ...], resident: int
) -> Instance:
    """The fused convolution: see ConvShape and ConvForm of kernels/conv.cu; CTAs that a multiprocessor holds."""
    numbers, flags = ", ".join(map(str, shape)), ", ".join("true" if flag else "false" for flag in form)
    return Instance(
        "conv.cu",
        f"sbnet::conv<{products}, {layout}, sbnet::ConvShape<{numbers}>, sbnet::ConvForm<{flags}>, {resident}>",
    )


def wgmma_instance(dtype: np.dtype[Any], layout: str, shape: tuple[int, ...], several: bool, resident: int) -> Instance:
    """The convolution by warpgroups: see kernels/conv_wgmma.cu; whether in several chunks; CTAs of a multiprocessor."""
    arguments = [_SUMMANDS[dtype.name], layout, f"sbnet::WgmmaShape<{layout}, {', '.join(map(str, shape))}>"]
    arguments += ["true" if several else "false", str(resident)]
    return Instance("conv_wgmma.cu", f"sbnet::conv_wgmma<{', '.join(arguments)}>")


def bottleneck_instance(
    products: str, numbers: tuple[int, ...], layouts: tuple[str, str, str], near: int, parts: int, resident: int
) -> Instance:
    """The fused bottleneck: see kernels/bottleneck.cu; CTAs that a multiprocessor holds."""
    arguments = [products, *map(str, numbers), *layouts, str(near), str(parts), str(resident)]
    return Instance("bottleneck.cu", f"sbnet::bottleneck<{', '.join(arguments)}>")


def wgmma_bottleneck_instance(
    dtype: np.dtype[Any], numbers: tuple[int, ...], layouts: tuple[str, str], together: tuple[int, int]
) -> Instance:
    """The fused bottleneck by warpgroups: see WgmmaBottleneck of kernels/bottleneck_wgmma.cu."""
    arguments = ", ".join([_SUMMANDS[dtype.name], *map(str, numbers), *layouts, *map(str, together)])
    shape = f"sbnet::WgmmaBottleneck<{arguments}>"
    return Instance("bottleneck_wgmma.cu", f"sbnet::bottleneck_wgmma<{_SUMMANDS[dtype.name]}, {shape}>")


COUNT_ACTIVE = Instance("reduce_mask.cu", "sbnet::count_active")
COMPACT_ACTIVE = Instance("reduce_mask.cu", "sbnet::compact_active")


def default_instances() -> list[Instance]:
    """What `import` builds: enough for a first notebook.

    That is: bool, uint8 and float32 masks; gather and plain scatter of blocks of the default sizes, of float32 or
    any other 4-byte type with channels that fill 16-byte words or do not, and of any type in 16-byte words
    (the usual channel counts in float16); adding float32 blocks; and the transposed stack.
    """
    float32 = np.dtype(np.float32)
    found = [COUNT_ACTIVE, COMPACT_ACTIVE]
    for name, avgpool in (("bool", False), ("float32", False), ("float32", True)):  # uint8 is read as bool is
        found += [activity_instance(np.dtype(name), avgpool, lanes) for lanes in mask_lanes(np.dtype(name))]
    found += [cover_instance(False), cover_instance(True)]
    for size in DEFAULT_SIZES:
        bsize = (size, size)
        turned = Walk("tiled", 4, True, channel_lanes=4, pixel_lanes=4)
        for walk in (Walk("channels", 16), Walk("channels", 4), turned):
            found += [gather_instance(walk, bsize), scatter_instance(walk, bsize, float32, False)]
        found.append(scatter_instance(Walk("channels", 16), bsize, float32, True))
    return list(dict.fromkeys(found))


def table_instances(size: int) -> list[Instance]:
    """What one entry of the size table stands for: float32 blocks, copied in wide and in single words, and added."""
    bsize, float32 = (size, size), np.dtype(np.float32)
    wide, single = Walk("channels", 16), Walk("channels", 4)
    return [
        gather_instance(wide, bsize),
        gather_instance(single, bsize),
        scatter_instance(wide, bsize, float32, False),
        scatter_instance(wide, bsize, float32, True),
    ]


def instances_for(bsizes: Iterable[tuple[int, int]], dtypes: Iterable[np.dtype[Any]]) -> list[Instance]:
    """Every instantiation that arrays of these dtypes and blocks of these sizes can ask for, whatever their layout.

    Leaves out only 64-bit counting, for blocks of more than 2^31 words.
    """
    found = [COUNT_ACTIVE, COMPACT_ACTIVE, cover_instance(False), cover_instance(True)]
    dtypes = list(dtypes)
    for dtype in dtypes:
        if dtype.name in _PIXELS:
            found += [
                activity_instance(dtype, avgpool, lanes) for avgpool in (False, True) for lanes in mask_lanes(dtype)
            ]
        found += activate_instances(dtype)
    for bsize in bsizes:
        for dtype in dtypes:
            for walk in walks_for(dtype):
                found.append(gather_instance(walk, bsize))
                if dtype.name in ACTIVATED and walk.order != "tiled":
                    found.append(gather_instance(walk, bsize, dtype))
                for overlaps in (False, True):
                    found.append(scatter_instance(walk, bsize, dtype, False, overlaps))
                    if dtype.name in _SUMMANDS and walk.word <= max_word(dtype, True, overlaps):
                        found.append(scatter_instance(walk, bsize, dtype, True, overlaps))
    return list(dict.fromkeys(found))


def walks_for(dtype: np.dtype[Any]) -> Iterator[Walk]:
    """All ways in which blocks of `dtype` are walked."""
    word = dtype.itemsize
    yield Walk("columns", word)
    for channel_lanes in channel_lane_counts(word):
        yield Walk("tiled", word, image_along_channels=False, channel_lanes=channel_lanes)
        for pixel_lanes in pixel_lane_counts(word):
            yield Walk("tiled", word, True, channel_lanes, pixel_lanes)
    while word <= MAX_WORD:
        yield Walk("channels", word)
        word *= 2


def mask_lanes(dtype: np.dtype[Any]) -> tuple[int, ...]:
    """How many pixels of a mask a thread may read at once, most first: up to 16 bytes and 8 pixels, or one."""
    return tuple(dict.fromkeys((min(8, MAX_WORD // dtype.itemsize), 1)))


def max_word(dtype: np.dtype[Any], add: bool, overlaps: bool) -> int:
    """The widest word, in bytes, in which blocks of `dtype` are combined with an image."""
    # Each number that is added takes registers of its own, those of up to 4 blocks at once where blocks overlap.
    numbers = 4 if overlaps or dtype.itemsize == 1 else 8
    return min(MAX_WORD, numbers * dtype.itemsize) if add else MAX_WORD


def channel_lane_counts(itemsize: int) -> tuple[int, ...]:
    """How many channels of a tile a thread may move at once, most first: 16 bytes, 4 bytes, or one."""
    return tuple(dict.fromkeys(max(1, size // itemsize) for size in (MAX_WORD, 4, 1)))


def pixel_lane_counts(itemsize: int) -> tuple[int, ...]:
    """How many pixels of a tile a thread may move at once, most first: 16 bytes, or one."""
    return tuple(dict.fromkeys((MAX_WORD // itemsize, 1)))


def activate_instance(source: np.dtype[Any], target: np.dtype[Any], lanes: int, wide: bool) -> Instance:
    """The kernel that activates a stack of `source` numbers, `lanes` of them at once, into one of `target` numbers."""
    index = WIDE_INDEX if wide else INDEX
    names = f"{_SUMMANDS[source.name]}, {_SUMMANDS[target.name]}"
    return Instance("activate.cu", f"sbnet::activate<{names}, {lanes}, {index}>")


def activate_instances(dtype: np.dtype[Any]) -> list[Instance]:
    """Every kernel that activates to stacks of `dtype`, from the same or from the float32 that halves are summed in."""
    if dtype.name not in ACTIVATED:
        return []
    sources = [np.dtype(np.float32), dtype] if dtype.itemsize == 2 else [dtype]
    return [activate_instance(source, dtype, lanes, False) for source in sources for lanes in activate_lanes(source)]


#: Dtypes of stacks that are activated.
ACTIVATED = ("float16", "bfloat16", "float32", "float64")


def activate_lanes(source: np.dtype[Any]) -> tuple[int, ...]:
    """How many channels of a stack may be activated at once, most first: those of up to 16 bytes."""
    most = MAX_WORD // source.itemsize
    return tuple(most >> k for k in range(most.bit_length()))
