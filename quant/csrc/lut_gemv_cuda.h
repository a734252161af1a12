// A product with a table of values for each column, for a GPU: see lut_gemv.cu, which runs these phases with barriers between them.
//
// A cluster of `ranks` blocks has a group of row tiles; each block has a share of the columns' words, every part's, and adds up what they
// give. Before that it makes tables in shared memory of sums of x times value: four bits of a word are an index into 16 of them (four,
// two or one column), or, with codes of 3 bits, six bits are one into 64 (two columns). An entry is what at most two rows of x give, so
// that 16 of them fit the 32 banks: whatever the lanes of a warp, which have a row each, look up at once, no two wait for each other. Among
// 64 at most two do, with entries of one row. Further rows of x have planes of tables of their own.
//
// A word's eight lookups are added up as a tree, words one after the other, a quarter of the share at a time: the order does not depend on
// the number of rows of x.

#pragma once

#include "lut_tables.h"

namespace {

// A slice's words of a tile, from the one at `words` of all slices, into the second-level cache.
BOTH void fetch_tile(const uint32_t* words, int count, int slice, int lane) {
    for (int i = lane, word; (word = i / RUN * PERIOD + slice * RUN + i % RUN) < count; i += 32) fetch(words + word * ROWS);
}

// The words from `first` on of tiles `begin` to `end` of the group.
template <int M>
BOTH void fetch_words(const Lut& a, const Place& at, const Part& part, int64_t first, int64_t count, int begin, int end, int given) {
    const int thread = anew(given);
    const uint32_t* words = part.words + (at.cluster * a.group * part.length + first) * ROWS;
    const int tiles = int(least(end, tiles_of(a, at)));
    for (int t = begin + thread / (32 * SLICES); t < tiles; t += slots(M)) {
        fetch_tile(words + t * part.length * ROWS, int(count), thread / 32 % SLICES, thread % 32);
    }
}

// What does not depend on a kernel before, while that may still run: columns, values, and words of the first tiles.
template <int M>
BOTH void fetch_ahead(const Lut& a, const Place& at, const Part& part, int64_t first, int64_t count, int given) {
    const int thread = anew(given);
    const int codes = 32 / part.bits, own = int(least(count * codes, part.count - first * codes));
    for (int i = thread * 16; i < own; i += threads(M) * 16) fetch(part.columns + first * codes + i);
    const float* values = part.values + (first * codes << part.bits);
    for (int i = thread * 32; i < own << part.bits; i += threads(M) * 32) fetch(values + i);
    fetch_words<M>(a, at, part, first, count, 0, AT_FIRST, given);
}

// The entry at `at`, an address in shared memory, and a constant.
#if defined(__CUDA_ARCH__)
using Address = uint32_t;

BOTH Address address(const void* shared) { return Address(__cvta_generic_to_shared(shared)); }

template <int M>
BOTH Entry<M> found(Address at, uint32_t constant) {
    Entry<M> e;
    if constexpr (M == 1) asm volatile("ld.shared.f32 %0, [%1];" : "=f"(e.v[0]) : "r"(at + constant));
    if constexpr (M == 2) asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(e.v[0]), "=f"(e.v[1]) : "r"(at + constant));
    return e;
}

// `at`, a multiple of 256, with byte `i` of `word` instead of its lowest.
BOTH Address with_byte(Address at, uint32_t word, int i) { return __byte_perm(word, at, 0x7650 | i); }
#else
using Address = const char*;

BOTH Address address(const void* shared) { return static_cast<Address>(shared); }

template <int M>
BOTH Entry<M> found(Address at, uint32_t constant) {
    return *reinterpret_cast<const Entry<M>*>(at + constant);
}

BOTH Address with_byte(Address at, uint32_t word, int i) { return at + (word >> 8 * i & 255u); }
#endif

template <int M>
BOTH Entry<M> plus(Entry<M> a, const Entry<M>& b) {
    UNROLL for (int m = 0; m < M; m++) a.v[m] += b.v[m];
    return a;
}

// What the codes of a word give, whose indices have `INDEX` bits and whose tables begin at `tables` and `own`.
template <int M, int INDEX>
BOTH Entry<M> given_by(Address tables, uint32_t own, uint32_t word) {
    constexpr int COUNT = 32 / INDEX, W = width(M, INDEX), PLANES = M / W;
    constexpr int AT = W == 1 ? 2 : 3;  // of an index in an offset in bytes
    constexpr uint32_t OWN = sizeof(Entry<W>) << INDEX;
    static_assert(INDEX > 4 || OWN * COUNT % 256 == 0, "with_byte");
    // The offset of an entry among 16 fits a byte: all of them at once, then a byte at a time.
    constexpr uint32_t MASK = 0x0f0f0f0fu << AT;
    const uint32_t even = word << AT & MASK, odd = word >> (4 - AT) & MASK;
    Entry<M> v[8] = {};
    UNROLL for (int i = 0; i < COUNT; i++) {
        const Address at = INDEX == 4 ? with_byte(tables, i % 2 == 0 ? even : odd, i / 2)
                                      : tables + ((word >> i * INDEX & ((1u << INDEX) - 1u)) << AT);
        UNROLL for (int p = 0; p < PLANES; p++) {
            const Entry<W> e = found<W>(at, own + (p * COUNT + i) * OWN);
            UNROLL for (int w = 0; w < W; w++) v[i].v[p * W + w] = e.v[w];
        }
    }
    const Entry<M> low = plus(plus(v[0], v[1]), plus(v[2], v[3]));
    if constexpr (COUNT == 5) return plus(low, v[4]);
    return plus(low, plus(plus(v[4], v[5]), plus(v[6], v[7])));
}

// A warp's slice of the words from `first` on, of which tables are at hand, for its tiles one after another.
template <int M, int INDEX>
BOTH void sweep(const Lut& a, const Place& at, const Part& part, int64_t first, int64_t count, void* shared, int given) {
    const int thread = anew(given);
    constexpr uint32_t OWN = (sizeof(Entry<M>) << INDEX) * (32 / INDEX);  // of a word, all planes
    const int lane = thread % 32, slice = thread / 32 % SLICES, own = int(count), tiles = int(tiles_of(a, at));
    int tile = thread / (32 * SLICES), word = slice * RUN;
    if (word >= own) return;
    const uint32_t* words = part.words + ((at.cluster * a.group) * part.length + first) * ROWS + lane;
    uint32_t now[RUN], next[RUN] = {};
    const auto load = [&](uint32_t* to, int t, int w) {
        const uint32_t* from = words + (int64_t(t) * part.length + w) * ROWS;
        if (w + RUN <= own) {
            UNROLL for (int i = 0; i < RUN; i++) to[i] = stream(from + i * ROWS);
        } else {
            UNROLL for (int i = 0; i < RUN; i++) to[i] = w + i < own ? stream(from + i * ROWS) : 0u;
        }
    };
    const auto enter = [&](int t) {
        if (t + AHEAD < tiles) fetch_tile(words - lane + (t + AHEAD) * part.length * ROWS, own, slice, lane);
    };
    if (tile < tiles) load(now, tile, word), enter(tile);
    const auto to = [&](int t) { return sums_in<M>(a, shared) + (slice * a.group + t) * ROWS + lane; };
    Entry<M> total = {};
    if (tile < tiles) total = *to(tile);
    NO_UNROLL while (tile < tiles) {
        int next_tile = tile, next_word = word + PERIOD;
        if (next_word >= own) next_tile = tile + slots(M), next_word = slice * RUN;
        if (next_tile < tiles) load(next, next_tile, next_word);
        const Address tables = address(shared) + uint32_t(word) * OWN;
        UNROLL for (int i = 0; i < RUN; i++) total = plus(total, given_by<M, INDEX>(tables, i * OWN, now[i]));
        if (next_tile != tile) {
            *to(tile) = total;
            if (next_tile < tiles) total = *to(next_tile), enter(next_tile);
        }
        UNROLL for (int i = 0; i < RUN; i++) now[i] = next[i];
        tile = next_tile, word = next_word;
    }
}

// Rows of a group that a block finishes.
BOTH int64_t finished_by(const Lut& a, int ranks) { return (a.group * ROWS + ranks - 1) / ranks; }

// What the kept weights of these rows give, in `HELPERS` parts, where tables were; and the slices' sums become the first slice's.
template <int M>
BOTH void gather(const Lut& a, const Place& at, void* shared, int given) {
    const int thread = anew(given);
    Entry<M>* sums = sums_in<M>(a, shared);
    for (int64_t i = thread; i < a.group * ROWS; i += threads(M)) {
        Entry<M> v = sums[i];
        UNROLL for (int s = 1; s < SLICES; s++) v = plus(v, sums[s * a.group * ROWS + i]);
        sums[i] = v;
    }
    if (a.starts == nullptr) return;
    const int64_t own = finished_by(a, at.ranks);
    for (int64_t i = thread; i < own * HELPERS; i += threads(M)) {
        const int64_t row = at.cluster * a.group * ROWS + at.rank * own + i / HELPERS;
        Entry<M> v = {};
        if (row < a.rows) {
            for (int64_t e = a.starts[row] + i % HELPERS; e < a.starts[row + 1]; e += HELPERS) {
                UNROLL for (int m = 0; m < M; m++) v.v[m] += a.differences[e] * read_x(a.given, at.first_row + m, a.kept[e]);
            }
        }
        static_cast<Entry<M>*>(shared)[i] = v;
    }
}

// shared_of(rank): the shared memory of each block of the cluster.
template <int M, class SharedOf>
BOTH void finish(const Lut& a, const Place& at, void* shared, const SharedOf& shared_of, int thread) {
    const int64_t own = finished_by(a, at.ranks), base = at.cluster * a.group * ROWS;
    for (int64_t i = thread; i < own; i += threads(M)) {
        const int64_t place = at.rank * own + i, row = base + place;
        if (place >= a.group * ROWS || row >= a.rows) continue;
        Entry<M> v = {};
        UNROLL_BY(8) for (int r = 0; r < at.ranks; r++) v = plus(v, sums_in<M>(a, shared_of(r))[place]);
        if (a.starts != nullptr) {
            for (int h = 0; h < HELPERS; h++) v = plus(v, static_cast<const Entry<M>*>(shared)[i * HELPERS + h]);
        }
        for (int m = 0; m < M; m++) {
            const int64_t to = at.first_row + m;
            if (to < a.given.count) write(a.out, to * a.rows + row, v.v[m], a.given.bfloat16);
        }
    }
}

// `does(first, count)`: the words of a part whose tables a block has at a time.
template <int M, class Does>
BOTH void in_turns(const Lut& a, const Place& at, const Part& part, const Does& does) {
    const int64_t own = share(part, at.ranks), begin = at.rank * own, end = least(part.length, begin + own), step = held<M>(a, part.bits);
    NO_UNROLL for (int64_t first = begin; first < end; first += step) does(first, least(step, end - first));
}

template <int M, class Each>
BOTH void add_part(const Lut& a, const Place& at, const Part& part, bool fetched, void* shared, const Each& each) {
    in_turns<M>(a, at, part, [&](int64_t first, int64_t count) {
        each([&](int thread) {
            if (!fetched || first > at.rank * share(part, at.ranks)) fetch_ahead<M>(a, at, part, first, count, thread);
            take_inputs<M>(a, at, part, first, count, shared, thread);
        });
        each([&](int thread) {
            fetch_words<M>(a, at, part, first, count, AT_FIRST, AHEAD, thread);
            if (part.bits == 1) build<M, 1>(a, part, first, count, shared, thread);
            if (part.bits == 2) build<M, 2>(a, part, first, count, shared, thread);
            if (part.bits == 3) build<M, 3>(a, part, first, count, shared, thread);
            if (part.bits == 4) build<M, 4>(a, part, first, count, shared, thread);
        });
        each([&](int thread) {
            if (part.bits == 3) {
                sweep<M, 6>(a, at, part, first, count, shared, thread);
            } else {
                sweep<M, 4>(a, at, part, first, count, shared, thread);
            }
        });
    });
}

// `each(phase)`: every thread of a block does `phase(thread)`, then a barrier. `previous()` waits for kernels that may still write what is
// read after it.
template <int M, class Previous, class Each>
BOTH void add_parts(const Lut& a, const Place& at, void* shared, const Previous& previous, const Each& each) {
    each([&](int thread) {
        const Part& part = a.part[0];
        const int64_t own = share(part, at.ranks), first = at.rank * own, end = least(part.length, first + own);
        if (first < end) fetch_ahead<M>(a, at, part, first, least(held<M>(a, part.bits), end - first), thread);
        clear<M>(a, at, shared, thread);
    });
    previous();
    NO_UNROLL for (int p = 0; p < a.parts; p++) add_part<M>(a, at, a.part[p], p == 0, shared, each);
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

// The most rows of x at a time for which tables of codes of 3 bits, the largest, fit a period of words.
inline int rows_at_a_time(int64_t count, int64_t group, int64_t shared) {
    int rows = count > 2 ? 4 : int(count);
    while (rows > 1 && word_bytes(rows, 3) * PERIOD + int64_t(4) * rows * SLICES * group * ROWS + 1024 > shared) rows /= 2;
    return rows;
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
    for (int p = 0; p < a.parts; p++) a.part[p] = part_of(parts + 5 * p);
    a.starts = reinterpret_cast<const int64_t*>(kept[0]), a.kept = reinterpret_cast<const int32_t*>(kept[1]);
    a.differences = reinterpret_cast<const float*>(kept[2]);
    a.given = {x, scale, k, rows_of_x, bfloat16};
    a.out = out, a.rows = rows, a.tiles = (rows + ROWS - 1) / ROWS;
    return a;
}

}  // namespace
