// What the C++ of CLAQ's blocks and the kernel for GPUs share.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ON_EITHER __device__ __forceinline__
#else
#define ON_EITHER inline
#endif

namespace {

enum Stored : int64_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

struct Wanted {
    int64_t k, bins;      // centres; candidate runs of a partition
    const double* draws;  // uniform numbers for k-means++, or null
    int64_t top, bottom;  // weights that are reserved at both ends, ties not counted; top 0: none
};

// To the nearest float16 or bfloat16, halves to even; infinite beyond the greatest.
ON_EITHER float stored(float x, int64_t type) {
    if (type == FLOAT32) return x;
    uint32_t u;
    std::memcpy(&u, &x, 4);
    const uint32_t sign = u & 0x80000000u;
    u ^= sign;
    const int dropped = type == FLOAT16 ? 13 : 16;
    uint32_t made = (u + ((1u << (dropped - 1)) - 1) + (u >> dropped & 1)) >> dropped << dropped;
    if (type == FLOAT16) {
        // Below 2^-14 numbers are 2^-24 apart, as float32 is around 0.75.
        float size, small;
        std::memcpy(&size, &u, 4);
        small = (size + 0.75f) - 0.75f;
        uint32_t tiny;
        std::memcpy(&tiny, &small, 4);
        made = u < 0x38800000u ? tiny : made >= 0x47800000u ? 0x7f800000u : made;
    }
    made |= sign;
    float out;
    std::memcpy(&out, &made, 4);
    return out;
}

}  // namespace
