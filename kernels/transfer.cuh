// What gather and scatter share: the packed argument, where a block lies, and how threads divide it among them.
#pragma once

#include "vec.cuh"

namespace sbnet {

// One axis of the block grid, reduced by the host to the blocks that touch the image: block `first + k`
// begins at pixel `start + k * stride` for 0 <= k < count; any other index lies outside of the image.
struct Axis {
    int64 first, count, start, stride, extent;
};

// n / divisor == n * magic >> shift for 0 <= n < 2^31.
struct Divisor {
    int64 magic, shift;

    __device__ unsigned int operator()(unsigned int n) const {
        return static_cast<unsigned int>(static_cast<unsigned long long>(n) * static_cast<unsigned int>(magic) >>
                                         static_cast<int>(shift));
    }
};

// Argument of every gather and scatter kernel. Mirrored, field by field, by _transfer.py. All strides are in words,
// so the kernels know neither dtypes nor layouts: a transposed stack is one with other strides.
struct Transfer {
    void* image;            // [batch, height.extent, width.extent, channels]
    void* stack;            // [rows, block height, block width, channels]
    const int* indices;     // [rows, 3]
    const int* bin_counts;  // [1]
    const void* scale;      // [channels], or null: see Affine
    const void* shift;
    int64 image_strides[4];
    int64 stack_strides[4];
    int64 index_strides[2];
    int64 rows;
    int64 batch;
    int64 channels;  // in words
    Divisor by_channels;
    int64 columns;       // of words in a block: block width x channels
    int64 rows_per_cta;  // stack rows that a CTA takes, more than 1 only where it has threads for all their columns
    int64 slot;          // threads that each of them has then: at least `columns`
    Divisor by_slot;
    int64 ctas_per_row;  // CTAs that share the columns, or the tiles, of the stack rows of one CTA
    Divisor by_ctas_per_row;
    int64 lines;         // rows of a block that a thread walks down
    Axis height, width;
    int64 relu;
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
    bool touches_image;            // false for rows out of use, out of the batch or out of the image
    unsigned int image_index;      // of the block in the batch
    unsigned int cell_h, cell_w;   // block indices, counted from the first ones that touch the image
    int64 image_origin;            // offset of the block's pixel (0, 0), also where that is outside of the image
    int64 stack_origin;            // offset of the stack row
    Rect<Index> inside;            // in-image pixels
};

// Pixel coordinates, which are negative beyond the upper and the left edge. 32 bits are enough for them where they
// are for Index: the host sees to that.
template <typename Index>
struct SignedOf;
template <>
struct SignedOf<unsigned int> {
    using type = int;
};
template <>
struct SignedOf<unsigned long long> {
    using type = int64;
};

// In-image part [begin, end) of a block of kSize pixels that begins at pixel `origin`.
template <typename Index, Index kSize, typename Signed>
__device__ inline void clip(Signed origin, Signed extent, Index& begin, Index& end) {
    begin = origin < 0 ? static_cast<Index>(-origin) : Index{0};
    end = extent - origin < static_cast<Signed>(kSize) ? static_cast<Index>(extent - origin) : kSize;
}

template <typename Index, Index kBlockH, Index kBlockW>
__device__ inline Placement<Index> place(const Transfer& t, int64 row) {
    using Signed = typename SignedOf<Index>::type;
    // All four are asked for before any is looked at: one trip to memory, not two.
    const int* triple = t.indices + row * t.index_strides[0];
    const unsigned int n = triple[0];
    const unsigned int index_h = triple[t.index_strides[1]];
    const unsigned int index_w = triple[2 * t.index_strides[1]];
    const int64 count = *t.bin_counts;

    // Unsigned differences: what comes before the first is beyond every count.
    Placement<Index> at;
    at.image_index = n;
    at.cell_h = index_h - static_cast<unsigned int>(t.height.first);
    at.cell_w = index_w - static_cast<unsigned int>(t.width.first);
    at.touches_image = row < count && n < t.batch && at.cell_h < t.height.count && at.cell_w < t.width.count;
    at.stack_origin = row * t.stack_strides[0];
    at.image_origin = 0;
    at.inside = {0, 0, 0, 0};
    if (!at.touches_image) return at;
    // From here on every number is bounded by the image and block sizes, whatever the indices hold.
    const Signed y =
        static_cast<Signed>(t.height.start) + static_cast<Signed>(at.cell_h) * static_cast<Signed>(t.height.stride);
    const Signed x =
        static_cast<Signed>(t.width.start) + static_cast<Signed>(at.cell_w) * static_cast<Signed>(t.width.stride);
    at.image_origin = n * t.image_strides[0] + y * t.image_strides[1] + x * t.image_strides[2];
    clip<Index, kBlockH>(y, static_cast<Signed>(t.height.extent), at.inside.row_begin, at.inside.row_end);
    clip<Index, kBlockW>(x, static_cast<Signed>(t.width.extent), at.inside.column_begin, at.inside.column_end);
    return at;
}

// Offsets of a pixel's first channel.
template <typename Index>
__device__ inline int64 image_offset(const Transfer& t, Index row, Index column) {
    return static_cast<int64>(row) * t.image_strides[1] + static_cast<int64>(column) * t.image_strides[2];
}
template <typename Index>
__device__ inline int64 stack_offset(const Transfer& t, Index row, Index column) {
    return static_cast<int64>(row) * t.stack_strides[1] + static_cast<int64>(column) * t.stack_strides[2];
}

// What consecutive threads step along: what is contiguous in image and stack.
enum class Order { kChannels, kColumns };

// One word of each row of a block: a thread takes a column and walks down its rows. All it needs to know then changes
// once a column, and each further word costs an addition to two addresses.
template <typename Index, Index kBlockW, Order kOrder>
struct Column {
    Index column, channel;

    __device__ Column(const Transfer& t, Index number) {
        if constexpr (kOrder == Order::kChannels) {
            if constexpr (sizeof(Index) == 4) {
                column = t.by_channels(number);
            } else {
                column = number / static_cast<Index>(t.channels);
            }
            channel = number - column * static_cast<Index>(t.channels);
        } else {
            channel = number / kBlockW;
            column = number % kBlockW;
        }
    }

    __device__ int64 image_offset(const Transfer& t) const {
        return static_cast<int64>(column) * t.image_strides[2] + static_cast<int64>(channel) * t.image_strides[3];
    }
    __device__ int64 stack_offset(const Transfer& t) const {
        return static_cast<int64>(column) * t.stack_strides[2] + static_cast<int64>(channel) * t.stack_strides[3];
    }
};

// Which group of stack rows a CTA works on, and which part of their columns or tiles. Neighbouring CTAs work on
// neighbouring memory.
struct Cta {
    int64 rows;
    unsigned int part;

    __device__ explicit Cta(const Transfer& t) {
        const unsigned int group = t.by_ctas_per_row(blockIdx.x);
        rows = group;
        part = blockIdx.x - group * static_cast<unsigned int>(t.ctas_per_row);
    }
};

// A thread's share of the work: columns `first`, `first + step`, ... of one stack row, and rows [begin, end) of its
// block, of which blockIdx.y counts the parts.
template <typename Index, Index kBlockH>
struct Share {
    int64 row;  // t.rows for threads that are left over
    Index first, step, begin, end;

    __device__ Share(int64 of_row, Index first_column, Index every, Index first_line, Index last_line)
        : row(of_row), first(first_column), step(every), begin(first_line), end(last_line) {}
    __device__ explicit Share(const Transfer& t) {
        const Cta cta(t);
        const bool alone = t.rows_per_cta == 1;
        const unsigned int slot = alone ? 0 : t.by_slot(threadIdx.x);
        row = slot < t.rows_per_cta ? cta.rows * t.rows_per_cta + slot : t.rows;
        step = alone ? static_cast<Index>(t.ctas_per_row) * blockDim.x : static_cast<Index>(t.slot);
        first = static_cast<Index>(cta.part) * blockDim.x + (threadIdx.x - slot * static_cast<unsigned int>(t.slot));
        begin = blockIdx.y * static_cast<Index>(t.lines);
        end = kBlockH - begin < static_cast<Index>(t.lines) ? kBlockH : begin + static_cast<Index>(t.lines);
    }
};

// Threads of a CTA. The host may launch fewer, never more.
constexpr int kMaxThreads = 256;

// Words that a thread loads before it stores the first, at most. On an H200, gathering half of the blocks of
// 8x512x512x128 float32, 18 x 18 pixels each, reached 1.00 of a copy's bandwidth with 9 words of 16 bytes, 0.99 with 6,
// 0.98 with 4 and 0.97 with 3. With 3 channels, in words of 4 bytes, gather reached 0.78, 0.82 and 0.83 with 6, 12 and
// 18, and scatter 0.70, 0.67 and 0.62.
template <int kWordBytes>
constexpr int kMostLoads = kWordBytes == 16 ? 9 : 12;

// So many of them that the batches of a block of `rows` rows are about even.
template <typename Index>
constexpr int batch_of(Index rows, int most) {
    const Index batches = (rows + most - 1) / most;
    return static_cast<int>((rows + batches - 1) / batches);
}

constexpr int kWarp = 32;

// CTAs that must fit on a multiprocessor, where `hopper` is what was measured best on an H200. For other generations
// the assembler may use up to 128 registers, and never spills.
constexpr int ctas_that_fit(int hopper) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    return hopper;
#else
    return hopper < 2 ? hopper : 2;
#endif
}

}  // namespace sbnet
