// The tables of lut_gemv_cuda.h, which says what for: where they lie in shared memory, and how they are made.

#pragma once

#include "products_cuda.h"

namespace {

constexpr int ROWS = 32;                   // of a tile: a lane has one
constexpr int SLICES = 4;                  // warps that share a tile
constexpr int RUN = 8;                     // words that a lane loads before it uses the first
constexpr int PERIOD = RUN * SLICES;       // words after which a slice's turn comes again
constexpr int MOST_TILES = 20, MOST_PARTS = 4;
constexpr int HELPERS = 8;                 // threads that share a row's kept weights
// Tiles: how far in front a warp fetches words into the second-level cache, and how far before x is read, which is not to wait for them.
constexpr int AHEAD = 8, AT_FIRST = 4;
// Tiles at a time. A single row of x takes half of the registers, and twice the warps wait for fewer of their lookups.
constexpr int SLOTS = 8;
ANYWHERE constexpr int slots(int rows) { return rows == 1 ? SLOTS : 4; }
ANYWHERE constexpr int threads(int rows) { return 32 * SLICES * slots(rows); }

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
// Rows of x of an entry: wider ones make lanes wait, for 1.8 times as long with four rows, and 1.2 times with two and codes of 3 bits.
ANYWHERE constexpr int width(int rows, int index) { return index > 4 || rows == 1 ? 1 : 2; }
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
    for (int64_t i = thread; i < SLICES * a.group * ROWS; i += threads(M)) sums_in<M>(a, shared)[i] = Entry<M>{};
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
BOTH void take_inputs(const Lut& a, const Place& at, const Part& part, int64_t first, int64_t count, void* shared, int given) {
    const int thread = anew(given);
    const int codes = 32 / part.bits, made = int(count + RUN - 1) / RUN * RUN * codes;
    const int own = int(least(count * codes, part.count - first * codes));
    Entry<M>* inputs = inputs_in<M>(a, part.bits, shared);
    UNROLL_BY(4 / M) for (int i = thread; i < made; i += threads(M)) {
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

// Tables [word, plane, lookup, entry] of the words from `first` on. A thread makes 16 bytes of each plane at a time.
template <int M, int BITS>
BOTH void build(const Lut& a, const Part& part, int64_t first, int64_t count, void* shared, int given) {
    const int thread = anew(given);
    constexpr int INDEX = index_bits(BITS), SIZE = entries(BITS), CODES = 32 / BITS, JOINT = INDEX / BITS, LOOKUPS = lookups(BITS);
    constexpr int W = width(M, INDEX), PLANES = M / W, PER = 4 / W;
    const Entry<M>* inputs = inputs_in<M>(a, BITS, shared);
    const int own = int(least(count * CODES, part.count - first * CODES)), made = int(count + RUN - 1) / RUN * RUN * LOOKUPS;
    const float* values = part.values + (first * CODES << BITS);
    UNROLL_BY(M == 1 ? 4 : M == 2 ? 2 : 1) for (int i = thread; i < made * (SIZE / PER); i += threads(M)) {
        const int table = i / (SIZE / PER), begin = i % (SIZE / PER) * PER, word = table / LOOKUPS, lookup = table % LOOKUPS;
        Entry<M> sum[PER] = {};
        UNROLL for (int j = 0; j < JOINT; j++) {
            const int c = word * CODES + lookup * JOINT + j;
            float value[PER] = {};
            if (c < own) {
                if (j * BITS >= 2) {  // one code of this column for all of them
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
        UNROLL for (int p = 0; p < PLANES; p++) {
            Four four;
            UNROLL for (int e = 0; e < 4; e++) four.v[e] = sum[e / W].v[p * W + e % W];
            static_cast<Four*>(shared)[(((word * PLANES + p) * LOOKUPS + lookup) * SIZE + begin) / PER] = four;
        }
    }
}

}  // namespace
