// How warps of a product with signs (binary_gemv_cuda.h) get their units of the weight: into registers, a chunk ahead, or, where there is
// room, through rings in shared memory, some chunks ahead, that run on from pair to pair and from chunk to chunk.

#pragma once

#include "binary_gemv_warp.h"

namespace {

constexpr int TILE = 8, PAIR = 2 * TILE, UNIT = 128;  // rows of a tile and of a matrix; columns
constexpr int SLICES = 8;  // at most
ANYWHERE constexpr int warps(int g, int planes) { return g <= 2 && planes == 2 ? 16 : 8; }  // more sums take more registers
constexpr int CHUNK = 4;  // units at a time, which a sum in 32 bits can hold: 255 * 64 * 129 * 128 * 4 < 2^31
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
    int own;             // rows of a cluster whose sums a rank adds up
    uint32_t of_own;     // 2^32 / own, rounded up
    int slices;          // of a share: warps side by side
    int slice_bits;      // of their number, a power of two
    int slice;           // units of a slice
    int chunks;          // of a slice
    int slots;           // how far it is from a warp's pair to its next
    int64_t ring;        // words of a thread block's rings; 0: units come into registers
    uint32_t bytes_of_words, bytes_of_tables;  // of a tile
};

// unit / per_block, for fewer than 2^16 units.
BOTH uint32_t block_of(const Signs& a, uint32_t unit) { return a.per_block == 1 ? unit : uint32_t(uint64_t(unit) * a.inverse >> 32); }
// In 32 bits, of which a thread has fewer to do.
BOTH int lesser(int a, int b) { return a < b ? a : b; }
BOTH int first_unit(const Signs& a, const Place& at) { return lesser(int(a.units), at.rank * int(a.share)); }
BOTH int units_of(const Signs& a, const Place& at) { return lesser(int(a.units) - first_unit(a, at), int(a.share)); }
BOTH int slice_of(const Signs& a, int warp) { return warp & (a.slices - 1); }
BOTH int slot_of(const Signs& a, int warp) { return warp >> a.slice_bits; }
BOTH int pairs_of(const Signs& a, const Place& at) {
    return lesser(int(a.group), (int(a.tiles) + 1) / 2 - int(at.cluster) * int(a.group));
}

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
    const int warp = warp_of(thread), first = slice_of(a, warp) * a.slice, slot = slot_of(a, warp);
    const int count = lesser(units_of(a, at), first + a.slice) - first;
    if (slot >= pairs_of(a, at)) return;
    const uint32_t unit = uint32_t(first_unit(a, at)) + first;
    const Source source = source_of(a, at, slot, unit, thread % 32);
    UNROLL for (int u = 0; u < CHUNK; u++)
        if (u < count) load<PLANES>(held_of.read[u][0], a, source, u, block_of(a, unit + u) * 32);
}

// A chunk in a warp's ring, in words: of each of its units those of both tiles; then, of its halves and in them of each tile, digits of two
// units' values, the highest two; then the others.
ANYWHERE constexpr int ring_chunk(int planes) { return CHUNK * 128 + (planes - 1) * CHUNK * 64; }
constexpr int DEPTH = 2;  // chunks: one is multiplied, the others are on their way
ANYWHERE constexpr bool has_ring(int g) { return g <= 2; }  // sums of more rows of x leave less room
ANYWHERE constexpr int ring_words(int g, int planes) { return has_ring(g) ? warps(g, planes) * DEPTH * ring_chunk(planes) : 0; }

// What comes into a warp's ring next: of a pair, units of a chunk.
struct Feed {
    int pairs;  // the last one's end
    int chunk, pair;
    int count;            // units; 0: nothing is left
    int tile[HELD];       // of a lane: the first 16 copy one, the others the next
    const char* words[HELD];  // what a lane copies of tile 0
    const char* tables[HELD];
    uint32_t further[HELD];  // bytes to those of the other half's units
};

template <int G, int PLANES>
BOTH void begin_chunk(Feed& feed, const Signs& a, const Place& at, int thread) {
    const int warp = warp_of(thread), slice = slice_of(a, warp);
    const int left = lesser(units_of(a, at), (slice + 1) * a.slice) - feed.chunk;
    feed.pair = slot_of(a, warp);
    feed.count = feed.pair >= feed.pairs || left < 0 ? 0 : left < CHUNK ? left : CHUNK;
    const uint32_t unit = uint32_t(first_unit(a, at)) + feed.chunk;
    EACH_LANE {
        const int lane = LANE;
        const uint32_t own = unit + lane / 8 % 2, block = block_of(a, own);
        feed.tile[h] = 2 * (int(at.cluster) * int(a.group) + feed.pair) + lane / 16;
        feed.words[h] = reinterpret_cast<const char*>(a.words) + (uint64_t(unit) * 256 + lane % 16 * 16);
        feed.tables[h] = reinterpret_cast<const char*>(a.tables) + (uint64_t(block) * 128 + lane % 8 * 16);
        feed.further[h] = (block_of(a, own + CHUNK / 2) - block) * 128;
    }
}

template <int G, int PLANES>
BOTH Feed feed_of(const Signs& a, const Place& at, int thread) {
    Feed feed = {};
    feed.pairs = pairs_of(a, at);
    feed.chunk = slice_of(a, warp_of(thread)) * a.slice;
    begin_chunk<G, PLANES>(feed, a, at, thread);
    return feed;
}

template <int G, int PLANES>
BOTH void advance(Feed& feed, const Signs& a, const Place& at, int thread) {
    feed.pair += a.slots;
    EACH_LANE feed.tile[h] += 2 * a.slots;
    if (feed.pair < feed.pairs) return;
    feed.chunk += CHUNK;
    begin_chunk<G, PLANES>(feed, a, at, thread);
}

// Starts to copy what comes next.
template <int PLANES>
BOTH void copy_next(const Feed& feed, const Signs& a, uint32_t* ring, int thread) {
    EACH_LANE {
        const int last = int(a.tiles) - 1, lane = LANE;
        const uint32_t tile = uint32_t(feed.tile[h] < last ? feed.tile[h] : last);  // rows that are not there are not written
        uint32_t* to = ring + lane * 4;
        const char *words = feed.words[h] + uint64_t(tile) * a.bytes_of_words, *high = feed.tables[h] + uint64_t(tile) * a.bytes_of_tables;
        const auto copy = [&](int place, const char* from) { send<4>(to + place, reinterpret_cast<const uint32_t*>(from)); };
        const auto copy_digits = [&](int half) {
            const char* from = half == 0 ? high : high + feed.further[h];
            copy(CHUNK * 128 + half * 128, from);
            if constexpr (PLANES == 3) copy(CHUNK * 192 + half * 128, from + uint64_t(a.tiles) * a.bytes_of_tables);
        };
        if (feed.count == CHUNK) {
            UNROLL for (int u = 0; u < CHUNK; u++) copy(u * 128, words + u * 256);
            UNROLL for (int half = 0; half < 2; half++) copy_digits(half);
        } else {
            UNROLL for (int u = 0; u < CHUNK - 1; u++)
                if (u < feed.count) copy(u * 128, words + u * 256);
            UNROLL for (int half = 0; half < 2; half++)
                if (half * 2 + lane / 8 % 2 < feed.count) copy_digits(half);
        }
    }
    sent();
}

template <int PLANES>
BOTH uint32_t* ring_of(uint32_t* rings, int warp) {
    return rings + warp * DEPTH * ring_chunk(PLANES);
}

// A warp's next chunks, into all places of its ring.
template <int G, int PLANES>
BOTH void fill(Feed& feed, const Signs& a, const Place& at, uint32_t* rings, int thread) {
    uint32_t* ring = ring_of<PLANES>(rings, warp_of(thread));
    NO_UNROLL for (int i = 0; i < DEPTH; i++, ring += ring_chunk(PLANES)) {
        copy_next<PLANES>(feed, a, ring, thread);
        advance<G, PLANES>(feed, a, at, thread);
    }
}

// Unit u of a chunk that has arrived.
template <int PLANES>
BOTH void take(Read (&read)[HELD], const uint32_t* from, int u, int thread) {
    EACH_LANE UNROLL for (int r = 0; r < 2; r++) {
        const uint32_t* high = from + LANE / 4 * 4 + CHUNK * 128 + u / 2 * 128 + r * 64 + u % 2 * 32;
        read[h].words[r] = *reinterpret_cast<const Line<2>*>(from + LANE * 2 + u * 128 + r * 64);
        read[h].high[r] = *reinterpret_cast<const Line<4>*>(high);
        if constexpr (PLANES == 3) read[h].third[r] = *reinterpret_cast<const Line<2>*>(high + CHUNK * 64);
    }
}

}  // namespace
