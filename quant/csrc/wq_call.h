// A product of packed codes as its kernels get it: addresses, counts, and how a block divides its shared memory. See wq_fragments.h.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define BOTH __host__ __device__ __forceinline__
#define UNROLLED _Pragma("unroll")
#else
#define BOTH inline
#define UNROLLED
#endif

namespace fragments {

constexpr int ROWS = 16, COLUMNS = 128, SLICES = 4, WARPS = 8, LANES = 32, MOST = 8;
// MOST: columns of a product. SLICES: of 32 columns in a step, the fewest that share a scale. WARPS: that share the steps of a row; a block
// has C times as many where C warps are a team (wq_fragments.h).

BOTH constexpr int code_bytes(int bits) { return 256 * bits; }  // of a step

// Stages of a warp's ring, of R tiles: with all but one on their way, 4 to 8 kB of codes; where much x leaves no room for them, 2 to 4 kB;
// where even that does not fit, 2 stages. Of teams, what 16 warps find room for in 227 kB.
BOTH constexpr int deep(int bits, int r, int c = 1) {
    if (c == 2) return r == 1 ? (bits == 2 ? 5 : bits == 8 ? 3 : 4) : bits == 2 ? 4 : bits == 8 ? 2 : 3;
    return bits == 2   ? (r == 1 ? 8 : r == 2 ? 6 : 4)
           : bits == 3 ? (r == 1 ? 8 : r == 2 ? 5 : 3)
           : bits == 4 ? (r == 1 ? 7 : r == 2 ? 4 : 3)
                       : (r == 1 ? 4 : 3);
}
BOTH constexpr int middle(int bits, int r, int c = 1) {
    if (c == 2) return r == 1 && bits != 8 ? 3 : 2;
    return bits == 2   ? (r == 1 ? 5 : r == 2 ? 4 : 3)
           : bits == 3 ? (r == 1 ? 5 : r == 2 ? 3 : 2)
           : bits == 4 ? (r == 1 ? 4 : r == 2 ? 3 : 2)
                       : (r == 1 ? 3 : 2);
}

struct Call {
    const uint8_t *words, *ranges, *x;
    const float* input_scale;  // or null
    uint8_t* out;
    int rows, columns, groups, count;  // count: rows of x
    int tiles, steps;
    int half_ranges;      // 1: float16 scale and zero; 0: float32 scale and offset
    int half_x;           // 1: x and out are bfloat16; 0: float32
    int parts, own, together;  // columns that a row of x takes; rows of x that a warp copies, and that a block takes
    int group_bytes;      // ranges of a group of a tile
    uint32_t reciprocal;  // of twice the slices of a group, times 2^32, rounded up
    int depth;            // stages of a warp's ring
    int slot, apart;      // bytes: a stage; what a warp has of shared memory
    int given_at;         // where a stage has x

    BOTH int pieces() const { return half_ranges ? 4 : 8; }  // of 16 bytes, for a group of a tile
    // Bytes of a step of x and the input scale, as they are given.
    BOTH int given_bytes() const { return own * (half_x ? 2 : 4) * COLUMNS + (input_scale != nullptr ? 4 * COLUMNS : 0); }
    // Below 2^16 slices the product is exact enough.
    BOTH int group_of(int slice) const {
        const int found = int((uint64_t(uint32_t(2 * slice)) * reciprocal) >> 32);
        return found < groups ? found : groups - 1;
    }
};

// A call as the entries get it: addresses and counts.
inline Call described(int64_t words, int64_t ranges, int64_t x, int64_t input_scale, int64_t out, int64_t rows, int64_t columns,
                    int64_t groups, int64_t count, int64_t half_ranges, int64_t half_x) {
    Call c = {};
    c.words = reinterpret_cast<const uint8_t*>(words), c.ranges = reinterpret_cast<const uint8_t*>(ranges);
    c.x = reinterpret_cast<const uint8_t*>(x), c.input_scale = reinterpret_cast<const float*>(input_scale);
    c.out = reinterpret_cast<uint8_t*>(out);
    c.rows = int(rows), c.columns = int(columns), c.groups = int(groups), c.count = int(count);
    c.tiles = (c.rows + ROWS - 1) / ROWS, c.steps = (c.columns + COLUMNS - 1) / COLUMNS;
    c.half_ranges = int(half_ranges), c.half_x = int(half_x);
    c.parts = half_x && input_scale == 0 ? 1 : 3;
    c.own = c.together = c.count < MOST / c.parts ? c.count : MOST / c.parts;
    const int twice = 2 * (c.columns / 32 / c.groups);
    c.reciprocal = uint32_t(((uint64_t(1) << 32) + twice - 1) / twice), c.group_bytes = 16 * c.pieces();
    return c;
}

// The same call for blocks of teams of `teams` warps.
inline Call by_teams(Call c, int teams) {
    if (teams == 1) return c;
    c.own = MOST / c.parts, c.together = c.count < teams * c.own ? c.count : teams * c.own;
    return c;
}

// Runs of columns of a step that have a scale each.
inline int flushes_of(const Call& c) {
    const int width = c.columns / c.groups;
    return c.groups == 1 || width % 128 == 0 ? 1 : width % 64 == 0 ? 2 : 4;
}

// Bytes of a stage, and of what a warp has besides: three columns for a row of x that is no column itself.
BOTH constexpr int stage_bytes(int bits, int r, int flushes, int pieces, int given) {
    return r * (code_bytes(bits) + flushes * pieces * 16) + given;
}
BOTH constexpr int made_bytes(int parts, int rows) { return parts == 1 ? 0 : parts * rows * 2 * COLUMNS; }

// The least that `arranged` asks for with one tile a block, of float32 ranges and as much x as a block takes: what any device from 8.0 on
// gives a block.
constexpr bool fits_anywhere(int bits) {
    return WARPS * 2 * stage_bytes(bits, 1, 4, 8, MOST * 2 * COLUMNS) <= 99 * 1024 &&
           WARPS * (2 * stage_bytes(bits, 1, 4, 8, 2 * 4 * COLUMNS + 4 * COLUMNS) + made_bytes(3, 2)) <= 99 * 1024;
}
static_assert(fits_anywhere(2) && fits_anywhere(3) && fits_anywhere(4) && fits_anywhere(8));

// Divides shared memory among warps: returns the bytes of all; rings are as deep as fits `most`.
inline int arranged(Call& c, int bits, int r, int flushes, int most, int teams = 1) {
    const int made = made_bytes(c.parts, c.own);
    c.given_at = stage_bytes(bits, r, flushes, c.pieces(), 0), c.slot = c.given_at + c.given_bytes();
    const int depths[] = {deep(bits, r, teams), middle(bits, r, teams), 2};
    for (const int depth : depths) {
        c.depth = depth, c.apart = depth * c.slot + made;
        if (WARPS * teams * c.apart <= most) break;
    }
    return WARPS * teams * c.apart;
}

}  // namespace fragments
