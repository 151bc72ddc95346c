// The part of CUDA's header of this name that the kernels use.
#pragma once

#include <string.h>  // <cmath> would double the time that a kernel takes to compile

struct __nv_bfloat16 {
    unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 number) {
    const unsigned int bits = static_cast<unsigned int>(number.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// To nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    unsigned int bits;
    memcpy(&bits, &value, 4);
    if (value != value) return {0x7fff};  // the one NaN that the hardware makes
    bits += 0x7fffu + (bits >> 16 & 1u);
    return {static_cast<unsigned short>(bits >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
