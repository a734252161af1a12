// A product with a table of values for each row, for a GPU: see row_lut_gemv.cu, which runs these phases with barriers between them.
//
// A block has a tile of 32 rows and one to four rows of x; its warps take runs of columns in turn, and a lane has a row. Before that the
// block makes tables in shared memory: of a row's float16 values, every two of them in one word, so that the codes of two neighbouring
// columns find both their weights at once; of float32 values, one. A lane's words lie in its own bank: no two lanes wait for each other.
// A warp has its run's x in shared memory, and reads it, the same for all lanes, 16 bytes at a time.
//
// A row is added up in one order, whatever stands beside it: 32 columns, these sums over a warp's runs, then the warps.

#pragma once

#include "products_cuda.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace {

constexpr int ROWS = 32;    // of a tile: a lane has one
constexpr int SLICES = 16;  // warps
constexpr int THREADS = 32 * SLICES;
constexpr int UNIT = 32;    // columns whose codes fill `bits` words
constexpr int UNITS = 4;    // of a run, that a warp adds up at a time
constexpr int COLUMNS = UNITS * UNIT;
constexpr int STRIDE = 4 * ROWS;  // bytes from one index of a table to the next

ANYWHERE constexpr int joint_of(bool half) { return half ? 2 : 1; }  // codes of an index
ANYWHERE constexpr int entries_of(int bits, bool half) { return 1 << bits * joint_of(half); }
ANYWHERE constexpr int table_bytes(int bits, bool half) { return entries_of(bits, half) * STRIDE; }
// The tables, then each warp's x, where its sums lie in the end: 64 KB at most.
ANYWHERE constexpr int shared_bytes(int m, int bits, bool half) { return table_bytes(bits, half) + SLICES * COLUMNS * 4 * m; }

struct Rows {
    const uint32_t* words;  // [T, units, bits, 32]
    const void* tables;     // [T, 2^bits, 32]
    Given given;
    void* out;
    int64_t rows, units;
};

template <int M>
struct alignas(4 * M) Entry {
    float v[M];
};

// What a lane keeps from phase to phase. x as it is stored, so that nothing waits for it before it is used.
template <int M, int BITS>
struct Lane {
    uint32_t words[UNITS * BITS];
    uint32_t x[UNITS][M];  // of columns lane, lane + 32, ...
    float scale[UNITS];
    Entry<M> total;
};

// A block's tile, and its first row of x.
struct Tile {
    int64_t tile;
    int first;
};

BOTH float from_half(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(uint16_t(bits)));
#else
    return float_of((bits & 0x8000u) << 16 | (bits & 0x7fffu) << 13) * 0x1p112f;  // finite values, exactly
#endif
}

// The halves of a word.
BOTH void split(uint32_t pair, float& low, float& high) {
#if defined(__CUDA_ARCH__)
    __half2 both;
    memcpy(&both, &pair, 4);
    const float2 v = __half22float2(both);
    low = v.x, high = v.y;
#else
    low = from_half(pair & 0xffffu), high = from_half(pair >> 16);
#endif
}

BOTH float multiplied_and_added(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return a * b + c;
#endif
}

template <int M, int BITS, bool HALF>
BOTH Entry<M>* slot_in(char* shared, int slice) {
    return reinterpret_cast<Entry<M>*>(shared + table_bytes(BITS, HALF)) + slice * COLUMNS;
}

// A run's x, of which each is a T. WHOLE: it has all its columns. Beyond the last row that one is read again, and comes to nothing.
template <int M, int BITS, bool WHOLE, class T>
BOTH void load_x(const Given& from, int first, int column, Lane<M, BITS>& l) {
    UNROLL for (int m = 0; m < M; m++) {
        const int row = M == 1 || first + m < int(from.count) ? first + m : int(from.count) - 1;
        const T* x = static_cast<const T*>(from.x) + row * from.k + column;
        UNROLL for (int u = 0; u < UNITS; u++) {
            l.x[u][m] = WHOLE || column + u * UNIT < from.k ? x[u * UNIT] : 0u;
        }
    }
}

// Starts to read a run's words and x. Zeros beyond the last column.
template <int M, int BITS, bool WHOLE>
BOTH void load(const Rows& a, const Tile& at, int run, int thread, Lane<M, BITS>& l) {
    const int unit = run * UNITS, column = unit * UNIT + thread % 32;
    const uint32_t* words = a.words + at.tile * a.units * (BITS * ROWS) + (unit * (BITS * ROWS) + thread % 32);
    UNROLL for (int w = 0; w < UNITS * BITS; w++) l.words[w] = WHOLE || unit + w / BITS < a.units ? stream(words + w * ROWS) : 0u;
    if (a.given.bfloat16) {
        load_x<M, BITS, WHOLE, uint16_t>(a.given, at.first, column, l);
    } else {
        load_x<M, BITS, WHOLE, uint32_t>(a.given, at.first, column, l);
    }
    if (a.given.scale != nullptr) {
        const float* scale = a.given.scale + column;
        UNROLL for (int u = 0; u < UNITS; u++) l.scale[u] = WHOLE || column + u * UNIT < a.given.k ? scale[u * UNIT] : 1.0f;
    }
}

template <int M, int BITS>
BOTH void load(const Rows& a, const Tile& at, int run, int thread, Lane<M, BITS>& l) {
    if ((run + 1) * COLUMNS <= a.given.k) {
        load<M, BITS, true>(a, at, run, thread, l);
    } else {
        load<M, BITS, false>(a, at, run, thread, l);
    }
}

// The block's tables. Entry e of a lane has values e mod 2^bits and, in halves, e / 2^bits.
template <int BITS, bool HALF>
BOTH void make_tables(const Rows& a, const Tile& at, char* shared, int thread) {
    const int lane = thread % 32, slice = thread / 32;
    uint32_t* to = reinterpret_cast<uint32_t*>(shared) + lane;
    const int64_t own = (at.tile << BITS) * ROWS + lane;
    UNROLL for (int i = 0; i < (entries_of(BITS, HALF) + SLICES - 1) / SLICES; i++) {
        const int e = i * SLICES + slice;
        if constexpr (HALF) {
            const uint16_t* from = static_cast<const uint16_t*>(a.tables) + own;
            to[e * ROWS] = from[(e & ((1 << BITS) - 1)) * ROWS] | uint32_t(from[(e >> BITS) * ROWS]) << 16;
        } else {
            if (e < 1 << BITS) to[e * ROWS] = bits_of(static_cast<const float*>(a.tables)[own + e * ROWS]);
        }
    }
}

// x of the run that was read, to where the warp finds it.
template <int M, int BITS, bool HALF>
BOTH void put(const Rows& a, char* shared, int thread, const Lane<M, BITS>& l) {
    Entry<M>* slot = slot_in<M, BITS, HALF>(shared, thread / 32);
    UNROLL for (int u = 0; u < UNITS; u++) {
        Entry<M> x;
        UNROLL for (int m = 0; m < M; m++) x.v[m] = float_of(a.given.bfloat16 ? l.x[u][m] << 16 : l.x[u][m]);
        if (a.given.scale != nullptr) {
            UNROLL for (int m = 0; m < M; m++) x.v[m] = x.v[m] / l.scale[u];
        }
        slot[u * UNIT + thread % 32] = x;
    }
}

// Index number `i` of a unit, of `INDEX` bits, times 128: its offset in a table.
template <int INDEX>
BOTH uint32_t offset(const uint32_t* words, int i) {
    constexpr uint32_t MASK = ((1u << INDEX) - 1u) << 7;
    const int word = i * INDEX / 32, at = i * INDEX % 32;
    if (at + INDEX > 32) return (words[word] >> at | words[word + 1] << (32 - at)) << 7 & MASK;
    return (at < 7 ? words[word] << (7 - at) : words[word] >> (at - 7)) & MASK;
}

// What the run gives.
template <int M, int BITS, bool HALF>
BOTH void add(char* shared, int thread, Lane<M, BITS>& l) {
    constexpr int JOINT = joint_of(HALF), STEP = 4;  // columns whose x is M loads
    const uint32_t lane = uint32_t(thread % 32) * 4;
    const Four* from = reinterpret_cast<const Four*>(slot_in<M, BITS, HALF>(shared, thread / 32));
    UNROLL for (int u = 0; u < UNITS; u++) {
        Entry<M> part = {};
        UNROLL for (int c = 0; c < UNIT; c += STEP) {
            float w[STEP], x[STEP * M];
            UNROLL for (int j = 0; j < STEP; j += JOINT) {
                const uint32_t place = offset<BITS * JOINT>(l.words + u * BITS, (c + j) / JOINT) | lane;
                const uint32_t found = *reinterpret_cast<const uint32_t*>(shared + place);
                if constexpr (HALF) {
                    split(found, w[j], w[j + 1]);
                } else {
                    w[j] = float_of(found);
                }
            }
            UNROLL for (int i = 0; i < M; i++) {
                const Four four = from[(u * UNIT + c) / STEP * M + i];
                UNROLL for (int e = 0; e < 4; e++) x[4 * i + e] = four.v[e];
            }
            UNROLL for (int j = 0; j < STEP; j++) {
                UNROLL for (int m = 0; m < M; m++) part.v[m] = multiplied_and_added(x[j * M + m], w[j], part.v[m]);
            }
        }
        UNROLL for (int m = 0; m < M; m++) l.total.v[m] += part.v[m];
    }
}

// The warps' sums, one after another.
template <int M, int BITS, bool HALF>
BOTH void finish(const Rows& a, const Tile& at, char* shared, int thread) {
    const int lane = thread % 32, m = thread / 32;
    const int64_t row = at.tile * ROWS + lane;
    if (m >= M || row >= a.rows || at.first + m >= a.given.count) return;
    float v = 0.0f;
    UNROLL for (int s = 0; s < SLICES; s++) v += slot_in<M, BITS, HALF>(shared, s)[lane].v[m];
    write(a.out, (at.first + m) * a.rows + row, v, a.given.bfloat16);
}

// `block` and `warp` run a phase in all threads and let those of the block, or of a warp, wait for each other.
template <int M, int BITS, bool HALF, class Block, class Warp>
BOTH void multiply(const Rows& a, const Tile& at, char* shared, const Block& block, const Warp& warp) {
    const int runs = int(a.units + UNITS - 1) / UNITS;
    using L = Lane<M, BITS>;
    block([&](int thread, L& l) {
        l.total = {};
        if (thread / 32 < runs) load<M, BITS>(a, at, thread / 32, thread, l);
        make_tables<BITS, HALF>(a, at, shared, thread);
    });
    // While a warp waits for its next run the others add up theirs.
    for (int first = 0; first < runs; first += SLICES) {
        warp([&](int thread, L& l) {
            if (first + thread / 32 < runs) put<M, BITS, HALF>(a, shared, thread, l);
        });
        warp([&](int thread, L& l) {
            const int run = first + thread / 32;
            if (run < runs) add<M, BITS, HALF>(shared, thread, l);
            if (run + SLICES < runs) load<M, BITS>(a, at, run + SLICES, thread, l);
        });
    }
    block([&](int thread, L& l) { slot_in<M, BITS, HALF>(shared, thread / 32)[thread % 32] = l.total; });
    block([&](int thread, L&) { finish<M, BITS, HALF>(a, at, shared, thread); });
}

inline Rows rows_of(const uint32_t* words, const void* tables, const void* x, const float* scale, void* out, int64_t rows, int64_t k,
                    int64_t count, bool bfloat16) {
    return {words, tables, {x, scale, k, count, bfloat16}, out, rows, (k + UNIT - 1) / UNIT};
}

template <int N>
struct Number {
    static constexpr int value = N;
};

// `with` of the template arguments as numbers: rows of x at a time, bits, half.
template <class With>
auto chosen(int64_t count, int64_t bits, bool half, const With& with) {
    const auto then = [&](auto m) {
        const auto and_then = [&](auto b) { return half ? with(m, b, Number<1>()) : with(m, b, Number<0>()); };
        return bits == 2 ? and_then(Number<2>()) : bits == 3 ? and_then(Number<3>()) : and_then(Number<4>());
    };
    return count == 1 ? then(Number<1>()) : count == 2 ? then(Number<2>()) : then(Number<4>());
}

}  // namespace
