// Products of bits on tensor cores as a warp does them: on a GPU a thread is a lane, on the host the first thread of a warp is all 32.

#pragma once

#include "products_cuda.h"

namespace {

// d += a b, numbers of places where both have a one, a 16 x 256 and b 256 x 8: mma.m16n8k256 of the PTX ISA.
BOTH void multiply_bits(int32_t (&d)[HELD][4], const uint32_t (&a)[HELD][4], const uint32_t (&b)[HELD][2]) {
#if defined(__CUDA_ARCH__)
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3])
        : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(b[0][0]), "r"(b[0][1]));
#else
    add_to_sums(d, [&](int i, int n) {
        int32_t sum = 0;
        for (int w = 0; w < 8; w++) {
            uint32_t v = a[i % 8 * 4 + w % 4][i / 8 + w / 4 * 2] & b[n * 4 + w % 4][w / 4];
            v -= v >> 1 & 0x55555555u, v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
            sum += int32_t(((v + (v >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
        }
        return sum;
    });
#endif
}

// Bits of a where `keep` has ones, of b where it has zeros.
BOTH uint32_t select(uint32_t keep, uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint32_t made;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(made) : "r"(keep), "r"(a), "r"(b));
    return made;
#else
    return (a & keep) | (b & ~keep);
#endif
}

// Bits of 32 numbers of PLANES bytes: word n of `made` has bit n of each, that of number j at j.
template <int PLANES>
BOTH void transpose(uint32_t (&made)[8 * PLANES], const uint32_t (&v)[32]) {
    UNROLL for (int g = 0; g < 8; g++) {
        const uint32_t low = picked(v[g], v[g + 8], 0x5140u), low2 = picked(v[g + 16], v[g + 24], 0x5140u);
        const uint32_t high = picked(v[g], v[g + 8], 0x7362u), high2 = picked(v[g + 16], v[g + 24], 0x7362u);
        made[g] = picked(low, low2, 0x5410u), made[8 + g] = picked(low, low2, 0x7632u);
        made[16 + g] = picked(high, high2, 0x5410u);
        if constexpr (PLANES == 4) made[24 + g] = picked(high, high2, 0x7632u);
    }
    UNROLL for (int p = 0; p < PLANES; p++) {
        UNROLL for (int s = 4; s > 0; s /= 2) {
            const uint32_t keep = s == 4 ? 0x0f0f0f0fu : s == 2 ? 0x33333333u : 0x55555555u;
            UNROLL for (int i = 0; i < 8; i++) {
                if ((i & s) != 0) continue;
                uint32_t &a = made[8 * p + i], &b = made[8 * p + i + s];
                const uint32_t left = select(keep, a, b << s);
                b = select(keep, a >> s, b);
                a = left;
            }
        }
    }
}

// What all lanes of a warp give, added to one number.
BOTH void add_all(int32_t* to, int32_t v) {
#if defined(__CUDA_ARCH__)
    v = __reduce_add_sync(~0u, v);
    if (threadIdx.x % 32 == 0) atomicAdd(to, v);
#else
    add(to, v);
#endif
}

}  // namespace
