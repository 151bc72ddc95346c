// A convolution of the active blocks of images: implicit GEMM, from the tensor to the tensor, without stacks between.
#include "conv.cuh"

namespace sbnet {

// What a convolution is made for: pixels of a tile, of the kernel, and between kernel positions; and the pieces of a
// pixel that are staged at a time.
template <int kTileH_, int kTileW_, int kKernelH_, int kKernelW_, int kStrideH_, int kStrideW_, int kChunk_>
struct ConvShape {
    static constexpr int kTileH = kTileH_, kTileW = kTileW_, kKernelH = kKernelH_, kKernelW = kKernelW_;
    static constexpr int kStrideH = kStrideH_, kStrideW = kStrideW_, kChunk = kChunk_;
    static constexpr int kWindowH = (kTileH - 1) * kStrideH + kKernelH, kWindowW = (kTileW - 1) * kStrideW + kKernelW;
    using ChunkDepth = Depth<kChunk, kChunk, kKernelH, kKernelW>;
    static constexpr int kSteps = ChunkDepth::kSteps;
    using Rows = PixelRows<kChunk, kWindowH, kWindowW, kTileW, kStrideH, kStrideW>;
};

// A CTA takes some features (blockIdx.y tells which) of a tile; the grid has all tiles that there may be. Chunks of the
// channels are staged while the one before is multiplied.
// Registers: at most 255, or 128 where a multiprocessor is to hold two CTAs (kCtas).
template <typename Products, typename Layout, typename Shape, typename Form, int kCtas>
__global__ void __launch_bounds__(kProductThreads, kCtas) conv(const Conv c) {
    using T = typename Products::Number;
    using Staged = SharedWindow<T, Shape::kChunk, typename Shape::Rows>;
    constexpr int kTilePixels = Shape::kTileH * Shape::kTileW;
    static_assert(Layout::kAllRows >= kTilePixels, "a tile has rows for all its pixels");
    extern __shared__ StepWords conv_shared[];
    unsigned char* zeros = reinterpret_cast<unsigned char*>(conv_shared);
    int* offsets = reinterpret_cast<int*>(zeros + kPieceBytes);
    float* target_scale = reinterpret_cast<float*>(offsets + Shape::kSteps * kStepPieces);
    float* target_shift = target_scale + Layout::kAllColumns;
    float* source_scale = target_shift + Layout::kAllColumns;
    const int source_room = Form::kActivates ? Shape::kChunk * kPiece<T> * static_cast<int>(c.chunks) : 0;
    float* source_shift = source_scale + source_room;
    unsigned char* windows = reinterpret_cast<unsigned char*>(source_shift + source_room);

    const Layout layout;
    const int chunks = Form::kChunks ? static_cast<int>(c.chunks) : 1;
    const int first_feature = blockIdx.y * Layout::kAllColumns, features = static_cast<int>(c.features);
    const int column_stride = chunks * Shape::kSteps * kWarp;
    const StepWords* weights =
        c.weights + static_cast<int64>((first_feature + layout.column) / kColumns) * column_stride;
    hold(weights);  // else a part of it is found again for each step

    if (threadIdx.x == 0) store(zeros, 0, Vec<int, 4>{});
    list_pieces<typename Shape::Rows, typename Shape::ChunkDepth, true>(offsets);
    wait_for_earlier_kernels();

    const int64 active = *c.bin_counts;
    const int64 tiles = (active < c.rows ? active : c.rows) * c.tiles;
    const TileNumbers at(c, blockIdx.x);
    // While the indices are on their way: what does not depend on them.
    const int begin = layout.begin(Shape::kSteps), end = layout.end(Shape::kSteps);
    using Weights = DistantWeights<Products, Layout::kN>;
    Weights distant(weights, column_stride, begin, end);
    share_channels(target_scale, target_shift, Layout::kAllColumns, c.target_scale, c.target_shift, first_feature,
                   features);
    if constexpr (Form::kActivates) {
        share_channels(source_scale, source_shift, source_room, c.source_scale, c.source_shift, 0,
                       static_cast<int>(c.channels));
        __syncthreads();
    }

    const ConvTile tile(c, at, Shape());
    if (blockIdx.x >= tiles || !tile.exists) return;
    const Window window = tile.source(c, Shape());
    const auto start = [&](int k) {
        const Staged staged{windows + (Form::kChunks ? k % 2 * Shape::Rows::kBytes : 0)};
        staged.template start<Form::kWhole>(window, static_cast<const T*>(c.source), k * Shape::kChunk * kPiece<T>,
                                            static_cast<int>(c.channels));
        commit_async();
    };
    start(0);
    Sums<Layout::kM, Layout::kN> sums;
    for (int k = 0; k < chunks; ++k) {
        if (Form::kChunks && k > 0) distant = Weights(weights + k * Shape::kSteps * kWarp, column_stride, begin, end);
        if (Form::kChunks && k + 1 < chunks) {
            start(k + 1);
            wait_async_groups<1>();
        } else {
            wait_async_groups<0>();
        }
        const Staged staged{windows + (Form::kChunks ? k % 2 * Shape::Rows::kBytes : 0)};
        if constexpr (Form::kActivates) {
            const ChannelAffine<kPiece<T>> affine(source_scale, source_shift, c.source_relu != 0,
                                                  (k * Shape::kChunk + Staged::piece()) * kPiece<T>);
            staged.template activate<Products::kRounds>(window, affine);
        }
        __syncthreads();
        const unsigned char* rows[Layout::kM][Products::kLaneRows];
#pragma unroll
        for (int m = 0; m < Layout::kM; ++m) {
#pragma unroll
            for (int r = 0; r < Products::kLaneRows; ++r) {
                int pixel = layout.row + m * kRows + Products::row_of(threadIdx.x % kWarp, r);
                if (pixel >= kTilePixels) pixel = 0;  // of no tile: any pixel will do
                const int y = pixel / Shape::kTileW, x = pixel % Shape::kTileW;
                rows[m][r] = staged.pixels + Shape::Rows::offset(y * Shape::kStrideH, x * Shape::kStrideW);
            }
        }
        Products::template run<kCtas>(sums, rows, offsets, zeros, distant, begin, end);
        if (Form::kChunks || Layout::kDepth > 1) __syncthreads();  // before the memory is used again
    }
    let_later_kernels_start();
    const ConvResults<T, Layout, Shape, Form> results(layout, c, tile, first_feature, target_scale, target_shift);
    layout.finish(
        windows, sums, [&](int m) { return results.pixels_of(m); },
        [&](const auto& pixels, int n) { return results.bring(pixels, n); },
        [&](const auto& pixels, int n, const auto& tiles, const auto& brought) {
            results.put(pixels, n, tiles, brought);
        });
}

}  // namespace sbnet
