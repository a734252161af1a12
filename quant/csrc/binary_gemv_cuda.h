// A product with signs, for a GPU: see binary_gemv.cu, which runs these phases with barriers between them.
//
// A weight has a code of two bits and its column one of two kinds. A row's value for a code in a block of columns is
// v0 + (v1 - v0) b0 + (v2 - v0) b1 + (v3 - v2 - v1 + v0) b0 b1, so that a block needs three sums of x over bits, for columns of each
// kind. They are taken by tensor cores in whole numbers, exactly: x of a block's share of columns is rounded to 31 bits of the largest there
// (float32 has 24 of each), which are four digits of a byte; the digits for both kinds are the eight columns of a matrix, and the bits,
// masked out of the words where they stand, its other factor. Where the bits stand two places higher, x is a fourth.
//
// A cluster of `ranks` blocks has a group of row tiles; each block a share of the units of 128 columns, whose digits lie in shared memory.

#pragma once

#include "products_cuda.h"

namespace {

constexpr int TILE = 8, PAIR = 2 * TILE, UNIT = 128, STEPS = 4;  // rows of a tile and of a matrix; columns; matrices of a unit
constexpr int SLICES = 4;                                        // warps that share a pair of tiles
constexpr int MOST_PAIRS = 40;
constexpr int DIGITS = 4, KINDS = 2;
constexpr int SLOTS = 8;  // pairs at a time with one row of x, which takes half of the registers
ANYWHERE constexpr int slots(int rows) { return rows == 1 ? SLOTS : 4; }
ANYWHERE constexpr int warps(int rows) { return SLICES * slots(rows); }
ANYWHERE constexpr int threads(int rows) { return 32 * warps(rows); }

struct Signs {
    const uint32_t* words;   // [T, units, 8, 8]
    const float* tables;     // [T, blocks, 8, 8]
    const int32_t* salient;  // [units * 128]
    Given given;
    void* out;
    int64_t rows, tiles, units, blocks, block;  // columns of a block: a multiple of a unit
    int64_t group;           // pairs of a cluster
    uint32_t per_block;      // units of a block
    uint32_t inverse;        // 2^32 / per_block, rounded up
    int64_t share;           // units of a rank
    int depth;               // units of a warp whose words and values are on their way to shared memory at a time: 2 or 4
};

constexpr int PLACE = 2 * PAIR * 8;  // numbers of 4 bytes that a pair has in a unit: words, then values

// What a block has in shared memory, for M rows of x.
template <int M>
struct Held {
    uint32_t* places;  // [warps, depth, PLACE]
    uint32_t* digits;  // [units, M, steps, lanes, 2]: a byte each
    int32_t* whole;    // [units, M, 4]: sums of x for each kind, of the lower digits and of the upper
    uint32_t* largest; // [M]
    float* sums;       // [slices, group * 16, M]
};

ANYWHERE constexpr int64_t shared_bytes(int rows, int64_t share, int64_t group, int depth) {
    return int64_t(4) * warps(rows) * depth * PLACE + rows * (share * (STEPS * 32 * 8 + 16) + SLICES * group * PAIR * 4 + 16);
}

template <int M>
BOTH Held<M> held_in(const Signs& a, void* shared) {
    Held<M> held;
    held.places = static_cast<uint32_t*>(shared);
    held.digits = held.places + warps(M) * a.depth * PLACE;
    held.whole = reinterpret_cast<int32_t*>(held.digits + a.share * M * STEPS * 32 * 2);
    held.sums = reinterpret_cast<float*>(held.whole + a.share * M * 4);
    held.largest = reinterpret_cast<uint32_t*>(held.sums + SLICES * a.group * PAIR * M);
    return held;
}

// unit / per_block, for fewer than 2^16 units.
BOTH uint32_t block_of(const Signs& a, uint32_t unit) { return a.per_block == 1 ? unit : uint32_t(uint64_t(unit) * a.inverse >> 32); }
BOTH int64_t first_unit(const Signs& a, const Place& at) { return least(a.units, at.rank * a.share); }
BOTH int units_of(const Signs& a, const Place& at) { return int(least(a.units - first_unit(a, at), a.share)); }
BOTH int pairs_of(const Signs& a, const Place& at) { return int(least(a.group, (a.tiles + 1) / 2 - at.cluster * a.group)); }

template <int M>
BOTH void clear(const Signs& a, void* shared, int thread) {
    const Held<M> held = held_in<M>(a, shared);
    for (int64_t i = thread; i < a.share * M * 4; i += threads(M)) held.whole[i] = 0;
    for (int64_t i = thread; i < SLICES * a.group * PAIR * M; i += threads(M)) held.sums[i] = 0.0f;
    if (thread < M) held.largest[thread] = 0;
}

// Zero beyond the last column.
BOTH float input(const Signs& a, const Place& at, int m, int64_t column) {
    return column < a.given.k ? read_x(a.given, at.first_row + m, column) : 0.0f;
}

// Bits of the largest |x|, infinite and not a number above all.
template <int M>
BOTH void find_largest(const Signs& a, const Place& at, void* shared, int thread) {
    const int64_t first = first_unit(a, at) * UNIT, count = units_of(a, at) * UNIT;
    uint32_t most[M] = {};
    for (int64_t i = thread; i < count; i += threads(M)) {
        UNROLL for (int m = 0; m < M; m++) {
            const uint32_t bits = to_bits(input(a, at, m, first + i)) & 0x7fffffffu;
            most[m] = bits > most[m] ? bits : most[m];
        }
    }
    UNROLL for (int m = 0; m < M; m++) raise(held_in<M>(a, shared).largest + m, most[m]);
}

// The exponent e of the largest |x| < 2^(e - 126). Numbers too small to be told from zero beside one of 2^-97 are not.
BOTH int exponent(uint32_t largest) {
    const int e = int(largest >> 23);
    return e < 30 ? 30 : e;
}

// What a digit sum of 1 is worth: not a number if one of x is not finite.
BOTH float unit_of(uint32_t largest) { return exponent(largest) == 255 ? from_bits(0x7fc00000u) : from_bits(uint32_t(exponent(largest) - 29) << 23); }

BOTH int32_t rounded(float v) {
#if defined(__CUDA_ARCH__)
    return __float2int_rn(v);
#else
    return int32_t(__builtin_rintf(v));
#endif
}

// A thread makes the digits of four columns: a register of each of eight lanes.
template <int M>
BOTH void take_digits(const Signs& a, const Place& at, void* shared, int thread) {
    const Held<M> held = held_in<M>(a, shared);
    const int count = units_of(a, at) * UNIT / 4;
    for (int i = thread; i < count * M; i += threads(M)) {
        const int m = i / count, unit = i % count / 32, step = i % 32 / 8, lane = i % 8;
        const uint32_t largest = held.largest[m];
        const float by = exponent(largest) == 255 ? 0.0f : from_bits(uint32_t(283 - exponent(largest)) << 23);
        uint32_t digits[KINDS][DIGITS] = {};
        int32_t lower[KINDS] = {}, upper[KINDS] = {};
        UNROLL for (int b = 0; b < 4; b++) {
            const int64_t column = (first_unit(a, at) + unit) * UNIT + 8 * (4 * b + step) + lane;
            const float x = by == 0.0f ? 0.0f : input(a, at, m, column) * by;
            const int32_t whole = rounded(step % 2 == 0 ? x : 0.25f * x);
            const bool second = a.salient[column] != 0;
            int32_t left = whole, digit[DIGITS];
            UNROLL for (int d = 0; d < DIGITS; d++) {
                digit[d] = int8_t(left & 255);
                left = (left - digit[d]) >> 8;
            }
            const int32_t times = step % 2 == 0 ? 1 : 4;
            UNROLL for (int kind = 0; kind < KINDS; kind++) {
                const bool own = second == (kind == 1);
                UNROLL for (int d = 0; d < DIGITS; d++) digits[kind][d] |= own ? uint32_t(digit[d] & 255) << 8 * b : 0u;
                lower[kind] += own ? times * (digit[0] + 256 * digit[1]) : 0;
                upper[kind] += own ? times * (digit[2] + 256 * digit[3]) : 0;
            }
        }
        uint32_t* to = held.digits + ((unit * M + m) * STEPS + step) * 64 + lane % 2;
        UNROLL for (int kind = 0; kind < KINDS; kind++) {
            UNROLL for (int d = 0; d < DIGITS; d++) to[((kind * DIGITS + d) * 4 + lane / 2) * 2] = digits[kind][d];
            add(held.whole + (unit * M + m) * 4 + 2 * kind, lower[kind]);
            add(held.whole + (unit * M + m) * 4 + 2 * kind + 1, upper[kind]);
        }
    }
}

// Into the second-level cache: the words and tables of a slice's units of a pair.
BOTH void fetch_pair(const Signs& a, const Place& at, int pair, int slice, int lane) {
    if (pair >= pairs_of(a, at)) return;
    const int units = units_of(a, at);
    for (int i = lane; slice + i / 8 * SLICES < units; i += 32) {
        const int64_t tile = 2 * (at.cluster * a.group + pair) + i % 2, unit = first_unit(a, at) + slice + i / 8 * SLICES;
        if (tile >= a.tiles) continue;
        const uint32_t* words = a.words + (tile * a.units + unit) * 64 + i / 2 % 2 * 32;
        const float* tables = a.tables + (tile * a.blocks + block_of(a, uint32_t(unit))) * 64 + i / 2 % 2 * 32;
        fetch(i / 4 % 2 == 0 ? static_cast<const void*>(words) : static_cast<const void*>(tables));
    }
}

// c += a b, a 16 x 32 of unsigned bytes, b 32 x 8 of signed ones, as lanes hold them.
BOTH void multiply(int32_t (&c)[HELD][4], const uint32_t (&a)[HELD][4], const uint32_t (&b)[HELD][2]) {
#if defined(__CUDA_ARCH__)
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
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

// The sum over four neighbours.
BOTH void add_lanes(float (&v)[HELD]) {
#if defined(__CUDA_ARCH__)
    v[0] += __shfl_xor_sync(~0u, v[0], 1);
    v[0] += __shfl_xor_sync(~0u, v[0], 2);
#else
    for (int g = 0; g < HELD; g += 4) {
        const float sum = (v[g] + v[g + 1]) + (v[g + 2] + v[g + 3]);
        for (int t = 0; t < 4; t++) v[g + t] = sum;
    }
#endif
}

// Where a lane's part of the words and values of a pair begins, which it copies for its warp: half of the lanes have a tile.
struct Source {
    const uint32_t *words, *values;
};

BOTH Source source_of(const Signs& a, int64_t pair, int lane) {
    const int64_t tile = least(2 * pair + lane / 16, a.tiles - 1);  // the rows of a tile that is not there are not written
    const uint32_t* tables = reinterpret_cast<const uint32_t*>(a.tables);
    return {a.words + tile * a.units * 64 + lane % 16 * 4, tables + tile * a.blocks * 64 + lane % 16 * 4};
}

// A warp's slice of the units for its pairs one after another. Lane (g, t) has two words of row g and of row g + 8, and their values for
// its kind of column.
template <int M>
BOTH void sweep(const Signs& a, const Place& at, void* shared, int thread) {
    if (HELD > 1 && thread % 32 != 0) return;
    const Held<M> held = held_in<M>(a, shared);
    const int warp = warp_of(thread), slice = warp % SLICES, units = units_of(a, at), pairs = pairs_of(a, at);
    const int from = int(first_unit(a, at));
    if (slice >= units) return;
    int pair = warp / SLICES, unit = slice, next_pair = pair, next_unit = unit;
    uint32_t* places = held.places + warp * a.depth * PLACE;
    uint32_t turn = 0, next_turn = 0;
    Source source[HELD] = {};
    const auto load = [&]() {
        if (next_unit == slice) EACH_LANE source[h] = source_of(a, at.cluster * a.group + next_pair, LANE);
        if (next_pair < pairs) {
            EACH_LANE {
                uint32_t* to = places + next_turn * PLACE + LANE * 4;
                send<4>(to, source[h].words + uint32_t(from + next_unit) * 64);
                send<4>(to + PLACE / 2, source[h].values + block_of(a, uint32_t(from + next_unit)) * 64);
            }
        }
        sent();
        next_turn = (next_turn + 1) & uint32_t(a.depth - 1), next_unit += SLICES;
        if (next_unit >= units) next_unit = slice, next_pair += slots(M);
    };
    for (int i = 1; i < a.depth; i++) load();
    float total[M][2][HELD] = {};
    NO_UNROLL while (pair < pairs) {
        if (a.depth == 4) {
            arrived<2>();
        } else {
            arrived<0>();
        }
        barrier();  // for what the other lanes copied; and none still reads where the next goes
        load();

        // A lane's values as factors of nothing, bit 0, bit 1 (which stands where it counts twice) and both.
        float factor[2][4][HELD];
        uint32_t bits[STEPS][3][HELD][4];
        EACH_LANE {
            const uint32_t* place = places + turn * PLACE;
            UNROLL for (int i = 0; i < 2; i++) {
                const Four four = *reinterpret_cast<const Four*>(place + PLACE / 2 + i * 64 + LANE / 4 * 8 + LANE % 4 / 2 * 4);
                const float* v = four.v;
                factor[i][0][h] = v[0], factor[i][1][h] = v[1] - v[0], factor[i][2][h] = 0.5f * (v[2] - v[0]);
                factor[i][3][h] = (v[3] - v[2]) - (v[1] - v[0]);
                const auto two = *reinterpret_cast<const Line<2>*>(place + i * 64 + LANE * 2);
                UNROLL for (int j = 0; j < 2; j++) {
                    const uint32_t word = two.v[j], both = word & word >> 1;
                    UNROLL for (int s = 0; s < STEPS; s++) {
                        const uint32_t mask = 0x01010101u << s % 2 * 2, by = s < 2 ? 0 : 4;
                        bits[s][0][h][i + 2 * j] = word >> by & mask;  // row, then half of the matrix
                        bits[s][1][h][i + 2 * j] = word >> by & mask << 1;
                        bits[s][2][h][i + 2 * j] = both >> by & mask;
                    }
                }
            }
        }
        UNROLL for (int m = 0; m < M; m++) {
            int32_t sum[3][HELD][4] = {};
            UNROLL for (int s = 0; s < STEPS; s++) {
                uint32_t digits[HELD][2];
                EACH_LANE {
                    const int lane = LANE;
                    const uint32_t* two = held.digits + ((unit * M + m) * STEPS + s) * 64 + 2 * lane;
                    digits[h][0] = two[0], digits[h][1] = two[1];
                }
                UNROLL for (int p = 0; p < 3; p++) multiply(sum[p], bits[s][p], digits);
            }
            EACH_LANE {
                const int lane = LANE;
                const float whole = float(held.whole[(unit * M + m) * 4 + lane % 4]);
                UNROLL for (int i = 0; i < 2; i++) {
                    float v = total[m][i][h] + factor[i][0][h] * whole;
                    UNROLL for (int p = 0; p < 3; p++) v += factor[i][1 + p][h] * float(sum[p][h][2 * i] + 256 * sum[p][h][2 * i + 1]);
                    total[m][i][h] = v;
                }
            }
        }
        turn = (turn + 1) & uint32_t(a.depth - 1), unit += SLICES;
        if (unit < units) continue;
        UNROLL for (int m = 0; m < M; m++) {
            UNROLL for (int i = 0; i < 2; i++) {
                float sum[HELD];
                EACH_LANE sum[h] = total[m][i][h] * ((HELD == 1 ? thread : h) % 2 == 0 ? 1.0f : 65536.0f) * unit_of(held.largest[m]);
                add_lanes(sum);
                EACH_LANE {
                    const int lane = LANE;
                    const int64_t row = pair * PAIR + i * TILE + lane / 4;
                    if (lane % 4 == 0) held.sums[(slice * a.group * PAIR + row) * M + m] = sum[h];
                    total[m][i][h] = 0.0f;
                }
            }
        }
        unit = slice, pair += slots(M);
    }
}

// The slices' sums become the first slice's.
template <int M>
BOTH void gather(const Signs& a, void* shared, int thread) {
    float* sums = held_in<M>(a, shared).sums;
    const int64_t own = a.group * PAIR * M;
    for (int64_t i = thread; i < own; i += threads(M)) sums[i] = ((sums[i] + sums[own + i]) + sums[2 * own + i]) + sums[3 * own + i];
}

// shared_of(rank): the shared memory of each block of the cluster.
template <int M, class SharedOf>
BOTH void finish(const Signs& a, const Place& at, const SharedOf& shared_of, int thread) {
    const int64_t all = a.group * PAIR, own = (all + at.ranks - 1) / at.ranks;
    for (int64_t i = thread; i < own * M; i += threads(M)) {
        const int64_t place = at.rank * own + i / M, row = at.cluster * all + place, to = at.first_row + i % M;
        if (place >= all || row >= a.rows || to >= a.given.count) continue;
        float v = 0.0f;
        for (int r = 0; r < at.ranks; r++) v += held_in<M>(a, shared_of(r)).sums[place * M + i % M];
        write(a.out, to * a.rows + row, v, a.given.bfloat16);
    }
}

// `each(phase)`: every thread of a block does `phase(thread)`, then a barrier. `previous()` waits for kernels that may still write what is
// read after it.
template <int M, class Previous, class Each>
BOTH void add_units(const Signs& a, const Place& at, void* shared, const Previous& previous, const Each& each) {
    each([&](int thread) {
        for (int i = 0; i < 16 / slots(M); i++) fetch_pair(a, at, thread / (32 * SLICES) + i * slots(M), thread / 32 % SLICES, thread % 32);
        clear<M>(a, shared, thread);
    });
    previous();
    each([&](int thread) { find_largest<M>(a, at, shared, thread); });
    each([&](int thread) { take_digits<M>(a, at, shared, thread); });
    each([&](int thread) { sweep<M>(a, at, shared, thread); });
    each([&](int thread) { gather<M>(a, shared, thread); });
}

// Pairs of a cluster, so that clusters come in whole waves of at most `at_once`; units of a rank.
inline void plan(Signs& a, int64_t at_once, int64_t ranks) {
    const int64_t pairs = (a.tiles + 1) / 2, waves = (pairs + at_once * MOST_PAIRS - 1) / (at_once * MOST_PAIRS);
    a.group = (pairs + at_once * waves - 1) / (at_once * waves);
    a.share = (a.units + ranks - 1) / ranks;
    a.depth = ranks > 1 ? 4 : 2;  // a block that stands alone needs shared memory for all units
}

// Rows of x at a time; 0 if not even one fits.
inline int rows_at_a_time(const Signs& a, int64_t limit) {
    int rows = a.given.count > 2 ? 4 : int(a.given.count);
    while (rows > 0 && shared_bytes(rows, a.share, a.group, a.depth) > limit) rows /= 2;
    return rows;
}

inline Signs signs_of(const uint32_t* words, const float* tables, const int32_t* salient, const void* x, const float* scale, void* out, int64_t rows,
                      int64_t k, int64_t block, int64_t count, bool bfloat16) {
    Signs a = {};
    a.words = words, a.tables = tables, a.salient = salient, a.given = {x, scale, k, count, bfloat16}, a.out = out, a.rows = rows;
    a.tiles = (rows + TILE - 1) / TILE, a.units = (k + UNIT - 1) / UNIT, a.blocks = (k + block - 1) / block, a.block = block;
    a.per_block = uint32_t(block / UNIT), a.inverse = a.per_block < 2 ? 0 : uint32_t(((uint64_t(1) << 32) + a.per_block - 1) / a.per_block);
    return a;
}

}  // namespace
