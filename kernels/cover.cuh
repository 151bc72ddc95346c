// The cover map: which stack rows write to a block of the grid. It makes scatter deterministic: CTAs run in any
// order, and the map tells each of them, for every pixel, which rows share it and in which order they count.
#pragma once

#include "transfer.cuh"

namespace sbnet {

constexpr int kNoRow = -1;

struct Cover {
    int* head;  // [batch, height.count, width.count]: a row of that block, or kNoRow
    int* next;  // [rows]: the next row of the same block, ascending, or kNoRow; null where head alone is built
};

__device__ inline int64 cell_index(const Transfer& t, int64 n, int64 cell_h, int64 cell_w) {
    return (n * t.height.count + cell_h) * t.width.count + cell_w;
}

// The blocks of the grid that cover one pixel of a block, as ranges of distances from that block.
struct Neighbours {
    int64 up, down, left, right;
};

// How far blocks reach over each other: a stride beyond the block's size is as good as the size.
template <typename Index, Index kBlockH, Index kBlockW>
struct Overlap {
    Index stride_h, stride_w;

    __device__ explicit Overlap(const Transfer& t)
        : stride_h(t.height.stride < static_cast<int64>(kBlockH) ? static_cast<Index>(t.height.stride) : kBlockH),
          stride_w(t.width.stride < static_cast<int64>(kBlockW) ? static_cast<Index>(t.width.stride) : kBlockW) {}

    __device__ bool exists() const { return stride_h < kBlockH || stride_w < kBlockW; }

    // Whether no other block of the grid covers pixel (row, column), wherever the block lies.
    __device__ bool spares(Index row, Index column) const {
        return row < stride_h && kBlockH - 1 - row < stride_h && column < stride_w && kBlockW - 1 - column < stride_w;
    }

    // A block d further on covers the pixel at row - d * stride, if that lies in [0, kBlockH); the same for columns.
    __device__ Neighbours around(const Transfer& t, const Placement<Index>& at, Index row, Index column) const {
        return {smaller((kBlockH - 1 - row) / stride_h, at.cell_h),
                smaller(row / stride_h, t.height.count - 1 - at.cell_h),
                smaller((kBlockW - 1 - column) / stride_w, at.cell_w),
                smaller(column / stride_w, t.width.count - 1 - at.cell_w)};
    }

   private:
    __device__ static int64 smaller(Index distance, int64 bound) {
        return static_cast<int64>(distance) < bound ? static_cast<int64>(distance) : bound;
    }
};

// Whether `row` is the last of all rows that cover the pixel. head holds the last row of each block.
template <typename Index>
__device__ inline bool is_last(const Transfer& t, const Cover& cover, const Placement<Index>& at,
                               const Neighbours& around, int row) {
    for (int64 dh = -around.up; dh <= around.down; ++dh) {
        for (int64 dw = -around.left; dw <= around.right; ++dw) {
            if (cover.head[cell_index(t, at.image_index, at.cell_h + dh, at.cell_w + dw)] > row) return false;
        }
    }
    return true;
}

// A row that covers a pixel, and its block's distance from the block where the search began.
struct Covering {
    int row;
    int64 dh, dw;
};

// The first row after `previous` that covers the pixel, or kNoRow. head and next hold ascending lists.
template <typename Index>
__device__ inline Covering next_covering(const Transfer& t, const Cover& cover, const Placement<Index>& at,
                                         const Neighbours& around, int previous) {
    Covering best{kNoRow, 0, 0};
    for (int64 dh = -around.up; dh <= around.down; ++dh) {
        for (int64 dw = -around.left; dw <= around.right; ++dw) {
            int row = cover.head[cell_index(t, at.image_index, at.cell_h + dh, at.cell_w + dw)];
            while (row != kNoRow && row <= previous) row = cover.next[row];
            if (row != kNoRow && (best.row == kNoRow || row < best.row)) best = {row, dh, dw};
        }
    }
    return best;
}

}  // namespace sbnet
