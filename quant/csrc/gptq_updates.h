// The second warp of a team of gptq_lanes.h: while the first solves a panel, it takes the errors of the panels before off those after it.
#pragma once

#include "gptq_results.h"

namespace gptq {

// One of 32 lanes, which have a panel's columns of the team's 32 / L rows: some columns and rows each, so that what is loaded of the
// factor or of errors serves for several products.
template <int L, bool PLAIN>
struct Updates {
    static constexpr int COLUMNS = word_of<L>, ROWS = PANEL / L / COLUMNS;     // of a lane
    static constexpr int APART = 32 / L / ROWS;                                // from one of its rows to the next
    using Tile = float[ROWS][COLUMNS];
    Tile sum, further, next;  // a panel less errors; the one after it less some of them; the one after that as given
    uint32_t row;             // its first
    uint32_t column;          // first of the lane's in a panel
    Near errors;              // [STRIDE] of its first row
    Near last_u, last_e;
    Results<L, PLAIN> results;

    // Lanes that load 16 bytes of the same row, and those that load them from the same columns, lie beside each other: a multiprocessor then
    // serves two lanes at once.
    static constexpr bool TWO = PANEL / COLUMNS == 2;
    ON_LANES static uint32_t local_row(uint32_t lane) { return TWO ? lane >> 1 : (lane >> 1 & 1) | (lane >> 2 & 6); }
    ON_LANES static uint32_t local_column(uint32_t lane) { return COLUMNS * (TWO ? lane & 1 : (lane & 1) | (lane >> 1 & 2)); }

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
        if (first + COLUMNS <= p.columns && row + (ROWS - 1) * APART < p.rows) {
            const float* from = p.block + (first * p.rows + row);
            UNROLLED for (int c = 0; c < COLUMNS; c++, from += p.rows)
                UNROLLED for (int r = 0; r < ROWS; r++) next[r][c] = get(from + r * APART, true);
        } else {
            ROLLED for (int c = 0; c < COLUMNS; c++) {
                const float* const all = p.block + (first + c) * p.rows;
                UNROLLED for (int r = 0; r < ROWS; r++) {
                    const uint32_t at = row + r * APART < p.rows ? row + r * APART : p.rows - 1;
                    const float x = get(all + at, first + c < p.columns);
                    UNROLLED for (int d = 0; d < COLUMNS; d++)
                        if (d == c) next[r][d] = x;
                }
            }
        }
    }
    // All moves up; `last` is the panel that comes in.
    ON_LANES void advance(const Problem& p, int last) {
        UNROLLED for (int r = 0; r < ROWS; r++)
            UNROLLED for (int c = 0; c < COLUMNS; c++) sum[r][c] = further[r][c], further[r][c] = next[r][c];
        fetch(p, last);
    }

    struct Rows {
        Four error[ROWS];
        float factor[4][COLUMNS];
    };
    ON_LANES static void load(Rows& rows, Near u, Near e) {
        UNROLLED for (int r = 0; r < ROWS; r++) rows.error[r] = near_four(beside(e, r * APART * STRIDE));
        UNROLLED for (int i = 0; i < 4; i++) near_some<COLUMNS>(beside(u, i * PANEL), rows.factor[i]);
    }
    ON_LANES static void apply(Tile& x, const Rows& rows) {
        UNROLLED for (int i = 0; i < 4; i++)
            UNROLLED for (int r = 0; r < ROWS; r++)
                UNROLLED for (int c = 0; c < COLUMNS; c++) x[r][c] = less(x[r][c], rows.error[r].at[i], rows.factor[i][c]);
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

    // Those of the one panel that has been aimed at, which is waited for.
    ON_LANES void take_last() {
        UNROLLED for (int i = 0; i < PANEL; i += 8) {
            Rows one, other;
            load(one, beside(last_u, i * PANEL), beside(last_e, i));
            load(other, beside(last_u, (i + 4) * PANEL), beside(last_e, i + 4));
            apply(sum, one);
            apply(sum, other);
        }
    }
    ON_LANES void aim(const Shared& s, int panel, int last) {
        last_u = beside(s.factor, panel_start(panel) + last * PANEL * PANEL + int(column)), last_e = beside(errors, slot_start(last));
    }

    ON_LANES void hand_over(int panel) {
        UNROLLED for (int r = 0; r < ROWS; r++) {
            const Near to = beside(errors, r * APART * STRIDE + slot_start(panel) + int(column));
            COLUMNS == 4 ? near_put(to, sum[r]) : near_put_two(to, sum[r]);
        }
    }
};

// Panels whose errors come off this one already while the panel before it waits for its last: as many as give the warp as much to do from
// one panel to the next.
ON_LANES constexpr int ahead(int panel) {
    if (PANEL == 16) return panel < 4 ? 0 : panel == 4 || panel == 7 ? 1 : 2;
    return panel < 4 ? 0 : panel < 9 ? panel - 3 : 5;
}

// The warp that helps. `await(panel)` returns when that panel's errors and codes are in their slots, and, of panel 0, all of the factor is
// in shared memory, `await_last()` when the last one's are; `hand_over(panel)` says that the panel is in its slot.
template <class Lanes, class Meet>
ON_LANES void update(Lanes& lanes, const Problem& p, const Shared& s, Meet& meet) {
    const int panels = p.panels();
    ROLLED for (int panel = 1; panel < panels + 2; panel++) {
        const bool more = panel < panels;
        if (panel > 1) {
            if (more) lanes.each([&](auto& lane) { lane.aim(s, panel, panel - 2); });
            panel - 1 < panels ? meet.await(panel - 2) : meet.await_last();
            if (more) lanes.each([&](auto& lane) { lane.take_last(); });
            lanes.each([&](auto& lane) { lane.results.read(p, panel - 2); });
            meet.together();
        }
        if (more) {
            lanes.each([&](auto& lane) { lane.hand_over(panel); });
            meet.hand_over(panel);
        }
        lanes.each([&](auto& lane) {
            if (panel > 1) lane.results.write(p, panel - 2);
            lane.advance(p, panel + 3);
            if (panel + 1 < panels) lane.take(s, lane.sum, panel + 1, ahead(panel + 1), panel - 1);
            if (panel + 2 < panels) lane.take(s, lane.further, panel + 2, 0, ahead(panel + 2));
        });
    }
    lanes.each([&](auto& lane) { lane.results.tell(); });
    meet.together();
    lanes.each([&](auto& lane) { lane.results.finish(p, s); });
}

}  // namespace gptq
