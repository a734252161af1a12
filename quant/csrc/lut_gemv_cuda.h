// A product with a table of values for each column, for a GPU: see lut_gemv.cu, which runs these phases with barriers between them.
//
// Numbers. A table of a column, whose largest value W is in [2^E, 2^(E+1)), is kept as digits of R = 2^8 (codes of 4 bits: 2^7), one byte
// of each value in each of P planes: value = 2^(E - 6) (h0 - 128 + h1 / R + h2 / R²), with 5 and 64 for R = 2^7. So they are off by
// W 2^-15 (W 2^-13) at most with two planes, and W 2^-23 (W 2^-20) with three; not at all, with two, where they are float16 and W / 16
// (W / 4) or more. x times 2^E has four signed digits p0 to p3: whole steps of 2^-29 (2^-25) of X, the largest of a block's share of
// columns. A product of digits h_i and p_j counts as R^-(i + j); those with i = 0 or j < 2 are added up, as integers, in any order to the
// same bits. The others of a column make up less than X 2^-19 (X 2^-16).
//
// Tensor cores. An operand of 16 x 32 bytes is 64 rows of the weight by 8 columns: four bytes of a lane's register are a column's digits in
// four rows, as PRMT finds them in the column's table, which a lane keeps in registers. The other operand has a digit of x at row slot j of
// output column j and a second one at slot j of output column j + 4, and zeros.
//
// A cluster of `ranks` blocks has a group of tiles of 64 rows; each block has a share of the columns, of every part. A warp takes a strip of
// columns for tile after tile; its codes are copied to shared memory well ahead of their use.

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
constexpr int EARLY_ITEMS = 8;
constexpr int HEAD = 128;                         // bytes: the largest x and sums of digits of each row of x

constexpr int SLOT = 1536;                        // bytes of the codes of a strip's tile

// Rows of x at a time, and planes of tables: two where x is bfloat16, three where it is float32.
template <int ROWS_OF_X, int PLANES>
struct Form {
    static constexpr int M = ROWS_OF_X, P = PLANES;
    static constexpr int WARPS = M == 1 && P == 2 ? 12 : 8, THREADS = 32 * WARPS;
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
    int depth;                // places of a warp's ring: 2 or 4
    int early;                // items that a warp fetches into the second-level cache before anything else
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

// Tables' digits, from `first` on of columns that are taken. To `x`, for the first row: 2^E.
template <class F, int BITS>
BOTH void take_tables(const Lut& a, const Part& part, int first, int count, void* shared, int given) {
    const int thread = anew(given);
    constexpr int SIZE = 1 << BITS, R = radix_bits(BITS), TOP = value_bits(BITS, F::P), MIDDLE = 1 << (TOP + 1);
    constexpr int BATCH = 32 / SIZE;  // columns whose values are under way together
    const Shared<F> s(a, part.held, shared);
    const int own = int(least(count * UNIT, part.count - int64_t(first) * UNIT));
    NO_UNROLL for (int begin = thread; begin < own; begin += BATCH * F::THREADS) {
        Four v[BATCH][SIZE / 4];
        UNROLL for (int b = 0; b < BATCH; b++) {
            const int i = begin + b * F::THREADS;
            const Four* from = reinterpret_cast<const Four*>(part.values + ((int64_t(first) * UNIT + (i < own ? i : begin)) << BITS));
            UNROLL for (int e = 0; e < SIZE / 4; e++) v[b][e] = from[e];
        }
        UNROLL for (int b = 0; b < BATCH; b++) {
            const int i = begin + b * F::THREADS;
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
            if (i >= own) break;
            UNROLL for (int p = 0; p < F::P; p++) {
                Line<SIZE / 4> line;
                UNROLL for (int j = 0; j < SIZE / 4; j++) line.v[j] = bytes[p][j];
                *reinterpret_cast<Line<SIZE / 4>*>(s.tables + ((p * s.held + i) << BITS)) = line;
            }
            s.x[i] = to_bits(exponent > 127 ? from_bits(0x7f800000u) : power(exponent));
        }
    }
}

// x times 2^E of the same columns, and the largest. Zeros beyond the last.
template <class F>
BOTH void take_inputs(const Lut& a, const Place& at, const Part& part, int first, int count, void* shared, int given) {
    const int thread = anew(given);
    constexpr int BATCH = 6;  // columns that are under way together
    const Shared<F> s(a, part.held, shared);
    const int strip = UNIT * span(part.bits), made = (count * UNIT + strip - 1) / strip * strip;
    const int own = int(least(count * UNIT, part.count - int64_t(first) * UNIT));
    uint32_t most[F::M] = {};
    NO_UNROLL for (int begin = thread; begin < made; begin += BATCH * F::THREADS) {
        int64_t column[BATCH];
        float x[F::M][BATCH], scale[BATCH];
        UNROLL for (int b = 0; b < BATCH; b++) {
            const int i = begin + b * F::THREADS;
            column[b] = i < own ? part.columns[int64_t(first) * UNIT + i] : -1;
        }
        UNROLL for (int b = 0; b < BATCH; b++) {
            UNROLL for (int m = 0; m < F::M; m++) x[m][b] = column[b] < 0 ? 0.f : stored_x<F>(a.given, at.first_row + m, column[b]);
            scale[b] = column[b] < 0 || a.given.scale == nullptr ? 1.f : a.given.scale[column[b]];
        }
        UNROLL for (int b = 0; b < BATCH; b++) {
            const int i = begin + b * F::THREADS;
            if (i >= made) break;
            const float size = i < own ? from_bits(s.x[i]) : 1.f;
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

// What four codes of a column, the lowest nibbles of `selector`, stand for. changed: the same, the highest bit of each changed, of 4 bits.
template <int BITS>
BOTH uint32_t decode(const uint32_t (&table)[1 << (BITS - 2)], uint32_t selector, uint32_t changed) {
    if constexpr (BITS == 2) return permute(table[0], table[0], selector);
    if constexpr (BITS == 3) return permute(table[0], table[1], selector);
    // A byte below 128 that is not meant is filled with its sign: zero.
    if constexpr (BITS == 4) return permute(table[0], table[1], selector) + permute(table[2], table[3], changed);
}

// Selectors [group of 8, column of 2], the codes of rows g in the lower half and of rows g + 8 in the upper one.
template <int BITS>
BOTH void select(uint32_t (&made)[GROUPS][2], const uint32_t (&w)[2 * BITS]) {
    UNROLL for (int i = 0; i < GROUPS; i++) {
        if constexpr (BITS == 2) made[i][0] = w[i] & 0x33333333u, made[i][1] = w[i] >> 2 & 0x33333333u;
        if constexpr (BITS == 4) made[i][0] = w[2 * i], made[i][1] = w[2 * i + 1];
        if constexpr (BITS == 3) {
            const uint32_t* v = w + i / 2 * 3;
            if (i % 2 == 0) {
                made[i][0] = v[0] & 0x77777777u, made[i][1] = v[1] & 0x77777777u;
            } else {
                made[i][0] = v[2] & 0x77777777u;
                made[i][1] = (v[0] >> 3 & 0x11111111u) | (v[1] >> 2 & 0x22222222u) | (v[2] >> 1 & 0x44444444u);
            }
        }
    }
}

// A warp's tables and digits of a strip.
template <class F, int BITS>
struct Strip {
    static constexpr int ALL = GROUPS * span(BITS), WORDS = 1 << (BITS - 2);
    uint32_t table[ALL][2][HELD][F::P][WORDS];
    uint32_t x[F::M][ALL][2][HELD][2];  // of two digits each

    BOTH void load(const Shared<F>& s, int strip, int thread) {
        UNROLL for (int i = 0; i < ALL; i++) {
            UNROLL for (int c = 0; c < 2; c++) {
                EACH_LANE {
                    const int column = (strip * ALL + i) * 8 + c * 4 + LANE % 4, slot = LANE / 4 % 4, second = LANE / 16;
                    UNROLL for (int p = 0; p < F::P; p++) {
                        const auto line = *reinterpret_cast<const Line<WORDS>*>(s.tables + ((p * s.held + column) << BITS));
                        UNROLL for (int j = 0; j < WORDS; j++) table[i][c][h][p][j] = line.v[j];
                    }
                    UNROLL for (int m = 0; m < F::M; m++) {
                        const uint32_t digits = s.x[m * s.held + column], none = 0x4444u & ~(15u << 4 * slot);
                        UNROLL for (int d = 0; d < 2; d++) x[m][i][d][h][c] = permute(digits, 0u, none | uint32_t(2 * d + second) << 4 * slot);
                    }
                }
            }
        }
    }
};

// The columns of units `first` and on, of which tables are at hand, with all tiles: a warp has a run of (strip, tile) in that order.
template <class F, int BITS>
struct Sweep {
    static constexpr int SPAN = span(BITS), R = radix_bits(BITS);
    const Lut& a;
    const Part& part;
    Shared<F> s;
    int thread, tiles, units, depth;
    int todo, tile, strip, place;         // items to be done, and the next one; where that is in the ring
    int left, ahead_tile, ahead_strip;    // the same of those to be fetched, into the place before
    int second;                         // words from its first unit to the second
    int tile_words;                     // from a tile to the next
    const uint32_t* from;               // codes of the next item
    uint32_t* ring;

    BOTH Sweep(const Lut& lut, const Place& at, const Part& of, int first, int count, void* shared, int given)
        : a(lut), part(of), s(lut, of.held, shared), thread(anew(given)), tiles(int(tiles_of(lut, at))), units(count), depth(lut.depth) {
        const int warp = warp_of(thread), items = (units + SPAN - 1) / SPAN * tiles;
        const int item = items * warp / F::WARPS;
        todo = left = items * (warp + 1) / F::WARPS - item;
        strip = ahead_strip = item / tiles, tile = ahead_tile = item % tiles, place = 0;
        tile_words = int(part.units) * (64 * BITS);
        from = part.words + (at.cluster * a.group + tile) * tile_words + (first + int64_t(strip) * SPAN) * (64 * BITS);
        ring = s.rings + warp * depth * (SLOT / 4);
        enter();
    }

    // A unit that there is not is the one before, for which x has zeros.
    BOTH void enter() { second = ahead_strip * SPAN + 1 < units ? 64 * BITS : 0; }

    BOTH void fetch_next(int to_place) {
        if (left > 0) {
            uint32_t* const to = ring + to_place * (SLOT / 4);
            UNROLL for (int u = 0; u < SPAN; u++) {
                EACH_LANE {
                    const uint32_t* own = from + u * second + LANE * 4;
                    uint32_t* const there = to + u * 64 * BITS + LANE * 4;
                    UNROLL for (int c = 0; c < BITS / 2; c++) send_words<4>(there + c * 128, own + c * 128);
                    if constexpr (BITS == 3) send_words<2>(there + 128 - LANE * 2, own + 128 - LANE * 2);
                }
            }
        }
        sent();
        turn();
    }
    BOTH void turn() {
        left--, from += tile_words;
        if (++ahead_tile == tiles) ahead_tile = 0, ahead_strip++, from += SPAN * 64 * BITS - int64_t(tiles) * tile_words, enter();
    }

    // Fetches what the ring has place for but for one, and what comes next into the second-level cache; or counts the former as done.
    BOTH void open() {
        if (HELD > 1 && thread % 32 != 0) return;
        for (int i = 1; i < depth; i++) fetch_next(i - 1);
        for (int i = 0; i < a.early && left > 0; i++, turn()) {
            EACH_LANE if (LANE < SPAN * 2 * BITS) fetch(from + LANE / (2 * BITS) * second + LANE % (2 * BITS) * 32);
        }
    }
    BOTH void opened() {
        for (int i = 1; i < depth; i++) turn();
    }

    BOTH void wait() const {
        if (depth == 4) {
            arrived<2>();
        } else {
            arrived<0>();
        }
    }

    BOTH void run() {
        if (HELD > 1 && thread % 32 != 0) return;
        NO_UNROLL while (todo > 0) {
            Strip<F, BITS> t;
            t.load(s, strip, thread);
            const int stop = todo < tiles - tile ? tile + todo : tiles;
            todo -= stop - tile;
            NO_UNROLL for (; tile < stop; tile++) {
                wait();
                add_tile(t);
                place = place + 1 & depth - 1;
            }
            tile = 0, strip++;
        }
    }

    BOTH void add_tile(const Strip<F, BITS>& t) {
        int32_t sum[F::M][3][HELD][4] = {};
        UNROLL for (int u = 0; u < SPAN; u++) {
            uint32_t selectors[HELD][GROUPS][2];
            EACH_LANE {
                const uint32_t* from = ring + place * (SLOT / 4) + u * 64 * BITS;
                uint32_t w[2 * BITS];
                UNROLL for (int c = 0; c < BITS / 2; c++) {
                    const auto line = *reinterpret_cast<const Line<4>*>(from + c * 128 + LANE * 4);
                    UNROLL for (int j = 0; j < 4; j++) w[4 * c + j] = line.v[j];
                }
                if constexpr (BITS == 3) {
                    const auto line = *reinterpret_cast<const Line<2>*>(from + 128 + LANE * 2);
                    w[4] = line.v[0], w[5] = line.v[1];
                }
                select<BITS>(selectors[h], w);
            }
            if (u == SPAN - 1) fetch_next(place + depth - 1 & depth - 1);  // that place was read a turn ago
            UNROLL for (int i = 0; i < GROUPS; i++) multiply(t, sum, selectors, u * GROUPS + i, i);
        }
        put(sum);
    }

    // A group's 64 rows by 8 columns with all rows of x.
    BOTH void multiply(const Strip<F, BITS>& t, int32_t (&sum)[F::M][3][HELD][4], const uint32_t (&selectors)[HELD][GROUPS][2], int of, int i) {
        uint32_t operand[F::P][HELD][4];
        EACH_LANE {
            UNROLL for (int c = 0; c < 2; c++) {
                const uint32_t low = selectors[h][i][c], high = upper_half<BITS>(low);
                const uint32_t changed = BITS == 4 ? low ^ 0x88888888u : 0u;
                const uint32_t changed_high = BITS == 4 ? changed >> 16 : 0u;
                UNROLL for (int p = 0; p < F::P; p++) {
                    operand[p][h][2 * c] = decode<BITS>(t.table[of][c][h][p], low, changed);
                    operand[p][h][2 * c + 1] = decode<BITS>(t.table[of][c][h][p], high, changed_high);
                }
            }
        }
        UNROLL for (int m = 0; m < F::M; m++) {
            multiply_bytes(sum[m][0], operand[0], t.x[m][of][0]);
            multiply_bytes(sum[m][1], operand[1], t.x[m][of][0]);
            multiply_bytes(sum[m][2], operand[0], t.x[m][of][1]);
            if constexpr (F::P == 3) multiply_bytes(sum[m][2], operand[2], t.x[m][of][0]);
        }
    }

    BOTH void put(const int32_t (&sum)[F::M][3][HELD][4]) {
        UNROLL for (int m = 0; m < F::M; m++) {
            int32_t* to = s.whole + (m * a.group + tile) * 256;
            UNROLL for (int i = 0; i < 4; i++) {
                EACH_LANE {
                    add(to + i * 32 + LANE, sum[m][0][h][i]);
                    add(to + 128 + i * 32 + LANE, ((sum[m][1][h][i] << R) + sum[m][2][h][i]) >> cut_bits(BITS));
                }
            }
        }
    }
};

// Integers as numbers, and no more of what was added to the first digit of all values.
template <class F>
BOTH void collect(const Lut& a, const Place& at, const Part& part, void* shared, int thread) {
    const Shared<F> s(a, part.held, shared);
    const int r = radix_bits(part.bits), tiles = int(tiles_of(a, at)), middle = 1 << (r - 1);
    const float down = power(-r), down2 = power(-2 * r);
    UNROLL for (int m = 0; m < F::M; m++) {
        const uint32_t largest = s.largest[m];
        const int unit = exponent_of(largest) + 5 - 2 * r;  // of the first digits' products, in powers of two
        const int32_t* totals = s.totals + m * DIGITS;
        for (int i = thread; i < tiles * TILE; i += F::THREADS) {
            const int32_t* whole = s.whole + (m * a.group + i / TILE) * 256;
            const int row = i % TILE / 4, column = i % 4;
            float v[2];
            UNROLL for (int half = 0; half < 2; half++) {
                const int n = column + 4 * half, from = (row / 8 * 2 + n % 2) * 32 + row % 8 * 4 + n / 2;
                const float lesser = float(whole[128 + from]) * float(1 << cut_bits(part.bits)) - float(middle * totals[2 + half]);
                v[half] = fused(lesser, down2, float(whole[from] - middle * totals[half]));
            }
            float& to = s.sums[m * a.group * TILE + i];
            to += finite(largest) ? scaled(fused(v[1], down, v[0]), unit) : from_bits(0x7fc00000u);
        }
    }
}

// Rows of a group that a block finishes.
BOTH int64_t finished_by(const Lut& a, int ranks) { return (a.group * TILE + ranks - 1) / ranks; }

// What the kept weights of these rows give, in `HELPERS` parts: where integers, rings and tables were.
template <class F>
BOTH void gather(const Lut& a, const Place& at, void* shared, int thread) {
    if (a.starts == nullptr) return;
    const int64_t own = finished_by(a, at.ranks);
    float* to = reinterpret_cast<float*>(Shared<F>(a, 0, shared).whole);
    for (int64_t i = thread; i < own * HELPERS; i += F::THREADS) {
        const int64_t row = at.cluster * a.group * TILE + at.rank * own + i / HELPERS;
        float v[F::M] = {};
        if (row < a.rows) {
            for (int64_t e = a.starts[row] + i % HELPERS; e < a.starts[row + 1]; e += HELPERS) {
                UNROLL for (int m = 0; m < F::M; m++) v[m] += a.differences[e] * read_x(a.given, at.first_row + m, a.kept[e]);
            }
        }
        UNROLL for (int m = 0; m < F::M; m++) to[i * F::M + m] = v[m];
    }
}

// shared_of(rank): the shared memory of each block of the cluster.
template <class F, class SharedOf>
BOTH void finish(const Lut& a, const Place& at, void* shared, const SharedOf& shared_of, int thread) {
    const int64_t own = finished_by(a, at.ranks), base = at.cluster * a.group * TILE;
    const float* kept = reinterpret_cast<const float*>(Shared<F>(a, 0, shared).whole);
    for (int64_t i = thread; i < own; i += F::THREADS) {
        const int64_t place = at.rank * own + i, row = base + place;
        if (place >= a.group * TILE || row >= a.rows) continue;
        for (int m = 0; m < F::M; m++) {
            const int64_t to = at.first_row + m;
            if (to >= a.given.count) break;
            float v = 0.f;
            UNROLL_BY(8) for (int r = 0; r < at.ranks; r++) v += Shared<F>(a, 0, shared_of(r)).sums[m * a.group * TILE + place];
            if (a.starts != nullptr) {
                for (int h = 0; h < HELPERS; h++) v += kept[(i * HELPERS + h) * F::M + m];
            }
            write(a.out, to * a.rows + row, v, a.given.bfloat16);
        }
    }
}

// A part's units from `first` on: one turn. `previous()`: see below; `early`: nothing was waited for yet.
template <class F, int BITS, class Previous, class Each>
BOTH void add_turn(const Lut& a, const Place& at, const Part& part, int first, int count, bool early, void* shared,
                   const Previous& previous, const Each& each) {
    each([&](int thread) {
        Sweep<F, BITS>(a, at, part, first, count, shared, thread).open();
        clear<F>(a, at, early, shared, thread);
        take_tables<F, BITS>(a, part, first, count, shared, thread);
    });
    if (early) previous();
    each([&](int thread) { take_inputs<F>(a, at, part, first, count, shared, thread); });
    each([&](int thread) { take_digits<F>(a, part, count, shared, thread); });
    each([&](int thread) {
        Sweep<F, BITS> sweep(a, at, part, first, count, shared, thread);
        sweep.opened();
        sweep.run();
    });
    each([&](int thread) { collect<F>(a, at, part, shared, thread); });
}

// `each(phase)`: every thread of a block does `phase(thread)`, then a barrier. `previous()` waits for kernels that may still write what is
// read after it. The first part has a turn in any block, be it without columns.
template <class F, class Previous, class Each>
BOTH void add_parts(const Lut& a, const Place& at, void* shared, const Previous& previous, const Each& each) {
    NO_UNROLL for (int p = 0; p < a.parts; p++) {
        const Part& part = a.part[p];
        const int own = int(share(part, at.ranks)), begin = int(least(part.units, at.rank * own)), end = int(least(part.units, begin + own));
        NO_UNROLL for (int first = begin; first < end || (p == 0 && first == begin); first += int(part.held / UNIT)) {
            const int count = int(least(part.held / UNIT, end - first));
            const bool early = p == 0 && first == begin;
            if (part.bits == 2) add_turn<F, 2>(a, at, part, first, count, early, shared, previous, each);
            if (part.bits == 3) add_turn<F, 3>(a, at, part, first, count, early, shared, previous, each);
            if (part.bits == 4) add_turn<F, 4>(a, at, part, first, count, early, shared, previous, each);
        }
    }
    each([&](int thread) { gather<F>(a, at, shared, thread); });
}

// Part from five numbers: addresses of words, values and columns, columns, bits.
inline Part part_of(const int64_t* v) {
    Part p = {};
    p.words = reinterpret_cast<const uint32_t*>(v[0]), p.values = reinterpret_cast<const float*>(v[1]);
    p.columns = reinterpret_cast<const int64_t*>(v[2]), p.count = v[3], p.bits = int(v[4]);
    p.units = (p.count + UNIT - 1) / UNIT;
    return p;
}

// Tiles of a cluster, so that clusters come in whole waves of at most `at_once`.
inline int64_t group_of(int64_t tiles, int64_t at_once) {
    const int64_t waves = (tiles + at_once * MOST_TILES - 1) / (at_once * MOST_TILES);
    return (tiles + at_once * waves - 1) / (at_once * waves);
}

// Columns at a time that `bytes` of shared memory have place for, beside what is fixed.
template <class F>
int64_t columns_held(int64_t bytes, int64_t group, int depth, int bits) {
    return (bytes - fixed_bytes<F>(group, depth)) / (4 * F::M + (int64_t(F::P) << bits));
}

// Everything but the launch: parts come as five numbers each. limit: bytes of shared memory that a block may have.
inline Lut lut_of(const int64_t* parts, int64_t count, const int64_t* kept, const void* x, const float* scale, void* out, int64_t rows,
                  int64_t k, int64_t rows_of_x, bool bfloat16, int64_t at_once, int64_t limit) {
    Lut a = {};
    a.parts = int(count);
    for (int p = 0; p < a.parts; p++) a.part[p] = part_of(parts + 5 * p);
    a.starts = reinterpret_cast<const int64_t*>(kept[0]), a.kept = reinterpret_cast<const int32_t*>(kept[1]);
    a.differences = reinterpret_cast<const float*>(kept[2]);
    a.given = {x, scale, k, rows_of_x, bfloat16};
    a.out = out, a.rows = rows, a.tiles = (rows + TILE - 1) / TILE;
    a.group = group_of(a.tiles, at_once), a.depth = limit >= 160 * 1024 ? 4 : 2, a.early = EARLY_ITEMS;
    // The same however many rows x has: a row's sum depends on it.
    for (int p = 0; p < a.parts; p++) {
        const int bits = a.part[p].bits;
        const int64_t one = bfloat16 ? columns_held<Form<1, 2>>(limit, a.group, a.depth, bits) : columns_held<Form<1, 3>>(limit, a.group, a.depth, bits);
        const int64_t two = bfloat16 ? columns_held<Form<2, 2>>(limit, a.group, a.depth, bits) : columns_held<Form<2, 3>>(limit, a.group, a.depth, bits);
        const int64_t most = one < two ? one : two, strip = UNIT * span(bits);
        a.part[p].held = (most < MOST_COLUMNS ? most : MOST_COLUMNS) / strip * strip;
    }
    return a;
}

}  // namespace
