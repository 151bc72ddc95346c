// A convolution of the active blocks of images: implicit GEMM, from the tensor to the tensor, without stacks between.
#include "window.cuh"

namespace sbnet {

// One axis of a convolution. Block k of the output begins at pixel `start + k * stride`, for 0 <= k < count.
struct ConvAxis {
    int64 count, start, stride, size;  // of blocks of the output
    int64 extent;                      // pixels of the output image
    int64 tile, tiles;                 // pixels of a tile, at most; tiles of a block
    int64 kernel, step, pad;           // pixels of the kernel; distance between its positions; padding before the image
    int64 source_extent;               // pixels of the input image, or of a block of the input stack
};

// Argument of conv. Mirrored, field by field, by _fused.py. Strides are in numbers.
struct Conv {
    const void* source;           // [batch, H, W, channels], or a stack [rows, h, w, channels] of its blocks
    void* target;                 // [batch, H_out, W_out, features], or a stack
    const void* residual;         // added to the result, of the target's shape; may be the target; or null
    const StepWords* weights;     // packed
    const int* indices;           // [rows, 3]
    const int* bin_counts;        // [1]
    const float* source_scale;    // [channels], or null
    const float* source_shift;    // [channels], or null
    const float* target_scale;    // [features], or null
    const float* target_shift;    // [features], or null
    int64 source_strides[4];
    int64 target_strides[4];
    int64 residual_strides[4];
    int64 index_strides[2];
    int64 rows, batch;
    int64 channels, features;
    ConvAxis height, width;
    Divisor by_tile_width, by_window_width;
    int64 chunk;            // pieces of a pixel that are staged at a time
    int64 chunks;           // so many times
    int64 pitch;            // bytes of a staged pixel
    int64 steps;            // of the products with one chunk
    int64 window_bytes;     // of one chunk; with more than one, two are there at a time
    int64 source_is_stack, target_is_stack;
    int64 source_is_whole, target_is_whole;  // in aligned pieces of 16 bytes; the residual, as the target
    int64 activates_source, source_relu, target_relu;
};

// The part of one axis of a tile, in pixels.
struct Span {
    int first;  // pixel of the output image; may lie outside of it
    int within;  // the same in its block
    int size;
};

__device__ inline Span span_of(const ConvAxis& axis, unsigned int block, int tile) {
    const int within = tile * static_cast<int>(axis.tile);
    const int left = static_cast<int>(axis.size) - within;
    return {static_cast<int>(axis.start + block * axis.stride) + within, within,
            left < axis.tile ? left : static_cast<int>(axis.tile)};
}

// Which part of a span that begins at `first` lies in [0, extent).
__device__ inline void inside_of(int first, int size, int64 extent, int& begin, int& end) {
    begin = first < 0 ? -first : 0;
    end = extent - first < size ? static_cast<int>(extent - first) : size;
}

// A tile of the output, and the window of the input that it is computed from.
struct ConvTile {
    bool exists;
    unsigned int image;
    int64 row;
    Span y, x;

    __device__ ConvTile(const Conv& c, unsigned int number) {
        const unsigned int tiles_of_block = static_cast<unsigned int>(c.height.tiles * c.width.tiles);
        row = number / tiles_of_block;
        const unsigned int tile = number - static_cast<unsigned int>(row) * tiles_of_block;
        const int* triple = c.indices + row * c.index_strides[0];
        image = triple[0];
        const unsigned int block_h = triple[c.index_strides[1]], block_w = triple[2 * c.index_strides[1]];
        exists = image < c.batch && block_h < c.height.count && block_w < c.width.count;
        const int down = static_cast<int>(tile) / static_cast<int>(c.width.tiles);
        y = span_of(c.height, block_h, down);
        x = span_of(c.width, block_w, static_cast<int>(tile) - down * static_cast<int>(c.width.tiles));
    }

    __device__ Window source(const Conv& c) const {
        const bool stack = c.source_is_stack != 0;
        const ConvAxis &h = c.height, &w = c.width;
        const int top = static_cast<int>(stack ? y.within * h.step : y.first * h.step - h.pad);
        const int left = static_cast<int>(stack ? x.within * w.step : x.first * w.step - w.pad);
        Window window;
        window.row_stride = c.source_strides[1];
        window.column_stride = c.source_strides[2];
        window.channel_stride = c.source_strides[3];
        window.origin = (stack ? row : static_cast<int64>(image)) * c.source_strides[0] + top * window.row_stride +
                        left * window.column_stride;
        inside_of(top, static_cast<int>((y.size - 1) * h.step + h.kernel), h.source_extent, window.top, window.bottom);
        inside_of(left, static_cast<int>((x.size - 1) * w.step + w.kernel), w.source_extent, window.left, window.right);
        return window;
    }

    // Of the target or, for the same pixels, of the residual. Pixels "in the tensor" are those in the image: a stack
    // has room for the others too.
    __device__ Window target(const Conv& c, const int64 (&strides)[4], bool stack) const {
        Window window;
        window.row_stride = strides[1];
        window.column_stride = strides[2];
        window.channel_stride = strides[3];
        window.origin = (stack ? row : static_cast<int64>(image)) * strides[0] +
                        (stack ? y.within : y.first) * window.row_stride +
                        (stack ? x.within : x.first) * window.column_stride;
        inside_of(y.first, y.size, c.height.extent, window.top, window.bottom);
        inside_of(x.first, x.size, c.width.extent, window.left, window.right);
        return window;
    }
};

// Where the pieces of a pixel's channels lie in the window, kernel position by kernel position: the rows of an implicit
// matrix. What is left of the last step is no piece.
__device__ inline void list_offsets(int* offsets, const Conv& c, int window_width) {
    const int chunk = static_cast<int>(c.chunk), kernel_width = static_cast<int>(c.width.kernel);
    const int positions = static_cast<int>(c.height.kernel) * kernel_width;
    for (int k = threadIdx.x; k < c.steps * kStepPieces; k += kProductThreads) {
        const int position = k / chunk, piece = k - position * chunk;
        const int dy = position / kernel_width, dx = position - dy * kernel_width;
        offsets[k] = position < positions
                         ? (dy * window_width + dx) * static_cast<int>(c.pitch) + piece * kPieceBytes
                         : kNoPiece;
    }
}

// Writes the sums of a tile to the tensor.
template <typename T, typename Layout>
__device__ inline void finish(const Conv& c, const ConvTile& tile, const float* staged, int first_feature) {
    constexpr int kLanes = kPiece<T>;
    const Pieces pieces(Layout::kAllColumns / kLanes);
    const int feature = first_feature + pieces.piece * kLanes;
    if (feature >= c.features) return;
    const int features = static_cast<int>(c.features);
    const PieceAffine<kLanes> affine(c.target_scale, c.target_shift, c.target_relu != 0, feature, features);
    const bool stack = c.target_is_stack != 0;
    const Window target = tile.target(c, c.target_strides, stack);
    const Window residual = tile.target(c, c.residual_strides, false);
    const int tile_width = static_cast<int>(c.width.tile);
    const int pixels = tile.y.size * tile_width;
    for (int pixel = pieces.first; pixel < pixels; pixel += pieces.step) {
        const int y = c.by_tile_width(static_cast<unsigned int>(pixel)), x = pixel - y * tile_width;
        const bool inside = target.contains(y, x);
        if (x >= tile.x.size || (!inside && !stack)) continue;
        float sum[kLanes];
        Layout::template total<kLanes>(staged, pixel, pieces.piece * kLanes, sum);
        T* place = static_cast<T*>(c.target) + target.offset(y, x) + feature * target.channel_stride;
        const T* other = static_cast<const T*>(c.residual) + residual.offset(y, x) + feature * residual.channel_stride;
        const bool adds = c.residual != nullptr;
        Vec<T, kLanes> numbers{};
        if (adds && c.target_is_whole) numbers = load<Vec<T, kLanes>>(other, 0);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
            const bool exists = feature + i < features;
            float value = affine(sum[i], i);
            if (adds) {
                if (!c.target_is_whole && exists) numbers.lane[i] = other[i * residual.channel_stride];
                value += Addition<T>::begin(numbers.lane[i]);
            }
            numbers.lane[i] = Addition<T>::end(inside ? value : 0.0f);
            if (!c.target_is_whole && exists) place[i * target.channel_stride] = numbers.lane[i];
        }
        if (c.target_is_whole) store(place, 0, numbers);
    }
}

// A CTA takes some features (blockIdx.y tells which) of every gridDim.x-th tile, so that the grid need not know how many
// blocks are active. Chunks of the channels are staged while the one before is multiplied.
// Registers: at most 255.
template <typename Products, int kM, int kN, int kWarpsM, int kWarpsN>
__global__ void __launch_bounds__(kProductThreads, 1) conv(const Conv c) {
    using T = typename Products::Number;
    using Layout = Warps<kM, kN, kWarpsM, kWarpsN>;
    extern __shared__ StepWords conv_shared[];
    unsigned char* zeros = reinterpret_cast<unsigned char*>(conv_shared);
    int* offsets = reinterpret_cast<int*>(zeros + kPieceBytes);
    unsigned char* windows = zeros + kPieceBytes + c.steps * kStepPieces * sizeof(int);
    float* staged = reinterpret_cast<float*>(windows);

    const int window_width = static_cast<int>((c.width.tile - 1) * c.width.step + c.width.kernel);
    if (threadIdx.x == 0) store(zeros, 0, Vec<int, 4>{});
    list_offsets(offsets, c, window_width);

    const Layout layout;
    const int lane = threadIdx.x % kWarp;
    const unsigned char* rows[kM][Products::kLaneRows];
    const int tile_pixels = static_cast<int>(c.height.tile * c.width.tile);
    int row_offset[kM][Products::kLaneRows];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int r = 0; r < Products::kLaneRows; ++r) {
            int pixel = layout.row + m * kRows + Products::row_of(lane, r);
            if (pixel >= tile_pixels) pixel = 0;  // of no tile: any pixel will do
            const int y = c.by_tile_width(static_cast<unsigned int>(pixel));
            const int x = pixel - y * static_cast<int>(c.width.tile);
            row_offset[m][r] = static_cast<int>((y * c.height.step * window_width + x * c.width.step) * c.pitch);
        }
    }
    const int first_feature = blockIdx.y * Layout::kAllColumns;
    const int64 column_stride = c.chunks * c.steps * kWarp;
    const StepWords* weights = c.weights + (first_feature + layout.column) / kColumns * column_stride;
    const int steps = static_cast<int>(c.steps);

    const int64 active = *c.bin_counts;
    const int64 tiles = (active < c.rows ? active : c.rows) * c.height.tiles * c.width.tiles;
    for (int64 number = blockIdx.x; number < tiles; number += gridDim.x) {
        const ConvTile tile(c, static_cast<unsigned int>(number));
        if (!tile.exists) continue;
        const Window window = tile.source(c);
        const int pixels = static_cast<int>((tile.y.size - 1) * c.height.step + c.height.kernel) * window_width;
        const auto stage = [&](int chunk) {
            return WindowCopy<T>(windows + chunk % 2 * c.window_bytes, static_cast<int>(c.pitch), pixels,
                                 static_cast<int>(c.chunk));
        };
        const auto start = [&](int chunk) {
            const int channel = chunk * static_cast<int>(c.chunk) * kPiece<T>;
            stage(chunk).start(window, static_cast<const T*>(c.source), channel, static_cast<int>(c.channels),
                               c.source_is_whole != 0, window_width, c.by_window_width);
            commit_async();
        };
        Sums<kM, kN> sums;
        start(0);
        for (int chunk = 0; chunk < c.chunks; ++chunk) {
            if (chunk + 1 < c.chunks) {
                start(chunk + 1);
                wait_async_groups<1>();
            } else {
                wait_async_groups<0>();
            }
            if (c.activates_source || Products::kRounds) {
                const auto copy = stage(chunk);
                const int channel = (chunk * static_cast<int>(c.chunk) + copy.pieces.piece) * kPiece<T>;
                const PieceAffine<kPiece<T>> affine(c.source_scale, c.source_shift, c.source_relu != 0, channel,
                                                    static_cast<int>(c.channels));
                copy.template activate<Products::kRounds>(window, affine, window_width, c.by_window_width);
            }
            __syncthreads();
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int r = 0; r < Products::kLaneRows; ++r) rows[m][r] = stage(chunk).shared + row_offset[m][r];
            }
            multiply<Products>(sums, rows, offsets, zeros, weights + static_cast<int64>(chunk) * steps * kWarp,
                               column_stride, layout.begin(steps), layout.end(steps));
            __syncthreads();  // before the memory is used again
        }
        layout.stage(staged, sums);
        __syncthreads();
        finish<T, Layout>(c, tile, staged, first_feature);
        __syncthreads();
    }
}

}  // namespace sbnet
