// One row of x by a block on each multiprocessor, in operands of bfloat16: how a warp multiplies a step (wq_alone.h).

#pragma once

#include "wq_alone.h"
#include "wq_balanced.h"

namespace fragments {

// Stages of a warp's ring: as many as fit beside x of 11008 columns; and those on their way at a time at first, as is measured to be
// fastest.
BOTH constexpr int deep_floats(int bits, bool half) { return bits == 3 ? 3 : half ? 5 : 4; }
BOTH constexpr int metered_floats(int bits, bool half) { return bits == 3 ? 1 : deep_floats(bits, half); }

template <int BITS, bool HALF>
using OfFloats = Divided<BITS, HALF, BITS == 3 ? 2 : 1, deep_floats(BITS, HALF), metered_floats(BITS, HALF), 2 * COLUMNS, ENTRY, 1>;

template <int BITS>
struct Both : Numbers<BITS>, Copied<BITS == 3 ? 2 : 1> {};

template <class P, int BITS, bool HALF>
struct Floats : Balanced<Floats<P, BITS, HALF>, P, OfFloats<BITS, HALF>, Both<BITS>> {
    using A = OfFloats<BITS, HALF>;
    using Row = Alone<P, BITS, HALF>;
    using S = Both<BITS>;
    using Base = Balanced<Floats, P, A, S>;
    using Base::Base, Base::call, Base::memory, Base::now, Base::number, Base::state;

    // x of eight steps, zeros after its end, and their sums; by each warp those that are its by its number.
    BOTH void begin(P& p) {
        for (int base = MOST * number; base < call.steps; base += MOST * TEAMS * WARPS) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                const int step = base + lane / 4;
                Row::read_x(s, call, step * COLUMNS + lane % 4 * 8);
                if (step < call.steps) Row::store_x(s, memory + A::GIVEN_AT + step * A::GIVEN, lane);
            });
            Row::add_up(state);
            p.lanes([&](int lane) {
                const int step = base + 2 * lane;
                if (lane < 4 && step < call.steps) Row::store_entries(P::at(state, lane), memory + A::table_at(call) + step * A::ENTRY);
            });
        }
    }

    // The step in the stage `now`; its x, and its entry of the table.
    BOTH void use(P& p, const uint8_t* x, const uint8_t* entry) {
        const uint8_t* stage = memory + now;
        UNROLLED for (int r = 0; r < A::R; r++) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                Row::load(s, stage + r * A::CODES, stage + A::RANGES_AT + r * A::RANGES, lane);
                if (r == 0) Row::load_x(s, x, lane);
            });
            Row::products(p, state);
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                Row::add(s, s.sums[r], entry);
            });
        }
    }
};

}  // namespace fragments
