// sparse_gather: image tensor to block stack.
#include "affine.cuh"
#include "tile.cuh"
#include "transfer.cuh"

namespace sbnet {

// What becomes of the image's words on their way.

// They stay as they are.
template <int kWordBytes>
struct Copy {
    using Word = Raw<kWordBytes>;
    static constexpr int kLoads = kMostLoads<kWordBytes>;
    static constexpr int kCtas = 3;

    __device__ Copy(const Transfer&, int64) {}
    __device__ Word operator()(const Word& word) const { return word; }
};

// act(x * scale + shift), kLanes channels at a time, of which a thread keeps the scales and shifts in registers.
template <typename T, int kLanes>
struct Activated {
    using Word = Vec<T, kLanes>;
    static constexpr int kLoads = kLanes > 4 ? 4 : 6;  // what registers allow
    static constexpr int kCtas = 2;
    Affine<T, kLanes> affine;

    __device__ Activated(const Transfer& t, int64 channel) : affine(t.scale, t.shift, t.relu != 0, channel * kLanes) {}
    __device__ Word operator()(const Word& word) const { return affine.template map<T>(word); }
};

// Image and stack are contiguous along the same axis (or along none): words go straight through registers.
// Registers: at most 128.
template <typename Map, typename Index, Index kBlockH, Index kBlockW, Order kOrder>
__global__ void __launch_bounds__(kMaxThreads, ctas_that_fit(Map::kCtas)) gather(const Transfer t) {
    using Word = typename Map::Word;
    constexpr int kBatch = batch_of(kBlockH, Map::kLoads);
    const Share<Index, kBlockH> share(t);
    if (share.row >= t.rows) return;
    const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, share.row);

    for (Index number = share.first; number < static_cast<Index>(t.columns); number += share.step) {
        const Column<Index, kBlockW, kOrder> column(t, number);
        const Map map(t, column.channel);
        const bool inside = column.column >= at.inside.column_begin && column.column < at.inside.column_end;
        const Index end = inside ? at.inside.row_end : 0;
        const Word* source =
            word_at<Word>(static_cast<const void*>(t.image), at.image_origin + column.image_offset(t) +
                                                                 static_cast<int64>(share.begin) * t.image_strides[1]);
        Word* target = word_at<Word>(t.stack, at.stack_origin + column.stack_offset(t) +
                                                  static_cast<int64>(share.begin) * t.stack_strides[1]);
        for (Index row = share.begin; row < share.end; row += kBatch) {
            Word word[kBatch];
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
                word[u] = Word{};
                if (row + u >= at.inside.row_begin && row + u < end) word[u] = load_constant(source);
                source += t.image_strides[1];
            }
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
                const bool is_pixel = row + u >= at.inside.row_begin && row + u < end;
                if (row + u < share.end) *target = is_pixel ? map(word[u]) : Word{};
                target += t.stack_strides[1];
            }
        }
    }
}

// Writes a tile to the stack, in which the pixels of each block and channel are contiguous.
template <int kPixelLanes, unsigned long long kBlockPixels, typename Tile, typename Part, typename Target>
__device__ inline void write_along_pixels(const Transfer& t, const Tile& tile, const Part& part, Target target) {
    using Word = typename Tile::Element;
    using Shape = typename Tile::Shape;
    constexpr int kRun = run_of(kBlockPixels, Shape::kPiece);
    if constexpr (kPixelLanes > 1 && sizeof(Word) < 4 && kRun * sizeof(Word) >= 8) {
        // Narrow words: each thread turns a patch of kRun pixels x 4 bytes of channels in its registers.
        constexpr int kWide = 4 / sizeof(Word);
        const Patches<Shape, kRun, kWide> groups(part);
#pragma unroll 2
        for (int k = groups.first; k < groups.count; k += groups.step) {
            const Group group = groups(k);
            if (!group.exists) continue;
            const int slot = tile.slot(group.block, group.pixel, group.channel);
            Vec<Word, kWide> pixels[kRun];
#pragma unroll
            for (int i = 0; i < kRun; ++i) pixels[i] = load_lanes<Word, kWide>(tile.word, slot + i * tile.kPixelStep);
#pragma unroll
            for (int c = 0; c < kWide; ++c) {
                Vec<Word, kRun> words;
#pragma unroll
                for (int i = 0; i < kRun; ++i) words.lane[i] = pixels[i].lane[c];
                const Group line{group.block, group.pixel, group.channel + c, true};
                if (line.channel < part.channels) store_lanes(t.stack, target(line), words);
            }
        }
    } else {
        constexpr int kLanes = Shape::kWhole || kBlockPixels % kPixelLanes == 0 ? kPixelLanes : 1;
        const AlongPixels<Shape, kLanes> groups(part);
#pragma unroll 1
        for (int k = groups.first; k < groups.count; k += groups.step) {
            const Group group = groups(k);
            if (!group.exists) continue;
            Vec<Word, kLanes> words;
#pragma unroll
            for (int i = 0; i < kLanes; ++i) words.lane[i] = tile.word[groups.template slot<Tile>(group, i)];
            store_lanes(t.stack, target(group), words);
        }
    }
}

// Writes a tile to the stack, in which the channels of each pixel are contiguous.
template <int kLanes, typename Tile, typename Part, typename Target>
__device__ inline void write_along_channels(const Transfer& t, const Tile& tile, const Part& part, Target target) {
    using Word = typename Tile::Element;
    const AlongChannels<typename Tile::Shape, kLanes> groups(part);
#pragma unroll 2
    for (int k = groups.first; k < groups.count; k += groups.step) {
        const Group group = groups(k);
        if (!group.exists) continue;
        const int slot = tile.slot(group.block, group.pixel, group.channel);
        Vec<Word, kLanes> words;
#pragma unroll
        for (int i = 0; i < kLanes; ++i) words.lane[i] = tile.word[slot + i * tile.kChannelStep];
        store_lanes(t.stack, target(group), words);
    }
}

// One of image and stack is contiguous along channels, the other along pixels. Words are single elements here;
// kChannelLanes of them are moved at once along channels, and kPixelLanes along the pixels of a stack.
// Registers: at most 80.
template <int kWordBytes, typename Index, Index kBlockH, Index kBlockW, bool kImageAlongChannels, int kChannelLanes,
          int kPixelLanes>
__global__ void __launch_bounds__(kTileThreads, 3) gather_tiled(const Transfer t) {
    using Word = Raw<kWordBytes>;
    constexpr Index kPixels = kBlockH * kBlockW;
    using Shape = TileShape<kWordBytes, kPixels, false>;
    using Places = PixelPlaces<Shape>;
    const Cta cta(t);
    const int64 first_row = cta.rows * Shape::kBlocks;
    __shared__ Placement<Index> placed[kImageAlongChannels ? Shape::kBlocks : 1];
    if (kImageAlongChannels && threadIdx.x < Shape::kBlocks && first_row + threadIdx.x < t.rows) {
        placed[threadIdx.x] = place<Index, kBlockH, kBlockW>(t, first_row + threadIdx.x);
    }
    __syncthreads();

    const Index channels = static_cast<Index>(t.channels);
    for (Index number = cta.part; number < Part<Shape, Index>::count(channels); number += t.ctas_per_row) {
        const Part<Shape, Index> part(number, kPixels, channels, t.rows - first_row);
        const auto target = [&](const Group& group) {
            const Index pixel = part.first_pixel + group.pixel;
            return (first_row + group.block) * t.stack_strides[0] +
                   stack_offset<Index>(t, pixel / kBlockW, pixel % kBlockW) +
                   static_cast<int64>(part.first_channel + group.channel) * t.stack_strides[3];
        };
        if constexpr (kImageAlongChannels) {
            const Blocks<Placement<Index>, Shape::kBlocks> blocks(placed);
            // Where a group lies in the image, and whether it does.
            const auto locate = [&](const Group& group, int64& offset) {
                const Placement<Index>& at = blocks[group.block];
                const Index pixel = part.first_pixel + group.pixel;
                const Index row = pixel / kBlockW;
                const Index column = pixel % kBlockW;
                if (!at.inside.contains(row, column)) return false;
                offset = at.image_origin + image_offset(t, row, column) +
                         static_cast<int64>(part.first_channel + group.channel) * t.image_strides[3];
                return true;
            };
            __shared__ PixelTile<Word, Shape> tile;
            start_fill<kChannelLanes>(tile, t.image, AlongChannels<Shape, kChannelLanes>(part), locate);
            finish_fill();
            write_along_pixels<kPixelLanes, kPixels>(t, tile, part, target);
        } else {
            __shared__ Places places;
            if (number == cta.part || !Shape::kWhole) {
                for (int k = threadIdx.x; k < Places::kAll; k += kTileThreads) {
                    const int block = k / Shape::kPixels, pixel_of_part = k % Shape::kPixels;
                    const Index pixel = part.first_pixel + pixel_of_part;
                    const Index row = pixel / kBlockW, column = pixel % kBlockW;
                    places.offset[k] = Places::kNowhere;
                    if (block >= part.blocks || pixel_of_part >= part.pixels) continue;
                    const Placement<Index> at = place<Index, kBlockH, kBlockW>(t, first_row + block);
                    if (at.inside.contains(row, column)) {
                        places.offset[k] = at.image_origin + image_offset(t, row, column);
                    }
                }
                __syncthreads();
            }
            __shared__ ChannelTile<Word, Shape> tile;
            const int64 first = static_cast<int64>(part.first_channel) * t.image_strides[3];
            start_fill_channels(tile, t.image, places, first, part.channels, t.image_strides[3]);
            finish_fill();
            write_along_channels<kChannelLanes>(t, tile, part, target);
        }
        __syncthreads();
    }
}

}  // namespace sbnet
