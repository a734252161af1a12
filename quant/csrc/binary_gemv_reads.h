// How warps of a product with signs (binary_gemv_cuda.h) get their units of the weight: into registers, a chunk ahead, or, where there is room,
// through rings in shared memory, some chunks ahead, that run on from pair to pair and from chunk to chunk.

#pragma once

#include "binary_gemv_warp.h"

namespace {

constexpr int TILE = 8, PAIR = 2 * TILE, UNIT = 128;  // rows of a tile and of a matrix; columns
constexpr int SLICES = 8;  // at most
ANYWHERE constexpr int warps(int g, int planes) { return g <= 2 && planes == 2 ? 16 : 8; }  // more sums take more registers
constexpr int CHUNK = 4;  // units at a time, which a sum in 32 bits can hold: 255 * 64 * 129 * 128 * 4 < 2^31
constexpr int AHEAD = CHUNK;  // units of a warp that are on their way while digits of x are made
ANYWHERE constexpr int threads(int g, int planes) { return 32 * warps(g, planes); }
constexpr int COLUMNS = 8;      // of a matrix product: digits of two rows of x
constexpr int MOST_PAIRS = 40;

struct Signs {
    const uint32_t* words;   // [T, units, 8, 8]
    const uint32_t* tables;  // [2, T, blocks, 8, 4]
    const uint32_t* kinds;   // [units, 16]
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
    int chunks;          // of a slice
    int64_t ring;        // words of a thread block's rings; 0: units come into registers
};

// unit / per_block, for fewer than 2^16 units.
BOTH uint32_t block_of(const Signs& a, uint32_t unit) { return a.per_block == 1 ? unit : uint32_t(uint64_t(unit) * a.inverse >> 32); }
BOTH int64_t first_unit(const Signs& a, const Place& at) { return least(a.units, at.rank * a.share); }
BOTH int units_of(const Signs& a, const Place& at) { return int(least(a.units - first_unit(a, at), a.share)); }
BOTH int pairs_of(const Signs& a, const Place& at) { return int(least(a.group, (a.tiles + 1) / 2 - at.cluster * a.group)); }

// What a warp has on its way: of a pair, a chunk.
struct Reads {
    Read read[CHUNK][HELD];
};

// Where a lane reads: row g of each tile of a pair.
struct Source {
    const uint32_t *words[2], *tables[2];
};

// Numbers of tiles and units of a weight have 32 bits, and so has their product.
BOTH Source source_of(const Signs& a, const Place& at, int pair, uint32_t unit, int lane) {
    const int tile = 2 * (int(at.cluster) * int(a.group) + pair), last = int(a.tiles) - 1;
    const int second = tile < last ? tile + 1 : last;  // rows that are not there are not written
    const auto words = [&](int t) { return a.words + uint64_t(uint32_t(t) * uint32_t(a.units) + unit) * 64 + uint32_t(lane * 2); };
    const auto tables = [&](int t) { return a.tables + uint64_t(uint32_t(t) * uint32_t(a.blocks)) * 32 + uint32_t(lane / 4 * 4); };
    return {{words(tile), words(second)}, {tables(tile), tables(second)}};
}

// Unit u of a chunk.
template <int PLANES>
BOTH void load(Read& to, const Signs& a, const Source& from, int u, uint32_t values_at) {
    UNROLL for (int r = 0; r < 2; r++) {
        to.words[r] = stream_line<2>(from.words[r] + u * 64), to.high[r] = stream_line<4>(from.tables[r] + values_at);
        if constexpr (PLANES == 3) to.third[r] = stream_line<2>(from.tables[r] + a.tiles * a.blocks * 32 + values_at);
    }
}

// A warp's first units.
template <int G, int PLANES>
BOTH void load_first(const Signs& a, const Place& at, Reads& held_of, int thread) {
    if (HELD > 1) return;
    const int warp = warp_of(thread), first = warp % a.slices * a.slice, slot = warp / a.slices;
    const int count = int(least(units_of(a, at), first + a.slice)) - first;
    if (slot >= pairs_of(a, at)) return;
    const uint32_t unit = uint32_t(first_unit(a, at)) + first;
    const Source source = source_of(a, at, slot, unit, thread % 32);
    UNROLL for (int u = 0; u < AHEAD; u++)
        if (u < count) load<PLANES>(held_of.read[u][0], a, source, u, block_of(a, unit + u) * 32);
}

constexpr int HALF = CHUNK / 2;  // units that lanes copy to a ring at a time

// In words: of each of its units those of both tiles; of each tile digits of both units' values, the highest, then the others.
ANYWHERE constexpr int half_words(int planes) { return HALF * 128 + (planes - 1) * HALF * 64; }
// Chunks that a ring holds.
ANYWHERE constexpr int depth(int g, int planes) { return g == 1 && planes == 2 ? 3 : 2; }
ANYWHERE constexpr int ring_words(int g, int planes) { return warps(g, planes) * depth(g, planes) * 2 * half_words(planes); }

// What comes into a warp's ring next: of a pair, units of a chunk.
struct Feed {
    int slot, slots, pairs, last;  // the warp's first pair, how far it is to the next, and ends
    int chunk, pair;
    int count;                // units; 0: nothing is left
    uint32_t unit;            // the first, of the weight
    uint32_t block[2][HELD];  // of the units of a half whose tables a lane copies
};

BOTH void begin_chunk(Feed& feed, const Signs& a, const Place& at, int thread) {
    const int left = feed.last - feed.chunk;
    feed.pair = feed.slot, feed.count = feed.slot >= feed.pairs || left < 0 ? 0 : left < CHUNK ? left : CHUNK;
    feed.unit = uint32_t(first_unit(a, at)) + feed.chunk;
    EACH_LANE UNROLL for (int half = 0; half < 2; half++) feed.block[half][h] = block_of(a, feed.unit + half * HALF + LANE / 8 % HALF);
}

template <int G, int PLANES>
BOTH Feed feed_of(const Signs& a, const Place& at, int thread) {
    const int warp = warp_of(thread), first = warp % a.slices * a.slice;
    Feed feed = {warp / a.slices, warps(G, PLANES) / a.slices, pairs_of(a, at), int(least(units_of(a, at), first + a.slice)), first};
    begin_chunk(feed, a, at, thread);
    return feed;
}

BOTH void advance(Feed& feed, const Signs& a, const Place& at, int thread) {
    feed.pair += feed.slots;
    if (feed.pair < feed.pairs) return;
    feed.chunk += CHUNK;
    begin_chunk(feed, a, at, thread);
}

// Starts to copy half of what comes next.
template <int PLANES>
BOTH void copy_half(const Feed& feed, const Signs& a, const Place& at, uint32_t* to, int half, int thread) {
    EACH_LANE {
        int tile = 2 * (int(at.cluster) * int(a.group) + feed.pair) + LANE / 16;
        tile = tile < int(a.tiles) ? tile : int(a.tiles) - 1;  // rows that are not there are not written
        const int first = half * HALF, lane = LANE;
        const uint32_t* words = a.words + uint64_t(uint32_t(tile) * uint32_t(a.units) + feed.unit + first) * 64 + lane % 16 * 4;
        UNROLL for (int u = 0; u < HALF; u++)
            if (first + u < feed.count) send<4>(to + u * 128 + lane * 4, words + u * 64);
        const uint32_t* high = a.tables + uint64_t(uint32_t(tile) * uint32_t(a.blocks) + feed.block[half][h]) * 32 + lane % 8 * 4;
        if (first + lane / 8 % HALF < feed.count) {
            send<4>(to + HALF * 128 + lane * 4, high);
            if constexpr (PLANES == 3) send<4>(to + HALF * 192 + lane * 4, high + a.tiles * a.blocks * 32);
        }
    }
    sent();
}

// A warp's first chunks.
template <int G, int PLANES>
BOTH void fill(const Signs& a, const Place& at, uint32_t* rings, int thread) {
    if (HELD > 1 && thread % 32 != 0) return;
    uint32_t* to = rings + warp_of(thread) * depth(G, PLANES) * 2 * half_words(PLANES);
    Feed feed = feed_of<G, PLANES>(a, at, thread);
    UNROLL for (int i = 0; i < 2 * depth(G, PLANES); i++) {
        copy_half<PLANES>(feed, a, at, to + i * half_words(PLANES), i % 2, thread);
        if (i % 2 == 1) advance(feed, a, at, thread);
    }
}

// Units of a half that has arrived.
template <int PLANES>
BOTH void take_half(Read (&read)[HALF][HELD], const uint32_t* from, int thread) {
    EACH_LANE UNROLL for (int u = 0; u < HALF; u++) UNROLL for (int r = 0; r < 2; r++) {
        const uint32_t* high = from + HALF * 128 + r * HALF * 32 + u * 32 + LANE / 4 * 4;
        read[u][h].words[r] = *reinterpret_cast<const Line<2>*>(from + u * 128 + r * 64 + LANE * 2);
        read[u][h].high[r] = *reinterpret_cast<const Line<4>*>(high);
        if constexpr (PLANES == 3) read[u][h].third[r] = *reinterpret_cast<const Line<2>*>(high + HALF * 64);
    }
}

}  // namespace
