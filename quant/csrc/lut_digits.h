// What blocks of lut_gemv_cuda.h, which says what for, have in shared memory, and how they make digits of tables and of x.

#pragma once

#include <cmath>

#include "byte_products.h"

namespace {

constexpr int TILE = 64;                          // rows
constexpr int UNIT = 32;                          // columns whose codes a lane has in 2 bits words
constexpr int GROUPS = 4;                         // products of a unit
constexpr int MOST_TILES = 10, MOST_PARTS = 3;    // of a cluster; of a weight
constexpr int64_t MOST_COLUMNS = 4096;            // at a time, for sums of bytes' products that fit 32 bits
constexpr int HELPERS = 8;                        // threads that share a row's kept weights
constexpr int DIGITS = 4;                         // of x
constexpr int HEAD = 128;                         // bytes: the largest x and sums of digits of each row of x
constexpr int SLOT = 1536;                        // bytes of the codes of a strip's tile
constexpr int DEPTH = 4;                          // of them, at most, that a warp has place for
constexpr int EARLY_ITEMS = 8;                    // more of them that it fetches into the second-level cache before anything else
constexpr int WARPS_OF_ONE = 12;                  // of a block with one row of bfloat16

// Rows of x at a time, and planes of tables: two where x is bfloat16, three where it is float32.
template <int ROWS_OF_X, int PLANES>
struct Form {
    static constexpr int M = ROWS_OF_X, P = PLANES;
    static constexpr int WARPS = M == 1 && P == 2 ? WARPS_OF_ONE : 8, THREADS = 32 * WARPS;
};

// Units of a strip: as many as a thread's registers hold tables and x of. The same for all forms, as sums of strips are cut.
ANYWHERE constexpr int span(int bits) { return bits < 4 ? 2 : 1; }

struct Part {
    const uint32_t* words;    // [T, units, 64 bits]: quant/kernels/lut_gemv/fragments.py
    const float* values;      // [columns, 2^bits]
    const int64_t* columns;
    int64_t count, units;     // columns, units of a row
    int64_t held;             // columns at a time: whole strips
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
    int depth;                // places of a warp's ring: DEPTH or 2
};

ANYWHERE constexpr int radix_bits(int bits) { return bits == 4 ? 7 : 8; }
// Bits that are cut off a strip's sum of lesser digits, R c1 + c2, so that the sum of a turn's strips fits 32 bits: c1 is below R 64 (R 32)
// a column, c2 below R² / 2 + R 64.
ANYWHERE constexpr int cut_bits(int bits) { return bits == 4 ? 1 : 4; }
// Bits of a value's whole number from 2^E on.
ANYWHERE constexpr int value_bits(int bits, int planes) { return radix_bits(bits) * planes - 2; }

BOTH int64_t tiles_of(const Lut& a, const Place& at) { return least(a.group, a.tiles - at.cluster * a.group); }

// Units of a part that a block has.
BOTH int64_t share(const Part& part, int ranks) { return (part.units + ranks - 1) / ranks; }

// Shared memory: head, sums [row of x, row of the group] in float32, integers [row of x, tile, 2, register, lane], rings, x and tables.
template <class F>
ANYWHERE constexpr int64_t fixed_bytes(int64_t group, int depth) {
    return HEAD + F::M * group * (4 * TILE + 4 * 8 * 32) + int64_t(F::WARPS) * depth * SLOT;
}

template <class F>
struct Shared {
    uint32_t* largest;  // [M]
    int32_t* totals;    // [M, DIGITS]
    float* sums;
    int32_t* whole;
    uint32_t *rings, *x;
    uint8_t* tables;
    int64_t held;       // columns at a time

    BOTH Shared(const Lut& a, int64_t columns, void* memory) {
        char* const base = static_cast<char*>(memory);
        largest = reinterpret_cast<uint32_t*>(base), totals = reinterpret_cast<int32_t*>(base + 4 * F::M);
        sums = reinterpret_cast<float*>(base + HEAD);
        whole = reinterpret_cast<int32_t*>(sums + F::M * a.group * TILE);
        rings = reinterpret_cast<uint32_t*>(whole + F::M * a.group * 256);
        x = rings + int64_t(F::WARPS) * a.depth * (SLOT / 4);
        held = columns;
        tables = reinterpret_cast<uint8_t*>(x + F::M * held);
    }
};

// 2^n, for n from -126 to 127; a number times 2^n for any n of twice that.
BOTH float power(int n) { return from_bits(uint32_t(n + 127) << 23); }
BOTH float scaled(float v, int n) { return v * power(n / 2) * power(n - n / 2); }
BOTH int exponent_of(uint32_t bits) { return int(bits >> 23) - 127; }

BOTH int32_t nearest(float v) {
#if defined(__CUDA_ARCH__)
    return __float2int_rn(v);
#else
    return int32_t(std::nearbyintf(v));
#endif
}

BOTH float largest_of(float size, float v) {
#if defined(__CUDA_ARCH__)
    return fmaxf(size, fabsf(v));
#else
    return std::fmax(size, std::fabs(v));
#endif
}

// As it is given; zero beyond the last row.
template <class F>
BOTH float stored_x(const Given& from, int64_t row, int64_t column) {
    if (row >= from.count) return 0.f;
    const int64_t at = row * from.k + column;
    if constexpr (F::P == 2) {
        return from_bits(uint32_t(static_cast<const uint16_t*>(from.x)[at]) << 16);
    } else {
        return static_cast<const float*>(from.x)[at];
    }
}

// A product and a sum, rounded once.
BOTH float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return std::fmaf(a, b, c);
#endif
}

// Digits of four whole numbers below 2^(R P), a byte each: plane 0 has the highest.
template <int R, int P>
BOTH void split(uint32_t* made, int apart, const uint32_t (&u)[4]) {
    if constexpr (P == 2) {
        const uint32_t one = permute(u[0], u[1], 0x5410u), two = permute(u[2], u[3], 0x5410u);
        constexpr uint32_t LOW = R == 8 ? ~0u : 0x007f007fu;
        made[apart] = permute(one & LOW, two & LOW, 0x6420u);
        made[0] = R == 8 ? permute(one, two, 0x7531u) : permute(one >> R & LOW, two >> R & LOW, 0x6420u);
    } else {
        UNROLL for (int p = 0; p < P; p++) {
            made[p * apart] = 0;
            UNROLL for (int j = 0; j < 4; j++) made[p * apart] |= (u[j] >> R * (P - 1 - p) & ((1u << R) - 1u)) << 8 * j;
        }
    }
}

// Into the second-level cache: tables and numbers of the columns that are taken.
template <class F>
BOTH void fetch_tables(const Part& part, int first, int count, int given) {
    const int thread = anew(given), own = int(least(count * UNIT, part.count - int64_t(first) * UNIT));
    const float* values = part.values + (int64_t(first) * UNIT << part.bits);
    for (int i = thread * 32; i < own << part.bits; i += F::THREADS * 32) fetch(values + i);
    for (int i = thread * 16; i < own; i += F::THREADS * 16) fetch(part.columns + int64_t(first) * UNIT + i);
}

// Tables' digits, from `first` on of columns that are taken. To `x`, for the first row: the column and, in the lowest byte, E + 127.
template <class F, int BITS>
BOTH void take_tables(const Lut& a, const Part& part, int first, int count, void* shared, int given) {
    const int thread = anew(given);
    constexpr int SIZE = 1 << BITS, R = radix_bits(BITS), TOP = value_bits(BITS, F::P), MIDDLE = 1 << (TOP + 1);
    constexpr int BATCH = BITS == 2 ? 6 : BITS == 3 ? 3 : 2;  // columns whose values are under way together
    const Shared<F> s(a, part.held, shared);
    const int own = int(least(count * UNIT, part.count - int64_t(first) * UNIT));
    NO_UNROLL for (int begin = thread; begin < own; begin += BATCH * F::THREADS) {
        Four v[BATCH][SIZE / 4];
        uint32_t column[BATCH];
        UNROLL for (int b = 0; b < BATCH; b++) {
            const int64_t i = int64_t(first) * UNIT + (begin + b * F::THREADS < own ? begin + b * F::THREADS : begin);
            const Four* from = reinterpret_cast<const Four*>(part.values + (i << BITS));
            UNROLL for (int e = 0; e < SIZE / 4; e++) v[b][e] = from[e];
            column[b] = uint32_t(part.columns[i]);
        }
        UNROLL for (int b = 0; b < BATCH; b++) {
            const int i = begin + b * F::THREADS;
            if (i >= own) break;
            float most = 0.f;
            UNROLL for (int e = 0; e < SIZE; e++) most = largest_of(most, v[b][e / 4].v[e % 4]);
            int exponent = exponent_of(to_bits(most));
            if (exponent < -100) exponent = -100;  // values that small are cut off as if they stood beside one of 2^-100
            if (most * power(TOP - exponent) >= float(MIDDLE) - 0.5f) exponent++;  // would be rounded up to one too many
            const float step = power(TOP - exponent);
            uint32_t bytes[F::P][SIZE / 4];
            UNROLL for (int e = 0; e < SIZE / 4; e++) {
                uint32_t u[4];
                UNROLL for (int j = 0; j < 4; j++) {
                    if constexpr (TOP < 20) {  // the lowest bits of a number that has none behind them
                        u[j] = to_bits(fused(v[b][e].v[j], step, 12582912.f + MIDDLE)) - (R * F::P == 16 ? 0u : 0x4b400000u);
                    } else {
                        u[j] = uint32_t(nearest(v[b][e].v[j] * step) + MIDDLE);
                    }
                }
                split<R, F::P>(&bytes[0][e], SIZE / 4, u);
            }
            UNROLL for (int p = 0; p < F::P; p++) {
                Line<SIZE / 4> line;
                UNROLL for (int j = 0; j < SIZE / 4; j++) line.v[j] = bytes[p][j];
                *reinterpret_cast<Line<SIZE / 4>*>(s.tables + ((p * s.held + i) << BITS)) = line;
            }
            s.x[i] = column[b] << 8 | uint32_t(exponent + 127);
        }
    }
}

// x times 2^E of the same columns, and the largest. Zeros beyond the last.
template <class F>
BOTH void take_inputs(const Lut& a, const Place& at, const Part& part, int first, int count, void* shared, int given) {
    const int thread = anew(given);
    constexpr int BATCH = 6;  // columns whose x is under way together
    const Shared<F> s(a, part.held, shared);
    const int strip = UNIT * span(part.bits), made = (count * UNIT + strip - 1) / strip * strip;
    const int own = int(least(count * UNIT, part.count - int64_t(first) * UNIT));
    uint32_t most[F::M] = {};
    NO_UNROLL for (int begin = thread; begin < made; begin += BATCH * F::THREADS) {
        uint32_t stored[BATCH];
        float x[F::M][BATCH], scale[BATCH];
        UNROLL for (int b = 0; b < BATCH; b++) {
            const int i = begin + b * F::THREADS;
            stored[b] = i < own ? s.x[i] : 0u;
            UNROLL for (int m = 0; m < F::M; m++) x[m][b] = i < own ? stored_x<F>(a.given, at.first_row + m, stored[b] >> 8) : 0.f;
            scale[b] = i < own && a.given.scale != nullptr ? a.given.scale[stored[b] >> 8] : 1.f;
        }
        UNROLL for (int b = 0; b < BATCH; b++) {
            const int i = begin + b * F::THREADS;
            if (i >= made) break;
            const float size = from_bits((stored[b] & 255u) << 23);
            UNROLL for (int m = 0; m < F::M; m++) {
                const uint32_t v = to_bits((a.given.scale == nullptr ? x[m][b] : x[m][b] / scale[b]) * size);
                s.x[m * s.held + i] = v;
                most[m] = (v & 0x7fffffffu) > most[m] ? v & 0x7fffffffu : most[m];
            }
        }
    }
    UNROLL for (int m = 0; m < F::M; m++) raise(s.largest + m, most[m]);
}

BOTH bool finite(uint32_t largest) { return largest < 0x7f800000u; }

// Digits instead of x: one a byte, the first lowest.
template <class F>
BOTH void take_digits(const Lut& a, const Part& part, int count, void* shared, int given) {
    const int thread = anew(given);
    const Shared<F> s(a, part.held, shared);
    const int strip = UNIT * span(part.bits), made = (count * UNIT + strip - 1) / strip * strip, r = radix_bits(part.bits);
    UNROLL for (int m = 0; m < F::M; m++) {
        const uint32_t largest = s.largest[m];
        const int up = 4 * r - 3 - exponent_of(largest);  // to numbers below 2^(4 r - 2)
        const float one = finite(largest) ? power(up / 2) : 0.f, other = power(up - up / 2);
        int32_t total[DIGITS] = {};
        for (int i = thread; i < made; i += F::THREADS) {
            const uint32_t v = s.x[m * s.held + i];
            int32_t q = finite(largest) ? nearest(from_bits(v) * one * other) : 0;
            uint32_t digits = 0;
            UNROLL for (int d = DIGITS - 1; d >= 0; d--) {
                const int32_t half = 1 << (r - 1), digit = d == 0 ? q : ((q + half) & (2 * half - 1)) - half;
                digits |= (uint32_t(digit) & 255u) << 8 * d, total[d] += digit;
                q = (q - digit) >> r;
            }
            s.x[m * s.held + i] = digits;
        }
        UNROLL for (int d = 0; d < DIGITS; d++) add_all(s.totals + m * DIGITS + d, total[d]);
    }
}

// Sums before the first part, and integers before each.
template <class F>
BOTH void clear(const Lut& a, const Place& at, bool sums, void* shared, int thread) {
    const Shared<F> s(a, 0, shared);
    const int tiles = int(tiles_of(a, at));
    if (thread < F::M) s.largest[thread] = 0;
    if (thread < F::M * DIGITS) s.totals[thread] = 0;
    for (int m = 0; m < F::M; m++) {
        for (int i = thread; i < tiles * 256; i += F::THREADS) s.whole[m * a.group * 256 + i] = 0;
        for (int i = thread; sums && i < tiles * TILE; i += F::THREADS) s.sums[m * a.group * TILE + i] = 0.f;
    }
}

}  // namespace
