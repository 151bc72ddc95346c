// sparse_scatter: block stack to image tensor. Each pixel is written once, by the CTA of one of the rows that cover it:
// the last where blocks overwrite, the first where they add. That CTA finds the others through the cover map,
// so the result never depends on which CTA runs first.
#include "combine.cuh"
#include "cover.cuh"

namespace sbnet {

// Whether this row writes any pixel at all: of equal blocks only the one in head does.
template <typename Index>
__device__ inline bool has_work(const Transfer& t, const Cover& cover, const Placement<Index>& at, int64 row) {
    return at.touches_image && cover.head[cell_index(t, at.image_index, at.cell_h, at.cell_w)] == row;
}

// Which pixels of a block may be written without looking at other rows.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW>
struct Sharing {
    Overlap<Index, kBlockH, kBlockW> overlap;
    bool repeated;  // equal blocks are to be added as well

    __device__ Sharing(const Transfer& t, const Cover& cover, int64 row)
        : overlap(t), repeated(Combine::kAdds && cover.next[row] != kNoRow) {}

    __device__ bool possible() const { return repeated || overlap.exists(); }
    __device__ bool spares(Index row, Index column) const { return !repeated && overlap.spares(row, column); }
};

// Combines a word of the block with the image where no other row covers it.
template <typename Combine>
__device__ inline void put(const Transfer& t, int64 offset, const typename Combine::Word& word) {
    if constexpr (Combine::kAdds) {
        Combine sum(load<typename Combine::Word>(t.image, offset));
        sum.add(word);
        store(t.image, offset, sum.result());
    } else {
        store(t.image, offset, word);
    }
}

// The same where others may cover it: writes only if this row is the one to do so, and then for all of them.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW>
__device__ inline void put_shared(const Transfer& t, const Cover& cover, const Placement<Index>& at, int row,
                                  const Overlap<Index, kBlockH, kBlockW>& overlap, const Element<Index>& e,
                                  const typename Combine::Word& word) {
    using Word = typename Combine::Word;
    const Neighbours around = overlap.around(t, at, e.row, e.column);
    const int64 offset = at.image_origin + e.image_offset(t);
    if constexpr (!Combine::kAdds) {
        if (is_last(t, cover, at, around, row)) store(t.image, offset, word);
    } else {
        if (next_covering(t, cover, at, around, kNoRow).row != row) return;
        Combine sum(load<Word>(t.image, offset));
        sum.add(word);
        for (;;) {
            const Covering other = next_covering(t, cover, at, around, static_cast<int>(row));
            if (other.row == kNoRow) break;
            row = other.row;
            const Element<Index> there{static_cast<Index>(static_cast<int64>(e.row) - other.dh * t.height.stride),
                                       static_cast<Index>(static_cast<int64>(e.column) - other.dw * t.width.stride),
                                       e.channel};
            sum.add(load<Word>(t.stack, row * t.stack_strides[0] + there.stack_offset(t)));
        }
        store(t.image, offset, sum.result());
    }
}

// Image and stack are contiguous along the same axis (or along none).
// Registers: at most 128.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW, Order kOrder>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) scatter(const Transfer t, const Cover cover) {
    using Word = typename Combine::Word;
    const int64 row = static_cast<int64>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= t.rows) return;
    const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, row);
    if (!has_work(t, cover, at, row)) return;
    const Sharing<Combine, Index, kBlockH, kBlockW> sharing(t, cover, row);

    const Index channels = static_cast<Index>(t.channels);
    const Index words = kBlockH * kBlockW * channels;
    const Index step = blockDim.x * gridDim.y;
    for (Index first = blockIdx.y * blockDim.x + threadIdx.x; first < words; first += kUnroll * step) {
        Word word[kUnroll];
        int64 target[kUnroll];
        bool writes[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const auto e = element<Index, kBlockH, kBlockW, kOrder>(first + u * step, channels);
            writes[u] = first + u * step < words && at.contains(e.row, e.column) && sharing.spares(e.row, e.column);
            if (writes[u]) {
                word[u] = load<Word>(t.stack, at.stack_origin + e.stack_offset(t));
                target[u] = at.image_origin + e.image_offset(t);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (writes[u]) put<Combine>(t, target[u], word[u]);
        }
    }
    if (!sharing.possible()) return;
#pragma unroll 1
    for (Index k = blockIdx.y * blockDim.x + threadIdx.x; k < words; k += step) {
        const auto e = element<Index, kBlockH, kBlockW, kOrder>(k, channels);
        if (at.contains(e.row, e.column) && !sharing.spares(e.row, e.column)) {
            put_shared<Combine>(t, cover, at, static_cast<int>(row), sharing.overlap, e,
                                load<Word>(t.stack, at.stack_origin + e.stack_offset(t)));
        }
    }
}

// One of image and stack is contiguous along channels, the other along pixels; see gather_tiled.
// Registers: at most 80.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW, bool kImageAlongChannels>
__global__ void __launch_bounds__(kTile* kTileRows, kMinCtas) scatter_tiled(const Transfer t, const Cover cover) {
    using Word = typename Combine::Word;
    __shared__ Word tile[kTile][kTile + 1];  // [slow][fast] axis of the stack
    const int64 row = blockIdx.x;
    const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, row);
    if (!has_work(t, cover, at, row)) return;
    const Sharing<Combine, Index, kBlockH, kBlockW> sharing(t, cover, row);

    const Index channels = static_cast<Index>(t.channels);
    const Tiling<Index> tiles(kBlockH * kBlockW, channels);
    const Index lane = threadIdx.x;
    for (Index k = blockIdx.y; k < tiles.count; k += gridDim.y) {
        const Index first_pixel = k % tiles.tiles_across * kTile;
        const Index first_channel = k / tiles.tiles_across * kTile;
        for (Index line = threadIdx.y; line < kTile; line += kTileRows) {
            const Index pixel = first_pixel + (kImageAlongChannels ? lane : line);
            const Index channel = first_channel + (kImageAlongChannels ? line : lane);
            const Element<Index> e{pixel / kBlockW, pixel % kBlockW, channel};
            if (channel < channels && at.contains(e.row, e.column)) {
                tile[line][lane] = load<Word>(t.stack, at.stack_origin + e.stack_offset(t));
            }
        }
        __syncthreads();
        for (Index line = threadIdx.y; line < kTile; line += kTileRows) {
            const Index pixel = first_pixel + (kImageAlongChannels ? line : lane);
            const Index channel = first_channel + (kImageAlongChannels ? lane : line);
            const Element<Index> e{pixel / kBlockW, pixel % kBlockW, channel};
            if (channel >= channels || !at.contains(e.row, e.column)) continue;
            if (sharing.spares(e.row, e.column)) {
                put<Combine>(t, at.image_origin + e.image_offset(t), tile[lane][line]);
            } else {
                put_shared<Combine>(t, cover, at, static_cast<int>(row), sharing.overlap, e, tile[lane][line]);
            }
        }
        __syncthreads();
    }
}

}  // namespace sbnet
