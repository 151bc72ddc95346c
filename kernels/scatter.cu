// sparse_scatter: block stack to image tensor. Each pixel is written by the threads of one row of the stack, in every
// run the same: see cover.cuh for blocks that repeat, overlap.cuh for those that overlap.
#include "combine.cuh"
#include "cover.cuh"
#include "overlap.cuh"
#include "tile.cuh"

namespace sbnet {

// What a row has to do where blocks do not overlap.
template <typename Combine>
struct Task {
    bool idle;   // nothing: out of use, outside of the image, or an equal block does it
    bool twins;  // equal blocks come after it, whose words it adds to its own

    __device__ Task(bool touches_image, const Twins& found)
        : idle(!touches_image || (Combine::kAdds ? found.before : found.after)),
          twins(!idle && Combine::kAdds && found.after) {}
};

// By the map, if there is one; else by the list, and then all threads of the CTA ask for the same row.
template <typename Index>
__device__ inline Twins find_twins(const Transfer& t, const Cover& cover, const Placement<Index>& at, int64 row) {
    return cover.head != nullptr ? mapped_twins(t, cover, at, row) : listed_twins(t, row);
}

template <typename Combine>
__device__ inline typename Combine::Word sum_of(const typename Combine::Word& base,
                                                const typename Combine::Word& block) {
    Combine sum(base);
    sum.add(block);
    return sum.result();
}

// Where a row of a block fills a sector of the image in part, the L2 cache reads the rest of it when it has to write it to
// DRAM, one sector after the other. One that was there before is complete, and all can be read at once. On an H200,
// transposed blocks of 18 x 18 float32 took 919 us to an NCHW image, 584 when such sectors were asked for ahead, and 742
// when threads waited for them. Does a row's first or last word lie in one?
template <typename Word>
__device__ inline bool ends_in_sector(const Word* word, bool first, bool last) {
    constexpr unsigned long long kSector = 32;  // bytes
    const unsigned long long address = reinterpret_cast<unsigned long long>(word);
    return (first && address % kSector != 0) || (last && (address + sizeof(Word)) % kSector != 0);
}

// Combines a thread's columns with the image, where owns(row, column) says so.
template <typename Combine, Order kOrder, typename Index, Index kBlockH, Index kBlockW, typename Owns>
__device__ inline void put_columns(const Transfer& t, const Placement<Index>& at, const Share<Index, kBlockH>& share,
                                   Owns owns) {
    using Word = typename Combine::Word;
    constexpr int kMost = kMostLoads<sizeof(Word)> / (Combine::kAdds ? 2 : 1);
    constexpr int kBatch = batch_of(kBlockH, kMost);
    const Index begin = at.inside.row_begin > share.begin ? at.inside.row_begin : share.begin;
    const Index end = at.inside.row_end < share.end ? at.inside.row_end : share.end;
    for (Index number = share.first; number < static_cast<Index>(t.columns); number += share.step) {
        const Column<Index, kBlockW, kOrder> column(t, number);
        if (column.column < at.inside.column_begin || column.column >= at.inside.column_end) continue;
        const Word* source =
            word_at<Word>(static_cast<const void*>(t.stack), at.stack_origin + column.stack_offset(t) +
                                                                 static_cast<int64>(begin) * t.stack_strides[1]);
        Word* target = word_at<Word>(t.image, at.image_origin + column.image_offset(t) +
                                                  static_cast<int64>(begin) * t.image_strides[1]);
        if constexpr (kOrder == Order::kColumns && !Combine::kAdds) {
            const Rect<Index>& inside = at.inside;
            const bool first = column.column == inside.column_begin, last = column.column + 1 == inside.column_end;
            if (t.image_strides[2] == 1 && ends_in_sector(target, first, last)) {
                const Word* end_of_row = target;
                for (Index row = begin; row < end; ++row, end_of_row += t.image_strides[1]) {
                    if (owns(row, column.column)) prefetch_sector(end_of_row);
                }
            }
        }
        for (Index row = begin; row < end; row += kBatch) {
            Word word[kBatch];
            Word base[Combine::kAdds ? kBatch : 1];
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
                if (row + u < end && owns(row + u, column.column)) {
                    word[u] = *source;
                    if constexpr (Combine::kAdds) base[u] = target[u * t.image_strides[1]];
                }
                source += t.stack_strides[1];
            }
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
                if constexpr (Combine::kAdds) word[u] = sum_of<Combine>(base[u], word[u]);
                if (row + u < end && owns(row + u, column.column)) *target = word[u];
                target += t.image_strides[1];
            }
        }
    }
}

// Adds all words of a block and of its twins to the image, in the order of their rows.
template <typename Combine, Order kOrder, typename Index, Index kBlockH, Index kBlockW>
__device__ inline void put_twins(const Transfer& t, const Cover& cover, const Placement<Index>& at, int64 row,
                                 const Share<Index, kBlockH>& share) {
    using Word = typename Combine::Word;
#pragma unroll 1
    for (Index number = share.first; number < static_cast<Index>(t.columns); number += share.step) {
        const Column<Index, kBlockW, kOrder> column(t, number);
#pragma unroll 1
        for (Index block_row = share.begin; block_row < share.end; ++block_row) {
            if (!at.inside.contains(block_row, column.column)) continue;
            const int64 target =
                at.image_origin + column.image_offset(t) + static_cast<int64>(block_row) * t.image_strides[1];
            const int64 source = column.stack_offset(t) + static_cast<int64>(block_row) * t.stack_strides[1];
            Combine sum(load<Word>(t.image, target));
#pragma unroll 1
            for (int64 twin = row; twin != kNoRow; twin = next_twin(t, cover, twin)) {
                sum.add(load<Word>(t.stack, twin * t.stack_strides[0] + source));
            }
            store(t.image, target, sum.result());
        }
    }
}

// CTAs that must fit on a multiprocessor. Of 2, 3 and 4, 3 were the fastest on an H200: 0.90, 0.92 and 0.90 of a copy's
// bandwidth, 0.71, 0.80 and 0.72 for overlapping sums. Where counting takes 64 bits, and for sums of numbers that do
// not have 4 bytes, registers would spill with 3.
template <typename Combine, typename Index>
constexpr int kCtas = ctas_that_fit(sizeof(Index) == 4 && Combine::kFewRegisters ? 3 : 2);

// Image and stack are contiguous along the same axis (or along none).
// Registers: at most 128.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW, Order kOrder, bool kOverlaps>
__global__ void __launch_bounds__(kMaxThreads, kCtas<Combine, Index>) scatter(const Transfer t, const Cover cover) {
    const Share<Index, kBlockH> share(t);
    if (share.row >= t.rows) return;
    const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, share.row);
    if constexpr (kOverlaps) {
        __shared__ Nearby tables[kMaxThreads / kWarp];
        Nearby& nearby = tables[cover.head == nullptr ? 0 : threadIdx.x / kWarp];
        const OverlapTask<Combine, Index, kBlockH, kBlockW, true> task(t, cover, at, share.row, nearby);
        if (task.idle) return;
        const auto owns = [&](Index row, Index column) { return task.owns(row, column); };
        put_columns<Combine, kOrder, Index, kBlockH, kBlockW>(t, at, share, owns);
        put_shared<Combine, kOrder>(t, cover, at, share.row, share, task, nearby);
    } else {
        const Task<Combine> task(at.touches_image, find_twins(t, cover, at, share.row));
        if (task.idle) return;
        if (task.twins) {
            put_twins<Combine, kOrder, Index, kBlockH, kBlockW>(t, cover, at, share.row, share);
        } else {
            const auto owns = [](Index, Index) { return true; };
            put_columns<Combine, kOrder, Index, kBlockH, kBlockW>(t, at, share, owns);
        }
    }
}

// A block in a CTA's tile.
template <typename Index>
struct Member {
    Placement<Index> at;
    bool puts;   // the tile's words are combined with the image
    bool twins;  // put_twins does that instead
};

// Combines a tile with the image, in groups of kLanes elements, where owns(row, column) says so.
template <typename Combine, int kLanes, typename Index, Index kBlockW, typename Members, typename Tile, typename Groups,
          typename Part, typename Owns>
__device__ inline void put_groups(const Transfer& t, const Members& members, const Tile& tile, const Groups& groups,
                                  const Part& part, Owns owns) {
    using Word = typename Combine::Word;
    constexpr int kBatch = kLanes > 8 ? 1 : Combine::kAdds ? 4 : 2;  // more would not fit into registers
    for (int first = groups.first; first < groups.count; first += kBatch * groups.step) {
        Vec<Word, kLanes> base[kBatch];
        int64 target[kBatch];
        bool writes[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
            const Group group = groups(first + u * groups.step);
            writes[u] = group.exists;
            target[u] = 0;
            if (writes[u]) {
                const Member<Index>& member = members[group.block];
                const Index pixel = part.first_pixel + group.pixel;
                writes[u] = member.puts && member.at.inside.contains(pixel / kBlockW, pixel % kBlockW) &&
                            owns(pixel / kBlockW, pixel % kBlockW);
                target[u] = member.at.image_origin + image_offset<Index>(t, pixel / kBlockW, pixel % kBlockW) +
                            static_cast<int64>(part.first_channel + group.channel) * t.image_strides[3];
            }
            if constexpr (Combine::kAdds) {
                if (writes[u]) base[u] = load_lanes<Word, kLanes>(t.image, target[u]);
            }
        }
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
            if (!writes[u]) continue;
            const Group group = groups(first + u * groups.step);
            const int slot = tile.slot(group.block, group.pixel, group.channel);
            Vec<Word, kLanes> words;
#pragma unroll
            for (int i = 0; i < kLanes; ++i) {
                words.lane[i] = tile.word[slot + i * Tile::kChannelStep];
                if constexpr (Combine::kAdds) words.lane[i] = sum_of<Combine>(base[u].lane[i], words.lane[i]);
            }
            store_lanes(t.image, target[u], words);
        }
    }
}

// How threads share a tile that goes to an image whose channels lie apart: each takes channels of a pixel, which it
// finds once for all of them: whole pieces, as many as registers hold. Sums take registers for the image's words, too:
// those of 16 halves would spill.
template <typename Combine, typename Shape>
using AcrossImage = AcrossPixels<Shape, Combine::kAdds && Shape::kPiece >= 8
                                            ? Shape::kPiece
                                            : Shape::kPiece == 16 ? 16 : 2 * Shape::kPiece>;

// Where a group of a tile lies in such an image, if owns(row, column) says that its block puts it there.
template <typename Index>
struct Spot {
    bool exists, first, last;  // and whether the block's row begins or ends there
    int64 offset;

    template <Index kBlockW, typename Members, typename Part, typename Owns>
    __device__ static Spot of(const Transfer& t, const Members& members, const Part& part, const Group& group,
                              Owns owns) {
        if (!group.exists) return {};
        const Member<Index>& member = members[group.block];
        const Rect<Index>& inside = member.at.inside;
        const Index pixel = part.first_pixel + group.pixel;
        const Index row = pixel / kBlockW, column = pixel % kBlockW;
        if (!member.puts || !inside.contains(row, column) || !owns(row, column)) return {};
        return {true, column == inside.column_begin, column + 1 == inside.column_end,
                member.at.image_origin + image_offset<Index>(t, row, column) +
                    static_cast<int64>(part.first_channel + group.channel) * t.image_strides[3]};
    }
};

// Asks for the sectors that the rows of a tile fill in part.
template <typename Combine, typename Shape, typename Index, Index kBlockW, typename Members, typename Part,
          typename Owns>
__device__ inline void prefetch_ends(const Transfer& t, const Members& members, const Part& part, Owns owns) {
    using Word = typename Combine::Word;
    using Groups = AcrossImage<Combine, Shape>;
    const Groups groups(part);
#pragma unroll 1
    for (int k = groups.first; k < groups.count; k += groups.step) {
        const Group group = groups(k);
        const auto spot = Spot<Index>::template of<kBlockW>(t, members, part, group, owns);
        if (!spot.first && !spot.last) continue;
        const Word* word = word_at<Word>(t.image, spot.offset);
#pragma unroll 1
        for (int i = 0; i < Groups::kLanes && i < part.channels - group.channel; ++i, word += t.image_strides[3]) {
            if (ends_in_sector(word, spot.first, spot.last)) prefetch_sector(word);
        }
    }
}

// Combines a tile with an image whose channels lie apart, where owns(row, column) says so.
template <typename Combine, typename Index, Index kBlockW, typename Members, typename Tile, typename Part,
          typename Owns>
__device__ inline void put_across(const Transfer& t, const Members& members, const Tile& tile, const Part& part,
                                  Owns owns) {
    using Word = typename Combine::Word;
    using Groups = AcrossImage<Combine, typename Tile::Shape>;
    constexpr int kPiece = Tile::Shape::kPiece;
    const Groups groups(part);
    const int64 stride = t.image_strides[3];
#pragma unroll 1
    for (int k = groups.first; k < groups.count; k += groups.step) {
        const Group group = groups(k);
        const auto spot = Spot<Index>::template of<kBlockW>(t, members, part, group, owns);
        if (!spot.exists) continue;
        Word* const target = word_at<Word>(t.image, spot.offset);
        const int channels = part.channels - group.channel;
        Vec<Word, kPiece> words[Groups::kLanes / kPiece];
#pragma unroll
        for (int p = 0; p < Groups::kLanes / kPiece; ++p) {
            words[p] = load_lanes<Word, kPiece>(
                tile.word, tile.slot(group.block, group.pixel, group.channel + p * kPiece));
        }
        if constexpr (Combine::kAdds) {
            Word base[Groups::kLanes];
            const Word* from = target;
            for_channels<Groups::kLanes>(channels, [&](int i) {
                base[i] = *from;
                from += stride;
            });
#pragma unroll
            for (int i = 0; i < Groups::kLanes; ++i) {
                Word& word = words[i / kPiece].lane[i % kPiece];
                if (i < channels) word = sum_of<Combine>(base[i], word);
            }
        }
        Word* to = target;
        for_channels<Groups::kLanes>(channels, [&](int i) {
            *to = words[i / kPiece].lane[i % kPiece];
            to += stride;
        });
    }
}

// Combines the blocks of a CTA with the image, tile by tile.
template <typename Combine, typename Shape, bool kImageAlongChannels, int kChannelLanes, int kPixelLanes,
          typename Index, Index kBlockH, Index kBlockW, typename Owns>
__device__ inline void put_tiles(const Transfer& t, const Cta& cta, const Member<Index>* shared_members, Owns owns) {
    using Word = typename Combine::Word;
    constexpr Index kPixels = kBlockH * kBlockW;
    const Blocks<Member<Index>, Shape::kBlocks> members(shared_members);
    const int64 first_row = cta.rows * Shape::kBlocks;
    const Index channels = static_cast<Index>(t.channels);
    for (Index number = cta.part; number < Part<Shape, Index>::count(channels); number += t.ctas_per_row) {
        const Part<Shape, Index> part(number, kPixels, channels, t.rows - first_row);
        const auto locate = [&](const Group& group, int64& offset) {
            const Index pixel = part.first_pixel + group.pixel;
            offset = (first_row + group.block) * t.stack_strides[0] +
                     stack_offset<Index>(t, pixel / kBlockW, pixel % kBlockW) +
                     static_cast<int64>(part.first_channel + group.channel) * t.stack_strides[3];
            return members[group.block].puts;
        };
        if constexpr (kImageAlongChannels) {
            __shared__ ChannelTile<Word, Shape> tile;
            constexpr int kLanes = Shape::kWhole || kPixels % kPixelLanes == 0 ? kPixelLanes : 1;
            start_fill<kLanes>(tile, t.stack, AlongPixels<Shape, kLanes>(part), locate);
            finish_fill();
            const AlongChannels<Shape, kChannelLanes> groups(part);
            put_groups<Combine, kChannelLanes, Index, kBlockW>(t, members, tile, groups, part, owns);
        } else {
            __shared__ PixelTile<Word, Shape, 1> tile;
            start_fill<kChannelLanes>(tile, t.stack, AlongChannels<Shape, kChannelLanes>(part), locate);
            if constexpr (!Combine::kAdds) prefetch_ends<Combine, Shape, Index, kBlockW>(t, members, part, owns);
            finish_fill();
            put_across<Combine, Index, kBlockW>(t, members, tile, part, owns);
        }
        __syncthreads();
    }
}

// One of image and stack is contiguous along channels, the other along pixels; see gather_tiled.
// Registers: at most 80.
template <typename Combine, typename Index, Index kBlockH, Index kBlockW, bool kImageAlongChannels, int kChannelLanes,
          int kPixelLanes, bool kOverlaps>
__global__ void __launch_bounds__(kTileThreads, 3) scatter_tiled(const Transfer t, const Cover cover) {
    using Shape = TileShape<sizeof(typename Combine::Word), kBlockH * kBlockW, kOverlaps>;
    __shared__ Member<Index> members[Shape::kBlocks];
    const Cta cta(t);
    const int64 row = cta.rows * Shape::kBlocks + (Shape::kBlocks == 1 ? 0 : threadIdx.x);
    const bool takes = row < t.rows && (Shape::kBlocks == 1 || threadIdx.x < Shape::kBlocks);
    constexpr Order kOrder = kImageAlongChannels ? Order::kChannels : Order::kColumns;
    const Share<Index, kBlockH> share{row, static_cast<Index>(cta.part * kTileThreads + threadIdx.x),
                                      static_cast<Index>(t.ctas_per_row * kTileThreads), 0, kBlockH};
    if constexpr (kOverlaps) {
        __shared__ Nearby tables[kTileThreads / kWarp];
        Nearby& nearby = tables[threadIdx.x / kWarp];
        const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, row);
        const OverlapTask<Combine, Index, kBlockH, kBlockW, false> task(t, cover, at, row, nearby);
        if (task.idle) return;
        if (threadIdx.x == 0) members[0] = {at, task.near, false};
        __syncthreads();
        const auto owns = [&](Index pixel_row, Index column) { return task.owns(pixel_row, column); };
        put_tiles<Combine, Shape, kImageAlongChannels, kChannelLanes, kPixelLanes, Index, kBlockH, kBlockW>(
            t, cta, members, owns);
        put_shared<Combine, kOrder>(t, cover, at, row, share, task, nearby);
    } else {
        // Blocks that share a CTA are looked up by one thread each; a block of its own by all.
        if (takes) {
            const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, row);
            const Task<Combine> task(at.touches_image, find_twins(t, cover, at, row));
            if (Shape::kBlocks == 1 && task.idle) return;
            if (Shape::kBlocks > 1 || threadIdx.x == 0) {
                members[Shape::kBlocks == 1 ? 0 : threadIdx.x] = {at, !task.idle && !task.twins, task.twins};
            }
        }
        __syncthreads();
        const auto owns = [](Index, Index) { return true; };
        put_tiles<Combine, Shape, kImageAlongChannels, kChannelLanes, kPixelLanes, Index, kBlockH, kBlockW>(
            t, cta, members, owns);
        if constexpr (Combine::kAdds) {
            for (int k = 0; k < Shape::kBlocks && cta.rows * Shape::kBlocks + k < t.rows; ++k) {
                if (!members[k].twins) continue;
                put_twins<Combine, kOrder, Index, kBlockH, kBlockW>(t, cover, members[k].at,
                                                                    cta.rows * Shape::kBlocks + k, share);
            }
        }
    }
}

}  // namespace sbnet
