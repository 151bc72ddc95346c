// How the pixels of a block become one number, and when that makes it active: policies of reduce_mask.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"
#include "transfer.cuh"
#include "vec.cuh"

namespace sbnet {

// tol, in the forms that pixels and averages are compared with.
struct Threshold {
    double tol;     // rounded to a floating mask's dtype where pixels are compared, exact where averages are
    int64 single;   // the bits of the same as float32: to convert it here would make a subnormal number zero
    int64 integer;  // for integer pixels: pixel > tol is pixel > integer (the bits of it, for uint64)
    int64 every;    // not 0: every integer pixel is above tol
    double area;    // pixels of a whole block
};

template <typename T>
__device__ inline bool is_above(T pixel, const Threshold& t) {
    return t.every != 0 || pixel > static_cast<T>(t.integer);
}
__device__ inline bool is_above(float pixel, const Threshold& t) {
    return greater_exact(pixel, __int_as_float(static_cast<int>(t.single)));
}
__device__ inline bool is_above(double pixel, const Threshold& t) { return pixel > t.tol; }
__device__ inline bool is_above(__half pixel, const Threshold& t) { return is_above(__half2float(pixel), t); }
__device__ inline bool is_above(__nv_bfloat16 pixel, const Threshold& t) {
    return is_above(__bfloat162float(pixel), t);
}

// Threads of a CTA that pools. Each row of threads (threadIdx.y) takes kLanes neighbouring columns a thread, of which a
// piece is as wide as blockDim.x allows; blockDim.x is a multiple of kWarp.
constexpr int kPoolThreads = 256;

// A pool is what a thread knows of some pixels. It takes each pixel with a flag that says whether it counts, rather
// than only those that do: a load whose use depends on a branch is put off until that branch, and then waited for.
// A pixel that does not count is one of the same block, read again.
//
// Pool::kCtas CTAs must fit on a multiprocessor: with as few registers as suffice for 9 loads in flight. On an H200, 8
// masks of 2048 x 2048 pixels took 43 us with 4 CTAs, and 45 us with 3.
//
// Pool::Columns<kLanes> is the shared memory of a CTA: `put` stores what each thread knows of its columns, and after a
// barrier `collect` adds to `mine`, the pool of the block that a thread owns, the block's columns of this piece:
// [begin, end) as piece.span(block, begin, end) tells, none where end <= begin. Thread k owns block k of `count`.

// Is any pixel above tol?
template <typename T>
struct MaxPool {
    static constexpr int kCtas = 4;
    bool any;

    __device__ static MaxPool none() { return {false}; }
    __device__ void add(T pixel, const Threshold& t, bool) { any |= is_above(pixel, t); }
    __device__ bool active(const Threshold&) const { return any; }

    // A bit for each column.
    template <int kLanes>
    struct Columns {
        unsigned int words[kPoolThreads * kLanes / kWarp];  // [blockDim.y][words of a piece]

        __device__ void put(const MaxPool (&column)[kLanes]) {
            constexpr int kSharers = kWarp / kLanes;  // threads whose bits make a word
            const int thread = threadIdx.y * blockDim.x + threadIdx.x;
            unsigned int bits = 0;
#pragma unroll
            for (int i = 0; i < kLanes; ++i) bits |= static_cast<unsigned int>(column[i].any) << i;
            bits <<= thread % kSharers * kLanes;
#pragma unroll
            for (int distance = 1; distance < kSharers; distance *= 2) {
                bits |= __shfl_xor_sync(0xffffffffu, bits, distance);
            }
            if (thread % kSharers == 0) words[thread / kSharers] = bits;
        }

        template <typename Piece>
        __device__ void collect(int count, const Piece& piece, MaxPool& mine) {
            const int thread = threadIdx.y * blockDim.x + threadIdx.x;
            if (thread >= count) return;
            const int pitch = blockDim.x * kLanes / kWarp;
            int begin, end;
            piece.span(thread, begin, end);
            unsigned int found = 0;
#pragma unroll 1
            for (int word = begin / kWarp; word * kWarp < end; ++word) {
                const int first = begin - word * kWarp, last = end - word * kWarp;
                unsigned int wanted = ~0u << (first > 0 ? first : 0);
                if (last < kWarp) wanted &= ~(~0u << last);
#pragma unroll 1
                for (int row = 0; row < static_cast<int>(blockDim.y); ++row) {
                    found |= words[row * pitch + word] & wanted;
                }
            }
            mine.any |= found != 0;
        }
    };
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
    static constexpr int kCtas = 3;
    using Sum = typename SumOf<T>::type;
    Sum sum;

    __device__ static AveragePool none() { return {}; }
    __device__ void add(T pixel, const Threshold&, bool valid) { sum.add(valid ? pixel : T{}); }
    __device__ bool active(const Threshold& t) const { return sum.value() / t.area > t.tol; }

    template <int kLanes>
    struct Columns {
        Sum columns[kPoolThreads * kLanes];  // [blockDim.y][columns of a piece]
        Sum blocks[kPoolThreads];

        __device__ void put(const AveragePool (&column)[kLanes]) {
            const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
            for (int i = 0; i < kLanes; ++i) columns[thread * kLanes + i] = column[i].sum;
        }

        // Each warp sums the columns of one block after the other.
        template <typename Piece>
        __device__ void collect(int count, const Piece& piece, AveragePool& mine) {
            const int thread = threadIdx.y * blockDim.x + threadIdx.x;
            const int pitch = blockDim.x * kLanes;
            for (int k = thread / kWarp; k < count; k += blockDim.x * blockDim.y / kWarp) {
                int begin, end;
                piece.span(k, begin, end);
                Sum block{};
#pragma unroll 1
                for (int row = 0; row < static_cast<int>(blockDim.y); ++row) {
#pragma unroll 1
                    for (int i = begin + thread % kWarp; i < end; i += kWarp) {
                        block.add(columns[row * pitch + i]);
                    }
                }
#pragma unroll
                for (int distance = kWarp / 2; distance > 0; distance /= 2) block.add(block.from_lane(distance));
                if (thread % kWarp == 0) blocks[k] = block;
            }
            __syncthreads();
            if (thread < count) mine.sum.add(blocks[thread]);
        }
    };
};

}  // namespace sbnet
