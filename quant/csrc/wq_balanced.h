// One row of x of bfloat16 by blocks of which each multiprocessor has one: what a warp does, but for how steps are multiplied (wq_floats.h,
// wq_whole.h).
//
// A block has half of a multiprocessor's shared memory (but for the longest rows of 2 bits: wq_whole.h); the other half is the next
// product's, whose block fetches its first codes while this one is multiplied. So each multiprocessor has its share of both. A block has
// two teams of eight warps, which divide the steps of a tile as everywhere; a team's tiles follow one another without a gap in the rings of
// its warps. x is in shared memory once for all of them.

#pragma once

#include "wq_alone.h"

namespace fragments {

constexpr int TEAMS = 2;

// Bytes of shared memory: rings of stages of some tiles, x, the table, and what each warp has for the rows of each of its tiles. Of a step,
// x takes GIVEN bytes, and the table ENTRY; a warp has SUMS for a row. METER: stages of a warp that are on their way at a time while its
// ring is first filled: with more, x, and the codes of the product before, wait for them.
template <int BITS_OF, bool HALF, int TILES, int STAGES, int METER_OF, int GIVEN_BYTES, int ENTRY_BYTES, int SUMS_OF>
struct Divided {
    static constexpr int BITS = BITS_OF, R = TILES, METER = METER_OF, GIVEN = GIVEN_BYTES, ENTRY = ENTRY_BYTES, SUMS = SUMS_OF;
    static constexpr int CODES = code_bytes(BITS), RANGES = ROWS * (HALF ? 4 : 8), RANGES_AT = R * CODES, SLOT = R * (CODES + RANGES);
    static constexpr int DEPTH = STAGES, RING = DEPTH * SLOT, GIVEN_AT = TEAMS * WARPS * RING;

    BOTH static int table_at(const Call& c) { return GIVEN_AT + c.steps * GIVEN; }
    BOTH static int sums_at(const Call& c) { return table_at(c) + (c.steps + 1) / 2 * 2 * ENTRY; }
    // Of a team: R tiles at a time.
    BOTH static int most_turns(const Call& c, int blocks) { return (c.tiles / R + TEAMS * blocks - 1) / (TEAMS * blocks); }
    BOTH static int bytes(const Call& c, int blocks) { return sums_at(c) + most_turns(c, blocks) * TEAMS * WARPS * SUMS * R * ROWS * 4; }
};

// Steps are counted through all tiles, eight times: a group is `reciprocal` times that, over 2^32. False where this is not exact.
inline bool counted(Call& c) {
    const int64_t times = 8 * (c.steps / c.groups);
    c.reciprocal = uint32_t(((int64_t(1) << 32) + times - 1) / times);
    return c.tiles * int64_t(c.steps) * times < int64_t(1) << 31;
}

// Of a lane.
template <int R>
struct Copied {
    float sums[R][2];               // rows g and g + 8 of lane 4 g + t
    const uint8_t *codes, *ranges;  // what it copies, of step 0 and of the first group of tile 0
};

// Own: how steps are multiplied. It has `begin`, which stores x and its table, and `use`, which adds a step to sums.
template <class Own, class P, class A, class S>
struct Balanced : A {
    static constexpr int R = A::R, BITS = A::BITS;

    const Call& call;
    uint8_t* memory;
    int ring, now, number, warp, blocks;  // ring, now: its stages, and the one to use next; number: in the block; warp: in its team
    int turns, own;                       // of the team: R tiles each; of the warp: steps of a tile
    int ahead, at, jump, left;            // the step to fetch next; as it is counted; from a tile to the next; steps to fetch, of all turns
    typename P::template Of<S> state;

    BOTH Balanced(const Call& c, uint8_t* shared, int w, int block, int of)
        : call(c), memory(shared), ring(int(P::kept(uint32_t(w * A::RING), 0))), now(ring), number(w), warp(w % WARPS), blocks(of),
          ahead(warp), at(8 * (R * (block + w / WARPS * of) * c.steps + warp)) {
        const int first = block + w / WARPS * of, all = c.tiles / R;
        turns = first < all ? (all - first + TEAMS * of - 1) / (TEAMS * of) : 0;
        own = warp < c.steps ? (c.steps - warp + WARPS - 1) / WARPS : 0;
        jump = 8 * (R * TEAMS * of * c.steps - own * WARPS);
        left = turns * own;
    }

    // The next step, of the same tile or the team's next.
    BOTH void fetch(P& p, int stage) {
        p.lanes([&](int lane) {
            const S& s = P::at(state, lane);
            const uint8_t* words = P::along(s.codes, at, A::CODES / 8);
            const int group = int((uint64_t(uint32_t(at)) * call.reciprocal) >> 32);
            uint8_t* to = memory + stage + 16 * lane;
            UNROLLED for (int r = 0; r < R; r++) {
                const uint8_t* of = r == 0 ? words : P::along(words, call.steps, A::CODES);
                UNROLLED for (int l = 0; l < BITS / 2; l++) p.fetch16(to + r * A::CODES + 512 * l, of + 512 * l, true);
                if constexpr (BITS == 3) p.fetch8(to + r * A::CODES + 512 - 8 * lane, of + 512 - 8 * lane);
            }
            p.fetch16(to + A::RANGES_AT, P::along(s.ranges, group, A::RANGES), 16 * lane < R * A::RANGES);
        });
        left--, ahead += WARPS, at += 8 * WARPS;
        if (ahead >= call.steps) ahead = warp, at += jump;
    }

    // Fills the ring.
    BOTH void open(P& p) {
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            constexpr int PIECES = A::RANGES / 16;
            s.codes = P::kept(call.words + 16 * lane);
            s.ranges = P::kept(call.ranges + lane % PIECES * 16 + int64_t(lane / PIECES % R) * call.groups * A::RANGES);
        });
        UNROLLED for (int i = 0; i < A::DEPTH; i++) {
            if constexpr (A::METER < A::DEPTH)
                if (i >= A::METER) p.template arrived<A::METER - 1>();
            if (left > 0) fetch(p, ring + i * A::SLOT);
            p.commit();
        }
    }

    // All tiles, after a barrier; what the warp adds to the rows of each goes where `finish` finds it after another.
    BOTH void over(P& p) {
        for (int i = 0; i < turns; i++) {
            p.lanes([&](int lane) {
                UNROLLED for (int r = 0; r < R; r++) P::at(state, lane).sums[r][0] = P::at(state, lane).sums[r][1] = 0.f;
            });
            const uint8_t *x = memory + A::GIVEN_AT + warp * A::GIVEN, *entry = memory + A::table_at(call) + warp * A::ENTRY;
            for (int k = own; k > 0; k--, x += WARPS * A::GIVEN, entry += WARPS * A::ENTRY) {
                p.template arrived<A::DEPTH - 1>();
                static_cast<Own*>(this)->use(p, x, entry);
                if (left > 0) {
                    p.together();
                    fetch(p, now);
                }
                p.commit();
                now = now == ring + (A::DEPTH - 1) * A::SLOT ? ring : now + A::SLOT;
            }
            p.lanes([&](int lane) {
                const S& s = P::at(state, lane);
                const int at = ((i * TEAMS * WARPS + number) * A::SUMS + lane % 4) * R * ROWS + lane / 4;
                float* to = reinterpret_cast<float*>(memory + A::sums_at(call)) + at;
                if (lane % 4 < A::SUMS)
                    UNROLLED for (int r = 0; r < R; r++) to[r * ROWS] = s.sums[r][0], to[r * ROWS + 8] = s.sums[r][1];
            });
        }
    }

    // Sums of all warps into out; by each warp two tiles at a time, a team's each.
    BOTH void finish(P& p, int block) {
        for (int k = number; k < R * A::most_turns(call, blocks); k += TEAMS * WARPS)
            p.lanes([&](int lane) {
                const int i = k / R * TEAMS + lane / ROWS, n = ((block + i * blocks) * R + k % R) * ROWS + lane % ROWS;
                const uint8_t* sums = memory + A::sums_at(call) + 4 * ((i * WARPS * A::SUMS * R + k % R) * ROWS + lane % ROWS);
                if (n < call.rows) store_row<P, A::SUMS * WARPS>(call, n, sums, 4 * R * ROWS);
            });
    }
};

}  // namespace fragments
