// A product with a table of values for each column, for a GPU: see lut_gemv.cu, which runs these phases with barriers between them.
//
// Numbers. A table's value is its first one less twice the sum of `terms` of those subsets of the code's bits whose parity is odd:
// value[c] = value[0] - 2 sum of t_S over S with popcount(S & c) odd, where t_S = 2^-bits sum over c of (-1)^popcount(S & c) value[c]; none
// is larger than the largest value. x value[0] and x t_S are rounded to whole numbers of 2^-22 (float32: 2^-30) times the power of two
// above X, the largest of a block's share of columns. A share's sum of whole numbers is exact and rounded once. A column is off by
// 2^(bits - 1) + 1/2 steps at most: X 2^-19.6, 2^-18.8 and 2^-17.9 with 2, 3 and 4 bits (float32: 2^8 less). Terms are float32's nearest,
// which is 2^(bits - 24) of the column's largest value at most.
//
// Tensor cores. Parities of 256 columns of 16 rows are an operand of 16 x 256 bits, from words of the codes' bits with one exclusive or of
// each; the other operand is 8 bits of each whole number, those of x times a subset's terms. Nothing is looked up. What is counted for a
// bit, over all subsets and columns, counts 2^bit, the highest as a sign; of three bytes the other 23 are those of a number plus 2^22, and
// the highest is a one of all, which counts -2^22.
//
// A cluster of `ranks` blocks has a group of tiles of 32 rows; each block has a share of the columns, of every part. A warp takes a tile's
// units of 256 columns, tile after tile; its codes are copied to shared memory well ahead of their use.

#pragma once

#include <algorithm>

#include "lut_strips.h"

namespace {

// Integers as numbers.
template <class F>
BOTH void collect(const Lut& a, const Place& at, const Part& part, void* shared, int thread) {
    const Shared<F> s(a, part.held, shared);
    const int rows = int(tiles_of(a, at)) * TILE;
    UNROLL for (int m = 0; m < F::M; m++) {
        const uint32_t largest = s.largest[m];
        const int64_t first = s.totals[2 * m] + int64_t(s.totals[2 * m + 1]) * 32768;
        for (int i = thread; i < rows; i += F::THREADS) {
            int64_t odd = 0;
            UNROLL for (int p = 0; p < F::P; p++) odd += int64_t(s.whole[(m * F::P + p) * (a.group * TILE) + i]) * (1 << 8 * p);
            s.sums[m * a.group * TILE + i] += finite(largest) ? scaled(float(first - 2 * odd), -steps<F>(largest)) : from_bits(0x7fc00000u);
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

// A part. `previous()`: see below; `early`: nothing was waited for yet. A block without columns of it has a turn of none.
template <class F, int BITS, class Previous, class Each>
BOTH void add_part(const Lut& a, const Place& at, const Part& part, bool early, void* shared, const Previous& previous, const Each& each) {
    const int own = int(share(part, at.ranks)), begin = int(least(part.units, at.rank * own));
    const int all = int(least(part.units, begin + own)) - begin;
    const int turns = all > 0 ? (all + int(part.held) - 1) / int(part.held) : 1, held = (all + turns - 1) / turns;
    each([&](int thread) {
        fetch_tables<F>(a, part, begin, all, thread);
        Sweep<F, BITS>(a, at, part, begin, int(least(held, all)), shared, thread).open();
        clear<F>(a, early, shared, thread);
    });
    if (early) previous();
    each([&](int thread) { take_inputs<F>(a, at, part, begin, all, held, true, shared, thread); });
    int done = 0;
    do {
        const int first = begin + done, count = int(least(held, all - done)), next = int(least(held, all - done - count));
        each([&](int thread) {
            if (done > 0) Sweep<F, BITS>(a, at, part, first, count, shared, thread).open();
            take_bits<F, BITS>(a, part, first, count, shared, thread);
        });
        each([&](int thread) {
            Sweep<F, BITS> sweep(a, at, part, first, count, shared, thread);
            sweep.opened();
            sweep.run();
            if (next > 0) take_inputs<F>(a, at, part, first + count, next, next, false, shared, thread);
        });
        done += count;
    } while (done < all);
    each([&](int thread) { collect<F>(a, at, part, shared, thread); });
}

// `each(phase)`: every thread of a block does `phase(thread)`, then a barrier. `previous()` waits for kernels that may still write what is
// read after it.
template <class F, class Previous, class Each>
BOTH void add_parts(const Lut& a, const Place& at, void* shared, const Previous& previous, const Each& each) {
    NO_UNROLL for (int p = 0; p < a.parts; p++) {
        const Part& part = a.part[p];
        if (part.bits == 2) add_part<F, 2>(a, at, part, p == 0, shared, previous, each);
        if (part.bits == 3) add_part<F, 3>(a, at, part, p == 0, shared, previous, each);
        if (part.bits == 4) add_part<F, 4>(a, at, part, p == 0, shared, previous, each);
    }
    each([&](int thread) { gather<F>(a, at, shared, thread); });
}

// Part from five numbers: addresses of words, values and columns, columns, bits.
inline Part part_of(const int64_t* v) {
    Part p = {};
    p.words = reinterpret_cast<const uint32_t*>(v[0]), p.values = reinterpret_cast<const float*>(v[1]);
    p.columns = reinterpret_cast<const int64_t*>(v[2]), p.count = v[3], p.bits = int(v[4]);
    p.units = (p.count + UNIT - 1) / UNIT;
    p.terms = p.values + (p.count << p.bits), p.firsts = p.terms + p.units * UNIT * parities(p.bits);
    return p;
}

// Tiles of a cluster, so that clusters come in whole waves of at most `at_once`.
inline int64_t group_of(int64_t tiles, int64_t at_once) {
    const int64_t waves = (tiles + at_once * MOST_TILES - 1) / (at_once * MOST_TILES);
    return (tiles + at_once * waves - 1) / (at_once * waves);
}

// Units at a time that a block has place for, of every part; none: this form is not for it.
template <class F>
bool place_units(Lut& a, int64_t limit) {
    bool placed = true;
    for (int p = 0; p < a.parts; p++) {
        a.part[p].held = std::max<int64_t>((limit - fixed_bytes<F>(a.group, a.ring)) / unit_bytes<F>(a.part[p].bits), 0);
        placed = placed && a.part[p].held > 0;
    }
    return placed;
}

// Rows of x at a time: as many as there are, of those that a block has place for. Codes of 4 bits have so many parities that four rows
// would take twice as many turns.
inline int rows_at_once(Lut& a, int64_t limit) {
    bool wide = false;
    for (int p = 0; p < a.parts; p++) wide = wide || a.part[p].bits == 4;
    const bool half = a.given.bfloat16;
    if (half && !wide && a.given.count > 2 && place_units<Form<4, 3>>(a, limit)) return 4;
    if (a.given.count > 1 && (half ? place_units<Form<2, 3>>(a, limit) : place_units<Form<2, 4>>(a, limit))) return 2;
    return (half ? place_units<Form<1, 3>>(a, limit) : place_units<Form<1, 4>>(a, limit)) ? 1 : 0;
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
    a.group = group_of(a.tiles, at_once), a.ring = limit >= PLAIN ? RING : SMALL;
    return a;
}

// `launch(form)` of the form that is for this product; false where there is none.
template <class Launch>
bool with_form(Lut& a, int64_t limit, const Launch& launch) {
    const int at_once = rows_at_once(a, limit);
    if (at_once == 4) launch(Form<4, 3>());
    if (at_once == 2) a.given.bfloat16 ? launch(Form<2, 3>()) : launch(Form<2, 4>());
    if (at_once == 1) a.given.bfloat16 ? launch(Form<1, 3>()) : launch(Form<1, 4>());
    return at_once > 0;
}

}  // namespace
