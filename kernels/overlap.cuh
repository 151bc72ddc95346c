// Blocks that overlap. Each pixel is written once, by the threads of one of the rows that cover it: the last where
// blocks overwrite, the first where they add. Those find the other rows through the cover map, or in the list itself if
// that is short, and add them in the order of the indices: so the result depends on the indices alone, to the bit, and
// never on which CTA runs first.
#pragma once

#include "combine.cuh"
#include "cover.cuh"

namespace sbnet {

// How far blocks reach over each other: a stride beyond the block's size is as good as the size.
template <typename Index, Index kBlockH, Index kBlockW>
struct Overlap {
    Index stride_h, stride_w;

    __device__ explicit Overlap(const Transfer& t)
        : stride_h(t.height.stride < static_cast<int64>(kBlockH) ? static_cast<Index>(t.height.stride) : kBlockH),
          stride_w(t.width.stride < static_cast<int64>(kBlockW) ? static_cast<Index>(t.width.stride) : kBlockW) {}

    // Whether a block overlaps with none but the 8 around it, and a pixel lies in at most 2 x 2 blocks. A block then
    // has 3 x 3 zones, of which each pixel is covered by the same blocks.
    __device__ bool is_near() const { return kBlockH - stride_h <= stride_h && kBlockW - stride_w <= stride_w; }

    // Which neighbour reaches a row or a column of a near block: the one before (-1), the one after (1), or none (0).
    __device__ int zone_h(Index row) const { return row >= stride_h ? 1 : row < kBlockH - stride_h ? -1 : 0; }
    __device__ int zone_w(Index column) const { return column >= stride_w ? 1 : column < kBlockW - stride_w ? -1 : 0; }
};

// How many blocks one lies further on than another.
struct Distance {
    int64 dh, dw;

    template <typename Index>
    __device__ Distance(const Placement<Index>& from, const Cell& to)
        : dh(int64{to.h} - from.cell_h), dw(int64{to.w} - from.cell_w) {}
};

// Rows of a list without a map, at most.
constexpr int kListedRows = 512;

// What a row knows of the blocks around its own, in shared memory: one table for each warp, which reads the map; or one
// for the CTA, all of whose threads search the list for the same row.
struct Nearby {
    int head[9];                             // of the 3 x 3 blocks around its own
    unsigned int rows[kListedRows / kWarp];  // without a map: a bit for each row whose block overlaps with its own

    __device__ int at(int dh, int dw) const { return head[3 * (dh + 1) + dw + 1]; }

    // Called by all lanes of a warp. Whether the rows come in the order of the grid, as they do in the result of
    // reduce_mask, and no lane knows of twins: then sums need no search for the next row.
    __device__ bool is_plain(bool twins) const {
        const int lane = threadIdx.x % kWarp;
        bool ordered = true;
        if (lane < 9 && head[lane] != kNoRow) {
#pragma unroll 1
            for (int before = 0; before < lane; ++before) ordered = ordered && head[before] < head[lane];
        }
        return __all_sync(0xffffffffu, ordered && !twins) != 0;
    }

    // By the map; called by all lanes of a warp for one row. Returns is_plain.
    template <typename Index>
    __device__ bool load(const Transfer& t, const Cover& cover, const Placement<Index>& at) {
        const int lane = threadIdx.x % kWarp;
        int mine = kNoRow;
        bool twins = false;
        if (lane < 9) {
            const int64 cell_h = int64{at.cell_h} + lane / 3 - 1;
            const int64 cell_w = int64{at.cell_w} + lane % 3 - 1;
            if (cell_h >= 0 && cell_h < t.height.count && cell_w >= 0 && cell_w < t.width.count) {
                mine = cover.head[cell_index(t, at.image_index, cell_h, cell_w)];
            }
            if (mine != kNoRow && cover.next != nullptr) twins = cover.next[mine] != kNoRow;
            head[lane] = mine;
        }
        __syncwarp();
        return is_plain(twins);
    }

    // Without a map; called by all threads of a CTA for one row. Returns whether an equal block leaves the row nothing to
    // do: one before it if `first_counts`, else one after it. `twins` tells whether one of the 3 x 3 blocks has several
    // rows.
    template <typename Index, Index kBlockH, Index kBlockW>
    __device__ bool search(const Transfer& t, const Overlap<Index, kBlockH, kBlockW>& overlap,
                           const Placement<Index>& at, int64 row, bool first_counts, bool& twins) {
        if (threadIdx.x < 9) head[threadIdx.x] = kNoRow;
        __syncthreads();
        const int64 reach_h = (kBlockH - 1) / overlap.stride_h, reach_w = (kBlockW - 1) / overlap.stride_w;
        const int64 count = *t.bin_counts;
        const int lane = threadIdx.x % kWarp;
        bool leaves_it = false, repeats = false;
#pragma unroll 1
        for (int64 first = threadIdx.x - lane; first < t.rows; first += blockDim.x) {
            const int64 other = first + lane;
            bool overlaps = other < t.rows && other < count;
            if (overlaps) {
                const Cell cell(t, other);
                const Distance distance(at, cell);
                const int64 dh = distance.dh, dw = distance.dw;
                // It may lie outside of the image: then it covers none of the pixels that are asked for.
                overlaps = cell.image == at.image_index && dh >= -reach_h && dh <= reach_h && dw >= -reach_w &&
                           dw <= reach_w;
                if (overlaps && dh >= -1 && dh <= 1 && dw >= -1 && dw <= 1) {
                    repeats |= atomicMax(&head[3 * (dh + 1) + dw + 1], static_cast<int>(other)) != kNoRow;
                }
                leaves_it |= overlaps && dh == 0 && dw == 0 && (first_counts ? other < row : other > row);
            }
            const unsigned int found = __ballot_sync(0xffffffffu, overlaps);
            if (lane == 0) rows[first / kWarp] = found;
        }
        twins = __syncthreads_or(repeats) != 0;
        return __syncthreads_or(leaves_it) != 0;
    }
};

// The i-th of the up to 2 x 2 blocks that cover a zone, as a distance in blocks; in the order of the grid.
struct Coverer {
    int dh, dw;
    bool reaches;

    __device__ Coverer(int i, int zone_h, int zone_w)
        : dh(i / 2 + (zone_h < 0 ? -1 : 0)),
          dw(i % 2 + (zone_w < 0 ? -1 : 0)),
          reaches(dh <= (zone_h > 0 ? 1 : 0) && dw <= (zone_w > 0 ? 1 : 0)) {}
};

// What a row has to do where blocks overlap. All lanes of a warp ask for the same row; without a map, which kMayList
// allows, all threads of a CTA.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW, bool kMayList>
struct OverlapTask {
    Overlap<Index, kBlockH, kBlockW> overlap;
    bool idle;              // nothing: out of use, outside of the image, or an equal block does it
    bool near;              // whether the zones tell it all; otherwise it searches for other rows, pixel by pixel
    unsigned int writes;    // of the zones, bit 3 * (zone_h + 1) + zone_w + 1: the row writes them
    unsigned int alone;     // no other row covers them

    __device__ OverlapTask(const Transfer& t, const Cover& cover, const Placement<Index>& at, int64 row, Nearby& nearby)
        : overlap(t), idle(!at.touches_image), near(false), writes(0), alone(0) {
        if (idle) return;
        bool plain;
        if (kMayList && cover.head == nullptr) {
            bool repeats;
            idle = nearby.search(t, overlap, at, row, Combine::kAdds, repeats);
            if (idle || !overlap.is_near()) return;
            plain = nearby.is_plain(repeats);
        } else {
            const Twins twins = mapped_twins(t, cover, at, row);
            idle = Combine::kAdds ? twins.before : twins.after;
            if (idle || !overlap.is_near()) return;
            plain = nearby.load(t, cover, at);
        }
        near = plain || !Combine::kAdds;
        // Each of nine lanes looks at one zone.
        const int lane = threadIdx.x % kWarp;
        bool first = true, last = true;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Coverer other(i, lane / 3 - 1, lane % 3 - 1);
            const int found = lane < 9 && other.reaches ? nearby.at(other.dh, other.dw) : kNoRow;
            first &= found == kNoRow || found >= row;
            last &= found <= row;
        }
        writes = __ballot_sync(0xffffffffu, Combine::kAdds ? first : last);
        alone = __ballot_sync(0xffffffffu, first && last);
    }

    __device__ static bool has(unsigned int zones, int zone_h, int zone_w) {
        return (zones >> (3 * (zone_h + 1) + zone_w + 1) & 1) != 0;
    }
    // Whether the row writes a pixel from its own block alone.
    __device__ bool owns(Index row, Index column) const {
        return near && has(Combine::kAdds ? alone : writes, overlap.zone_h(row), overlap.zone_w(column));
    }
    // Whether it writes it together with other blocks.
    __device__ bool sums(int zone_h, int zone_w) const {
        return Combine::kAdds && has(writes & ~alone, zone_h, zone_w);
    }
};

// Sums of the zones of a near block that others cover too.
template <typename Combine, Order kOrder, typename Index, Index kBlockH, Index kBlockW, bool kMayList>
__device__ inline void put_zones(const Transfer& t, const Placement<Index>& at, const Share<Index, kBlockH>& share,
                                 const OverlapTask<Combine, Index, kBlockH, kBlockW, kMayList>& task, const Nearby& nearby) {
    using Word = typename Combine::Word;
    constexpr int kBatch = 1;
    const Index bounds[4] = {0, kBlockH - task.overlap.stride_h, task.overlap.stride_h, kBlockH};
    for (Index number = share.first; number < static_cast<Index>(t.columns); number += share.step) {
        const Column<Index, kBlockW, kOrder> column(t, number);
        if (column.column < at.inside.column_begin || column.column >= at.inside.column_end) continue;
        const int zone_w = task.overlap.zone_w(column.column);
#pragma unroll 1
        for (int zone_h = -1; zone_h <= 1; ++zone_h) {
            if (!task.sums(zone_h, zone_w)) continue;
            Index begin = bounds[zone_h + 1];
            Index end = bounds[zone_h + 2];
            if (begin < at.inside.row_begin) begin = at.inside.row_begin;
            if (begin < share.begin) begin = share.begin;
            if (end > at.inside.row_end) end = at.inside.row_end;
            if (end > share.end) end = share.end;
            int64 source[4];
            bool there[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Coverer other(i, zone_h, zone_w);
                const int row = other.reaches ? nearby.at(other.dh, other.dw) : kNoRow;
                there[i] = row != kNoRow;
                source[i] = row * t.stack_strides[0] + column.stack_offset(t) +
                            (static_cast<int64>(begin) - other.dh * t.height.stride) * t.stack_strides[1] -
                            other.dw * t.width.stride * t.stack_strides[2];
            }
            int64 target = at.image_origin + column.image_offset(t) + static_cast<int64>(begin) * t.image_strides[1];
            for (Index row = begin; row < end; row += kBatch) {
                Word base[kBatch], word[kBatch][4];
#pragma unroll
                for (int u = 0; u < kBatch; ++u) {
                    if (row + u >= end) continue;
                    base[u] = load<Word>(t.image, target + u * t.image_strides[1]);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (there[i]) word[u][i] = load<Word>(t.stack, source[i] + u * t.stack_strides[1]);
                    }
                }
#pragma unroll
                for (int u = 0; u < kBatch; ++u) {
                    if (row + u >= end) continue;
                    Combine sum(base[u]);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (there[i]) sum.add(word[u][i]);
                    }
                    store(t.image, target + u * t.image_strides[1], sum.result());
                }
                target += kBatch * t.image_strides[1];
#pragma unroll
                for (int i = 0; i < 4; ++i) source[i] += kBatch * t.stack_strides[1];
            }
        }
    }
}

// A row that covers a pixel, and its block's distance from the block where the search began.
struct Covering {
    int row;
    int64 dh, dw;
};

// The first row after `previous` that covers pixel (row, column) of the block at `at`, or kNoRow: of those that a search
// has found. A block d further on covers the pixel at row - d * stride, if that lies in [0, kBlockH).
template <typename Index, Index kBlockH, Index kBlockW>
__device__ inline Covering next_listed(const Transfer& t, const Nearby& nearby, const Placement<Index>& at, Index row,
                                       Index column, int previous) {
    const int begin = previous + 1;
    unsigned int wanted = ~0u << begin % kWarp;
#pragma unroll 1
    for (int word = begin / kWarp; word * kWarp < t.rows; ++word) {
#pragma unroll 1
        for (unsigned int rest = nearby.rows[word] & wanted; rest != 0; rest &= rest - 1) {
            const int other = word * kWarp + __ffs(static_cast<int>(rest)) - 1;
            const Distance distance(at, Cell(t, other));
            const int64 h = static_cast<int64>(row) - distance.dh * t.height.stride;
            const int64 w = static_cast<int64>(column) - distance.dw * t.width.stride;
            if (h >= 0 && h < static_cast<int64>(kBlockH) && w >= 0 && w < static_cast<int64>(kBlockW)) {
                return {other, distance.dh, distance.dw};
            }
        }
        wanted = ~0u;
    }
    return {kNoRow, 0, 0};
}

// The same by the map, whose head and next hold ascending lists.
template <typename Index, Index kBlockH, Index kBlockW>
__device__ inline Covering next_mapped(const Transfer& t, const Cover& cover, const Placement<Index>& at,
                                       const Overlap<Index, kBlockH, kBlockW>& overlap, Index row, Index column,
                                       int previous) {
    Covering best{kNoRow, 0, 0};
    const int64 top = int64{at.cell_h} - static_cast<int64>((kBlockH - 1 - row) / overlap.stride_h);
    const int64 left = int64{at.cell_w} - static_cast<int64>((kBlockW - 1 - column) / overlap.stride_w);
    const int64 bottom = int64{at.cell_h} + static_cast<int64>(row / overlap.stride_h);
    const int64 right = int64{at.cell_w} + static_cast<int64>(column / overlap.stride_w);
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

// All pixels of a block on any grid, with any rows: searches for the next row each time.
template <typename Combine, Order kOrder, bool kMayList, typename Index, Index kBlockH, Index kBlockW>
__device__ inline void put_far(const Transfer& t, const Cover& cover, const Placement<Index>& at, int row,
                               const Share<Index, kBlockH>& share, const Overlap<Index, kBlockH, kBlockW>& overlap,
                               const Nearby& nearby) {
    using Word = typename Combine::Word;
#pragma unroll 1
    for (Index number = share.first; number < static_cast<Index>(t.columns); number += share.step) {
        const Column<Index, kBlockW, kOrder> column(t, number);
#pragma unroll 1
        for (Index block_row = share.begin; block_row < share.end; ++block_row) {
            if (!at.inside.contains(block_row, column.column)) continue;
            const int64 target =
                at.image_origin + column.image_offset(t) + static_cast<int64>(block_row) * t.image_strides[1];
            Combine result(load<Word>(t.image, target));
            // To overwrite, a row looks for rows after it, which leave it nothing to do; to add, for all, of which it
            // must be the first.
            int previous = Combine::kAdds ? kNoRow : row;
            bool writes = true;
#pragma unroll 1
            for (;;) {
                const Covering next =
                    kMayList && cover.head == nullptr
                        ? next_listed<Index, kBlockH, kBlockW>(t, nearby, at, block_row, column.column, previous)
                        : next_mapped(t, cover, at, overlap, block_row, column.column, previous);
                if (next.row == kNoRow) break;
                writes = previous != (Combine::kAdds ? kNoRow : row) || next.row == row;
                if (!writes) break;
                result.add(load<Word>(
                    t.stack, next.row * t.stack_strides[0] + column.stack_offset(t) +
                                 (static_cast<int64>(block_row) - next.dh * t.height.stride) * t.stack_strides[1] -
                                 next.dw * t.width.stride * t.stack_strides[2]));
                previous = next.row;
            }
            if (!writes) continue;
            if constexpr (!Combine::kAdds) {
                result.add(load<Word>(t.stack, at.stack_origin + column.stack_offset(t) +
                                                   static_cast<int64>(block_row) * t.stack_strides[1]));
            }
            store(t.image, target, result.result());
        }
    }
}

// All pixels of a block that its row does not write from the block alone.
template <typename Combine, Order kOrder, typename Index, Index kBlockH, Index kBlockW, bool kMayList>
__device__ inline void put_shared(const Transfer& t, const Cover& cover, const Placement<Index>& at, int64 row,
                                  const Share<Index, kBlockH>& share,
                                  const OverlapTask<Combine, Index, kBlockH, kBlockW, kMayList>& task, const Nearby& nearby) {
    if (!task.near) {
        put_far<Combine, kOrder, kMayList>(t, cover, at, static_cast<int>(row), share, task.overlap, nearby);
    } else if constexpr (Combine::kAdds) {
        put_zones<Combine, kOrder, Index, kBlockH, kBlockW>(t, at, share, task, nearby);
    }
}

}  // namespace sbnet
