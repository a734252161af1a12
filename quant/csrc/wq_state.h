// What a lane has of a product (wq_fragments.h).

#pragma once

#include "wq_codes.h"

namespace fragments {

// Tiles that are multiplied at once (two of 8 bits, or of two sums of 16 columns each, would take too many registers), and sums of each
// that do not wait for each other: one where operands have codes at one place, or are codes themselves.
BOTH constexpr int tiles_at_once(int bits, int r, int c) { return r == 1 || bits == 8 || (c != 1 && bits < 4) ? 1 : 2; }
BOTH constexpr int chains_of(int bits, int parts) { return bits == 4 || parts != 1 ? 1 : 2; }

template <int BITS, int R, int C>
struct State {
    static constexpr int AT_ONCE = tiles_at_once(BITS, R, C);
    uint32_t w[AT_ONCE][2 * BITS];  // a step's codes
    // x: b[q][2 h], b[q][2 h + 1] belong to half h of slice q of a step; of two eights of columns, b[c] is a slice of the one number c.
    uint32_t b[C == 1 ? SLICES : C][4];
    uint32_t a[4], ones[4];         // products' other operands
    float d[C][AT_ONCE][2][4];      // sums of products
    float t[C][2][4];               // the same of x alone: times 1 (two columns), and times 128
    float sums[C][R][4];            // rows g, g, g + 8, g + 8 and columns 2 t, 2 t + 1 of lane 4 g + t
    const uint8_t *codes[R], *ranges, *x;      // what the lane copies: of step 0 of tiles; of its tile's first group; of step 0 of x
    int ranges_here, ranges_apart, ranges_to;  // whether it copies ranges; bytes from a group to the next; to where in a stage
    int ranges_steps, x_to, x_steps;           // steps that have what it copies so; where it copies x to, and steps that have it
    int even, odd;                             // where the lane's column of x is: slices of even and odd number
    int g;                                     // where ranges of rows g and g + 8 are
    float scale[AT_ONCE][2], offset[AT_ONCE][2];  // of the rows g and g + 8
    float total[C][2], base[C][2];                // of two columns: sums of x, and what 128 adds
};

struct Operands {
    float* d;
    const uint32_t *a, *b;
};

}  // namespace fragments
