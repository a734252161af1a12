// Products of bytes on tensor cores as a warp does them: on a GPU a thread is a lane, on the host the first thread of a warp is all 32.

#pragma once

#include "products_cuda.h"

namespace {

// prmt.b32 of the PTX ISA: a nibble of the selector's lower half picks one of the eight bytes of b:a, or, with its highest bit, fills a byte
// with that one's sign.
BOTH uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t made = 0;
#if defined(__CUDA_ARCH__)
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(made) : "r"(a), "r"(b), "r"(selector));
#else
    const uint64_t both = uint64_t(b) << 32 | a;
    for (int i = 0; i < 4; i++) {
        const uint32_t nibble = selector >> 4 * i & 15u, byte = uint32_t(both >> 8 * (nibble & 7u)) & 255u;
        made |= (nibble < 8 ? byte : byte >> 7 ? 255u : 0u) << 8 * i;
    }
#endif
    return made;
}

// d += a b, a 16 x 32 of unsigned bytes, b 32 x 8 of signed ones: mma.m16n8k32 of the PTX ISA.
BOTH void multiply_bytes(int32_t (&d)[HELD][4], const uint32_t (&a)[HELD][4], const uint32_t (&b)[HELD][2]) {
#if defined(__CUDA_ARCH__)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3])
        : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(b[0][0]), "r"(b[0][1]));
#else
    for (int i = 0; i < 16; i++) {
        for (int n = 0; n < 8; n++) {
            int32_t sum = 0;
            for (int k = 0; k < 32; k++) {
                const int t = k % 16 / 4, bits = 8 * (k % 4);
                sum += int32_t(a[i % 8 * 4 + t][i / 8 + k / 16 * 2] >> bits & 255u) * int8_t(b[n * 4 + t][k / 16] >> bits & 255u);
            }
            d[i % 8 * 4 + n / 2][i / 8 * 2 + n % 2] += sum;
        }
    }
#endif
}

// Starts to copy N words to shared memory (8 or 16 bytes); see `sent` and `arrived`.
template <int N>
BOTH void send_words(uint32_t* to, const uint32_t* from) {
    static_assert(N == 2 || N == 4, "8 or 16 bytes");
    if constexpr (N == 4) {
        send<4>(to, from);
    } else {
#if defined(__CUDA_ARCH__)
        const uint32_t place = uint32_t(__cvta_generic_to_shared(to));
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(place), "l"(from) : "memory");
#else
        std::memcpy(to, from, 8);
#endif
    }
}

// What all lanes of a warp give, added to one number.
BOTH void add_all(int32_t* to, int32_t v) {
#if defined(__CUDA_ARCH__)
    v = __reduce_add_sync(~0u, v);
    if (threadIdx.x % 32 == 0) atomicAdd(to, v);
#else
    *to += v;
#endif
}

// The upper half as the lower one; what is above does not matter. Nibbles of 2 and 3 bits are numbers in float16, never infinite, and times
// one themselves: units of floating point have less to do than those that shift.
template <int BITS>
BOTH uint32_t upper_half(uint32_t v) {
#if defined(__CUDA_ARCH__)
    if constexpr (BITS < 4) {
        uint32_t made;
        asm("{\n\t.reg .b16 l, h;\n\t.reg .b32 p;\n\tmov.b32 {l, h}, %1;\n\tmov.b32 p, {h, h};\n\t"
            "fma.rn.f16x2 %0, p, %2, %3;\n\t}"
            : "=r"(made) : "r"(v), "r"(0x3c003c00u), "r"(0x80008000u));
        return made;
    }
#endif
    return v >> 16;
}

}  // namespace
