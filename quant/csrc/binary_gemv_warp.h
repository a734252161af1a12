// Whole numbers for a product with signs, and what a warp does with a unit of them: binary_gemv_cuda.h says how.

#pragma once

#include "products_cuda.h"

namespace {

constexpr int STEPS = 4;   // matrices of 16 x 32 in a unit of two tiles
constexpr int PLANES = 3;  // digits of a value
constexpr int DIGITS = 4;  // of an x
constexpr int X_BITS = 27, VALUE_BITS = 22;  // and a sign

// The exponent e of the largest |v| < 2^(e - 126). Numbers too small to be told from zero beside one of 2^-97 are not.
BOTH int exponent(uint32_t largest) {
    const int e = int(largest >> 23);
    return e < 30 ? 30 : e;
}

// Numbers of at most so many bits from the largest on.
template <int BITS>
BOTH float factor_of(uint32_t largest) {
    return exponent(largest) == 255 ? 0.0f : from_bits(uint32_t(253 + BITS - exponent(largest)) << 23);
}
// What 1 is worth then: not a number if one of them is not finite.
template <int BITS>
BOTH float unit_of(uint32_t largest) {
    return exponent(largest) == 255 ? from_bits(0x7fc00000u) : from_bits(uint32_t(exponent(largest) + 1 - BITS) << 23);
}

// Read once.
template <int N>
BOTH Line<N> stream_line(const void* from) {
#if defined(__CUDA_ARCH__)
    Line<N> v;
    static_assert(N == 2 || N == 4, "8 or 16 bytes");
    if constexpr (N == 2) {
        asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(v.v[0]), "=r"(v.v[1]) : "l"(from));
    } else {
        asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.v[0]), "=r"(v.v[1]), "=r"(v.v[2]), "=r"(v.v[3])
                     : "l"(from));
    }
    return v;
#else
    Line<N> v;
    std::memcpy(&v, from, sizeof v);
    return v;
#endif
}

// Four bytes of a and b, numbered from 0 to 7, as the lowest four digits in base 16 of `of` say.
BOTH uint32_t picked(uint32_t a, uint32_t b, uint32_t of) {
#if defined(__CUDA_ARCH__)
    // __byte_perm masks the selector first, of which bit 3 is never set here.
    uint32_t made;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(made) : "r"(a), "r"(b), "r"(of));
    return made;
#else
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t made = 0;
    for (int i = 0; i < 4; i++) made |= uint32_t(both >> 8 * (of >> 4 * i & 7u) & 255u) << 8 * i;
    return made;
#endif
}

// (v & mask) | base in one instruction.
BOTH uint32_t masked(uint32_t v, uint32_t mask, uint32_t base) {
#if defined(__CUDA_ARCH__)
    uint32_t made;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(made) : "r"(v), "r"(mask), "r"(base));
    return made;
#else
    return (v & mask) | base;
#endif
}

// Shifts by arithmetic where instructions of another kind, of which there are twice as many a turn, do the same: permutations and masks
// take all turns of the one that shifts. `upper`: a selector's upper half, in the lower one; as a number in half precision it is finite.
constexpr bool BY_ARITHMETIC = true;

BOTH uint32_t upper(uint32_t v) {
#if defined(__CUDA_ARCH__)
    if constexpr (BY_ARITHMETIC) {
        uint32_t made;
        asm("{.reg .b16 low, high; .reg .b32 both; mov.b32 {low, high}, %1; mov.b32 both, {high, high}; add.rn.f16x2 %0, both, %2;}"
            : "=r"(made)
            : "r"(v), "r"(0x80008000u));  // -0 changes nothing
        return made;
    }
#endif
    return v >> 16;
}

BOTH uint32_t quarter(uint32_t v) {
#if defined(__CUDA_ARCH__)
    if constexpr (BY_ARITHMETIC) return __umulhi(v, 1u << 30);
#endif
    return v >> 2;
}

// c = a b + c, a 16 x 32 of unsigned bytes, b 32 x 8 of signed ones, as lanes hold them.
BOTH void multiply(int32_t (&c)[HELD][4], const uint32_t (&a)[HELD][4], const uint32_t (&b)[HELD][2]) {
#if defined(__CUDA_ARCH__)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0][0]), "+r"(c[0][1]), "+r"(c[0][2]), "+r"(c[0][3])
        : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(b[0][0]), "r"(b[0][1]));
#else
    for (int i = 0; i < 16; i++) {
        for (int n = 0; n < 8; n++) {
            int32_t sum = 0;
            for (int k = 0; k < 32; k++) {
                const int t = k % 16 / 4, bits = 8 * (k % 4);
                sum += int32_t(a[i % 8 * 4 + t][i / 8 + k / 16 * 2] >> bits & 255u) * int8_t(b[n * 4 + t][k / 16] >> bits & 255u);
            }
            c[i % 8 * 4 + n / 2][i / 8 * 2 + n % 2] += sum;
        }
    }
#endif
}

// What lane `of` of each four neighbours has.
BOTH void of_lane(uint32_t (&to)[HELD], const uint32_t (&v)[HELD], int of) {
#if defined(__CUDA_ARCH__)
    to[0] = __shfl_sync(~0u, v[0], of, 4);
#else
    for (int h = 0; h < HELD; h++) to[h] = v[h / 4 * 4 + of];
#endif
}

// What the neighbour has.
BOTH void of_neighbour(float (&v)[HELD]) {
#if defined(__CUDA_ARCH__)
    v[0] = __shfl_xor_sync(~0u, v[0], 1);
#else
    for (int h = 0; h < HELD; h += 2) {
        const float kept = v[h];
        v[h] = v[h + 1], v[h + 1] = kept;
    }
#endif
}

// A lane's four values as digits without a sign, a register for each: of value + 2^22 times the row's unit.
BOTH void digits_of(uint32_t (&to)[PLANES][HELD], const Line<4>& values, float by, int h) {
    uint32_t v[4];
    UNROLL for (int i = 0; i < 4; i++) v[i] = to_bits(from_bits(values.v[i]) * by + 12582912.0f);  // 1.5 * 2^23: a whole number is left
    const uint32_t low[2] = {picked(v[0], v[1], 0x5140u), picked(v[2], v[3], 0x5140u)};
    to[0][h] = picked(low[0], low[1], 0x5410u), to[1][h] = picked(low[0], low[1], 0x7632u);
    to[2][h] = picked(picked(v[0], v[1], 0x62u), picked(v[2], v[3], 0x62u), 0x5410u);
}

// What a lane has of a unit: words of row g of each tile, and the four values of a tile (t / 2) and kind (t % 2).
struct Read {
    Line<2> words[2];
    Line<4> values;
};

// A unit of a pair: += the products of its values' digits with those of x.
template <int G, class Digits>
BOTH void add_unit(int32_t (&c)[G][PLANES][HELD][4], Read (&read)[HELD], const float (&by)[HELD], const uint32_t* kinds,
                   const Digits& digits, int thread) {
    uint32_t own[PLANES][HELD], table[2][PLANES][2][HELD];
    EACH_LANE digits_of(own, read[h].values, by[h], h);
    UNROLL for (int of = 0; of < 4; of++) UNROLL for (int p = 0; p < PLANES; p++) of_lane(table[of / 2][p][of % 2], own[p], of);
    uint32_t selectors[2][2][2][HELD];  // of a row, a word, and even or odd codes
    EACH_LANE {
        const auto kind = *reinterpret_cast<const Line<4>*>(kinds + LANE % 4 * 4);
        UNROLL for (int r = 0; r < 2; r++) UNROLL for (int w = 0; w < 2; w++) {
            selectors[r][w][0][h] = masked(read[h].words[r].v[w], 0x33333333u, kind.v[2 * w]);
            selectors[r][w][1][h] = masked(quarter(read[h].words[r].v[w]), 0x33333333u, kind.v[2 * w + 1]);
        }
    }
    UNROLL for (int s = 0; s < STEPS; s++) {
        uint32_t factor[PLANES][HELD][4];
        EACH_LANE UNROLL for (int r = 0; r < 2; r++) UNROLL for (int w = 0; w < 2; w++) {
            const uint32_t both = selectors[r][w][s % 2][h], selector = s < 2 ? both : upper(both);
            UNROLL for (int p = 0; p < PLANES; p++) factor[p][h][r + 2 * w] = picked(table[r][p][0][h], table[r][p][1][h], selector);
        }
        UNROLL for (int g = 0; g < G; g++) {
            uint32_t b[HELD][2];
            EACH_LANE {
                const Line<4> of = digits(g, h, s / 2);
                UNROLL for (int i = 0; i < 2; i++) b[h][i] = of.v[s % 2 * 2 + i];
            }
            UNROLL for (int p = 0; p < PLANES; p++) multiply(c[g][p], factor[p], b);
        }
    }
}

}  // namespace
