// One row of x by a block on each multiprocessor, with codes of 2 bits, in whole numbers: how a warp multiplies a step.
//
// A byte of a word has codes of the row g in its lower half and of g + 8 in its upper half (quant/kernels/wq_gemv/fragments.py): masked
// out, they are operands of int8 tensor cores (m16n8k32), those of g + 8 times 16. Four codes are an instruction, where bfloat16 takes two
// for two.
//
// x is rounded to 2^-22 of the power of two above the largest of its step, and is three digits of a byte, the lower two from -128 on: each
// a column of the product. Sums of a step are exact, as floats too: below 128 columns times 48 times 128, which is below 2^22, so that they
// are the lowest bits of a float after they have been added to 3 * 2^22. A step with a number that is not finite makes all of out NaN.
//
// So rows of x take three columns of a product each, and are not the floats that they are in operands of bfloat16, beside other rows: each
// is off by its own roundings (docs/adr/0031-one-row-of-two-bits.md).

#pragma once

#include "wq_alone.h"
#include "wq_balanced.h"

namespace fragments {

constexpr int DIGITS = 3;
constexpr float BIG = 12582912.f;  // 3 * 2^22
constexpr uint32_t BIG_BITS = 0x4b400000u;

// Stages of a warp's ring, each of R tiles that are multiplied with the same x as it is in registers. SHORT: as many as fit beside x of
// 11008 columns; MIDDLE: of 14336; LONG: of 28672, where a block has all of a multiprocessor's memory.
enum Room { SHORT, MIDDLE, LONG };
BOTH constexpr int deep_whole(bool half, int r, Room room) { return (room == LONG ? 12 : room == MIDDLE ? 6 : half ? 8 : 7) / r; }

// On their way at a time at first.
constexpr int METER_WHOLE = 2;

template <bool HALF, int R, Room ROOM>
using OfWhole = Divided<2, HALF, R, deep_whole(HALF, R, ROOM), METER_WHOLE, DIGITS * COLUMNS, 32, 2>;

struct Bytes {
    int32_t* d;
    const uint32_t *a, *b;
};

template <int R>
struct Counted : Copied<R> {
    uint32_t w[SLICES], b[2 * SLICES], a[4];
    int32_t d[4];
    uint32_t x[2][2][4];  // of two steps, two chunks of 8 columns
    int most, all;        // of a step: the largest exponent, the sum
    float scale[2], offset[2];
};

template <class P, bool HALF, int R, Room ROOM_OF>
struct Whole : Balanced<Whole<P, HALF, R, ROOM_OF>, P, OfWhole<HALF, R, ROOM_OF>, Counted<R>> {
    static constexpr Room ROOM = ROOM_OF;
    using A = OfWhole<HALF, R, ROOM>;
    using S = Counted<R>;
    using Base = Balanced<Whole, P, A, S>;
    using Base::Base, Base::call, Base::memory, Base::now, Base::number, Base::state;

    // What the second of a lane's two columns is worth: of lane 0 the middle digit, of lane 1 what there is not.
    BOTH static float second(int lane) { return lane % 4 == 0 ? 1.f / 256 : 0.f; }

    // Where a plane of digits has the first or second pair of slices of a step.
    BOTH static int plane(int digit, int later) { return digit * COLUMNS + (later ^ (digit & 1)) * 64; }

    // Four columns, in the order in which a byte of each is in a word of codes, as digits: words of three planes, the highest first.
    BOTH static void four(uint32_t* to, int& all, const uint32_t* w, float factor) {
        uint32_t u[4];
        UNROLLED for (int i = 0; i < 4; i++) {
            const float v = float_of(i % 2 == 0 ? w[i / 2] << 16 : w[i / 2] & 0xffff0000u);
            u[i] = bits_of(P::fma(v, factor, BIG)) + (0x8080u - BIG_BITS);
            all += int(u[i]);
        }
        const uint32_t a = P::bytes(u[0], u[2], 0x5140), b = P::bytes(u[1], u[3], 0x5140);
        to[0] = P::bytes(P::bytes(u[0], u[2], 0x0062), P::bytes(u[1], u[3], 0x0062), 0x5410);
        to[2] = P::bytes(a, b, 0x7632) ^ 0x80808080u, to[4] = P::bytes(a, b, 0x5410) ^ 0x80808080u;
    }

    // x of eight steps, zeros after its end; by each warp those that are its by its number. Eight lanes have a step, two chunks of it each.
    BOTH void begin(P& p) {
        constexpr int AT_ONCE = 4 * TEAMS * WARPS;
        for (int base = 4 * number; base < call.steps; base += 2 * AT_ONCE) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                UNROLLED for (int u = 0; u < 2; u++) UNROLLED for (int c = 0; c < 2; c++) {
                    const int column = (base + u * AT_ONCE + lane / 8) * COLUMNS + lane % 8 * 8;
                    UNROLLED for (int i = 0; i < 4; i++) s.x[u][c][i] = 0;
                    if (column + 64 * c < call.columns) P::read16(s.x[u][c], P::along(call.x, column, 2) + 128 * c);
                }
            });
            make<0>(p, base);
            if (base + AT_ONCE < call.steps) make<1>(p, base + AT_ONCE);
        }
    }

    template <int U>
    BOTH void make(P& p, int first) {
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            uint32_t most = 0;
            UNROLLED for (int c = 0; c < 2; c++) UNROLLED for (int i = 0; i < 4; i++) most = P::most2(most, s.x[U][c][i] & 0x7fff7fffu);
            most = most >> 16 > (most & 0xffffu) ? most >> 16 : most & 0xffffu;
            s.most = int(most >> 7);
        });
        P::most_of_eight(state);
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            s.most = s.most < 22 ? 22 : s.most;
            const float factor = float_of(uint32_t(s.most == 255 ? 0 : 275 - s.most) << 23);
            const int step = first + lane / 8;
            s.all = -16 * 0x8080;
            UNROLLED for (int c = 0; c < 2; c++) {
                uint32_t made[2 * DIGITS];
                four(made, s.all, s.x[U][c], factor), four(made + 1, s.all, s.x[U][c] + 2, factor);
                uint8_t* to = memory + A::GIVEN_AT + step * A::GIVEN + lane % 4 * 16 + lane / 4 % 2 * 8;
                if (step < call.steps)
                    UNROLLED for (int d = 0; d < DIGITS; d++) P::store8(to + plane(d, c), made + 2 * d);
            }
        });
        P::sum_of_eight(state);
        p.lanes([&](int lane) {
            const S& s = P::at(state, lane);
            const int step = first + lane / 8, t = lane % 8;
            const uint32_t unit = s.most == 255 ? 0x7fc00000u : uint32_t(s.most - 21) << 23, none = 0;
            const uint32_t made[2] = {t == 0 ? bits_of(float(s.all) * float_of(unit)) : none,
                                      t == 0 ? bits_of(float_of(unit) * 65536.f) : t == 1 ? unit : none};
            if (t < 4 && step < call.steps) P::store8(memory + A::table_at(call) + step * A::ENTRY + t * 8, made);
        });
    }

    // A product of a slice; and all after it.
    template <int Q>
    BOTH void products(P& p) {
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            constexpr uint32_t LOW = 0x03030303u;
            const uint32_t first = s.w[Q], second = first >> 2;
            s.a[0] = first & LOW, s.a[1] = first & LOW << 4, s.a[2] = second & LOW, s.a[3] = second & LOW << 4;
        });
        P::count(state, [](S& s) { return Bytes{s.d, s.a, s.b + 2 * Q}; });
        if constexpr (Q + 1 < SLICES) products<Q + 1>(p);
    }

    // The step in the stage `now`; its x, and its entry of the table.
    BOTH void use(P& p, const uint8_t* x, const uint8_t* entry) {
        const uint8_t* stage = memory + now;
        UNROLLED for (int r = 0; r < R; r++) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                load_codes<P, 2>(s.w, stage + r * A::CODES, lane);
                if (r == 0) {
                    // Of columns that there are not, the results count nothing.
                    const int digit = lane / 4 % 4 < DIGITS ? lane / 4 % 4 : DIGITS - 1;
                    UNROLLED for (int c = 0; c < 2; c++) P::load16(s.b + 4 * c, x + plane(digit, c) + lane % 4 * 16);
                }
                load_ranges<P, HALF>(s.scale, s.offset, stage + A::RANGES_AT + r * A::RANGES, lane);
                UNROLLED for (int i = 0; i < 4; i++) s.d[i] = int32_t(BIG_BITS);
            });
            products<0>(p);
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                uint32_t found[2];
                P::load8(found, entry + lane % 4 * 8);
                UNROLLED for (int i = 0; i < 2; i++) {
                    const float rest = P::fma(s.offset[i], float_of(found[0]), s.sums[r][i]);
                    const float high = float_of(uint32_t(s.d[2 * i])) - BIG, low = float_of(uint32_t(s.d[2 * i + 1])) - BIG;
                    const float unit = float_of(found[1]) * (i == 0 ? 1.f : 1.f / 16);
                    s.sums[r][i] = P::fma(s.scale[i] * unit, P::fma(low, second(lane), high), rest);
                }
            });
        }
    }
};

}  // namespace fragments
