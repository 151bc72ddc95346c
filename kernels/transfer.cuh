// What gather and scatter share: the packed argument, where a block lies, and how threads walk over it.
#pragma once

#include "vec.cuh"

namespace sbnet {

// One axis of the block grid, reduced by the host to the blocks that touch the image: block `first + k`
// begins at pixel `start + k * stride` for 0 <= k < count; any other index lies outside of the image.
struct Axis {
    int64 first, count, start, stride, extent;
};

// Argument of every gather and scatter kernel. Mirrored, field by field, by _transfer.py. All strides are in words,
// so the kernels know neither dtypes nor layouts: a transposed stack is one with other strides.
struct Transfer {
    void* image;            // [batch, height.extent, width.extent, channels]
    void* stack;            // [rows, block height, block width, channels]
    const int* indices;     // [rows, 3]
    const int* bin_counts;  // [1]
    int64 image_strides[4];
    int64 stack_strides[4];
    int64 index_strides[2];
    int64 rows;
    int64 batch;
    int64 channels;  // in words
    Axis height, width;
};

// The order in which consecutive threads take the words of a block: along what is contiguous in memory.
enum class Order { kChannels, kColumns };

// The block of one stack row.
template <typename Index>
struct Placement {
    bool touches_image;              // false for rows out of use, out of the batch or out of the image
    int64 image_index;               // of the block in the batch
    int64 cell_h, cell_w;            // block indices, counted from the first ones that touch the image
    int64 image_origin;              // offset of the block's pixel (0, 0), also where that is outside of the image
    int64 stack_origin;              // offset of the stack row
    Index row_begin, row_end;        // in-image rows of the block
    Index column_begin, column_end;  // in-image columns

    __device__ bool contains(Index row, Index column) const {
        return row >= row_begin && row < row_end && column >= column_begin && column < column_end;
    }
};

// In-image part [begin, end) of a block of kSize pixels that begins at pixel `origin`.
template <typename Index, Index kSize>
__device__ inline void clip(int64 origin, int64 extent, Index& begin, Index& end) {
    begin = origin < 0 ? static_cast<Index>(-origin) : Index{0};
    end = extent - origin < static_cast<int64>(kSize) ? static_cast<Index>(extent - origin) : kSize;
}

template <typename Index, Index kBlockH, Index kBlockW>
__device__ inline Placement<Index> place(const Transfer& t, int64 row) {
    Placement<Index> at;
    at.touches_image = false;
    at.image_index = at.cell_h = at.cell_w = at.image_origin = 0;
    at.stack_origin = row * t.stack_strides[0];
    at.row_begin = at.row_end = at.column_begin = at.column_end = 0;
    if (row >= *t.bin_counts) return at;

    const int* triple = t.indices + row * t.index_strides[0];
    const int64 n = triple[0];
    const int64 cell_h = triple[t.index_strides[1]] - t.height.first;
    const int64 cell_w = triple[2 * t.index_strides[1]] - t.width.first;
    if (n < 0 || n >= t.batch || cell_h < 0 || cell_h >= t.height.count || cell_w < 0 || cell_w >= t.width.count) {
        return at;
    }
    // From here on every number is bounded by the image and block sizes, whatever the indices hold.
    const int64 y = t.height.start + cell_h * t.height.stride;
    const int64 x = t.width.start + cell_w * t.width.stride;
    at.touches_image = true;
    at.image_index = n;
    at.cell_h = cell_h;
    at.cell_w = cell_w;
    at.image_origin = n * t.image_strides[0] + y * t.image_strides[1] + x * t.image_strides[2];
    clip<Index, kBlockH>(y, t.height.extent, at.row_begin, at.row_end);
    clip<Index, kBlockW>(x, t.width.extent, at.column_begin, at.column_end);
    return at;
}

// One word of a block.
template <typename Index>
struct Element {
    Index row, column, channel;

    __device__ int64 image_offset(const Transfer& t) const {
        return static_cast<int64>(row) * t.image_strides[1] + static_cast<int64>(column) * t.image_strides[2] +
               static_cast<int64>(channel) * t.image_strides[3];
    }
    __device__ int64 stack_offset(const Transfer& t) const {
        return static_cast<int64>(row) * t.stack_strides[1] + static_cast<int64>(column) * t.stack_strides[2] +
               static_cast<int64>(channel) * t.stack_strides[3];
    }
};

// The k-th word of a block in the given order.
template <typename Index, Index kBlockH, Index kBlockW, Order kOrder>
__device__ inline Element<Index> element(Index k, Index channels) {
    if constexpr (kOrder == Order::kChannels) {
        const Index pixel = k / channels;
        return {pixel / kBlockW, pixel % kBlockW, k - pixel * channels};
    } else {
        const Index line = k / kBlockW;
        return {line % kBlockH, k % kBlockW, line / kBlockH};
    }
}

// Threads of a CTA. The host may launch fewer, never more.
constexpr int kMaxThreads = 256;

// CTAs that must fit on a multiprocessor. Without it the assembler (13.5) aims for 4 or 8, and spills to get there.
constexpr int kMinCtas = 2;

// Words that a thread loads before it stores the first: enough loads in flight to cover memory latency.
constexpr int kUnroll = 4;

// A tile of the transposing kernels: kTile pixels by kTile channels, by CTAs of kTile x kTileRows threads.
constexpr int kTile = 32;
constexpr int kTileRows = 8;

// Tiles of one block: first along pixels, then along channels.
template <typename Index>
struct Tiling {
    Index pixels, tiles_across, count;

    __device__ Tiling(Index block_pixels, Index channels)
        : pixels(block_pixels),
          tiles_across((block_pixels + kTile - 1) / kTile),
          count(((block_pixels + kTile - 1) / kTile) * ((channels + kTile - 1) / kTile)) {}
};

}  // namespace sbnet
