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

#include <algorithm>

#include "lut_strips.h"

namespace {

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
        fetch_tables<F>(part, first, count, thread);
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
    a.group = group_of(a.tiles, at_once), a.depth = limit >= 160 * 1024 ? DEPTH : 2;
    // The same however many rows x has: a row's sum depends on it.
    for (int p = 0; p < a.parts; p++) {
        const int bits = a.part[p].bits;
        const auto one = bfloat16 ? columns_held<Form<1, 2>> : columns_held<Form<1, 3>>;
        const auto two = bfloat16 ? columns_held<Form<2, 2>> : columns_held<Form<2, 3>>;
        const int64_t most = std::min(one(limit, a.group, a.depth, bits), two(limit, a.group, a.depth, bits)), strip = UNIT * span(bits);
        a.part[p].held = std::min(most, MOST_COLUMNS) / strip * strip;
    }
    return a;
}

}  // namespace
