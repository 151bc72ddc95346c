// What both bottleneck kernels share: their argument, and where tiles lie.
#pragma once

#include "transfer.cuh"
#include "window.cuh"

namespace sbnet {

// One axis. Block k of the output begins at pixel `k * size`, for 0 <= k < count.
struct BottleneckAxis {
    int64 count, size;
    int64 extent;  // pixels of the image
    int64 pad;     // of the second convolution, before the image
};

// Argument of bottleneck. Mirrored, field by field, by _fused.py. Strides are in numbers.
struct Bottleneck {
    const void* source;              // [batch, H, W, C]
    void* target;                    // the same, perhaps the source itself; or a stack of output tiles [rows, h, w, C]
    const StepWords* weights[3];     // packed
    const int* indices;              // [rows, 3]
    const int* bin_counts;           // [1]
    const float* channels;           // scale1, shift1 [C], scale2, shift2, scale3, shift3 [B], aligned to 16 bytes
    unsigned int* meeting;           // in place: CTAs that have read their window, CTAs that know it of all; else null
    int64 source_strides[3];         // channels lie side by side
    int64 target_strides[3];
    int64 index_strides[2];
    int64 rows, batch;
    BottleneckAxis height, width;
    int64 tiles;                     // of a block
    Divisor by_tiles, by_tiles_w;
    int64 tiles_w;
    int64 activates;                 // whether the first step is to be done
    int64 target_is_stack;
};

// The part of an axis of a tile that lies in the image; its size may be negative.
__device__ inline Span span_of(const BottleneckAxis& axis, unsigned int block, int tile, int tile_size) {
    Span span(static_cast<int>(block) * static_cast<int>(axis.size), axis.size, tile, tile_size);
    const int in_image = static_cast<int>(axis.extent) - span.first;
    if (in_image < span.size) span.size = in_image;
    return span;
}

// The window of a tile, which begins at a pixel that may lie before the image.
template <int kHaloH, int kHaloW>
__device__ inline Window window_of(const Bottleneck& b, const TileNumbers& tile, int top, int left) {
    Window window;
    window.row_stride = static_cast<int>(b.source_strides[1]);
    window.column_stride = static_cast<int>(b.source_strides[2]);
    window.channel_stride = 1;
    window.origin = static_cast<int64>(tile.image) * b.source_strides[0] +
                    static_cast<int64>(top) * window.row_stride + static_cast<int64>(left) * window.column_stride;
    inside_of(top, kHaloH, static_cast<int>(b.height.extent), window.top, window.bottom);
    inside_of(left, kHaloW, static_cast<int>(b.width.extent), window.left, window.right);
    return window;
}

// Where the results of a tile begin.
template <typename T>
__device__ inline T* target_of(const Bottleneck& b, const TileNumbers& tile, const Span& y, const Span& x) {
    const bool stack = b.target_is_stack != 0;
    return static_cast<T*>(b.target) + static_cast<int64>(stack ? tile.row : tile.image) * b.target_strides[0] +
           static_cast<int64>(stack ? y.within : y.first) * static_cast<int>(b.target_strides[1]) +
           static_cast<int64>(stack ? x.within : x.first) * static_cast<int>(b.target_strides[2]);
}

// Whether a CTA may write because all of them have read their windows. One thread asks, early: the answer takes a while,
// and nearly always is yes.
__device__ inline bool may_write(const Bottleneck& b, int64 tiles) {
    return b.meeting == nullptr || threadIdx.x != 0 || have_met(b.meeting, static_cast<unsigned int>(tiles));
}

// Of one thread of each CTA that has no more to ask: the last one leaves the counts as they were.
__device__ inline void leave(const Bottleneck& b, int64 tiles) {
    if (atomicAdd(b.meeting + 1, 1u) == static_cast<unsigned int>(tiles) - 1) b.meeting[0] = b.meeting[1] = 0;
}

}  // namespace sbnet
