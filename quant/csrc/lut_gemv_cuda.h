// A product with a table of values for each column, for a GPU: see lut_gemv.cu, which runs these phases with barriers between them.
//
// What a column gives for a code is a sum, over sets S of the code's bits that are all 1, of a number m_S: that of the code with just the
// bits of S, less the numbers of the smaller sets. So a row's result is a sum of those m_S times a bit, which tensor cores take: the rows'
// bits, as they lie in the words or "and"-ed with each other, times the binary digits of m_S. These forms of a word hold a bit for each
// set; the empty one has a bit that is always 1. A matrix is 16 rows times eight words, and eight digits of their 256 numbers.
//
// All is in whole numbers, exactly, but for one rounding: x times value, in a block's share of the columns, to 31 bits less the widest code
// of the largest there (float32 has 24 of each). So it does not matter which warp adds what; and a row of x comes out the same whatever
// stands beside it.
//
// A cluster of `ranks` blocks has a group of row tiles; each block has a share of the columns' words, every part's, whose digits lie in
// shared memory, as many words at a time as fit.

#pragma once

#include "lut_digits.h"

namespace {

// Into the second-level cache, while digits are made: the beginning of what each warp reads.
template <int M>
BOTH void fetch_ahead(const Lut& a, const Place& at, const Part& part, int first, int count, int given) {
    const int thread = anew(given);
    const int steps = (count + STEP - 1) / STEP, all = int(tiles_of(a, at)) * steps, warp = thread / 32;
    const int begin = int(int64_t(all) * warp / WARPS), end = int(int64_t(all) * (warp + 1) / WARPS);
    constexpr int TOGETHER = 32 / STEP;  // steps, of which a lane has a word's rows
    const uint32_t* words = part.words + (at.cluster * a.group * part.length + first) * ROWS;
    const int own = thread % STEP;
    int unit = begin + thread % 32 / STEP, tile = unit / steps, step = unit % steps;
    NO_UNROLL for (int i = 0; i < AHEAD && unit < end; i += TOGETHER) {
        if (step * STEP + own < count) fetch(words + uint32_t((tile * int(part.length) + step * STEP + own) * ROWS));
        unit += TOGETHER, step += TOGETHER;
        while (step >= steps) step -= steps, tile++;
    }
}

// c += the bits that a and b have in common, a 16 x 256, b 256 x 8, as lanes hold them.
BOTH void multiply(int32_t (&c)[HELD][4], const uint32_t (&a)[HELD][4], const uint32_t (&b)[HELD][2]) {
#if defined(__CUDA_ARCH__)
    asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(c[0][0]), "+r"(c[0][1]), "+r"(c[0][2]), "+r"(c[0][3])
                 : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(b[0][0]), "r"(b[0][1]));
#else
    for (int i = 0; i < 16; i++) {
        for (int n = 0; n < 8; n++) {
            int32_t sum = 0;
            for (int k = 0; k < 8; k++) sum += __builtin_popcount(a[i % 8 * 4 + k % 4][i / 8 + k / 4 * 2] & b[n * 4 + k % 4][k / 4]);
            c[i % 8 * 4 + n / 2][i / 8 * 2 + n % 2] += sum;
        }
    }
#endif
}

// The sum over four neighbours.
BOTH void add_lanes(int32_t (&v)[HELD]) {
#if defined(__CUDA_ARCH__)
    v[0] += __shfl_xor_sync(~0u, v[0], 1);
    v[0] += __shfl_xor_sync(~0u, v[0], 2);
#else
    for (int g = 0; g < HELD; g += 4) v[g] = v[g + 1] = v[g + 2] = v[g + 3] = (v[g] + v[g + 1]) + (v[g + 2] + v[g + 3]);
#endif
}

// Rows that a warp has at a time, as matrices: a tile, or half of one, for which there are registers with more rows of x.
template <int M>
struct Shape {
    static constexpr int HALVES = M > 1 ? 2 : 1, HEIGHT = ROWS / HALVES, MATRICES = HEIGHT / 16, LINES = HEIGHT / 8;
    static constexpr int DEPTH = 4 * HALVES;  // steps whose words are on their way at a time, to where a warp's terms were
    static_assert(DEPTH * STEP * HEIGHT <= TERMS, "their place");
};

template <int M>
using Sums = int32_t[M][Shape<M>::MATRICES][GROUPS][HELD][4];

// A step's words as a lane has them: of two rows of each matrix, of the first four and the last.
template <int M>
using Words = uint32_t[Shape<M>::MATRICES][HELD][4];

// Which two of a lane's four rows matrix `k` has: so that half a warp, which reads those of a matrix at once, reads from all banks.
template <int M>
BOTH int pair_of(int k, int lane) { return Shape<M>::MATRICES == 1 ? k : k ^ (lane / 8 & 1); }

// What a step's words add in one of their forms.
template <int M, int BITS, int FORM>
BOTH void add_form(Sums<M>& sums, const Words<M>& words, const uint32_t* digits, int thread) {
    constexpr int MATRICES = Shape<M>::MATRICES;
    uint32_t bits[MATRICES][HELD][4];
    EACH_LANE {
        UNROLL for (int i = 0; i < MATRICES * 4; i++) bits[i / 4][h][i % 4] = form_of<BITS, FORM>(words[i / 4][h][i % 4]);
    }
    UNROLL for (int m = 0; m < M; m++) {
        UNROLL for (int q = 0; q < GROUPS; q += 2) {
            uint32_t digit[2][HELD][2];
            EACH_LANE {
                const Line<4> four = *reinterpret_cast<const Line<4>*>(digits + (m * forms(BITS) + FORM) * 256 + q * 64 + LANE * 4);
                UNROLL for (int i = 0; i < 4; i++) digit[i / 2][h][i % 2] = four.v[i];
            }
            UNROLL for (int i = 0; i < 2; i++) {
                UNROLL for (int k = 0; k < MATRICES; k++) multiply(sums[m][k][q + i], bits[k], digit[i]);
            }
        }
    }
}

// A warp's sums of a tile, onto those of all; they begin again at zero. The highest digit is worth less than nothing.
template <int M>
BOTH void put_sums(const Lut& a, Sums<M>& sums, int32_t* to, int thread) {
    UNROLL for (int i = 0; i < M * Shape<M>::MATRICES * 2; i++) {
        const int m = i / 2 / Shape<M>::MATRICES, k = i / 2 % Shape<M>::MATRICES, half = i % 2;
        int32_t v[GROUPS][HELD];
        UNROLL for (int q = 0; q < GROUPS; q++) {
            EACH_LANE {
                int32_t* two = sums[m][k][q][h] + 2 * half;
                const int t = LANE % 4;
                v[q][h] = (q == GROUPS - 1 && t == 3 ? two[0] - 2 * two[1] : two[0] + 2 * two[1]) * (1 << 2 * t);
                two[0] = two[1] = 0;
            }
            add_lanes(v[q]);
        }
        EACH_LANE {
            const int t = LANE % 4, row = LANE / 4 * Shape<M>::LINES + 2 * pair_of<M>(k, LANE) + half;
            const int32_t own = t == 0 ? v[0][h] : t == 1 ? v[1][h] : t == 2 ? v[2][h] : v[3][h];
            add(to + (m * GROUPS + t) * int(a.group) * ROWS + row, own);
        }
    }
}

// A warp's part of the words from `first` on, whose digits are at hand, of all tiles.
template <int M, int BITS>
BOTH void sweep(const Lut& a, const Place& at, const Part& part, int first, int count, void* shared, int given) {
    const int thread = anew(given);
    if (HELD > 1 && thread % 32 != 0) return;
    using S = Shape<M>;
    const int steps = (count + STEP - 1) / STEP, all = int(tiles_of(a, at)) * S::HALVES * steps, warp = warp_of(thread);
    int unit = int(int64_t(all) * warp / WARPS);
    const int end = int(int64_t(all) * (warp + 1) / WARPS);
    if (unit == end) return;
    const uint32_t* words = part.words + (at.cluster * a.group * part.length + first) * ROWS;
    uint32_t* ring = reinterpret_cast<uint32_t*>(terms_in(a, shared) + warp * TERMS);
    int next = unit, next_tile = unit / steps, next_step = unit % steps, tile = next_tile, step = next_step;
    // Of the words of a tile, in words: less than 2^31, as a block has few tiles.
    const auto place = [&](int of, int at_step) {
        return uint32_t((of / S::HALVES * int(part.length) + at_step * STEP) * ROWS + of % S::HALVES * S::HEIGHT);
    };
    uint32_t next_place = place(next_tile, next_step);
    const auto load = [&]() {
        if (next < end) {
            EACH_LANE {
                UNROLL for (int i = 0; i < 2; i++) {
                    // Words of another block's share meet digits that are zero; beyond the last there may be none.
                    int word = 4 * i + LANE % 4;
                    if (next_step == steps - 1) word = int(least(word, count - 1 - next_step * STEP));
                    uint32_t* to = ring + ((uint32_t(next) % S::DEPTH * 2 + i) * 32 + LANE) * S::LINES;
                    send<S::LINES>(to, words + (next_place + uint32_t(word * ROWS + LANE / 4 * S::LINES)));
                }
            }
        }
        sent();
        next++, next_place += STEP * ROWS;
        if (++next_step == steps) next_step = 0, next_tile++, next_place = place(next_tile, 0);
    };
    for (int d = 1; d < S::DEPTH; d++) load();
    Sums<M> sums = {};
    NO_UNROLL while (unit < end) {
        load();
        arrived<S::DEPTH - 1>();
        Words<M> own;
        EACH_LANE {
            const uint32_t* from = ring + (uint32_t(unit) % S::DEPTH * 64 + LANE) * S::LINES;
            UNROLL for (int i = 0; i < S::MATRICES * 2; i++) {
                const auto two = *reinterpret_cast<const Line<2>*>(from + i % 2 * 32 * S::LINES + 2 * pair_of<M>(i / 2, LANE));
                own[i / 2][h][i % 2 * 2] = two.v[0], own[i / 2][h][i % 2 * 2 + 1] = two.v[1];
            }
        }
        const uint32_t* digits = static_cast<const uint32_t*>(shared) + step * (M * forms(BITS) * 256);
        add_form<M, BITS, 0>(sums, own, digits, thread);
        add_form<M, BITS, 1>(sums, own, digits, thread);
        if constexpr (BITS >= 3) add_form<M, BITS, 2>(sums, own, digits, thread);
        if constexpr (BITS == 4) add_form<M, BITS, 3>(sums, own, digits, thread);
        unit++;
        if (++step == steps || unit == end) {
            put_sums<M>(a, sums, sums_in(a, shared) + tile * S::HEIGHT, thread);
            step = 0, tile++;
        }
    }
}

// Rows of a group that a block finishes.
BOTH int finished_by(const Lut& a, int ranks) { return (int(a.group) * ROWS + ranks - 1) / ranks; }

// What the kept weights of these rows give, in `HELPERS` parts, where digits were; and the sums of groups of digits become one.
template <int M>
BOTH void gather(const Lut& a, const Place& at, void* shared, int thread) {
    const int all = int(a.group) * ROWS;
    UNROLL for (int m = 0; m < M; m++) {
        const float unit = unit_of(a, largest_in<M>(a, shared)[m]);
        for (int i = thread; i < all; i += THREADS) {
            int32_t* sum = sums_in(a, shared) + m * GROUPS * all + i;
            int64_t v = 0;
            UNROLL for (int q = GROUPS - 1; q >= 0; q--) v = v * 256 + sum[q * all];
            sum[0] = int32_t(to_bits(float(v) * unit));
        }
    }
    if (a.starts == nullptr) return;
    const int own = finished_by(a, at.ranks);
    for (int i = thread; i < own * HELPERS; i += THREADS) {
        const int64_t row = at.cluster * all + at.rank * own + i / HELPERS;
        float v[M] = {};
        if (row < a.rows) {
            for (int64_t e = a.starts[row] + i % HELPERS; e < a.starts[row + 1]; e += HELPERS) {
                UNROLL for (int m = 0; m < M; m++) v[m] += a.differences[e] * read_x(a.given, at.first_row + m, a.kept[e]);
            }
        }
        UNROLL for (int m = 0; m < M; m++) static_cast<float*>(shared)[i * M + m] = v[m];
    }
}

// shared_of(rank): the shared memory of each block of the cluster.
template <int M, class SharedOf>
BOTH void finish(const Lut& a, const Place& at, void* shared, const SharedOf& shared_of, int thread) {
    const int all = int(a.group) * ROWS, own = finished_by(a, at.ranks);
    UNROLL for (int m = 0; m < M; m++) {
        for (int i = thread; i < own; i += THREADS) {
            const int place = at.rank * own + i;
            const int64_t row = at.cluster * all + place, to = at.first_row + m;
            if (place >= all || row >= a.rows || to >= a.given.count) continue;
            float v = 0.0f;
            UNROLL_BY(8) for (int r = 0; r < at.ranks; r++) v += from_bits(uint32_t(sums_in(a, shared_of(r))[m * GROUPS * all + place]));
            if (a.starts != nullptr) {
                for (int h = 0; h < HELPERS; h++) v += static_cast<const float*>(shared)[(i * HELPERS + h) * M + m];
            }
            write(a.out, to * a.rows + row, v, a.given.bfloat16);
        }
    }
}

// `does` with the bits as a constant.
template <class Does>
BOTH void with_bits(int bits, const Does& does) {
    if (bits == 1) does(Bits<1>());
    if (bits == 2) does(Bits<2>());
    if (bits == 3) does(Bits<3>());
    if (bits == 4) does(Bits<4>());
}

// `each(phase)`: every thread of a block does `phase(thread)`, then a barrier. `previous()` waits for kernels that may still write what is
// read after it.
template <int M, class Previous, class Each>
BOTH void add_parts(const Lut& a, const Place& at, void* shared, const Previous& previous, const Each& each) {
    const auto words = [&](const Part& part, const auto& does) {  // a block's share, as many as are held at a time
        const int own = share(part, at.ranks), begin = at.rank * own, end = int(least(part.length, begin + own));
        const int step = held<M>(a, part.bits);
        NO_UNROLL for (int first = begin; first < end; first += step) does(first, int(least(step, end - first)));
    };
    each([&](int thread) {
        words(a.part[0], [&](int first, int count) { fetch_ahead<M>(a, at, a.part[0], first, count, thread); });
        clear<M>(a, shared, thread);
    });
    previous();
    each([&](int thread) {
        for (int p = 0; p < a.parts; p++) {
            with_bits(a.part[p].bits, [&](auto b) { find_largest<M, decltype(b)::value>(a, at, a.part[p], shared, thread); });
        }
    });
    NO_UNROLL for (int p = 0; p < a.parts; p++) {
        const Part& part = a.part[p];
        words(part, [&](int first, int count) {
            each([&](int thread) {
                if (p > 0) fetch_ahead<M>(a, at, part, first, count, thread);
                with_bits(part.bits, [&](auto b) { build<M, decltype(b)::value>(a, at, part, first, count, shared, thread); });
            });
            each([&](int thread) {
                with_bits(part.bits, [&](auto b) { sweep<M, decltype(b)::value>(a, at, part, first, count, shared, thread); });
            });
        });
    }
    each([&](int thread) { gather<M>(a, at, shared, thread); });
}

// Part from five numbers: addresses of words, values and columns, columns, bits.
inline Part part_of(const int64_t* v) {
    Part p;
    p.words = reinterpret_cast<const uint32_t*>(v[0]), p.values = reinterpret_cast<const float*>(v[1]);
    p.columns = reinterpret_cast<const int64_t*>(v[2]), p.count = v[3], p.bits = int(v[4]);
    const int64_t codes = p.bits == 0 ? 1 : 32 / p.bits;
    p.length = (p.count + codes - 1) / codes;
    return p;
}

// The most rows of x at a time for whose digits, of a step of the widest codes, there is shared memory, and for what kept weights give.
inline int rows_at_a_time(int64_t count, int64_t group, int64_t shared) {
    int rows = count > 2 ? 4 : int(count);
    while (rows > 1 && other_bytes(rows, group) + word_bytes(rows, MOST_PARTS) * STEP + 1024 > shared) rows /= 2;
    return rows;
}

// Shared memory of a block that may ask for `most` bytes.
inline int64_t divide(Lut& a, int rows, int64_t most) {
    a.planes = (most - other_bytes(rows, a.group)) / 1024 * 1024;
    return a.planes + other_bytes(rows, a.group);
}

// Tiles of a cluster, so that clusters come in whole waves of at most `at_once`.
inline int64_t group_of(int64_t tiles, int64_t at_once) {
    const int64_t waves = (tiles + at_once * MOST_TILES - 1) / (at_once * MOST_TILES);
    return (tiles + at_once * waves - 1) / (at_once * waves);
}

// Everything but the launch: parts come as five numbers each.
inline Lut lut_of(const int64_t* parts, int64_t count, const int64_t* kept, const void* x, const float* scale, void* out, int64_t rows,
                  int64_t k, int64_t rows_of_x, bool bfloat16) {
    Lut a = {};
    a.parts = int(count);
    a.room = 30;
    for (int p = 0; p < a.parts; p++) {
        a.part[p] = part_of(parts + 5 * p);
        if (31 - a.part[p].bits < a.room) a.room = 31 - a.part[p].bits;
    }
    a.starts = reinterpret_cast<const int64_t*>(kept[0]), a.kept = reinterpret_cast<const int32_t*>(kept[1]);
    a.differences = reinterpret_cast<const float*>(kept[2]);
    a.given = {x, scale, k, rows_of_x, bfloat16};
    a.out = out, a.rows = rows, a.tiles = (rows + ROWS - 1) / ROWS;
    return a;
}

}  // namespace
