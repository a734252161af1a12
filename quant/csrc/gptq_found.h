// Scales and zeros of a row's groups, found by the 2 L lanes that its team has for it before it is solved.
#pragma once

#include "gptq_lanes.h"
#include "ranges.h"

namespace gptq {

// What is known of some columns: least, greatest, and 0 times each added up.
struct Span {
    float low, high, seen;
    ON_LANES static Span none() { return {INFINITY, -INFINITY, 0.0f}; }
    ON_LANES void add(float w) { low = fminf(low, w), high = fmaxf(high, w), seen = plus(seen, times(w, 0.0f)); }
    ON_LANES void add(const Span& s) { low = fminf(low, s.low), high = fmaxf(high, s.high), seen = plus(seen, s.seen); }
};

constexpr int TOGETHER = 2;  // panels whose weights a lane loads before it looks at them

// of: lanes of a row; part: which of them. Every panel's span to `spans` [4 MOST / PANEL], before it is known what the groups are.
ON_LANES void survey(const Problem& p, uint32_t row, int part, int of, Near spans) {
    if (row >= p.rows) return;
    const int panels = p.panels();
    ROLLED for (int panel = part; panel < panels; panel += TOGETHER * of) {
        float w[TOGETHER][PANEL];
        UNROLLED for (int i = 0; i < TOGETHER; i++) {
            uint32_t at = (panel + i * of) * PANEL * p.rows + row;
            UNROLLED for (int c = 0; c < PANEL; c++) {
                w[i][c] = get(p.block + at, (panel + i * of) * PANEL + c < int(p.columns));
                advance(at, p.rows);
            }
        }
        UNROLLED for (int i = 0; i < TOGETHER; i++) {
            Span span = Span::none();
            UNROLLED for (int c = 0; c < PANEL; c++) span.add(w[i][c]);
            const float four[4] = {span.low, span.high, span.seen, 0.0f};
            if (panel + i * of < panels) near_put(beside(spans, 4 * (panel + i * of)), four);
        }
    }
}

// Once all lanes of a row have surveyed. What is written may be read once they have met again.
template <bool PLAIN>
ON_LANES void find(const Problem& p, uint32_t row, int part, int of, Near spans) {
    const ranges::Fit fit{row < p.rows ? p.words[row] : 0};
    const int width = fit.width(), columns = int(p.columns);
    if (!width) return;
    ROLLED for (int first = part * width; first < columns; first += of * width) {
        Span span = Span::none();
        if (width % PANEL == 0) {
            ROLLED for (int at = first / PANEL; at < (first + width) / PANEL; at++) {
                const Four four = near_four(beside(spans, 4 * at));
                span.add(Span{four.at[0], four.at[1], four.at[2]});
            }
        } else {
            const float* from = p.block + (uint32_t(first) * p.rows + row);
            BY_SIXTEEN for (int c = 0; c < width; c++, from += p.rows) span.add(*from);
        }
        bool odd;
        const ranges::Affine made = fit.found(span.low, span.high, span.seen, odd);
        if (odd) count(p.odd);
        constexpr int STEP = PLAIN ? PANEL : 1;  // columns of one group
        ROLLED for (int j = first; j < first + width; j += STEP) {
            const int32_t g = p.group[j];
            if (j != first && g == p.group[j - STEP]) continue;
            p.scale[g * p.scale_stride + row] = made.scale, p.zero[g * p.zero_stride + row] = made.zero;
        }
    }
}

}  // namespace gptq
