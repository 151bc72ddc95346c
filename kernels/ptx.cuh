// The only file with inline assembly. Every function has a plain C++ twin, for compilers that target a CPU.
//
// CuPy compiles with -ftz=true, which would make float32 arithmetic and comparisons treat subnormal numbers as
// zero. The library promises NumPy's results, so float32 goes through these instructions, which keep them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// a * b + c, rounded once.
__device__ inline float fma_exact(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
    return result;
#else
    return __builtin_fmaf(a, b, c);
#endif
}

// The larger one; NaN stays.
__device__ inline float max_exact(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return a < b ? b : a;
#endif
}

// Two numbers rounded to halves, the first in the lower bits.
__device__ inline unsigned int pack_halves(float first, float second, __half) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned int packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
#else
    const __half numbers[2] = {__float2half_rn(first), __float2half_rn(second)};
    return *reinterpret_cast<const unsigned int*>(numbers);
#endif
}
__device__ inline unsigned int pack_halves(float first, float second, __nv_bfloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned int packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
#else
    const __nv_bfloat16 numbers[2] = {__float2bfloat16_rn(first), __float2bfloat16_rn(second)};
    return *reinterpret_cast<const unsigned int*>(numbers);
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
// does. Both addresses are multiples of kBytes; where not `found`, nothing is read. `kCaches` tells that the L1 cache
// keeps what was read, for a thread that will read it again.
template <int kBytes, bool kCaches = false>
__device__ inline void copy_async(void* shared, const void* global, bool found) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "asynchronous copies have 4, 8 or 16 bytes");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const unsigned int target = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
    const int bytes = found ? kBytes : 0;
    if constexpr (kBytes == 16 && !kCaches) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(kBytes), "r"(bytes)
                     : "memory");
    }
#elif defined(__CUDA_ARCH__)
    struct alignas(kBytes) Piece {
        unsigned int part[kBytes / 4];
    };
    *static_cast<Piece*>(shared) = found ? *static_cast<const Piece*>(global) : Piece{};
#else
    __pipeline_memcpy_async(shared, global, kBytes, found ? 0 : kBytes);
#endif
}

// Ends a group of the calling thread's asynchronous copies.
__device__ inline void commit_async() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDA_ARCH__)
    __pipeline_commit();
#endif
}

// Waits for the calling thread's groups of copies, but for the kPending that it ended last.
template <int kPending>
__device__ inline void wait_async_groups() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#elif !defined(__CUDA_ARCH__)
    __pipeline_wait_prior(kPending);
#endif
}

// The same for a number that is a constant once loops are unrolled; at most 7.
__device__ inline void wait_async_groups_but(int pending) {
    switch (pending) {
        case 0: return wait_async_groups<0>();
        case 1: return wait_async_groups<1>();
        case 2: return wait_async_groups<2>();
        case 3: return wait_async_groups<3>();
        case 4: return wait_async_groups<4>();
        case 5: return wait_async_groups<5>();
        case 6: return wait_async_groups<6>();
        default: return wait_async_groups<7>();
    }
}

// Waits until the calling thread's asynchronous copies are there. Other threads see them after a barrier.
__device__ inline void wait_async() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#elif !defined(__CUDA_ARCH__)
    __pipeline_commit();
    __pipeline_wait_prior(0);
#endif
}

// What is in memory now, which an earlier kernel may have written while this one ran: no copy of the L1 cache.
__device__ inline int load_fresh(const int* address) {
#if defined(__CUDA_ARCH__)
    int number;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(number) : "l"(address) : "memory");
    return number;
#else
    return *address;
#endif
}
__device__ inline uint4 load_fresh(const uint4* address) {
#if defined(__CUDA_ARCH__)
    uint4 word;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                 : "l"(address)
                 : "memory");
    return word;
#else
    return *address;
#endif
}

// Tells the compiler what is true.
__device__ inline void assume(bool truth) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(truth);
#endif
}

// Asks for the sector at an address in global memory, which will then be in the L2 cache, without waiting.
__device__ inline void prefetch_sector(const void* address) {
#if defined(__CUDA_ARCH__)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
    static_cast<void>(*static_cast<const volatile unsigned char*>(address));  // faults where there is no memory
#endif
}

// Matrices in the registers of a warp. Lane 4*g + t holds, of a matrix of 8 rows of 16 bytes, 4-byte word t of row g.

// Four such matrices from shared memory: 16 rows, then the 16 bytes beside each of them, as `words` 0, 1 and 2, 3.
// Each lane gives the address of one row: lane % 16 is its number, and lane / 16 tells which of its two pieces.
__device__ inline void load_matrices(unsigned int (&words)[4], const void* shared) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    const unsigned int address = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address));
#else
    const unsigned long long address = reinterpret_cast<unsigned long long>(shared);
    const int lane = threadIdx.x % 32;
    for (int k = 0; k < 4; ++k) {
        const unsigned long long row = __shfl_sync(0xffffffffu, address, k * 8 + lane / 4);
        words[k] = reinterpret_cast<const unsigned int*>(row)[lane % 4];
    }
#endif
}

// The value of number `i` of a word of numbers of type T.
__device__ inline float number_in(unsigned int word, int i, __half) {
    const unsigned short bits = static_cast<unsigned short>(word >> 16 * i);
    return __half2float(*reinterpret_cast<const __half*>(&bits));
}
__device__ inline float number_in(unsigned int word, int i, __nv_bfloat16) {
    return __int_as_float(static_cast<int>(word >> 16 * i << 16));
}
__device__ inline float number_in(unsigned int word, int, float) {
    return __int_as_float(static_cast<int>(word & 0xffffe000u));
}

// sum += a * b for `sum` of 16 x 8 float32, of which a lane holds columns 2*t and 2*t + 1 of rows g and g + 8; `a` as
// load_matrices leaves it; and `b` of two pieces of 16 bytes for each of 8 columns, column g in lanes 4*g to 4*g + 3.
// The type of `number` tells what the bytes are: halves, or float32, of which tensor cores read the upper 19 bits.
template <typename T>
__device__ inline void multiply_matrices(float (&sum)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1,
                                         T number);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define SBNET_MULTIPLY(T, shape)                                                                            \
    template <>                                                                                             \
    __device__ inline void multiply_matrices<T>(float(&sum)[4], const unsigned int(&a)[4], unsigned int b0, \
                                                unsigned int b1, T) {                                       \
        asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                        \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                \
    }
SBNET_MULTIPLY(__half, "m16n8k16.row.col.f32.f16.f16.f32")
SBNET_MULTIPLY(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
SBNET_MULTIPLY(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef SBNET_MULTIPLY
#else
template <typename T>
__device__ inline void multiply_matrices(float (&sum)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1,
                                         T number) {
    constexpr unsigned int kAll = 0xffffffffu;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int lane = 0; lane < 4; ++lane) {  // the four words of each piece
        for (int piece = 0; piece < 2; ++piece) {
            const unsigned int row[2] = {__shfl_sync(kAll, a[piece * 2], g * 4 + lane),
                                         __shfl_sync(kAll, a[piece * 2 + 1], g * 4 + lane)};
            const unsigned int b = piece == 0 ? b0 : b1;
            const unsigned int column[2] = {__shfl_sync(kAll, b, t * 8 + lane),
                                            __shfl_sync(kAll, b, t * 8 + 4 + lane)};
            for (int k = 0; k < 4; ++k) {
                for (int i = 0; i < static_cast<int>(4 / sizeof(T)); ++i) {
                    sum[k] += number_in(row[k / 2], i, number) * number_in(column[k % 2], i, number);
                }
            }
        }
    }
}
#endif

// Warpgroups: 128 threads whose products of 64 rows Hopper's tensor cores read from shared memory themselves. Where the
// compiler targets something else (sm_90 without its "a" too), the plain twins compute the same. They know places in
// shared memory by numbers of pieces of 16 bytes: what comes from elsewhere, or is added there, is a multiple of them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SBNET_HAS_WARPGROUPS
using SharedPiece = unsigned int;
__device__ inline SharedPiece shared_piece(const void* shared) {
    return static_cast<SharedPiece>(__cvta_generic_to_shared(shared)) / 16;
}
#else
struct FourWords {
    unsigned int word[4];
};
using SharedPiece = const FourWords*;
__device__ inline SharedPiece shared_piece(const void* shared) { return static_cast<SharedPiece>(shared); }
#endif

// A matrix whose rows are pieces, two of which a product takes: 8 rows lie side by side, the next 8 are `rows` pieces
// from them, and second pieces `pieces` of them from first ones.
struct SharedMatrix {
    SharedPiece start;
    int pieces, rows;
};

// What the calling thread has written to shared memory is there for products of warpgroups, behind a barrier.
__device__ inline void show_to_warpgroups() {
#if defined(SBNET_HAS_WARPGROUPS)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Ahead of the first product that adds to sums that the threads have touched.
__device__ inline void begin_warpgroup_products() {
#if defined(SBNET_HAS_WARPGROUPS)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Waits for the calling warpgroup's products. Its sums are used only behind this and hold_sums.
__device__ inline void finish_warpgroup_products() {
#if defined(SBNET_HAS_WARPGROUPS)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// Lets the compiler find a pointer to global memory here, and not where it is used.
template <typename T>
__device__ inline void hold(T*& pointer) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+l"(pointer));
    __builtin_assume(__isGlobal(pointer));  // it no longer sees where the pointer comes from
#endif
}
// The same for a number.
__device__ inline void hold(int& number) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(number));
#endif
}

// Keeps the compiler from using sums earlier.
template <int kN>
__device__ inline void hold_sums(float (&sums)[kN][4]) {
#if defined(SBNET_HAS_WARPGROUPS)
#pragma unroll
    for (int n = 0; n < kN; ++n) {
        asm volatile("" : "+f"(sums[n][0]), "+f"(sums[n][1]), "+f"(sums[n][2]), "+f"(sums[n][3])::"memory");
    }
#endif
}

// Starts sums += a * b, or without `adds` sums = a * b, for 64 rows of `a` and 8 * kN of `b`. Warp w of the group holds
// rows 16 * w to 16 * w + 15, and for each 8 rows of `b` a lane holds what it would of multiply_matrices. Numbers of
// float32 are read as there.
template <typename T, int kN>
__device__ inline void multiply_shared(float (&sums)[kN][4], const SharedMatrix& a, const SharedMatrix& b, bool adds);

#if defined(SBNET_HAS_WARPGROUPS)
// A sum, where it could be the bits of both: so only constants differ from a product to the next, between which there
// are 4 instructions then, and were 10.
__device__ inline unsigned long long describe(const SharedMatrix& matrix) {
    const unsigned int low = matrix.start + (static_cast<unsigned int>(matrix.pieces) << 16);
    return static_cast<unsigned long long>(matrix.rows) << 32 | low;
}

// The places of 4 * n sums in an instruction, and the sums themselves.
#define SBNET_PLACES_1 "%0, %1, %2, %3"
#define SBNET_PLACES_2 SBNET_PLACES_1 ", %4, %5, %6, %7"
#define SBNET_PLACES_3 SBNET_PLACES_2 ", %8, %9, %10, %11"
#define SBNET_PLACES_4 SBNET_PLACES_3 ", %12, %13, %14, %15"
#define SBNET_PLACES_5 SBNET_PLACES_4 ", %16, %17, %18, %19"
#define SBNET_PLACES_6 SBNET_PLACES_5 ", %20, %21, %22, %23"
#define SBNET_PLACES_7 SBNET_PLACES_6 ", %24, %25, %26, %27"
#define SBNET_PLACES_8 SBNET_PLACES_7 ", %28, %29, %30, %31"
#define SBNET_PLACES_9 SBNET_PLACES_8 ", %32, %33, %34, %35"
#define SBNET_PLACES_10 SBNET_PLACES_9 ", %36, %37, %38, %39"
#define SBNET_PLACES_11 SBNET_PLACES_10 ", %40, %41, %42, %43"
#define SBNET_PLACES_12 SBNET_PLACES_11 ", %44, %45, %46, %47"
#define SBNET_PLACES_13 SBNET_PLACES_12 ", %48, %49, %50, %51"
#define SBNET_PLACES_14 SBNET_PLACES_13 ", %52, %53, %54, %55"
#define SBNET_PLACES_15 SBNET_PLACES_14 ", %56, %57, %58, %59"
#define SBNET_PLACES_16 SBNET_PLACES_15 ", %60, %61, %62, %63"
#define SBNET_SUMS_1 "+f"(sums[0][0]), "+f"(sums[0][1]), "+f"(sums[0][2]), "+f"(sums[0][3])
#define SBNET_SUMS_2 SBNET_SUMS_1, "+f"(sums[1][0]), "+f"(sums[1][1]), "+f"(sums[1][2]), "+f"(sums[1][3])
#define SBNET_SUMS_3 SBNET_SUMS_2, "+f"(sums[2][0]), "+f"(sums[2][1]), "+f"(sums[2][2]), "+f"(sums[2][3])
#define SBNET_SUMS_4 SBNET_SUMS_3, "+f"(sums[3][0]), "+f"(sums[3][1]), "+f"(sums[3][2]), "+f"(sums[3][3])
#define SBNET_SUMS_5 SBNET_SUMS_4, "+f"(sums[4][0]), "+f"(sums[4][1]), "+f"(sums[4][2]), "+f"(sums[4][3])
#define SBNET_SUMS_6 SBNET_SUMS_5, "+f"(sums[5][0]), "+f"(sums[5][1]), "+f"(sums[5][2]), "+f"(sums[5][3])
#define SBNET_SUMS_7 SBNET_SUMS_6, "+f"(sums[6][0]), "+f"(sums[6][1]), "+f"(sums[6][2]), "+f"(sums[6][3])
#define SBNET_SUMS_8 SBNET_SUMS_7, "+f"(sums[7][0]), "+f"(sums[7][1]), "+f"(sums[7][2]), "+f"(sums[7][3])
#define SBNET_SUMS_9 SBNET_SUMS_8, "+f"(sums[8][0]), "+f"(sums[8][1]), "+f"(sums[8][2]), "+f"(sums[8][3])
#define SBNET_SUMS_10 SBNET_SUMS_9, "+f"(sums[9][0]), "+f"(sums[9][1]), "+f"(sums[9][2]), "+f"(sums[9][3])
#define SBNET_SUMS_11 SBNET_SUMS_10, "+f"(sums[10][0]), "+f"(sums[10][1]), "+f"(sums[10][2]), "+f"(sums[10][3])
#define SBNET_SUMS_12 SBNET_SUMS_11, "+f"(sums[11][0]), "+f"(sums[11][1]), "+f"(sums[11][2]), "+f"(sums[11][3])
#define SBNET_SUMS_13 SBNET_SUMS_12, "+f"(sums[12][0]), "+f"(sums[12][1]), "+f"(sums[12][2]), "+f"(sums[12][3])
#define SBNET_SUMS_14 SBNET_SUMS_13, "+f"(sums[13][0]), "+f"(sums[13][1]), "+f"(sums[13][2]), "+f"(sums[13][3])
#define SBNET_SUMS_15 SBNET_SUMS_14, "+f"(sums[14][0]), "+f"(sums[14][1]), "+f"(sums[14][2]), "+f"(sums[14][3])
#define SBNET_SUMS_16 SBNET_SUMS_15, "+f"(sums[15][0]), "+f"(sums[15][1]), "+f"(sums[15][2]), "+f"(sums[15][3])
#define SBNET_MULTIPLY_SHARED(T, n, shape, type, a, b, p, turned)                                                 \
    template <>                                                                                                  \
    __device__ inline void multiply_shared<T, n>(float(&sums)[n][4], const SharedMatrix& x, const SharedMatrix& y, \
                                                 bool adds) {                                                    \
        asm volatile("{.reg .pred adds; setp.ne.b32 adds, " p ", 0; wgmma.mma_async.sync.aligned." shape         \
                     ".f32." type "." type " {" SBNET_PLACES_##n "}, " a ", " b ", adds, 1, 1" turned ";}"       \
                     : SBNET_SUMS_##n                                                                            \
                     : "l"(describe(x)), "l"(describe(y)), "r"(static_cast<int>(adds)));                         \
    }
#define SBNET_MULTIPLY_SHARED_ALL(n, columns, a, b, p)                                 \
    SBNET_MULTIPLY_SHARED(__half, n, "m64n" columns "k16", "f16", a, b, p, ", 0, 0")   \
    SBNET_MULTIPLY_SHARED(__nv_bfloat16, n, "m64n" columns "k16", "bf16", a, b, p, ", 0, 0") \
    SBNET_MULTIPLY_SHARED(float, n, "m64n" columns "k8", "tf32", a, b, p, "")
SBNET_MULTIPLY_SHARED_ALL(1, "8", "%4", "%5", "%6")
SBNET_MULTIPLY_SHARED_ALL(2, "16", "%8", "%9", "%10")
SBNET_MULTIPLY_SHARED_ALL(3, "24", "%12", "%13", "%14")
SBNET_MULTIPLY_SHARED_ALL(4, "32", "%16", "%17", "%18")
SBNET_MULTIPLY_SHARED_ALL(6, "48", "%24", "%25", "%26")
SBNET_MULTIPLY_SHARED_ALL(8, "64", "%32", "%33", "%34")
SBNET_MULTIPLY_SHARED_ALL(12, "96", "%48", "%49", "%50")
SBNET_MULTIPLY_SHARED_ALL(16, "128", "%64", "%65", "%66")
#else
template <typename T, int kN>
__device__ inline void multiply_shared(float (&sums)[kN][4], const SharedMatrix& a, const SharedMatrix& b, bool adds) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    for (int n = 0; n < kN; ++n) {
        for (int k = 0; k < 4; ++k) {
            if (!adds) sums[n][k] = 0.0f;
            const int row = warp * 16 + k / 2 * 8 + lane / 4, column = n * 8 + lane % 4 * 2 + k % 2;
            for (int word = 0; word < 8; ++word) {
                const auto word_of = [&](const SharedMatrix& m, int line) {
                    return m.start[word / 4 * m.pieces + line / 8 * m.rows + line % 8].word[word % 4];
                };
                for (int i = 0; i < static_cast<int>(4 / sizeof(T)); ++i) {
                    sums[n][k] += number_in(word_of(a, row), i, T{}) * number_in(word_of(b, column), i, T{});
                }
            }
        }
    }
}
#endif

// The nearest number of TF32: 10 bits of mantissa. Ties go away from zero.
__device__ inline float round_tf32(float a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned int bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(a));
    return __int_as_float(static_cast<int>(bits));
#else
    const unsigned int bits = static_cast<unsigned int>(__float_as_int(a));
    const bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
    return is_finite ? __int_as_float(static_cast<int>((bits + 0x1000u) & 0xffffe000u)) : a;
#endif
}

// Copies that Hopper's copy engine makes by itself, of many bytes at once: one thread starts them, and waits for all of a
// gate, which is a word in shared memory. Others see what was copied behind a barrier after that. Addresses and sizes are
// multiples of 16 bytes.
using CopyGate = unsigned long long;

// Of that thread, before it copies; then show_to_warpgroups, for the engine to find the gates so. A gate serves once.
__device__ inline void make_gate(CopyGate* gate) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const unsigned int place = static_cast<unsigned int>(__cvta_generic_to_shared(gate));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(place) : "memory");
#endif
}

// How many bytes go through a gate, in all. Said once, before they are copied.
__device__ inline void expect_bytes(CopyGate* gate, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const unsigned int place = static_cast<unsigned int>(__cvta_generic_to_shared(gate));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(place), "r"(bytes) : "memory");
#endif
}

__device__ inline void copy_through(CopyGate* gate, void* shared, const void* global, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const unsigned int place = static_cast<unsigned int>(__cvta_generic_to_shared(gate));
    const unsigned int target = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
                 "l"(global), "r"(bytes), "r"(place)
                 : "memory");
#elif !defined(__CUDA_ARCH__)
    for (int k = 0; k < bytes; k += 16) {
        __pipeline_memcpy_async(static_cast<unsigned char*>(shared) + k, static_cast<const unsigned char*>(global) + k, 16);
    }
#endif
}

// The twin waits for all copies, of other gates too.
__device__ inline void wait_at(const CopyGate* gate) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const unsigned int place = static_cast<unsigned int>(__cvta_generic_to_shared(gate));
    unsigned int passed = 0;
    while (passed == 0) {
        asm volatile(
            "{.reg .pred passed; mbarrier.try_wait.parity.shared::cta.b64 passed, [%1], 0; selp.u32 %0, 1, 0, passed;}"
            : "=r"(passed)
            : "r"(place)
            : "memory");
    }
#elif !defined(__CUDA_ARCH__)
    wait_async();
#endif
}

// A kernel that the host lets start before the ones in front of it in the stream are done: what comes before this waits
// for nobody, and must not touch what they read or write. Every thread calls it.
__device__ inline void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Such kernels behind this one may start, as far as there is room, once all CTAs have come here.
__device__ inline void let_later_kernels_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A meeting of all CTAs of a grid that run at the same time: each arrives, and may later ask whether all have. What a
// thread has read before it arrives is then out of the way of what others write after they know.
__device__ inline void arrive(unsigned int* arrivals) {
#if defined(__CUDA_ARCH__)
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
#else
    atomicAdd(arrivals, 1u);
#endif
}
__device__ inline bool have_met(const unsigned int* arrivals, unsigned int count) {
#if defined(__CUDA_ARCH__)
    unsigned int arrived;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(arrivals) : "memory");
    return arrived >= count;
#else
    return true;  // on a CPU, CTAs run one after another: there is nobody to wait for
#endif
}

}  // namespace sbnet
