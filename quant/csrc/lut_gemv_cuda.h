// A product with a table of values for each column, for a GPU: see lut_gemv.cu, which runs these phases with barriers between them.
//
// A cluster of `ranks` blocks has a group of row tiles; each block has a share of the columns' words, every part's, and adds up what they
// give. Before that it makes tables in shared memory of sums of x times value: four bits of a word are an index into 16 of them (four,
// two or one column), or, with codes of 3 bits, six bits are one into 64 (two columns). 16 floats lie in 16 banks: whatever the lanes of a
// warp, which have a row each, look up at once, no two wait for each other; among 64 at most two do.
//
// A word's eight lookups are added up as a tree, words one after the other, a quarter of the share at a time: the order does not depend on
// the number of rows of x.

#pragma once

#include "products_cuda.h"

namespace {

constexpr int ROWS = 32;                   // of a tile: a lane has one
constexpr int SLICES = 4, SLOTS = 4;       // warps that share a tile; tiles at a time
constexpr int THREADS = 32 * SLICES * SLOTS;
constexpr int RUN = 8;                     // words that a lane loads before it uses the first
constexpr int PERIOD = RUN * SLICES;       // words after which a slice's turn comes again
constexpr int MOST_TILES = 20, MOST_PARTS = 4;
constexpr int HELPERS = 8;                 // threads that share a row's kept weights

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
    int64_t tables;           // bytes of shared memory for tables
};

template <int M>
struct alignas(4 * M) Entry {
    float v[M];
};

ANYWHERE constexpr int index_bits(int bits) { return bits == 3 ? 6 : 4; }
ANYWHERE constexpr int lookups(int bits) { return bits == 3 ? 5 : 8; }
ANYWHERE constexpr int entries(int bits) { return 1 << index_bits(bits); }
// Bytes that a word takes in shared memory: its tables, and x of its columns.
ANYWHERE constexpr int64_t table_bytes(int rows, int bits) { return int64_t(4) * rows * lookups(bits) * entries(bits); }
ANYWHERE constexpr int64_t word_bytes(int rows, int bits) { return table_bytes(rows, bits) + int64_t(4) * rows * (32 / bits); }

// Words of a row that a block has of a part: a whole number of runs, of at most `length`.
BOTH int64_t share(const Part& part, int ranks) {
    return ((part.length + ranks - 1) / ranks + RUN - 1) / RUN * RUN;
}

BOTH int64_t tiles_of(const Lut& a, const Place& at) { return least(a.group, a.tiles - at.cluster * a.group); }

// Shared memory has the tables, then sums [slice, tile, lane] of a group.
template <int M>
BOTH Entry<M>* sums_in(const Lut& a, void* shared) {
    return reinterpret_cast<Entry<M>*>(static_cast<char*>(shared) + a.tables);
}

template <int M>
BOTH void clear(const Lut& a, const Place& at, void* shared, int thread) {
    for (int64_t i = thread; i < SLICES * a.group * ROWS; i += THREADS) sums_in<M>(a, shared)[i] = Entry<M>{};
}

// Words whose tables are made at a time: whole periods.
template <int M>
BOTH int64_t held(const Lut& a, int bits) {
    return a.tables / word_bytes(M, bits) / PERIOD * PERIOD;
}

// Where x of the columns of those words lies.
template <int M>
BOTH Entry<M>* inputs_in(const Lut& a, int bits, void* shared) {
    return reinterpret_cast<Entry<M>*>(static_cast<char*>(shared) + held<M>(a, bits) * table_bytes(M, bits));
}

// Zeros beyond the last column.
template <int M>
BOTH void take_inputs(const Lut& a, const Place& at, const Part& part, int64_t first, int64_t count, void* shared, int thread) {
    const int codes = 32 / part.bits, made = int(count + RUN - 1) / RUN * RUN * codes, own = int(least(count * codes, part.count - first * codes));
    Entry<M>* inputs = inputs_in<M>(a, part.bits, shared);
    UNROLL_BY(4 / M) for (int i = thread; i < made; i += THREADS) {
        Entry<M> x = {};
        if (i < own) {
            const int64_t column = part.columns[first * codes + i];
            UNROLL for (int m = 0; m < M; m++) x.v[m] = read_x(a.given, at.first_row + m, column);
        }
        inputs[i] = x;
    }
}

// A product and a sum, each rounded, as on the host.
BOTH float times(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// Tables of the words from `first` on. A thread makes 16 bytes at a time.
template <int M, int BITS>
BOTH void build(const Lut& a, const Part& part, int64_t first, int64_t count, void* shared, int thread) {
    constexpr int INDEX = index_bits(BITS), SIZE = entries(BITS), CODES = 32 / BITS, JOINT = INDEX / BITS, PER = 4 / M;
    Entry<M>* tables = static_cast<Entry<M>*>(shared);
    const Entry<M>* inputs = inputs_in<M>(a, BITS, shared);
    const int own = int(least(count * CODES, part.count - first * CODES)), made = int(count + RUN - 1) / RUN * RUN * lookups(BITS);
    const float* values = part.values + (first * CODES << BITS);
    UNROLL_BY(M == 1 ? 4 : 2) for (int i = thread; i < made * (SIZE / PER); i += THREADS) {
        const int table = i / (SIZE / PER), begin = i % (SIZE / PER) * PER, column = table / lookups(BITS) * CODES + table % lookups(BITS) * JOINT;
        Entry<M> sum[PER] = {};
        UNROLL for (int j = 0; j < JOINT; j++) {
            const int c = column + j;
            float value[PER] = {};
            if (c < own) {
                if ((j * BITS & 31) >= 2 || PER == 1) {  // one code of this column for all of them
                    value[0] = values[(c << BITS) + (begin >> j * BITS & ((1 << BITS) - 1))];
                    UNROLL for (int e = 1; e < PER; e++) value[e] = value[0];
                } else if (PER == 4 && BITS >= 2) {
                    const Four four = *reinterpret_cast<const Four*>(values + (c << BITS) + (begin & ((1 << BITS) - 1)));
                    UNROLL for (int e = 0; e < PER; e++) value[e] = four.v[e];
                } else {
                    UNROLL for (int e = 0; e < PER; e++) value[e] = values[(c << BITS) + (begin + e >> j * BITS & ((1 << BITS) - 1))];
                }
            }
            const Entry<M> x = inputs[c];
            UNROLL for (int e = 0; e < PER; e++) {
                UNROLL for (int m = 0; m < M; m++) sum[e].v[m] = j == 0 ? times(x.v[m], value[e]) : sum[e].v[m] + times(x.v[m], value[e]);
            }
        }
        UNROLL for (int e = 0; e < PER; e++) tables[i * PER + e] = sum[e];
    }
}

// Into the second-level cache, while tables are made.
BOTH void fetch_ahead(const Lut& a, const Place& at, const Part& part, int64_t first, int64_t count, int thread) {
    const int64_t tile = at.cluster * a.group + thread / (32 * SLICES), word = thread % (32 * SLICES);
    if (tile < least(a.tiles, (at.cluster + 1) * a.group) && word < count) fetch(part.words + (tile * part.length + first + word) * ROWS);
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
    if constexpr (M == 4) {
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(e.v[0]), "=f"(e.v[1]), "=f"(e.v[2]), "=f"(e.v[3])
                     : "r"(at + constant));
    }
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
    constexpr int COUNT = 32 / INDEX;
    constexpr int AT = M == 1 ? 2 : M == 2 ? 3 : 4;  // of an index in an offset in bytes
    constexpr uint32_t OWN = sizeof(Entry<M>) << INDEX;
    Entry<M> v[8] = {};
    if constexpr (INDEX == 4) {
        // The offset of an entry fits a byte: all of them at once, then a byte at a time.
        constexpr uint32_t MASK = 0x0f0f0f0fu << AT;
        const uint32_t even = word << AT & MASK, odd = (AT == 4 ? word : word >> (4 - AT)) & MASK;
        UNROLL for (int i = 0; i < 4; i++) {
            v[2 * i] = found<M>(with_byte(tables, even, i), own + 2 * i * OWN);
            v[2 * i + 1] = found<M>(with_byte(tables, odd, i), own + (2 * i + 1) * OWN);
        }
    } else {
        UNROLL for (int i = 0; i < COUNT; i++) v[i] = found<M>(tables + ((word >> i * INDEX & ((1u << INDEX) - 1u)) << AT), own + i * OWN);
    }
    const Entry<M> low = plus(plus(v[0], v[1]), plus(v[2], v[3]));
    if constexpr (COUNT == 5) return plus(low, v[4]);
    return plus(low, plus(plus(v[4], v[5]), plus(v[6], v[7])));
}

// A warp's slice of the words from `first` on, of which tables are at hand, for its tiles one after another.
template <int M, int INDEX>
BOTH void sweep(const Lut& a, const Place& at, const Part& part, int64_t first, int64_t count, void* shared, int thread) {
    constexpr uint32_t OWN = (sizeof(Entry<M>) << INDEX) * (32 / INDEX);
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
    if (tile < tiles) load(now, tile, word);
    const auto to = [&](int t) { return sums_in<M>(a, shared) + (slice * a.group + t) * ROWS + lane; };
    Entry<M> total = {};
    if (tile < tiles) total = *to(tile);
    while (tile < tiles) {
        int next_tile = tile, next_word = word + PERIOD;
        if (next_word >= own) next_tile = tile + SLOTS, next_word = slice * RUN;
        if (next_tile < tiles) load(next, next_tile, next_word);
        const Address tables = address(shared) + uint32_t(word) * OWN;
        UNROLL for (int i = 0; i < RUN; i++) total = plus(total, given_by<M, INDEX>(tables, i * OWN, now[i]));
        if (next_tile != tile) {
            *to(tile) = total;
            if (next_tile < tiles) total = *to(next_tile);
        }
        UNROLL for (int i = 0; i < RUN; i++) now[i] = next[i];
        tile = next_tile, word = next_word;
    }
}

// Rows of a group that a block finishes.
BOTH int64_t finished_by(const Lut& a, int ranks) { return (a.group * ROWS + ranks - 1) / ranks; }

// What the kept weights of these rows give, in `HELPERS` parts, where tables were; and the slices' sums become the first slice's.
template <int M>
BOTH void gather(const Lut& a, const Place& at, void* shared, int thread) {
    Entry<M>* sums = sums_in<M>(a, shared);
    for (int64_t i = thread; i < a.group * ROWS; i += THREADS) {
        Entry<M> v = sums[i];
        UNROLL for (int s = 1; s < SLICES; s++) v = plus(v, sums[s * a.group * ROWS + i]);
        sums[i] = v;
    }
    if (a.starts == nullptr) return;
    const int64_t own = finished_by(a, at.ranks);
    for (int64_t i = thread; i < own * HELPERS; i += THREADS) {
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
    for (int64_t i = thread; i < own; i += THREADS) {
        const int64_t place = at.rank * own + i, row = base + place;
        if (place >= a.group * ROWS || row >= a.rows) continue;
        Entry<M> v = {};
        for (int r = 0; r < at.ranks; r++) v = plus(v, sums_in<M>(a, shared_of(r))[place]);
        if (a.starts != nullptr) {
            for (int h = 0; h < HELPERS; h++) v = plus(v, static_cast<const Entry<M>*>(shared)[i * HELPERS + h]);
        }
        for (int m = 0; m < M; m++) {
            const int64_t to = at.first_row + m;
            if (to < a.given.count) write(a.out, to * a.rows + row, v.v[m], a.given.bfloat16);
        }
    }
}

// `each(phase)`: every thread of a block does `phase(thread)`, then a barrier.
template <int M, class Each>
BOTH void add_part(const Lut& a, const Place& at, const Part& part, void* shared, const Each& each) {
    const int64_t own = share(part, at.ranks), begin = at.rank * own, end = least(part.length, begin + own), step = held<M>(a, part.bits);
    for (int64_t first = begin; first < end; first += step) {
        const int64_t count = least(step, end - first);
        each([&](int thread) {
            fetch_ahead(a, at, part, first, count, thread);
            take_inputs<M>(a, at, part, first, count, shared, thread);
        });
        each([&](int thread) {
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
    }
}

template <int M, class Each>
BOTH void add_parts(const Lut& a, const Place& at, void* shared, const Each& each) {
    each([&](int thread) { clear<M>(a, at, shared, thread); });
    for (int p = 0; p < a.parts; p++) add_part<M>(a, at, a.part[p], shared, each);
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
