// How the pixels of a block become one number, and when that makes it active: policies of reduce_mask.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"
#include "vec.cuh"

namespace sbnet {

// tol, in the forms that pixels and averages are compared with.
struct Threshold {
    double tol;     // rounded to a floating mask's dtype where pixels are compared, exact where averages are
    int64 integer;  // for integer pixels: pixel > tol is pixel > integer (the bits of it, for uint64)
    int64 every;    // not 0: every integer pixel is above tol
    double area;    // pixels of a whole block
};

template <typename T>
__device__ inline bool is_above(T pixel, const Threshold& t) {
    return t.every != 0 || pixel > static_cast<T>(t.integer);
}
__device__ inline bool is_above(float pixel, const Threshold& t) {
    return greater_exact(pixel, static_cast<float>(t.tol));
}
__device__ inline bool is_above(double pixel, const Threshold& t) { return pixel > t.tol; }
__device__ inline bool is_above(__half pixel, const Threshold& t) { return is_above(__half2float(pixel), t); }
__device__ inline bool is_above(__nv_bfloat16 pixel, const Threshold& t) {
    return is_above(__bfloat162float(pixel), t);
}

// Pools take pixels with a flag that says whether they count, rather than only those that do: a load whose use depends
// on a branch is put off until that branch, and then waited for.

// Is any pixel above tol?
template <typename T>
struct MaxPool {
    bool any;

    __device__ static MaxPool none() { return {false}; }
    __device__ void add(T pixel, const Threshold& t, bool valid) { any |= valid & is_above(pixel, t); }
    __device__ void add(const MaxPool& other) { any |= other.any; }
    __device__ MaxPool from_lane(int distance) const { return {__shfl_xor_sync(0xffffffffu, int{any}, distance) != 0}; }
    __device__ bool active(const Threshold&) const { return any; }
};

// Integers of up to 32 bits: no block of fewer than 2^31 pixels overflows.
struct IntegerSum {
    int64 sum;

    template <typename T>
    __device__ void add(T pixel) {
        sum += static_cast<int64>(pixel);
    }
    __device__ void add(const IntegerSum& other) { sum += other.sum; }
    __device__ IntegerSum from_lane(int distance) const { return {__shfl_xor_sync(0xffffffffu, sum, distance)}; }
    __device__ double value() const { return static_cast<double>(sum); }
};

// 64-bit integers: their sum may need more than 64 bits, so the halves of 32 bits are summed apart.
struct WideIntegerSum {
    int64 high, low;

    template <typename T>
    __device__ void add(T pixel) {
        high += static_cast<int64>(pixel >> 32);
        low += static_cast<int64>(pixel & 0xffffffff);
    }
    __device__ void add(const WideIntegerSum& other) {
        high += other.high;
        low += other.low;
    }
    __device__ WideIntegerSum from_lane(int distance) const {
        return {__shfl_xor_sync(0xffffffffu, high, distance), __shfl_xor_sync(0xffffffffu, low, distance)};
    }
    __device__ double value() const { return static_cast<double>(high) * 4294967296.0 + static_cast<double>(low); }
};

// Floating pixels are summed in float64.
struct RealSum {
    double sum;

    __device__ void add(double pixel) { sum += pixel; }
    __device__ void add(float pixel) { sum += widen_exact(pixel); }
    __device__ void add(__half pixel) { add(__half2float(pixel)); }
    __device__ void add(__nv_bfloat16 pixel) { add(__bfloat162float(pixel)); }
    __device__ void add(const RealSum& other) { sum += other.sum; }
    __device__ RealSum from_lane(int distance) const { return {__shfl_xor_sync(0xffffffffu, sum, distance)}; }
    __device__ double value() const { return sum; }
};

template <typename T>
struct SumOf {
    using type = IntegerSum;
};
template <>
struct SumOf<long long> {
    using type = WideIntegerSum;
};
template <>
struct SumOf<unsigned long long> {
    using type = WideIntegerSum;
};
template <>
struct SumOf<__half> {
    using type = RealSum;
};
template <>
struct SumOf<__nv_bfloat16> {
    using type = RealSum;
};
template <>
struct SumOf<float> {
    using type = RealSum;
};
template <>
struct SumOf<double> {
    using type = RealSum;
};

// Is the average over the whole block's area above tol?
template <typename T>
struct AveragePool {
    typename SumOf<T>::type sum;

    __device__ static AveragePool none() { return {}; }
    __device__ void add(T pixel, const Threshold&, bool valid) { sum.add(valid ? pixel : T{}); }
    __device__ void add(const AveragePool& other) { sum.add(other.sum); }
    __device__ AveragePool from_lane(int distance) const { return {sum.from_lane(distance)}; }
    __device__ bool active(const Threshold& t) const { return sum.value() / t.area > t.tol; }
};

}  // namespace sbnet
