// Tiles of pixels x channels that turn in shared memory: for an image and a stack of which one is contiguous along
// channels and the other along pixels. Each side is read or written along what it is contiguous in.
#pragma once

#include "transfer.cuh"

namespace sbnet {

// A tile is kTilePixels pixels by as many channels as fill 128 bytes, the unit of a coalesced access.
constexpr int kTilePixels = 64;
constexpr int kTileThreads = 256;

template <int kWordBytes>
struct TileShape {
    static constexpr int kChannels = 128 / kWordBytes < 64 ? 128 / kWordBytes : 64;
    // Odd in units of 4 bytes: neighbouring channels then begin in neighbouring banks.
    static constexpr int kPitch = kTilePixels + (kWordBytes < 4 ? 4 / kWordBytes : 1);
};

// The tile, [channel][pixel].
template <typename Word>
struct Tile {
    using Shape = TileShape<sizeof(Word)>;
    Word word[Shape::kChannels][Shape::kPitch];
};

// Which tile of a block it is: first along pixels, then along channels.
template <typename Word, typename Index, Index kPixels>
struct Tiling {
    static constexpr Index kAcross = (kPixels + kTilePixels - 1) / kTilePixels;
    Index count;

    __device__ explicit Tiling(Index channels)
        : count(kAcross * ((channels + Tile<Word>::Shape::kChannels - 1) / Tile<Word>::Shape::kChannels)) {}
    __device__ static Index first_pixel(Index k) { return k % kAcross * kTilePixels; }
    __device__ static Index first_channel(Index k) { return k / kAcross * Tile<Word>::Shape::kChannels; }
};

// Calls visit(pixel, channel) for groups of a tile that threads take at once: kLanes channels of one pixel, which
// consecutive threads take along channels.
template <typename Word, int kLanes, typename Index, typename Visit>
__device__ inline void along_channels(Visit visit) {
    constexpr int kGroups = Tile<Word>::Shape::kChannels / kLanes;
#pragma unroll
    for (int k = 0; k < kTilePixels * kGroups / kTileThreads; ++k) {
        const int group = k * kTileThreads + threadIdx.x;
        visit(static_cast<Index>(group / kGroups), static_cast<Index>(group % kGroups * kLanes));
    }
}

// The same along pixels: kLanes pixels of one channel.
template <typename Word, int kLanes, typename Index, typename Visit>
__device__ inline void along_pixels(Visit visit) {
    constexpr int kGroups = kTilePixels / kLanes;
#pragma unroll
    for (int k = 0; k < Tile<Word>::Shape::kChannels * kGroups / kTileThreads; ++k) {
        const int group = k * kTileThreads + threadIdx.x;
        visit(static_cast<Index>(group % kGroups * kLanes), static_cast<Index>(group / kGroups));
    }
}

}  // namespace sbnet
