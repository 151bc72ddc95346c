// Weights of a convolution in the order in which products.cuh takes them; see _packing.py.
#include "products.cuh"

namespace sbnet {

// Argument of pack. Mirrored, field by field, by _packing.py. Strides are in numbers.
struct Packing {
    const void* weights;  // [kernel height, kernel width, channels, features]
    void* packed;         // [columns / 8, chunks, steps, 8, 4, kStepPieces] words
    int64 strides[4];
    int64 kernel_width, positions;
    int64 channels, features;
    int64 chunk;   // pieces of a pixel in a chunk
    int64 chunks;
    int64 steps;   // of a chunk
    int64 words;   // in all
};

// A thread makes a word of the result.
// Registers: at most 64.
template <typename Products>
__global__ void __launch_bounds__(256) pack(const Packing p) {
    using T = typename Products::Number;
    constexpr int kNumbers = 4 / sizeof(T);
    const int64 word = static_cast<int64>(blockIdx.x) * 256 + threadIdx.x;
    if (word >= p.words) return;
    int64 rest = word / kStepPieces;
    const int64 within = word % kStepPieces;
    const int64 part = rest % 4;  // of a piece
    rest /= 4;
    const int64 column = rest % kColumns;
    rest /= kColumns;
    const int64 step = rest % p.steps;
    rest /= p.steps;
    const int64 chunk = rest % p.chunks, feature = rest / p.chunks * kColumns + column;
    const int64 piece = step * kStepPieces + within, position = piece / p.chunk;
    const int64 channel = (chunk * p.chunk + piece % p.chunk) * kPiece<T> + part * kNumbers;
    Vec<T, kNumbers> numbers{};
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
        if (position >= p.positions || feature >= p.features || channel + i >= p.channels) continue;
        const int64 offset = position / p.kernel_width * p.strides[0] + position % p.kernel_width * p.strides[1] +
                             (channel + i) * p.strides[2] + feature * p.strides[3];
        numbers.lane[i] = static_cast<const T*>(p.weights)[offset];
        if constexpr (Products::kRounds) numbers.lane[i] = round_tf32(numbers.lane[i]);
    }
    store(p.packed, word, numbers);
}

}  // namespace sbnet
