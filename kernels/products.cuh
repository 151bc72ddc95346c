// Products of matrices by a warp: sums of 16 x 8 numbers, along a dimension that is cut into pieces of 16 bytes.
//
// The left matrix lies in shared memory. A row is a pixel, its pieces are channels of the pixels under the kernel, and
// an offset for each piece leads from the row's address to it: a convolution needs no matrix of its own. The right
// matrix, the weights, comes from global memory, packed in the order in which lanes take it (see _packing.py).
#pragma once

#include "combine.cuh"
#include "ptx.cuh"
#include "vec.cuh"

namespace sbnet {

constexpr int kPieceBytes = 16;
template <typename T>
constexpr int kPiece = kPieceBytes / static_cast<int>(sizeof(T));  // numbers in a piece

// Pieces that the innermost loop takes at once. A lane loads one word of each of them, of one column, together.
constexpr int kStepPieces = 4;
using StepWords = Vec<unsigned int, kStepPieces>;

constexpr int kRows = 16, kColumns = 8;  // of the sums of one warp-wide product

// Stands for a piece of zeros, in a list of offsets.
constexpr int kNoPiece = -1;

// Sums of kM x kN such products, as multiply_matrices leaves them.
template <int kM, int kN>
struct Sums {
    float at[kM][kN][4];

    __device__ Sums() {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int n = 0; n < kN; ++n) {
#pragma unroll
                for (int k = 0; k < 4; ++k) at[m][n][k] = 0.0f;
            }
        }
    }
};

// Such a list where the pieces of a row lie in order, and all are there.
struct PiecesInOrder {
    int first = 0;

    __device__ PiecesInOrder operator+(int pieces) const { return {first + pieces}; }
    __device__ int operator[](int piece) const { return (first + piece) * kPieceBytes; }
};

__device__ inline const unsigned char* piece_at(const unsigned char* row, int offset, const unsigned char* zeros) {
    return offset == kNoPiece ? zeros : row + offset;
}

// What happens to the left matrix between shared memory and the product: nothing. `at` is what a lane needs for the
// words number `word` of the pieces of one step; it is applied to such a word of piece `piece` of the step.
struct Unchanged {
    __device__ Unchanged at(int, int) const { return {}; }
    __device__ unsigned int operator()(unsigned int number, int) const { return number; }
};

// On tensor cores: halves, or float32 rounded to TF32, by whoever writes the rows or (kRoundsRows) when they are read.
// With kInWords, a lane's sums of one row of 8 columns are such that they fill words as words of pieces do: of float32,
// columns t and t + 4, not 2 * t and 2 * t + 1.
template <typename T, bool kRoundsRows = false, bool kInWords = false>
struct TensorCores {
    using Number = T;
    using InWords = TensorCores<T, kRoundsRows, true>;
    static constexpr bool kRounds = sizeof(T) == 4;
    static constexpr int kLaneRows = 1;  // rows of 16 whose addresses a lane has to know

    __device__ static int row_of(int lane, int) { return lane % kRows; }

    // The lane for which the weights are packed that the calling one takes.
    __device__ static int weights_lane() {
        const int lane = static_cast<int>(threadIdx.x) % kWarp, column = lane / 4;
        return kInWords && sizeof(T) == 4 ? (column / 2 + column % 2 * 4) * 4 + lane % 4 : lane;
    }

    // What a lane holds of one step and kN times 8 columns.
    template <int kN>
    struct Weights {
        StepWords words[kN];

        __device__ void load(const StepWords* packed, int column_stride) {
#pragma unroll
            for (int n = 0; n < kN; ++n) words[n] = load_constant(packed + n * column_stride + weights_lane());
        }
        __device__ const StepWords& column(int n) const { return words[n]; }
    };

    // Adds steps [begin, end). `offsets` is a list, or PiecesInOrder; a multiprocessor is to hold kCtas CTAs.
    template <int kCtas, int kM, int kN, typename Offsets, typename Source, typename Before = Unchanged>
    __device__ static void run(Sums<kM, kN>& sums, const unsigned char* const (&rows)[kM][kLaneRows], Offsets offsets,
                               const unsigned char* zeros, Source& source, int begin, int end,
                               const Before& before = Before()) {
        for (int k = begin; k < end; k += Source::kAhead) {
#pragma unroll
            for (int i = 0; i < Source::kAhead; ++i) {
                if (k + i >= end) break;
                step(sums, rows, offsets + (k + i) * kStepPieces, zeros, source.take(i, k + i),
                     before.at(k + i, threadIdx.x % 4));
                source.refill(i);
            }
        }
    }

    template <int kM, int kN, typename Offsets, typename StepWeights, typename Change>
    __device__ static void step(Sums<kM, kN>& sums, const unsigned char* const (&rows)[kM][kLaneRows], Offsets offsets,
                                const unsigned char* zeros, const StepWeights& weights, const Change& change) {
        unsigned int a[2][kM][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int offset = offsets[half * 2 + threadIdx.x % kWarp / kRows];
#pragma unroll
            for (int m = 0; m < kM; ++m) load_matrices(a[half][m], piece_at(rows[m][0], offset, zeros));
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int k = 0; k < 4; ++k) a[half][m][k] = change(a[half][m][k], half * 2 + k / 2);
                if constexpr (kRoundsRows && kRounds) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const float number = __int_as_float(static_cast<int>(a[half][m][k]));
                        a[half][m][k] = static_cast<unsigned int>(__float_as_int(round_tf32(number)));
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            const StepWords b = weights.column(n);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int m = 0; m < kM; ++m) {
                    multiply_matrices(sums.at[m][n], a[half][m], b.lane[2 * half], b.lane[2 * half + 1], T{});
                }
            }
        }
    }
};

// On any device, with float32 arithmetic.
template <typename T, bool kInWords = false>
struct Plain {
    using Number = T;
    using InWords = Plain<T, true>;
    static constexpr bool kRounds = false;
    static constexpr int kLaneRows = 2;

    __device__ static int row_of(int lane, int k) { return lane / 4 + 8 * k; }

    // A lane needs two whole columns: they are loaded where they are used, and rows piece by piece, so that an address
    // is found once for several words.
    template <int kN>
    struct Weights {
        const StepWords* packed;
        int column_stride;

        __device__ void load(const StepWords* step, int stride) {
            packed = step;
            column_stride = stride;
        }
    };

    // Words of each piece that are multiplied at once: as many as there are registers for their weights, and for numbers
    // of halves. Mirrored by plain_rates of _fused_clocks.py, but for halves, which tensor cores multiply since sm_80.
    template <int kCtas, int kM, int kN>
    static constexpr int kWords = kCtas == 1 ? (kN > 3 || (sizeof(T) == 2 && kM * kN > 5) ? 2 : 4)
                                             : (kM * kN > 5 ? 1 : 2);

    // As above.
    template <int kCtas, int kM, int kN, typename Offsets, typename Source, typename Before = Unchanged>
    __device__ static void run(Sums<kM, kN>& sums, const unsigned char* const (&rows)[kM][kLaneRows], Offsets offsets,
                               const unsigned char* zeros, Source& source, int begin, int end,
                               const Before& before = Before()) {
        constexpr int kCount = kWords<kCtas, kM, kN>;
        for (int k = begin; k < end; ++k) {
#pragma unroll 1
            for (int first = 0; first < 4; first += kCount) {
                const auto change_of = [&](int word) { return before.at(k, word); };
                add_words<kCount>(sums, rows, offsets + k * kStepPieces, zeros, source.at(k), source.column_stride,
                                  first, change_of);
            }
        }
    }

    // Adds kCount words of each piece of a step, from number `first` on.
    template <int kCount, int kM, int kN, typename Offsets, typename ChangeOf>
    __device__ static void add_words(Sums<kM, kN>& sums, const unsigned char* const (&rows)[kM][kLaneRows],
                                     Offsets offsets, const unsigned char* zeros, const StepWords* packed,
                                     int column_stride, int first, const ChangeOf& change_of) {
        StepWords b[kN][2][kCount];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int t = static_cast<int>(threadIdx.x) % 4;
                const int column = kInWords && sizeof(T) == 4 ? t + 4 * k : 2 * t + k;
#pragma unroll
                for (int w = 0; w < kCount; ++w) b[n][k][w] = packed[n * column_stride + column * 4 + first + w];
            }
        }
#pragma unroll
        for (int piece = 0; piece < kStepPieces; ++piece) {
            const int offset = offsets[piece];
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const auto row = load_lanes<unsigned int, kCount>(piece_at(rows[m][r], offset, zeros), first);
#pragma unroll
                    for (int w = 0; w < kCount; ++w) {
                        const unsigned int a = change_of(first + w)(row.lane[w], piece);
#pragma unroll
                        for (int n = 0; n < kN; ++n) {
#pragma unroll
                            for (int k = 0; k < 2; ++k) {
                                add_word(sums.at[m][n][2 * r + k], a, b[n][k][w].lane[piece]);
                            }
                        }
                    }
                }
            }
        }
    }

    // Adds the products of two words' numbers.
    __device__ static void add_word(float& sum, unsigned int a, unsigned int b) {
        using Numbers = Vec<T, 4 / sizeof(T)>;
        const Numbers left = *reinterpret_cast<const Numbers*>(&a), right = *reinterpret_cast<const Numbers*>(&b);
#pragma unroll
        for (int i = 0; i < static_cast<int>(4 / sizeof(T)); ++i) {
            sum = fma_exact(Addition<T>::begin(left.lane[i]), Addition<T>::begin(right.lane[i]), sum);
        }
    }
};

// A warp's weights in global memory: it asks for as many steps ahead as registers allow, because the L2 cache is far.
// Mirrored by steps_ahead of _fused_clocks.py, but for kLeastAhead: with that, the model took plans that were no
// faster.
template <typename Products, int kN, int kLeastAhead = 1>
struct DistantWeights {
    static constexpr int kUsual = kN > 6 ? 1 : kN > 4 ? 2 : kN > 2 ? 3 : kN == 2 ? 6 : 8;
    static constexpr int kAhead = kUsual < kLeastAhead ? kLeastAhead : kUsual;

    typename Products::template Weights<kN> ahead[kAhead];
    const StepWords* packed;  // step 0
    int column_stride, next, end;

    // Steps [first, last) of kN times 8 columns, `stride` apart.
    __device__ DistantWeights(const StepWords* columns, int stride, int first, int last)
        : packed(columns), column_stride(stride), next(first), end(last) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) refill(k);
    }

    // A lane's words of one step and 8 columns lie side by side.
    __device__ const StepWords* at(int step) const { return packed + step * kWarp; }
    __device__ const auto& take(int slot, int) const { return ahead[slot]; }
    __device__ void refill(int slot) {
        if (next < end) ahead[slot].load(at(next), column_stride);
        ++next;
    }
};

// A warp's weights in shared memory.
template <typename Products, int kN>
struct NearWeights {
    static constexpr int kAhead = 2;  // steps of one round of the loop

    struct Step {
        const StepWords* packed;
        int column_stride;

        __device__ StepWords column(int n) const { return packed[n * column_stride + Products::weights_lane()]; }
    };

    const StepWords* packed;
    int column_stride;

    __device__ NearWeights(const StepWords* columns, int stride, int, int) : packed(columns), column_stride(stride) {}

    __device__ const StepWords* at(int step) const { return packed + step * kWarp; }
    __device__ Step take(int, int step) const { return {at(step), column_stride}; }
    __device__ void refill(int) {}
};

}  // namespace sbnet
