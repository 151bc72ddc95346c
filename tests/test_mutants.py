"""Proof that kernels on a CPU show their mistakes: each mutant is a kernel with one, which some call must notice."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import cpu_cuda
import ml_dtypes
import numpy as np
import pytest
from cpu_cuda import calls
from cpu_cuda.calls import Call, Difference
from fused_cases import BOTTLENECKS, CONVS, PACKINGS, FusedCase

from sbnet_cupy._sources import kernel_folder

if cpu_cuda.why_unavailable() and not os.environ.get("CI"):
    pytest.skip(cpu_cuda.why_unavailable(), allow_module_level=True)

BSIZE = (4, 7)
FLOAT32, HALF = np.dtype(np.float32), np.dtype(np.float16)


def gather_families() -> dict[str, list[Call]]:
    def large(order: str, dtype: np.dtype[Any] = FLOAT32) -> list[Call]:
        return [
            calls.gather_call(case, f"{name}-{order}", patches)
            for name, (case, patches) in calls.large_cases(order, dtype).items()
            if name.endswith("apart") and not name.startswith("wide")
        ]

    def small(channels: int, **options: Any) -> list[Call]:
        cases = (calls.random_case(seed, channels=channels, **options) for seed in range(4))
        return [calls.gather_call(case, f"small-{channels}-{seed}") for seed, case in enumerate(cases)]

    direct: dict[str, Any] = {"dtype": FLOAT32, "bsize": BSIZE}
    turned: dict[str, Any] = {"dtype": FLOAT32, "bsize": (3, 3), "transpose": True}
    return {
        "gather": [
            *small(16, **direct),
            *small(3, **direct, layouts=("reversed", "nhwc")),
            *small(3, **direct, layouts=("nchw", "nhwc"), transpose=True),
            *large("direct"),
        ],
        "gather_tiled": large("tiled") + small(8, **turned) + small(12, **turned, layouts=("nhwc", "sliced")),
        "gather_back": large("back"),
        "gather_half": large("tiled", dtype=HALF),
        "gather_half_back": large("back", dtype=HALF),
    }


def scatter_families(add: bool) -> dict[str, list[Call]]:
    """With blocks that overlap or do not: those are kernels of their own."""
    make = functools.partial(calls.scatter_call, add=add)
    name = "add" if add else "scatter"

    def large(how: str, order: str) -> list[Call]:
        return [
            make(case, f"{way}-{order}", patches=changes)
            for name, (case, patches) in {**calls.large_cases(order), **calls.twin_cases(order)}.items()
            if name.endswith(how) and not name.startswith(("wide", "odd"))
            for way, changes in calls.with_lookups(name, patches).items()
        ]

    odd, _ = calls.large_cases("tiled", HALF)["odd-parts-apart"]
    columns: dict[str, Any] = {"channels": 3, "dtype": FLOAT32, "bsize": BSIZE, "layouts": ("nchw", "nhwc")}
    along_columns = [make(calls.random_case(k, **columns, transpose=True), f"columns-{k}") for k in range(4)]

    def near_and_far(transpose: bool) -> list[Call]:
        return [call for call in calls.overlap_calls(add, transpose) if not re.search("apart|beside", call.name)]

    return {
        name: large("apart", "direct") + along_columns,
        f"{name}_overlaps": near_and_far(False) + large("overlapping", "direct"),
        f"{name}_tiled": large("apart", "tiled"),
        f"{name}_half_tiled": [make(odd, "odd-parts-half")],
        f"{name}_back": large("apart", "back"),
        f"{name}_back_overlaps": large("overlapping", "back"),
        f"{name}_tiled_overlaps": near_and_far(True) + large("overlapping", "tiled"),
    }


def fused_families() -> dict[str, list[FusedCase]]:
    """Convolutions and bottlenecks: few of them, those that run fast."""
    convs, bottlenecks = ({case.name: case for case in cases} for cases in (CONVS, BOTTLENECKS))

    def some(found: dict[str, FusedCase], names: str) -> list[FusedCase]:
        return [found[name] for name in names.split()]

    return {
        "pack": list(PACKINGS),
        "conv_plain": some(convs, "pads 2x5"),
        "conv": some(convs, "nchw-stride misaligned 1x1-stride hostile counted"),
        "conv_depth": some(convs, "3x3-ragged"),
        "conv_chunks": some(convs, "chunks-5x5 split-chunks split tiles"),
        "conv_wgmma": [
            *some(convs, "wgmma wgmma-ragged wgmma-parts wgmma-chunks wgmma-columns wgmma-counted wgmma-hostile"),
            *some(convs, "wgmma-depth wgmma-depth-halves"),
            *some(bottlenecks, "layers-wgmma layers-wgmma-tf32"),
        ],
        "bottleneck": some(bottlenecks, "direct-in-place direct-float32 direct-tf32 direct-hostile counted-in-place"),
        "bottleneck_wgmma": some(
            bottlenecks,
            "groups groups-halves groups-3x5 groups-in-place groups-plain groups-squares groups-wide groups-hostile"
            " groups-counted groups-stack",
        ),
        "bottleneck_plans": some(bottlenecks, "distant parts passes direct-tiles"),
        "bottleneck_chunks": some(bottlenecks, "chunks-of-the-middle chunks-of-the-channels"),
        "layers": some(bottlenecks, "layers-odd layers-kernels layers-nchw layers-tiles"),
        "layers_plans": some(bottlenecks, "layers-cut layers-flat"),
    }


@functools.cache
def families() -> dict[str, list[Any]]:
    """Calls of one op each, which need few instantiations: every mutant compiles them anew."""

    def halves(dtype: Any) -> list[Call]:
        cases = [calls.random_case(seed, np.dtype(dtype), 4, bsize=BSIZE, overlaps=True) for seed in range(4)]
        return [calls.scatter_call(case, f"{dtype.__name__}-{seed}", add=True) for seed, case in enumerate(cases)]

    steps = {call.name.removeprefix("activate-"): call for call in calls.activate_calls()}
    activated = ("float32-16", "float32-4", "float32-3", "float32-2", "float16-16", "float16-16-from-float32")
    activated += ("bfloat16-6", "from-strided", "many-words", "many-pixels", "many-pixels-image", "one-cta-a-row")
    activated += ("far-apart",)
    affine = [call for call in calls.activate_calls() if call.name.startswith("affine-gather-float32")]
    compactions = ("few-words", "more-words", "counted", "counted-one-tile", "counted-tiles", "fused")
    masks = {call.name.removeprefix("mask-"): call for call in calls.mask_calls()}
    pooled = (
        "uint8-max",
        "uint8-avg",
        "float32-max",
        "int64-avg",
        "int64-avg-high",
        "sliced",
        "wide-blocks-few-ctas-max",
        "wide-blocks-few-ctas-avg",
        "wide-gaps-avg",
        "narrow-gaps-max",
        "narrow-gaps-avg",
        "several-row-threads-max",
        "several-row-threads-avg",
        "several-strips-few-ctas-max",
        "several-strips-few-ctas-avg",
        "tall-max",
        "tall-avg",
        "negative-avg",
    )
    return {
        **fused_families(),
        **gather_families(),
        **scatter_families(False),
        **scatter_families(True),
        "add_half": halves(np.float16) + halves(ml_dtypes.bfloat16),
        "activate": [steps[name] for name in activated] + affine,
        "mask": [masks[name] for name in pooled],
        "compact": [
            masks[f"compact-{name}-capacity-{capacity}"] for name in compactions for capacity in (None, 100, 12000)
        ]
        + [masks["fused-in-turn"]],
    }


#: What each mutant is called, the file that it changes, the family that has to notice, the text and its replacement.
#: Any white space in a text stands for any other.
MUTANTS = """
count-of-rows: transfer.cuh, gather
- row < count && n < t.batch
+ row <= count && n < t.batch

batch-bound: transfer.cuh, gather
- && n < t.batch
+ && n <= t.batch

negative-batch: transfer.cuh, gather
- && n < t.batch
+ && static_cast<int>(n) < t.batch

cell-bound: transfer.cuh, gather
- at.cell_w < t.width.count;
+ at.cell_w <= t.width.count;

cell-before-the-first: transfer.cuh, gather
- at.cell_h < t.height.count
+ static_cast<int>(at.cell_h) < t.height.count

cell-not-from-the-first: transfer.cuh, gather
- index_h - static_cast<unsigned int>(t.height.first)
+ index_h

image-without-batch: transfer.cuh, gather
- n * t.image_strides[0] +
+

row-index-for-column: transfer.cuh, gather
- triple[2 * t.index_strides[1]]
+ triple[t.index_strides[1]]

start-of-height: transfer.cuh, gather
- static_cast<Signed>(t.width.start)
+ static_cast<Signed>(t.height.start)

stride-of-width: transfer.cuh, gather
- static_cast<Signed>(t.height.stride)
+ static_cast<Signed>(t.width.stride)

clip-end: transfer.cuh, gather
- static_cast<Index>(extent - origin) :
+ static_cast<Index>(extent - origin + 1) :

clip-begin: transfer.cuh, gather
- static_cast<Index>(-origin)
+ static_cast<Index>(-origin - 1)

unsigned-coordinates: transfer.cuh, gather
- using type = int;
+ using type = unsigned int;

rect-row-bound: transfer.cuh, gather_tiled
- row < row_end && column >=
+ row <= row_end && column >=

rect-column-bound: transfer.cuh, gather_tiled
- column >= column_begin &&
+

channel-of-all-columns: transfer.cuh, gather
- channel = number - column * static_cast<Index>(t.channels);
+ channel = number;

column-order: transfer.cuh, gather
- channel = number / kBlockW; column = number % kBlockW;
+ channel = number % kBlockW; column = number / kBlockW;

column-by-height: transfer.cuh, gather
- column = number % kBlockW;
+ column = number % (kBlockW - 1);

magic-shift: transfer.cuh, gather
- static_cast<int>(shift)
+ static_cast<int>(shift - 1)

image-channel-stride: transfer.cuh, gather
- static_cast<int64>(channel) * t.image_strides[3]
+ static_cast<int64>(channel)

stack-channel-stride: transfer.cuh, gather
- static_cast<int64>(channel) * t.stack_strides[3]
+ static_cast<int64>(channel)

image-strides-swapped: transfer.cuh, gather_tiled
- static_cast<int64>(row) * t.image_strides[1] + static_cast<int64>(column) * t.image_strides[2]
+ static_cast<int64>(row) * t.image_strides[2] + static_cast<int64>(column) * t.image_strides[1]

stack-strides-swapped: transfer.cuh, gather_tiled
- static_cast<int64>(row) * t.stack_strides[1] + static_cast<int64>(column) * t.stack_strides[2]
+ static_cast<int64>(row) * t.stack_strides[2] + static_cast<int64>(column) * t.stack_strides[1]

cta-of-one-row: transfer.cuh, gather
- t.by_ctas_per_row(blockIdx.x)
+ blockIdx.x

cta-part: transfer.cuh, gather
- part = blockIdx.x - group * static_cast<unsigned int>(t.ctas_per_row);
+ part = 0;

cta-part-of-tiles: transfer.cuh, gather_tiled
- part = blockIdx.x - group * static_cast<unsigned int>(t.ctas_per_row);
+ part = blockIdx.x;

threads-to-spare: transfer.cuh, add
- slot < t.rows_per_cta ?
+ true ?

rows-of-a-cta: transfer.cuh, gather
- cta.rows * t.rows_per_cta + slot
+ cta.rows + slot

column-step: transfer.cuh, add
- static_cast<Index>(t.ctas_per_row) * blockDim.x
+ blockDim.x

column-step-too-far: transfer.cuh, gather
- static_cast<Index>(t.ctas_per_row) * blockDim.x
+ static_cast<Index>(t.ctas_per_row + 1) * blockDim.x

slot-step: transfer.cuh, add
- : static_cast<Index>(t.slot);
+ : static_cast<Index>(t.slot) - 1;

first-column-of-cta: transfer.cuh, gather
- static_cast<Index>(cta.part) * blockDim.x +
+

first-column-of-slot: transfer.cuh, gather
- (threadIdx.x - slot * static_cast<unsigned int>(t.slot))
+ threadIdx.x

lines-from-the-top: transfer.cuh, add
- begin = blockIdx.y * static_cast<Index>(t.lines);
+ begin = 0;

lines-twice: transfer.cuh, add
- kBlockH : begin + static_cast<Index>(t.lines);
+ kBlockH : begin + static_cast<Index>(t.lines) + 1;

last-lines: transfer.cuh, gather
- static_cast<Index>(t.lines) ? kBlockH :
+ static_cast<Index>(t.lines) ? begin :

lines-past-the-block: transfer.cuh, gather
- end = kBlockH - begin < static_cast<Index>(t.lines) ? kBlockH :
+ end =

misaligned-word: vec.cuh, gather
- return static_cast<const Word*>(address) + offset;
+ return reinterpret_cast<const Word*>(static_cast<const char*>(address) + 1) + offset;

misaligned-lanes: vec.cuh, add_tiled
- Vec<Word, kLanes>*>(static_cast<const Word*>(address) + offset);
+ Vec<Word, kLanes>*>(static_cast<const Word*>(address) + offset - 1);

store-one-word-off: vec.cuh, scatter_tiled
- static_cast<Word*>(address) + offset) = words;
+ static_cast<Word*>(address) + offset + 1) = words;

load-one-word-off: vec.cuh, gather_half
- return *reinterpret_cast<const Word*>(&bits);
+ return *(reinterpret_cast<const Word*>(&bits) + 1);

pixel-swizzle-too-wide: tile.cuh, gather_tiled
- pixel / kEvery % 8
+ pixel / kEvery % 16

pixel-tile-of-one-block: tile.cuh, gather_tiled
- (block * Shape::kPixels + pixel)
+ pixel

pixel-step: tile.cuh, gather_tiled
- kPixelStep = Shape::kChannels;
+ kPixelStep = Shape::kChannels + 1;

channel-swizzle-too-wide: tile.cuh, scatter_tiled
- channel / Shape::kPiece % Shape::kPlaces
+ channel / Shape::kPiece % (2 * Shape::kPlaces)

pitch-of-pixels: tile.cuh, scatter_tiled
- kSwaps ? round_up(kPixels, kPlaces * kPiece) : kPixels
+ kPixels

channel-tile-of-one-block: tile.cuh, scatter_tiled
- (block * Shape::kChannels + channel) * Shape::kPitch
+ channel * Shape::kPitch

channel-step: tile.cuh, scatter_tiled
- kChannelStep = Shape::kPitch;
+ kChannelStep = Shape::kPixels;

no-wait: tile.cuh, gather_tiled
- wait_async(); __syncthreads(); } // Where
+ __syncthreads(); } // Where

fill-not-swizzled: tile.cuh, gather_tiled
- &tile.word[tile.slot(group.block, group.pixel, group.channel)]
+ &tile.word[tile.slot(group.block, group.pixel, 0) + group.channel]

patch-not-swizzled: gather.cu, gather_half
- tile.slot(group.block, group.pixel, group.channel); Vec<Word, kWide>
+ tile.slot(group.block, group.pixel, 0) + group.channel; Vec<Word, kWide>

part-pixel: tile.cuh, gather_tiled
- first_pixel(number % static_cast<Index>(Shape::kParts) * Shape::kPixels)
+ first_pixel(0)

part-channel: tile.cuh, gather_tiled
- number / static_cast<Index>(Shape::kParts) * Shape::kChannels
+ number * Shape::kChannels

last-blocks: tile.cuh, gather_tiled
- rows < Shape::kBlocks ? static_cast<int>(rows) :
+

last-pixels: tile.cuh, gather_tiled
- block_pixels - first_pixel < Shape::kPixels ? static_cast<int>(block_pixels - first_pixel) :
+

last-channels: tile.cuh, gather_tiled
- block_channels - first_channel < Shape::kChannels ? static_cast<int>(block_channels - first_channel) :
+

last-tile: tile.cuh, gather_tiled
- (block_channels + Shape::kChannels - 1) / Shape::kChannels
+ block_channels / Shape::kChannels

parts-counted-once: tile.cuh, gather_tiled
- return static_cast<Index>(Shape::kParts) *
+ return

threads-for-half-of-the-channels: tile.cuh, gather_tiled
- threads * kLanes < part.channels
+ threads * kLanes * 2 < part.channels

pixels-left-out: tile.cuh, gather_tiled
- step = kTileThreads / threads;
+ step = kTileThreads;

threads-without-channels: tile.cuh, gather_back
- if (channel >= part.channels) count = 0;
+

pixel-of-all-blocks: tile.cuh, gather_tiled
- : k / Shape::kPixels;
+ : 0;

batch-tail-along-channels: tile.cuh, scatter_tiled
- channel, k < count && (
+ channel, (

part-tail-along-channels: tile.cuh, scatter_back
- {block, pixel, channel, k < count && (Shape::kWhole || pixel < pixels)}
+ {block, pixel, channel, k < count}

groups-of-all-channels: tile.cuh, gather_tiled
- per_block(part.channels * Shape::kPixels / kLanes)
+ per_block(Shape::kChannels * Shape::kPixels / kLanes)

element-of-all-blocks: tile.cuh, gather_tiled
- (k - block * per_block) * kLanes
+ k * kLanes

part-tail-along-pixels: tile.cuh, gather_tiled
- element / Shape::kPixels, k < count && (Shape::kWhole || pixel < pixels)}
+ element / Shape::kPixels, k < count}

batch-tail-along-pixels: tile.cuh, scatter_half_tiled
- element / Shape::kPixels, k < count && (
+ element / Shape::kPixels, (

group-into-the-next-channel: tile.cuh, gather_tiled
- group.channel + pixel / Shape::kPixels
+ group.channel

pixel-beyond-a-channel: tile.cuh, gather_tiled
- Tile::slot(group.block, pixel % Shape::kPixels,
+ Tile::slot(group.block, pixel,

group-step: tile.cuh, gather_tiled
- + i * Tile::kPixelStep;
+ + i;

odd-channel: tile.cuh, gather_half
- (part.channels + kWide - 1) / kWide * kRuns
+ part.channels / kWide * kRuns

patch-channel: tile.cuh, gather_half
- group / kRuns * kWide, k
+ group / kRuns, k

patch-of-all-blocks: tile.cuh, gather_half
- const int group = k - block * per_block;
+ const int group = k;

part-tail-of-patches: tile.cuh, gather_half
- group / kRuns * kWide, k < count && (Shape::kWhole || pixel < pixels)}
+ group / kRuns * kWide, k < count}

run-too-long: tile.cuh, gather_half
- while (pixels % most != 0) most /= 2;
+

fill-without-bound: tile.cuh, scatter_tiled
- if (!group.exists) continue; int64 offset
+ int64 offset

fill-beyond-the-image: tile.cuh, gather_tiled
- const bool found = locate(group, offset);
+ locate(group, offset); const bool found = true;

fill-step: tile.cuh, gather_half
- first += kBatch * groups.step) { if constexpr
+ first += (kBatch + 1) * groups.step) { if constexpr

fill-zeros: tile.cuh, gather_half
- words[u] = {};
+

fill-barrier: tile.cuh, gather_tiled
- wait_async(); __syncthreads(); } // Where
+ wait_async(); } // Where

fill-channels-unfinished: gather.cu, gather_back
- t.image_strides[3]); finish_fill();
+ t.image_strides[3]);

fill-across-unfinished: scatter.cu, scatter_back
- part, owns); finish_fill();
+ part, owns);

fill-along-unfinished: scatter.cu, scatter_tiled
- locate); finish_fill(); const AlongChannels
+ locate); const AlongChannels

fill-channels-stride: tile.cuh, gather_back
- first + channel * channel_stride : 0
+ first + channel : 0

fill-channels-batch: tile.cuh, gather_half_back
- k / Places::kAll)] = words[u];
+ begin / Places::kAll)] = words[u];

places-of-one-block: gather.cu, gather_back
- place<Index, kBlockH, kBlockW>(t, first_row + block);
+ place<Index, kBlockH, kBlockW>(t, first_row);

places-of-the-first-part: gather.cu, gather_back
- number == cta.part || !Shape::kWhole
+ number == cta.part

places-outside: gather.cu, gather_back
- if (at.inside.contains(row, column)) {
+ if (at.touches_image) {

across-slices: tile.cuh, scatter_back
- (part.channels + kLanes - 1) / kLanes * kAll
+ part.channels / kLanes * kAll

across-channel: tile.cuh, scatter_back
- k / kAll * kLanes, (Shape
+ k / kAll, (Shape

across-place-of-all-channels: tile.cuh, scatter_back
- const int place = k % kAll;
+ const int place = k;

across-pixel-of-all-blocks: tile.cuh, scatter_back
- const int pixel = place - block * Shape::kPixels;
+ const int pixel = place;

across-blocks-beyond-the-rows: tile.cuh, scatter_back
- (Shape::kBlocks == 1 || block < blocks) &&
+

across-beyond-the-last-channel: tile.cuh, scatter_back
- if (i < channels) visit(i);
+ visit(i);

across-whole-slices: tile.cuh, scatter_back
- if (channels >= kLanes) {
+ if (channels >= 1) {

gather-rows: gather.cu, gather
- if (share.row >= t.rows) return;
+

gather-left-edge: gather.cu, gather
- column.column >= at.inside.column_begin &&
+

gather-right-edge: gather.cu, gather
- && column.column < at.inside.column_end;
+ ;

gather-outside: gather.cu, gather
- inside ? at.inside.row_end : 0
+ at.inside.row_end

gather-top-edge: gather.cu, gather
- if (row + u >= at.inside.row_begin && row + u < end) word[u]
+ if (row + u < end) word[u]

gather-bottom-edge: gather.cu, gather
- if (row + u >= at.inside.row_begin && row + u < end) word[u]
+ if (row + u >= at.inside.row_begin) word[u]

gather-activates-zeros: gather.cu, activate
- const bool is_pixel = row + u >= at.inside.row_begin && row + u < end;
+ const bool is_pixel = row + u >= at.inside.row_begin;

gather-batch-tail: gather.cu, gather
- if (row + u < share.end) *target
+ *target

gather-batch-step: gather.cu, gather
- row += kBatch
+ row += kBatch + 1

gather-zeros: gather.cu, gather
- is_pixel ? map(word[u]) : Word{};
+ map(is_pixel ? word[u] : Word{1});

gather-source-step: gather.cu, gather
- source += t.image_strides[1];
+ source += t.image_strides[2];

gather-source-line: gather.cu, gather
- static_cast<int64>(share.begin) * t.image_strides[1]
+ 0

gather-target-line: gather.cu, gather
- static_cast<int64>(share.begin) * t.stack_strides[1]
+ 0

patch-beyond-the-last-channel: gather.cu, gather_half
- if (line.channel < part.channels) store
+ store

patch-not-turned: gather.cu, gather_half
- pixels[i].lane[c]
+ pixels[i].lane[0]

patch-of-one-pixel: gather.cu, gather_half
- slot + i * tile.kPixelStep
+ slot

place-beyond-the-rows: gather.cu, gather_tiled
- threadIdx.x < Shape::kBlocks && first_row + threadIdx.x < t.rows
+ threadIdx.x < Shape::kBlocks

place-barrier: gather.cu, gather_tiled
- __syncthreads(); const Index channels
+ const Index channels

rows-of-a-tile: gather.cu, gather_tiled
- t.rows - first_row
+ t.rows

place-of-the-first-block: gather.cu, gather_tiled
- blocks[group.block]
+ blocks[0]

target-of-the-first-block: gather.cu, gather_tiled
- (first_row + group.block) * t.stack_strides[0]
+ first_row * t.stack_strides[0]

channels-of-the-first-tile: gather.cu, gather_tiled
- static_cast<int64>(part.first_channel + group.channel) * t.image_strides[3]
+ static_cast<int64>(group.channel) * t.image_strides[3]

pixels-of-the-first-part: gather.cu, gather_tiled
- const Index pixel = part.first_pixel + group.pixel; const Index row
+ const Index pixel = group.pixel; const Index row

tile-not-turned: gather.cu, gather_back
- slot + i * tile.kChannelStep
+ slot + i

tile-barrier: gather.cu, gather_tiled
- target); } __syncthreads();
+ target); }

equal-blocks-race: scatter.cu, scatter
- (Combine::kAdds ? found.before : found.after)
+ false

equal-blocks-each-added: scatter.cu, add
- (Combine::kAdds ? found.before : found.after)
+ false

equal-blocks-not-added: scatter.cu, add
- !idle && Combine::kAdds && found.after
+ false

put-above-the-share: scatter.cu, add
- at.inside.row_begin > share.begin ? at.inside.row_begin : share.begin;
+ at.inside.row_begin;

put-below-the-share: scatter.cu, add
- at.inside.row_end < share.end ? at.inside.row_end : share.end;
+ at.inside.row_end;

put-outside: scatter.cu, scatter
- if (column.column < at.inside.column_begin || column.column >= at.inside.column_end) continue;
+

put-batch-tail: scatter.cu, scatter
- if (row + u < end && owns(row + u, column.column)) *target
+ if (owns(row + u, column.column)) *target

put-batch-step: scatter.cu, scatter
- row < end; row += kBatch
+ row < end; row += kBatch + 1

put-base: scatter.cu, add
- target[u * t.image_strides[1]]
+ target[0]

put-first-line: scatter.cu, scatter
- static_cast<int64>(begin) * t.stack_strides[1]
+ static_cast<int64>(share.begin) * t.stack_strides[1]

owned-by-nobody-else: scatter.cu, scatter_overlaps
- if (row + u < end && owns(row + u, column.column)) *target
+ if (row + u < end) *target

twin-alone: scatter.cu, add
- twin = next_twin(t, cover, twin)
+ twin = kNoRow

twin-of-the-first-row: scatter.cu, add
- twin * t.stack_strides[0] + source
+ row * t.stack_strides[0] + source

twins-of-all-lines: scatter.cu, add
- block_row = share.begin; block_row
+ block_row = 0; block_row

twins-outside: scatter.cu, add
- if (!at.inside.contains(block_row, column.column)) continue;
+

one-table-for-all-warps: scatter.cu, scatter_overlaps
- tables[cover.head == nullptr ? 0 : threadIdx.x / kWarp]
+ tables[0]

shared-pixels-left-out: scatter.cu, scatter_overlaps
- put_shared<Combine, kOrder>(t, cover, at, share.row, share, task, nearby);
+

shared-pixels-of-tiles-left-out: scatter.cu, scatter_tiled_overlaps
- put_shared<Combine, kOrder>(t, cover, at, row, share, task, nearby);
+

zones-of-tiles-left-out: scatter.cu, add_tiled_overlaps
- put_shared<Combine, kOrder>(t, cover, at, row, share, task, nearby);
+

tile-owned-by-nobody-else: scatter.cu, scatter_tiled_overlaps
- owns(pixel / kBlockW, pixel % kBlockW);
+ true;

tile-of-an-idle-row: scatter.cu, scatter_tiled
- member.puts &&
+

tile-outside: scatter.cu, scatter_tiled
- member.at.inside.contains(pixel / kBlockW, pixel % kBlockW) &&
+

tile-of-the-first-block: scatter.cu, scatter_tiled
- if (writes[u]) { const Member<Index>& member = members[group.block];
+ if (writes[u]) { const Member<Index>& member = members[0];

put-not-turned: scatter.cu, scatter_tiled
- slot + i * Tile::kChannelStep
+ slot + i

put-groups-twice: scatter.cu, add_tiled
- first += kBatch * groups.step
+ first += groups.step

put-one-base: scatter.cu, add_tiled
- base[u].lane[i], words
+ base[0].lane[i], words

across-of-the-first-block: scatter.cu, scatter_back
- if (!group.exists) return {}; const Member<Index>& member = members[group.block];
+ if (!group.exists) return {}; const Member<Index>& member = members[0];

across-of-the-first-part: scatter.cu, scatter_back
- part.first_pixel + group.pixel; const Index row
+ group.pixel; const Index row

across-of-an-idle-row: scatter.cu, scatter_back
- !member.puts ||
+

across-outside: scatter.cu, scatter_back
- !inside.contains(row, column) ||
+

across-owned-by-nobody-else: scatter.cu, scatter_back_overlaps
- || !owns(row, column)) return {};
+ ) return {};

across-channel-of-the-tile: scatter.cu, scatter_back
- static_cast<int64>(part.first_channel + group.channel) * t.image_strides[3]}; }
+ static_cast<int64>(group.channel) * t.image_strides[3]}; }

prefetch-beyond-the-last-channel: scatter.cu, scatter_back
- i < Groups::kLanes && i < part.channels - group.channel
+ i < Groups::kLanes

prefetch-beyond-the-last-row: scatter.cu, scatter
- for (Index row = begin; row < end; ++row, end_of_row
+ for (Index row = begin; row < kBlockH; ++row, end_of_row

across-first-piece: scatter.cu, scatter_back
- group.channel + p * kPiece)
+ group.channel)

across-one-base: scatter.cu, add_back
- sum_of<Combine>(base[i], word)
+ sum_of<Combine>(base[0], word)

across-base-step: scatter.cu, add_back
- from += stride;
+ ++from;

across-step: scatter.cu, scatter_back
- to += stride;
+ ++to;

source-of-the-first-block: scatter.cu, scatter_tiled
- offset = (first_row + group.block) * t.stack_strides[0]
+ offset = first_row * t.stack_strides[0]

tiles-twice: scatter.cu, add_tiled
- number += t.ctas_per_row
+ number += 1

put-barrier-across-channels: scatter.cu, scatter_tiled
- part, owns); } __syncthreads();
+ part, owns); }

members-of-one-row: scatter.cu, scatter_tiled
- (Shape::kBlocks == 1 ? 0 : threadIdx.x);
+ 0;

too-many-members: scatter.cu, scatter_tiled
- row < t.rows && (Shape::kBlocks == 1 || threadIdx.x < Shape::kBlocks)
+ row < t.rows

members-beyond-the-rows: scatter.cu, scatter_tiled
- row < t.rows && (Shape
+ (Shape

members-barrier: scatter.cu, scatter_tiled
- __syncthreads(); const auto owns = [](
+ const auto owns = [](

twins-put-and-added: scatter.cu, add_tiled
- !task.idle && !task.twins,
+ !task.idle,

all-are-twins: scatter.cu, add_tiled
- if (!members[k].twins) continue;
+

twins-of-the-first-member: scatter.cu, add_tiled
- cta.rows * Shape::kBlocks + k, share);
+ cta.rows * Shape::kBlocks, share);

twins-beyond-the-rows: scatter.cu, add_tiled
- k < Shape::kBlocks && cta.rows * Shape::kBlocks + k < t.rows;
+ k < Shape::kBlocks;

twins-of-each-tile: scatter.cu, add_tiled
- static_cast<Index>(cta.part * kTileThreads + threadIdx.x)
+ threadIdx.x

share-of-one-tile: scatter.cu, add_tiled_overlaps
- static_cast<Index>(t.ctas_per_row * kTileThreads)
+ static_cast<Index>(kTileThreads)

cell-without-batch: cover.cuh, scatter
- (n * t.height.count + cell_h)
+ cell_h

cell-width-for-height: cover.cuh, scatter
- + cell_h) * t.width.count
+ + cell_h) * t.height.count

equal-columns-forgotten: cover.cuh, scatter
- & a[2 * t.index_strides[1]] == b[2 * t.index_strides[1]];
+ ;

mapped-twins-before: cover.cuh, add
- return {head != row, cover.next
+ return {false, cover.next

mapped-twins-after: cover.cuh, add
- cover.next[row] != kNoRow}
+ false}

mapped-last-row: cover.cuh, scatter
- return {false, head != row};
+ return {false, false};

listed-as-its-own-twin: cover.cuh, add
- equal & other < row;
+ equal & other <= row;

listed-out-of-use: cover.cuh, scatter
- & other < count;
+ ;

listed-half: cover.cuh, scatter
- other += blockDim.x
+ other += 2 * blockDim.x

listed-by-one-thread: cover.cuh, scatter
- __syncthreads_or(found.after) != 0
+ found.after

next-twin-out-of-use: cover.cuh, add
- *t.bin_counts < t.rows ? *t.bin_counts : t.rows;
+ t.rows;

next-twin-is-itself: cover.cuh, add
- other = row + 1; other
+ other = row; other

next-twin-unequal: cover.cuh, add
- if (equal_rows(t, row, other)) return other;
+ return other;

far-taken-for-near: overlap.cuh, scatter_overlaps
- kBlockH - stride_h <= stride_h && kBlockW - stride_w <= stride_w;
+ true;

zone-row: overlap.cuh, scatter_overlaps
- row >= stride_h ? 1
+ row > stride_h ? 1

zone-column: overlap.cuh, add_overlaps
- column < kBlockW - stride_w ? -1
+ column <= kBlockW - stride_w ? -1

nearby-transposed: overlap.cuh, scatter_overlaps
- return head[3 * (dh + 1) + dw + 1]
+ return head[3 * (dw + 1) + dh + 1]

nearby-below-grid: overlap.cuh, scatter_overlaps
- cell_h < t.height.count && cell_w >= 0
+ cell_w >= 0

nearby-beside-grid: overlap.cuh, scatter_overlaps
- cell_w >= 0 && cell_w < t.width.count
+ cell_w >= 0

nearby-barrier: overlap.cuh, add_overlaps
- __syncwarp();
+

nearby-twins: overlap.cuh, add_overlaps
- twins = cover.next[mine] != kNoRow;
+ ;

rows-out-of-turn: overlap.cuh, add_overlaps
- ordered = ordered && head[before] < head[lane];
+ ;

rows-in-order-of-half: overlap.cuh, add_overlaps
- before < lane; ++before
+ before < lane / 2; ++before

searched-before-cleared: overlap.cuh, scatter_overlaps
- head[threadIdx.x] = kNoRow; __syncthreads();
+ head[threadIdx.x] = kNoRow;

searched-too-near-down: overlap.cuh, add_overlaps
- reach_h = (kBlockH - 1) / overlap.stride_h
+ reach_h = (kBlockH - 1) / overlap.stride_h - 1

searched-too-near-across: overlap.cuh, scatter_overlaps
- reach_w = (kBlockW - 1) / overlap.stride_w
+ reach_w = (kBlockW - 1) / overlap.stride_w - 1

searched-out-of-use: overlap.cuh, add_overlaps
- overlaps = other < t.rows && other < count;
+ overlaps = other < t.rows;

searched-beyond-the-list: overlap.cuh, add_overlaps
- overlaps = other < t.rows && other < count;
+ overlaps = other < count;

searched-in-every-image: overlap.cuh, add_overlaps
- overlaps = cell.image == at.image_index && dh
+ overlaps = dh

searched-by-one-warp: overlap.cuh, add_overlaps
- first = threadIdx.x - lane; first < t.rows; first += blockDim.x
+ first = threadIdx.x - lane; first < kWarp; first += blockDim.x

searched-above-only: overlap.cuh, scatter_overlaps
- dh >= -reach_h && dh <= reach_h
+ dh >= -reach_h && dh <= 0

searched-right-only: overlap.cuh, add_overlaps
- dw >= -reach_w && dw <= reach_w;
+ dw >= 0 && dw <= reach_w;

searched-first-row: overlap.cuh, scatter_overlaps
- repeats |= atomicMax(
+ repeats |= atomicMin(

searched-twins: overlap.cuh, add_overlaps
- repeats |= atomicMax(
+ atomicMax(

searched-twins-by-one-thread: overlap.cuh, add_overlaps
- twins = __syncthreads_or(repeats) != 0;
+ twins = repeats; __syncthreads();

searched-bit: overlap.cuh, add_overlaps
- rows[first / kWarp] = found;
+ rows[first / kWarp] = found >> 1;

listed-plain-with-twins: overlap.cuh, add_overlaps
- plain = nearby.is_plain(repeats);
+ plain = nearby.is_plain(false);

listed-from-zero: overlap.cuh, add_overlaps
- wanted = ~0u << begin % kWarp;
+ wanted = ~0u;

listed-after-the-next: overlap.cuh, add_overlaps
- const int begin = previous + 1;
+ const int begin = previous + 2;

listed-first-word-mask: overlap.cuh, add_overlaps
- } wanted = ~0u; }
+ } }

listed-row-stride: overlap.cuh, add_overlaps
- static_cast<int64>(row) - distance.dh * t.height.stride
+ static_cast<int64>(row) + distance.dh * t.height.stride

listed-column-bound: overlap.cuh, add_overlaps
- w >= 0 && w < static_cast<int64>(kBlockW)
+ w >= 0

listed-row-bound: overlap.cuh, scatter_overlaps
- if (h >= 0 && h
+ if (h

cell-from-zero: cover.cuh, add_overlaps
- triple[t.index_strides[1]]) - static_cast<unsigned int>(t.height.first)
+ triple[t.index_strides[1]])

cell-width-by-height: cover.cuh, add_overlaps
- triple[2 * t.index_strides[1]]) - static_cast<unsigned int>(t.width.first)
+ triple[2 * t.index_strides[1]]) - static_cast<unsigned int>(t.height.first)

table-of-each-warp: scatter.cu, add_overlaps
- tables[cover.head == nullptr ? 0 : threadIdx.x / kWarp]
+ tables[threadIdx.x / kWarp]

near-without-order: overlap.cuh, add_overlaps
- near = plain || !Combine::kAdds;
+ near = true;

coverer-above: overlap.cuh, add_overlaps
- dh(i / 2 + (zone_h < 0 ? -1 : 0))
+ dh(i / 2)

coverer-order: overlap.cuh, add_overlaps
- dh(i / 2 + (zone_h < 0 ? -1 : 0)), dw(i % 2 + (zone_w < 0 ? -1 : 0))
+ dh(i % 2 + (zone_h < 0 ? -1 : 0)), dw(i / 2 + (zone_w < 0 ? -1 : 0))

coverer-beyond-reach: overlap.cuh, add_overlaps
- dw <= (zone_w > 0 ? 1 : 0)
+ true

zone-of-all-neighbours: overlap.cuh, scatter_overlaps
- lane < 9 && other.reaches ?
+ lane < 9 ?

first-writer: overlap.cuh, add_overlaps
- found == kNoRow || found >= row;
+ found == kNoRow || found <= row;

last-writer: overlap.cuh, scatter_overlaps
- last &= found <= row;
+

first-for-last: overlap.cuh, scatter_overlaps
- Combine::kAdds ? first : last
+ first

alone-in-company: overlap.cuh, add_overlaps
- first && last);
+ first);

ballot-of-lane-31: overlap.cuh, scatter_overlaps
- __ballot_sync(0xffffffffu, first
+ __ballot_sync(0x7fffffffu, first

zones-transposed: overlap.cuh, scatter_overlaps
- zones >> (3 * (zone_h + 1) + zone_w + 1)
+ zones >> (3 * (zone_w + 1) + zone_h + 1)

owned-and-summed: overlap.cuh, add_overlaps
- has(Combine::kAdds ? alone : writes,
+ has(writes,

owned-twice: overlap.cuh, add_overlaps
- has(writes & ~alone,
+ has(writes,

zone-in-the-middle: overlap.cuh, add_overlaps
- {0, kBlockH - task.overlap.stride_h,
+ {0, task.overlap.stride_h,

zone-above-the-share: overlap.cuh, add_overlaps
- if (begin < share.begin) begin = share.begin;
+

zone-below-the-share: overlap.cuh, add_overlaps
- if (end > share.end) end = share.end;
+

zone-above-the-image: overlap.cuh, add_overlaps
- if (begin < at.inside.row_begin) begin = at.inside.row_begin;
+

zone-below-the-image: overlap.cuh, add_overlaps
- if (end > at.inside.row_end) end = at.inside.row_end;
+

zone-beside-the-image: overlap.cuh, add_overlaps
- if (column.column < at.inside.column_begin || column.column >= at.inside.column_end) continue;
+

zone-stride: overlap.cuh, add_overlaps
- other.dh * t.height.stride
+ other.dh * t.width.stride

zone-column-stride: overlap.cuh, add_overlaps
- other.dw * t.width.stride * t.stack_strides[2]
+ other.dw * t.width.stride * t.stack_strides[1]

zone-of-own-row: overlap.cuh, add_overlaps
- source[i] = row * t.stack_strides[0] +
+ source[i] = at.stack_origin +

quarter-missing: overlap.cuh, add_overlaps
- for (int i = 0; i < 4; ++i) { if (there[i]) sum
+ for (int i = 0; i < 3; ++i) { if (there[i]) sum

zone-of-one-line: overlap.cuh, add_overlaps
- source[i] += kBatch * t.stack_strides[1];
+ ;

neighbour-too-far: overlap.cuh, add_overlaps
- (kBlockH - 1 - row) / overlap.stride_h
+ (kBlockH - row) / overlap.stride_h

neighbours-above-only: overlap.cuh, add_overlaps
- int64{at.cell_h} + static_cast<int64>(row / overlap.stride_h)
+ int64{at.cell_h}

far-below-grid: overlap.cuh, scatter_overlaps
- h <= bottom && h < t.height.count
+ h <= bottom

far-before-grid: overlap.cuh, scatter_overlaps
- left < 0 ? 0 : left
+ left

same-row-for-ever: overlap.cuh, add_overlaps
- found <= previous
+ found < previous

list-out-of-turn: overlap.cuh, add_overlaps
- found < best.row
+ found > best.row

far-outside: overlap.cuh, scatter_overlaps
- if (!at.inside.contains(block_row, column.column)) continue;
+

far-of-all-lines: overlap.cuh, add_overlaps
- block_row = share.begin; block_row
+ block_row = 0; block_row

far-writer: overlap.cuh, scatter_overlaps
- writes = previous != (Combine::kAdds ? kNoRow : row) || next.row == row;
+ writes = true;

far-adder: overlap.cuh, add_overlaps
- writes = previous != (Combine::kAdds ? kNoRow : row) || next.row == row;
+ writes = true;

far-stride: overlap.cuh, add_overlaps
- next.dh * t.height.stride
+ next.dh * t.width.stride

far-of-own-row: overlap.cuh, add_overlaps
- next.row * t.stack_strides[0] +
+ at.stack_origin +

far-in-tiles: overlap.cuh, add_tiled_overlaps
- next.dw * t.width.stride * t.stack_strides[2]
+ 0

zone-in-tiles: overlap.cuh, add_tiled_overlaps
- other.dw * t.width.stride * t.stack_strides[2]
+ 0

cover-rows: cover.cu, scatter
- if (row >= t.rows) return nullptr;
+

head-is-any-row: cover.cu, scatter
- atomicMax(head, static_cast<int>(row))
+ *head = static_cast<int>(row)

list-descends: cover.cu, add
- after < row
+ after > row

list-ends-early: cover.cu, add
- (cover.next + row) = after;
+ (cover.next + row) = kNoRow;

activate-outside: activate.cu, activate
- if (is_inside[u]) result
+ result

activate-before-image: activate.cu, activate
- static_cast<Index>(y < 0 ? -y : 0)
+ 0

activate-past-image: activate.cu, activate
- right < a.block_w ? right : a.block_w
+ a.block_w

activate-rows-for-columns: activate.cu, activate
- x = a.width.start + at.cell_w * a.width.stride
+ x = a.width.start + at.cell_h * a.width.stride

activate-rows-out-of-use: activate.cu, activate
- if (!at.touches_image) return {0, 0, 0, 0};
+

activate-batch: activate.cu, activate
- t.batch = a.batch;
+ t.batch = a.batch + 1;

activate-no-indices: activate.cu, activate
- if (a.indices == nullptr) return
+ if (false) return

activate-division: activate.cu, activate
- row = pixel / block_w;
+ row = pixel / static_cast<Index>(a.block_h);

activate-last-pixel: activate.cu, activate
- if (first + u * step >= pixels) break;
+

activate-load-past-the-end: activate.cu, activate
- first + u * step < pixels ? first + u * step : pixels - 1
+ first + u * step

activate-step: activate.cu, activate
- first += kLoads * step
+ first += step * kLoads * 2

activate-source-row: activate.cu, activate
- blockIdx.x * a.source_strides[0]
+ blockIdx.x * a.target_strides[0]

activate-one-pass-of-words: activate.cu, activate
- word += blockDim.x
+ word += a.words

affine-channel: affine.cuh, activate
- (address, channel + i)
+ (address, channel)

affine-shift-first: affine.cuh, activate
- if (has_scale) y = mul_exact(y, scale[i]); if (has_shift) y = add_exact(y, shift[i]);
+ if (has_shift) y = add_exact(y, shift[i]); if (has_scale) y = mul_exact(y, scale[i]);

affine-always-relu: affine.cuh, activate
- return has_relu && greater_exact
+ return greater_exact

affine-without-scale: affine.cuh, activate
- has_scale(scales != nullptr)
+ has_scale(true)

affine-nan-to-zero: affine.cuh, activate
- greater_exact(Wide{0}, y) ? Wide{0} : y;
+ !greater_exact(y, Wide{0}) ? Wide{0} : y;

affine-rounded-twice: affine.cuh, activate
- step(Addition<T>::begin(x.lane[i]), i)
+ Addition<Out>::begin(Addition<Out>::end(step(Addition<T>::begin(x.lane[i]), i) * 0.999f))

product-of-sums: ptx.cuh, activate
- product) : "f"(a), "f"(b)); return product; #else return a * b;
+ product) : "f"(a), "f"(b)); return product; #else return a + b;

rounded-at-each-sum: combine.cuh, add_half
- return add_exact(total, __half2float(value));
+ return __half2float(__float2half_rn(add_exact(total, __half2float(value))));

one-lane-for-all: combine.cuh, add_half
- Number::begin(base.lane[i])
+ Number::begin(base.lane[0])

pool-last-column: reduce_mask.cu, mask
- phase < size ||
+ phase < size - 1 ||

pool-next-block: reduce_mask.cu, mask
- || phase + kLanes > stride
+

pool-covered-before: reduce_mask.cu, mask
- || x < begin) return true;
+ ) return true;

pool-past-strip: reduce_mask.cu, mask
- if (x >= used) return false;
+

pool-before-image: reduce_mask.cu, mask
- begin = origin < 0 ? 0 : origin;
+ begin = origin;

pool-past-image: reduce_mask.cu, mask
- end = origin + axis.size < axis.extent ? origin + axis.size : axis.extent;
+ end = origin + axis.size;

pool-first-block: reduce_mask.cu, mask
- start + (block - first_block()) * stride
+ start + block * stride

pool-without-batch: reduce_mask.cu, mask
- image * r.mask_strides[0] +
+

pool-left-of-image: reduce_mask.cu, mask
- s.left = s.origin < 0 ? 0 : s.origin;
+ s.left = s.origin;

pool-right-of-image: reduce_mask.cu, mask
- s.right = right < r.width.extent ? right : r.width.extent;
+ s.right = right;

pool-last-of-strip: reduce_mask.cu, mask
- (s.inside - 1) * r.width.stride
+ (s.inside - 2) * r.width.stride

pool-strip-too-long: reduce_mask.cu, mask
- blocks_w - s.first < blocks ? blocks_w - s.first : blocks
+ blocks

pool-skipped: reduce_mask.cu, mask
- const int k = block - skipped;
+ const int k = block;

pool-misaligned: reduce_mask.cu, mask
- begin = s.left - (s.left & (kLanes - 1));
+ begin = s.left;

pool-piece-begin: reduce_mask.cu, mask
- first = first > 0 ? first : 0;
+

pool-piece-end: reduce_mask.cu, mask
- last = last < width ? last : width;
+

pool-rows-read-twice: reduce_mask.cu, mask
- corner + y * r.mask_strides[1] +
+ corner +

pool-rows-too-many: reduce_mask.cu, mask
- bottom - top - y, column
+ bottom - top, column

pool-row-not-there: reduce_mask.cu, mask
- offset += u * distance < rows ? step : 0;
+ offset += step;

pool-next-rows: reduce_mask.cu, mask
- } offset += step;
+ }

pool-counted-twice: reduce_mask.cu, mask
- const bool valid = u * distance < rows;
+ const bool valid = true;

pool-barrier-after-put: reduce_mask.cu, mask
- shared.put(column); __syncthreads();
+ shared.put(column);

pool-barrier-before-put: reduce_mask.cu, mask
- if (first != begin) __syncthreads();
+

pool-word-of-strip: reduce_mask.cu, mask
- number * r.strip_words +
+ number +

pool-threads-without-block: reduce_mask.cu, mask
- if (thread % kWarp == 0 && thread < strip.count) {
+ if (thread % kWarp == 0) {

pool-shift: pool.cuh, mask
- bits <<= thread % kSharers * kLanes;
+

pool-sharers: pool.cuh, mask
- distance < kSharers;
+ distance < kSharers / 2;

pool-bits-before: pool.cuh, mask
- ~0u << (first > 0 ? first : 0)
+ ~0u

pool-bits-after: pool.cuh, mask
- if (last < kWarp) wanted &= ~(~0u << last);
+

pool-next-word: pool.cuh, mask
- word * kWarp < end; ++word
+ word * kWarp < begin; ++word

pool-rows-left-out: pool.cuh, mask
- row < static_cast<int>(blockDim.y); ++row) { found
+ row < 1; ++row) { found

pool-sum-rows-left-out: pool.cuh, mask
- row < static_cast<int>(blockDim.y); ++row) { #pragma unroll 1 for
+ row < 1; ++row) { for

pool-pieces-not-added: pool.cuh, mask
- mine.any |= found != 0;
+ mine.any = found != 0;

pool-sum-pieces-not-added: pool.cuh, mask
- mine.sum.add(blocks[thread]);
+ mine.sum = blocks[thread];

pool-barrier-between-sums: pool.cuh, mask
- blocks[k] = block; } __syncthreads();
+ blocks[k] = block; }

pool-every-lane: pool.cuh, mask
- if (thread % kWarp == 0) blocks[k] = block;
+ if (thread % kWarp == 1) blocks[k] = Sum{};

pool-half-a-warp: pool.cuh, mask
- int distance = kWarp / 2; distance
+ int distance = kWarp / 4; distance

pool-lane-31: pool.cuh, mask
- __shfl_xor_sync(0xffffffffu, bits, distance)
+ __shfl_xor_sync(0x7fffffffu, bits, distance)

pool-equal: pool.cuh, mask
- pixel > static_cast<T>(t.integer)
+ pixel >= static_cast<T>(t.integer)

pool-high-half: pool.cuh, mask
- high += other.high
+ high = other.high

average-equal: pool.cuh, mask
- sum.value() / t.area > t.tol
+ sum.value() / t.area >= t.tol

sum-barrier: reduce_mask.cu, compact
- = b; } __syncthreads();
+ = b; }

sum-one-warp: reduce_mask.cu, compact
- for (int w = 0; w < kWarps; ++w)
+ for (int w = 0; w < 1; ++w)

scan-lane: reduce_mask.cu, compact
- if (lane >= distance)
+ if (lane > distance)

words-past-the-tile: reduce_mask.cu, compact
- chunk + lane < last ? r.words[chunk + lane] : 0
+ r.words[chunk + lane]

words-not-listed: reduce_mask.cu, compact
- k < words; k += warps
+ k < words; k += 2 * warps

next-chunk: reduce_mask.cu, compact
- next_row += __shfl_sync(0xffffffffu, through, kWarp - 1);
+

row-of-own-lane: reduce_mask.cu, compact
- __popc(bits >> lane)
+ __popc(bits >> (lane + 1))

block-not-active: reduce_mask.cu, compact
- (bits >> lane & 1) == 0 ||
+

blocks-of-a-word: reduce_mask.cu, compact
- static_cast<unsigned int>(r.word_blocks) + lane
+ kWarp + lane

count-step: reduce_mask.cu, compact
- k < end; k += kCompactThreads
+ k < end; k += 2 * kCompactThreads

count-tile: reduce_mask.cu, compact
- r.tile_counts[blockIdx.x] = count
+ r.tile_counts[0] = count

compact-before: reduce_mask.cu, compact
- k < mine ? active : 0
+ k <= mine ? active : 0

compact-tile-counts: reduce_mask.cu, compact
- r.words_end : r.tiles
+ r.words_end : r.tiles + 1

compact-capacity: reduce_mask.cu, compact
- || row >= r.capacity)
+ || row > r.capacity)

compact-axes-swapped: reduce_mask.cu, compact
- line - image * static_cast<unsigned int>(r.blocks_h)
+ line - image * static_cast<unsigned int>(r.blocks_w)

compact-padding: reduce_mask.cu, compact
- if (r.pad == 0) return;
+ if (r.pad < 2) return;

compact-count-of-all: reduce_mask.cu, compact
- if (blockIdx.x == 0 && threadIdx.x == 0) tell_count(r, count);
+ if (blockIdx.x == 0 && threadIdx.x == 0) tell_count(r, before);

fused-too-early: reduce_mask.cu, compact
- atomicAdd(arrivals, 1u) == gridDim.x - 1
+ atomicAdd(arrivals, 1u) == gridDim.x - 2

fused-barrier: reduce_mask.cu, compact
- == gridDim.x - 1; __syncthreads();
+ == gridDim.x - 1;

fused-once-only: reduce_mask.cu, compact
- *r.arrivals = 0;
+

fused-count: reduce_mask.cu, compact
- tell_count(r, count); *r
+ *r

pack-column: pack.cu, pack
- rest / p.chunks * kColumns + column
+ rest / p.chunks * kColumns + (column ^ 1)

pack-part: pack.cu, pack
- * lanes + part * (lanes / 4), rest
+ * lanes + part, rest

pack-positions: pack.cu, pack
- at.position >= p.positions || at.feature
+ at.feature

pack-pieces: pack.cu, pack
- return {piece % p.positions, piece / p.positions * lanes
+ return {piece / p.positions, piece % p.positions * lanes

pack-turned: pack.cu, pack
- place / 2 * (2 * p.together) + 2 * n + place % 2;
+ place / 2 * (2 * p.together) + n + place % 2 * p.together;

pack-rounding: pack.cu, pack
- numbers.lane[i] = round_tf32(numbers.lane[i]);
+ (void)numbers;

pack-chunk: pack.cu, pack
- (chunk * p.chunk + piece % p.chunk)
+ (chunk + piece % p.chunk)

window-begin: window.cuh, conv_plain
- begin = first < 0 ? -first : 0;
+ begin = 0;

window-end: window.cuh, conv_plain
- end = extent - first < size ? extent - first : size;
+ end = size;

channels-beyond: window.cuh, conv_plain
- const bool exists = first + k < channels;
+ const bool exists = true;

affine-without-relu: window.cuh, layers
- return has_relu ? max_exact(y, 0.0f) : y;
+ return y;

zeros-activated: window.cuh, layers
- if (at >= kPixels || !window.contains(at / kWidth, at % kWidth)) continue;
+ if (at >= kPixels) continue;

activated-channels: window.cuh, bottleneck
- norms[(step * kStepPieces + piece) * 4 + word];
+ norms[piece * 4 + word];

activated-shifts: window.cuh, bottleneck
- (2 * word + is_shift) * kNumbers, lists + k * kNumbers,
+ (2 * word + is_shift) * kNumbers, lists + word * kNumbers,

activated-words: window.cuh, bottleneck
- norms[(step * kStepPieces + piece) * 4 + word];
+ norms[(step * kStepPieces + piece) * 4];

activated-beyond: window.cuh, bottleneck
- if (!kWholeSteps && piece >= pieces) return word;
+

activated-without-relu: window.cuh, bottleneck
- least(relu ? 0.0f : -__int_as_float(0x7f800000))
+ least(0.0f)

piece-of-the-window: window.cuh, conv
- Rows::offset(of_pixel) + piece() * Rows::kPieceStep
+ Rows::offset(of_pixel)

rounding-of-the-window: window.cuh, conv_wgmma
- rounded.lane[i] = round_tf32(rounded.lane[i]);
+ rounded.lane[i] *= 0.99f;

fetched-beyond: window.cuh, conv_wgmma
- (at < kPixels) & (begin < channels) & window.contains(y, x);
+ (at < kPixels) & (begin < channels);

wgmma-barrier: conv_wgmma.cu, conv_wgmma
- show_to_warpgroups(); __syncthreads();
+ show_to_warpgroups();

wgmma-part-not-awaited: conv_wgmma.cu, conv_wgmma
- wait_async_groups<kParts - 1 - kPart + kNext>
+ wait_async_groups<kParts - kPart + kNext>

wgmma-groups-of-the-last-chunk: conv_wgmma.cu, conv_wgmma
- for (int k = 0; k < Staging::kGroups; ++k) commit_async();
+

wgmma-beyond-the-count: conv_wgmma.cu, conv_wgmma
- if (blockIdx.x >= tiles || !exists) return;
+ if (!exists) return;

wgmma-blocks-that-do-not-exist: conv_wgmma.cu, conv_wgmma
- if (blockIdx.x >= tiles || !exists) return;
+ if (blockIdx.x >= tiles) return;

wgmma-window-of-a-chunk: conv_wgmma.cu, conv_wgmma
- const int channel = chunk * Shape::kChunk * kPiece<T>,
+ const int channel = chunk * 0,

wgmma-weights-of-a-chunk: conv_wgmma.cu, conv_wgmma
- start_weights<Shape, Layout, part.value>(weights(chunk), c, chunk * Shape::kWeightRows);
+ start_weights<Shape, Layout, part.value>(weights(chunk), c, 0);

wgmma-weights-of-a-split: conv_wgmma.cu, conv_wgmma
- static_cast<int64>(first) * columns + blockIdx.y * Layout::kAllColumns;
+ static_cast<int64>(first) * columns;

wgmma-weights-of-a-share: conv_wgmma.cu, conv_wgmma
- share < Depth::kShares;
+ share < 1;

wgmma-last-weights: conv_wgmma.cu, conv_wgmma
- if (static_cast<int>(threadIdx.x) < kLeft) copy(begin + kTurns * kProductThreads);
+

wgmma-features: conv_wgmma.cu, conv_wgmma
- if (feature < features) store(
+ store(

wgmma-scale-of-a-feature: conv_wgmma.cu, conv_wgmma
- const int feature = Shape::Order::feature_of(first_column + k);
+ const int feature = first_column + k;

wgmma-ragged: conv_wgmma.cu, conv_wgmma
- const bool exists = y < tile.y.size && x < tile.x.size && (inside[m][r] || stack);
+ const bool exists = inside[m][r] || stack;

wgmma-inside: conv_wgmma.cu, conv_wgmma
- if (!inside[m][r]) number[i] = 0.0f;
+

wgmma-relu: conv_wgmma.cu, conv_wgmma
- least(c.target_relu != 0 ? 0.0f : -__int_as_float(0x7f800000))
+ least(0.0f)

warpgroup-rows: warpgroup.cuh, conv_wgmma
- kWarp % 4 * 2 + depth + r; }
+ kWarp % 4 + (depth + r) * 4; }

warpgroup-squares: warpgroup.cuh, conv_wgmma
- return (square + m) / kSquaresW * kSide;
+ return (square + m) % kSquaresW * kSide;

warpgroup-columns: warpgroup.cuh, conv_wgmma
- column = group / (kGroupsM * kDepth) * kN * kColumns;
+ column = 0;

warpgroup-depth-of-the-window: warpgroup.cuh, conv_wgmma
- shared_piece(window) + layout.depth * (Depth::kPlanes * Planes::kPlane);
+ shared_piece(window);

warpgroup-depth-of-the-weights: warpgroup.cuh, conv_wgmma
- layout.column + layout.depth * (2 * Depth::kSteps * kRowColumns)) {
+ layout.column) {

warpgroup-depth-of-the-sums: warpgroup.cuh, conv_wgmma
- kWarp % 4 * 2 + depth + r; }
+ kWarp % 4 * 2 + r; }

exchange-of-a-row: warpgroup.cuh, conv_wgmma
- const Pair given{{is_first ? sums[2] : sums[0], is_first ? sums[3] : sums[1]}};
+ const Pair given{{sums[0], sums[1]}};

exchange-barrier: warpgroup.cuh, conv_wgmma
- }); __syncthreads(); const int other
+ }); const int other

exchange-with-the-other: warpgroup.cuh, conv_wgmma
- const int other = thread ^ kGroupThreads;
+ const int other = thread;

warpgroup-first-product: warpgroup.cuh, conv_wgmma
- adds || step > 0);
+ true);

warpgroup-positions: warpgroup.cuh, conv_wgmma
- position / kKernelW * Planes::kW + position % kKernelW;
+ position % kKernelW * Planes::kW + position / kKernelW;

feature-order: warpgroup.cuh, conv_wgmma
- place / 2 * (2 * kTogether) + 2 * n + place % 2;
+ place / 2 * (2 * kTogether) + n + place % 2 * kTogether;

depth-left-out: window.cuh, conv_chunks
- for (int d = 0; d < kDepth; ++d) { #pragma unroll for
+ for (int d = 1; d < kDepth; ++d) { for

depth-steps: window.cuh, conv_chunks
- return steps * (depth + 1) / kDepth;
+ return steps * (depth + 1) / (kDepth + 1);

depth-tiles: window.cuh, conv_chunks
- for (int k = depth; k < kTiles; k += kDepth)
+ for (int k = depth; k < kTiles - 1; k += kDepth)

depth-barrier: window.cuh, conv_chunks
- sum[3]}}; } __syncthreads(); for (int k = depth;
+ sum[3]}}; } for (int k = depth;

sum-rows: window.cuh, conv
- return row + m * kRows + r * 8 +
+ return row + m * kRows + r * 4 +

window-rows: window.cuh, bottleneck
- from += kAtOnce * window.row_stride;
+ from += window.row_stride;

window-columns: window.cuh, bottleneck
- x = item / kPieces % kWidth,
+ x = item / kPieces % (kWidth - 1),

totals-depth: window.cuh, bottleneck
- return turn * kDepth + depth;
+ return turn * kDepth;

totals-barrier: window.cuh, bottleneck
- __syncthreads(); } #pragma unroll for (int turn = 0; turn < kTotals;
+ } for (int turn = 0; turn < kTotals;

words-of-the-upper: window.cuh, bottleneck
- upper ? low : high, step);
+ low, step);

words-steps: window.cuh, bottleneck
- word[step == 1 ? 2 * k + 1 : k + 2];
+ word[2 * k + 1];

results-edge: window.cuh, bottleneck
- exists[m][r] = dy < height && dx < width;
+ exists[m][r] = dy < height;

results-pieces: window.cuh, bottleneck
- if (!exists[m][r] || turn * 4 + t >= kPieces) continue;
+ if (!exists[m][r]) continue;

results-columns: products.cuh, bottleneck
- (column / 2 + column % 2 * 4) * 4 + lane % 4 : lane;
+ lane : lane;

results-columns-plain: products.cuh, bottleneck
- t + 4 * k : 2 * t + k;
+ 2 * t + k : 2 * t + k;

rows-of-a-product: products.cuh, conv_plain
- return lane / 4 + 8 * k;
+ return lane / 4 + 4 * k;

weights-of-a-step: products.cuh, conv
- b.lane[2 * half], b.lane[2 * half + 1], T{});
+ b.lane[2 * half + 1], b.lane[2 * half], T{});

weights-ahead: products.cuh, conv_chunks
- if (next < end) ahead[slot].load(at(next), column_stride);
+ if (next + 1 < end) ahead[slot].load(at(next), column_stride);

columns-of-weights: products.cuh, conv_plain
- t + 4 * k : 2 * t + k;
+ t + 4 * k : t + 4 * k;

conv-kernel-rows: window.cuh, conv_plain
- Rows::offset(dy, dx) + piece
+ Rows::offset(dx, dy) + piece

conv-pieces: window.cuh, conv_chunks
- offset(dy, dx) + piece * kPieceBytes : kNoPiece;
+ offset(dy, dx) : kNoPiece;

conv-stride: conv.cu, conv
- offset(y * Shape::kStrideH, x * Shape::kStrideW)
+ offset(y * Shape::kStrideH, x)

conv-padding: conv.cuh, conv_plain
- x.first) * Shape::kStrideW - (stack ? 0 : static_cast<int>(c.width.pad));
+ x.first) * Shape::kStrideW - (stack ? 0 : static_cast<int>(c.height.pad));

conv-padding-of-a-stack: conv.cuh, layers
- y.first) * Shape::kStrideH - (stack ? 0 : static_cast<int>(c.height.pad));
+ y.first) * Shape::kStrideH - static_cast<int>(c.height.pad);

conv-outside-of-a-stack: conv.cuh, layers
- if (!pixels.inside[r]) number[i] = 0.0f;
+

conv-last-feature: conv.cuh, conv_plain
- if (has(n, 1)) to[target.channel_stride] =
+ to[target.channel_stride] =

conv-outside: conv.cuh, conv_plain
- (x < width) & (inside | (c.target_is_stack != 0));
+ (x < width);

conv-residual: conv.cuh, layers
- brought[k].of_pixel[r].lane[i]);
+ brought[k].of_pixel[r].lane[0]);

conv-residual-feature: conv.cuh, layers
- residual.offset(y, x) + feature * step(residual) : 0;
+ residual.offset(y, x) : 0;

conv-residual-of-another-tile: window.cuh, layers_plans
- brought[n] = bring(pixels, n);
+ brought[n] = bring(pixels, 0);

conv-residual-of-the-next: window.cuh, layers
- next = bring(pixels_of(depth / kN), depth % kN);
+ next = bring(pixels_of(0), 0);

conv-tile-of-a-row: conv.cuh, conv_depth
- int n = first + k;
+ int n = k;

conv-window-not-awaited: conv.cu, conv
- wait_async_groups<0>();
+ wait_async_groups<1>();

conv-chunk-not-awaited: conv.cu, conv_chunks
- wait_async_groups<1>();
+ wait_async_groups<2>();

conv-chunk: conv.cu, conv_chunks
- k * Shape::kChunk * kPiece<T>, static_cast<int>(c.channels));
+ 0, static_cast<int>(c.channels));

conv-weights-of-a-chunk: conv.cu, conv_chunks
- Weights(weights + k * Shape::kSteps * kWarp, column_stride, begin, end);
+ Weights(weights, column_stride, begin, end);

tiles-batch: window.cuh, conv
- return image < a.batch && block_h
+ return block_h

conv-count: conv.cu, conv
- (active < c.rows ? active : c.rows) * c.tiles;
+ c.rows * c.tiles;

bottleneck-border: bottleneck.cu, bottleneck
- inside ? max_exact(y, 0.0f) : 0.0f;
+ max_exact(y, 0.0f);

bottleneck-halo: window.cuh, bottleneck
- exists ? Rows::offset(dy, dx)
+ exists ? Rows::offset(dy, 0)

bottleneck-chunk: window.cuh, bottleneck_chunks
- chunk * Depth::kChunk + within % Depth::kChunk;
+ within % Depth::kChunk;

bottleneck-room-of-a-chunk: window.cuh, bottleneck_chunks
- kRoom = Depth::kChunkSteps * kStepPieces;
+ kRoom = Depth::kSteps * kStepPieces;

bottleneck-steps: window.cuh, bottleneck_chunks
- kSteps = (kPieces + kChunk - 1) / kChunk * kChunkSteps;
+ kSteps = (kPieces * kPositions + kStepPieces - 1) / kStepPieces;

pieces-in-order: products.cuh, bottleneck_chunks
- return (first + piece) * kPieceBytes;
+ return piece * kPieceBytes;

bottleneck-edge: bottleneck.cuh, bottleneck
- if (in_image < span.size) span.size = in_image;
+

bottleneck-shortcut: window.cuh, bottleneck
- number[i] = Addition<T>::begin(shortcut.lane[i]) +
+ number[i] =

bottleneck-norms: bottleneck.cu, bottleneck
- layout1, sums1, scale2, shift2,
+ layout1, sums1, scale3, shift3,

bottleneck-shortcuts-place: bottleneck.cu, bottleneck
- WindowRows::offset(y.first - top, x.first - left)
+ WindowRows::offset(y.first - top, 0)

bottleneck-window: bottleneck.cu, bottleneck
- left = x.first - static_cast<int>(b.width.pad);
+ left = x.first;

bottleneck-count: bottleneck.cu, bottleneck
- (active < b.rows ? active : b.rows) * b.tiles;
+ b.rows * b.tiles;

bottleneck-part: bottleneck.cu, bottleneck_plans
- start_rows(window, source + part * (kC / kParts));
+ start_rows(window, source);

bottleneck-part-not-awaited: bottleneck.cu, bottleneck_plans
- kAtOnce - 1 : kParts - part);
+ kAtOnce : kParts - part + 1);

bottleneck-near-weights-not-awaited: bottleneck.cu, bottleneck_plans
- if constexpr (kNear2 || kNear3) wait_async_groups<0>();
+

bottleneck-weights-of-a-part: bottleneck.cu, bottleneck_plans
- (kSteps - kPartSteps) + part * kPartSteps) * kWarp;
+ (kSteps - kPartSteps)) * kWarp;

bottleneck-steps-of-a-part: bottleneck.cu, bottleneck_plans
- part * kPartSteps, kPartSteps);
+ 0, kPartSteps);

bottleneck-pass: bottleneck.cu, bottleneck_plans
- const int following = (pass + Layout3::kAllColumns) % kC
+ const int following = pass % kC

groups-count: bottleneck_wgmma.cu, bottleneck_wgmma
- (active < b.rows ? active : b.rows) * b.tiles;
+ b.rows * b.tiles;

groups-blocks-that-do-not-exist: bottleneck_wgmma.cu, bottleneck_wgmma
- if (!(is_listed & exists & (y.size > 0) & (x.size > 0))) {
+ if (!is_listed) {

groups-meeting-without-a-tile: bottleneck_wgmma.cu, bottleneck_wgmma
- arrive(b.meeting); leave(b, tiles); } return;
+ } return;

groups-meeting-not-left: bottleneck_wgmma.cu, bottleneck_wgmma
- if (b.meeting != nullptr && threadIdx.x == 0) leave(b, tiles); } }
+ } }

groups-window: bottleneck_wgmma.cu, bottleneck_wgmma
- y.first - pad_h, x.first - pad_w);
+ y.first - pad_h, x.first);

groups-window-outside: window.cuh, bottleneck_wgmma
- const bool inside = window.contains(pixel(turn) / kWidth, pixel(turn) % kWidth);
+ const bool inside = true;

groups-window-without-a-halo: window.cuh, bottleneck_wgmma
- at / kWidth * row_stride + at % kWidth * column_stride + piece() * kPiece<T>;
+ at / kWidth * row_stride + piece() * kPiece<T>;

groups-window-beyond: window.cuh, bottleneck_wgmma
- pixel(turn) < kPixels ? pixel(turn) : kPixels - 1;
+ pixel(turn) * 64;

groups-last-pixels: window.cuh, bottleneck_wgmma
- if ((turn + 1) * kStep <= kPixels || at < kPixels) visit(turn, at);
+ if ((turn + 1) * kStep <= kPixels) visit(turn, at);

groups-threads-without-pixels: window.cuh, bottleneck_wgmma
- if (first >= kStep) return; #pragma unroll for (int turn = 0;
+ for (int turn = 0;

groups-channels-activated: bottleneck_wgmma.cu, bottleneck_wgmma
- b.activates != 0, Staged::piece() * kPiece<T>);
+ b.activates != 0, 0);

groups-always-activated: bottleneck_wgmma.cu, bottleneck_wgmma
- b.activates != 0, Staged::piece() * kPiece<T>);
+ true, Staged::piece() * kPiece<T>);

groups-first-weights-not-awaited: bottleneck_wgmma.cu, bottleneck_wgmma
- if (copies) wait_at(gates);
+

groups-last-weights-not-awaited: bottleneck_wgmma.cu, bottleneck_wgmma
- if (copies) wait_at(gates + 2);
+

groups-part-of-the-weights: ptx.cuh, bottleneck_wgmma
- for (int k = 0; k < bytes; k += 16) {
+ for (int k = 0; k < bytes - 16; k += 16) {

groups-barrier-of-the-window: bottleneck_wgmma.cu, bottleneck_wgmma
- wait_at(gates); __syncthreads();
+ wait_at(gates);

groups-barrier-of-the-middle: bottleneck_wgmma.cu, bottleneck_wgmma
- wait_at(gates + 1); __syncthreads();
+ wait_at(gates + 1);

groups-barrier-of-the-tile: bottleneck_wgmma.cu, bottleneck_wgmma
- __syncthreads(); bool may = may_write(b, tiles);
+ bool may = may_write(b, tiles);

groups-norms: bottleneck_wgmma.cu, bottleneck_wgmma
- middle, sums, layout, scale2, shift2,
+ middle, sums, layout, scale3, shift3,

groups-border: bottleneck_wgmma.cu, bottleneck_wgmma
- inside ? max_exact(y, 0.0f) : 0.0f;
+ max_exact(y, 0.0f);

groups-places-of-features: bottleneck_wgmma.cu, bottleneck_wgmma
- places[n] = feature / kLanes * Planes::kPieceStep + feature % kLanes * static_cast<int>(sizeof(T));
+ places[n] = feature / kLanes * Planes::kPieceStep;

groups-order-of-the-middle: bottleneck_wgmma.cu, bottleneck_wgmma
- FeatureOrder<kTogether>::feature_of(lane_column + n * kColumns);
+ lane_column + n * kColumns;

groups-rows-of-the-window: bottleneck_wgmma.cu, bottleneck_wgmma
- const int row = (square + m) * kRowsM +
+ const int row = square * kRowsM +

groups-of-the-window: bottleneck_wgmma.cu, bottleneck_wgmma
- square(group_number() * kM) {}
+ square(0) {}

groups-own-pixels: bottleneck_wgmma.cu, bottleneck_wgmma
- const int y = pixel / kHaloW - pad_h, x = pixel % kHaloW - pad_w;
+ const int y = pixel / kHaloW, x = pixel % kHaloW - pad_w;

groups-piece-of-the-shortcut: bottleneck_wgmma.cu, bottleneck_wgmma
- + Staged::piece() * kPieceBytes, 0, numbers.at[turn]);
+ , 0, numbers.at[turn]);

groups-shortcut: bottleneck_wgmma.cu, bottleneck_wgmma
- number[i] = sum + Addition<T>::begin(added.lane[i]);
+ number[i] = sum;

groups-pass: bottleneck_wgmma.cu, bottleneck_wgmma
- weights3 + pass * kPieceBytes, layout)
+ weights3, layout)

groups-rows-of-all-columns: bottleneck_wgmma.cu, bottleneck_wgmma
- typename Shape::Depth3, Layout3, kC>(
+ typename Shape::Depth3, Layout3>(

groups-features-of-a-pass: bottleneck_wgmma.cu, bottleneck_wgmma
- const int lane_column = pass + layout.column +
+ const int lane_column = layout.column +

groups-ragged: bottleneck_wgmma.cu, bottleneck_wgmma
- if (y >= height || x >= width) continue;
+

groups-exchange: bottleneck_wgmma.cu, bottleneck_wgmma
- sums.exchange(exchanged, layout);
+

groups-target-of-a-stack: bottleneck.cuh, bottleneck_wgmma
- (stack ? x.within : x.first)
+ (stack ? 0 : x.first)

tiles-of-a-block: window.cuh, conv_chunks
- within = tile * tile_size;
+ within = 0;

conv-clipped: conv.cuh, layers
- (y < height) & (x < width) &
+

conv-features: conv.cu, conv_chunks
- (first_feature + layout.column) / kColumns
+ layout.column / kColumns

bottleneck-meeting-not-left: bottleneck.cuh, bottleneck
- b.meeting[0] = b.meeting[1] = 0;
+ b.meeting[1] = 0;
"""

#: Changes that no run on a CPU can tell from the original, each with the reason.
SURVIVORS = """
across-part-tail: tile.cuh, scatter_back
= pixels beyond the last part are beyond the block's last row, too: they are zeros that nothing reads
- (Shape::kBlocks == 1 || block < blocks) && (Shape::kWhole || pixel < pixels)
+ (Shape::kBlocks == 1 || block < blocks)

no-fence: cover.cu, add
= fibers see each other's writes at once, and in order
- __threadfence();
+

fused-no-fence: reduce_mask.cu, compact
= blocks run one after the other
- __threadfence(); __syncthreads(); if
+ __syncthreads(); if

fused-no-fence-after: reduce_mask.cu, compact
= blocks run one after the other
- __syncthreads(); __threadfence(); return last;
+ __syncthreads(); return last;

no-compare-and-swap: cover.cu, add
= fibers switch at barriers and warp functions only, so two never update a word at one time
- atomicCAS(link, after, row) == after
+ (*link = row, true)

bank-conflicts: tile.cuh, gather_tiled
= the same result, only slower: whoever writes or reads a tile asks for the same slot
- pixel / kEvery % 8
+ 0

wgmma-zeros: conv_wgmma.cu, conv_wgmma
= weights are zero there, and what shared memory begins with on a CPU is no NaN
- staging.clear_zeros();
+

wgmma-list-read-once: conv_wgmma.cu, conv_wgmma
= kernels run one after the other, so that no list changes on the way
- at = listed;
+

wgmma-list-seen-otherwise: conv_wgmma.cu, conv_wgmma
= as if another block had been listed before: it is looked at again, and the window is brought again
- at(c, blockIdx.x, Freshly()), listed;
+ at(c, blockIdx.x, Freshly()), listed; at.block_w ^= 1;

wgmma-list-seen-empty: conv_wgmma.cu, conv_wgmma
= as if none had been listed before
- at(c, blockIdx.x, Freshly()), listed;
+ at(c, blockIdx.x, Freshly()), listed; at.image = -1;

wgmma-not-shown: conv_wgmma.cu, conv_wgmma
= the plain twins of products read what threads have written
- show_to_warpgroups(); __syncthreads();
+ __syncthreads();

groups-second-weights-not-awaited: bottleneck_wgmma.cu, bottleneck_wgmma
= the plain twin waits for all copies at the first gate, which is behind the start of these
- if (copies) wait_at(gates + 1);
+

groups-not-shown: bottleneck_wgmma.cu, bottleneck_wgmma
= the plain twins of products read what threads have written
- show_to_warpgroups(); if (copies) wait_at(gates);
+ if (copies) wait_at(gates);

groups-odd-plane: bottleneck_wgmma.cu, bottleneck_wgmma
= weights are zero there, and what shared memory begins with on a CPU is no NaN
- clear_plane_behind<typename Shape::MiddlePlanes>(middle);
+ static_cast<void>(0);

uneven-batches: transfer.cuh, gather
= the same result, only slower: more loads are waited for at the end of a block
- static_cast<int>((rows + batches - 1) / batches)
+ most

slot-of-a-row-alone: transfer.cuh, gather
= the host makes a slot as large as the CTA then
- alone ? 0 : t.by_slot(threadIdx.x)
+ t.by_slot(threadIdx.x)

gap-beside-an-overlap: overlap.cuh, add_overlaps
= the same result, only slower: such a grid counts as far
- t.width.stride < static_cast<int64>(kBlockW) ?
+ true ?

row-with-nothing-to-do: scatter.cu, add_overlaps
= the same result, only slower: no pixel lies inside, or its zones are another row's
- share.row, nearby); if (task.idle) return;
+ share.row, nearby);

searched-but-not-cleared: overlap.cuh, add_overlaps
= the poison in new memory is below every row, and counts as a twin
- if (threadIdx.x < 9) head[threadIdx.x] = kNoRow;
+

equal-blocks-not-told: overlap.cuh, add_overlaps
= the same result, only slower: such a row finds an earlier one for every pixel
- leaves_it |= overlaps
+ leaves_it |= false && overlaps

twins-not-told: overlap.cuh, scatter_overlaps
= the same result, only slower: the last row of its own block is another
- idle = Combine::kAdds ? twins.before : twins.after;
+
"""


class Mutant(NamedTuple):
    name: str
    file: str
    family: str
    reason: str
    old: str
    new: str


def parse(table: str) -> list[Mutant]:
    pattern = r"(.+): (.+), (\w+)\n(?:= (.+)\n)?- (.+)\n\+ ?(.*)"
    entries = [re.fullmatch(pattern, entry) for entry in table.strip().split("\n\n")]
    assert all(entries), "an entry is not of this form"
    return [Mutant(*entry.groups("")) for entry in entries if entry]


def mutated_text(mutant: Mutant) -> str:
    """Its file with the mistake."""
    pattern = r"\s+".join(map(re.escape, mutant.old.split()))
    text, count = re.subn(pattern, lambda _: mutant.new, (kernel_folder() / mutant.file).read_text())
    if count != 1:
        raise LookupError(
            f"mutant {mutant.name}: the text that it changes stands {count} times in {mutant.file}, not once. Where "
            f"the kernel has changed, adapt the mutant: {mutant.old}"
        )
    return text


def mutate(mutant: Mutant, folder: Path) -> Path:
    """A copy of the kernels with the mistake."""
    text = mutated_text(mutant)
    shutil.copytree(kernel_folder(), folder)
    (folder / mutant.file).write_text(text)
    return folder


def first_sign(family: list[Any], kernels: Path | None) -> str:
    """How the first call that goes wrong shows it; empty if none does."""
    for order in cpu_cuda.ORDERS:
        for call in family:
            try:
                call.check(order, kernels)
            except (cpu_cuda.KernelFault, Difference) as error:
                return f"{order.name}, {' '.join(str(error).split())}"
    return ""


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function that returns the folder of a mutant's kernels; in the background, all are compiled from the start."""
    folder = tmp_path_factory.mktemp("mutants")
    specs = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    needed = {name: {i for call in calls for i in call.kernels()} for name, calls in families().items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        builds: dict[str, list[Future[Path]]] = {}
        for mutant in (spec.params.get("mutant") for spec in specs):
            if isinstance(mutant, Mutant):
                with suppress(LookupError):  # raised again by the test of this mutant
                    path = mutate(mutant, folder / mutant.name)
                    builds[mutant.name] = cpu_cuda.submit(pool, needed[mutant.family], path)

        def finish(mutant: Mutant) -> Path:
            if mutant.name not in builds:
                mutated_text(mutant)  # says why
            for build in builds[mutant.name]:
                build.result()
            path = folder / mutant.name
            cpu_cuda.build(needed[mutant.family], path)
            return path

        yield finish
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", families())
def test_calls_of_a_family_pass_without_a_mistake(name: str) -> None:
    cpu_cuda.build({instance for call in families()[name] for instance in call.kernels()})
    assert first_sign(families()[name], None) == ""


def test_every_mutant_changes_one_place() -> None:
    """Those that the sample leaves out, too."""
    names = [mutant.name for mutant in parse(MUTANTS) + parse(SURVIVORS) if mutated_text(mutant)]
    assert len(set(names)) == len(names)


#: Each mutant is compiled anew, which takes about a second: by default every fifth one is, a sample of every file.
SAMPLE = 1 if os.environ.get("SBNET_CUPY_TEST_ALL") else 5


@pytest.mark.parametrize("mutant", parse(MUTANTS)[::SAMPLE], ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant, kernels: Any) -> None:
    folder = kernels(mutant)
    sign = first_sign(families()[mutant.family], folder).replace(f"{folder}/", "")
    print(f"{mutant.name} in {mutant.file}: {sign}")
    assert sign, "no call shows the mistake"


@pytest.mark.parametrize("mutant", parse(SURVIVORS), ids=lambda mutant: mutant.name)
def test_mutant_survives(mutant: Mutant, kernels: Any) -> None:
    assert first_sign(families()[mutant.family], kernels(mutant)) == "", f"it can be seen after all: {mutant.reason}"
