// The column loop of gptq_block for a row of the weight that several lanes of a warp share. Compiles for a GPU (gptq_block.cu) and,
// with the exchange between lanes emulated, for the host (gptq_lanes.cpp).
//
// A row's columns are taken PANEL at a time, by a team of two warps (`Lane`, and `Updates` of gptq_updates.h). One solves the panels: its lanes
// give each other their own PANEL / L columns of a panel; then each of them solves it, all with the same result, so that no exchange and no
// barrier stands between two columns. A column is a chain of some 14 operations that wait for each other. Beside it the error of the column
// before comes off the rest of its panel, and off the lane's own columns of the next panel. Off these the other warp has taken the errors of
// all panels before, many independent sums, while the panel before was solved; it hands them over through shared memory. Each column's
// subtractions are made in the order of the plain loop, each fused with its product (`less`); all else is rounded operation by operation.
// Results are those of the plain loop with such subtractions, bit for bit, however many lanes share a row.
//
// Divisions: with y = 1 / b rounded to nearest, q = a · y and r = a - q · b (fused), q + r · y (fused) is a / b rounded to nearest, as
// long as r is exact and nothing overflows. Near the middle between two floats q is off by half a unit (proof: Markstein 1990) or, only
// where a's mantissa is below b's, by up to 1.5 units less 2^-23 of one, where what is left of the error is smaller than the distance
// to the middle. Rows where a number is too small or too large for that are solved again with plain divisions (`redo`).
//
// Ranges that are found here (`Problem.words`) are found before all that (gptq_found.h), from the block as it is given: the loop reads them
// as if given.
#pragma once

#include <cstring>

#include "gptq_numbers.h"

namespace gptq {

constexpr int PANEL = 16, MOST = 128;  // columns
constexpr int FENCED = 4;              // columns whose instructions the compiler may mix
constexpr int ARRIVAL = 8;             // of a panel's columns, the one before which what is next has come
// A row's floats in shared memory: of a panel first what it is less the errors of all panels but the one before it, then its errors. Those of
// the last two nobody asks for: they share a slot, which is free in time.
constexpr int SLOTS = MOST / PANEL - 1;
constexpr int STRIDE = SLOTS * PANEL + 4;  // eight rows' 16 bytes at a time lie in 32 banks
static_assert(STRIDE % 8 == 4, "an odd multiple of 4");
ON_LANES constexpr int slot_start(int panel) { return PANEL * (panel < SLOTS ? panel : SLOTS - 1); }

enum Kind : int { WHOLE = 0, REAL_ZERO = 1, MINIMUM = 2 };

struct Problem {
    const float *block, *upper;                      // [B, N], [B, B]
    float *scale, *zero;                             // [G, N]; written to where ranges are found here
    float *codes, *values, *errors;                  // [B, N]
    float* loss;                                     // [N], added to; may be null
    const float* tops;                               // [N], largest code of each row; null: top in all
    const int32_t* words;                            // [N], how each row's ranges are found (`ranges::Fit`); null: all are given
    int32_t* odd;                                    // added to where words are there
    int64_t upper_stride, scale_stride, zero_stride;  // floats between rows
    uint32_t columns, rows;                          // B, N; B * N < 2^30
    float top;
    int kind;
    int32_t group[MOST];  // row of scale and zero of each column
    uint32_t fresh;       // bit p: panel p's first column is of another group than that of the panel before
    uint32_t busy;        // bit p: before panel p there is more to do than to move up

    // Once all else is there.
    void count_groups(bool plain) {
        fresh = 1;
        for (uint32_t panel = 1; panel * PANEL < columns; panel++)
            fresh |= uint32_t(group[panel * PANEL] != group[(panel - 1) * PANEL]) << panel;
        busy = plain ? fresh | fresh >> 1 | 3 : ~0u;
    }
    ON_LANES int panels() const { return int(columns + PANEL - 1) / PANEL; }
    ON_LANES bool kept(int panel) const { return panel + 2 < panels(); }  // its errors come off more than the next panel
};

// ---- what the fast divisions take ----

// Scales and diagonals within these; differences of 0 or at least 2^-60; sums of squared errors below 2^90, so that a weight
// whose quotient overflows (|w| > 2^77) cannot be missed.
constexpr float LEAST_SCALE = 0x1p-50f, MOST_SCALE = 0x1p60f, LEAST_DIAGONAL = 0x1p-30f, MOST_DIAGONAL = 0x1p30f, MOST_LOSS = 0x1p90f;
constexpr float MOST_ZERO = 0x1p20f;             // of whole zeros: what `nearest` takes
constexpr uint32_t LEAST_BITS = 2u * 0x21800000u;  // of 2^-60, without the sign

struct alignas(8) Pivot {
    float diagonal, inverse;  // inverse NaN where the diagonal is out of range: then every error is
};

ON_LANES Pivot pivot(float diagonal) {
    const bool fits = fabsf(diagonal) >= LEAST_DIAGONAL && fabsf(diagonal) <= MOST_DIAGONAL;
    return {diagonal, fits ? inverse(diagonal) : NAN};
}

// The factor's panels one after another: panel p is rows 0 .. PANEL (p + 1) - 1 of its PANEL columns.
ON_LANES constexpr int panel_start(int panel) { return PANEL * PANEL * (panel * (panel + 1) / 2); }
constexpr int FACTOR = PANEL * PANEL * ((MOST / PANEL) * (MOST / PANEL + 1) / 2);

struct Shared {
    Near factor;  // [FACTOR] floats, 16 bytes aligned; 0 beyond B
    Near pivots;  // [MOST] of `Pivot`; beyond B with inverse 0, so that errors are 0 there
};

struct Range {
    float scale, inverse, zero;
};

// One of L lanes of a row. PLAIN: whole zeros, one group for each panel, whole panels.
template <int L, bool PLAIN>
struct Lane {
    static constexpr int OWN = PANEL / L, GROUPS = PLAIN ? 1 : PANEL;
    float x[PANEL];  // the panel that is solved; a solved column's error takes its place
    float own[OWN];  // of the panel after it
    Range ranges[GROUPS];
    float scales[GROUPS], zeros[GROUPS];  // of the panel after it
    float loss, top;
    uint32_t low;  // least |w - q| but 0, as the float's bits without the sign, less 1
    uint32_t row, part;
    bool alive;   // false beyond the last row: such lanes do what the last row's do, store the same, and solve nothing again
    Near errors;  // [STRIDE]

    ON_LANES void begin(const Problem& p, uint32_t given_row, uint32_t given_part, Near given_errors) {
        alive = given_row < p.rows;
        row = alive ? given_row : p.rows - 1;
        part = given_part, errors = given_errors;
        loss = 0.0f, low = 0xffffffffu;
        top = p.tops ? p.tops[row] : p.top;
        const uint32_t column = part * OWN;
        uint32_t at = column * p.rows + row;
        UNROLLED for (int c = 0; c < OWN; c++) {
            own[c] = get(p.block + at, PLAIN || column + c < p.columns);
            advance(at, p.rows);
        }
    }

    ON_LANES void fetch_ranges(const Problem& p, uint32_t first) {
        UNROLLED for (int c = 0; c < GROUPS; c++) {
            const bool real = PLAIN || first + c < p.columns;
            scales[c] = real ? p.scale[p.group[first + c] * p.scale_stride + row] : 1.0f;
            zeros[c] = real ? p.zero[p.group[first + c] * p.zero_stride + row] : 0.0f;
        }
    }

    // Before a panel: its ranges, and loads of the next panel's.
    ON_LANES void renew(const Problem& p, int panel) {
        if (!PLAIN || p.fresh >> panel & 1) UNROLLED for (int c = 0; c < GROUPS; c++) ranges[c] = range(scales[c], zeros[c], p.kind);
        if (PLAIN ? p.fresh >> panel & 2 : (panel + 1) * PANEL < int(p.columns)) fetch_ranges(p, (panel + 1) * PANEL);
    }

    ON_LANES Range range(float scale, float zero, int kind) {
        bool fits = fabsf(scale) >= LEAST_SCALE && fabsf(scale) <= MOST_SCALE;
        if (kind == WHOLE) fits &= fabsf(zero) <= MOST_ZERO && zero == nearest(zero);
        // A group of equal values has scale 0; its minimum alone is exact: 0 steps.
        const bool flat = kind == MINIMUM && scale == 0.0f;
        if (!fits && !flat) low = 0;
        return {scale, flat ? 0.0f : inverse(scale), zero};
    }

    // A solved column but its error, and what of the factor this takes off columns of its panel.
    struct Solved {
        float code, value;
        Four u[PANEL / 4];
    };

    // Its error off the columns of its panel from `first` on.
    ON_LANES void take(const Solved& last, float error, int first, int end) {
        UNROLLED for (int d = 0; d < PANEL; d++)
            if (d >= first && d < end) x[d] = less(x[d], error, last.u[d / 4].at[d % 4]);
    }

    ON_LANES void solve(const Problem& p, int c, Near pivots, Solved& made) {
        const Range& r = ranges[c % GROUPS];
        if (PLAIN) {
            // Cut before rounding: the same, as its ends are whole.
            const float whole = nearest(limited(divided(x[c], r.scale, r.inverse), -r.zero, top - r.zero));
            made.code = plus(whole, r.zero);
            made.value = times(whole, r.scale);
        } else {
            // One form for all kinds: what a kind does not have is 0, and adding 0 is exact.
            const float whole_zero = p.kind == WHOLE ? r.zero : 0.0f, real_zero = p.kind == REAL_ZERO ? r.zero : 0.0f;
            const float minimum = p.kind == MINIMUM ? r.zero : 0.0f;
            const float steps = plus(divided(minus(x[c], minimum), r.scale, r.inverse), real_zero);
            const float whole = nearest(limited(steps, -whole_zero, top - whole_zero));
            made.code = plus(whole, whole_zero);
            made.value = plus(times(minus(whole, real_zero), r.scale), minimum);
        }
        Pivot pivot;
        near_two(beside(pivots, 2 * c), pivot.diagonal, pivot.inverse);
        const float missed = minus(x[c], made.value);
        const uint32_t size = 2u * bits_of(missed) - 1u;
        low = size < low ? size : low;
        x[c] = divided(missed, pivot.diagonal, pivot.inverse);
    }

    // Where a panel's columns are stored, one after another. The lanes of a row share the stores; some are made twice, which costs less
    // than to ask.
    struct Stores {
        static constexpr int COUNT = L > 2 ? 1 : 4 - L;
        float* base[COUNT];
        uint32_t at;
        Stores() = default;
        ON_LANES Stores(const Problem& p, const Lane& lane, uint32_t first) {
            base[COUNT - 1] = L < 4 || lane.part > 1 ? p.errors : lane.part ? p.values : p.codes;
            if (L == 2) base[0] = lane.part ? p.values : p.codes;
            if (L == 1) base[0] = p.codes, base[COUNT / 2] = p.values;
            at = first * p.rows + lane.row;
        }
        ON_LANES void put(const Problem& p, uint32_t part, const Solved& made, float error, bool real) {
            gptq::put<PLAIN>(base[COUNT - 1] + at, L < 4 || part > 1 ? error : part ? made.value : made.code, real);
            if (L == 2) gptq::put<PLAIN>(base[0] + at, part ? made.value : made.code, real);
            if (L == 1) gptq::put<PLAIN>(base[0] + at, made.code, real), gptq::put<PLAIN>(base[COUNT / 2] + at, made.value, real);
            advance(at, p.rows);
        }
    };

    // What goes on through the columns of a panel.
    struct Course {
        int panel, real;  // real: columns
        Near u, v, pivots;
        Stores to;
        Solved last;
    };

    static constexpr int AT_ONCE = (2 * PANEL - ARRIVAL - 2) / (PANEL - ARRIVAL);
    // Columns whose errors are off the panel after theirs once column c is solved: all before it, if there was time enough.
    ON_LANES static constexpr int taken(int c) {
        const int even = ((PANEL - 1) * (c - ARRIVAL + 1) + PANEL - ARRIVAL - 1) / (PANEL - ARRIVAL);
        return c < ARRIVAL ? 0 : even < c ? even : c;
    }

    // The panel in x, and its columns until those of the panel after it are needed.
    ON_LANES Course start(const Problem& p, const Shared& s, int panel) {
        const int first = panel * PANEL, next = panel_start(panel + 1) + first * PANEL + int(part) * OWN;
        Course now{panel,
                   int(p.columns) - first,
                   beside(s.factor, panel_start(panel) + first * PANEL),
                   beside(s.factor, panel + 1 < p.panels() ? next : 0),
                   beside(s.pivots, 2 * first),
                   Stores(p, *this, first),
                   {}};
        solve_columns<0, ARRIVAL, false>(p, now);
        return now;
    }
    ON_LANES void receive(int panel) {
        UNROLLED for (int c = 0; c < OWN; c += 4) {
            const Four four = near_four(beside(errors, slot_start(panel) + int(part) * OWN + c));
            UNROLLED for (int i = 0; i < 4; i++) own[c + i] = four.at[i];
        }
    }
    // MORE: errors come off the panel after it. Where there is none, that costs least time if lanes have few columns of it.
    template <bool MORE>
    ON_LANES void end(const Problem& p, Course& now) {
        solve_columns<ARRIVAL, PANEL, MORE>(p, now);
        finish_column(p, now, PANEL - 1);
        if (MORE) take_own(now, taken(PANEL - 1), PANEL);
        if (p.kept(now.panel)) UNROLLED for (int c = 0; c < PANEL; c += 4) near_put(beside(errors, slot_start(now.panel) + c), x + c);
    }

    // While a column is divided and rounded, a chain of operations that wait for each other, the error of the column before comes off the
    // others. Fences keep the compiler from putting the chains of many columns first, and what could run beside them last.
    template <int FROM, int TO, bool MORE>
    ON_LANES void solve_columns(const Problem& p, Course& now) {
        UNROLLED for (int c = FROM; c < TO; c++) {
            const uint32_t before = low;
            Solved made;
            if (c) take(now.last, x[c - 1], c, c + 1);
            UNROLLED for (int d = (c + 1) / 4; d < PANEL / 4; d++) made.u[d] = near_four(beside(now.u, c * PANEL + 4 * d));
            Four v[AT_ONCE][OWN / 4];
            UNROLLED for (int k = 0; k < AT_ONCE; k++)
                if (MORE && taken(c - 1) + k < taken(c))
                    UNROLLED for (int d = 0; d < OWN / 4; d++) v[k][d] = near_four(beside(now.v, (taken(c - 1) + k) * PANEL + 4 * d));
            solve(p, c, now.pivots, made);
            if (c) finish_column(p, now, c - 1);
            UNROLLED for (int k = 0; k < AT_ONCE; k++)
                if (MORE && taken(c - 1) + k < taken(c))
                    UNROLLED for (int d = 0; d < OWN; d++) own[d] = less(own[d], x[taken(c - 1) + k], v[k][d / 4].at[d % 4]);
            now.last = made;
            if (c % FENCED == FENCED - 1) {
                // All that was made is made here.
                UNROLLED for (int d = c; d < PANEL; d++) pin(x[d]);
                if (MORE) UNROLLED for (int d = 0; d < OWN; d++) pin(own[d]);
                pin(loss), pin(now.last.code), pin(now.last.value);
                fence(before);
            }
        }
    }

    // What can wait of a column.
    ON_LANES void finish_column(const Problem& p, Course& now, int c) {
        take(now.last, x[c], c + 2, PANEL);
        loss = fused(x[c], x[c], loss);
        now.to.put(p, part, now.last, x[c], c < now.real);
    }
    ON_LANES void take_own(const Course& now, int first, int end) {
        UNROLLED for (int c = 0; c < PANEL; c++) {
            if (c < first || c >= end) continue;
            UNROLLED for (int d = 0; d < OWN; d += 4) {
                const Four v = near_four(beside(now.v, c * PANEL + d));
                UNROLLED for (int i = 0; i < 4; i++) own[d + i] = less(own[d + i], x[c], v.at[i]);
            }
        }
    }

    ON_LANES void finish(const Problem& p) {
#ifdef __CUDACC__
        __syncwarp();  // what all of the row's lanes stored comes before what one of them may
#endif
        if (!alive || part) return;
        if (low < LEAST_BITS - 1u || !(loss < MOST_LOSS)) redo(p);
        if (p.loss) p.loss[row] = plus(p.loss[row], loss);
    }

    // The row once more, with divisions for any number.
    ON_LANES void redo(const Problem& p) {
        loss = 0.0f;
        ROLLED for (uint32_t j = 0; j < p.columns; j++) {
            const uint32_t at = j * p.rows + row;
            float w = p.block[at];
            ROLLED for (uint32_t i = 0; i < j; i++) w = less(w, p.errors[i * p.rows + row], p.upper[i * p.upper_stride + j]);
            const float scale = p.scale[p.group[j] * p.scale_stride + row], zero = p.zero[p.group[j] * p.zero_stride + row];
            float code, value;
            if (p.kind == MINIMUM) {
                code = scale == 0.0f ? 0.0f : over(minus(w, zero), scale);
                code = rintf(code < 0.0f ? 0.0f : code > top ? top : code);
                value = plus(times(code, scale), zero);
            } else {
                code = over(w, scale);
                code = p.kind == REAL_ZERO ? rintf(plus(code, zero)) : plus(rintf(code), zero);
                code = code < 0.0f ? 0.0f : code > top ? top : code;
                value = times(minus(code, zero), scale);
            }
            const float error = over(minus(w, value), p.upper[j * p.upper_stride + j]);
            loss = fused(error, error, loss);
            p.codes[at] = code, p.values[at] = value, p.errors[at] = error;
        }
    }
};

// The warp that solves. `Lanes` says how its lanes run and exchange: `each(f)` is f of every lane, `share` gives all lanes of a row its own
// columns of all of them. `ready(panel)` returns when that panel of the factor and the next are in shared memory, after panel 1 all;
// `receive(panel)` when the other warp has put that panel into its slot. `send(panel)` says that its errors are there.
template <int L, class Lanes, class Meet>
ON_LANES void sweep(Lanes& lanes, const Problem& p, const Shared& s, Meet& meet) {
    const int panels = p.panels();
    ROLLED for (int panel = 0; panel < panels; panel++) {
        if (p.busy >> panel & 1) {
            lanes.each([&](auto& lane) { lane.renew(p, panel); });
            if (panel < 2) meet.ready(panel);
        }
        lanes.share();
        lanes.start(p, s, panel);
        const bool more = panel + 1 < panels;
        if (more) {
            meet.receive(panel + 1);
            lanes.each([&](auto& lane) { lane.receive(panel + 1); });
        }
        if (more || L > 1)
            lanes.template end<true>(p);
        else
            lanes.template end<false>(p);
        if (p.kept(panel)) meet.send(panel);
    }
    lanes.each([&](auto& lane) { lane.finish(p); });
}

}  // namespace gptq
