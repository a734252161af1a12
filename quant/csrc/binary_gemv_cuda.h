// A product with signs, for a GPU: see binary_gemv.cu, which runs these phases with barriers between them.
//
// A weight has a code of two bits and its column one of two kinds: a row has eight values in a block of columns. They are stored as whole
// numbers of 32 bits of the row's largest anywhere, in four digits of a byte, of which a product takes the highest two (x in bfloat16) or
// three (float32, of 24 bits itself); x has 28 bits of the largest of a warp's columns, in four digits of seven. Tensor cores multiply
// digits and add up whole numbers. A row's eight values are two registers for a digit, out of which a byte permutation takes those of four
// weights: codes and kinds, four bits apart in a word, are its selector as they are. What a block of columns is worth is in the digits
// already, so that sums run on across blocks.
//
// A cluster of `ranks` thread blocks has a group of row tiles; each thread block a share of the units of 128 columns, whose digits of x lie
// in shared memory. A warp has a slice of the share and takes pairs of tiles one after another, some units (a chunk) at a time. With one or
// two rows of x in bfloat16 a chunk's digits stay in registers; with up to four, units of the weight come through a ring.

#pragma once

#include "binary_gemv_digits.h"

namespace {

// Copies kinds, and the largest values of rows that the rank adds up; four of them at a time.
template <int G, int PLANES>
BOTH void fetch_rest(const Signs& a, const Place& at, void* shared, int thread) {
    const Held<G> held = held_in<G>(a, at, shared);
    const uint32_t* kinds = a.kinds + first_unit(a, at) * 16;
    for (int i = thread; i < units_of(a, at) * 4; i += threads(G, PLANES)) send<4>(held.kinds + 4 * i, kinds + 4 * i);
    const int all = int(a.group) * PAIR, first = at.rank * a.own / 4 * 4;
    const int64_t start = at.cluster * all;
    const int last = lesser(lesser(all, (at.rank + 1) * a.own), int(a.tiles * TILE - start));
    for (int i = first + 4 * thread; i < last; i += 4 * threads(G, PLANES)) {
        send<4>(reinterpret_cast<uint32_t*>(held.row_largest + i), reinterpret_cast<const uint32_t*>(a.largest + start + i));
    }
    sent();
}

template <int G>
struct Halves {
    float own[G][HELD], given[G][HELD];
};

// A chunk of a warp's slice: units from `first` on, of a rank, and what its sums begin with and are worth.
template <int G, int PLANES>
struct Chunk {
    const Signs& a;
    const Held<G>& held;
    int slice, first, count;
    int32_t start[HELD][2];
    float worth[HELD];
    float* to[HELD];

    BOTH Chunk(const Signs& a, const Held<G>& held, int slice, int first, int last, int thread)
        : a(a), held(held), slice(slice), first(first), count(last - first) {
        EACH_LANE UNROLL for (int i = 0; i < 2; i++) start[h][i] = start_of(0, h, i, thread);
        EACH_LANE {
            const int lane = LANE, t = lane % 4;
            worth[h] = worth_of(0, h, thread);
            to[h] = held.sums + (slice * int(a.group) * PAIR + t % 2 * TILE + lane / 4) * 2 * G + t / 2;
        }
    }

    // Takes off what digits are stored with. Of more rows of x it is found out again, and so is what 1 is worth, for want of registers.
    BOTH int32_t start_of(int g, int h, int i, int thread) const {
        int32_t sum = 0;
        UNROLL for (int u = 0; u < parts(G); u++)
            if (u < count) sum -= 128 * held.whole[((first + u) * G + g) * COLUMNS + LANE % 4 * 2 + i];
        return sum;
    }
    BOTH float worth_of(int g, int h, int thread) const {
        const uint32_t* largest = held.largest + slice * a.chunks + (first - slice * a.slice) / CHUNK;
        return unit_of<X_BITS>(largest[(2 * g + LANE % 4 / 2) * a.slices * a.chunks]);
    }
    BOTH Line<4> digits(int u, int g, int h, int odd, int thread) const {
        return *reinterpret_cast<const Line<4>*>(held.digits + (((first + u) * G + g) * 2 + odd) * 128 + LANE * 4);
    }
    BOTH Line<2> kinds(int u, int h, int odd, int thread) const {
        return *reinterpret_cast<const Line<2>*>(held.kinds + (first + u) * 16 + odd * 8 + LANE % 4 * 2);
    }

    BOTH void begin(int32_t (&c)[G][PLANES][HELD][4], int thread) const {
        EACH_LANE UNROLL for (int g = 0; g < G; g++) UNROLL for (int i = 0; i < 4; i++) {
            c[g][0][h][i] = G == 1 ? start[h][i % 2] : start_of(g, h, i % 2, thread), c[g][1][h][i] = 0;
            if constexpr (PLANES == 3) c[g][2][h][i] = c[g][0][h][i];
        }
    }

    // A pair's sums: of an even lane row g, of the next one row g + 8, each a half that is its own and one that its neighbour gives it.
    BOTH void halves(Halves<G>& sums, const int32_t (&c)[G][PLANES][HELD][4], int thread) const {
        UNROLL for (int g = 0; g < G; g++) {
            EACH_LANE {
                float sum[2];
                UNROLL for (int r = 0; r < 2; r++) {
                    float v = 0.0f;
                    UNROLL for (int p = 0; p < PLANES; p++) v = v * 256.0f + float(c[g][p][h][2 * r] + 128 * c[g][p][h][2 * r + 1]);
                    sum[r] = LANE % 2 == 0 ? v : v * 16384.0f;
                }
                sums.own[g][h] = LANE % 2 == 0 ? sum[0] : sum[1], sums.given[g][h] = LANE % 2 == 0 ? sum[1] : sum[0];
            }
            of_neighbour(sums.given[g]);
        }
    }
    BOTH void keep(const Halves<G>& sums, int pair, int thread) const {
        UNROLL for (int g = 0; g < G; g++) EACH_LANE {
            float* sum = to[h] + pair * PAIR * 2 * G + 2 * g;
            const float made = sums.own[g][h] + sums.given[g][h];
            *sum = (first == slice * a.slice ? 0.0f : *sum) + made * (G == 1 ? worth[h] : worth_of(g, h, thread));
        }
    }
};

// A warp's pairs, of up to CHUNK units from `first` on that end before `last`, by registers. FULL: of as many. there: the first pair's
// are on their way.
template <int G, int PLANES, bool FULL>
BOTH void sweep_chunk(const Signs& a, const Place& at, const Held<G>& held, Reads& held_of, bool there, int slice, int slot, int first,
                      int last, int thread) {
    const int count = FULL ? CHUNK : last - first, pairs = pairs_of(a, at), slots = a.slots;
    const uint32_t unit = uint32_t(first_unit(a, at)) + first;
    uint32_t values_at[CHUNK];
    UNROLL for (int u = 0; u < CHUNK; u++)
        if (u < count) values_at[u] = block_of(a, unit + u) * 32;
    const Chunk<G, PLANES> chunk(a, held, slice, first, first + count, thread);
    Source source[HELD] = {};
    const auto seek = [&](int pair) { EACH_LANE source[h] = source_of(a, at, pair, unit, LANE); };
    const auto load_unit = [&](int u) { EACH_LANE load<PLANES>(held_of.read[u][h], a, source[h], u, values_at[u]); };
    if (slot >= pairs) return;
    seek(slot);
    UNROLL for (int u = 0; u < CHUNK; u++)
        if (!there && u < count) load_unit(u);
    NO_UNROLL for (int pair = slot; pair < pairs; pair += slots) {
        int32_t c[G][PLANES][HELD][4];
        chunk.begin(c, thread);
        const bool more = pair + slots < pairs;
        if (more) seek(pair + slots);
        UNROLL for (int u = 0; u < CHUNK; u++) {
            if (u >= count) break;
            const auto kinds = [&](int h, int odd) { return chunk.kinds(u, h, odd, thread); };
            const auto digits = [&](int g, int h, int odd) { return chunk.digits(u, g, h, odd, thread); };
            add_unit<G, PLANES>(c, held_of.read[u], kinds, digits, thread);
            if (more) load_unit(u);
        }
        Halves<G> sums;
        chunk.halves(sums, c, thread), chunk.keep(sums, pair, thread);
    }
}

// Where a warp is in its ring.
struct Turn {
    uint32_t* ring;
    int at;  // words
    Feed feed;

    template <int PLANES>
    BOTH void next() {
        constexpr int ONE = ring_chunk(PLANES);
        static_assert(DEPTH == 2, "two places");
        at = ONE - at;
    }
};

// The same by the warp's ring.
template <int G, int PLANES, bool FULL>
BOTH void sweep_ring(const Signs& a, const Place& at, const Held<G>& held, Turn& turn, int slice, int slot, int first, int last,
                     int thread) {
    constexpr bool STAY = G == 1 && PLANES == 2;  // digits of x, in registers
    const int count = FULL ? CHUNK : last - first;
    const Chunk<G, PLANES> chunk(a, held, slice, first, first + count, thread);
    Line<4> own_digits[CHUNK][2][HELD];
    Line<2> own_kinds[CHUNK][2][HELD];
    if constexpr (STAY) {
        UNROLL for (int u = 0; u < CHUNK; u++)
            if (u < count) EACH_LANE UNROLL for (int odd = 0; odd < 2; odd++) {
                own_digits[u][odd][h] = chunk.digits(u, 0, h, odd, thread), own_kinds[u][odd][h] = chunk.kinds(u, h, odd, thread);
            }
    }
    if (slot >= turn.feed.pairs) return;
    Read read[HELD];
    Halves<G> sums = {};  // of the pair before, for its neighbour's half takes a while: at first zeros, of the first pair itself
    int before = slot;
    const auto await = [&] {
        arrived<DEPTH - 1>();
        barrier();
        take<PLANES>(read, turn.ring + turn.at, 0, thread);
    };
    await();
    NO_UNROLL for (int pair = slot; pair < turn.feed.pairs; pair += a.slots) {
        int32_t c[G][PLANES][HELD][4];
        chunk.begin(c, thread);
        UNROLL for (int u = 0; u < CHUNK; u++) {
            if (u >= count) break;
            if (u > 0) take<PLANES>(read, turn.ring + turn.at, u, thread);
            const auto kinds = [&](int h, int odd) {
                if constexpr (STAY) return own_kinds[u][odd][h];
                return chunk.kinds(u, h, odd, thread);
            };
            const auto digits = [&](int g, int h, int odd) {
                if constexpr (STAY) return own_digits[u][odd][h];
                return chunk.digits(u, g, h, odd, thread);
            };
            add_unit<G, PLANES>(c, read, kinds, digits, thread);
            if (u == 0) chunk.keep(sums, before, thread);
        }
        barrier();  // all lanes have read
        copy_next<PLANES>(turn.feed, a, turn.ring + turn.at, thread);
        advance<G, PLANES>(turn.feed, a, at, thread);
        turn.next<PLANES>();
        await();
        chunk.halves(sums, c, thread);
        before = pair;
    }
    chunk.keep(sums, before, thread);
}

// A warp's slice of the units for its pairs.
template <int G, int PLANES, bool RING>
BOTH void sweep(const Signs& a, const Place& at, void* shared, Reads& held_of, const Feed& feed, int thread) {
    if (HELD > 1 && thread % 32 != 0) return;
    const Held<G> held = held_in<G>(a, at, shared);
    const int warp = warp_of(thread), slice = slice_of(a, warp), first = slice * a.slice, slot = slot_of(a, warp);
    const int last = lesser(units_of(a, at), first + a.slice);
    Turn turn = {};
    if constexpr (RING) {
        turn.ring = ring_of<PLANES>(held.rings, warp);
        turn.feed = HELD > 1 ? feed_of<G, PLANES>(a, at, thread) : feed;
        // On the host a warp that was here before left its own.
        if (HELD > 1) fill<G, PLANES>(turn.feed, a, at, held.rings, thread);
    }
    if (first >= last) {
        for (int pair = slot; pair < pairs_of(a, at); pair += a.slots) {
            EACH_LANE UNROLL for (int i = 0; i < G; i++) held.sums[((slice * int(a.group) + pair) * G + i) * 32 + LANE] = 0.0f;
        }
    }
    NO_UNROLL for (int c = first; c < last; c += CHUNK) {
        const bool there = HELD == 1 && c == first;
        if (c + CHUNK <= last) {
            if constexpr (RING) sweep_ring<G, PLANES, true>(a, at, held, turn, slice, slot, c, last, thread);
            else sweep_chunk<G, PLANES, true>(a, at, held, held_of, there, slice, slot, c, last, thread);
        } else {
            if constexpr (RING) sweep_ring<G, PLANES, false>(a, at, held, turn, slice, slot, c, last, thread);
            else sweep_chunk<G, PLANES, false>(a, at, held, held_of, there, slice, slot, c, last, thread);
        }
    }
}

// The slices' sums, to the rank that adds up those of a row. shared_of(rank): the shared memory of each block of the cluster.
template <int G, int PLANES, class SharedOf>
BOTH void give(const Signs& a, const Place& at, void* shared, const SharedOf& shared_of, int thread) {
    const Held<G> held = held_in<G>(a, at, shared);
    const int all = int(a.group) * PAIR, own = a.own;
    for (int i = thread; i < all * 2 * G; i += threads(G, PLANES)) {
        float sum = held.sums[i];
        for (int s = 1; s < a.slices; s++) sum += held.sums[s * all * 2 * G + i];
        const int place = i / (2 * G), to = int(uint64_t(uint32_t(place)) * a.of_own >> 32);
        held_in<G>(a, at, shared_of(to)).arrived[(at.rank * own + place - to * own) * 2 * G + i % (2 * G)] = sum;
    }
}

template <int G, int PLANES>
BOTH void finish(const Signs& a, const Place& at, void* shared, int thread) {
    const int all = int(a.group) * PAIR, own = a.own;
    const Held<G> held = held_in<G>(a, at, shared);
    for (int i = thread; i < own * 2 * G; i += threads(G, PLANES)) {
        const int64_t place = at.rank * own + i / (2 * G), row = at.cluster * all + place, to = at.first_row + i % (2 * G);
        if (place >= all || row >= a.rows || to >= a.given.count) continue;
        float v = 0.0f;
        for (int r = 0; r < at.ranks; r++) v += held.arrived[r * own * 2 * G + i];
        write(a.out, to * a.rows + row, v * unit_of_values<PLANES>(held.row_largest[place]), a.given.bfloat16);
    }
}

// `each(phase)`: every thread of a block does `phase(thread)`, then a barrier. `previous()` waits for kernels that may still write what is
// read after it.
template <class X, int G, bool RING, class Previous, class Each>
BOTH void add_units(const Signs& a, const Place& at, void* shared, const Previous& previous, const Each& each) {
    constexpr int PLANES = PLANES_FOR<X>;
    Reads held_of;
    Feed feed = {};
    each([&](int thread) {
        if constexpr (!RING) load_first<G, PLANES>(a, at, held_of, thread);
        fetch_rest<G, PLANES>(a, at, shared, thread);
        if constexpr (RING && HELD == 1) feed = feed_of<G, PLANES>(a, at, thread);
        previous();
        // Once x is asked for, which would else come after what a ring holds.
        const auto fill_ring = [&] {
            if constexpr (RING && HELD == 1) fill<G, PLANES>(feed, a, at, held_in<G>(a, at, shared).rings, thread);
        };
        take_digits<X, G>(a, at, shared, fill_ring, thread);
        arrived<RING ? DEPTH : 0>();
    });
    each([&](int thread) {
        Reads own;  // on the host, where nothing is kept between phases
        sweep<G, PLANES, RING>(a, at, shared, HELD > 1 ? own : held_of, feed, thread);
    });
}

// Pairs of a cluster, so that clusters come in whole waves of at most `at_once`; units of a rank and of its slices.
inline void plan(Signs& a, int64_t at_once, int64_t ranks) {
    const int64_t pairs = (a.tiles + 1) / 2, waves = (pairs + at_once * MOST_PAIRS - 1) / (at_once * MOST_PAIRS);
    a.group = (pairs + at_once * waves - 1) / (at_once * waves);
    a.share = (a.units + ranks - 1) / ranks;
    a.own = int((a.group * PAIR + ranks - 1) / ranks), a.of_own = uint32_t((uint64_t(1) << 32) / uint32_t(a.own) + 1);
    a.slices = 1, a.slice_bits = 0;
    while (a.slices < SLICES && a.share > a.slices * CHUNK) a.slices *= 2, a.slice_bits++;
    a.slice = int((a.share + a.slices - 1) / a.slices);
    a.chunks = (a.slice + CHUNK - 1) / CHUNK;
}

// Half the rows of x at a time; 0 if not even two fit. And whether there is room for rings besides.
inline int rows_at_a_time(Signs& a, int64_t ranks, int64_t limit) {
    int g = a.given.count > 4 ? 4 : a.given.count > 2 ? 2 : 1;
    a.ring = 0;
    while (g > 0 && shared_bytes(g, a, ranks) > limit) g /= 2;
    if (g == 0) return 0;
    a.slots = warps(g, a.given.bfloat16 ? 2 : 3) >> a.slice_bits;
    a.ring = ring_words(g, a.given.bfloat16 ? 2 : 3);
    if (shared_bytes(g, a, ranks) > limit) a.ring = 0;
    return g;
}

inline Signs signs_of(const uint32_t* words, const uint32_t* tables, const uint32_t* kinds, const float* largest, const void* x,
                      const float* scale, void* out, int64_t rows, int64_t k, int64_t block, int64_t count, bool bfloat16) {
    Signs a = {};
    a.words = words, a.tables = tables, a.kinds = kinds, a.largest = largest;
    a.given = {x, scale, k, count, bfloat16}, a.out = out, a.rows = rows;
    a.tiles = (rows + TILE - 1) / TILE, a.units = (k + UNIT - 1) / UNIT, a.blocks = (k + block - 1) / block, a.block = block;
    a.bytes_of_words = uint32_t(a.units * 256), a.bytes_of_tables = uint32_t(a.blocks * 128);
    a.per_block = uint32_t(block / UNIT);
    a.inverse = a.per_block < 2 ? 0 : uint32_t(((uint64_t(1) << 32) + a.per_block - 1) / a.per_block);
    return a;
}

}  // namespace
