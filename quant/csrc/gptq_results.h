// What the second warp of a team of gptq_lanes.h stores: codes, values and errors of panels that are solved, and the loss. It also finds
// rows that have to be solved again.
#pragma once

#include "gptq_lanes.h"

namespace gptq {

// One of the L lanes of a row: it stores its own columns of each panel.
template <int L, bool PLAIN>
struct Results {
    static constexpr int OWN = PANEL / L, GROUPS = PLAIN ? 1 : OWN, WORD = word_of<L>;
    float scale[GROUPS], zero[GROUPS];
    float loss;
    // Least |error| but 0, as the float's bits without the sign, less 1. 0 where a scale or zero is not what the fast divisions take.
    uint32_t least;
    uint32_t row, part;
    bool alive;                  // false beyond the last row: such lanes store what those of the last row do, and solve nothing again
    Near errors;                 // [STRIDE]
    uint32_t codes[OWN / WORD];  // see `Lane`

    ON_LANES void begin(const Problem& p, uint32_t given_row, uint32_t given_part, Near given_errors) {
        alive = given_row < p.rows;
        row = alive ? given_row : p.rows - 1;
        part = given_part, errors = given_errors;
        loss = 0.0f, least = 0xffffffffu;
    }

    // Takes the codes of a panel from where those of the next may come.
    ON_LANES void read(const Problem& p, int panel) {
        const Near from = beside(errors, codes_start(panel, p.panels()) + int(part) * (OWN / WORD));
        UNROLLED for (int i = 0; i < OWN / WORD; i++) codes[i] = near_word(beside(from, i));
    }

    ON_LANES void renew(const Problem& p, int first) {
        UNROLLED for (int c = 0; c < GROUPS; c++) {
            const bool real = PLAIN || first + c < int(p.columns);
            scale[c] = p.scale_of(real ? first + c : 0, row), zero[c] = p.zero_of(real ? first + c : 0, row);
        }
        UNROLLED for (int c = 0; c < GROUPS; c++)
            if (!(fits(scale[c], zero[c], p.kind) || (p.kind == MINIMUM && scale[c] == 0.0f))) least = 0;
    }

    // Of a panel whose codes have been read, and whose errors are in their slot.
    ON_LANES void write(const Problem& p, int panel) {
        const int first = panel * PANEL, mine = first + int(part) * OWN;
        if (!PLAIN || p.fresh >> panel & 1) renew(p, mine);
        const Near slot = beside(errors, slot_start(panel));
        uint32_t at = mine * p.rows + row;
        UNROLLED for (int d = 0; d < PANEL / 4; d++) {
            const Four error = near_four(beside(slot, 4 * d));
            UNROLLED for (int i = 0; i < 4; i++) loss = fused(error.at[i], error.at[i], loss);
            if (L == 1) check(error.at), store(p, mine, 4 * d, error.at, at);
        }
        if (L > 1) {
            float own[OWN];
            near_some<OWN>(beside(slot, int(part) * OWN), own);
            UNROLLED for (int c = 0; c < OWN; c += WORD) check(own + c), store(p, mine, c, own + c, at);
        }
    }

    ON_LANES void check(const float* error) {
        UNROLLED for (int i = 0; i < WORD; i++) {
            const uint32_t size = 2u * bits_of(error[i]) - 1u;
            least = size < least ? size : least;
        }
    }

    // A word's columns, from the lane's own column c on.
    ON_LANES void store(const Problem& p, int mine, int c, const float* error, uint32_t& at) {
        uint32_t word = codes[c / WORD];
        UNROLLED for (int i = 0; i < WORD; i++) {
            const float z = PLAIN || p.kind == WHOLE ? zero[(c + i) % GROUPS] : 0.0f;
            word += (whole_bits(z) - 2 * WHOLE_BITS) << 8 * i;
        }
        UNROLLED for (int i = 0; i < WORD; i++) {
            const bool real = PLAIN || mine + c + i < int(p.columns);
            const float code = byte_of(word, i), z = zero[(c + i) % GROUPS], step = scale[(c + i) % GROUPS];
            float value;
            if (PLAIN)
                value = times(minus(code, z), step);
            else
                value = p.kind == MINIMUM ? plus(times(code, step), z) : times(minus(code, z), step);
            put<PLAIN>(p.codes + at, code, real);
            put<PLAIN>(p.values + at, value, real);
            put<PLAIN>(p.errors + at, error[i], real);
            advance(at, p.rows);
        }
    }

    // To the others of the row.
    ON_LANES void tell() { near_put_words<1>(beside(errors, SLOTS * PANEL + int(part)), &least); }
    // After all have told, and stored what one of them may store again.
    //
    // A difference m of less than 2^-60 makes an error below 2^-59 times the greatest 1 / |diagonal|. One that is 0 is right: let y be the
    // inverse of a diagonal d, rounded. Were m y at most 2^-150 and m / d above, d would be below the float 2^150 m; but y times the float
    // after d is above 1.
    ON_LANES void finish(const Problem& p, const Shared& s) {
        if (!alive || part) return;
        UNROLLED for (int i = 1; i < L; i++) {
            const uint32_t other = near_word(beside(errors, SLOTS * PANEL + i));
            least = other < least ? other : least;
        }
        uint32_t most = 0;
        ROLLED for (int c = 0; c < MOST; c += 2) {
            const Four pivots = near_four(beside(s.pivots, 2 * c));
            UNROLLED for (int i = 0; i < 2; i++) {
                const uint32_t size = bits_of(fabsf(pivots.at[2 * i + 1]));
                most = size > most ? size : most;
            }
        }
        if (least < 2u * bits_of(times(float_of(most), LEAST_MISSED)) || !(loss < MOST_LOSS)) redo(p);
        if (p.loss) p.loss[row] = plus(p.loss[row], loss);
    }

    // The row once more, with divisions for any number.
    ON_LANES void redo(const Problem& p) {
        const float top = p.tops ? p.tops[row] : p.top;
        loss = 0.0f;
        ROLLED for (uint32_t j = 0; j < p.columns; j++) {
            const uint32_t at = j * p.rows + row;
            float w = p.block[at];
            ROLLED for (uint32_t i = 0; i < j; i++) w = less(w, p.errors[i * p.rows + row], p.upper[i * p.upper_stride + j]);
            const float scale = p.scale_of(j, row), zero = p.zero_of(j, row);
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

}  // namespace gptq
