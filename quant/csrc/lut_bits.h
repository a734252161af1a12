// What blocks of lut_gemv_cuda.h, which says what for, have in shared memory, and how they make bits of x and tables.

#pragma once

#include <cmath>

#include "bit_products.h"

namespace {

constexpr int TILE = 32;                          // rows
constexpr int UNIT = 256;                         // columns
constexpr int MOST_TILES = 20, MOST_PARTS = 3;    // of a cluster; of a weight
constexpr int HELPERS = 8;                        // threads that share a row's kept weights
constexpr int HEAD = 128;                         // bytes: the largest x and sums of first values of each row of x
constexpr int WORDS = UNIT / 32;                  // of a unit's columns
constexpr int APART = 36;                         // numbers from 32 columns' x to the next, so that lanes meet in no bank
constexpr int WARPS_OF_ONE = 8;                   // of a block with one row of bfloat16
constexpr int RING = 12 * 1024, SMALL = 8 * 1024; // bytes of codes that a warp has place for; where shared memory is less
constexpr int PLAIN = 160 * 1024;                 // bytes of shared memory from which it is not

// Rows of x at a time, and bytes of a product's whole number: three where x is bfloat16, four where it is float32.
template <int ROWS_OF_X, int BYTES>
struct Form {
    static constexpr int M = ROWS_OF_X, P = BYTES, WARPS = M == 1 && P == 3 ? WARPS_OF_ONE : 8, THREADS = 32 * WARPS;
    static constexpr int TOP = P == 3 ? 22 : 30;  // whole numbers are below 2^TOP
};

// Parities of a code's bits that there are, but for the empty one.
ANYWHERE constexpr int parities(int bits) { return (1 << bits) - 1; }
ANYWHERE constexpr int slot_words(int bits) { return TILE * UNIT / 32 * bits; }

struct Part {
    const uint32_t* words;    // [T, units, 256 bits]: quant/kernels/lut_gemv/fragments.py, as for the rest
    const float* values;      // [columns, 2^bits]
    const float* terms;       // [units, parities, 8, 8, 4]
    const float* firsts;      // [units, 256, 2]
    const int64_t* columns;   // ascending: those of all columns are not read
    int64_t count, units;     // columns, units of a row
    int64_t held;             // units at a time
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
    int ring;                 // bytes
};

BOTH int64_t tiles_of(const Lut& a, const Place& at) { return least(a.group, a.tiles - at.cluster * a.group); }

// Units of a part that a block has.
BOTH int64_t share(const Part& part, int ranks) { return (part.units + ranks - 1) / ranks; }

// Shared memory: head, sums [row of x, row of the group] in float32, integers [row of x, byte, row of the group], rings, x and bits.
template <class F>
ANYWHERE constexpr int64_t fixed_bytes(int64_t group, int ring) {
    return HEAD + F::M * group * TILE * 4 * (1 + F::P) + int64_t(F::WARPS) * ring;
}
template <class F>
ANYWHERE constexpr int64_t unit_bytes(int bits) {
    return F::M * (4 * WORDS * APART + parities(bits) * F::P * UNIT);
}

template <class F>
struct Shared {
    uint32_t* largest;  // [M]
    int32_t* totals;    // [M, 2]: the lowest 15 bits, and the others
    float* sums;
    int32_t* whole;
    uint32_t* rings;
    float* x;
    uint32_t* bits;     // [unit, parity, M, P, 8 places of bits, 8 words]
    int64_t row_of_x;

    BOTH Shared(const Lut& a, int64_t units, void* memory) {
        char* const base = static_cast<char*>(memory);
        largest = reinterpret_cast<uint32_t*>(base), totals = reinterpret_cast<int32_t*>(base + 4 * F::M);
        sums = reinterpret_cast<float*>(base + HEAD);
        whole = reinterpret_cast<int32_t*>(sums + F::M * a.group * TILE);
        rings = reinterpret_cast<uint32_t*>(whole + F::M * F::P * a.group * TILE);
        x = reinterpret_cast<float*>(rings + int64_t(F::WARPS) * (a.ring / 4));
        row_of_x = units * WORDS * APART;
        bits = reinterpret_cast<uint32_t*>(x + F::M * row_of_x);
    }
};

// 2^n, for n from -126 to 127; a number times 2^n for any n of twice that.
BOTH float power(int n) { return from_bits(uint32_t(n + 127) << 23); }
BOTH float scaled(float v, int n) { return v * power(n / 2) * power(n - n / 2); }
BOTH int exponent_of(uint32_t bits) { return int(bits >> 23) - 127; }
BOTH bool finite(uint32_t largest) { return largest < 0x7f800000u; }

// The power of two that products are times, as whole numbers, by the largest of them: which is not to be rounded up to 2^TOP.
template <class F>
BOTH int steps(uint32_t largest) {
    const int n = F::TOP - 1 - exponent_of(largest + 2);
    return n < 126 ? n : 126;
}

// The whole number nearest a product, below 2^TOP. Of three bytes it is the lowest 23 bits, less 2^22, of a sum that has no bits behind
// them: the word that stands for the highest bit then counts all numbers.
template <class F>
BOTH uint32_t shifted(float a, float b) {
    static_assert(F::P == 3, "23 bits");
#if defined(__CUDA_ARCH__)
    return to_bits(__fmaf_rn(a, b, 12582912.f));
#else
    return to_bits(std::fmaf(a, b, 12582912.f));
#endif
}
template <class F>
BOTH int32_t nearest(float a, float b) {
    if constexpr (F::P == 3) {
        return int32_t(shifted<F>(a, b) - 0x4b400000u);
    } else {
#if defined(__CUDA_ARCH__)
        return __float2int_rn(__fmul_rn(a, b));
#else
        return std::fabs(a * b) < 2147483648.f ? int32_t(std::nearbyintf(a * b)) : 0;
#endif
    }
}

// As it is given; zero beyond the last row.
template <class F>
BOTH float stored_x(const Given& from, int64_t row, int64_t column) {
    if (row >= from.count) return 0.f;
    const int64_t at = row * from.k + column;
    if constexpr (F::P == 3) {
        return from_bits(uint32_t(static_cast<const uint16_t*>(from.x)[at]) << 16);
    } else {
        return static_cast<const float*>(from.x)[at];
    }
}

// Into the second-level cache: what of tables and numbers a turn reads.
template <class F>
BOTH void fetch_tables(const Lut& a, const Part& part, int first, int count, int given) {
    const bool wanted = part.count != a.given.k;  // columns of part of them
    const int thread = anew(given), unit = parities(part.bits) * UNIT;
    for (int i = thread * 32; i < count * unit; i += F::THREADS * 32) fetch(part.terms + int64_t(first) * unit + i);
    for (int i = thread * 16; i < count * UNIT; i += F::THREADS * 16) fetch(part.firsts + (int64_t(first) * UNIT + i) * 2);
    const int own = int(least(count * UNIT, part.count - int64_t(first) * UNIT));
    for (int i = thread * 16; i < own && wanted; i += F::THREADS * 16) fetch(part.columns + int64_t(first) * UNIT + i);
}

// x of a block's columns: the largest product, if that is `wanted`, and of the first `kept` units x itself. Zeros beyond the last column.
template <class F>
BOTH void take_inputs(const Lut& a, const Place& at, const Part& part, int first, int count, int kept, bool wanted, void* shared,
                      int given) {
    const int thread = anew(given);
    constexpr int BATCH = F::M == 1 ? 8 : 4;  // columns whose x is under way together
    const Shared<F> s(a, part.held, shared);
    const int made = count * UNIT, own = int(least(made, part.count - int64_t(first) * UNIT));
    uint32_t most[F::M] = {};
    NO_UNROLL for (int begin = thread; begin < made; begin += BATCH * F::THREADS) {
        float x[F::M][BATCH], scale[BATCH], size[BATCH];
        UNROLL for (int b = 0; b < BATCH; b++) {
            const int i = begin + b * F::THREADS;
            const int64_t to = int64_t(first) * UNIT + i, column = i >= own ? 0 : part.count == a.given.k ? to : part.columns[to];
            UNROLL for (int m = 0; m < F::M; m++) x[m][b] = i < own ? stored_x<F>(a.given, at.first_row + m, column) : 0.f;
            scale[b] = i < own && a.given.scale != nullptr ? a.given.scale[column] : 1.f;
            size[b] = i < own && wanted ? part.firsts[2 * to] : 0.f;
        }
        UNROLL for (int b = 0; b < BATCH; b++) {
            const int i = begin + b * F::THREADS;
            if (i >= made) break;
            UNROLL for (int m = 0; m < F::M; m++) {
                const float v = a.given.scale == nullptr ? x[m][b] : x[m][b] / scale[b];
                if (i < kept * UNIT) s.x[m * s.row_of_x + i / 32 * APART + i % 32] = v;
                const uint32_t product = to_bits(v * size[b]) & 0x7fffffffu;
                most[m] = product > most[m] ? product : most[m];
            }
        }
    }
    UNROLL for (int m = 0; m < F::M; m++) {
        if (wanted) raise(s.largest + m, most[m]);
    }
}

// Bits of x times tables' terms: a thread has 32 columns, a parity and a row of x. And sums of first values.
template <class F, int BITS>
BOTH void take_bits(const Lut& a, const Part& part, int first, int count, void* shared, int given) {
    const int thread = anew(given);
    constexpr int N = parities(BITS);
    const Shared<F> s(a, part.held, shared);
    const Four* terms = reinterpret_cast<const Four*>(part.terms) + int64_t(first) * N * (UNIT / 4);
    const int all = count * N * WORDS;
    const auto load = [&](Four (&to)[8], int i) {  // ahead of their use
        if (i >= F::M * all) return;
        const int at = F::M == 1 ? i : i % all;
        UNROLL for (int j = 0; j < 8; j++) to[j] = terms[(at / WORDS * 8 + j) * WORDS + at % WORDS];
    };
    Four next[8] = {};
    load(next, thread);
    NO_UNROLL for (int i = thread; i < F::M * all; i += F::THREADS) {
        const int m = F::M == 1 ? 0 : i / all, at = i - m * all, word = at % WORDS, which = at / WORDS;
        const int unit = which / N, parity = which % N;
        const float step = power(steps<F>(s.largest[m]));  // of what is not finite, too: `collect` drops that
        const Four* x = reinterpret_cast<const Four*>(s.x + m * s.row_of_x + (unit * WORDS + word) * APART);
        uint32_t whole[32], made[8 * F::P];
        UNROLL for (int j = 0; j < 8; j++) {
            const Four four = x[j];
            UNROLL for (int e = 0; e < 4; e++) {
                if constexpr (F::P == 3) {
                    whole[4 * j + e] = shifted<F>(four.v[e] * step, next[j].v[e]);
                } else {
                    whole[4 * j + e] = uint32_t(nearest<F>(four.v[e] * step, next[j].v[e]));
                }
            }
        }
        load(next, i + F::THREADS);
        transpose<F::P>(made, whole);
        if constexpr (F::P == 3) made[23] = ~0u;
        uint32_t* to = s.bits + (which * F::M + m) * (F::P * 64) + word % 4 * 2 + word / 4;
        UNROLL for (int n = 0; n < 8 * F::P; n++) to[n / 8 * 64 + (n % 8 ^ parity % 8) * 8] = made[n];
    }
    float step[F::M];
    UNROLL for (int m = 0; m < F::M; m++) step[m] = power(steps<F>(s.largest[m]));
    int32_t low[F::M] = {}, high[F::M] = {};
    for (int i = thread; i < count * UNIT; i += F::THREADS) {
        const float value = part.firsts[2 * (int64_t(first) * UNIT + i) + 1];
        UNROLL for (int m = 0; m < F::M; m++) {
            const int32_t q = nearest<F>(s.x[m * s.row_of_x + i / 32 * APART + i % 32] * step[m], value);
            low[m] += q & 32767, high[m] += q >> 15;
        }
    }
    UNROLL for (int m = 0; m < F::M; m++) add_all(s.totals + 2 * m, low[m]), add_all(s.totals + 2 * m + 1, high[m]);
}

// Sums before the first part, and integers before each.
template <class F>
BOTH void clear(const Lut& a, bool sums, void* shared, int thread) {
    const Shared<F> s(a, 0, shared);
    if (thread < F::M) s.largest[thread] = 0;
    if (thread < F::M * 2) s.totals[thread] = 0;
    for (int i = thread; i < F::M * F::P * a.group * TILE; i += F::THREADS) s.whole[i] = 0;
    for (int i = thread; sums && i < F::M * a.group * TILE; i += F::THREADS) s.sums[i] = 0.f;
}

}  // namespace
