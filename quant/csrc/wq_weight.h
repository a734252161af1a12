// The weight itself, out of codes laid out as in wq_fragments.h: out [rows, columns], row after row.
//
// A warp makes a step of a tile: 16 rows of 128 columns. Its lane 4 g + t has 8 neighbours of the rows g and g + 8 of each slice of 32
// columns. Lanes of an even and an odd g exchange slices first where a number takes two bytes, so that what a warp stores at once are whole
// lines of 128 bytes.

#pragma once

#include "wq_fragments.h"

namespace fragments {

constexpr bool LINES = true;  // exchange slices

// Of a lane, or 32 of them: a step's codes, what they are scaled with, and two slices of two rows as they are stored.
template <int BITS>
struct Step {
    uint32_t w[2 * BITS];
    float scale[SLICES][2], offset[SLICES][2];
    uint32_t made[2][2][4];
};

template <class P, int BITS>
BOTH void read_step(P& p, const Call& call, typename P::template Of<Step<BITS>>& state, int t, int step) {
    p.lanes([&](int lane) {
        Step<BITS>& s = P::at(state, lane);
        const uint8_t* from = call.words + (int64_t(t) * call.steps + step) * code_bytes(BITS);
        if constexpr (BITS == 3) {
            P::read16(s.w, from + 16 * lane);
            P::read8(s.w + 4, from + 512 + 8 * lane);
        } else {
            UNROLLED for (int l = 0; l < BITS / 2; l++) P::read16(s.w + 4 * l, from + 512 * l + 16 * lane);
        }
        UNROLLED for (int q = 0; q < SLICES; q++) {
            const uint8_t* ranges = call.ranges + (int64_t(t) * call.groups + call.group_of(step * SLICES + q)) * call.group_bytes;
            if (call.half_ranges)
                half_ranges<P>(s.scale[q], s.offset[q], ranges + lane / 4 * 8);
            else
                ranges_of<P>(s.scale[q], s.offset[q], ranges + lane / 4 * 16);
        }
    });
}

// 8 neighbours of row g + 8 i.
template <class P, int BITS, int Q>
BOTH void made_of(const Step<BITS>& s, int i, float* v) {
    const uint32_t pairs[8] = {pair<P, BITS, 8 * Q>(s.w),     pair<P, BITS, 8 * Q + 2>(s.w), pair<P, BITS, 8 * Q + 4>(s.w),
                               pair<P, BITS, 8 * Q + 6>(s.w), pair<P, BITS, 8 * Q + 1>(s.w), pair<P, BITS, 8 * Q + 3>(s.w),
                               pair<P, BITS, 8 * Q + 5>(s.w), pair<P, BITS, 8 * Q + 7>(s.w)};
    UNROLLED for (int j = 0; j < 4; j++) {
        v[2 * j] = P::fma(float_of(pairs[4 * i + j] << 16), s.scale[Q][i], s.offset[Q][i]);
        v[2 * j + 1] = P::fma(float_of(pairs[4 * i + j] & 0xffff0000u), s.scale[Q][i], s.offset[Q][i]);
    }
}

template <class P, int BITS, int Q>
BOTH void write_floats(const Call& call, const Step<BITS>& s, int t, int step, int lane) {
    const int column = step * COLUMNS + 32 * Q;
    if (column >= call.columns) return;
    UNROLLED for (int i = 0; i < 2; i++) {
        const int n = t * ROWS + lane / 4 + 8 * i;
        float v[8];
        made_of<P, BITS, Q>(s, i, v);
        if (n < call.rows) P::store_floats(call.out + 4 * (int64_t(n) * call.columns + column + lane % 4 * 8), v);
    }
}

// Slices Q and Q + 1, of 16-bit numbers.
template <class P, int BITS, int KIND, int Q>
BOTH void write_halves(P& p, const Call& call, typename P::template Of<Step<BITS>>& state, int t, int step) {
    p.lanes([&](int lane) {
        Step<BITS>& s = P::at(state, lane);
        float v[8];
        UNROLLED for (int i = 0; i < 2; i++) {
            made_of<P, BITS, Q>(s, i, v);
            P::template pack8<KIND>(s.made[0][i], v);
            made_of<P, BITS, Q + 1>(s, i, v);
            P::template pack8<KIND>(s.made[1][i], v);
        }
    });
    // made[a] of lane b ▸ made[b] of lane a; which of two a lane is stands in bit 2 of its number.
    if constexpr (LINES) P::exchange(state);
    p.lanes([&](int lane) {
        Step<BITS>& s = P::at(state, lane);
        UNROLLED for (int a = 0; a < 2; a++) UNROLLED for (int i = 0; i < 2; i++) {
            const int n = t * ROWS + 8 * i + (LINES ? lane / 8 * 2 + a : lane / 4);
            const int column = step * COLUMNS + 32 * (Q + (LINES ? lane / 4 % 2 : a));
            if (n < call.rows && column < call.columns)
                P::store16(call.out + 2 * (int64_t(n) * call.columns + column + lane % 4 * 8), s.made[a][i]);
        }
    });
}

// KIND: 0 float32, 1 bfloat16, 2 float16.
template <class P, int BITS, int KIND>
BOTH void write_step(P& p, const Call& call, typename P::template Of<Step<BITS>>& state, int t, int step) {
    if constexpr (KIND == 0) {
        p.lanes([&](int lane) {
            const Step<BITS>& s = P::at(state, lane);
            write_floats<P, BITS, 0>(call, s, t, step, lane);
            write_floats<P, BITS, 1>(call, s, t, step, lane);
            write_floats<P, BITS, 2>(call, s, t, step, lane);
            write_floats<P, BITS, 3>(call, s, t, step, lane);
        });
    } else {
        write_halves<P, BITS, KIND, 0>(p, call, state, t, step);
        write_halves<P, BITS, KIND, 2>(p, call, state, t, step);
    }
}

}  // namespace fragments
