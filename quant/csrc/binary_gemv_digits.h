// What a thread block of a product with signs (binary_gemv_cuda.h) has in shared memory, and how it makes the digits of x there.

#pragma once

#include "binary_gemv_reads.h"

namespace {

// What a thread block has in shared memory, for 2 G rows of x.
template <int G>
struct Held {
    uint32_t* rings;    // [warps, DEPTH]: chunks
    uint32_t* digits;   // [units, G, 2, lanes, 4]: a byte each
    uint32_t* kinds;    // [units, 16]: 4 where a column is salient
    float* row_largest;  // [group * 16]: those of a rank's own rows
    int32_t* whole;     // [units, G, 8]: sums of the digits of x, of a unit, or of a chunk at its first unit: see parts
    float* sums;        // [slices, group * 16, 2 G]
    float* arrived;     // [ranks, rows of a rank, 2 G]: sums of the cluster's blocks
    uint32_t* largest;  // [2 G, slices * chunks]
};

ANYWHERE inline int64_t shared_bytes(int g, const Signs& a, int64_t ranks) {
    return a.ring * 4 + a.share * (g * (1024 + 32) + 64) + a.group * PAIR * 4 +
           (a.slices * a.group * PAIR + ranks * a.own + a.slices * a.chunks) * 2 * g * 4;
}

template <int G>
BOTH Held<G> held_in(const Signs& a, const Place& at, void* shared) {
    Held<G> held;
    held.rings = static_cast<uint32_t*>(shared);
    held.digits = held.rings + a.ring;
    held.kinds = held.digits + a.share * G * 256;
    held.row_largest = reinterpret_cast<float*>(held.kinds + a.share * 16);
    held.whole = reinterpret_cast<int32_t*>(held.row_largest + a.group * PAIR);
    held.sums = reinterpret_cast<float*>(held.whole + a.share * G * COLUMNS);
    held.arrived = held.sums + a.slices * a.group * PAIR * 2 * G;
    held.largest = reinterpret_cast<uint32_t*>(held.arrived + at.ranks * a.own * 2 * G);
    return held;
}

// Rows of x that there are. Of others sums are made of whatever lies there, which nobody looks at.
template <int G>
BOTH int rows_of(const Signs& a, const Place& at) {
    return lesser(int(a.given.count - at.first_row), 2 * G);
}

// In how many parts a chunk's digits of x are made: of a row or two each warp has one unit, so that none is left.
ANYWHERE constexpr int parts(int g) { return g == 1 ? CHUNK : 1; }

// A warp makes the digits of a part of a chunk of a row of x; a lane those of four columns of a unit: a register of each of four lanes.
// Infinite numbers, and what is none, count as the largest.
// asked(): what is done when the first numbers have been asked for.
template <class X, int G, class Asked>
BOTH void take_digits(const Signs& a, const Place& at, void* shared, const Asked& asked, int thread) {
    constexpr int PLANES = PLANES_FOR<X>, PARTS = parts(G);
    if (HELD > 1 && thread % 32 != 0) return;
    const Held<G> held = held_in<G>(a, at, shared);
    const int chunks = a.slices * a.chunks, rows = rows_of<G>(a, at);
    bool first_time = true;
    for (int item = warp_of(thread), m = 0;; item += warps(G, PLANES)) {
        for (; item >= chunks * PARTS; m++) item -= chunks * PARTS;
        if (m >= rows) break;
        const int part = item % PARTS, slice = slice_of(a, item / PARTS), chunk = item / PARTS >> a.slice_bits;
        const int first = slice * a.slice + chunk * CHUNK;
        const int last = lesser(units_of(a, at), lesser(first + CHUNK, (slice + 1) * a.slice));
        float v[HELD][CHUNK * 4];
        uint32_t most[HELD];
        EACH_LANE {
            // Beginning with its own.
            const int base = (first_unit(a, at) + first) * UNIT + column_of(LANE / 8 % 2 + LANE / 16 * 8, LANE % 8);
            const auto column = [&](int i) { return base + (part + i / 4) % CHUNK * UNIT + column_of(2 * (i % 4), 0); };
            read<X>(v[h], a.given, at.first_row + m, column, [&] {
                if (first_time) asked();
                first_time = false;
            });
            most[h] = 0;
            UNROLL for (int i = 0; i < CHUNK * 4; i++) {
                const uint32_t bits = first + (part + i / 4) % CHUNK < last ? bits_of(v[h][i]) & 0x7fffffffu : 0;
                most[h] = bits > most[h] ? bits : most[h];
            }
        }
        const uint32_t largest = most_of(most);
        const float by = factor_of<X_BITS>(largest);
        if (part == 0) EACH_LANE if (LANE == 0) held.largest[m * chunks + slice * a.chunks + chunk] = largest;
        int32_t whole[DIGITS][HELD] = {};
        UNROLL for (int j = 0; j < CHUNK / PARTS; j++) {
            const int unit = first + (part + j) % CHUNK;
            if (unit >= last) continue;
            EACH_LANE {
                const int step = LANE / 8, lane = LANE % 8;
                uint32_t digits[DIGITS] = {};
                UNROLL for (int b = 0; b < 4; b++) {
                    int32_t left = rounded(by == 0.0f ? 0.0f : v[h][j * 4 + b] * by);
                    UNROLL for (int d = 0; d < DIGITS; d++) {
                        const int32_t up = d == DIGITS - 1 ? 0 : (left + 64) >> 7, digit = left - up * 128;
                        digits[d] |= uint32_t(digit & 255) << 8 * b, whole[d][h] += digit, left = up;
                    }
                }
                uint32_t* to = held.digits + ((unit * G + m / 2) * 2 + step % 2) * 128 + step / 2 * 2 + lane % 2;
                UNROLL for (int d = 0; d < DIGITS; d++) to[((m % 2 * DIGITS + d) * 4 + lane / 2) * 4] = digits[d];
            }
        }
        UNROLL for (int d = 0; d < DIGITS; d++) {
            const int32_t sum = sum_of(whole[d]);
            EACH_LANE if (LANE == 0 && first + part < last) held.whole[((first + part) * G + m / 2) * COLUMNS + m % 2 * DIGITS + d] = sum;
        }
    }
    if (first_time) asked();
}

}  // namespace
