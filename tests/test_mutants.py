"""Proof that kernels on a CPU show their mistakes: each mutant is a kernel with one, which some call must notice."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cpu_cuda
import ml_dtypes
import numpy as np
import pytest
from cpu_cuda import calls
from cpu_cuda.calls import Call, Difference

from sbnet_cupy._sources import kernel_folder

if cpu_cuda.why_unavailable() and not os.environ.get("CI"):
    pytest.skip(cpu_cuda.why_unavailable(), allow_module_level=True)

BSIZE = (4, 7)
FLOAT32 = np.dtype(np.float32)


@functools.cache
def families() -> dict[str, list[Call]]:
    """Calls of one op each, which need few instantiations: every mutant compiles them anew."""

    def transfer(make: Any, *, dtype: np.dtype[Any] = FLOAT32, channels: int, **options: Any) -> list[Call]:
        patches = options.pop("patches", ())
        options = {"bsize": BSIZE, **options}
        cases = [calls.random_case(seed, dtype, channels, **options) for seed in range(4)]
        return [make(case, f"{dtype}-{channels}-{seed}", patches=patches) for seed, case in enumerate(cases)]

    def tiled(make: Any) -> list[Call]:
        return [
            *transfer(make, channels=72, rows=15, transpose=True, patches=calls.FEW_CTAS, bsize=(6, 12)),
            *transfer(make, channels=12, layouts=("nchw", "nhwc"), bsize=(6, 12)),
            *transfer(make, channels=72, rows=15, layouts=("nchw", "nhwc"), patches=calls.FEW_CTAS, bsize=(6, 12)),
        ]

    def scatter(add: bool) -> list[Call]:
        make = functools.partial(calls.scatter_call, add=add)
        many = calls.random_case(8, FLOAT32, 3, bsize=BSIZE, rows=300, size=(5, 6), bstride=BSIZE)
        found = calls.overlap_calls(add, False, BSIZE) + transfer(make, channels=16) + [make(many, "many")]
        return found if add else found + transfer(make, channels=160, rows=9, patches=calls.FEW_CTAS)

    add = functools.partial(calls.scatter_call, add=True)
    tiles = ((304, None), (304, 12000), (304, 100), (16384, None))
    steps = {call.name.removeprefix("activate-"): call for call in calls.activate_calls()}
    activated = ("float32-16", "float32-4", "float32-3", "float32-2", "float16-16", "float16-16-from-float32")
    activated += ("bfloat16-6", "from-strided", "many-words", "many-pixels", "many-pixels-image", "one-cta-a-row")
    activated += ("far-apart",)
    masks = {call.name.removeprefix("mask-"): call for call in calls.mask_calls()}
    pooled = (
        "uint8-max",
        "uint8-avg",
        "float32-max",
        "int64-avg",
        "int64-avg-high",
        "sliced",
        "wide-blocks-avg",
        "wide-gaps-avg",
    )
    return {
        "gather": [
            *transfer(calls.gather_call, channels=16),
            *transfer(calls.gather_call, channels=3, layouts=("reversed", "nhwc")),
            *transfer(calls.gather_call, channels=160, rows=9, patches=calls.FEW_CTAS),
            *transfer(calls.gather_call, channels=3, transpose=True, layouts=("nchw", "nhwc")),
        ],
        "gather_tiled": tiled(calls.gather_call),
        "scatter": scatter(False),
        "scatter_tiled": tiled(functools.partial(calls.scatter_call, add=False)),
        "add": scatter(True),
        "add_half": transfer(add, channels=4, dtype=np.dtype(np.float16))
        + transfer(add, channels=4, dtype=np.dtype(ml_dtypes.bfloat16)),
        "activate": [steps[name] for name in activated],
        "mask": [masks[name] for name in (*pooled, "several-strips-avg", "tall-avg")],
        "compact": [masks[f"tiles-of-{tile}-capacity-{capacity}"] for tile, capacity in tiles],
    }


#: What each mutant is called, the file that it changes, the family that has to notice, the text and its replacement.
#: Any white space in a text stands for any other.
MUTANTS = """
count-of-rows: transfer.cuh, gather
- row < count && n >= 0
+ row <= count && n >= 0

batch-bound: transfer.cuh, gather
- n < t.batch
+ n <= t.batch

negative-batch: transfer.cuh, gather
- n >= 0 &&
+

cell-bound: transfer.cuh, gather
- cell_w < t.width.count;
+ cell_w <= t.width.count;

image-without-batch: transfer.cuh, gather
- n * t.image_strides[0] +
+

row-index-for-column: transfer.cuh, gather
- triple[2 * t.index_strides[1]]
+ triple[t.index_strides[1]]

clip-end: transfer.cuh, gather
- static_cast<Index>(extent - origin) :
+ static_cast<Index>(extent - origin + 1) :

clip-begin: transfer.cuh, gather
- static_cast<Index>(-origin)
+ static_cast<Index>(-origin - 1)

rect-bound: transfer.cuh, gather
- row < row_end && column >=
+ row <= row_end && column >=

columns-not-in-words: transfer.cuh, gather
- rect.column_end *= static_cast<Index>(t.channels);
+

magic-shift: transfer.cuh, gather
- static_cast<int>(t.run_shift)
+ static_cast<int>(t.run_shift - 1)

row-stride-for-column: transfer.cuh, gather
- static_cast<int64>(row) * t.image_strides[1] + static_cast<int64>(word)
+ static_cast<int64>(row) * t.image_strides[2] + static_cast<int64>(word)

height-for-width: transfer.cuh, gather
- row = pixel / kBlockW; column = pixel % kBlockW;
+ row = pixel / kBlockH; column = pixel % kBlockH;

column-order: transfer.cuh, gather
- row = line % kBlockH; channel = line / kBlockH;
+ row = line / kBlockH; channel = line % kBlockH;

stack-strides-swapped: transfer.cuh, gather_tiled
- t.stack_strides[1] + static_cast<int64>(column) * t.stack_strides[2];
+ t.stack_strides[2] + static_cast<int64>(column) * t.stack_strides[1];

misaligned-load: vec.cuh, gather
- __ldg(static_cast<const Word*>(address) + offset)
+ __ldg(reinterpret_cast<const Word*>(static_cast<const char*>(address) + 1) + offset)

misaligned-lanes: vec.cuh, gather_tiled
- Vec<Word, kLanes>*>(static_cast<const Word*>(address) + offset);
+ Vec<Word, kLanes>*>(static_cast<const Word*>(address) + offset - 1);

store-one-word-off: vec.cuh, scatter
- static_cast<Word*>(address) + offset) = words;
+ static_cast<Word*>(address) + offset + 1) = words;

last-tile: tile.cuh, gather_tiled
- (channels + Tile<Word>::Shape::kChannels - 1) / Tile
+ channels / Tile

tile-pitch: tile.cuh, gather_tiled
- kPitch = kTilePixels +
+ kPitch = kTilePixels - 8 +

tile-channel: tile.cuh, gather_tiled
- return k / kAcross *
+ return k % kAcross *

tile-groups: tile.cuh, gather_tiled
- static_cast<Index>(group % kGroups * kLanes), static_cast<Index>(group / kGroups)
+ static_cast<Index>(group / kGroups * kLanes), static_cast<Index>(group % kGroups)

gather-rows: gather.cu, gather
- if (row >= t.rows) return;
+

gather-store-bound: gather.cu, gather
- if (first + u * step < words) store
+ if (first + u * step <= words) store

gather-step: gather.cu, gather
- first += kUnroll * step
+ first += (kUnroll + 1) * step

gather-zeros: gather.cu, gather
- word[u] = Word{};
+

gather-border: gather.cu, gather
- k < words && spot.inside
+ k < words

gather-barrier-across-channels: gather.cu, gather_tiled
- (read); __syncthreads(); along_pixels
+ (read); along_pixels

gather-barrier-across-pixels: gather.cu, gather_tiled
- (read); __syncthreads(); along_channels
+ (read); along_channels

gather-barrier-at-the-end: gather.cu, gather_tiled
- (write); } __syncthreads();
+ (write); }

gather-tile-not-turned: gather.cu, gather_tiled
- tile.word[tile_channel + i][tile_pixel] = words.lane[i]
+ tile.word[tile_channel][tile_pixel + i] = words.lane[i]

gather-pixel-bound: gather.cu, gather_tiled
- if (channel >= channels || pixel >= kPixels) return;
+ if (channel >= channels || pixel > kPixels) return;

gather-channel-bound: gather.cu, gather_tiled
- if (channel < channels && at.inside
+ if (channel <= channels && at.inside

scatter-rows: scatter.cu, scatter
- if (row >= t.rows) return;
+

equal-blocks-race: scatter.cu, scatter
- idle = Combine::kAdds ? twins.before : twins.after;
+ idle = false;

equal-blocks-not-added: scatter.cu, add
- Combine::kAdds && twins.after
+ false

neighbours-forgotten: scatter.cu, scatter
- above = nearby.any(0, 1, 2)
+ above = false

left-for-right: scatter.cu, scatter
- left = nearby.any(0, 3, 6)
+ left = nearby.any(2, 5, 8)

rows-out-of-turn: scatter.cu, add
- near = nearby.load(t, cover, at) || !Combine::kAdds
+ near = nearby.load(t, cover, at) || true

stride-swapped: scatter.cu, add
- other.dh * t.height.stride
+ other.dh * t.width.stride

stack-without-row: scatter.cu, add
- return other.row * t.stack_strides[0] +
+ return

last-writer: scatter.cu, scatter
- if (row != (Combine::kAdds ? first : last)) return;
+

first-for-last: scatter.cu, scatter
- (Combine::kAdds ? first : last)
+ first

quarter-missing: scatter.cu, add
- for (int i = 0; i < 4; ++i) { if (covering[i].row != kNoRow) sum.add(word[i]);
+ for (int i = 0; i < 3; ++i) { if (covering[i].row != kNoRow) sum.add(word[i]);

far-writer: scatter.cu, scatter
- && next.row != row) return;
+ && next.row != row) continue;

shared-groups: scatter.cu, scatter
- groups = gridDim.y * blockDim.x / lanes
+ groups = gridDim.y * blockDim.x

shared-lane: scatter.cu, scatter
- put_near<Combine>(t, at, row, nearby, task.overlap, r, c, thread % lanes, lanes);
+ put_near<Combine>(t, at, row, nearby, task.overlap, r, c, thread, lanes);

one-table-for-all-warps: scatter.cu, scatter
- tables[(threadIdx.y * blockDim.x + threadIdx.x) / kWarp]
+ tables[0]

scatter-barrier-across-pixels: scatter.cu, scatter_tiled
- (read); __syncthreads(); along_channels
+ (read); along_channels

scatter-barrier-across-channels: scatter.cu, scatter_tiled
- (read); __syncthreads(); along_pixels
+ (read); along_pixels

scatter-barrier-at-the-end: scatter.cu, scatter_tiled
- (write); } __syncthreads();
+ (write); }

rounded-at-each-sum: combine.cuh, add_half
- return add_exact(total, __half2float(value));
+ return __half2float(__float2half_rn(add_exact(total, __half2float(value))));

one-lane-for-all: combine.cuh, add_half
- Number::begin(base.lane[i])
+ Number::begin(base.lane[0])

cell-without-batch: cover.cuh, scatter
- (n * t.height.count + cell_h)
+ cell_h

cell-width-for-height: cover.cuh, scatter
- + cell_h) * t.width.count
+ + cell_h) * t.height.count

equal-columns-forgotten: cover.cuh, scatter
- && a[2 * t.index_strides[1]] == b[2 * t.index_strides[1]];
+ ;

twins-of-lane-31: cover.cuh, scatter
- __any_sync(0xffffffffu, found.before)
+ __any_sync(0x7fffffffu, found.before)

search-by-half-warps: cover.cuh, scatter
- other < rows; other += kWarp
+ other < rows; other += 2 * kWarp

spared-row: cover.cuh, scatter
- pixels.row_end > overlap.stride_h) pixels.row_end = overlap.stride_h;
+ pixels.row_end > overlap.stride_h + 1) pixels.row_end = overlap.stride_h + 1;

spared-column: cover.cuh, add
- first_column = kBlockW - overlap.stride_w;
+ first_column = kBlockW - 1 - overlap.stride_w;

nearby-barrier: cover.cuh, add
- __syncwarp();
+

nearby-beyond-grid: cover.cuh, add
- cell_h < t.height.count && cell_w >= 0
+ cell_w >= 0

neighbour-too-far: cover.cuh, add
- at.cell_h - static_cast<int64>((kBlockH - 1 - row) / overlap.stride_h)
+ at.cell_h - static_cast<int64>((kBlockH - row) / overlap.stride_h)

same-row-for-ever: cover.cuh, add
- found <= previous
+ found < previous

list-out-of-turn: cover.cuh, add
- found < best.row
+ found > best.row

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

pool-last-column: reduce_mask.cu, mask
- % p.width.stride < p.block_w;
+ % p.width.stride < p.block_w - 1;

pool-before-image: reduce_mask.cu, mask
- begin = origin < 0 ? 0 : origin;
+ begin = origin;

pool-past-image: reduce_mask.cu, mask
- end = origin + size < axis.extent ? origin + size : axis.extent;
+ end = origin + size;

pool-without-batch: reduce_mask.cu, mask
- origin = image * p.mask_strides[0];
+ origin = 0;

pool-without-start: reduce_mask.cu, mask
- if (thread < block_count) blocks[thread] = Pool::none();
+

pool-misaligned: reduce_mask.cu, mask
- piece = left - left % kLanes;
+ piece = left;

pool-rows-read-twice: reduce_mask.cu, mask
- y = top + threadIdx.y;
+ y = top;

pool-rows-left-out: reduce_mask.cu, mask
- rows < static_cast<int>(blockDim.y);
+ rows < 1;

pool-barrier-after-load: reduce_mask.cu, mask
- columns[thread * kLanes + i] = column[i]; __syncthreads();
+ columns[thread * kLanes + i] = column[i];

pool-barrier-after-use: reduce_mask.cu, mask
- blocks[k].add(block); } __syncthreads();
+ blocks[k].add(block); }

pool-piece: reduce_mask.cu, mask
- end = end < piece + piece_width ? end : piece + piece_width;
+

pool-every-lane: reduce_mask.cu, mask
- if (lane == 0) blocks[k].add(block);
+ blocks[k].add(block);

pool-half-a-warp: reduce_mask.cu, mask
- int distance = kWarp / 2; distance
+ int distance = kWarp / 4; distance

pool-lane-31: pool.cuh, mask
- __shfl_xor_sync(0xffffffffu, int{any}
+ __shfl_xor_sync(0x7fffffffu, int{any}

pool-equal: pool.cuh, mask
- pixel > static_cast<T>(t.integer)
+ pixel >= static_cast<T>(t.integer)

pool-high-half: pool.cuh, mask
- high += other.high
+ high = other.high

greater-or-equal: ptx.cuh, mask
- return a > b;
+ return a >= b;

average-equal: pool.cuh, mask
- sum.value() / t.area > t.tol
+ sum.value() / t.area >= t.tol

scan-barrier-before: reduce_mask.cu, compact
- __syncthreads(); // the sums of an earlier scan may still be read
+

scan-barrier-after: reduce_mask.cu, compact
- warp_sums[warp] = sum; __syncthreads();
+ warp_sums[warp] = sum;

scan-own-warp: reduce_mask.cu, compact
- if (w < warp)
+ if (w <= warp)

scan-lane: reduce_mask.cu, compact
- if (lane >= distance)
+ if (lane > distance)

flags-past-the-tile: reduce_mask.cu, compact
- if (first + i >= end) flags.lane[i] = 0;
+

flags-past-the-end: reduce_mask.cu, compact
- if (first < end) flags =
+ flags =

count-step: reduce_mask.cu, compact
- count_flags(flags_at(c, piece + threadIdx.x * kFlags, end))
+ count_flags(flags_at(c, piece + threadIdx.x, end))

compact-barrier: reduce_mask.cu, compact
- __syncthreads(); next_row = first_row;
+ next_row = first_row;

compact-row: reduce_mask.cu, compact
- ++row;
+

compact-capacity: reduce_mask.cu, compact
- if (row < c.capacity)
+ if (row <= c.capacity)

compact-tile-counts: reduce_mask.cu, compact
- threadIdx.x < c.tiles ?
+ threadIdx.x <= c.tiles ?

compact-axes-swapped: reduce_mask.cu, compact
- line - image * static_cast<unsigned int>(c.blocks_h)
+ line - image * static_cast<unsigned int>(c.blocks_w)

compact-padding: reduce_mask.cu, compact
- if (c.pad != 0)
+ if (c.pad > 1)
"""

#: Changes that no run on a CPU can tell from the original, each with the reason.
SURVIVORS = """
no-fence: cover.cu, add
= fibers see each other's writes at once, and in order
- __threadfence();
+

no-compare-and-swap: cover.cu, add
= fibers switch at barriers and warp functions only, so two never update a word at one time
- atomicCAS(link, after, row) == after
+ (*link = row, true)

bank-conflicts: tile.cuh, gather_tiled
= the same result, only slower
- kPitch = kTilePixels + (kWordBytes < 4 ? 4 / kWordBytes : 1)
+ kPitch = kTilePixels
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


def mutate(mutant: Mutant, folder: Path) -> Path:
    """A copy of the kernels with the mistake."""
    shutil.copytree(kernel_folder(), folder)
    path = folder / mutant.file
    pattern = r"\s+".join(map(re.escape, mutant.old.split()))
    text, count = re.subn(pattern, lambda _: mutant.new, path.read_text())
    if count != 1:
        raise LookupError(
            f"mutant {mutant.name}: the text that it changes stands {count} times in {mutant.file}, not once. Where "
            f"the kernel has changed, adapt the mutant: {mutant.old}"
        )
    path.write_text(text)
    return folder


def first_sign(family: list[Call], kernels: Path | None) -> str:
    """How the first call that goes wrong shows it; empty if none does."""
    for order in cpu_cuda.ORDERS:
        for call in family:
            try:
                call.check(replace(order, seconds=1), kernels)
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
                mutate(mutant, folder / f"{mutant.name}-again")
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


@pytest.mark.parametrize("mutant", parse(MUTANTS), ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant, kernels: Any) -> None:
    folder = kernels(mutant)
    sign = first_sign(families()[mutant.family], folder).replace(f"{folder}/", "")
    print(f"{mutant.name} in {mutant.file}: {sign}")
    assert sign, "no call shows the mistake"


@pytest.mark.parametrize("mutant", parse(SURVIVORS), ids=lambda mutant: mutant.name)
def test_mutant_survives(mutant: Mutant, kernels: Any) -> None:
    assert first_sign(families()[mutant.family], kernels(mutant)) == "", f"it can be seen after all: {mutant.reason}"
