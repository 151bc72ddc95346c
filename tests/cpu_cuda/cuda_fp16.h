// The part of CUDA's header of this name that the kernels use.
#pragma once

#include <string.h>  // <cmath> would double the time that a kernel takes to compile

struct __half {
    unsigned short bits;
};

inline float __half2float(__half half) {
    const unsigned int magnitude = half.bits & 0x7fffu;
    unsigned int bits = magnitude << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f;  // the difference of the exponents' biases; exact, for subnormal numbers too
    memcpy(&bits, &value, 4);
    if (magnitude >= 0x7c00u) bits = 0x7f800000u | magnitude << 13;  // infinity and NaN
    bits |= (half.bits & 0x8000u) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

// To nearest, ties to even.
inline __half __float2half_rn(float value) {
    unsigned int bits;
    memcpy(&bits, &value, 4);
    const unsigned int sign = bits >> 16 & 0x8000u;
    const float magnitude = __builtin_fabsf(value);
    bits &= 0x7fffffffu;
    if (value != value) return {0x7fff};  // the one NaN that the hardware makes
    if (magnitude < 0x1p-14f) {              // subnormal: a multiple of 2^-24
        return {static_cast<unsigned short>(sign | static_cast<unsigned int>(__builtin_nearbyintf(magnitude * 0x1p24f)))};
    }
    if (magnitude >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00u)};
    bits -= 112u << 23;
    bits += 0xfffu + (bits >> 13 & 1u);
    return {static_cast<unsigned short>(sign | bits >> 13)};
}
inline __half __float2half(float value) { return __float2half_rn(value); }
