// How a block's word meets the image's: policies of the scatter kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"
#include "vec.cuh"

namespace sbnet {

// The block replaces the image, bit for bit.
template <int kWordBytes>
struct Overwrite {
    static constexpr bool kAdds = false;
    static constexpr bool kFewRegisters = true;
    using Word = Raw<kWordBytes>;

    Word word;

    __device__ explicit Overwrite(const Word& base) : word(base) {}
    __device__ void add(const Word& block) { word = block; }
    __device__ Word result() const { return word; }
};

// In what type numbers of type T are summed, and how. Half types: in float32, rounded once at the end.
template <typename T>
struct Addition {
    using Total = T;
    __device__ static T begin(T value) { return value; }
    __device__ static T plus(T total, T value) { return static_cast<T>(total + value); }
    __device__ static T end(T total) { return total; }
};

template <>
struct Addition<float> {
    using Total = float;
    __device__ static float begin(float value) { return value; }
    __device__ static float plus(float total, float value) { return add_exact(total, value); }
    __device__ static float end(float total) { return total; }
};

template <>
struct Addition<__half> {
    using Total = float;
    __device__ static float begin(__half value) { return __half2float(value); }
    __device__ static float plus(float total, __half value) { return add_exact(total, __half2float(value)); }
    __device__ static __half end(float total) { return __float2half_rn(total); }
};

template <>
struct Addition<__nv_bfloat16> {
    using Total = float;
    __device__ static float begin(__nv_bfloat16 value) { return __bfloat162float(value); }
    __device__ static float plus(float total, __nv_bfloat16 value) {
        return add_exact(total, __bfloat162float(value));
    }
    __device__ static __nv_bfloat16 end(float total) { return __float2bfloat16_rn(total); }
};

// The block is added to the image, kLanes numbers of type T at a time (complex numbers are two).
// Unsigned integers stand for signed ones too: both wrap around to the same bits.
template <typename T, int kLanes>
struct Sum {
    static constexpr bool kAdds = true;
    static constexpr bool kFewRegisters = sizeof(T) == 4;
    using Word = Vec<T, kLanes>;
    using Number = Addition<T>;

    typename Number::Total total[kLanes];

    __device__ explicit Sum(const Word& base) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) total[i] = Number::begin(base.lane[i]);
    }
    __device__ void add(const Word& word) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) total[i] = Number::plus(total[i], word.lane[i]);
    }
    __device__ Word result() const {
        Word word;
#pragma unroll
        for (int i = 0; i < kLanes; ++i) word.lane[i] = Number::end(total[i]);
        return word;
    }
};

}  // namespace sbnet
