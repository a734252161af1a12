// The other warps of a team of gptq_lanes.h: while the first solves a panel, they take errors before off those after it.
#pragma once

#include "gptq_lanes.h"

namespace gptq {

// What a lane has of a product of 16 x 8 and 8 x 8 numbers: rows g and g + 8, first of column t, then of t + 4; of column g rows t, t + 4.
struct Left {
    float at[4];
};
struct Right {
    float at[2];
};

constexpr uint32_t OPERAND = 0xffffe000u;  // a float's bits that tensor cores multiply

// The nearest number of 11 bits, halves away from 0. Next to infinity it is infinite, and of NaN it may be 0: what is left of these is then
// NaN or infinite, and the row is solved again.
ON_LANES float large_of(float x) { return float_of(bits_of(x) + 0x1000u & OPERAND); }

// One of 32 lanes, which have a panel's columns of 8 ROWS rows: sums of errors times the factor, on tensor cores (m16n8k8). An operand of
// theirs has 11 bits; a number is split into two of them, `large` and what is left, and of the four products all but that of what is left
// are made: what a product lacks is below 2^-21 of it, and of either sign. Products with what is left are added up apart, as sums are cut
// off at the size of their largest term. Lane 4 g + t has rows g, g + 8, ... of the sums, columns 4 t to 4 t + 3, errors of columns 2 t and
// 2 t + 1 of a unit, and the factor's columns 2 g and 2 g + 1. R: rows of a lane that solves. KEPT: panels that are asked for before their
// turn; where these are all that a warp has, nothing is loaded from far while it multiplies: waits for what is near would be for that, too.
template <int ROWS, int R, int KEPT>
struct Updates {
    static constexpr int APART = 8;  // in shared memory, from one of a lane's rows to the next
    ON_LANES static constexpr int far(int r) { return r % 4 * APART * R + r / 4; }  // in the block, from the first to row r
    using Tile = float[ROWS][4];
    struct Fragment {
        float errors[ROWS][2], factor[2][2];
    };
    Tile given[KEPT];   // panels as given, that at work first
    Tile sum, rest;     // of products, and of those with what is left of one
    uint32_t row;       // its first
    uint32_t column;    // first of the lane's in a panel
    Near errors;        // [STRIDE] of its first row
    int lane_errors, lane_factor;  // of a unit's floats, its first
    Fragment held[2];

    // first_row, all_errors: of the team. first_panel: of this warp, one of `helpers`.
    ON_LANES void begin(const Problem& p, uint32_t lane, uint32_t first_row, Near all_errors, int first_panel, int helpers) {
        const int g = int(lane / 4), t = int(lane % 4);
        row = first_row + g * R;
        column = 4 * t, errors = beside(all_errors, g * STRIDE);
        lane_errors = 2 * t, lane_factor = in_factor(2 * t, 2 * g);
        UNROLLED for (int k = 0; k < KEPT; k++) fetch(p, first_panel + k * helpers, given[k]);
    }

    // A panel as given; 0 beyond the last column, and of rows beyond the last what the last has.
    ON_LANES void fetch(const Problem& p, int panel, Tile& to) const {
        if (panel >= p.panels()) return;
        const uint32_t first = panel * PANEL + column;
        if (first + 4 <= p.columns && row + far(ROWS - 1) < p.rows) {
            const float* from = p.block + (first * p.rows + row);
            UNROLLED for (int c = 0; c < 4; c++, from += p.rows)
                UNROLLED for (int r = 0; r < ROWS; r++) to[r][c] = get(from + far(r), true);
        } else {
            ROLLED for (int c = 0; c < 4; c++) {
                const float* const all = p.block + (first + c) * p.rows;
                UNROLLED for (int r = 0; r < ROWS; r++) {
                    const uint32_t at = row + far(r) < p.rows ? row + far(r) : p.rows - 1;
                    const float x = get(all + at, first + c < p.columns);
                    UNROLLED for (int d = 0; d < 4; d++)
                        if (d == c) to[r][d] = x;
                }
            }
        }
    }
    ON_LANES void clear() {
        UNROLLED for (int r = 0; r < ROWS; r++)
            UNROLLED for (int c = 0; c < 4; c++) sum[r][c] = rest[r][c] = 0.0f;
    }

    ON_LANES void load_factor(Fragment& f, const Shared& s, int panel, int unit) const {
        const Near u = beside(s.factor, panel_start(panel) + unit * UNIT * PANEL + lane_factor);
        UNROLLED for (int k = 0; k < 2; k++) near_two(beside(u, row_start(k)), f.factor[k][0], f.factor[k][1]);
    }
    ON_LANES void load_errors(Fragment& f, int unit) const {
        const Near e = beside(errors, unit * UNIT + lane_errors);
        UNROLLED for (int r = 0; r < ROWS; r++) near_two(beside(e, r * APART * STRIDE), f.errors[r][0], f.errors[r][1]);
    }

    // All products of a unit: f(sums, m, j, left, right) of rows 2 m and 2 m + 1 of a lane, and of its columns j and j + 2.
    template <class F>
    ON_LANES void products(const Fragment& u, const F& f) {
        UNROLLED for (int part = 0; part < 3; part++)
            UNROLLED for (int m = 0; m < (ROWS + 1) / 2; m++)
                UNROLLED for (int j = 0; j < 2; j++) {
                    Left a;
                    Right b;
                    UNROLLED for (int k = 0; k < 2; k++) {
                        UNROLLED for (int h = 0; h < 2; h++) {
                            const float e = 2 * m + h < ROWS ? u.errors[(2 * m + h) % ROWS][k] : 0.0f;
                            a.at[2 * k + h] = part < 2 ? large_of(e) : minus(e, large_of(e));
                        }
                        b.at[k] = part ? large_of(u.factor[k][j]) : minus(u.factor[k][j], large_of(u.factor[k][j]));
                    }
                    f(part == 1 ? sum : rest, m, j, a, b);
                }
    }
    // The d-th of the sums that a lane has of a product; rows g + 8 may not be there.
    ON_LANES static float& place_of(Tile& sums, float& none, int m, int j, int d) {
        return 2 * m + d / 2 < ROWS ? sums[(2 * m + d / 2) % ROWS][j + d % 2 * 2] : none;
    }

    ON_LANES void hand_over(int panel) {
        UNROLLED for (int r = 0; r < ROWS; r++) {
            float x[4];
            UNROLLED for (int c = 0; c < 4; c++) x[c] = minus(given[0][r][c], plus(sum[r][c], rest[r][c]));
            near_put(beside(errors, r * APART * STRIDE + slot_start(panel) + int(column)), x);
        }
    }
    ON_LANES void move_up() {
        UNROLLED for (int k = 0; k + 1 < KEPT; k++)
            UNROLLED for (int r = 0; r < ROWS; r++)
                UNROLLED for (int c = 0; c < 4; c++) given[k][r][c] = given[k + 1][r][c];
    }
};

// Errors of units first .. last - 1 off a panel, all of which are there. Some after them are loaded and not used.
template <class Lanes>
ON_LANES void take(Lanes& lanes, const Shared& s, int panel, int first, int last) {
    const auto load = [&](int i, int unit) {
        lanes.each([&](auto& lane) { lane.load_errors(lane.held[i], unit), lane.load_factor(lane.held[i], s, panel, unit); });
    };
    if ((last - first) % 2) load(0, first++), lanes.template multiply<0>();
    if (first >= last) return;
    load(0, first);
    ROLLED for (int unit = first; unit < last; unit += 2) {
        load(1, unit + 1);
        lanes.template multiply<0>();
        if (ahead(unit + 2 < last)) load(0, unit + 2);
        lanes.template multiply<1>();
    }
}

// One of the warps that help, `helper` of `helpers`: they take panels in turn. `await(unit)` returns when that unit's errors are in their
// slots, `whole(panel)` when that panel of the factor is in shared memory; `hand_over(panel)` says that the panel is in its slot.
// `Lanes` says how lanes run (`each`) and multiply what they hold.
template <class Lanes, class Meet>
ON_LANES void update(Lanes& lanes, const Problem& p, const Shared& s, Meet& meet, int helper, int helpers) {
    const int panels = p.panels();
    int there = 0;  // units whose errors are known to be there
    ROLLED for (int panel = 1 + helper; panel < panels; panel += helpers) {
        const int units = 2 * panel - 1;  // all but the last, which the warp that solves takes off
        meet.whole(panel);
        lanes.each([&](auto& lane) { lane.clear(); });
        take(lanes, s, panel, 0, there);
        ROLLED for (int unit = there; unit < units; unit++) {
            // The factor is asked for before.
            lanes.each([&](auto& lane) { lane.load_factor(lane.held[0], s, panel, unit); });
            meet.await(unit);
            lanes.each([&](auto& lane) { lane.load_errors(lane.held[0], unit); });
            lanes.template multiply<0>();
        }
        there = units;
        together();  // a slot may be where errors were read from
        lanes.each([&](auto& lane) { lane.hand_over(panel); });
        meet.hand_over(panel);
        lanes.each([&](auto& lane) {
            lane.move_up();
            if (!Lanes::ALL) lane.fetch(p, panel + Lanes::KEPT * helpers, lane.given[Lanes::KEPT - 1]);
        });
    }
}

}  // namespace gptq
