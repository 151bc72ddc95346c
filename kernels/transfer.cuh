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
    int64 channels;              // in words
    int64 run;                   // words that lie one after the other in image and stack, see Order
    int64 run_magic, run_shift;  // k / run == k * run_magic >> run_shift for 0 <= k < 2^31
    int64 shared_lanes;          // threads that take one pixel's channels where rows share it: a power of two, at most kWarp
    Axis height, width;
};

// How a block is taken apart into runs of words that lie one after the other in image and stack; consecutive
// threads take consecutive words of a run.
enum class Order {
    kRows,     // a run is a row of the block: pixels and channels are dense
    kPixels,   // a run is a pixel: its channels are
    kColumns,  // a run is a row of one channel: the columns are
};

// Pixels of a block.
template <typename Index>
struct Rect {
    Index row_begin, row_end, column_begin, column_end;

    __device__ bool contains(Index row, Index column) const {
        return row >= row_begin && row < row_end && column >= column_begin && column < column_end;
    }
};

// The block of one stack row.
template <typename Index>
struct Placement {
    bool touches_image;      // false for rows out of use, out of the batch or out of the image
    int64 image_index;       // of the block in the batch
    int64 cell_h, cell_w;    // block indices, counted from the first ones that touch the image
    int64 image_origin;      // offset of the block's pixel (0, 0), also where that is outside of the image
    int64 stack_origin;      // offset of the stack row
    Rect<Index> inside;      // in-image pixels
};

// In-image part [begin, end) of a block of kSize pixels that begins at pixel `origin`.
template <typename Index, Index kSize>
__device__ inline void clip(int64 origin, int64 extent, Index& begin, Index& end) {
    begin = origin < 0 ? static_cast<Index>(-origin) : Index{0};
    end = extent - origin < static_cast<int64>(kSize) ? static_cast<Index>(extent - origin) : kSize;
}

template <typename Index, Index kBlockH, Index kBlockW>
__device__ inline Placement<Index> place(const Transfer& t, int64 row) {
    // All four are asked for before any is looked at: one trip to memory, not two.
    const int* triple = t.indices + row * t.index_strides[0];
    const int64 n = triple[0];
    const int64 cell_h = triple[t.index_strides[1]] - t.height.first;
    const int64 cell_w = triple[2 * t.index_strides[1]] - t.width.first;
    const int64 count = *t.bin_counts;

    Placement<Index> at;
    at.touches_image = row < count && n >= 0 && n < t.batch && cell_h >= 0 && cell_h < t.height.count && cell_w >= 0 &&
                       cell_w < t.width.count;
    at.stack_origin = row * t.stack_strides[0];
    at.image_index = at.cell_h = at.cell_w = at.image_origin = 0;
    at.inside = {0, 0, 0, 0};
    if (!at.touches_image) return at;
    // From here on every number is bounded by the image and block sizes, whatever the indices hold.
    const int64 y = t.height.start + cell_h * t.height.stride;
    const int64 x = t.width.start + cell_w * t.width.stride;
    at.image_index = n;
    at.cell_h = cell_h;
    at.cell_w = cell_w;
    at.image_origin = n * t.image_strides[0] + y * t.image_strides[1] + x * t.image_strides[2];
    clip<Index, kBlockH>(y, t.height.extent, at.inside.row_begin, at.inside.row_end);
    clip<Index, kBlockW>(x, t.width.extent, at.inside.column_begin, at.inside.column_end);
    return at;
}

// Where one word lies, counted from the origins of its block.
struct Spot {
    int64 image_offset, stack_offset;
    bool inside;  // of the rectangle that the walk was given
};

// Offsets of a pixel's first channel.
template <typename Index>
__device__ inline int64 image_offset(const Transfer& t, Index row, Index column) {
    return static_cast<int64>(row) * t.image_strides[1] + static_cast<int64>(column) * t.image_strides[2];
}
template <typename Index>
__device__ inline int64 stack_offset(const Transfer& t, Index row, Index column) {
    return static_cast<int64>(row) * t.stack_strides[1] + static_cast<int64>(column) * t.stack_strides[2];
}

// Numbers the words of a block along its runs, and finds the k-th.
template <typename Index, Index kBlockH, Index kBlockW, Order kOrder>
struct Walk {
    const Transfer& t;
    Rect<Index> rect;

    __device__ Walk(const Transfer& transfer, const Rect<Index>& pixels) : t(transfer), rect(pixels) {
        if constexpr (kOrder == Order::kRows) {  // columns are counted in words
            rect.column_begin *= static_cast<Index>(t.channels);
            rect.column_end *= static_cast<Index>(t.channels);
        }
    }

    __device__ Spot spot(Index k) const {
        if constexpr (kOrder == Order::kRows) {
            const Index row = by_run(k);
            const Index word = k - row * static_cast<Index>(t.run);
            return {static_cast<int64>(row) * t.image_strides[1] + static_cast<int64>(word),
                    static_cast<int64>(row) * t.stack_strides[1] + static_cast<int64>(word), rect.contains(row, word)};
        } else {
            Index row, column, channel;
            if constexpr (kOrder == Order::kPixels) {
                const Index pixel = by_run(k);
                channel = k - pixel * static_cast<Index>(t.run);
                row = pixel / kBlockW;
                column = pixel % kBlockW;
            } else {
                const Index line = k / kBlockW;
                column = k % kBlockW;
                row = line % kBlockH;
                channel = line / kBlockH;
            }
            return {image_offset(t, row, column) + static_cast<int64>(channel) * t.image_strides[3],
                    stack_offset(t, row, column) + static_cast<int64>(channel) * t.stack_strides[3],
                    rect.contains(row, column)};
        }
    }

   private:
    __device__ Index by_run(Index k) const {
        if constexpr (sizeof(Index) == 4) {
            return static_cast<Index>(static_cast<unsigned long long>(k) * static_cast<unsigned int>(t.run_magic) >>
                                      static_cast<int>(t.run_shift));
        } else {
            return k / static_cast<Index>(t.run);
        }
    }
};

// Threads of a CTA. The host may launch fewer, never more.
constexpr int kMaxThreads = 256;

// CTAs that must fit on a multiprocessor. Without a number the assembler (13.5) aims for 4 or 8, and spills to get there.
// On Hopper 3 fit without spilling, and adding blocks went from 0.81 to 0.90 of the copy bandwidth with them; for other
// generations, and where counting takes 64 bits, 3 would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
template <typename Index>
constexpr int kMinCtas = sizeof(Index) == 4 ? 3 : 2;
#else
template <typename Index>
constexpr int kMinCtas = 2;
#endif

// Words that a thread loads before it stores the first: enough loads in flight to cover memory latency.
constexpr int kUnroll = 4;

constexpr int kWarp = 32;

}  // namespace sbnet
