// sparse_gather: image tensor to block stack. One CTA row of threads, or several, copy one block.
#include "transfer.cuh"

namespace sbnet {

// Image and stack are contiguous along the same axis (or along none): words go straight through registers.
// Registers: at most 80.
template <int kWordBytes, typename Index, Index kBlockH, Index kBlockW, Order kOrder>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) gather(const Transfer t) {
    using Word = Raw<kWordBytes>;
    const int64 row = static_cast<int64>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= t.rows) return;
    const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, row);

    const Index channels = static_cast<Index>(t.channels);
    const Index words = kBlockH * kBlockW * channels;
    const Index step = blockDim.x * gridDim.y;
    for (Index first = blockIdx.y * blockDim.x + threadIdx.x; first < words; first += kUnroll * step) {
        Word word[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const auto e = element<Index, kBlockH, kBlockW, kOrder>(first + u * step, channels);
            word[u] = Word{};
            if (first + u * step < words && at.contains(e.row, e.column)) {
                word[u] = load_constant<Word>(t.image, at.image_origin + e.image_offset(t));
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (first + u * step < words) {
                const auto e = element<Index, kBlockH, kBlockW, kOrder>(first + u * step, channels);
                store(t.stack, at.stack_origin + e.stack_offset(t), word[u]);
            }
        }
    }
}

// One of image and stack is contiguous along channels, the other along pixels: tiles turn in shared memory, so
// that both sides are read and written along what is contiguous. Words are single elements here.
// Registers: at most 64.
template <int kWordBytes, typename Index, Index kBlockH, Index kBlockW, bool kImageAlongChannels>
__global__ void __launch_bounds__(kTile* kTileRows, kMinCtas) gather_tiled(const Transfer t) {
    using Word = Raw<kWordBytes>;
    __shared__ Word tile[kTile][kTile + 1];  // [slow][fast] axis of the image; the odd pitch spreads columns over banks
    const int64 row = blockIdx.x;
    const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, row);

    const Index channels = static_cast<Index>(t.channels);
    const Tiling<Index> tiles(kBlockH * kBlockW, channels);
    const Index lane = threadIdx.x;
    for (Index k = blockIdx.y; k < tiles.count; k += gridDim.y) {
        const Index first_pixel = k % tiles.tiles_across * kTile;
        const Index first_channel = k / tiles.tiles_across * kTile;
        for (Index line = threadIdx.y; line < kTile; line += kTileRows) {
            const Index pixel = first_pixel + (kImageAlongChannels ? line : lane);
            const Index channel = first_channel + (kImageAlongChannels ? lane : line);
            const Element<Index> e{pixel / kBlockW, pixel % kBlockW, channel};
            Word word = Word{};
            if (channel < channels && at.contains(e.row, e.column)) {
                word = load_constant<Word>(t.image, at.image_origin + e.image_offset(t));
            }
            tile[line][lane] = word;
        }
        __syncthreads();
        for (Index line = threadIdx.y; line < kTile; line += kTileRows) {
            const Index pixel = first_pixel + (kImageAlongChannels ? lane : line);
            const Index channel = first_channel + (kImageAlongChannels ? line : lane);
            const Element<Index> e{pixel / kBlockW, pixel % kBlockW, channel};
            if (channel < channels && pixel < tiles.pixels) {
                store(t.stack, at.stack_origin + e.stack_offset(t), tile[lane][line]);
            }
        }
        __syncthreads();
    }
}

}  // namespace sbnet
