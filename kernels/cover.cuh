// The cover map: which stack rows write to a block of the grid. It makes scatter deterministic: CTAs run in any
// order, and the map tells each of them which rows share its pixels and in which order they count.
//
// Few rows need no map: each CTA looks for the others in the list itself, which saves two launches; where blocks do not
// overlap, only for equal blocks. `head` is null then.
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

// The block of a row, as place() reads it.
struct Cell {
    unsigned int image, h, w;

    __device__ Cell(const Transfer& t, int64 row) {
        const int* triple = t.indices + row * t.index_strides[0];
        image = triple[0];
        h = static_cast<unsigned int>(triple[t.index_strides[1]]) - static_cast<unsigned int>(t.height.first);
        w = static_cast<unsigned int>(triple[2 * t.index_strides[1]]) - static_cast<unsigned int>(t.width.first);
    }
};

// Whether two rows hold the same triple.
__device__ inline bool equal_rows(const Transfer& t, int64 row, int64 other) {
    const int* a = t.indices + row * t.index_strides[0];
    const int* b = t.indices + other * t.index_strides[0];
    return a[0] == b[0] & a[t.index_strides[1]] == b[t.index_strides[1]] &
           a[2 * t.index_strides[1]] == b[2 * t.index_strides[1]];
}

// Whether equal blocks come before and after a row.
struct Twins {
    bool before, after;
};

// By the map, of which head is the first row of each block's list (or the last row of all, without lists).
template <typename Index>
__device__ inline Twins mapped_twins(const Transfer& t, const Cover& cover, const Placement<Index>& at, int64 row) {
    if (!at.touches_image) return {false, false};
    const int head = cover.head[cell_index(t, at.image_index, at.cell_h, at.cell_w)];
    if (cover.next == nullptr) return {false, head != row};
    return {head != row, cover.next[row] != kNoRow};
}

// By searching the list; all threads of the CTA ask for the same row.
__device__ inline Twins listed_twins(const Transfer& t, int64 row) {
    Twins found{false, false};
    const int64 count = *t.bin_counts;
    for (int64 other = threadIdx.x; other < t.rows; other += blockDim.x) {
        const bool equal = equal_rows(t, row, other) & other < count;
        found.before |= equal & other < row;
        found.after |= equal & other > row;
    }
    return {__syncthreads_or(found.before) != 0, __syncthreads_or(found.after) != 0};
}

// The first row after `row` with an equal block, or kNoRow.
__device__ inline int64 next_twin(const Transfer& t, const Cover& cover, int64 row) {
    if (cover.head != nullptr) return cover.next == nullptr ? kNoRow : cover.next[row];
    const int64 rows = *t.bin_counts < t.rows ? *t.bin_counts : t.rows;
    for (int64 other = row + 1; other < rows; ++other) {
        if (equal_rows(t, row, other)) return other;
    }
    return kNoRow;
}

}  // namespace sbnet
