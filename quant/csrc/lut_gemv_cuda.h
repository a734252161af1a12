// A product with a table of values for each column, for a GPU: see lut_gemv.cu, which runs these phases with barriers between them.
//
// Numbers. A table's value is its first one less twice the sum of `terms` of those subsets of the code's bits whose parity is odd:
// value[c] = value[0] - 2 sum of t_S over S with popcount(S & c) odd, where t_S = 2^-bits sum over c of (-1)^popcount(S & c) value[c]; none
// is larger than the largest value. x value[0] and x t_S are rounded to whole numbers of 2^-22 (float32: 2^-30) times the power of two
// above X, the largest of a block's share of columns. A share's sum of whole numbers is exact and rounded once. A column is off by
// 2^(bits - 1) + 1/2 steps at most: X 2^-19.6, 2^-18.8 and 2^-17.9 with 2, 3 and 4 bits (float32: 2^8 less). Terms are float32's nearest,
// which is 2^(bits - 24) of the column's largest value at most.
//
// Of 4 bits 11 of 15 terms are of more than one bit, and small where tables ascend. With x in bfloat16 their numbers have two bytes, of
// 2^-15 times the power of two above C, the largest x t_S of such: a column is off by another 11 steps of them, C 2^-10.5, at most, and the
// others' steps are no less than 2^-4 of theirs. On random columns of tables that ascend a sum is off by 2^-14 of its size, 2^-11 with an x
// a hundred times the others; rounding it to bfloat16 is 2^-9.
//
// Tensor cores. Parities of 256 columns of 16 rows are an operand of 16 x 256 bits, from words of the codes' bits with one exclusive or of
// each; the other operand is 8 bits of each whole number, those of x times a subset's terms. Nothing is looked up. What is counted for a
// bit, over all subsets and columns, counts 2^bit, the highest as a sign; of three bytes the other 23 are those of a number plus 2^22, and
// the highest is a one of all, which counts -2^22.
//
// A cluster of `ranks` blocks has a group of tiles of 32 rows; each block has a share of the columns, of every part. A warp takes a unit
// of 256 columns, of which it holds the bits of x in registers, with one tile after another; codes are copied to shared memory well ahead
// of their use. Blocks send their sums to the one of the cluster that finishes a row.

#pragma once

#include <algorithm>

#include "lut_strips.h"

namespace {

// Integers of a part as numbers: `each_sum(row of x, row of the group, sum)`.
template <class F, class EachSum>
BOTH void numbers_of(const Lut& a, const Place& at, void* shared, int thread, const EachSum& each_sum) {
    const Shared<F> s(a, shared);
    const int rows = tiles_of(a, at) * TILE, apart = a.group * TILE;
    UNROLL for (int m = 0; m < F::M; m++) {
        const uint32_t largest = s.largest_of(m);
        const int steps = steps_of<F, F::MOST_BITS>(s, m);  // as if terms were narrow: others have a largest one of 0
        const int64_t first = s.totals[2 * m] + int64_t(s.totals[2 * m + 1]) * 32768;
        for (int i = thread; i < rows; i += THREADS) {
            int64_t odd = 0;
            UNROLL for (int c = F::COUNTS - 1; c >= 0; c--) odd = odd * 65536 + s.whole[(m * F::COUNTS + c) * apart + i];
            each_sum(m, i, finite(largest) ? scaled(float(first - 2 * odd), -steps) : float_of(0x7fc00000u));
        }
    }
}

// Sums of all parts but the last.
template <class F>
BOTH void collect(const Lut& a, const Place& at, bool first, void* shared, int thread) {
    const Shared<F> s(a, shared);
    numbers_of<F>(a, at, shared, thread, [&](int m, int row, float sum) {
        float& to = s.sums[m * a.group * TILE + row];
        to = first ? sum : to + sum;
    });
}

// A block's sums, to the block that finishes a row: `send(rank, place in its shared memory as in this one's, sum)`.
template <class F, class Send>
BOTH void give(const Lut& a, const Place& at, void* shared, const Send& send, int thread) {
    const Shared<F> s(a, shared);
    numbers_of<F>(a, at, shared, thread, [&](int m, int row, float sum) {
        if (a.parts > 1) sum += s.sums[m * a.group * TILE + row];
        const int to = a.by_own.of(row);
        send(to, s.arrived + (at.rank * F::M + m) * a.own + row - to * a.own, sum);
    });
}

// Bytes that are sent to a block.
template <class F>
BOTH int bytes_given(const Lut& a, const Place& at) {
    const int left = tiles_of(a, at) * TILE - at.rank * a.own;
    return left > 0 ? smaller(left, a.own) * a.ranks * F::M * 4 : 0;
}

// What the kept weights of these rows give, in `HELPERS` parts: where integers, rings and tables were.
template <class F>
BOTH void gather(const Lut& a, const Place& at, void* shared, int thread) {
    if (a.starts == nullptr) return;
    const int own = a.own;
    float* to = reinterpret_cast<float*>(Shared<F>(a, shared).whole);
    for (int i = thread; i < own * HELPERS; i += THREADS) {
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

template <class F>
BOTH void finish(const Lut& a, const Place& at, void* shared, int thread) {
    const int own = a.own, rows = tiles_of(a, at) * TILE;
    const Shared<F> s(a, shared);
    const float* kept = reinterpret_cast<const float*>(s.whole);
    for (int i = thread; i < own * F::M; i += THREADS) {
        const int m = F::M == 1 ? 0 : i / own, line = i - m * own, place = at.rank * own + line;
        const int64_t row = at.cluster * a.group * TILE + place, to = at.first_row + m;
        if (place >= rows || row >= a.rows || to >= a.given.count) continue;
        float v = 0.f;
        UNROLL_BY(8) for (int r = 0; r < a.ranks; r++) v += s.arrived[(r * F::M + m) * own + line];
        if (a.starts != nullptr) {
            for (int h = 0; h < HELPERS; h++) v += kept[(line * HELPERS + h) * F::M + m];
        }
        write(a.out, to * a.rows + row, v, a.given.bfloat16);
    }
}

// What a thread keeps from phase to phase; on the host there are those of all threads.
template <class F, int BITS>
struct Kept {
    Terms<F, BITS> terms[HELD > 1 ? THREADS : 1];
    Sweep<F, BITS> sweep[HELD > 1 ? THREADS : 1];
};

constexpr int EARLY_PLACES = 2;  // of a ring, filled before x is waited for

// A part. `previous()`: see below; `early`: nothing was waited for yet. A block without columns of it has a turn of none.
template <class F, int BITS, class Previous, class Each>
BOTH void add_part(const Lut& a, const Place& block, const Part& part, bool early, void* shared, const Previous& previous,
                   const Each& each) {
    const int begin = smaller(part.units, block.rank * part.share), all = smaller(part.units, begin + part.share) - begin;
    Kept<F, BITS> kept;
    const auto mine = [](int thread) { return HELD > 1 ? thread : 0; };
    int done = 0;
    do {
        const int first = begin + done, count = smaller(part.held, all - done);
        const bool opens = done == 0;
        each([&](int given) {
            const int thread = anew(given);  // no loop's numbers are made ahead of the loads
            const Place at = {anew(int(block.cluster)), block.first_row, anew(block.rank), a.ranks};
            auto& terms = kept.terms[mine(thread)];
            auto& sweep = kept.sweep[mine(thread)];
            terms.load(part, first, count, thread);
            take_inputs<F, BITS>(
                a, at, part, first, opens ? all : count, count, opens, shared, thread,
                [&] {
                    if (opens) terms.fetch_rest(part, begin, count, all, anew(thread));
                    sweep.begin(a, at, part, first, count, shared, thread);
                    sweep.open(0, EARLY_PLACES);
                    if (opens && early) previous();
                },
                [&] {
                    sweep.open(EARLY_PLACES, sweep.depth);
                    if (opens) clear<F>(a, shared, anew(thread));
                });
        });
        each([&](int thread) { take_bits<F, BITS>(a, part, first, count, kept.terms[mine(thread)], shared, thread); });
        each([&](int thread) { kept.sweep[mine(thread)].run(a, shared); });
        done += count;
    } while (done < all);
}

// `each(phase)`: every thread of a block does `phase(thread)`, then a barrier. `previous()` waits for kernels that may still write what is
// read after it. `give` comes next.
template <class F, class Previous, class Each>
BOTH void add_parts(const Lut& a, const Place& at, void* shared, const Previous& previous, const Each& each) {
    NO_UNROLL for (int p = 0; p < a.parts; p++) {
        const Part& part = a.part[p];
        if (p > 0) each([&](int thread) { collect<F>(a, at, p == 1, shared, anew(thread)); });
        if (part.bits == 2) add_part<F, 2>(a, at, part, p == 0, shared, previous, each);
        if constexpr (F::MOST_BITS > 2) {
            if (part.bits == 3) add_part<F, 3>(a, at, part, p == 0, shared, previous, each);
        }
        if constexpr (F::MOST_BITS > 3) {
            if (part.bits == 4) add_part<F, 4>(a, at, part, p == 0, shared, previous, each);
        }
    }
}

// Part from five numbers: addresses of words, values and columns, columns, bits.
inline Part part_of(const int64_t* v) {
    Part p = {};
    p.words = reinterpret_cast<const uint32_t*>(v[0]), p.values = reinterpret_cast<const float*>(v[1]);
    p.columns = reinterpret_cast<const int64_t*>(v[2]), p.count = v[3], p.bits = int(v[4]);
    p.units = int((p.count + UNIT - 1) / UNIT);
    p.terms = p.values + (p.count << p.bits), p.firsts = p.terms + int64_t(p.units) * UNIT * parities(p.bits);
    p.crossed = p.firsts + int64_t(p.units) * UNIT * 2;
    return p;
}

// Tiles of a cluster, so that clusters come in whole waves of at most `at_once`.
inline int64_t group_of(int64_t tiles, int64_t at_once) {
    const int64_t waves = (tiles + at_once * MOST_TILES - 1) / (at_once * MOST_TILES);
    return (tiles + at_once * waves - 1) / (at_once * waves);
}

// Units at a time that a block has place for, of every part; false: this form is not for it. The ring is the largest that leaves place for
// all units of a block, or else the second, where there is place for it.
template <class F>
bool place_units(Lut& a, int64_t limit) {
    const auto most = [&](int ring, const Part& part) { return (limit - fixed_bytes<F>(a.group, ring)) / unit_bytes<F>(part.bits); };
    const auto leaves = [&](int ring, bool all) {
        return std::all_of(a.part, a.part + a.parts, [&](const Part& part) {
            return part.bits <= F::MOST_BITS && most(ring, part) >= (all ? std::max(part.share, 1) : 1);
        });
    };
    a.ring = leaves(RING, true) ? RING : leaves(SMALL, true) ? SMALL : leaves(RING, false) ? RING : SMALL;
    if (!leaves(a.ring, false)) return false;
    for (int p = 0; p < a.parts; p++) {
        const int64_t held = most(a.ring, a.part[p]), turns = (a.part[p].share + held - 1) / held;
        a.part[p].held = int(turns > 1 ? (a.part[p].share + turns - 1) / turns : held);
    }
    return true;
}

// Rows of x at a time: as many as there are, of those that a block has place for.
inline int rows_at_once(Lut& a, int64_t limit) {
    const bool half = a.given.bfloat16;
    if (half && a.given.count > 2 && place_units<Form<4, 3>>(a, limit)) return 4;
    if (a.given.count > 1 && (half ? place_units<Form<2, 3>>(a, limit) : place_units<Form<2, 4>>(a, limit))) return 2;
    return (half ? place_units<Form<1, 3>>(a, limit) : place_units<Form<1, 4>>(a, limit)) ? 1 : 0;
}

// Everything but the launch: parts come as five numbers each.
inline Lut lut_of(const int64_t* parts, int64_t count, const int64_t* kept, const void* x, const float* scale, void* out, int64_t rows,
                  int64_t k, int64_t rows_of_x, bool bfloat16, int64_t at_once, int64_t ranks) {
    Lut a = {};
    a.parts = int(count);
    for (int p = 0; p < a.parts; p++) {
        a.part[p] = part_of(parts + 5 * p);
        a.part[p].share = int((a.part[p].units + ranks - 1) / ranks);
    }
    a.starts = reinterpret_cast<const int64_t*>(kept[0]), a.kept = reinterpret_cast<const int32_t*>(kept[1]);
    a.differences = reinterpret_cast<const float*>(kept[2]);
    a.given = {x, scale, k, rows_of_x, bfloat16};
    a.out = out, a.rows = rows, a.tiles = int((rows + TILE - 1) / TILE);
    a.group = int(group_of(a.tiles, at_once)), a.ranks = int(ranks), a.own = int((a.group * TILE + ranks - 1) / ranks);
    a.by_own = Divisor(a.own), a.by_tiles = Divisor(uint32_t(a.group)), a.by_last = Divisor(uint32_t((a.tiles - 1) % a.group + 1));
    return a;
}

// `launch(form)` of the form that is for this product; false where there is none. limit: bytes of shared memory that a block may have.
template <class Launch>
bool with_form(Lut& a, int64_t limit, const Launch& launch) {
    const int at_once = rows_at_once(a, limit);
    if (at_once == 4) launch(Form<4, 3>());
    if (at_once == 2) a.given.bfloat16 ? launch(Form<2, 3>()) : launch(Form<2, 4>());
    if (at_once == 1) a.given.bfloat16 ? launch(Form<1, 3>()) : launch(Form<1, 4>());
    return at_once > 0;
}

}  // namespace
