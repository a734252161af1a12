// One row of x by blocks of a tile each, of 4 bits, whose steps are all on their way before the first is used: what a warp does
// (wq_alone.h). So few registers are taken that three blocks are on a multiprocessor: some may be the next product's, which fetch their
// codes while this one is multiplied.

#pragma once

#include "wq_alone.h"

namespace fragments {

constexpr int BLOCKS_ALONE = 3;  // that share the 228 kB of a multiprocessor

template <bool HALF>
struct Arranged {
    static constexpr int BITS = 4, CODES = code_bytes(BITS), RANGES = ROWS * (HALF ? 4 : 8), GIVEN_AT = CODES + RANGES;
    static constexpr int DEPTH = 6, STAGE = GIVEN_AT + 2 * COLUMNS, TABLE_AT = DEPTH * STAGE;
    static_assert(DEPTH <= MOST);

    // Of a warp: stages of all its steps, and their entries.
    static constexpr int APART = TABLE_AT + ENTRY * MOST;
    static bool holds(const Call& c) { return c.steps <= DEPTH * WARPS; }
};

template <class P, bool HALF>
struct Single : Arranged<HALF> {
    using A = Arranged<HALF>;
    using Row = Alone<P, A::BITS, HALF>;
    struct S : Numbers<A::BITS> {
        float sums[2];  // rows g and g + 8 of lane 4 g + t
    };

    const Call& call;
    uint8_t* own;  // of the block's memory
    int warp, tile;
    typename P::template Of<S> state;

    BOTH Single(const Call& c, uint8_t* memory, int w, int tile_of) : call(c), own(memory + w * A::APART), warp(w), tile(tile_of) {}

    // No more than METER stages are on their way at first, or x comes after them.
    BOTH void open(P& p) {
        constexpr int METER = 2;
        UNROLLED for (int i = 0; i < A::DEPTH; i++) {
            if (i >= METER) p.template arrived<METER - 1>();
            const int step = warp + i * WARPS;
            if (step < call.steps)
                p.lanes([&](int lane) {
                    const uint8_t* words = call.words + (int64_t(tile) * call.steps + step) * A::CODES + 16 * lane;
                    const uint8_t* ranges =
                        call.ranges + (int64_t(tile) * call.groups + call.group_of(SLICES * step)) * A::RANGES + 16 * lane;
                    uint8_t* to = own + i * A::STAGE + 16 * lane;
                    UNROLLED for (int l = 0; l < 2; l++) p.fetch16(to + 512 * l, words + 512 * l, true);
                    p.fetch16(to + A::CODES, ranges, 16 * lane < A::RANGES);
                });
            p.commit();
        }
    }

    // x of all of the warp's steps, and its sums.
    BOTH void begin(P& p) {
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            Row::read_x(s, call, (warp + lane / 4 * WARPS) * COLUMNS + lane % 4 * 8);
            if (lane / 4 < A::DEPTH) Row::store_x(s, own + lane / 4 * A::STAGE + A::GIVEN_AT, lane);
        });
        Row::add_up(state);
        p.lanes([&](int lane) {
            if (lane < 4) Row::store_entries(P::at(state, lane), own + A::TABLE_AT + 2 * lane * ENTRY);
        });
    }

    BOTH void over(P& p) {
        p.lanes([&](int lane) { P::at(state, lane).sums[0] = P::at(state, lane).sums[1] = 0.f; });
        const uint8_t *stage = own, *entry = own + A::TABLE_AT;
        for (int step = warp; step < call.steps; step += WARPS, stage += A::STAGE, entry += ENTRY) {
            p.template arrived<A::DEPTH - 1>();
            p.commit();
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                Row::load(s, stage, stage + A::CODES, lane);
                Row::load_x(s, stage + A::GIVEN_AT, lane);
            });
            Row::products(p, state);
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                Row::add(s, s.sums, entry);
            });
        }
    }

    // The warp's sums into its own memory, which is free by then.
    BOTH void close(P& p) {
        p.template arrived<0>();
        p.lanes([&](int lane) {
            float* to = reinterpret_cast<float*>(own) + lane / 4;
            const S& s = P::at(state, lane);
            if (lane % 4 == 0) to[0] = s.sums[0], to[8] = s.sums[1];
        });
    }

    // Sums of all warps into out; by the first.
    BOTH void finish(P& p) {
        if (warp != 0) return;
        p.lanes([&](int lane) {
            const int n = tile * ROWS + lane;
            if (lane < ROWS && n < call.rows) store_row<P, WARPS>(call, n, own + 4 * lane, A::APART);
        });
    }
};

}  // namespace fragments
