// The column loop of gptq_block for a row of the weight that several lanes of a warp share. Compiles for a GPU (gptq_block.cu) and,
// with the exchange between lanes emulated, for the host (gptq_lanes.cpp).
//
// A row's columns are taken PANEL at a time, by a team of warps (`Lane`, and `Updates` of gptq_updates.h). One solves the panels: its lanes
// give each other their own PANEL / L columns of a panel; then each of them solves it, all with the same result, so that no exchange and no
// barrier stands between two columns. A column is a chain of 13 operations that wait for each other, some 55 cycles. Beside it the error of
// the column before comes off the rest of its panel, and errors of the panel's second half off the lane's own columns of the next panel.
// The other warps add up what all errors before take off that, on tensor cores, each of panels of its own, and hand over the panel less the
// sum through shared memory. What a multiprocessor's warps read from there, not what they compute, takes the time: the solving warps' reads
// of the factor above all, which one row of a lane needs as often as two. All but the sums of the others is rounded operation by operation,
// or fused with its product (`less`). A row's results are the same, bit for bit, however many lanes share it and whatever stands beside it.
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
constexpr int UNIT = 8;                // columns whose errors are handed over at once
// A row's floats in shared memory: of a panel first what it is less the errors that others take off, then its errors. The last two panels
// share a slot: when the last is put there, the one before has been read, and so have its errors that anybody asks for.
constexpr int SLOTS = MOST / PANEL - 1;
constexpr int STRIDE = SLOTS * PANEL + 4;  // eight rows' 16 bytes at a time lie in 32 banks
static_assert(STRIDE % 8 == 4, "an odd multiple of 4");
ON_LANES constexpr int slot_start(int panel) { return PANEL * (panel < SLOTS ? panel : SLOTS - 1); }
constexpr int FIRST_RANGE = 4 * MOST / PANEL;  // of a row's floats before it is solved: scale and zero of its first column

// In place of a number of lanes: each lane has two rows. Plain; rows a multiple of 64; values and errors aligned to 8 bytes, codes to 2.
constexpr int TWO_ROWS = -2;

enum Kind : int { WHOLE = 0, REAL_ZERO = 1, MINIMUM = 2 };

struct Problem {
    const float *block, *upper;                      // [B, N], [B, B]
    float *scale, *zero;                             // [G, N]; written to where ranges are found here
    uint8_t* codes;                                  // [B, N]
    float *values, *errors;                          // [B, N]; values may be null: nobody wants them
    float* loss;                                     // [N], added to; may be null
    const float* tops;                               // [N], largest code of each row; null: top in all
    const int32_t* words;                            // [N], how each row's ranges are found (`ranges::Fit`); null: all are given
    int32_t* odd;                                    // added to where words are there
    int64_t upper_stride, scale_stride, zero_stride;  // floats between rows
    uint32_t columns, rows;                          // B, N; B * N < 2^30
    float top;
    int kind;
    uint32_t early;       // a launch begins before the one in front of it is over
    uint32_t fresh;       // bit p: panel p's first column is of another group than that of the panel before
    uint32_t busy;        // bit p: before panel p there is more to do than to move up
    int32_t group[MOST];  // row of scale and zero of each column

    // Once all else is there.
    void count_groups(bool plain) {
        fresh = 1;
        for (uint32_t panel = 1; panel * PANEL < columns; panel++)
            fresh |= uint32_t(group[panel * PANEL] != group[(panel - 1) * PANEL]) << panel;
        busy = plain ? fresh | fresh >> 1 | 3 : ~0u;
    }
    ON_LANES int panels() const { return int(columns + PANEL - 1) / PANEL; }
    ON_LANES bool kept(int panel) const { return panel + 2 < panels(); }  // its second unit's errors come off more than the next panel
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

// The factor's panels one after another: panel p is rows 0 .. PANEL (p + 1) - 1 of its PANEL columns. A unit's rows lie in the order of
// their bits reversed, every second two with halves exchanged: a warp reads 8 bytes a lane of rows 0, 2, 4 and 6 without conflicts.
ON_LANES constexpr int panel_start(int panel) { return PANEL * PANEL * (panel * (panel + 1) / 2); }
ON_LANES constexpr int half_of(int row) { return row >> 1 & 1; }  // where its columns' first half is
ON_LANES constexpr int row_start(int row) { return PANEL * ((row & ~7) + (row << 2 & 4) + (row & 2) + (row >> 2 & 1)); }
ON_LANES constexpr int in_factor(int row, int column) { return row_start(row) + (column ^ PANEL / 2 * half_of(row)); }
constexpr int FACTOR = PANEL * PANEL * ((MOST / PANEL) * (MOST / PANEL + 1) / 2);

struct Shared {
    Near factor;  // [FACTOR] floats, 16 bytes aligned; 0 beyond B
    Near pivots;  // [MOST] of `Pivot`; beyond B with inverse 0, so that errors are 0 there
};

struct Range {
    float scale, inverse, zero, zero_byte;
};

// One of L lanes of a row, or, L being 1, a lane of R rows beside each other; in shared memory they are APART. PLAIN: whole zeros, one
// group for each panel, whole panels.
template <int L, bool PLAIN, int R = 1>
struct Lane {
    static constexpr int OWN = PANEL / L, GROUPS = PLAIN ? 1 : PANEL, APART = 32;
    static constexpr int ARRIVAL = R > 1 ? 15 : L > 1 ? 14 : 12;  // of a panel's columns, the one before which what is next has come
    // Bit c: the compiler mixes no instructions of columns to c with those after it. By what makes the fewest cycles of its code: it would
    // put what can wait of many columns before the last of them, and all of the next panel's after a panel's chain.
    static constexpr uint32_t FENCES = L > 1 ? 0xc080 : R > 1 ? 0xa080 : 0xa000;
    static_assert(L == 1 || L == 4, "");
    static_assert(R == 1 || (R == 2 && L == 1 && PLAIN), "");

    // A solved column but its error, and what of the factor this takes off columns of its panel.
    struct Solved {
        float code[R], value[R];  // code: + `BYTES`
        Four u[PANEL / 4];
    };

    // Where columns are stored, one after another. The lanes of a row share the stores; some are made twice, which costs less than to ask.
    struct Stores {
        uint8_t* codes;
        float *floats[L > 1 ? 1 : 2];  // values and errors, or what a lane has chosen of these
        uint32_t at;
        bool values;  // are wanted
        ON_LANES void begin(const Problem& p, uint32_t row, uint32_t part) {
            at = row, values = p.values != nullptr, codes = p.codes;
            floats[0] = L == 1 ? p.values : settled(of_errors(part) ? p.errors : p.values);  // settled: else they are constants
            if (L == 1) floats[L == 1] = p.errors;
        }
        // Of four lanes' parts: two store errors, or three.
        ON_LANES bool of_errors(uint32_t part) const { return part > 1 || (part && !values); }
        ON_LANES void put(const Problem& p, uint32_t part, const Solved& made, const float (&x)[R][PANEL], int c, bool real) {
            const float error = x[0][c], value = made.value[0], code = made.code[0];
            if (R > 1) {
                put_two(floats[L == 1] + at, error, x[R - 1][c]);
                put_bytes(codes + at, code, made.code[R - 1]);
                if (values) put_two(floats[0] + at, value, made.value[R - 1]);
            } else if (L > 1) {
                put_byte<false>(codes + at, code, !part && (PLAIN || real));
                gptq::put<false>(floats[0] + at, of_errors(part) ? error : value, part && (PLAIN || real));
            } else {
                gptq::put<PLAIN>(floats[L == 1] + at, error, real);
                put_byte<PLAIN>(codes + at, code, real);
                if (values) gptq::put<PLAIN>(floats[0] + at, value, real);
            }
            advance(at, p.rows);
        }
    };

    float x[R][PANEL];  // the panel that is solved; a solved column's error takes its place
    float own[R][OWN];  // of the panel after it
    Range ranges[R][GROUPS];
    float scales[R][GROUPS], zeros[R][GROUPS];  // of the panel after it
    float loss[R], top[R];
    uint32_t low[R];  // least |w - q| but 0, as the float's bits without the sign, less 1
    uint32_t row, part;
    bool alive;   // false beyond the last row: such lanes do what the last row's do, store the same, and solve nothing again
    Near errors;  // [STRIDE]
    Stores to;

    // R > 1: all rows are there.
    ON_LANES void begin(const Problem& p, uint32_t given_row, uint32_t given_part, Near given_errors) {
        alive = R > 1 || given_row < p.rows;
        row = alive ? given_row : p.rows - 1;
        part = given_part, errors = given_errors;
        to.begin(p, row, part);
        const uint32_t column = part * OWN;
        UNROLLED for (int r = 0; r < R; r++) {
            loss[r] = 0.0f, low[r] = 0xffffffffu;
            top[r] = p.tops ? p.tops[row + r] : p.top;
        }
        uint32_t at = column * p.rows + row;
        UNROLLED for (int c = 0; c < OWN; c++) {
            UNROLLED for (int r = 0; r < R; r++) own[r][c] = get(p.block + at + r, PLAIN || column + c < p.columns);
            advance(at, p.rows);
        }
    }

    ON_LANES void fetch_ranges(const Problem& p, uint32_t first) {
        UNROLLED for (int c = 0; c < GROUPS; c++) {
            const bool real = PLAIN || first + c < p.columns;
            UNROLLED for (int r = 0; r < R; r++) {
                scales[r][c] = real ? p.scale[p.group[first + c] * p.scale_stride + row + r] : 1.0f;
                zeros[r][c] = real ? p.zero[p.group[first + c] * p.zero_stride + row + r] : 0.0f;
            }
        }
    }

    // The first panel's, where they are found here.
    ON_LANES void take_ranges(const Problem& p) {
        if (!PLAIN || !alive) {
            fetch_ranges(p, 0);
        } else {
            UNROLLED for (int r = 0; r < R; r++) {
                const Four four = near_four(beside(errors, r * APART * STRIDE + FIRST_RANGE));
                scales[r][0] = four.at[0], zeros[r][0] = four.at[1];
            }
        }
    }

    // Before a panel: its ranges, and loads of the next panel's.
    ON_LANES void renew(const Problem& p, int panel) {
        if (!PLAIN || p.fresh >> panel & 1)
            UNROLLED for (int r = 0; r < R; r++)
                UNROLLED for (int c = 0; c < GROUPS; c++) ranges[r][c] = range(scales[r][c], zeros[r][c], p.kind, low[r]);
        if (PLAIN ? p.fresh >> panel & 2 : (panel + 1) * PANEL < int(p.columns)) fetch_ranges(p, (panel + 1) * PANEL);
    }

    ON_LANES static Range range(float scale, float zero, int kind, uint32_t& low) {
        bool fits = fabsf(scale) >= LEAST_SCALE && fabsf(scale) <= MOST_SCALE;
        if (kind == WHOLE) fits &= fabsf(zero) <= MOST_ZERO && zero == nearest(zero);
        // A group of equal values has scale 0; its minimum alone is exact: 0 steps.
        const bool flat = kind == MINIMUM && scale == 0.0f;
        if (!fits && !flat) low = 0;
        return {scale, flat ? 0.0f : inverse(scale), zero, plus(zero, BYTES)};
    }

    // Its errors off the columns of its panel from `first` on.
    ON_LANES void take(const Solved& last, int c, int first, int end) {
        UNROLLED for (int d = 0; d < PANEL; d++)
            if (d >= first && d < end) UNROLLED for (int r = 0; r < R; r++) x[r][d] = less(x[r][d], x[r][c], last.u[d / 4].at[d % 4]);
    }

    ON_LANES void solve(const Problem& p, int c, Near pivots, Solved& made) {
        Pivot pivot;
        near_two(beside(pivots, 2 * c), pivot.diagonal, pivot.inverse);
        UNROLLED for (int r = 0; r < R; r++) {
            const Range& range = ranges[r][c % GROUPS];
            if (PLAIN) {
                // Cut before rounding: the same, as its ends are whole.
                const float whole = nearest(limited(divided(x[r][c], range.scale, range.inverse), -range.zero, top[r] - range.zero));
                made.code[r] = plus(whole, range.zero_byte);
                made.value[r] = times(whole, range.scale);
            } else {
                // One form for all kinds: what a kind does not have is 0, and adding 0 is exact.
                const float whole_zero = p.kind == WHOLE ? range.zero : 0.0f, real_zero = p.kind == REAL_ZERO ? range.zero : 0.0f;
                const float minimum = p.kind == MINIMUM ? range.zero : 0.0f;
                const float steps = plus(divided(minus(x[r][c], minimum), range.scale, range.inverse), real_zero);
                const float whole = nearest(limited(steps, -whole_zero, top[r] - whole_zero));
                made.code[r] = plus(whole, plus(whole_zero, BYTES));
                made.value[r] = plus(times(minus(whole, real_zero), range.scale), minimum);
            }
            const float missed = minus(x[r][c], made.value[r]);
            const uint32_t size = 2u * bits_of(missed) - 1u;
            low[r] = size < low[r] ? size : low[r];
            x[r][c] = divided(missed, pivot.diagonal, pivot.inverse);
        }
    }

    // What goes on through the columns of a panel.
    struct Course {
        int panel, real;  // real: columns
        Near u, v[2], pivots;  // v: of rows with their halves in place, and of others
        Solved last;
    };
    // Of a row, what takes its error off four of the lane's own columns of the next panel.
    ON_LANES static Four own_factor(const Course& now, int row, int d) {
        const bool whole = OWN == PANEL;  // a lane has both halves
        return near_four(beside(now.v[whole ? 0 : half_of(row)], whole ? in_factor(row, 4 * d) : row_start(row) + 4 * d));
    }

    static constexpr int AT_ONCE = (2 * PANEL - UNIT - ARRIVAL - 2) / (PANEL - ARRIVAL);
    // Columns whose errors are off the panel after theirs once column c is solved: all before it, if there was time enough. The other warps
    // take the first unit's off.
    ON_LANES static constexpr int taken(int c) {
        const int even = UNIT + ((PANEL - 1 - UNIT) * (c - ARRIVAL + 1) + PANEL - ARRIVAL - 1) / (PANEL - ARRIVAL);
        return c < ARRIVAL ? UNIT : even < c ? even : c;
    }

    // The first unit of the panel in x.
    ON_LANES Course start(const Problem& p, const Shared& s, int panel) {
        const int first = panel * PANEL, next = panel + 1 < p.panels() ? panel_start(panel + 1) + first * PANEL : 0, own = int(part) * OWN;
        Course now{panel,
                   int(p.columns) - first,
                   beside(s.factor, panel_start(panel) + first * PANEL),
                   {beside(s.factor, next + own), beside(s.factor, next + (own ^ PANEL / 2))},
                   beside(s.pivots, 2 * first),
                   {}};
        solve_columns<0, UNIT, false>(p, now);
        return now;
    }
    // Where nobody asks for them any more, too: that costs less than to ask.
    ON_LANES void put_unit(int panel, int first) {
        UNROLLED for (int r = 0; r < R; r++)
            UNROLLED for (int c = 0; c < UNIT; c += 4)
                near_put(beside(errors, r * APART * STRIDE + slot_start(panel) + first + c), x[r] + first + c);
    }
    // Its columns until those of the panel after it are needed.
    template <int FROM, int TO>
    ON_LANES void go_on(const Problem& p, Course& now) {
        solve_columns<FROM, TO, false>(p, now);
    }
    ON_LANES void receive(int panel) {
        UNROLLED for (int r = 0; r < R; r++)
            UNROLLED for (int c = 0; c < OWN; c += 4) {
                const Four four = near_four(beside(errors, r * APART * STRIDE + slot_start(panel) + int(part) * OWN + c));
                UNROLLED for (int i = 0; i < 4; i++) own[r][c + i] = four.at[i];
            }
    }
    // MORE: errors come off the panel after it. Where there is none, that costs least time if lanes have few columns of it.
    template <bool MORE>
    ON_LANES void end(const Problem& p, Course& now) {
        solve_columns<ARRIVAL, PANEL, MORE>(p, now);
        finish_column(p, now, PANEL - 1);
        if (MORE) take_own(now, taken(PANEL - 1), PANEL);
    }

    // While a column is divided and rounded, a chain of operations that wait for each other, the error of the column before comes off the
    // others. Fences keep the compiler from putting the chains of many columns first, and what could run beside them last.
    template <int FROM, int TO, bool MORE>
    ON_LANES void solve_columns(const Problem& p, Course& now) {
        UNROLLED for (int c = FROM; c < TO; c++) {
            const uint32_t before = low[0];
            Solved made;
            if (c) take(now.last, c - 1, c, c + 1);
            UNROLLED for (int d = (c + 1) / 4; d < PANEL / 4; d++) made.u[d] = near_four(beside(now.u, in_factor(c, 4 * d)));
            Four v[AT_ONCE][OWN / 4];
            UNROLLED for (int k = 0; k < AT_ONCE; k++)
                if (MORE && taken(c - 1) + k < taken(c))
                    UNROLLED for (int d = 0; d < OWN / 4; d++) v[k][d] = own_factor(now, taken(c - 1) + k, d);
            solve(p, c, now.pivots, made);
            if (c) finish_column(p, now, c - 1);
            UNROLLED for (int k = 0; k < AT_ONCE; k++)
                if (MORE && taken(c - 1) + k < taken(c))
                    UNROLLED for (int d = 0; d < OWN; d++)
                        UNROLLED for (int r = 0; r < R; r++) own[r][d] = less(own[r][d], x[r][taken(c - 1) + k], v[k][d / 4].at[d % 4]);
            now.last = made;
            if (FENCES >> c & 1) {
                // All that was made is made here.
                UNROLLED for (int r = 0; r < R; r++) {
                    UNROLLED for (int d = c; d < PANEL; d++) pin(x[r][d]);
                    if (MORE) UNROLLED for (int d = 0; d < OWN; d++) pin(own[r][d]);
                    pin(loss[r]), pin(now.last.code[r]), pin(now.last.value[r]);
                }
                c + 1 < PANEL ? fence(before, made.u[PANEL / 4 - 1].at[3]) : fence(before);
            }
        }
    }

    // What can wait of a column.
    ON_LANES void finish_column(const Problem& p, Course& now, int c) {
        take(now.last, c, c + 2, PANEL);
        UNROLLED for (int r = 0; r < R; r++) loss[r] = fused(x[r][c], x[r][c], loss[r]);
        to.put(p, part, now.last, x, c, c < now.real);
    }
    ON_LANES void take_own(const Course& now, int first, int end) {
        UNROLLED for (int c = 0; c < PANEL; c++) {
            if (c < first || c >= end) continue;
            UNROLLED for (int d = 0; d < OWN; d += 4) {
                const Four v = own_factor(now, c, d / 4);
                UNROLLED for (int r = 0; r < R; r++)
                    UNROLLED for (int i = 0; i < 4; i++) own[r][d + i] = less(own[r][d + i], x[r][c], v.at[i]);
            }
        }
    }

    ON_LANES void finish(const Problem& p) {
        together();  // what all of the row's lanes stored comes before what one of them may
        if (!alive || part) return;
        UNROLLED for (int r = 0; r < R; r++) {
            if (low[r] < LEAST_BITS - 1u || !(loss[r] < MOST_LOSS)) loss[r] = redo(p, row + r, top[r]);
            if (p.loss) p.loss[row + r] = plus(p.loss[row + r], loss[r]);
        }
    }

    // A row once more, with divisions for any number: its loss.
    ON_LANES static float redo(const Problem& p, uint32_t row, float top) {
        float loss = 0.0f;
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
            p.codes[at] = code > 0.0f ? uint8_t(code) : 0, p.errors[at] = error;  // of NaN 0
            if (p.values) p.values[at] = value;
        }
        return loss;
    }
};

}  // namespace gptq
