// A product with signs, for a GPU: see binary_gemv.cu, which runs these phases with barriers between them.
//
// A weight has a code of two bits and its column one of two kinds: a row has eight values in a block of columns. They are rounded to 23
// bits of the row's largest anywhere, x to 28 bits of the largest of a block's share of columns (float32 has 24 of each), and multiplied
// by tensor cores in whole numbers: three digits of a byte of a value by four digits of seven bits of an x. A row's eight values are two
// registers for a digit, out of which a byte permutation takes those of four weights: codes and kinds, four bits apart in a word, are its
// selector as they are. What a block of columns is worth is in the digits already, so that sums run on across blocks.
//
// A cluster of `ranks` thread blocks has a group of row tiles; each thread block a share of the units of 128 columns, whose digits of x lie
// in shared memory. A warp has a slice of the share and takes pairs of tiles one after another, some units at a time.

#pragma once

#include "binary_gemv_warp.h"

namespace {

constexpr int TILE = 8, PAIR = 2 * TILE, UNIT = 128;  // rows of a tile and of a matrix; columns
constexpr int SLICES = 8;  // at most
ANYWHERE constexpr int warps(int g) { return g == 1 ? 16 : 8; }  // sums of more rows of x take more registers
ANYWHERE constexpr int threads(int g) { return 32 * warps(g); }
constexpr int CHUNK = 4;        // units at a time, which a sum in 32 bits can hold: 255 * 64 * 129 * 128 * 4 < 2^31
constexpr int COLUMNS = 8;      // of a matrix product: digits of two rows of x
constexpr int MOST_PAIRS = 40;
constexpr int EARLY_PAIRS = 2;  // of a warp, that are fetched into the second-level cache while x may still be written

struct Signs {
    const uint32_t* words;   // [T, units, 8, 8]
    const float* tables;     // [T, blocks, 8, 8]
    const int32_t* salient;  // [units * 128]
    const float* largest;    // [T, 8]
    Given given;
    void* out;
    int64_t rows, tiles, units, blocks, block;  // columns of a block: a multiple of a unit
    int64_t group;       // pairs of a cluster
    uint32_t per_block;  // units of a block
    uint32_t inverse;    // 2^32 / per_block, rounded up
    int64_t share;       // units of a rank
    int slices;          // of a share: warps side by side
    int slice;           // units of a slice
};

// What a thread block has in shared memory, for 2 G rows of x.
template <int G>
struct Held {
    uint32_t* digits;   // [units, G, 2, lanes, 4]: a byte each
    uint32_t* kinds;    // [units, 16]: 4 where a column is salient
    int32_t* whole;     // [units, G, 8]: sums of the digits of x
    float* sums;        // [slices, group * 16, 2 G]
    uint32_t* largest;  // [2 G]
};

ANYWHERE constexpr int64_t shared_bytes(int g, int64_t share, int64_t group, int slices) {
    return share * (g * (1024 + 32) + 64) + slices * group * PAIR * 2 * g * 4 + 2 * g * 4;
}

template <int G>
BOTH Held<G> held_in(const Signs& a, void* shared) {
    Held<G> held;
    held.digits = static_cast<uint32_t*>(shared);
    held.kinds = held.digits + a.share * G * 256;
    held.whole = reinterpret_cast<int32_t*>(held.kinds + a.share * 16);
    held.sums = reinterpret_cast<float*>(held.whole + a.share * G * COLUMNS);
    held.largest = reinterpret_cast<uint32_t*>(held.sums + a.slices * a.group * PAIR * 2 * G);
    return held;
}

// unit / per_block, for fewer than 2^16 units.
BOTH uint32_t block_of(const Signs& a, uint32_t unit) { return a.per_block == 1 ? unit : uint32_t(uint64_t(unit) * a.inverse >> 32); }
BOTH int64_t first_unit(const Signs& a, const Place& at) { return least(a.units, at.rank * a.share); }
BOTH int units_of(const Signs& a, const Place& at) { return int(least(a.units - first_unit(a, at), a.share)); }
BOTH int pairs_of(const Signs& a, const Place& at) { return int(least(a.group, (a.tiles + 1) / 2 - at.cluster * a.group)); }

// Rows of x that there are.
template <int G>
BOTH int rows_of(const Signs& a, const Place& at) {
    return int(least(a.given.count - at.first_row, 2 * G));
}

// Rows of x that are not there stay zeros.
template <int G>
BOTH void clear(const Signs& a, const Place& at, void* shared, int thread) {
    const Held<G> held = held_in<G>(a, shared);
    for (int64_t i = thread; i < a.share * G * 64 && rows_of<G>(a, at) < 2 * G; i += threads(G)) {
        *reinterpret_cast<Line<4>*>(held.digits + i * 4) = {};
    }
    for (int64_t i = thread; i < a.share * G * COLUMNS; i += threads(G)) held.whole[i] = 0;
    for (int64_t i = thread; i < a.slices * a.group * PAIR * 2 * G; i += threads(G)) held.sums[i] = 0.0f;
    if (thread < 2 * G) held.largest[thread] = 0;
}

// The column of a unit whose weight is code number `v` of a lane's word.
BOTH int column_of(int v, int lane) { return 8 * v + lane; }

// What selectors need besides codes: of lane t's two words the even codes, then the odd ones.
template <int G>
BOTH void take_kinds(const Signs& a, const Place& at, void* shared, int thread) {
    for (int i = thread; i < units_of(a, at) * 16; i += threads(G)) {
        const int32_t* from = a.salient + (first_unit(a, at) + i / 16) * UNIT;
        uint32_t made = 0;
        UNROLL for (int v = 0; v < 8; v++) made |= uint32_t(from[column_of(2 * v + i % 2, i % 16 / 2)]) << 4 * v;
        held_in<G>(a, shared).kinds[i] = made;
    }
}

// N numbers of a row of x, `apart` columns from each other, on their way at the same time; zeros beyond the last column.
template <class T, int N>
BOTH void read_as(float (&v)[N], const Given& from, int64_t row, int64_t column, int apart) {
    const T* x = static_cast<const T*>(from.x) + row * from.k;
    T kept[N];
    float scale[N];
    UNROLL for (int i = 0; i < N; i++) kept[i] = x[least(column + i * apart, from.k - 1)];
    UNROLL for (int i = 0; i < N; i++) scale[i] = from.scale == nullptr ? 1.0f : from.scale[least(column + i * apart, from.k - 1)];
    UNROLL for (int i = 0; i < N; i++) {
        if constexpr (sizeof(T) == 2) {
            v[i] = from_bits(uint32_t(kept[i]) << 16);
        } else {
            v[i] = kept[i];
        }
        if (from.scale != nullptr) v[i] /= scale[i];
        if (column + i * apart >= from.k) v[i] = 0.0f;
    }
}
template <int N>
BOTH void read(float (&v)[N], const Given& from, int64_t row, int64_t column, int apart) {
    if (from.bfloat16) {
        read_as<uint16_t>(v, from, row, column, apart);
    } else {
        read_as<float>(v, from, row, column, apart);
    }
}

// Bits of the largest |x|, infinite and not a number above all.
template <int G>
BOTH void find_largest(const Signs& a, const Place& at, void* shared, int thread) {
    constexpr int N = 8;
    const int64_t first = first_unit(a, at) * UNIT, count = units_of(a, at) * UNIT;
    NO_UNROLL for (int m = 0; m < rows_of<G>(a, at); m++) {
        uint32_t most = 0;
        for (int64_t i = thread; i < count; i += N * threads(G)) {
            float v[N];
            read(v, a.given, at.first_row + m, first + i, threads(G));
            UNROLL for (int j = 0; j < N; j++) {
                const uint32_t bits = i + j * threads(G) < count ? to_bits(v[j]) & 0x7fffffffu : 0;
                most = bits > most ? bits : most;
            }
        }
        raise(held_in<G>(a, shared).largest + m, most);
    }
}

BOTH int32_t rounded(float v) {
#if defined(__CUDA_ARCH__)
    return __float2int_rn(v);
#else
    return int32_t(__builtin_rintf(v));
#endif
}

// *to += v of all lanes of a warp, which have one `to`.
BOTH void add_all(int32_t* to, int32_t v) {
#if defined(__CUDA_ARCH__)
    v = __reduce_add_sync(~0u, v);
    if (threadIdx.x % 32 == 0) *to = v;
#else
    *to += v;
#endif
}

// A warp makes the digits of a unit of a row of x, a thread those of four columns: a register of each of four lanes.
template <int G>
BOTH void take_digits(const Signs& a, const Place& at, void* shared, int thread) {
    const Held<G> held = held_in<G>(a, shared);
    const int count = units_of(a, at) * 32;
    for (int i = thread; i < count * rows_of<G>(a, at); i += threads(G)) {
        const int m = i / count, unit = i % count / 32, step = i % 32 / 8, lane = i % 8;
        const float by = factor_of<X_BITS>(held.largest[m]);
        uint32_t digits[DIGITS] = {};
        int32_t whole[DIGITS] = {};
        float v[4];
        const int64_t column = (first_unit(a, at) + unit) * UNIT + column_of(step % 2 + step / 2 * 8, lane);
        read(v, a.given, at.first_row + m, column, column_of(2, 0));
        UNROLL for (int b = 0; b < 4; b++) {
            int32_t left = rounded(by == 0.0f ? 0.0f : v[b] * by);
            UNROLL for (int d = 0; d < DIGITS; d++) {
                const int32_t up = d == DIGITS - 1 ? 0 : (left + 64) >> 7, digit = left - up * 128;
                digits[d] |= uint32_t(digit & 255) << 8 * b, whole[d] += digit, left = up;
            }
        }
        uint32_t* to = held.digits + ((unit * G + m / 2) * 2 + step / 2) * 128 + step % 2 * 2 + lane % 2;
        UNROLL for (int d = 0; d < DIGITS; d++) {
            to[((m % 2 * DIGITS + d) * 4 + lane / 2) * 4] = digits[d];
            add_all(held.whole + unit * G * COLUMNS + m * DIGITS + d, whole[d]);
        }
    }
}

// Where a lane reads: words of row g of each tile of a pair, and the four values of one tile and kind.
struct Source {
    const uint32_t* words[2];
    const float* values;
    const uint32_t* largest;  // of the values' row
};

// Numbers of tiles and units of a weight have 32 bits, and so has their product.
BOTH Source source_of(const Signs& a, const Place& at, int pair, uint32_t unit, int lane) {
    const int tile = 2 * (int(at.cluster) * int(a.group) + pair), last = int(a.tiles) - 1;
    const int second = tile < last ? tile + 1 : last, of = lane % 4 < 2 ? tile : second;  // rows that are not there are not written
    const auto words = [&](int t) { return a.words + uint64_t(uint32_t(t) * uint32_t(a.units) + unit) * 64 + uint32_t(lane * 2); };
    return {{words(tile), words(second)},
            a.tables + uint64_t(uint32_t(of) * uint32_t(a.blocks)) * 64 + uint32_t(lane / 4 * 8 + lane % 2 * 4),
            reinterpret_cast<const uint32_t*>(a.largest) + uint32_t(of * TILE + lane / 4)};
}

// Into the second-level cache: what a warp reads first, and which columns of the share are salient.
template <int G>
BOTH void fetch_first(const Signs& a, const Place& at, int thread) {
    for (int i = thread; i < units_of(a, at) * 4; i += threads(G)) fetch(a.salient + first_unit(a, at) * UNIT + i * 32);
    const int warp = thread / 32, lane = thread % 32, slots = warps(G) / a.slices;
    const int first = warp % a.slices * a.slice, count = int(least(least(a.slice, units_of(a, at) - first), CHUNK));
    for (int i = 0; i < EARLY_PAIRS; i++) {
        const int pair = warp / a.slices + i * slots;
        if (pair >= pairs_of(a, at) || lane / 8 >= count) continue;
        const int64_t tile = least(2 * (at.cluster * a.group + pair) + lane % 2, a.tiles - 1), unit = first_unit(a, at) + first + lane / 8;
        const int part = lane / 4 % 2 * 32;
        const uint32_t* words = a.words + (tile * a.units + unit) * 64 + part;
        const float* tables = a.tables + (tile * a.blocks + block_of(a, uint32_t(unit))) * 64 + part;
        fetch(lane / 2 % 2 == 0 ? static_cast<const void*>(words) : static_cast<const void*>(tables));
    }
}

// A warp's pairs, of up to CHUNK units from `chunk` on that end before `last`. FULL: of as many.
template <int G, bool FULL>
BOTH void sweep_chunk(const Signs& a, const Place& at, const Held<G>& held, int slice, int slot, int chunk, int last, int thread) {
    const int count = last - chunk, pairs = pairs_of(a, at), slots = warps(G) / a.slices;
    const uint32_t unit = uint32_t(first_unit(a, at)) + chunk;
    uint32_t values_at[CHUNK];
    int32_t start[G][HELD][2] = {};  // takes the 2^22 off
    UNROLL for (int u = 0; u < CHUNK; u++) {
        if (!FULL && u >= count) break;
        values_at[u] = block_of(a, unit + u) * 64;
        EACH_LANE {
            UNROLL for (int g = 0; g < G; g++)
                UNROLL for (int i = 0; i < 2; i++) start[g][h][i] -= 64 * held.whole[((chunk + u) * G + g) * COLUMNS + LANE % 4 * 2 + i];
        }
    }
    Source source[HELD] = {};
    Read held_of[CHUNK][HELD] = {};
    uint32_t largest[HELD];
    const auto seek = [&](int pair) { EACH_LANE source[h] = source_of(a, at, pair, unit, LANE), largest[h] = *source[h].largest; };
    const auto load = [&](int u) {
        EACH_LANE {
            UNROLL for (int i = 0; i < 2; i++) held_of[u][h].words[i] = stream_line<2>(source[h].words[i] + u * 64);
            held_of[u][h].values = stream_line<4>(source[h].values + values_at[u]);
        }
    };
    if (slot >= pairs) return;
    seek(slot);
    UNROLL for (int u = 0; u < CHUNK; u++)
        if (FULL || u < count) load(u);
    NO_UNROLL for (int pair = slot; pair < pairs; pair += slots) {
        float by[HELD];
        int32_t c[G][PLANES][HELD][4] = {};
        EACH_LANE {
            by[h] = factor_of<VALUE_BITS>(largest[h]);
            UNROLL for (int g = 0; g < G; g++) UNROLL for (int i = 0; i < 4; i++) c[g][PLANES - 1][h][i] = start[g][h][i % 2];
        }
        const bool more = pair + slots < pairs;
        if (more) seek(pair + slots);
        UNROLL for (int u = 0; u < CHUNK; u++) {
            if (!FULL && u >= count) break;
            const auto digits = [&](int g, int h, int half) {
                return *reinterpret_cast<const Line<4>*>(held.digits + (((chunk + u) * G + g) * 2 + half) * 128 + LANE * 4);
            };
            add_unit<G>(c, held_of[u], by, held.kinds + (chunk + u) * 16, digits, thread);
            if (more) load(u);
        }
        UNROLL for (int g = 0; g < G; g++) {
            float own[HELD], given[HELD];
            EACH_LANE {
                float sum[2];
                UNROLL for (int r = 0; r < 2; r++) {
                    float v = 0.0f;
                    UNROLL for (int p = PLANES - 1; p >= 0; p--) v = v * 256.0f + float(c[g][p][h][2 * r] + 128 * c[g][p][h][2 * r + 1]);
                    sum[r] = LANE % 2 == 0 ? v : v * 16384.0f;
                }
                // An even lane gets row g, the next one row g + 8.
                own[h] = LANE % 2 == 0 ? sum[0] : sum[1], given[h] = LANE % 2 == 0 ? sum[1] : sum[0];
            }
            of_neighbour(given);
            EACH_LANE {
                const int lane = LANE, t = lane % 4, row = (slice * int(a.group) + pair) * PAIR + t % 2 * TILE + lane / 4;
                held.sums[row * 2 * G + 2 * g + t / 2] += own[h] + given[h];
            }
        }
    }
}

// A warp's slice of the units for its pairs.
template <int G>
BOTH void sweep(const Signs& a, const Place& at, void* shared, int thread) {
    if (HELD > 1 && thread % 32 != 0) return;
    const Held<G> held = held_in<G>(a, shared);
    const int warp = warp_of(thread), slice = warp % a.slices, first = slice * a.slice;
    const int last = int(least(units_of(a, at), first + a.slice));
    NO_UNROLL for (int chunk = first; chunk < last; chunk += CHUNK) {
        if (chunk + CHUNK <= last) {
            sweep_chunk<G, true>(a, at, held, slice, warp / a.slices, chunk, chunk + CHUNK, thread);
        } else {
            sweep_chunk<G, false>(a, at, held, slice, warp / a.slices, chunk, last, thread);
        }
    }
}

// The slices' sums become the first slice's, in units of x's largest.
template <int G>
BOTH void gather(const Signs& a, void* shared, int thread) {
    const Held<G> held = held_in<G>(a, shared);
    const int64_t own = a.group * PAIR * 2 * G;
    for (int64_t i = thread; i < own; i += threads(G)) {
        float sum = held.sums[i];
        for (int s = 1; s < a.slices; s++) sum += held.sums[s * own + i];
        held.sums[i] = sum * unit_of<X_BITS>(held.largest[i % (2 * G)]);
    }
}

// shared_of(rank): the shared memory of each block of the cluster.
template <int G, class SharedOf>
BOTH void finish(const Signs& a, const Place& at, const SharedOf& shared_of, int thread) {
    const int64_t all = a.group * PAIR, own = (all + at.ranks - 1) / at.ranks;
    for (int64_t i = thread; i < own * 2 * G; i += threads(G)) {
        const int64_t place = at.rank * own + i / (2 * G), row = at.cluster * all + place, to = at.first_row + i % (2 * G);
        if (place >= all || row >= a.rows || to >= a.given.count) continue;
        float v = 0.0f;
        for (int r = 0; r < at.ranks; r++) v += held_in<G>(a, shared_of(r)).sums[place * 2 * G + i % (2 * G)];
        write(a.out, to * a.rows + row, v * unit_of<VALUE_BITS>(to_bits(a.largest[row])), a.given.bfloat16);
    }
}

// `each(phase)`: every thread of a block does `phase(thread)`, then a barrier. `previous()` waits for kernels that may still write what is
// read after it.
template <int G, class Previous, class Each>
BOTH void add_units(const Signs& a, const Place& at, void* shared, const Previous& previous, const Each& each) {
    each([&](int thread) {
        fetch_first<G>(a, at, thread);
        clear<G>(a, at, shared, thread);
    });
    previous();
    each([&](int thread) { find_largest<G>(a, at, shared, thread); });
    each([&](int thread) {
        take_kinds<G>(a, at, shared, thread);
        take_digits<G>(a, at, shared, thread);
    });
    each([&](int thread) { sweep<G>(a, at, shared, thread); });
    each([&](int thread) { gather<G>(a, shared, thread); });
}

// Pairs of a cluster, so that clusters come in whole waves of at most `at_once`; units of a rank and of its slices.
inline void plan(Signs& a, int64_t at_once, int64_t ranks) {
    const int64_t pairs = (a.tiles + 1) / 2, waves = (pairs + at_once * MOST_PAIRS - 1) / (at_once * MOST_PAIRS);
    a.group = (pairs + at_once * waves - 1) / (at_once * waves);
    a.share = (a.units + ranks - 1) / ranks;
    a.slices = 1;
    while (a.slices < SLICES && a.share > a.slices * CHUNK) a.slices *= 2;
    a.slice = int((a.share + a.slices - 1) / a.slices);
}

// Half the rows of x at a time; 0 if not even two fit.
inline int rows_at_a_time(const Signs& a, int64_t limit) {
    int g = a.given.count > 4 ? 4 : a.given.count > 2 ? 2 : 1;
    while (g > 0 && shared_bytes(g, a.share, a.group, a.slices) > limit) g /= 2;
    return g;
}

inline Signs signs_of(const uint32_t* words, const float* tables, const int32_t* salient, const float* largest, const void* x,
                      const float* scale, void* out, int64_t rows, int64_t k, int64_t block, int64_t count, bool bfloat16) {
    Signs a = {};
    a.words = words, a.tables = tables, a.salient = salient, a.largest = largest;
    a.given = {x, scale, k, count, bfloat16}, a.out = out, a.rows = rows;
    a.tiles = (rows + TILE - 1) / TILE, a.units = (k + UNIT - 1) / UNIT, a.blocks = (k + block - 1) / block, a.block = block;
    a.per_block = uint32_t(block / UNIT);
    a.inverse = a.per_block < 2 ? 0 : uint32_t(((uint64_t(1) << 32) + a.per_block - 1) / a.per_block);
    return a;
}

}  // namespace
