// The digits of lut_gemv_cuda.h, which says what for: out of x and values, in whole numbers.

#pragma once

#include "products_cuda.h"

namespace {

constexpr int ROWS = 32;                   // of a tile
constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int STEP = 8, GROUPS = 4;        // words of a matrix; matrices for the 32 digits
constexpr int MOST_TILES = 20, MOST_PARTS = 4;
constexpr int HELPERS = 8;                 // threads that share a row's kept weights
constexpr int AHEAD = 32;                  // steps of a warp that are fetched into the second-level cache at the beginning

struct Part {
    const uint32_t* words;    // [T, length, 32]
    const float* values;      // [columns, 2^bits]
    const int64_t* columns;
    int64_t count, length;    // columns, words of a row
    int bits;
};

struct Lut {
    Part part[MOST_PARTS];
    int parts;
    const int64_t* starts;    // of the rows' kept weights, or null
    const int32_t* kept;      // their columns
    const float* differences;
    Given given;
    void* out;
    int64_t rows, tiles;      // of the weight
    int64_t group;            // tiles of a cluster
    int64_t planes;           // bytes of shared memory for digits
    int room;                 // bits of a rounded product
};

ANYWHERE constexpr int forms(int bits) { return bits == 1 ? 2 : bits; }

// The set for each bit of a code in a form, the lowest bit's lowest; 0 is the bit that is always 1.
ANYWHERE constexpr uint32_t sets(int bits, int form) {
    return bits == 1   ? (form == 0 ? 0x1 : 0x0)
           : bits == 2 ? (form == 0 ? 0x21 : 0x03)
           : bits == 3 ? (form == 0 ? 0x421 : form == 1 ? 0x563 : 0x07)
                       : (form == 0 ? 0x8421 : form == 1 ? 0x9c63 : form == 2 ? 0xbde7 : 0x0fa5);
}

// Whether bit `j` of a code has one: the highest bit of the last form of codes of 3 bits has none.
ANYWHERE constexpr bool has_set(int bits, int form, int j) { return bits != 3 || form != 2 || j != 2; }

// Bits of `a` where `mask` has them, else of `b`.
BOTH uint32_t chosen(uint32_t a, uint32_t b, uint32_t mask) {
#if defined(__CUDA_ARCH__)
    uint32_t v;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(v) : "r"(a), "r"(b), "r"(mask));
    return v;
#else
    return (a & mask) | (b & ~mask);
#endif
}

// Every bit of the form is that of its set; those without one are anything.
template <int BITS, int FORM>
BOTH uint32_t form_of(uint32_t w) {
    if constexpr (FORM == 0) return w;
    if constexpr (BITS == 1) return ~0u;
    if constexpr (BITS == 2) return (w & w >> 1) | 0xaaaaaaaau;
    if constexpr (BITS == 3) {
        constexpr uint32_t LOWER = 033333333333u & 0x3fffffffu;
        const uint32_t pairs = w & chosen(w >> 1, w << 2, LOWER);  // bits 0 and 1, 1 and 2, 2 and 0
        if constexpr (FORM == 1) return pairs;
        return (pairs & pairs >> 1) | 022222222222u;
    }
    if constexpr (BITS == 4) {
        const uint32_t next = chosen(w >> 1, w << 3, 0x77777777u);  // of the same code
        if constexpr (FORM == 1) return w & next;
        const uint32_t second = chosen(w >> 2, w << 2, 0x33333333u);
        if constexpr (FORM == 2) return w & next & second;
        const uint32_t both = w & second;  // bits 0 and 2, 1 and 3, and these again
        return (both & (both << 1 | 0x33333333u)) | 0x88888888u;
    }
    return 0;
}

// Of the terms of a step in shared memory: a number for each set and column, for each warp. Lanes read as many columns as a word has.
ANYWHERE constexpr int stride(int bits) { return (STEP + 1) * (32 / bits); }
constexpr int TERMS = 16 * stride(4);
ANYWHERE constexpr int64_t word_bytes(int rows, int bits) { return int64_t(128) * rows * forms(bits); }
// Beside the digits: the terms, sums [M, group, row] of each group of digits, the largest products.
ANYWHERE constexpr int64_t other_bytes(int rows, int64_t group) { return 4 * (WARPS * TERMS + int64_t(rows) * GROUPS * group * ROWS + 4); }

// Words of a row that a block has of a part: whole steps, of at most `length`.
BOTH int share(const Part& part, int ranks) { return ((int(part.length) + ranks - 1) / ranks + STEP - 1) / STEP * STEP; }

BOTH int64_t tiles_of(const Lut& a, const Place& at) { return least(a.group, a.tiles - at.cluster * a.group); }

BOTH int32_t* terms_in(const Lut& a, void* shared) { return reinterpret_cast<int32_t*>(static_cast<char*>(shared) + a.planes); }
BOTH int32_t* sums_in(const Lut& a, void* shared) { return terms_in(a, shared) + WARPS * TERMS; }
template <int M>
BOTH uint32_t* largest_in(const Lut& a, void* shared) {
    return reinterpret_cast<uint32_t*>(sums_in(a, shared) + M * GROUPS * a.group * ROWS);
}

// Words whose digits are at hand at a time: whole steps.
template <int M>
BOTH int held(const Lut& a, int bits) {
    return int(a.planes) / int(word_bytes(M, bits)) / STEP * STEP;
}

template <int M>
BOTH void clear(const Lut& a, void* shared, int thread) {
    for (int64_t i = thread; i < M * GROUPS * a.group * ROWS; i += THREADS) sums_in(a, shared)[i] = 0;
    if (thread < M) largest_in<M>(a, shared)[thread] = 0;
}

// A product and a difference, each rounded, as on the host.
BOTH float times(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

template <int BITS>
struct Values {
    float v[1 << BITS];
};

template <int BITS>
BOTH Values<BITS> values_of(const Part& part, int column) {
    Values<BITS> found;
    const float* from = part.values + (int64_t(column) << BITS);
    if constexpr (BITS == 1) {
        found.v[0] = from[0], found.v[1] = from[1];
    } else {
        UNROLL for (int i = 0; i < 1 << BITS; i += 4) {
            const Four four = *reinterpret_cast<const Four*>(from + i);
            UNROLL for (int e = 0; e < 4; e++) found.v[i + e] = four.v[e];
        }
    }
    return found;
}

// Bits of the largest |x times value| of the block's share of a part, infinite and not a number above all.
template <int M, int BITS>
BOTH void find_largest(const Lut& a, const Place& at, const Part& part, void* shared, int given) {
    const int thread = anew(given);
    const int own = share(part, at.ranks) * (32 / BITS), begin = at.rank * own, end = int(least(part.count, begin + own));
    uint32_t most[M] = {};
    UNROLL_BY(BITS < 4 ? 4 : 2) for (int c = begin + thread; c < end; c += THREADS) {
        const Values<BITS> values = values_of<BITS>(part, c);
        const int64_t column = part.columns[c];
        UNROLL for (int m = 0; m < M; m++) {
            const float x = read_x(a.given, at.first_row + m, column);
            UNROLL for (int i = 0; i < 1 << BITS; i++) {
                const uint32_t bits = to_bits(times(x, values.v[i])) & 0x7fffffffu;
                most[m] = bits > most[m] ? bits : most[m];
            }
        }
    }
    UNROLL for (int m = 0; m < M; m++) raise(largest_in<M>(a, shared) + m, most[m]);
}

// The exponent e of the largest product < 2^(e - 126). Numbers too small to be told from zero beside one of 2^-97 are not.
BOTH int exponent(uint32_t largest) {
    const int e = int(largest >> 23);
    return e < 30 ? 30 : e;
}

// What a digit sum of 1 is worth: not a number if a product is not finite.
BOTH float unit_of(const Lut& a, uint32_t largest) {
    return exponent(largest) == 255 ? from_bits(0x7fc00000u) : from_bits(uint32_t(exponent(largest) + 1 - a.room) << 23);
}

BOTH int32_t rounded(float v) {
#if defined(__CUDA_ARCH__)
    return __float2int_rn(v);
#else
    return int32_t(__builtin_rintf(v));
#endif
}

// A matrix of 32 x 32 bits, of which a lane has a row, transposed.
BOTH void transpose(uint32_t (&v)[HELD], int thread) {
#if defined(__CUDA_ARCH__)
    // Halves, then bytes, of the lane's row and of another's.
    v[0] = __byte_perm(v[0], __shfl_xor_sync(~0u, v[0], 16), thread & 16 ? 0x3276 : 0x5410);
    v[0] = __byte_perm(v[0], __shfl_xor_sync(~0u, v[0], 8), thread & 8 ? 0x3715 : 0x6240);
    UNROLL for (int s = 4; s > 0; s /= 2) {
        const uint32_t low = ~0u / ((1u << s) + 1u), kept = thread & s ? ~low : low;
        const uint32_t other = __shfl_xor_sync(~0u, v[0], s);
        v[0] = chosen(v[0], __funnelshift_l(other, other, thread & s ? 32 - s : s), kept);
    }
#else
    uint32_t made[HELD] = {};
    for (int i = 0; i < HELD * HELD; i++) made[i / HELD] |= (v[i % HELD] >> i / HELD & 1u) << i % HELD;
    std::memcpy(v, made, sizeof made);
#endif
}

template <int N>
struct Bits {
    static constexpr int value = N;
};

// The digits of a form of a step's words, out of the terms, to where lane (g, t) of a matrix finds digits g and 8 + g of words t and 4 + t
// side by side. A lane has a digit of eight words, and each begins with another of them, so that their places are in all banks.
template <int BITS, int FORM>
BOTH void put_digits(const int32_t* terms, uint32_t* to, int given) {
    const int thread = anew(given);
    uint32_t v[STEP][HELD] = {};
    EACH_LANE {
        const int lane = LANE, bit = lane % BITS;
        const bool own = lane < 32 / BITS * BITS && has_set(BITS, FORM, bit);
        const int32_t* from = terms + (sets(BITS, FORM) >> 4 * bit & 15u) * stride(BITS) + lane / BITS;
        UNROLL for (int w = 0; w < STEP; w++) v[w][h] = own ? uint32_t(from[w * (32 / BITS)]) : 0u;
    }
    UNROLL for (int w = 0; w < STEP; w++) transpose(v[w], thread);
    EACH_LANE {
        const int lane = LANE, g = lane % 8, turn = g / 2;
        uint32_t* at = to + lane / 16 * 128 + g * 16 + lane / 8 % 2 * 2;
        uint32_t once[STEP], twice[STEP];
        UNROLL for (int w = 0; w < STEP; w++) once[w] = turn & 1 ? v[w / 4 * 4 + (w + 1) % 4][h] : v[w][h];
        UNROLL for (int w = 0; w < STEP; w++) twice[w] = turn & 2 ? once[w / 4 * 4 + (w + 2) % 4] : once[w];
        UNROLL for (int i = 0; i < 4; i++) *reinterpret_cast<Line<2>*>(at + (i + turn) % 4 * 4) = Line<2>{{twice[i], twice[4 + i]}};
    }
}

// Digits of the words from `first` on: a warp makes those of a step and a row of x at a time.
template <int M, int BITS>
BOTH void build(const Lut& a, const Place& at, const Part& part, int first, int count, void* shared, int given) {
    const int thread = anew(given);
    if (HELD > 1 && thread % 32 != 0) return;
    constexpr int CODES = 32 / BITS, SETS = 1 << BITS;
    const int warp = warp_of(thread);
    int32_t* terms = terms_in(a, shared) + warp * TERMS;
    const int steps = (count + STEP - 1) / STEP;
    NO_UNROLL for (int i = warp; i < steps * M; i += WARPS) {
        const int step = i / M, m = i % M;
        const int begin = (first + step * STEP) * CODES;
        const int own = int(least((count - step * STEP) * CODES, part.count - begin));
        const uint32_t largest = largest_in<M>(a, shared)[m];
        const float by = exponent(largest) == 255 ? 0.0f : from_bits(uint32_t(a.room + 253 - exponent(largest)) << 23);
        EACH_LANE {
            constexpr int EACH = (STEP * CODES + 31) / 32;  // columns of a lane, all of which it reads before it uses the first
            Values<BITS> values[EACH] = {};
            float x[EACH] = {};
            UNROLL for (int k = 0; k < EACH; k++) {
                const int c = LANE + 32 * k;
                if (c >= own || by == 0.0f) continue;
                values[k] = values_of<BITS>(part, begin + c), x[k] = read_x(a.given, at.first_row + m, part.columns[begin + c]);
            }
            UNROLL for (int k = 0; k < EACH; k++) {
                int32_t q[SETS];
                UNROLL for (int s = 0; s < SETS; s++) q[s] = rounded(times(x[k], values[k].v[s]) * by);
                UNROLL for (int j = 1; j < SETS; j *= 2) {
                    UNROLL for (int s = 0; s < SETS; s++) q[s] -= s & j ? q[s ^ j] : 0;
                }
                if (LANE + 32 * k >= STEP * CODES) continue;
                UNROLL for (int s = 0; s < SETS; s++) terms[s * stride(BITS) + LANE + 32 * k] = q[s];
            }
        }
        barrier();
        uint32_t* to = static_cast<uint32_t*>(shared) + i * forms(BITS) * 256;
        put_digits<BITS, 0>(terms, to, thread);
        put_digits<BITS, 1>(terms, to + 256, thread);
        if constexpr (BITS >= 3) put_digits<BITS, 2>(terms, to + 512, thread);
        if constexpr (BITS == 4) put_digits<BITS, 3>(terms, to + 768, thread);
        barrier();
    }
}

}  // namespace
