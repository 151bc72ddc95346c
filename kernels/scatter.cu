// sparse_scatter: block stack to image tensor. Each pixel is written once, by the threads of one of the rows that cover it:
// the last where blocks overwrite, the first where they add. Those find the other rows through the cover map (or
// the list, see cover.cuh), and add them in the order of the indices: so the result depends on the indices alone, to
// the bit, and never on which CTA runs first.
#include "combine.cuh"
#include "cover.cuh"
#include "tile.cuh"

namespace sbnet {

// What a row has to do: which pixels it may write without looking at others, and which only after it has.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW>
struct Task {
    Overlap<Index, kBlockH, kBlockW> overlap;
    bool idle;        // nothing: out of use, outside of the image, or an equal block does it
    bool shares;      // other rows may cover pixels of the block outside of `own`
    bool near;        // and `nearby` tells which
    Rect<Index> own;  // no other row covers these

    // All lanes of a warp ask for the same row.
    __device__ Task(const Transfer& t, const Cover& cover, const Placement<Index>& at, int64 row, Nearby& nearby)
        : overlap(t), idle(!at.touches_image), shares(false), near(false), own(at.inside) {
        if (idle) return;
        const Twins twins = cover.head != nullptr ? mapped_twins(t, cover, at, row) : listed_twins(t, row);
        idle = Combine::kAdds ? twins.before : twins.after;
        if (Combine::kAdds && twins.after) {
            shares = true;
            own = {0, 0, 0, 0};
        } else if (overlap.exists()) {
            shares = true;
            bool above = true, below = true, left = true, right = true;
            if (overlap.is_near()) {
                near = nearby.load(t, cover, at) || !Combine::kAdds;
                above = nearby.any(0, 1, 2);
                below = nearby.any(6, 7, 8);
                left = nearby.any(0, 3, 6);
                right = nearby.any(2, 5, 8);
            }
            own = spared(at.inside, overlap, above, below, left, right);
        }
    }
};

// Combines words of a block with the image, where no other row covers them.
template <typename Combine, int kLanes>
__device__ inline void put(const Transfer& t, int64 offset, const Vec<typename Combine::Word, kLanes>& words) {
    using Word = typename Combine::Word;
    if constexpr (Combine::kAdds) {
        Vec<Word, kLanes> result = load_lanes<Word, kLanes>(t.image, offset);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
            Combine sum(result.lane[i]);
            sum.add(words.lane[i]);
            result.lane[i] = sum.result();
        }
        store_lanes(t.image, offset, result);
    } else {
        store_lanes(t.image, offset, words);
    }
}

// Offset in the stack of pixel (row, column) of another row's block, which lies (dh, dw) blocks further on.
template <typename Index>
__device__ inline int64 stack_pixel(const Transfer& t, const Covering& other, Index row, Index column) {
    return other.row * t.stack_strides[0] +
           (static_cast<int64>(row) - other.dh * t.height.stride) * t.stack_strides[1] +
           (static_cast<int64>(column) - other.dw * t.width.stride) * t.stack_strides[2];
}

// Writes the channels of one pixel that at most 2 x 2 blocks cover, told by the table: by the last of their rows where
// they overwrite, by the first where they add, in the order of the grid.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW>
__device__ inline void put_near(const Transfer& t, const Placement<Index>& at, int row, const Nearby& nearby,
                                const Overlap<Index, kBlockH, kBlockW>& overlap, Index block_row, Index block_column,
                                Index lane, Index lanes) {
    using Word = typename Combine::Word;
    // Which neighbours reach the pixel: those below (1) or above (-1), right or left, never both.
    const int dh = block_row >= overlap.stride_h ? 1 : kBlockH - 1 - block_row >= overlap.stride_h ? -1 : 0;
    const int dw = block_column >= overlap.stride_w ? 1 : kBlockW - 1 - block_column >= overlap.stride_w ? -1 : 0;
    Covering covering[4];
    int64 source[4];
    int first = kNoRow, last = kNoRow;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int h = i / 2 + (dh < 0 ? -1 : 0);
        const int w = i % 2 + (dw < 0 ? -1 : 0);
        const bool reaches = h <= (dh > 0 ? 1 : 0) && w <= (dw > 0 ? 1 : 0);
        covering[i] = {reaches ? nearby.at(h, w) : kNoRow, h, w};
        source[i] = stack_pixel(t, covering[i], block_row, block_column);
        if (covering[i].row != kNoRow && first == kNoRow) first = covering[i].row;
        if (covering[i].row > last) last = covering[i].row;
    }
    if (row != (Combine::kAdds ? first : last)) return;
    const int64 pixel = at.image_origin + image_offset(t, block_row, block_column);
    const int64 own = stack_pixel(t, {row, 0, 0}, block_row, block_column);
#pragma unroll 1
    for (Index channel = lane; channel < static_cast<Index>(t.channels); channel += lanes) {
        const int64 target = pixel + channel * t.image_strides[3];
        const int64 offset = channel * t.stack_strides[3];
        if constexpr (Combine::kAdds) {
            Word word[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (covering[i].row != kNoRow) word[i] = load<Word>(t.stack, source[i] + offset);
            }
            Combine sum(load<Word>(t.image, target));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (covering[i].row != kNoRow) sum.add(word[i]);
            }
            store(t.image, target, sum.result());
        } else {
            store(t.image, target, load<Word>(t.stack, own + offset));
        }
    }
}

// The same for any grid and any rows: searches for the next row each time.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW>
__device__ inline void put_far(const Transfer& t, const Cover& cover, const Placement<Index>& at, int row,
                               const Overlap<Index, kBlockH, kBlockW>& overlap, Index block_row, Index block_column,
                               Index lane, Index lanes) {
    using Word = typename Combine::Word;
    const int64 pixel = at.image_origin + image_offset(t, block_row, block_column);
#pragma unroll 1
    for (Index channel = lane; channel < static_cast<Index>(t.channels); channel += lanes) {
        const int64 target = pixel + channel * t.image_strides[3];
        Combine result(load<Word>(t.image, target));
        // To overwrite, a row looks for rows after it; to add, for all, of which it must be the first.
        int previous = Combine::kAdds ? kNoRow : row;
#pragma unroll 1
        for (;;) {
            const Covering next = cover.head != nullptr
                                      ? next_covering(t, cover, at, overlap, block_row, block_column, previous)
                                      : next_twin(t, row, previous);
            if (next.row == kNoRow) break;
            if (previous == (Combine::kAdds ? kNoRow : row) && next.row != row) return;
            result.add(load<Word>(t.stack, stack_pixel(t, next, block_row, block_column) + channel * t.stack_strides[3]));
            previous = next.row;
        }
        if constexpr (!Combine::kAdds) {
            result.add(load<Word>(t.stack, stack_pixel(t, {row, 0, 0}, block_row, block_column) +
                                               channel * t.stack_strides[3]));
        }
        store(t.image, target, result.result());
    }
}

// All pixels of the block outside of `own`. Neighbouring threads take neighbouring channels of a pixel where those are
// contiguous (t.shared_lanes of them), else neighbouring pixels.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW>
__device__ inline void put_shared(const Transfer& t, const Cover& cover, const Placement<Index>& at, int row,
                                  const Task<Combine, Index, kBlockH, kBlockW>& task, const Nearby& nearby) {
    const Index lanes = static_cast<Index>(t.shared_lanes);
    const Index thread = blockIdx.y * blockDim.x + threadIdx.x;
    const Index groups = gridDim.y * blockDim.x / lanes;
#pragma unroll 1
    for (Index pixel = thread / lanes; pixel < kBlockH * kBlockW; pixel += groups) {
        const Index r = pixel / kBlockW;
        const Index c = pixel % kBlockW;
        if (!at.inside.contains(r, c) || task.own.contains(r, c)) continue;
        if (task.near) {
            put_near<Combine>(t, at, row, nearby, task.overlap, r, c, thread % lanes, lanes);
        } else {
            put_far<Combine>(t, cover, at, row, task.overlap, r, c, thread % lanes, lanes);
        }
    }
}

// Image and stack are contiguous along the same axis (or along none).
// Registers: at most 128.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW, Order kOrder>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas<Index>) scatter(const Transfer t, const Cover cover) {
    using Word = typename Combine::Word;
    const int64 row = static_cast<int64>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= t.rows) return;
    const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, row);
    __shared__ Nearby tables[kMaxThreads / kWarp];
    Nearby& nearby = tables[(threadIdx.y * blockDim.x + threadIdx.x) / kWarp];
    const Task<Combine, Index, kBlockH, kBlockW> task(t, cover, at, row, nearby);
    if (task.idle) return;
    const Walk<Index, kBlockH, kBlockW, kOrder> walk(t, task.own);

    const Index words = kBlockH * kBlockW * static_cast<Index>(t.channels);
    const Index step = blockDim.x * gridDim.y;
    for (Index first = blockIdx.y * blockDim.x + threadIdx.x; first < words; first += kUnroll * step) {
        Vec<Word, 1> word[kUnroll];
        int64 target[kUnroll];
        bool writes[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const Index k = first + u * step;
            const Spot spot = walk.spot(k);
            target[u] = at.image_origin + spot.image_offset;
            writes[u] = k < words && spot.inside;
            if (writes[u]) word[u].lane[0] = load<Word>(t.stack, at.stack_origin + spot.stack_offset);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (writes[u]) put<Combine>(t, target[u], word[u]);
        }
    }
    if (task.shares) put_shared(t, cover, at, static_cast<int>(row), task, nearby);
}

// One of image and stack is contiguous along channels, the other along pixels; see gather_tiled.
// Registers: at most 128.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW, bool kImageAlongChannels, int kImageLanes,
          int kStackLanes>
__global__ void __launch_bounds__(kTileThreads, kMinCtas<Index>) scatter_tiled(const Transfer t, const Cover cover) {
    using Word = typename Combine::Word;
    constexpr Index kPixels = kBlockH * kBlockW;
    __shared__ Tile<Word> tile;
    const int64 row = blockIdx.x;
    const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, row);
    __shared__ Nearby tables[kTileThreads / kWarp];
    Nearby& nearby = tables[threadIdx.x / kWarp];
    const Task<Combine, Index, kBlockH, kBlockW> task(t, cover, at, row, nearby);
    if (task.idle) return;

    const Index channels = static_cast<Index>(t.channels);
    const Tiling<Word, Index, kPixels> tiles(channels);
    for (Index k = blockIdx.y; k < tiles.count; k += gridDim.y) {
        const Index first_pixel = tiles.first_pixel(k);
        const Index first_channel = tiles.first_channel(k);
        const auto read = [&](Index tile_pixel, Index tile_channel) {
            const Index pixel = first_pixel + tile_pixel;
            const Index channel = first_channel + tile_channel;
            if (channel >= channels || pixel >= kPixels) return;
            const auto words = load_lanes<Word, kStackLanes>(
                t.stack, at.stack_origin + stack_offset(t, pixel / kBlockW, pixel % kBlockW) +
                             channel * t.stack_strides[3]);
#pragma unroll
            for (int i = 0; i < kStackLanes; ++i) {
                if constexpr (kImageAlongChannels) {
                    tile.word[tile_channel][tile_pixel + i] = words.lane[i];
                } else {
                    tile.word[tile_channel + i][tile_pixel] = words.lane[i];
                }
            }
        };
        const auto write = [&](Index tile_pixel, Index tile_channel) {
            const Index pixel = first_pixel + tile_pixel;
            const Index channel = first_channel + tile_channel;
            const Index block_row = pixel / kBlockW;
            const Index block_column = pixel % kBlockW;
            if (channel >= channels || !task.own.contains(block_row, block_column)) return;
            Vec<Word, kImageLanes> words;
#pragma unroll
            for (int i = 0; i < kImageLanes; ++i) words.lane[i] = tile.word[tile_channel + i][tile_pixel];
            put<Combine>(t,
                         at.image_origin + image_offset(t, block_row, block_column) + channel * t.image_strides[3],
                         words);
        };
        if constexpr (kImageAlongChannels) {
            along_pixels<Word, kStackLanes, Index>(read);
            __syncthreads();
            along_channels<Word, kImageLanes, Index>(write);
        } else {
            static_assert(kImageLanes == 1, "blocks begin at any column: single words are all that is aligned");
            along_channels<Word, kStackLanes, Index>(read);
            __syncthreads();
            along_pixels<Word, 1, Index>(write);
        }
        __syncthreads();
    }
    if (task.shares) put_shared(t, cover, at, static_cast<int>(row), task, nearby);
}

}  // namespace sbnet
