// CUDA C++ for a C++17 compiler: the keywords, types and functions that the kernels use, and their near neighbours.
#pragma once

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __constant__
#define __launch_bounds__(...)  // the loader reads it, and checks it at the launch
#define __shared__ thread_local

#define CPU_CUDA_VECTORS(type, name)            \
    struct alignas(2 * sizeof(type)) name##2 {  \
        type x, y;                              \
    };                                          \
    struct alignas(4 * sizeof(type)) name##4 {  \
        type x, y, z, w;                        \
    };
CPU_CUDA_VECTORS(unsigned char, uchar)
CPU_CUDA_VECTORS(unsigned short, ushort)
CPU_CUDA_VECTORS(int, int)
CPU_CUDA_VECTORS(unsigned int, uint)
CPU_CUDA_VECTORS(float, float)

template <typename T>
T __ldg(const T* address) {
    return *address;
}

// A file and line of the caller, without macros.
#define CPU_CUDA_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define CPU_CUDA_PLACE \
    cpu_cuda::Place { __func__, file, line }

inline void __syncthreads(CPU_CUDA_HERE) { cpu_cuda::barrier(CPU_CUDA_PLACE, false); }
inline int __syncthreads_count(int vote, CPU_CUDA_HERE) { return cpu_cuda::barrier(CPU_CUDA_PLACE, vote != 0); }
inline int __syncthreads_or(int vote, CPU_CUDA_HERE) { return cpu_cuda::barrier(CPU_CUDA_PLACE, vote != 0) > 0; }
inline int __syncthreads_and(int vote, CPU_CUDA_HERE) {
    return cpu_cuda::barrier(CPU_CUDA_PLACE, vote != 0) == cpu_cuda::threads;
}

// Warps. `width` cuts a warp into segments that do not see each other.
inline void __syncwarp(unsigned int mask = 0xffffffffu, CPU_CUDA_HERE) {
    cpu_cuda::meet(CPU_CUDA_PLACE, mask, 0, [](int, auto) { return 0; });
}
template <typename T>
T __shfl_sync(unsigned int mask, T value, int source, int width = 32, CPU_CUDA_HERE) {
    return cpu_cuda::meet(CPU_CUDA_PLACE, mask, value,
                          [=](int lane, auto at) { return at(lane / width * width + (source & (width - 1))); });
}
template <typename T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int distance, int width = 32, CPU_CUDA_HERE) {
    return cpu_cuda::meet(CPU_CUDA_PLACE, mask, value, [=](int lane, auto at) {
        return at(lane % width < int(distance) ? lane : lane - int(distance));
    });
}
template <typename T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int distance, int width = 32, CPU_CUDA_HERE) {
    return cpu_cuda::meet(CPU_CUDA_PLACE, mask, value, [=](int lane, auto at) {
        return at(lane % width + int(distance) < width ? lane + int(distance) : lane);
    });
}
template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int distance, int width = 32, CPU_CUDA_HERE) {
    return cpu_cuda::meet(CPU_CUDA_PLACE, mask, value, [=](int lane, auto at) {
        const int source = lane ^ distance;
        return at(source / width <= lane / width ? source : lane);
    });
}
inline unsigned int __ballot_sync(unsigned int mask, int vote, CPU_CUDA_HERE) {
    return cpu_cuda::meet(CPU_CUDA_PLACE, mask, unsigned(vote != 0), [=](int, auto at) {
        unsigned int ballot = 0;
        for (int k = 0; k < 32; ++k) ballot |= (mask >> k & 1 & at(k)) << k;
        return ballot;
    });
}
inline int __any_sync(unsigned int mask, int vote, CPU_CUDA_HERE) { return __ballot_sync(mask, vote, file, line) != 0; }
inline int __all_sync(unsigned int mask, int vote, CPU_CUDA_HERE) {
    return __ballot_sync(mask, vote, file, line) == mask;
}

// Copies of 4, 8 or 16 bytes, of which the last `zeros` are not read.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0, CPU_CUDA_HERE) {
    cpu_cuda::start_copy(CPU_CUDA_PLACE, to, from, bytes - zeros, zeros);
}
inline void __pipeline_commit() { cpu_cuda::end_copy_group(); }
inline void __pipeline_wait_prior(size_t pending) { cpu_cuda::finish_copies(static_cast<int>(pending)); }

// Atomics: fibers switch at no other place than above, so plain steps do.
#define CPU_CUDA_ATOMIC(name, result)   \
    template <typename T>               \
    T name(T* address, T value) {       \
        const T old = *address;         \
        *address = result;              \
        return old;                     \
    }
CPU_CUDA_ATOMIC(atomicAdd, old + value)
CPU_CUDA_ATOMIC(atomicMax, old > value ? old : value)
CPU_CUDA_ATOMIC(atomicMin, old < value ? old : value)
CPU_CUDA_ATOMIC(atomicOr, old | value)
CPU_CUDA_ATOMIC(atomicAnd, old & value)
CPU_CUDA_ATOMIC(atomicExch, value)
template <typename T>
T atomicCAS(T* address, T expected, T value) {
    const T old = *address;
    if (old == expected) *address = value;
    return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
inline int __float_as_int(float value) {
    int bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline int __popc(unsigned int bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
