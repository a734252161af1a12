// A float as its bits, and bits as a float: for a GPU and for the host.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CASTS __host__ __device__ __forceinline__
#else
#define CASTS inline
#endif

CASTS float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

CASTS uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
