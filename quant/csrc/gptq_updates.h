// The other warps of a team of gptq_lanes.h: while the first solves a panel, they take errors before off those after it.
#pragma once

#include "gptq_lanes.h"

namespace gptq {

// One of 32 lanes, which have a panel's columns of 8 ROWS rows: 4 columns and ROWS rows each, so that 16 bytes of the factor or of errors
// serve for several products. R: rows of a lane that solves.
template <int ROWS, int R>
struct Updates {
    static constexpr int APART = 8;  // in shared memory, from one of a lane's rows to the next
    ON_LANES static constexpr int far(int r) { return r % 4 * APART * R + r / 4; }  // in the block, from the first to row r
    using Tile = float[ROWS][4];
    Tile sum, next;   // a panel less errors; the one after it of this warp as given
    uint32_t row;     // its first
    uint32_t column;  // first of the lane's in a panel
    Near errors;      // [STRIDE] of its first row

    // Lanes that load 16 bytes of the same row, and those that load them from the same columns, lie beside each other: a multiprocessor
    // then serves two lanes at once.
    ON_LANES static uint32_t local_row(uint32_t lane) { return (lane >> 1 & 1) | (lane >> 2 & 6); }
    ON_LANES static uint32_t local_column(uint32_t lane) { return 4 * ((lane & 1) | (lane >> 1 & 2)); }

    // first_row, all_errors: of the team. first_panel: of this warp.
    ON_LANES void begin(const Problem& p, uint32_t lane, uint32_t first_row, Near all_errors, int first_panel) {
        row = first_row + local_row(lane) * R;
        column = local_column(lane), errors = beside(all_errors, int(local_row(lane)) * STRIDE);
        fetch(p, first_panel);
    }

    // A panel as given; 0 beyond the last column, and of rows beyond the last what the last has.
    ON_LANES void fetch(const Problem& p, int panel) {
        if (panel >= p.panels()) return;
        const uint32_t first = panel * PANEL + column;
        if (first + 4 <= p.columns && row + far(ROWS - 1) < p.rows) {
            const float* from = p.block + (first * p.rows + row);
            UNROLLED for (int c = 0; c < 4; c++, from += p.rows)
                UNROLLED for (int r = 0; r < ROWS; r++) next[r][c] = get(from + far(r), true);
        } else {
            ROLLED for (int c = 0; c < 4; c++) {
                const float* const all = p.block + (first + c) * p.rows;
                UNROLLED for (int r = 0; r < ROWS; r++) {
                    const uint32_t at = row + far(r) < p.rows ? row + far(r) : p.rows - 1;
                    const float x = get(all + at, first + c < p.columns);
                    UNROLLED for (int d = 0; d < 4; d++)
                        if (d == c) next[r][d] = x;
                }
            }
        }
    }
    // The panel that was fetched, and loads of the one after it.
    ON_LANES void advance(const Problem& p, int panel) {
        UNROLLED for (int r = 0; r < ROWS; r++)
            UNROLLED for (int c = 0; c < 4; c++) sum[r][c] = next[r][c];
        fetch(p, panel);
    }

    struct Factor {
        Four at[4];
    };
    struct Errors {
        Four at[ROWS];
    };
    ON_LANES static void load(Factor& f, Near u) {
        UNROLLED for (int i = 0; i < 4; i++) f.at[i] = near_four(beside(u, i * PANEL));
    }
    ON_LANES static void load(Errors& e, Near at) {
        UNROLLED for (int r = 0; r < ROWS; r++) e.at[r] = near_four(beside(at, r * APART * STRIDE));
    }
    ON_LANES static void apply(Tile& x, const Errors& e, const Factor& f) {
        UNROLLED for (int i = 0; i < 4; i++)
            UNROLLED for (int r = 0; r < ROWS; r++)
                UNROLLED for (int c = 0; c < 4; c++) x[r][c] = less(x[r][c], e.at[r].at[i], f.at[i].at[c]);
    }

    // Errors of units first .. last - 1 off a panel, all of which are there. Some after them are loaded and not used.
    ON_LANES void take(const Shared& s, int panel, int first, int last) {
        if (first >= last) return;
        Near u = beside(s.factor, panel_start(panel) + first * UNIT * PANEL + int(column)), at = beside(errors, first * UNIT);
        Factor f, g;
        Errors e, d;
        load(e, at), load(f, u);
        ROLLED for (int unit = first; unit < last; unit++) {
            load(d, beside(at, 4)), load(g, beside(u, 4 * PANEL));
            apply(sum, e, f);
            at = beside(at, UNIT), u = beside(u, UNIT * PANEL);
            if (ahead(unit + 1 < last)) load(e, at), load(f, u);
            apply(sum, d, g);
        }
    }
    // Errors of a unit off a panel once they are there: the factor is asked for before.
    template <class Await>
    ON_LANES void take_one(const Shared& s, int panel, int unit, const Await& await) {
        const Near u = beside(s.factor, panel_start(panel) + unit * UNIT * PANEL + int(column)), at = beside(errors, unit * UNIT);
        Factor f, g;
        Errors e, d;
        load(f, u), load(g, beside(u, 4 * PANEL));
        await();
        load(e, at), load(d, beside(at, 4));
        apply(sum, e, f), apply(sum, d, g);
    }

    ON_LANES void hand_over(int panel) {
        UNROLLED for (int r = 0; r < ROWS; r++) near_put(beside(errors, r * APART * STRIDE + slot_start(panel) + int(column)), sum[r]);
    }
};

// One of the warps that help, `helper` of `helpers`: they take panels in turn. `await(unit)` returns when that unit's errors are in their
// slots, `whole(panel)` when that panel of the factor is in shared memory; `hand_over(panel)` says that the panel is in its slot.
template <class Lanes, class Meet>
ON_LANES void update(Lanes& lanes, const Problem& p, const Shared& s, Meet& meet, int helper, int helpers) {
    const int panels = p.panels();
    int there = 0;  // units whose errors are known to be there
    ROLLED for (int panel = 1 + helper; panel < panels; panel += helpers) {
        const int units = 2 * panel - 1;  // all but the last, which the warp that solves takes off
        meet.whole(panel);
        lanes.each([&](auto& lane) {
            lane.advance(p, panel + helpers);
            lane.take(s, panel, 0, there);
        });
        ROLLED for (int unit = there; unit < units; unit++)
            lanes.each([&](auto& lane) { lane.take_one(s, panel, unit, [&] { meet.await(unit); }); });
        there = units;
        together();  // a slot may be where errors were read from
        lanes.each([&](auto& lane) { lane.hand_over(panel); });
        meet.hand_over(panel);
    }
}

}  // namespace gptq
