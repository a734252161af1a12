// The second warp of a team of gptq_lanes.h: while the first solves a panel, it takes the errors of the panels before off those after it.
#pragma once

#include "gptq_lanes.h"

namespace gptq {

// One of 32 lanes, which have a panel's columns of the team's 32 / L rows: 4 columns and 4 / L rows each, so that 16 bytes of the factor or
// of errors serve for several products.
template <int L>
struct Updates {
    static constexpr int ROWS = 4 / L, APART = 8;  // a lane's rows, and from one of them to the next
    using Tile = float[ROWS][4];
    Tile sum, further, next;  // a panel less errors; the one after it less some of them; the one after that as given
    uint32_t row;             // its first
    uint32_t column;          // first of the lane's in a panel
    Near errors;              // [STRIDE] of its first row

    // Lanes that load 16 bytes of the same row, and those that load them from the same columns, lie beside each other: a multiprocessor then
    // serves two lanes at once.
    ON_LANES static uint32_t local_row(uint32_t lane) { return (lane >> 1 & 1) | (lane >> 2 & 6); }
    ON_LANES static uint32_t local_column(uint32_t lane) { return 4 * ((lane & 1) | (lane >> 1 & 2)); }

    // first_row, all_errors: of the team.
    ON_LANES void begin(const Problem& p, uint32_t lane, uint32_t first_row, Near all_errors) {
        row = first_row + local_row(lane);
        column = local_column(lane), errors = beside(all_errors, int(local_row(lane)) * STRIDE);
        UNROLLED for (int panel = 1; panel < 4; panel++) advance(p, panel);
    }

    // A panel as given; 0 beyond the last column, and of rows beyond the last what the last has.
    ON_LANES void fetch(const Problem& p, int panel) {
        if (panel >= p.panels()) return;
        const uint32_t first = panel * PANEL + column;
        if (first + 4 <= p.columns && row + (ROWS - 1) * APART < p.rows) {
            const float* from = p.block + (first * p.rows + row);
            UNROLLED for (int c = 0; c < 4; c++, from += p.rows)
                UNROLLED for (int r = 0; r < ROWS; r++) next[r][c] = get(from + r * APART, true);
        } else {
            ROLLED for (int c = 0; c < 4; c++) {
                const float* const all = p.block + (first + c) * p.rows;
                UNROLLED for (int r = 0; r < ROWS; r++) {
                    const uint32_t at = row + r * APART < p.rows ? row + r * APART : p.rows - 1;
                    const float x = get(all + at, first + c < p.columns);
                    UNROLLED for (int d = 0; d < 4; d++)
                        if (d == c) next[r][d] = x;
                }
            }
        }
    }
    // All moves up; `last` is the panel that comes in.
    ON_LANES void advance(const Problem& p, int last) {
        UNROLLED for (int r = 0; r < ROWS; r++)
            UNROLLED for (int c = 0; c < 4; c++) sum[r][c] = further[r][c], further[r][c] = next[r][c];
        fetch(p, last);
    }

    struct Rows {
        Four error[ROWS], factor[4];
    };
    ON_LANES static void load(Rows& rows, Near u, Near e) {
        UNROLLED for (int r = 0; r < ROWS; r++) rows.error[r] = near_four(beside(e, r * APART * STRIDE));
        UNROLLED for (int i = 0; i < 4; i++) rows.factor[i] = near_four(beside(u, i * PANEL));
    }
    ON_LANES static void apply(Tile& x, const Rows& rows) {
        UNROLLED for (int i = 0; i < 4; i++)
            UNROLLED for (int r = 0; r < ROWS; r++)
                UNROLLED for (int c = 0; c < 4; c++) x[r][c] = less(x[r][c], rows.error[r].at[i], rows.factor[i].at[c]);
    }

    // Errors of panels first .. last - 1 off a panel, x. Some after them are loaded and not used.
    ON_LANES void take(const Shared& s, Tile& x, int panel, int first, int last) {
        if (first >= last) return;
        Near u = beside(s.factor, panel_start(panel) + first * PANEL * PANEL + int(column)), e = beside(errors, slot_start(first));
        Rows one, other;
        load(one, u, e);
        ROLLED for (int i = first * PANEL; i < last * PANEL; i += 8) {
            load(other, beside(u, 4 * PANEL), beside(e, 4));
            apply(x, one);
            u = beside(u, 8 * PANEL), e = beside(e, 8);
            load(one, u, e);
            apply(x, other);
        }
    }

    ON_LANES void hand_over(int panel) {
        UNROLLED for (int r = 0; r < ROWS; r++) near_put(beside(errors, r * APART * STRIDE + slot_start(panel) + int(column)), sum[r]);
    }
};

// Panels whose errors come off this one already while the panel before it waits for its last: as many as give the warp as much to do from
// one panel to the next.
ON_LANES constexpr int ahead(int panel) { return panel < 4 ? 0 : panel == 4 || panel == 7 ? 1 : 2; }

// The warp that helps. `await(panel)` returns when that panel's errors are in their slots, and, of panel 0, all of the factor is in shared
// memory; `hand_over(panel)` says that the panel is in its slot.
template <class Lanes, class Meet>
ON_LANES void update(Lanes& lanes, const Problem& p, const Shared& s, Meet& meet) {
    const int panels = p.panels();
    ROLLED for (int panel = 1; panel < panels; panel++) {
        if (panel > 1) {
            meet.await(panel - 2);
            lanes.each([&](auto& lane) { lane.take(s, lane.sum, panel, panel - 2, panel - 1); });
        }
        lanes.each([&](auto& lane) { lane.hand_over(panel); });
        meet.hand_over(panel);
        lanes.each([&](auto& lane) {
            lane.advance(p, panel + 3);
            if (panel + 1 < panels) lane.take(s, lane.sum, panel + 1, ahead(panel + 1), panel - 1);
            if (panel + 2 < panels) lane.take(s, lane.further, panel + 2, 0, ahead(panel + 2));
        });
    }
    if (panels == 2) meet.whole();  // else it has been there for long
}

}  // namespace gptq
