// A residual bottleneck with pre-activation on the active blocks of images, in one launch. A CTA takes a tile of pixels
// and keeps all that lies between the input and the output in shared memory:
//
//     window  max(x * scale1 + shift1, 0)              of the tile and its halo
//     middle  max(conv1(window) * scale2 + shift2, 0)  of the same pixels, 0 outside of the image
//     middle  max(conv2(middle) * scale3 + shift3, 0)  of the tile
//     target  x + conv3(middle)
//
// In place, a CTA must not write what is the halo of another that has not read it. All CTAs therefore run at the same
// time (the host launches no more than fit, as a cooperative grid), count themselves when their window is there, and
// write only when all have. The count is long complete by then: most of a CTA's work lies between.
#include "window.cuh"

namespace sbnet {

// One axis. Block k of the output begins at pixel `k * size`, for 0 <= k < count.
struct BottleneckAxis {
    int64 count, size;
    int64 extent;  // pixels of the image
    int64 tiles;   // of a block
    int64 pad;     // of the second convolution, before the image
};

// Argument of bottleneck. Mirrored, field by field, by _fused_bottleneck.py. Strides are in numbers.
struct Bottleneck {
    const void* source;              // [batch, H, W, C]
    void* target;                    // the same, perhaps the source itself; or a stack of output tiles [rows, h, w, C]
    const StepWords* weights[3];     // packed
    const int* indices;              // [rows, 3]
    const int* bin_counts;           // [1]
    const float* scale[3];           // before each convolution; the first may be null, for one that has been done
    const float* shift[3];
    unsigned int* meeting;           // in place: CTAs that have read their window, CTAs that know it of all; else null
    int64 source_strides[3];         // channels lie side by side
    int64 target_strides[3];
    int64 index_strides[2];
    int64 rows, batch;
    BottleneckAxis height, width;
    int64 target_is_stack;
};

// Where a tile of the output lies. Names as in ConvTile.
struct BottleneckSpan {
    int first, within, size;

    __device__ BottleneckSpan(const BottleneckAxis& axis, unsigned int block, int tile, int tile_size) {
        within = tile * tile_size;
        first = static_cast<int>(block * axis.size) + within;
        const int left = static_cast<int>(axis.size) - within, in_image = static_cast<int>(axis.extent) - first;
        size = left < tile_size ? left : tile_size;
        if (in_image < size) size = in_image;  // may be negative
    }

    // The part of a window of `length` pixels from pixel `first - pad` on that lies in the image.
    __device__ void inside(const BottleneckAxis& axis, int length, int& begin, int& end) const {
        const int origin = first - static_cast<int>(axis.pad), left = static_cast<int>(axis.extent) - origin;
        begin = origin < 0 ? -origin : 0;
        end = left < length ? left : length;
    }
};

template <int kDivisor>
struct DivideBy {
    __device__ unsigned int operator()(unsigned int n) const { return n / kDivisor; }
};

// Rows of an implicit matrix: pieces of a pixel, then of its neighbours under the kernel.
template <int kPiecesOfPixel, int kPositions, int kKernelW, int kSteps>
__device__ inline void list_pieces(int* offsets, int window_width, int pitch) {
    for (int k = threadIdx.x; k < kSteps * kStepPieces; k += kProductThreads) {
        const int position = k / kPiecesOfPixel, piece = k % kPiecesOfPixel;
        offsets[k] = position < kPositions
                         ? (position / kKernelW * window_width + position % kKernelW) * pitch + piece * kPieceBytes
                         : kNoPiece;
    }
}

// Sums of one product, of kSteps steps, by all warps, staged. Row m begins at `row_at(m)` in `matrix`.
template <typename Products, typename Layout, int kSteps, typename RowAt>
__device__ inline void product(float* staged, const unsigned char* matrix, RowAt row_at, const int* offsets,
                               const unsigned char* zeros, const StepWords* packed) {
    const Layout layout;
    const int lane = threadIdx.x % kWarp;
    const unsigned char* rows[Layout::kM][Products::kLaneRows];
#pragma unroll
    for (int m = 0; m < Layout::kM; ++m) {
#pragma unroll
        for (int r = 0; r < Products::kLaneRows; ++r) {
            rows[m][r] = matrix + row_at(layout.row + m * kRows + Products::row_of(lane, r));
        }
    }
    Sums<Layout::kM, Layout::kN> sums;
    constexpr int64 kStride = static_cast<int64>(kSteps) * kWarp;
    multiply<Products>(sums, rows, offsets, zeros, packed + layout.column / kColumns * kStride, kStride,
                       layout.begin(kSteps), layout.end(kSteps));
    __syncthreads();  // the matrix has been read: what is staged may take its place
    layout.stage(staged, sums);
    __syncthreads();
}

// The step between two convolutions, from staged sums to the matrix of the next one. `is_inside` tells which pixels
// the dense network has; it pads with zeros.
template <typename Products, typename Layout, int kPixels, int kPitch, typename IsInside>
__device__ inline void activate_sums(unsigned char* matrix, const float* staged, const float* scale, const float* shift,
                                     IsInside is_inside) {
    using T = typename Products::Number;
    constexpr int kLanes = kPiece<T>, kFeatures = Layout::kAllColumns;
    const Pieces pieces(kFeatures / kLanes);
    const PieceAffine<kLanes> affine(scale, shift, true, pieces.piece * kLanes, kFeatures);
    for (int pixel = pieces.first; pixel < kPixels; pixel += pieces.step) {
        Vec<T, kLanes> numbers{};
        if (is_inside(pixel)) {
            float sum[kLanes];
            Layout::template total<kLanes>(staged, pixel, pieces.piece * kLanes, sum);
#pragma unroll
            for (int i = 0; i < kLanes; ++i) {
                const float y = affine(sum[i], i);
                if constexpr (Products::kRounds) {
                    numbers.lane[i] = round_tf32(y);
                } else {
                    numbers.lane[i] = Addition<T>::end(y);
                }
            }
        }
        store(matrix + pixel * kPitch + pieces.piece * kPieceBytes, 0, numbers);
    }
    __syncthreads();
}

// Registers: at most 255.
template <typename Products, int kC, int kB, int kTileH, int kTileW, int kKernelH, int kKernelW, typename Layout1,
          typename Layout2, typename Layout3>
__global__ void __launch_bounds__(kProductThreads, 1) bottleneck(const Bottleneck b) {
    using T = typename Products::Number;
    constexpr int kLanes = kPiece<T>;
    constexpr int kHaloH = kTileH + kKernelH - 1, kHaloW = kTileW + kKernelW - 1;
    constexpr int kHalo = kHaloH * kHaloW, kPixels = kTileH * kTileW;
    constexpr int kPiecesC = kC / kLanes, kPiecesB = kB / kLanes, kPositions = kKernelH * kKernelW;
    constexpr int kPitchC = (kPiecesC | 1) * kPieceBytes, kPitchB = (kPiecesB | 1) * kPieceBytes;
    constexpr int kSteps1 = (kPiecesC + kStepPieces - 1) / kStepPieces;
    constexpr int kSteps2 = (kPiecesB * kPositions + kStepPieces - 1) / kStepPieces;
    constexpr int kSteps3 = (kPiecesB + kStepPieces - 1) / kStepPieces;
    static_assert(kC % kColumns == 0 && kB % kColumns == 0, "channels fill pieces and columns");
    static_assert(Layout1::kAllRows >= kHalo && Layout1::kAllColumns == kB, "the first product is whole");
    static_assert(Layout2::kAllRows >= kPixels && Layout2::kAllColumns == kB, "the second product is whole");
    static_assert(Layout3::kAllRows >= kPixels && kC % Layout3::kAllColumns == 0, "the third product is whole");

    extern __shared__ StepWords bottleneck_shared[];
    unsigned char* zeros = reinterpret_cast<unsigned char*>(bottleneck_shared);
    int* offsets1 = reinterpret_cast<int*>(zeros + kPieceBytes);
    int* offsets2 = offsets1 + kSteps1 * kStepPieces;
    int* offsets3 = offsets2 + kSteps2 * kStepPieces;
    unsigned char* middle = reinterpret_cast<unsigned char*>(offsets3 + kSteps3 * kStepPieces);
    unsigned char* window_pixels = middle + kHalo * kPitchB;
    float* staged = reinterpret_cast<float*>(window_pixels);

    if (threadIdx.x == 0) store(zeros, 0, Vec<int, 4>{});
    list_pieces<kPiecesC, 1, 1, kSteps1>(offsets1, kHaloW, kPitchC);
    list_pieces<kPiecesB, kPositions, kKernelW, kSteps2>(offsets2, kHaloW, kPitchB);
    list_pieces<kPiecesB, 1, 1, kSteps3>(offsets3, kTileW, kPitchB);

    const int64 active = *b.bin_counts;
    const int tiles_of_block = static_cast<int>(b.height.tiles * b.width.tiles);
    const int64 tiles = (active < b.rows ? active : b.rows) * tiles_of_block;
    const auto leave = [&] {
        // The last one leaves the counts as they were.
        if (atomicAdd(b.meeting + 1, 1u) == static_cast<unsigned int>(tiles) - 1) b.meeting[0] = b.meeting[1] = 0;
    };
    for (int64 number = blockIdx.x; number < tiles; number += gridDim.x) {
        const int64 row = static_cast<unsigned int>(number) / static_cast<unsigned int>(tiles_of_block);
        const int tile = static_cast<int>(number - row * tiles_of_block);
        const int* triple = b.indices + row * b.index_strides[0];
        const unsigned int image = triple[0];
        const unsigned int block_h = triple[b.index_strides[1]], block_w = triple[2 * b.index_strides[1]];
        const int down = tile / static_cast<int>(b.width.tiles);
        const BottleneckSpan y(b.height, block_h, down, kTileH);
        const BottleneckSpan x(b.width, block_w, tile - down * static_cast<int>(b.width.tiles), kTileW);
        if (image >= b.batch || block_h >= b.height.count || block_w >= b.width.count || y.size <= 0 || x.size <= 0) {
            if (b.meeting != nullptr && threadIdx.x == 0) {
                arrive(b.meeting);
                leave();
            }
            continue;
        }
        Window window;
        window.row_stride = b.source_strides[1];
        window.column_stride = b.source_strides[2];
        window.channel_stride = 1;
        window.origin = image * b.source_strides[0] + (y.first - b.height.pad) * window.row_stride +
                        (x.first - b.width.pad) * window.column_stride;
        y.inside(b.height, kHaloH, window.top, window.bottom);
        x.inside(b.width, kHaloW, window.left, window.right);

        const T* source = static_cast<const T*>(b.source);
        const WindowCopy<T> copy(window_pixels, kPitchC, kHalo, kPiecesC);
        copy.start(window, source, 0, kC, true, kHaloW, DivideBy<kHaloW>{});
        wait_async();
        if (Products::kRounds || b.scale[0] != nullptr) {
            const bool activates = b.scale[0] != nullptr;
            const PieceAffine<kLanes> affine(b.scale[0], b.shift[0], activates, copy.pieces.piece * kLanes, kC);
            copy.template activate<Products::kRounds>(window, affine, kHaloW, DivideBy<kHaloW>{});
        }
        __syncthreads();
        if (b.meeting != nullptr && threadIdx.x == 0) arrive(b.meeting);

        product<Products, Layout1, kSteps1>(
            staged, window_pixels, [](int m) { return (m < kHalo ? m : 0) * kPitchC; }, offsets1, zeros, b.weights[0]);
        activate_sums<Products, Layout1, kHalo, kPitchB>(
            middle, staged, b.scale[1], b.shift[1],
            [&](int pixel) { return window.contains(pixel / kHaloW, pixel % kHaloW); });
        product<Products, Layout2, kSteps2>(
            staged, middle,
            [](int m) { return m < kPixels ? (m / kTileW * kHaloW + m % kTileW) * kPitchB : 0; }, offsets2, zeros,
            b.weights[1]);
        activate_sums<Products, Layout2, kPixels, kPitchB>(middle, staged, b.scale[2], b.shift[2],
                                                           [](int) { return true; });

        const bool stack = b.target_is_stack != 0;
        T* target = static_cast<T*>(b.target) + (stack ? row : static_cast<int64>(image)) * b.target_strides[0] +
                    (stack ? y.within : y.first) * b.target_strides[1] +
                    (stack ? x.within : x.first) * b.target_strides[2];
        const T* residual = source + image * b.source_strides[0] + y.first * window.row_stride +
                            x.first * window.column_stride;
        for (int column = 0; column < kC; column += Layout3::kAllColumns) {
            product<Products, Layout3, kSteps3>(
                staged, middle, [](int m) { return (m < kPixels ? m : 0) * kPitchB; }, offsets3, zeros,
                b.weights[2] + static_cast<int64>(column) / kColumns * kSteps3 * kWarp);
            if (b.meeting != nullptr && column == 0) {
                if (threadIdx.x == 0) {
                    wait_for(b.meeting, static_cast<unsigned int>(tiles));
                    leave();
                }
                __syncthreads();
            }
            const Pieces pieces(Layout3::kAllColumns / kLanes);
            const int channel = column + pieces.piece * kLanes;
            for (int pixel = pieces.first; pixel < kPixels; pixel += pieces.step) {
                const int dy = pixel / kTileW, dx = pixel % kTileW;
                if (dy >= y.size || dx >= x.size) continue;
                float sum[kLanes];
                Layout3::template total<kLanes>(staged, pixel, pieces.piece * kLanes, sum);
                auto numbers = load<Vec<T, kLanes>>(
                    residual + dy * window.row_stride + dx * window.column_stride + channel, 0);
#pragma unroll
                for (int i = 0; i < kLanes; ++i) {
                    numbers.lane[i] = Addition<T>::end(Addition<T>::begin(numbers.lane[i]) + sum[i]);
                }
                store(target + dy * b.target_strides[1] + dx * b.target_strides[2] + channel, 0, numbers);
            }
            __syncthreads();
        }
    }
}

}  // namespace sbnet
