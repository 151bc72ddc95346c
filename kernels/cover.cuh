// The cover map: which stack rows write to a block of the grid. It makes scatter deterministic: CTAs run in any
// order, and the map tells each of them, for every pixel, which rows share it and in which order they count.
//
// Few rows on a grid without overlaps need no map: there only equal blocks share pixels, and each warp looks for
// those in the list itself, which saves two launches. `head` is null then.
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

// Whether two rows in use hold the same triple.
__device__ inline bool equal_rows(const Transfer& t, int64 row, int64 other) {
    const int* a = t.indices + row * t.index_strides[0];
    const int* b = t.indices + other * t.index_strides[0];
    return a[0] == b[0] && a[t.index_strides[1]] == b[t.index_strides[1]] &&
           a[2 * t.index_strides[1]] == b[2 * t.index_strides[1]];
}

// Whether equal blocks come before and after a row.
struct Twins {
    bool before, after;
};

// By the map, of which head is the first row of each block's list (or the last row of all, without lists).
template <typename Index>
__device__ inline Twins mapped_twins(const Transfer& t, const Cover& cover, const Placement<Index>& at, int64 row) {
    const int head = cover.head[cell_index(t, at.image_index, at.cell_h, at.cell_w)];
    if (cover.next == nullptr) return {false, head != row};
    return {head != row, cover.next[row] != kNoRow};
}

// By searching the list; all lanes of the warp ask for the same row.
__device__ inline Twins listed_twins(const Transfer& t, int64 row) {
    Twins found{false, false};
    const int64 rows = *t.bin_counts < t.rows ? *t.bin_counts : t.rows;
#pragma unroll 1
    for (int64 other = threadIdx.x % kWarp; other < rows; other += kWarp) {
        const bool equal = other != row && equal_rows(t, row, other);
        found.before |= equal && other < row;
        found.after |= equal && other > row;
    }
    return {__any_sync(0xffffffffu, found.before) != 0, __any_sync(0xffffffffu, found.after) != 0};
}

// How far blocks reach over each other: a stride beyond the block's size is as good as the size.
template <typename Index, Index kBlockH, Index kBlockW>
struct Overlap {
    Index stride_h, stride_w;

    __device__ explicit Overlap(const Transfer& t)
        : stride_h(t.height.stride < static_cast<int64>(kBlockH) ? static_cast<Index>(t.height.stride) : kBlockH),
          stride_w(t.width.stride < static_cast<int64>(kBlockW) ? static_cast<Index>(t.width.stride) : kBlockW) {}

    __device__ bool exists() const { return stride_h < kBlockH || stride_w < kBlockW; }

    // Whether a block overlaps with none but the 8 around it, and a pixel lies in at most 2 x 2 blocks.
    __device__ bool is_near() const { return kBlockH - stride_h <= stride_h && kBlockW - stride_w <= stride_w; }
};

// The part of `pixels` that the blocks above, below, left and right (those that are there) do not cover.
template <typename Index, Index kBlockH, Index kBlockW>
__device__ inline Rect<Index> spared(Rect<Index> pixels, const Overlap<Index, kBlockH, kBlockW>& overlap, bool above,
                                     bool below, bool left, bool right) {
    const Index first_row = kBlockH - overlap.stride_h;
    const Index first_column = kBlockW - overlap.stride_w;
    if (above && pixels.row_begin < first_row) pixels.row_begin = first_row;
    if (below && pixels.row_end > overlap.stride_h) pixels.row_end = overlap.stride_h;
    if (left && pixels.column_begin < first_column) pixels.column_begin = first_column;
    if (right && pixels.column_end > overlap.stride_w) pixels.column_end = overlap.stride_w;
    return pixels;
}

// Heads of the 3 x 3 blocks around a row's own, in shared memory, one table for each warp.
struct Nearby {
    int head[9];

    __device__ int at(int dh, int dw) const { return head[3 * (dh + 1) + dw + 1]; }
    __device__ bool any(int a, int b, int c) const {
        return head[a] != kNoRow || head[b] != kNoRow || head[c] != kNoRow;
    }

    // Called by all lanes of a warp for one row. Returns whether no block has twins and the rows come in the order of the
    // grid, as they do in the result of reduce_mask: then sums need no search for the next row.
    template <typename Index>
    __device__ bool load(const Transfer& t, const Cover& cover, const Placement<Index>& at) {
        const int lane = threadIdx.x % kWarp;
        int mine = kNoRow;
        bool plain = true;
        if (lane < 9) {
            const int64 cell_h = at.cell_h + lane / 3 - 1;
            const int64 cell_w = at.cell_w + lane % 3 - 1;
            if (cell_h >= 0 && cell_h < t.height.count && cell_w >= 0 && cell_w < t.width.count) {
                mine = cover.head[cell_index(t, at.image_index, cell_h, cell_w)];
            }
            if (mine != kNoRow && cover.next != nullptr) plain = cover.next[mine] == kNoRow;
            head[lane] = mine;
        }
        __syncwarp();
        if (lane < 9 && mine != kNoRow) {
#pragma unroll 1
            for (int before = 0; before < lane; ++before) plain = plain && head[before] < mine;
        }
        return __all_sync(0xffffffffu, plain) != 0;
    }
};

// A row that covers a pixel, and its block's distance from the block where the search began.
struct Covering {
    int row;
    int64 dh, dw;
};

// The first row after `previous` that covers pixel (row, column) of the block at `at`, or kNoRow. head and next hold
// ascending lists. A block d further on covers the pixel at row - d * stride, if that lies in [0, kBlockH).
template <typename Index, Index kBlockH, Index kBlockW>
__device__ inline Covering next_covering(const Transfer& t, const Cover& cover, const Placement<Index>& at,
                                         const Overlap<Index, kBlockH, kBlockW>& overlap, Index row, Index column,
                                         int previous) {
    Covering best{kNoRow, 0, 0};
    const int64 top = at.cell_h - static_cast<int64>((kBlockH - 1 - row) / overlap.stride_h);
    const int64 left = at.cell_w - static_cast<int64>((kBlockW - 1 - column) / overlap.stride_w);
    const int64 bottom = at.cell_h + static_cast<int64>(row / overlap.stride_h);
    const int64 right = at.cell_w + static_cast<int64>(column / overlap.stride_w);
#pragma unroll 1
    for (int64 h = top < 0 ? 0 : top; h <= bottom && h < t.height.count; ++h) {
#pragma unroll 1
        for (int64 w = left < 0 ? 0 : left; w <= right && w < t.width.count; ++w) {
            int found = cover.head[cell_index(t, at.image_index, h, w)];
#pragma unroll 1
            while (found != kNoRow && found <= previous) found = cover.next == nullptr ? kNoRow : cover.next[found];
            if (found != kNoRow && (best.row == kNoRow || found < best.row)) {
                best = {found, h - at.cell_h, w - at.cell_w};
            }
        }
    }
    return best;
}

// The same without a map, where only equal blocks share pixels.
__device__ inline Covering next_twin(const Transfer& t, int row, int previous) {
    const int64 rows = *t.bin_counts < t.rows ? *t.bin_counts : t.rows;
#pragma unroll 1
    for (int64 other = previous + 1; other < rows; ++other) {
        if (equal_rows(t, row, other)) return {static_cast<int>(other), 0, 0};
    }
    return {kNoRow, 0, 0};
}

}  // namespace sbnet
