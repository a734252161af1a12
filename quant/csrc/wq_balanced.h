// One row of x of bfloat16 times a weight of 2, 3 or 4 bits whose groups are whole steps: what a warp does. Layout, operands and the order
// of sums are those of wq_fragments.h, and so are the bits.
//
// A product has one block on each multiprocessor, in half of its shared memory; the other half is the next product's, whose block fetches
// its first codes while this one is multiplied. So each multiprocessor has its share of both. A block has two teams of eight warps, which
// divide the steps of a tile as everywhere; a team's tiles follow one another without a gap in the rings of its warps.
//
// x is in shared memory once for all of them. A step's sum of x comes out of products with 1 and 128 in place of codes: those of eight
// steps are taken at once, a step to each column of the product, before the first step; the loop reads them from a table. That is half of
// the products.

#pragma once

#include "wq_state.h"

namespace fragments {

constexpr int TEAMS = 2;

// Stages of a warp's ring, of R tiles: as many as fit beside x of 11008 columns or, LONG, of 28672.
BOTH constexpr int deep_balanced(int bits, bool half, bool is_long, int r) {
    if (is_long) return (bits == 2 ? 5 : 3) / r;
    return (bits == 2 ? (half ? 9 : 8) : bits == 3 ? 6 : half ? 5 : 4) / r;
}

// When the next product may begin: 0: at once; 1: when the one before is over; 2: when a block has x.
constexpr int RELEASED = 1;

// Stages that are on their way at a time before the one before is over: with more, x, which is read then, would wait for them.
constexpr int METER = 16;

// Bytes of shared memory: rings, x, the table, and what each warp has for the rows of each of its tiles.
template <int BITS, bool HALF, bool LONG, int R>
struct Divided {
    static constexpr int CODES = code_bytes(BITS), RANGES = ROWS * (HALF ? 4 : 8), RANGES_AT = R * CODES, SLOT = R * (CODES + RANGES);
    static constexpr int DEPTH = deep_balanced(BITS, HALF, LONG, R), RING = DEPTH * SLOT, GIVEN_AT = TEAMS * WARPS * RING;

    BOTH static int table_at(const Call& c) { return GIVEN_AT + c.steps * 2 * COLUMNS; }
    BOTH static int sums_at(const Call& c) { return table_at(c) + (c.steps + 1) / 2 * 16; }
    // Of a team: R tiles at a time.
    BOTH static int most_turns(const Call& c, int blocks) { return (c.tiles / R + TEAMS * blocks - 1) / (TEAMS * blocks); }
    BOTH static int bytes(const Call& c, int blocks) { return sums_at(c) + most_turns(c, blocks) * TEAMS * WARPS * R * ROWS * 4; }
};

// Steps are counted through all tiles, eight times: a group is `reciprocal` times that, over 2^32. False where this is not exact.
inline bool counted(Call& c) {
    const int64_t times = 8 * (c.steps / c.groups);
    c.reciprocal = uint32_t(((int64_t(1) << 32) + times - 1) / times);
    return c.tiles * int64_t(c.steps) * times < int64_t(1) << 31;
}

template <int BITS, int R>
struct Shared {
    uint32_t w[2 * BITS], b[SLICES][4], a[4], ones[4];
    float d[2][4];                  // sums of products; only those of column 0 count
    float sums[R][2];               // rows g and g + 8 of lane 4 g + t
    const uint8_t *codes, *ranges;  // what the lane copies, of step 0 and of the first group of tile 0
    float scale[2], offset[2];
};

// R: tiles that are multiplied with the same x as it is in registers; the number of all tiles is a multiple of it.
template <class P, int BITS, bool HALF, bool LONG, int R>
struct Balanced : Divided<BITS, HALF, LONG, R> {
    using A = Divided<BITS, HALF, LONG, R>;
    static constexpr int CHAINS = chains_of(BITS, 1);
    static constexpr float FACTOR = 1.f / (1 << place_of(BITS, 1));
    using S = Shared<BITS, R>;

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

    // To the step that follows `step`, of the same tile or the team's next.
    BOTH void go_on(int& step, int& counted) const {
        step += WARPS, counted += 8 * WARPS;
        if (step >= call.steps) step = warp, counted += jump;
    }

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
        left--;
        go_on(ahead, at);
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
            if constexpr (METER < A::DEPTH)
                if (i >= METER) p.template arrived<METER - 1>();
            if (left > 0) fetch(p, ring + i * A::SLOT);
            p.commit();
        }
    }

    template <int I>
    BOTH void add_up() {
        P::multiply(state, [](S& s) { return Operands{s.d[I % 2 % CHAINS], s.ones, s.b[I / 2] + 2 * (I % 2)}; });
        if constexpr (I + 1 < 2 * SLICES) add_up<I + 1>();
    }

    // x of eight steps, zeros after its end, and their sums; by each warp those that are its by its number.
    BOTH void begin(P& p) {
        for (int base = MOST * number; base < call.steps; base += MOST * TEAMS * WARPS) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                const int step = base + lane / 4, column = step * COLUMNS + lane % 4 * 8;
                const uint8_t* from = P::along(call.x, column, 2);
                uint8_t* to = memory + A::GIVEN_AT + step * 2 * COLUMNS + lane % 4 * 16;
                UNROLLED for (int q = 0; q < SLICES; q++) {
                    UNROLLED for (int i = 0; i < 4; i++) s.b[q][i] = 0;
                    if (column + 32 * q < call.columns) P::read16(s.b[q], from + 64 * q);
                }
                if (step < call.steps)
                    UNROLLED for (int q = 0; q < SLICES; q++) P::store16(to + 64 * q, s.b[q]);
                UNROLLED for (int i = 0; i < 4; i++) s.d[0][i] = s.d[1][i] = 0.f, s.ones[i] = i % 2 == 0 ? ONES : BASE;
            });
            add_up<0>();
            // All rows of a kind are alike: lanes 0 to 3 have all columns of both kinds.
            p.lanes([&](int lane) {
                const S& s = P::at(state, lane);
                uint32_t made[4];
                UNROLLED for (int c = 0; c < 2; c++) {
                    made[2 * c] = bits_of(CHAINS == 1 ? s.d[0][c] : s.d[0][c] + s.d[1][c]);
                    made[2 * c + 1] = bits_of(CHAINS == 1 ? s.d[0][2 + c] : P::fma(s.d[1][2 + c], FACTOR, s.d[0][2 + c]));
                }
                if (lane < 4 && base + 2 * lane < call.steps) P::store16(memory + A::table_at(call) + (base + 2 * lane) * 8, made);
            });
        }
    }

    // A product of 16 columns: pairs 4 H to 4 H + 3 of slice Q; and all after it.
    template <int Q, int H>
    BOTH void products(P& p) {
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            constexpr int I = 8 * Q + 4 * H;
            s.a[0] = held<P, BITS, I>(s.w), s.a[1] = held<P, BITS, I + 1>(s.w);
            s.a[2] = held<P, BITS, I + 2>(s.w), s.a[3] = held<P, BITS, I + 3>(s.w);
        });
        P::multiply(state, [](S& s) { return Operands{s.d[H % CHAINS], s.a, s.b[Q] + 2 * H}; });
        if constexpr (H == 0) products<Q, 1>(p);
        if constexpr (H == 1 && Q + 1 < SLICES) products<Q + 1, 0>(p);
    }

    // The step in the stage `now`; its x, and its entry of the table.
    BOTH void use(P& p, const uint8_t* x, const uint8_t* table) {
        const uint8_t* stage = memory + now;
        UNROLLED for (int r = 0; r < R; r++) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                load_codes<P, BITS>(s.w, stage + r * A::CODES, lane);
                if (r == 0)
                    UNROLLED for (int q = 0; q < SLICES; q++) P::load16(s.b[q], x + lane % 4 * 16 + 64 * q);
                const uint8_t* ranges = stage + A::RANGES_AT + r * A::RANGES + lane / 4 * (HALF ? 8 : 16);
                if constexpr (HALF) half_ranges<P>(s.scale, s.offset, ranges);
                else ranges_of<P>(s.scale, s.offset, ranges);
                UNROLLED for (int i = 0; i < 4; i++) s.d[0][i] = s.d[1][i] = 0.f;
            });
            products<0, 0>(p);
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                uint32_t found[2];
                P::load8(found, table);
                UNROLLED for (int i = 0; i < 2; i++) {
                    const float rest = P::fma(s.offset[i], float_of(found[0]), s.sums[r][i]);
                    const float sum = CHAINS == 1 ? s.d[0][2 * i] : P::fma(s.d[1][2 * i], FACTOR, s.d[0][2 * i]);
                    s.sums[r][i] = P::fma(s.scale[i], sum - float_of(found[1]), rest);
                }
            });
        }
    }

    // All tiles, after a barrier; what the warp adds to the rows of each goes where `finish_balanced` finds it after another.
    BOTH void over(P& p) {
        for (int i = 0; i < turns; i++) {
            p.lanes([&](int lane) {
                UNROLLED for (int r = 0; r < R; r++) P::at(state, lane).sums[r][0] = P::at(state, lane).sums[r][1] = 0.f;
            });
            const uint8_t *x = memory + A::GIVEN_AT + warp * 2 * COLUMNS, *table = memory + A::table_at(call) + warp * 8;
            for (int k = own; k > 0; k--, x += WARPS * 2 * COLUMNS, table += WARPS * 8) {
                p.template arrived<A::DEPTH - 1>();
                use(p, x, table);
                if (left > 0) {
                    p.together();
                    fetch(p, now);
                }
                p.commit();
                now = now == ring + (A::DEPTH - 1) * A::SLOT ? ring : now + A::SLOT;
            }
            p.lanes([&](int lane) {
                const S& s = P::at(state, lane);
                float* to = reinterpret_cast<float*>(memory + A::sums_at(call)) + (i * TEAMS * WARPS + number) * R * ROWS + lane / 4;
                if (lane % 4 == 0)
                    UNROLLED for (int r = 0; r < R; r++) to[r * ROWS] = s.sums[r][0], to[r * ROWS + 8] = s.sums[r][1];
            });
        }
    }

    // Sums of all warps into out; by each warp two tiles at a time, a team's each.
    BOTH void finish(P& p, int block) {
        for (int k = number; k < R * A::most_turns(call, blocks); k += TEAMS * WARPS)
            p.lanes([&](int lane) {
                const int i = k / R * TEAMS + lane / ROWS, n = ((block + i * blocks) * R + k % R) * ROWS + lane % ROWS;
                if (n >= call.rows) return;
                const float* from = reinterpret_cast<const float*>(memory + A::sums_at(call)) + (i * WARPS * R + k % R) * ROWS + lane % ROWS;
                float total = 0.f;
                UNROLLED for (int w = 0; w < WARPS; w++) total += from[w * R * ROWS];
                *reinterpret_cast<uint16_t*>(call.out + 2 * int64_t(n)) = uint16_t(P::pack2(total, 0.f));
            });
    }
};

}  // namespace fragments
