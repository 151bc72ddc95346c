// Tiles of pixels x channels that turn in shared memory: for an image and a stack of which one is contiguous along
// channels and the other along pixels. Each side is read or written along what it is contiguous in. A tile is as much
// of a block as fits, or several small blocks, so that many bytes are on their way at once and its writes lie close
// together.
#pragma once

#include "ptx.cuh"
#include "transfer.cuh"

namespace sbnet {

constexpr int kTileThreads = 256;

// Bytes of a pixel's channels in a tile: the unit of a coalesced access.
constexpr int kLineBytes = 128;

// The widest group of elements that a thread moves at once.
constexpr int kPieceBytes = 16;

// Pixels of a tile at most: 44 KiB, of the 48 KiB that a CTA has without asking for more. On an H200, gathering 18 x 18
// pixels to a transposed stack reached 0.98 of a copy's bandwidth in one tile a block, and 0.94 in two.
constexpr int kMostPixels = 352;

// Blocks of a tile at most: what is known of each takes shared memory too.
constexpr int kMostBlocks = 32;

constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// How blocks of kBlockPixels pixels and channels of kBytes bytes are cut into tiles.
template <int kBytes, unsigned long long kBlockPixels, bool kAlone>
struct TileShape {
    static constexpr int kPiece = kPieceBytes / kBytes;   // elements
    static constexpr int kChannels = kLineBytes / kBytes;
    static constexpr unsigned long long kParts = (kBlockPixels + kMostPixels - 1) / kMostPixels;  // of a block
    static constexpr bool kWhole = kParts == 1;  // a tile holds all pixels of a block
    static constexpr int kPixels =
        kWhole ? static_cast<int>(kBlockPixels)
               : round_up(static_cast<int>((kBlockPixels + kParts - 1) / kParts), kPiece);
    // With kSwaps, pieces of a line swap places, so that threads that read across lines find different banks. Without,
    // pixels do not fill pieces, and an odd number of them spreads lines over the banks.
    static constexpr bool kSwaps = kPixels % kPiece == 0;
    static constexpr int kPlaces = kBytes == 1 ? 2 : 4;  // of a piece in a line of pixels: what memory allows
    static constexpr int kPitch = kSwaps ? round_up(kPixels, kPlaces * kPiece) : kPixels;
    static constexpr int kFit = kMostPixels / kPitch;
    static constexpr int kBlocks = kAlone || kFit < 1 ? 1 : kFit < kMostBlocks ? kFit : kMostBlocks;
    static constexpr int kElements = kBlocks * kPitch * kChannels;
};

// A tile in which each pixel's channels lie together. Pieces swap places every kEvery pixels, so that threads that read
// or write the same channels of pixels kEvery apart find different banks: kPiece of them for those that take single
// words of kPiece pixels, 1 for those that take pieces of one.
template <typename Word, typename ShapeOf, int kEvery = ShapeOf::kPiece>
struct PixelTile {
    using Element = Word;
    using Shape = ShapeOf;
    static constexpr int kPixelStep = Shape::kChannels;  // from a pixel to the next, where they move places together
    alignas(kPieceBytes) Word word[Shape::kElements];

    __device__ static int slot(int block, int pixel, int channel) {
        const int piece = channel / Shape::kPiece ^ pixel / kEvery % 8;
        return (block * Shape::kPixels + pixel) * Shape::kChannels + piece * Shape::kPiece + channel % Shape::kPiece;
    }
};

// A tile in which each channel's pixels lie together.
template <typename Word, typename ShapeOf>
struct ChannelTile {
    using Element = Word;
    using Shape = ShapeOf;
    static constexpr int kPixelStep = 1;                // from a pixel to the next of the same piece
    static constexpr int kChannelStep = Shape::kPitch;  // from a channel to the next, where they move places together
    alignas(kPieceBytes) Word word[Shape::kElements];

    __device__ static int slot(int block, int pixel, int channel) {
        const int line = (block * Shape::kChannels + channel) * Shape::kPitch;
        if constexpr (Shape::kSwaps) {
            const int piece = pixel / Shape::kPiece ^ channel / Shape::kPiece % Shape::kPlaces;
            return line + piece * Shape::kPiece + pixel % Shape::kPiece;
        } else {
            return line + pixel;
        }
    }
};

// What a CTA's tile holds: pixels and channels of a block from the first ones on, and how many there are.
template <typename Shape, typename Index>
struct Part {
    Index first_pixel, first_channel;
    int blocks, pixels, channels;

    __device__ Part(Index number, Index block_pixels, Index block_channels, int64 rows)
        : first_pixel(number % static_cast<Index>(Shape::kParts) * Shape::kPixels),
          first_channel(number / static_cast<Index>(Shape::kParts) * Shape::kChannels),
          blocks(rows < Shape::kBlocks ? static_cast<int>(rows) : Shape::kBlocks),
          pixels(block_pixels - first_pixel < Shape::kPixels ? static_cast<int>(block_pixels - first_pixel)
                                                             : Shape::kPixels),
          channels(block_channels - first_channel < Shape::kChannels ? static_cast<int>(block_channels - first_channel)
                                                                     : Shape::kChannels) {}

    __device__ static Index count(Index block_channels) {
        return static_cast<Index>(Shape::kParts) * ((block_channels + Shape::kChannels - 1) / Shape::kChannels);
    }
};

// The first element of a group that a thread moves at once.
struct Group {
    int block, pixel, channel;
    bool exists;
};

// The ways in which threads share out the groups of a tile: each takes group `first` and every `step`-th after it, up
// to `count`.

// Groups of kLanes channels of a pixel; neighbouring threads take neighbouring channels, and each always the same. A
// pixel takes a power of two of threads, so that few channels do not leave most of them idle.
template <typename Shape, int kLanes>
struct AlongChannels {
    int first, step, count;

    template <typename Index>
    __device__ explicit AlongChannels(const Part<Shape, Index>& part)
        : count(part.blocks * Shape::kPixels), pixels(part.pixels) {
        int threads = 1;
        while (threads * kLanes < part.channels) threads *= 2;
        first = threadIdx.x / threads;
        step = kTileThreads / threads;
        channel = threadIdx.x % threads * kLanes;
        if (channel >= part.channels) count = 0;
    }
    __device__ Group operator()(int k) const {
        const int block = Shape::kBlocks == 1 ? 0 : k / Shape::kPixels;
        const int pixel = k - block * Shape::kPixels;
        return {block, pixel, channel, k < count && (Shape::kWhole || pixel < pixels)};
    }

   private:
    int pixels, channel;
};

// Groups of kLanes elements as they lie in a stack: pixels of a channel, and then of the next channel where the tile
// holds whole blocks.
template <typename Shape, int kLanes>
struct AlongPixels {
    int first, count;
    static constexpr int step = kTileThreads;
    static constexpr bool kAligned = Shape::kPixels % kLanes == 0;  // a group lies in one channel

    template <typename Index>
    __device__ explicit AlongPixels(const Part<Shape, Index>& part)
        : first(threadIdx.x), pixels(part.pixels), per_block(part.channels * Shape::kPixels / kLanes) {
        static_assert(Shape::kWhole || kAligned, "groups of a part of a channel stay within it");
        count = part.blocks * per_block;
    }
    __device__ Group operator()(int k) const {
        const int block = Shape::kBlocks == 1 ? 0 : k / per_block;
        const int element = (k - block * per_block) * kLanes;
        const int pixel = element % Shape::kPixels;
        return {block, pixel, element / Shape::kPixels, k < count && (Shape::kWhole || pixel < pixels)};
    }
    // Where the i-th element of a group lies in a tile.
    template <typename Tile>
    __device__ static int slot(const Group& group, int i) {
        if constexpr (kAligned) {
            return Tile::slot(group.block, group.pixel, group.channel) + i * Tile::kPixelStep;
        } else {
            const int pixel = group.pixel + i;
            return Tile::slot(group.block, pixel % Shape::kPixels, group.channel + pixel / Shape::kPixels);
        }
    }

   private:
    int pixels, per_block;
};

// The most pixels of a channel that lie in whole groups of a power of two, up to `most`.
constexpr int run_of(unsigned long long pixels, int most) {
    while (pixels % most != 0) most /= 2;
    return most;
}

// Groups of kRun pixels x kWide channels; neighbouring threads take neighbouring pixels.
template <typename Shape, int kRun, int kWide>
struct Patches {
    int first, count;
    static constexpr int step = kTileThreads;

    template <typename Index>
    __device__ explicit Patches(const Part<Shape, Index>& part)
        : first(threadIdx.x), pixels(part.pixels), per_block((part.channels + kWide - 1) / kWide * kRuns) {
        count = part.blocks * per_block;
    }
    __device__ Group operator()(int k) const {
        const int block = Shape::kBlocks == 1 ? 0 : k / per_block;
        const int group = k - block * per_block;
        const int pixel = group % kRuns * kRun;
        return {block, pixel, group / kRuns * kWide, k < count && (Shape::kWhole || pixel < pixels)};
    }

   private:
    static constexpr int kRuns = Shape::kPixels / kRun;
    int pixels, per_block;
};

// Groups of kLanes channels of a pixel; neighbouring threads take neighbouring pixels, also of the next row and of the
// next block. For a tensor that is contiguous along pixels: where a pixel lies is found once for all its channels.
template <typename Shape, int kGroupLanes>
struct AcrossPixels {
    static constexpr int kLanes = kGroupLanes;  // whole pieces
    int first, count;
    static constexpr int step = kTileThreads;

    template <typename Index>
    __device__ explicit AcrossPixels(const Part<Shape, Index>& part)
        : first(threadIdx.x), count((part.channels + kLanes - 1) / kLanes * kAll), blocks(part.blocks),
          pixels(part.pixels) {}
    __device__ Group operator()(int k) const {
        const int place = k % kAll;
        const int block = Shape::kBlocks == 1 ? 0 : place / Shape::kPixels;
        const int pixel = place - block * Shape::kPixels;
        return {block, pixel, k / kAll * kLanes,
                (Shape::kBlocks == 1 || block < blocks) && (Shape::kWhole || pixel < pixels)};
    }

   private:
    static constexpr int kAll = Shape::kBlocks * Shape::kPixels;
    int blocks, pixels;
};

// Calls visit(i) for the channels of a group, of which there are fewer than kLanes only at the end of a tensor.
template <int kLanes, typename Visit>
__device__ inline void for_channels(int channels, Visit visit) {
    if (channels >= kLanes) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) visit(i);
    } else {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
            if (i < channels) visit(i);
        }
    }
}

// The blocks of a CTA: one that has only one keeps it in registers.
template <typename Block, int kBlocks>
struct Blocks {
    const Block* shared;

    __device__ explicit Blocks(const Block* blocks) : shared(blocks) {}
    __device__ const Block& operator[](int k) const { return shared[k]; }
};
template <typename Block>
struct Blocks<Block, 1> {
    Block only;

    __device__ explicit Blocks(const Block* blocks) : only(*blocks) {}
    __device__ const Block& operator[](int) const { return only; }
};

// Starts to bring the groups of a tile to shared memory: locate(group, offset) tells whether a group is in the tensor,
// and where; groups that are not become zeros. They are there after finish_fill.
template <int kLanes, typename Tile, typename Groups, typename Locate>
__device__ inline void start_fill(Tile& tile, const void* tensor, const Groups& groups, Locate locate) {
    using Word = typename Tile::Element;
    constexpr int kBytes = kLanes * sizeof(Word);
    constexpr int kBatch = kBytes < kLeastAsyncBytes ? 8 : 1;
    for (int first = groups.first; first < groups.count; first += kBatch * groups.step) {
        if constexpr (kBatch == 1) {
            const Group group = groups(first);
            if (!group.exists) continue;
            int64 offset = 0;
            const bool found = locate(group, offset);
            copy_async<kBytes>(&tile.word[tile.slot(group.block, group.pixel, group.channel)],
                               static_cast<const Word*>(tensor) + offset, found);
        } else {
            Vec<Word, kLanes> words[kBatch];
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
                const Group group = groups(first + u * groups.step);
                int64 offset = 0;
                words[u] = {};
                if (group.exists && locate(group, offset)) {
                    words[u] = load_constant(
                        reinterpret_cast<const Vec<Word, kLanes>*>(word_at<Word>(tensor, offset)));
                }
            }
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
                const Group group = groups(first + u * groups.step);
                if (group.exists) {
                    store_lanes(tile.word, tile.slot(group.block, group.pixel, group.channel), words[u]);
                }
            }
        }
    }
}

// Waits until all threads have brought what they started to.
__device__ inline void finish_fill() {
    wait_async();
    __syncthreads();
}

// Where the pixels of a tile lie in an image that is contiguous along pixels: offsets of their first channel, which are
// found once, and then serve all channels.
template <typename Shape>
struct PixelPlaces {
    static constexpr int kAll = Shape::kBlocks * Shape::kPixels;
    static constexpr int64 kNowhere = static_cast<int64>(1) << 63;  // zeros

    int64 offset[kAll];
};

// Starts to bring `channels` channels to shared memory, the first of which is `first` elements behind that of the places.
template <typename Tile>
__device__ inline void start_fill_channels(Tile& tile, const void* image,
                                           const PixelPlaces<typename Tile::Shape>& places, int64 first, int channels,
                                           int64 channel_stride) {
    using Word = typename Tile::Element;
    using Places = PixelPlaces<typename Tile::Shape>;
    constexpr int kBatch = 8;
    const int count = channels * Places::kAll;
    for (int begin = threadIdx.x; begin < count; begin += kBatch * kTileThreads) {
        Word words[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
            const int k = begin + u * kTileThreads, channel = k / Places::kAll, at = k % Places::kAll;
            if (k >= count) break;
            const int64 offset = places.offset[at];
            const bool found = offset != Places::kNowhere;
            const Word* from = static_cast<const Word*>(image) + (found ? offset + first + channel * channel_stride : 0);
            if constexpr (sizeof(Word) >= kLeastAsyncBytes) {
                const int slot = Tile::slot(at / Tile::Shape::kPixels, at % Tile::Shape::kPixels, channel);
                copy_async<sizeof(Word)>(&tile.word[slot], from, found);
            } else {
                words[u] = found ? load_constant(from) : Word{};
            }
        }
        if constexpr (sizeof(Word) < kLeastAsyncBytes) {
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
                const int k = begin + u * kTileThreads, at = k % Places::kAll;
                if (k >= count) break;
                tile.word[Tile::slot(at / Tile::Shape::kPixels, at % Tile::Shape::kPixels, k / Places::kAll)] = words[u];
            }
        }
    }
}

}  // namespace sbnet
