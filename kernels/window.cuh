// A window of pixels of a tensor: brought to shared memory for products to read, activated there; and the way back,
// from the sums of all warps to pixels.
#pragma once

#include "products.cuh"
#include "transfer.cuh"

namespace sbnet {

// Threads of a CTA, as 8 warps.
constexpr int kProductThreads = 256;
constexpr int kProductWarps = kProductThreads / kWarp;

// Pixels [top, bottom) x [left, right) of the window lie in the tensor. Offsets and strides are in numbers.
struct Window {
    int64 origin;  // of pixel (0, 0), also where that lies outside of the tensor
    int64 row_stride, column_stride, channel_stride;
    int top, bottom, left, right;

    __device__ bool contains(int y, int x) const { return y >= top && y < bottom && x >= left && x < right; }
    __device__ int64 offset(int y, int x) const { return origin + y * row_stride + x * column_stride; }
};

// A thread takes one piece of every `step`-th pixel, so that it keeps what belongs to its channels in registers.
// Neighbouring threads take neighbouring pieces.
struct Pieces {
    int piece, first, step;

    __device__ explicit Pieces(int pieces_of_pixel) {
        step = kProductThreads / pieces_of_pixel;
        first = static_cast<int>(threadIdx.x) / pieces_of_pixel;
        piece = static_cast<int>(threadIdx.x) - first * pieces_of_pixel;
        if (first >= step) first = 1 << 30;  // threads that are left over
    }
};

// The step max(x * scale + shift, 0), or parts of it, for the channels of a piece. Rounded once: within the error
// bounds of products, though not what Affine gives, bit for bit.
template <int kLanes>
struct PieceAffine {
    float scale[kLanes], shift[kLanes];
    bool has_relu;

    // Arrays of a float for each channel, or null. Channels from `channels` on count as 0.
    __device__ PieceAffine(const float* scales, const float* shifts, bool relu, int channel, int channels)
        : has_relu(relu) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
            const bool exists = channel + i < channels;
            scale[i] = scales == nullptr ? 1.0f : exists ? load_constant(scales + channel + i) : 0.0f;
            shift[i] = shifts == nullptr || !exists ? 0.0f : load_constant(shifts + channel + i);
        }
    }

    __device__ float operator()(float x, int i) const {
        const float y = fma_exact(x, scale[i], shift[i]);
        return has_relu && y < 0.0f ? 0.0f : y;  // NaN stays
    }
};

// How a thread copies its pieces of a window to shared memory, pixel after pixel, `pitch` bytes each, and zeros for
// what lies outside of the tensor. An odd number of pieces to a pixel keeps load_matrices free of bank conflicts.
template <typename T>
struct WindowCopy {
    unsigned char* shared;
    int pitch;
    int pixels;
    Pieces pieces;

    __device__ WindowCopy(unsigned char* target, int pixel_pitch, int pixel_count, int pieces_of_pixel)
        : shared(target), pitch(pixel_pitch), pixels(pixel_count), pieces(pieces_of_pixel) {}

    // `by_width` divides by the width of the window. `whole` tells that pieces are pieces in memory too: aligned to 16
    // bytes, channels side by side, and as many that the last piece is full.
    template <typename ByWidth>
    __device__ void start(const Window& window, const T* tensor, int channel, int channels, bool whole, int width,
                          ByWidth by_width) const {
        const int begin = channel + pieces.piece * kPiece<T>;
        for (int pixel = pieces.first; pixel < pixels; pixel += pieces.step) {
            const int y = by_width(static_cast<unsigned int>(pixel));
            const int x = pixel - y * width;
            const bool inside = window.contains(y, x);
            unsigned char* target = shared + pixel * pitch + pieces.piece * kPieceBytes;
            const T* source = tensor + window.offset(y, x) + begin * window.channel_stride;
            if (whole) {
                copy_async<kPieceBytes>(target, source, inside && begin < channels);
            } else {
                Vec<T, kPiece<T>> numbers{};
#pragma unroll
                for (int i = 0; i < kPiece<T>; ++i) {
                    if (inside && begin + i < channels) numbers.lane[i] = source[i * window.channel_stride];
                }
                store(target, 0, numbers);
            }
        }
    }

    // After the copies of this thread are there: the step in all pixels of the tensor, zeros elsewhere as they are.
    template <bool kRounds, typename ByWidth>
    __device__ void activate(const Window& window, const PieceAffine<kPiece<T>>& affine, int width,
                             ByWidth by_width) const {
        for (int pixel = pieces.first; pixel < pixels; pixel += pieces.step) {
            const int y = by_width(static_cast<unsigned int>(pixel));
            if (!window.contains(y, pixel - y * width)) continue;
            unsigned char* place = shared + pixel * pitch + pieces.piece * kPieceBytes;
            auto numbers = load<Vec<T, kPiece<T>>>(place, 0);
#pragma unroll
            for (int i = 0; i < kPiece<T>; ++i) {
                const float y = affine(Addition<T>::begin(numbers.lane[i]), i);
                if constexpr (kRounds) {
                    numbers.lane[i] = round_tf32(y);
                } else {
                    numbers.lane[i] = Addition<T>::end(y);
                }
            }
            store(place, 0, numbers);
        }
    }
};

// How 8 warps share the sums of a product: each takes kM x kN tiles of 16 x 8, and those that differ in `depth` only,
// parts of the sums of the same.
template <int kM_, int kN_, int kWarpsM, int kWarpsN>
struct Warps {
    static constexpr int kM = kM_, kN = kN_;
    static constexpr int kDepth = kProductWarps / (kWarpsM * kWarpsN);
    static_assert(kDepth * kWarpsM * kWarpsN == kProductWarps, "8 warps are shared out");
    static constexpr int kAllRows = kWarpsM * kM * kRows, kAllColumns = kWarpsN * kN * kColumns;
    // Rows of staged sums are so long that the stores of a warp meet no bank twice.
    static constexpr int kPitch = kAllColumns + (kAllColumns / kColumns % 2 == 0 ? kColumns : 0);
    static constexpr int kStagedBytes = kDepth * kAllRows * kPitch * static_cast<int>(sizeof(float));

    int row, column, depth;  // first ones of the calling warp

    __device__ Warps() {
        const int warp = static_cast<int>(threadIdx.x) / kWarp;
        row = warp % kWarpsM * kM * kRows;
        column = warp / kWarpsM % kWarpsN * kN * kColumns;
        depth = warp / (kWarpsM * kWarpsN);
    }

    // The warp's share of `steps`.
    __device__ int begin(int steps) const { return steps * depth / kDepth; }
    __device__ int end(int steps) const { return steps * (depth + 1) / kDepth; }

    __device__ void stage(float* staged, const Sums<kM, kN>& sums) const {
        const int lane = threadIdx.x % kWarp;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int n = 0; n < kN; ++n) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int at = (depth * kAllRows + row + m * kRows + r * 8 + lane / 4) * kPitch + column +
                                   n * kColumns + lane % 4 * 2;
                    store_lanes(staged, at, Vec<float, 2>{{sums.at[m][n][2 * r], sums.at[m][n][2 * r + 1]}});
                }
            }
        }
    }

    // kLanes sums of a row, from a multiple of kLanes columns on. Parts are added in order, which makes results the
    // same in every run.
    template <int kLanes>
    __device__ static void total(const float* staged, int of_row, int of_column, float (&sum)[kLanes]) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) sum[i] = 0.0f;
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
#pragma unroll
            for (int i = 0; i < kLanes; i += 4) {
                const auto part = load_lanes<float, 4>(staged, (k * kAllRows + of_row) * kPitch + of_column + i);
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i + j] += part.lane[j];
            }
        }
    }
};

}  // namespace sbnet
