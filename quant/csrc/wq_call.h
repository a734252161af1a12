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
// MOST: columns of a product. SLICES: of 32 columns in a step, the fewest that share a scale.

// Stages of the ring: about 6 kB a warp, and with four scales a step no more than leaves room for x on devices with 99 kB.
BOTH constexpr int depth(int bits, int flushes) { return bits == 2 ? (flushes == 4 ? 10 : 12) : bits == 3 ? 8 : bits == 4 ? 6 : 4; }
BOTH constexpr int code_bytes(int bits) { return 256 * bits; }  // of a step

struct Call {
    const uint8_t *words, *ranges, *x;
    const float* input_scale;  // or null
    uint8_t* out;
    int rows, columns, groups, count;  // count: rows of x
    int tiles, steps;
    int panel;            // steps whose x is in shared memory at a time, a multiple of WARPS
    int half_ranges;      // 1: float16 scale and zero; 0: float32 scale and offset
    int half_x;           // 1: x and out are bfloat16; 0: float32
    int parts, together;  // columns that a row of x takes, rows of x that a block takes
    uint32_t reciprocal;  // of the slices of a group, times 2^32, rounded up; 0 where that is one
    int slot, stride;     // bytes: a stage of the ring, a column of x

    BOTH int columns_of(int rows_of_x) const { return rows_of_x * parts; }
    BOTH int pieces() const { return half_ranges ? 4 : 8; }  // of 16 bytes, for a group of a tile
    // Below 2^16 slices the product is exact enough.
    BOTH int group_of(int slice) const {
        const int found = reciprocal == 0 ? slice : int((uint64_t(uint32_t(slice)) * reciprocal) >> 32);
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
    c.together = c.count < MOST / c.parts ? c.count : MOST / c.parts;
    const int wide = c.columns / 32 / c.groups;
    c.reciprocal = wide == 1 ? 0u : uint32_t(((uint64_t(1) << 32) + wide - 1) / wide);
    return c;
}

// Runs of columns of a step that have a scale each.
inline int flushes_of(const Call& c) {
    const int width = c.columns / c.groups;
    return c.groups == 1 || width % 128 == 0 ? 1 : width % 64 == 0 ? 2 : 4;
}

// The least that `arranged` asks for, for all columns of a product and float32 ranges, is what any device from 8.0 on gives a block.
constexpr bool fits_anywhere(int bits, int flushes) {
    const int slot = code_bytes(bits) + flushes * 8 * 16;
    return WARPS * depth(bits, flushes) * slot + MOST * (WARPS * 2 * COLUMNS + 64) + WARPS * flushes * MOST * 4 <= 99 * 1024;
}
static_assert(fits_anywhere(2, 2) && fits_anywhere(2, 4) && fits_anywhere(3, 4) && fits_anywhere(4, 4) && fits_anywhere(8, 4));

// Divides shared memory: returns the bytes of all, of which `most` are to be had; the panel is as large as there is room for.
inline int arranged(Call& c, int bits, int flushes, int most) {
    c.slot = code_bytes(bits) + flushes * c.pieces() * 16;
    const int ring = WARPS * depth(bits, flushes) * c.slot, columns = c.columns_of(c.together);
    const int a_step = columns * 2 * COLUMNS + flushes * MOST * 4, turns = (c.steps + WARPS - 1) / WARPS;
    int fit = (most - ring - 64 * columns) / (WARPS * a_step);
    fit = fit < 1 ? 1 : fit;
    const int panels = (turns + fit - 1) / fit;
    c.panel = (turns + panels - 1) / panels * WARPS;
    // An odd number of 64 bytes: eight columns' parts of a slice lie in different banks.
    c.stride = c.panel * 2 * COLUMNS + 64;
    return ring + columns * c.stride + c.panel * flushes * MOST * 4;
}

}  // namespace fragments
