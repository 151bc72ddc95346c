// Words: the units in which kernels move elements. The only file that casts pointers.
#pragma once

namespace sbnet {

using int64 = long long;

constexpr int kWarp = 32;  // threads

// Unsigned built-in type of kBytes bytes; 16 bytes is the widest access that a thread can make.
template <int kBytes>
struct RawType;
template <>
struct RawType<1> {
    using type = unsigned char;
};
template <>
struct RawType<2> {
    using type = unsigned short;
};
template <>
struct RawType<4> {
    using type = unsigned int;
};
template <>
struct RawType<8> {
    using type = uint2;
};
template <>
struct RawType<16> {
    using type = uint4;
};
template <int kBytes>
using Raw = typename RawType<kBytes>::type;

// kLanes numbers that are loaded and stored together.
template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Vec {
    static_assert(sizeof(T) * kLanes <= 16, "a word is at most 16 bytes: the widest load of a thread");
    T lane[kLanes];
};

// The word at index `offset` of the tensor at `address`, counted in words.
template <typename Word>
__device__ inline const Word* word_at(const void* address, int64 offset) {
    return static_cast<const Word*>(address) + offset;
}
template <typename Word>
__device__ inline Word* word_at(void* address, int64 offset) {
    return static_cast<Word*>(address) + offset;
}
template <typename Word>
__device__ inline Word load(const void* address, int64 offset) {
    return *word_at<Word>(address, offset);
}
template <typename Word>
__device__ inline void store(void* address, int64 offset, const Word& word) {
    *word_at<Word>(address, offset) = word;
}

// kLanes words from the one at index `offset` on, which is a multiple of kLanes words from an aligned address.
template <typename Word, int kLanes>
__device__ inline Vec<Word, kLanes> load_lanes(const void* address, int64 offset) {
    return *reinterpret_cast<const Vec<Word, kLanes>*>(static_cast<const Word*>(address) + offset);
}

// A word of memory that nothing writes while the kernel runs, which allows the read-only cache.
template <typename Word>
__device__ inline Word load_constant(const Word* address) {
    using Bits = Raw<sizeof(Word)>;
    const Bits bits = __ldg(reinterpret_cast<const Bits*>(address));
    return *reinterpret_cast<const Word*>(&bits);
}

template <typename Word, int kLanes>
__device__ inline void store_lanes(void* address, int64 offset, const Vec<Word, kLanes>& words) {
    *reinterpret_cast<Vec<Word, kLanes>*>(static_cast<Word*>(address) + offset) = words;
}

}  // namespace sbnet
