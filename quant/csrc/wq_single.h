// One row of x of bfloat16 times a weight of 2 or 4 bits whose groups are whole steps: what a warp does where neither registers nor
// instructions are to be spent on other rows. Layout, operands and the order of sums are those of wq_fragments.h, and so are the bits.
//
// A step's sum of x comes out of products with 1 and 128 in place of codes. Those of eight steps are taken at once, a step to each column
// of the product, before the first step; the loop reads them from a table. That is half of the products, and leaves so many registers that
// three or four blocks are on a multiprocessor: some may be the next product's, which fetch their first codes while this one is multiplied.

#pragma once

#include "wq_state.h"

namespace fragments {

// Of a warp: tiles; blocks that share the 228 kB of a multiprocessor; and stages of its ring, as many as these find room for.
BOTH constexpr int wide_alone(int bits) { return bits == 2 ? 2 : 1; }
BOTH constexpr int blocks_alone(int bits) { return bits == 2 ? 4 : 3; }
BOTH constexpr int deep_alone(int bits) { return bits == 2 ? 4 : 6; }

template <int BITS, int R, bool HALF>
struct Arranged {
    static constexpr int CODES = code_bytes(BITS), RANGES = ROWS * (HALF ? 4 : 8), GIVEN_AT = R * (CODES + RANGES);
    static constexpr int DEPTH = deep_alone(BITS), SLOT = GIVEN_AT + 2 * COLUMNS, TABLE_AT = DEPTH * SLOT;

    // Of a warp: after its ring, it has for each of its steps the sum of x and what 128 adds.
    static int bytes(const Call& c) { return TABLE_AT + 8 * MOST * ((c.steps + WARPS * MOST - 1) / (WARPS * MOST)); }
};

template <int BITS, int R>
struct Alone {
    uint32_t w[2 * BITS], b[SLICES][4], a[4], ones[4];
    float d[2][4];                     // sums of products; only those of column 0 count
    float sums[R][2];                  // rows g and g + 8 of lane 4 g + t
    const uint8_t *codes, *beside;     // what the lane copies, of step 0: codes of the first tile; ranges, or (from lane 16 on) x
    uint32_t factor;                   // from a step to its group, as `reciprocal` of a call; of x, to itself
    int last;                          // group, or step
    int apart, to, steps;              // of `beside`: bytes from a group or step to the next; to where in a stage; steps that have it
    float scale[2], offset[2];
};

template <class P, int BITS, int R, bool HALF>
struct Single : Arranged<BITS, R, HALF> {
    using A = Arranged<BITS, R, HALF>;
    static constexpr int CHAINS = chains_of(BITS, 1);
    static constexpr float FACTOR = 1.f / (1 << place_of(BITS, 1));
    using S = Alone<BITS, R>;

    const Call& call;
    uint8_t* ring;
    int now, warp, first, ahead;  // as in wq_fragments.h
    typename P::template Of<S> state;

    BOTH Single(const Call& c, uint8_t* memory, int w, int tile)
        : call(c), ring(memory + w * c.apart), now(0), warp(w), first(tile), ahead(w) {}

    // A tile that there is not is the last one again.
    BOTH int64_t tile(int r) const { return first + r < call.tiles ? first + r : call.tiles - 1; }

    BOTH int64_t to_tile(int r) const { return r == 0 ? 0 : (tile(r) - first) * call.steps * A::CODES; }

    BOTH void fetch_codes(P& p, const S& s, uint8_t* to, int lane) {
        UNROLLED for (int r = 0; r < R; r++) {
            const uint8_t* words = P::along(s.codes, ahead, A::CODES) + to_tile(r);
            uint8_t* own = to + r * A::CODES + 16 * lane;
            UNROLLED for (int l = 0; l < BITS / 2; l++) p.fetch16(own + 512 * l, words + 512 * l, true);
            if constexpr (BITS == 3) p.fetch8(to + r * A::CODES + 512 + 8 * lane, words + 512 - 8 * lane);
        }
    }

    // Codes, ranges and x of the next step.
    BOTH void fetch(P& p, uint8_t* to) {
        p.lanes([&](int lane) {
            const S& s = P::at(state, lane);
            const int found = int((uint64_t(uint32_t(2 * SLICES * ahead)) * s.factor) >> 32);
            const uint8_t* from = P::along(s.beside, found < s.last ? found : s.last, s.apart);
            fetch_codes(p, s, to, lane);
            p.fetch16_or_zeros(to + s.to, from, true, ahead < s.steps);
        });
        ahead += WARPS;
    }

    // Fills the ring but for x, and has codes of some steps after it brought near.
    BOTH void open(P& p) {
        constexpr int PIECES = R * A::RANGES / 16;
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            const int part = lane % PIECES;
            s.codes = P::kept(call.words + int64_t(first) * call.steps * A::CODES + 16 * lane);
            s.beside = P::kept(call.ranges + tile(part / (PIECES / R)) * call.groups * A::RANGES + part % (PIECES / R) * 16);
            s.to = R * A::CODES + part * 16;
        });
        UNROLLED for (int i = 0; i < A::DEPTH; i++) {
            if (ahead < call.steps) {
                p.lanes([&](int lane) {
                    const S& s = P::at(state, lane);
                    uint8_t* to = ring + i * A::SLOT;
                    fetch_codes(p, s, to, lane);
                    p.fetch16(to + s.to, P::along(s.beside, call.group_of(SLICES * ahead), A::RANGES), true);
                });
                ahead += WARPS;
            }
            p.commit();
        }
        for (int i = 0, step = ahead; i < call.beyond && step < call.steps; i++, step += WARPS)
            p.lanes([&](int lane) {
                const uint8_t* words = P::along(P::at(state, lane).codes, step, A::CODES) + 16 * lane;
                if (32 * lane < A::CODES)
                    UNROLLED for (int r = 0; r < R; r++) P::prefetch(words + to_tile(r));
            });
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            const bool of_x = lane >= 16;
            const int chunk = lane % 16;
            if (of_x) s.beside = call.x + chunk * 16, s.to = A::GIVEN_AT + chunk * 16;
            s.factor = of_x ? (1u << 31) / SLICES : call.reciprocal, s.last = of_x ? call.steps : call.groups - 1;
            s.apart = of_x ? 2 * COLUMNS : A::RANGES;
            s.steps = of_x ? (call.columns - chunk * 8 + COLUMNS - 1) / COLUMNS : call.steps;
        });
    }

    template <int I>
    BOTH void add_up() {
        P::multiply(state, [](S& s) { return Operands{s.d[I % 2 % CHAINS], s.ones, s.b[I / 2] + 2 * (I % 2)}; });
        if constexpr (I + 1 < 2 * SLICES) add_up<I + 1>();
    }

    // Sums of x of all of the warp's steps; and x of the stages that are in the ring.
    BOTH void begin(P& p) {
        for (int base = 0; warp + base * WARPS < call.steps; base += MOST) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                const int number = base + lane / 4, column = (warp + number * WARPS) * COLUMNS + lane % 4 * 8;
                const uint8_t* from = P::along(call.x, column, 2);
                uint8_t* to = ring + number * A::SLOT + A::GIVEN_AT + lane % 4 * 16;
                UNROLLED for (int q = 0; q < SLICES; q++) {
                    UNROLLED for (int i = 0; i < 4; i++) s.b[q][i] = 0;
                    if (column + 32 * q < call.columns) P::read16(s.b[q], from + 64 * q);
                }
                if (number < A::DEPTH)
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
                if (lane < 4) P::store16(ring + A::TABLE_AT + (base + 2 * lane) * 8, made);
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

    BOTH void turn() { now = now == (A::DEPTH - 1) * A::SLOT ? 0 : now + A::SLOT; }

    // The step that is next, in the stage `now`; `sums`: its entry of the table.
    BOTH void use(P& p, const uint8_t* sums) {
        const uint8_t* stage = ring + now;
        UNROLLED for (int r = 0; r < R; r++) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                load_codes<P, BITS>(s.w, stage + r * A::CODES, lane);
                // Read again for a second tile: kept, it would take too many registers.
                const uint8_t* x = stage + A::GIVEN_AT + lane % 4 * 16 + (r != 0 ? P::kept(0u, 0) : 0);
                UNROLLED for (int q = 0; q < SLICES; q++) P::load16(s.b[q], x + 64 * q);
                const uint8_t* ranges = stage + R * A::CODES + r * A::RANGES + lane / 4 * (HALF ? 8 : 16);
                if constexpr (HALF) half_ranges<P>(s.scale, s.offset, ranges);
                else ranges_of<P>(s.scale, s.offset, ranges);
                UNROLLED for (int i = 0; i < 4; i++) s.d[0][i] = s.d[1][i] = 0.f;
            });
            products<0, 0>(p);
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                uint32_t found[2];
                P::load8(found, sums);
                UNROLLED for (int i = 0; i < 2; i++) {
                    const float rest = P::fma(s.offset[i], float_of(found[0]), s.sums[r][i]);
                    const float sum = CHAINS == 1 ? s.d[0][2 * i] : P::fma(s.d[1][2 * i], FACTOR, s.d[0][2 * i]);
                    s.sums[r][i] = P::fma(s.scale[i], sum - float_of(found[1]), rest);
                }
            });
        }
    }

    BOTH void over(P& p) {
        p.lanes([&](int lane) {
            UNROLLED for (int r = 0; r < R; r++) P::at(state, lane).sums[r][0] = P::at(state, lane).sums[r][1] = 0.f;
        });
        const uint8_t* sums = ring + A::TABLE_AT;
        int left = (call.steps - warp + WARPS - 1) / WARPS;
        for (; ahead < call.steps; left--, sums += 8) {
            p.template arrived<A::DEPTH - 1>();
            use(p, sums);
            p.together();
            fetch(p, ring + now);
            p.commit();
            turn();
        }
        for (; left > 0; left--, sums += 8) {
            p.template arrived<A::DEPTH - 1>();
            use(p, sums);
            p.commit();
            turn();
        }
    }

    // The warp's sums [R, 16] into its own part of the ring, which is free by then.
    BOTH void close(P& p) {
        p.template arrived<0>();
        p.lanes([&](int lane) {
            float* to = reinterpret_cast<float*>(ring) + lane / 4;
            const S& s = P::at(state, lane);
            if (lane % 4 == 0)
                UNROLLED for (int r = 0; r < R; r++) to[r * ROWS] = s.sums[r][0], to[r * ROWS + 8] = s.sums[r][1];
        });
    }
};

// Sums of all warps into out; by one of them.
template <class P, int R>
BOTH void finish_single(P& p, const Call& call, int tile, const uint8_t* memory) {
    p.lanes([&](int lane) {
        const int n = tile * ROWS + lane;
        if (lane >= R * ROWS || n >= call.rows) return;
        float total = 0.f;
        UNROLLED for (int w = 0; w < WARPS; w++) total += reinterpret_cast<const float*>(memory + w * call.apart)[lane];
        *reinterpret_cast<uint16_t*>(call.out + 2 * int64_t(n)) = uint16_t(P::pack2(total, 0.f));
    });
}

}  // namespace fragments
