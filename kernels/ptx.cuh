// The only file with inline assembly. Every function has a plain C++ twin, for compilers that target a CPU.
//
// CuPy compiles with -ftz=true, which would make float32 arithmetic and comparisons treat subnormal numbers as
// zero. The library promises NumPy's results, so float32 goes through these instructions, which keep them.
#pragma once

namespace sbnet {

// a + b, rounded to nearest.
__device__ inline float add_exact(float a, float b) {
#if defined(__CUDA_ARCH__)
    float sum;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
    return sum;
#else
    return a + b;
#endif
}

// The same of float64. Written as a sum, it might be fused with the product before it.
__device__ inline double add_exact(double a, double b) {
#if defined(__CUDA_ARCH__)
    double sum;
    asm("add.rn.f64 %0, %1, %2;" : "=d"(sum) : "d"(a), "d"(b));
    return sum;
#else
    return a + b;
#endif
}

// a * b, rounded to nearest, and not fused with the sum after it.
__device__ inline float mul_exact(float a, float b) {
#if defined(__CUDA_ARCH__)
    float product;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
#else
    return a * b;
#endif
}
__device__ inline double mul_exact(double a, double b) {
#if defined(__CUDA_ARCH__)
    double product;
    asm("mul.rn.f64 %0, %1, %2;" : "=d"(product) : "d"(a), "d"(b));
    return product;
#else
    return a * b;
#endif
}

// a > b; false where either is NaN.
__device__ inline bool greater_exact(float a, float b) {
#if defined(__CUDA_ARCH__)
    int greater;
    asm("{.reg .pred p; setp.gt.f32 p, %1, %2; selp.s32 %0, 1, 0, p;}" : "=r"(greater) : "f"(a), "f"(b));
    return greater != 0;
#else
    return a > b;
#endif
}

__device__ inline bool greater_exact(double a, double b) { return a > b; }

// The float64 of the same value.
__device__ inline double widen_exact(float a) {
#if defined(__CUDA_ARCH__)
    double wide;
    asm("cvt.f64.f32 %0, %1;" : "=d"(wide) : "f"(a));
    return wide;
#else
    return static_cast<double>(a);
#endif
}

// Copies of fewer bytes cannot be asynchronous.
constexpr int kLeastAsyncBytes = 4;

// Copies kBytes (4, 8 or 16) from global to shared memory, or zeros where not `found`, without waiting: wait_async
// does. Both addresses are multiples of kBytes; where not `found`, nothing is read.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, bool found) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "asynchronous copies have 4, 8 or 16 bytes");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const unsigned int target = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
    const int bytes = found ? kBytes : 0;
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(kBytes), "r"(bytes)
                     : "memory");
    }
#else
    struct alignas(kBytes) Piece {
        unsigned int part[kBytes / 4];
    };
    *static_cast<Piece*>(shared) = found ? *static_cast<const Piece*>(global) : Piece{};
#endif
}

// Waits until the calling thread's asynchronous copies are there. Other threads see them after a barrier.
__device__ inline void wait_async() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace sbnet
