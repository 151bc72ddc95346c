// Weights of a convolution in the orders in which products.cuh and warpgroup.cuh take them; see _packing.py.
#include "products.cuh"

namespace sbnet {

// Argument of pack. Mirrored, field by field, by _packing.py. Strides are in numbers.
struct Packing {
    const void* weights;  // [kernel height, kernel width, channels, features]
    void* packed;         // words: [columns / 8, chunks, steps, 8, 4, kStepPieces], then [pieces, features, 4]
    int64 strides[4];
    int64 kernel_width, positions;
    int64 channels, features;
    int64 chunk;   // pieces of a pixel in a chunk
    int64 chunks;
    int64 steps;   // of a chunk
    int64 warp_words;      // words of the first part
    int64 words;           // in all
    int64 group_features;  // of the second part, which are filled up
    int64 together;        // times 8 columns of it are turned
};

// Which numbers make a word: some channels from one on.
struct PackedWord {
    int64 position, channel, feature;
};

// Word `word` of the order for warps, of pieces of `lanes` numbers.
__device__ inline PackedWord word_for_warps(const Packing& p, int64 word, int lanes) {
    int64 rest = word / kStepPieces;
    const int64 within = word % kStepPieces;
    const int64 part = rest % 4;  // of a piece
    rest /= 4;
    const int64 column = rest % kColumns;
    rest /= kColumns;
    const int64 step = rest % p.steps;
    rest /= p.steps;
    const int64 chunk = rest % p.chunks, piece = step * kStepPieces + within;
    return {piece / p.chunk, (chunk * p.chunk + piece % p.chunk) * lanes + part * (lanes / 4),
            rest / p.chunks * kColumns + column};
}

// Word `word` of the order for warpgroups. Beyond the last piece there are no channels.
__device__ inline PackedWord word_for_warpgroups(const Packing& p, int64 word, int lanes) {
    const int64 part = word % 4, column = word / 4 % p.group_features, piece = word / 4 / p.group_features;
    const int64 within = column % (p.together * kColumns), n = within / kColumns, place = within % kColumns;
    const int64 feature = column - within + place / 2 * (2 * p.together) + 2 * n + place % 2;
    return {piece % p.positions, piece / p.positions * lanes + part * (lanes / 4), feature};
}

// A thread makes a word of the result.
// Registers: at most 64.
template <typename Products>
__global__ void __launch_bounds__(256) pack(const Packing p) {
    using T = typename Products::Number;
    constexpr int kNumbers = 4 / sizeof(T);
    const int64 word = static_cast<int64>(blockIdx.x) * 256 + threadIdx.x;
    if (word >= p.words) return;
    const PackedWord at = word < p.warp_words ? word_for_warps(p, word, kPiece<T>)
                                              : word_for_warpgroups(p, word - p.warp_words, kPiece<T>);
    Vec<T, kNumbers> numbers{};
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
        if (at.position >= p.positions || at.feature >= p.features || at.channel + i >= p.channels) continue;
        const int64 offset = at.position / p.kernel_width * p.strides[0] +
                             at.position % p.kernel_width * p.strides[1] + (at.channel + i) * p.strides[2] +
                             at.feature * p.strides[3];
        numbers.lane[i] = static_cast<const T*>(p.weights)[offset];
        if constexpr (Products::kRounds) numbers.lane[i] = round_tf32(numbers.lane[i]);
    }
    store(p.packed, word, numbers);
}

}  // namespace sbnet
