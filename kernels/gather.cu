// sparse_gather: image tensor to block stack. The threads of a CTA copy one block, or as many as fit; several CTAs may
// share a block.
#include "tile.cuh"
#include "transfer.cuh"

namespace sbnet {

// Image and stack are contiguous along the same axis (or along none): words go straight through registers.
// Registers: at most 128.
template <int kWordBytes, typename Index, Index kBlockH, Index kBlockW, Order kOrder>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas<Index>) gather(const Transfer t) {
    using Word = Raw<kWordBytes>;
    const int64 row = static_cast<int64>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= t.rows) return;
    const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, row);
    const Walk<Index, kBlockH, kBlockW, kOrder> walk(t, at.inside);

    const Index words = kBlockH * kBlockW * static_cast<Index>(t.channels);
    const Index step = blockDim.x * gridDim.y;
    for (Index first = blockIdx.y * blockDim.x + threadIdx.x; first < words; first += kUnroll * step) {
        Word word[kUnroll];
        int64 target[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const Index k = first + u * step;
            const Spot spot = walk.spot(k);
            word[u] = Word{};
            target[u] = at.stack_origin + spot.stack_offset;
            if (k < words && spot.inside) word[u] = load_constant<Word>(t.image, at.image_origin + spot.image_offset);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (first + u * step < words) store(t.stack, target[u], word[u]);
        }
    }
}

// One of image and stack is contiguous along channels, the other along pixels. Words are single elements here;
// kImageLanes and kStackLanes of them are moved at once on either side.
// Registers: at most 128.
template <int kWordBytes, typename Index, Index kBlockH, Index kBlockW, bool kImageAlongChannels, int kImageLanes,
          int kStackLanes>
__global__ void __launch_bounds__(kTileThreads, kMinCtas<Index>) gather_tiled(const Transfer t) {
    using Word = Raw<kWordBytes>;
    constexpr Index kPixels = kBlockH * kBlockW;
    __shared__ Tile<Word> tile;
    const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, blockIdx.x);

    const Index channels = static_cast<Index>(t.channels);
    const Tiling<Word, Index, kPixels> tiles(channels);
    for (Index k = blockIdx.y; k < tiles.count; k += gridDim.y) {
        const Index first_pixel = tiles.first_pixel(k);
        const Index first_channel = tiles.first_channel(k);
        const auto read = [&](Index tile_pixel, Index tile_channel) {
            const Index pixel = first_pixel + tile_pixel;
            const Index channel = first_channel + tile_channel;
            const Index row = pixel / kBlockW;
            const Index column = pixel % kBlockW;
            Vec<Word, kImageLanes> words{};
            if (channel < channels && at.inside.contains(row, column)) {
                words = load_lanes<Word, kImageLanes>(
                    t.image, at.image_origin + image_offset(t, row, column) + channel * t.image_strides[3]);
            }
#pragma unroll
            for (int i = 0; i < kImageLanes; ++i) tile.word[tile_channel + i][tile_pixel] = words.lane[i];
        };
        const auto write = [&](Index tile_pixel, Index tile_channel) {
            const Index pixel = first_pixel + tile_pixel;
            const Index channel = first_channel + tile_channel;
            if (channel >= channels || pixel >= kPixels) return;
            Vec<Word, kStackLanes> words;
#pragma unroll
            for (int i = 0; i < kStackLanes; ++i) {
                words.lane[i] = kImageAlongChannels ? tile.word[tile_channel][tile_pixel + i]
                                                    : tile.word[tile_channel + i][tile_pixel];
            }
            store_lanes(t.stack,
                        at.stack_origin + stack_offset(t, pixel / kBlockW, pixel % kBlockW) +
                            channel * t.stack_strides[3],
                        words);
        };
        if constexpr (kImageAlongChannels) {
            along_channels<Word, kImageLanes, Index>(read);
            __syncthreads();
            along_pixels<Word, kStackLanes, Index>(write);
        } else {
            static_assert(kImageLanes == 1, "blocks begin at any column: single words are all that is aligned");
            along_pixels<Word, 1, Index>(read);
            __syncthreads();
            along_channels<Word, kStackLanes, Index>(write);
        }
        __syncthreads();
    }
}

}  // namespace sbnet
