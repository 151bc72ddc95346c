// Products of warpgroups: how windows and weights lie in shared memory for Hopper's tensor cores to read them there, and
// how two warpgroups share the work of a tile.
#pragma once

#include "window.cuh"

namespace sbnet {

constexpr int kGroupThreads = 128, kGroups = kProductThreads / kGroupThreads;

// The 64 rows of a product are a square of so many pixels a side: 8 neighbours lie side by side, rows at one distance.
constexpr int kSide = 8;

// How kHeight x kWidth pixels of kPieces pieces lie in shared memory: a plane for each piece, pixel after pixel. Planes
// are shifted around the banks, so that threads that store pieces of one pixel and of the next find different ones.
template <int kPieces, int kHeight, int kWidth>
struct PixelPlanes {
    static constexpr int kW = kWidth, kPixels = kHeight * kWidth;
    static constexpr int kRow = kWidth * kPieceBytes;
    static constexpr int kShift = (kPieces + 7) / kPieces % 8;  // pieces; the banks hold 8
    static constexpr int kPlane = (kPixels - kShift + 7) / 8 * 8 + kShift;  // pieces from plane to plane
    static constexpr int kPieceStep = kPlane * kPieceBytes;
    static constexpr int kBytes = kPieces * kPieceStep;

    __device__ static int offset(int y, int x) { return y * kRow + x * kPieceBytes; }
    __device__ static int offset(int pixel) { return pixel * kPieceBytes; }
};

// How they lie to be read and written by threads of 4 lanes a pixel, with kRun pieces of it side by side: pixels are as far
// apart, counted around the banks.
template <int kPieces, int kHeight, int kWidth, int kRun>
struct SpacedPixels {
    static constexpr int kW = kWidth, kPixels = kHeight * kWidth;
    static constexpr int kPieceStep = kPieceBytes;
    static constexpr int kPitch = (kPieces + (kRun + 8 - kPieces % 8) % 8) * kPieceBytes;
    static constexpr int kBytes = kPixels * kPitch;

    __device__ static int offset(int y, int x) { return offset(y * kWidth + x); }
    __device__ static int offset(int pixel) { return pixel * kPitch; }
};

// The calling warpgroup's number. From one lane, for the compiler to know that its threads agree.
__device__ inline int group_number() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroupThreads, 0); }

// How the warpgroups of a CTA share a tile of kSquaresH x kSquaresW squares: each takes kM of them and kN times 8 columns.
// kGroupsM of them differ in their squares; kDepth in the part of the depth that they sum over, and then each has the
// sums of half of its rows in the end; the others in their columns.
template <int kSquaresH, int kSquaresW, int kM_, int kN_, int kGroupsM, int kDepth_>
struct Warpgroups {
    static constexpr int kM = kM_, kN = kN_, kDepth = kDepth_;
    static constexpr int kTileH = kSquaresH * kSide, kTileW = kSquaresW * kSide;
    static constexpr int kAllColumns = kN * kColumns * (kGroups / (kGroupsM * kDepth));
    static constexpr int kThreadRows = 2 / kDepth;  // of a square, of which a thread has sums in the end
    static_assert(kM * kGroupsM == kSquaresH * kSquaresW, "each square belongs to a group");
    static_assert(kGroups % (kGroupsM * kDepth) == 0, "each group has squares, columns and a depth");

    int square, column, depth;  // first ones of the calling group, and its part of the depth

    __device__ Warpgroups() {
        const int group = group_number();
        square = group % kGroupsM * kM;
        depth = group / kGroupsM % kDepth;
        column = group / (kGroupsM * kDepth) * kN * kColumns;
    }

    // Pixel of the tile where square number m of the group begins.
    __device__ int top(int m) const { return (square + m) / kSquaresW * kSide; }
    __device__ int left(int m) const { return (square + m) % kSquaresW * kSide; }

    // Pixel of row r of the calling thread's sums, of square m.
    __device__ int y(int m, int r) const { return top(m) + static_cast<int>(threadIdx.x) / kWarp % 4 * 2 + depth + r; }
    __device__ int x(int m) const { return left(m) + static_cast<int>(threadIdx.x) % kWarp / 4; }
};

// Which feature a column of the weights is. A thread has the same two of each 8 columns: so those of kTogether times 8 are
// packed in such an order that what it has of them are neighbours among the features, and can be written together.
template <int kTogether>
struct FeatureOrder {
    __host__ __device__ static constexpr int feature_of(int column) {
        const int within = column % (kTogether * kColumns), n = within / kColumns, place = within % kColumns;
        return column - within + place / 2 * (2 * kTogether) + 2 * n + place % 2;
    }
};

// A product's depth in the order of weights that are packed for warpgroups (see _packing.py): kChunk pieces of a pixel,
// each at all pixels under the kernel. A product takes two; where they are odd, the last one goes with zeros. Groups
// that share the depth have as many planes each, and steps at the same places from the first of them on.
template <int kChunk_, int kKernelH, int kKernelW_, int kShares_>
struct PlaneDepth {
    static constexpr int kKernelW = kKernelW_, kPositions = kKernelH * kKernelW_;
    static constexpr int kShares = kShares_, kPlanes = kChunk_ / kShares;  // planes of a share
    static constexpr int kPieces = kPlanes * kPositions, kSteps = (kPieces + 1) / 2;
    static constexpr int kWeightRows = kShares * 2 * kSteps;  // of the weights
    static constexpr bool kIsOdd = kPieces % 2 != 0;
    static_assert(kShares == 1 || (kChunk_ % kShares == 0 && !kIsOdd), "shares are alike");

    // The first step of one of several parts of a share.
    __host__ __device__ static constexpr int part_begin(int part, int parts) { return kSteps * part / parts; }

    // Pieces from a pixel of a share's first plane to number k of its depth. Zeros follow the last plane.
    template <typename Planes>
    __device__ static constexpr int offset(int k) {
        const int position = k % kPositions;
        return k / kPositions * Planes::kPlane + position / kKernelW * Planes::kW + position % kKernelW;
    }
};

// The sums of a group, which begin with the first product: of each square and each 8 columns, a thread has two of two
// rows, one after the other.
template <typename Layout>
struct GroupSums {
    float at[Layout::kM][Layout::kN][4];

    __device__ void hold() {
#pragma unroll
        for (int m = 0; m < Layout::kM; ++m) hold_sums(at[m]);
    }

    // Where two groups have summed over a half of the depth each: the first one gets the whole sums of its first row,
    // the other one those of its second row, as their row 0. In shared memory, a thread has two sums of each four.
    __device__ void exchange(unsigned char* shared, const Layout& layout) {
        if constexpr (Layout::kDepth > 1) {
            using Pair = Vec<float, 2>;
            const bool is_first = layout.depth == 0;
            const int thread = threadIdx.x;
            for_each([&](float(&sums)[4], int k) {
                const Pair given{{is_first ? sums[2] : sums[0], is_first ? sums[3] : sums[1]}};
                store(shared, k * kProductThreads + thread, given);
            });
            __syncthreads();
            const int other = thread ^ kGroupThreads;
            for_each([&](float(&sums)[4], int k) {
                const Pair got = load<Pair>(shared, k * kProductThreads + other);
#pragma unroll
                for (int i = 0; i < 2; ++i) sums[i] = (is_first ? sums[i] : sums[2 + i]) + got.lane[i];
            });
        }
    }

   private:
    template <typename Visit>
    __device__ void for_each(const Visit& visit) {
#pragma unroll
        for (int m = 0; m < Layout::kM; ++m) {
#pragma unroll
            for (int n = 0; n < Layout::kN; ++n) visit(at[m][n], m * Layout::kN + n);
        }
    }
};

// The product of a window of planes and of weights [rows, kAllColumns] of 16 bytes, or of a group's part of both.
template <typename T, typename Planes, typename Depth, typename Layout, int kRowColumns = Layout::kAllColumns>
struct GroupProduct {
    SharedPiece squares[Layout::kM], columns;

    __device__ GroupProduct(const unsigned char* window, const unsigned char* weights, const Layout& layout)
        : columns(shared_piece(weights) + layout.column + layout.depth * (2 * Depth::kSteps * kRowColumns)) {
        const SharedPiece first = shared_piece(window) + layout.depth * (Depth::kPlanes * Planes::kPlane);
#pragma unroll
        for (int m = 0; m < Layout::kM; ++m) squares[m] = first + layout.top(m) * Planes::kW + layout.left(m);
    }

    // Starts to add steps [kBegin, kEnd) to all sums. Without `adds`, step 0 begins them.
    template <int kBegin, int kEnd>
    __device__ void add(GroupSums<Layout>& sums, bool adds) const {
#pragma unroll
        for (int step = kBegin; step < kEnd; ++step) {
            const int first = Depth::template offset<Planes>(2 * step);
            const int second = Depth::template offset<Planes>(2 * step + 1);
#pragma unroll
            for (int m = 0; m < Layout::kM; ++m) {
                multiply_shared<T, Layout::kN>(
                    sums.at[m], {squares[m] + first, second - first, Planes::kW},
                    {columns + 2 * step * kRowColumns, kRowColumns, kSide}, adds || step > 0);
            }
        }
    }
};

// Calls visit(part) for 0 <= part.value < kParts: constants, as template arguments have to be.
template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};
template <int kParts, int kPart = 0, typename Visit>
__device__ inline void for_parts(const Visit& visit) {
    if constexpr (kPart < kParts) {
        visit(Constant<kPart>());
        for_parts<kParts, kPart + 1>(visit);
    }
}

}  // namespace sbnet
