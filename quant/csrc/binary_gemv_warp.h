// Whole numbers for a product with signs, and what a warp does with a unit of them: binary_gemv_cuda.h says how.

#pragma once

#include "products_cuda.h"

namespace {

constexpr int STEPS = 4;    // matrices of 16 x 32 in a unit of two tiles
constexpr int DIGITS = 4;   // of an x
constexpr int X_BITS = 27;  // and a sign

// Digits of a value that are multiplied, of the four that are stored: two where x is bfloat16, three where it is float32.
template <class X>
constexpr int PLANES_FOR = sizeof(X) == 2 ? 2 : 3;

// What the largest value of a row is stored as, and what is added to each so that digits have no sign, and those that are left out are as
// many above as below.
constexpr double MOST = 2147483648.0 - 65536.0;
constexpr uint32_t OFFSET = 0x80008080u;
constexpr float ONE_OF_MOST = float(1.0 / MOST);

// Numbers too small to be told from zero beside one of 2^-97 are not.
BOTH float at_least(float largest) { return largest < 6.310887241768095e-30f ? 6.310887241768095e-30f : largest; }

// What 1 is worth in sums of PLANES digits of a row's values: not a number if one of them is not finite.
template <int PLANES>
BOTH float unit_of_values(float largest) {
    constexpr float ONE = float((PLANES == 2 ? 65536.0 : 256.0) / MOST);
    return !(largest <= 3.402823466e38f) ? float_of(0x7fc00000u) : ONE * at_least(largest);
}

// The exponent e of the largest |v| < 2^(e - 126). Numbers too small to be told from zero beside one of 2^-97 are not.
BOTH int exponent(uint32_t largest) {
    const int e = int(largest >> 23);
    return e < 30 ? 30 : e;
}

// Numbers of at most so many bits from the largest on.
template <int BITS>
BOTH float factor_of(uint32_t largest) {
    return exponent(largest) == 255 ? 0.0f : float_of(uint32_t(253 + BITS - exponent(largest)) << 23);
}
// What 1 is worth then: not a number if one of them is not finite.
template <int BITS>
BOTH float unit_of(uint32_t largest) {
    return exponent(largest) == 255 ? float_of(0x7fc00000u) : float_of(uint32_t(exponent(largest) + 1 - BITS) << 23);
}

// The column of a unit whose weight is code number `v` of a lane's word. Kinds, which selectors need besides codes, four bits each: of each
// word the even codes, then the odd ones.
BOTH int column_of(int v, int lane) { return 8 * v + lane; }
BOTH int kind_of(const uint32_t* kinds, int column) {
    const int v = column / 8;
    return int(kinds[v % 2 * 8 + column % 8] >> v / 2 * 4 & 4u);
}

// N numbers of a row of x, at columns column(i), on their way at the same time; zeros beyond the last column. asked(): is done meanwhile.
template <class X, int N, class Column, class Asked>
BOTH void read(float (&v)[N], const Given& from, int64_t row, const Column& column, const Asked& asked) {
    const int last = int(from.k) - 1;
    const uint32_t begin = uint32_t(row) * uint32_t(from.k);  // fewer than 2^16 units: see block_of
    X kept[N];
    UNROLL for (int i = 0; i < N; i++) kept[i] = static_cast<const X*>(from.x)[begin + uint32_t(column(i) < last ? column(i) : last)];
    asked();
    UNROLL for (int i = 0; i < N; i++) {
        if constexpr (sizeof(X) == 2) {
            v[i] = float_of(uint32_t(kept[i]) << 16);
        } else {
            v[i] = kept[i];
        }
    }
    if (from.scale != nullptr) {
        UNROLL for (int i = 0; i < N; i++) v[i] /= from.scale[column(i) < last ? column(i) : last];
    }
    UNROLL for (int i = 0; i < N; i++) v[i] = column(i) > last ? 0.0f : v[i];
}

BOTH int32_t rounded(float v) {
#if defined(__CUDA_ARCH__)
    return __float2int_rn(v);
#else
    return int32_t(__builtin_rintf(v));
#endif
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

// The upper half of v, four digits in base 16 below 8, in the lower one: as half floats, of which none is infinite, plus -0, for the other
// pipe has turns to spare. What is above is not to be looked at.
BOTH uint32_t upper(uint32_t v) {
#if defined(__CUDA_ARCH__)
    uint32_t made;
    asm("{.reg .b16 low, high; .reg .b32 both; mov.b32 {low, high}, %1; mov.b32 both, {high, high}; add.rn.f16x2 %0, both, %2;}"
        : "=r"(made)
        : "r"(v), "r"(0x80008000u));
    return made;
#else
    return v >> 16 | v & 0xffff0000u;
#endif
}

// c = a b + c, a 16 x 32 of unsigned bytes, b 32 x 8 of signed ones, as lanes hold them.
BOTH void multiply(int32_t (&c)[HELD][4], const uint32_t (&a)[HELD][4], const uint32_t (&b)[HELD][2]) {
#if defined(__CUDA_ARCH__)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0][0]), "+r"(c[0][1]), "+r"(c[0][2]), "+r"(c[0][3])
        : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(b[0][0]), "r"(b[0][1]));
#else
    add_to_sums(c, [&](int i, int n) {
        int32_t sum = 0;
        for (int k = 0; k < 32; k++) {
            const int t = k % 16 / 4, bits = 8 * (k % 4);
            sum += int32_t(a[i % 8 * 4 + t][i / 8 + k / 16 * 2] >> bits & 255u) * int8_t(b[n * 4 + t][k / 16] >> bits & 255u);
        }
        return sum;
    });
#endif
}

// Of all lanes of a warp.
BOTH uint32_t most_of(const uint32_t (&v)[HELD]) {
#if defined(__CUDA_ARCH__)
    return __reduce_max_sync(~0u, v[0]);
#else
    uint32_t most = 0;
    for (int h = 0; h < HELD; h++) most = v[h] > most ? v[h] : most;
    return most;
#endif
}

BOTH int32_t sum_of(const int32_t (&v)[HELD]) {
#if defined(__CUDA_ARCH__)
    return __reduce_add_sync(~0u, v[0]);
#else
    int32_t sum = 0;
    for (int h = 0; h < HELD; h++) sum += v[h];
    return sum;
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

// What a lane has of a unit, of row g of each tile: words, and digits of its values as they are stored.
struct Read {
    Line<2> words[2];
    Line<4> high[2];  // of plain columns the two highest, then of salient ones
    Line<2> third[2];
};

// A unit of a pair: += the products of its values' digits, the highest first, with those of x. kinds, digits: for even and odd codes.
template <int G, int PLANES, class Kinds, class Digits>
BOTH void add_unit(int32_t (&c)[G][PLANES][HELD][4], const Read (&read)[HELD], const Kinds& kinds, const Digits& digits, int thread) {
    UNROLL for (int odd = 0; odd < 2; odd++) {
        uint32_t selectors[2][2][HELD];  // of a row and a word: for even or odd codes
        EACH_LANE {
            const Line<2> kind = kinds(h, odd);
            UNROLL for (int r = 0; r < 2; r++) UNROLL for (int w = 0; w < 2; w++) {
                selectors[r][w][h] = masked(read[h].words[r].v[w] >> 2 * odd, 0x33333333u, kind.v[w]);
            }
        }
        uint32_t b[G][HELD][4];
        EACH_LANE UNROLL for (int g = 0; g < G; g++) {
            const Line<4> of = digits(g, h, odd);
            UNROLL for (int i = 0; i < 4; i++) b[g][h][i] = of.v[i];
        }
        UNROLL for (int s = 0; s < STEPS / 2; s++) {
            uint32_t factor[PLANES][HELD][4], of_x[HELD][2];
            EACH_LANE UNROLL for (int r = 0; r < 2; r++) UNROLL for (int w = 0; w < 2; w++) {
                const uint32_t selector = s == 0 ? selectors[r][w][h] : upper(selectors[r][w][h]);
                const Read& of = read[h];
                UNROLL for (int p = 0; p < 2; p++) factor[p][h][r + 2 * w] = picked(of.high[r].v[p], of.high[r].v[2 + p], selector);
                if constexpr (PLANES == 3) factor[2][h][r + 2 * w] = picked(of.third[r].v[0], of.third[r].v[1], selector);
            }
            UNROLL for (int g = 0; g < G; g++) {
                EACH_LANE UNROLL for (int i = 0; i < 2; i++) of_x[h][i] = b[g][h][2 * s + i];
                UNROLL for (int p = 0; p < PLANES; p++) multiply(c[g][p], factor[p], of_x);
            }
        }
    }
}

}  // namespace
