// One row of x of bfloat16 times a weight of 3 or 4 bits (of 2: wq_whole.h) whose groups are whole steps: what a warp does with a step
// where neither registers nor instructions are to be spent on other rows. Layout, operands and the order of sums are those of
// wq_fragments.h, and so are the bits.
//
// A step's sum of x comes out of products with 1 and 128 in place of codes. Those of eight steps are taken at once, a step to each column
// of the product, before the first step; the loop reads them from a table. That is half of the products.

#pragma once

#include "wq_state.h"

namespace fragments {

// One row of bfloat16, with groups of whole steps.
inline bool is_alone(const Call& c) { return c.count == 1 && c.parts == 1 && flushes_of(c) == 1; }

// Bytes of a step in the table: what its x adds up to, and what 128 adds.
constexpr int ENTRY = 8;

// What a lane has of a step.
template <int BITS>
struct Numbers {
    uint32_t w[2 * BITS], b[SLICES][4], a[4], ones[4];
    float d[2][4];  // sums of products; only those of column 0 count
    float scale[2], offset[2];
};

// Of a tile's group, the lane's two rows.
template <class P, bool HALF>
BOTH void load_ranges(float* scale, float* offset, const uint8_t* from, int lane) {
    if constexpr (HALF) half_ranges<P>(scale, offset, from + lane / 4 * 8);
    else ranges_of<P>(scale, offset, from + lane / 4 * 16);
}

// Row `n` of out: `COUNT` sums, `apart` bytes from one to the next, in their order.
template <class P, int COUNT>
BOTH void store_row(const Call& call, int n, const uint8_t* sums, int apart) {
    float total = 0.f;
    UNROLLED for (int i = 0; i < COUNT; i++) total += *reinterpret_cast<const float*>(sums + i * apart);
    *reinterpret_cast<uint16_t*>(call.out + 2 * int64_t(n)) = uint16_t(P::pack2(total, 0.f));
}

// S, a lane's state, has the members of Numbers<BITS>.
template <class P, int BITS, bool HALF>
struct Alone {
    static constexpr int CHAINS = chains_of(BITS, 1), RANGES = ROWS * (HALF ? 4 : 8);  // RANGES: bytes of a tile's group
    static constexpr float FACTOR = 1.f / (1 << place_of(BITS, 1));

    // A lane's columns of x of a step that it has of eight, from number `column` on; zeros after the end of x.
    template <class S>
    BOTH static void read_x(S& s, const Call& call, int column) {
        const uint8_t* from = P::along(call.x, column, 2);
        UNROLLED for (int q = 0; q < SLICES; q++) {
            UNROLLED for (int i = 0; i < 4; i++) s.b[q][i] = 0;
            if (column + 32 * q < call.columns) P::read16(s.b[q], from + 64 * q);
        }
        UNROLLED for (int i = 0; i < 4; i++) s.d[0][i] = s.d[1][i] = 0.f, s.ones[i] = i % 2 == 0 ? ONES : BASE;
    }

    template <class S>
    BOTH static void load_x(S& s, const uint8_t* step, int lane) {
        UNROLLED for (int q = 0; q < SLICES; q++) P::load16(s.b[q], step + lane % 4 * 16 + 64 * q);
    }

    template <class S>
    BOTH static void store_x(const S& s, uint8_t* step, int lane) {
        UNROLLED for (int q = 0; q < SLICES; q++) P::store16(step + lane % 4 * 16 + 64 * q, s.b[q]);
    }

    // After `read_x`: the sums of eight steps.
    template <int I = 0, class Lanes>
    BOTH static void add_up(Lanes& state) {
        P::multiply(state, [](auto& s) { return Operands{s.d[I % 2 % CHAINS], s.ones, s.b[I / 2] + 2 * (I % 2)}; });
        if constexpr (I + 1 < 2 * SLICES) add_up<I + 1>(state);
    }

    // Those of steps 2 t and 2 t + 1 of the eight, of lane t: all rows of a kind are alike, so that lanes 0 to 3 have all.
    template <class S>
    BOTH static void store_entries(const S& s, uint8_t* to) {
        uint32_t made[4];
        UNROLLED for (int c = 0; c < 2; c++) {
            made[2 * c] = bits_of(CHAINS == 1 ? s.d[0][c] : s.d[0][c] + s.d[1][c]);
            made[2 * c + 1] = bits_of(CHAINS == 1 ? s.d[0][2 + c] : P::fma(s.d[1][2 + c], FACTOR, s.d[0][2 + c]));
        }
        P::store16(to, made);
    }

    // A tile's codes and ranges of a step.
    template <class S>
    BOTH static void load(S& s, const uint8_t* codes, const uint8_t* ranges, int lane) {
        load_codes<P, BITS>(s.w, codes, lane);
        load_ranges<P, HALF>(s.scale, s.offset, ranges, lane);
        UNROLLED for (int i = 0; i < 4; i++) s.d[0][i] = s.d[1][i] = 0.f;
    }

    // A product of 16 columns: pairs 4 H to 4 H + 3 of slice Q; and all after it.
    template <int Q = 0, int H = 0, class Lanes>
    BOTH static void products(P& p, Lanes& state) {
        p.lanes([&](int lane) {
            auto& s = P::at(state, lane);
            constexpr int I = 8 * Q + 4 * H;
            s.a[0] = held<P, BITS, I>(s.w), s.a[1] = held<P, BITS, I + 1>(s.w);
            s.a[2] = held<P, BITS, I + 2>(s.w), s.a[3] = held<P, BITS, I + 3>(s.w);
        });
        P::multiply(state, [](auto& s) { return Operands{s.d[H % CHAINS], s.a, s.b[Q] + 2 * H}; });
        if constexpr (H == 0) products<Q, 1>(p, state);
        if constexpr (H == 1 && Q + 1 < SLICES) products<Q + 1, 0>(p, state);
    }

    // Adds a step to the sums of rows g and g + 8. entry: its own of the table.
    template <class S>
    BOTH static void add(const S& s, float* sums, const uint8_t* entry) {
        uint32_t found[2];
        P::load8(found, entry);
        UNROLLED for (int i = 0; i < 2; i++) {
            const float rest = P::fma(s.offset[i], float_of(found[0]), sums[i]);
            const float sum = CHAINS == 1 ? s.d[0][2 * i] : P::fma(s.d[1][2 * i], FACTOR, s.d[0][2 * i]);
            sums[i] = P::fma(s.scale[i], sum - float_of(found[1]), rest);
        }
    }
};

}  // namespace fragments
