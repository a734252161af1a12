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

// part: of the 2 L lanes of a row. Every panel's span to `spans` [4 MOST / PANEL]: all weights are asked for at once, before it is known
// what the groups are.
template <int L>
ON_LANES void survey(const Problem& p, uint32_t row, int part, Near spans) {
    if (row >= p.rows) return;
    constexpr int TOGETHER = MOST / PANEL / (2 * L);
    const int panels = p.panels();
    float w[TOGETHER][PANEL];
    UNROLLED for (int i = 0; i < TOGETHER; i++) {
        const int first = (part + i * 2 * L) * PANEL;
        uint32_t at = first * p.rows + row;
        UNROLLED for (int c = 0; c < PANEL; c++) {
            w[i][c] = get(p.block + at, first + c < int(p.columns));
            advance(at, p.rows);
        }
    }
    UNROLLED for (int i = 0; i < TOGETHER; i++) {
        Span span = Span::none();
        UNROLLED for (int c = 0; c < PANEL; c++) span.add(w[i][c]);
        const float four[4] = {span.low, span.high, span.seen, 0.0f};
        if (part + i * 2 * L < panels) near_put(beside(spans, 4 * (part + i * 2 * L)), four);
    }
}

// Once all lanes of a row have surveyed. What is written, also to `spans` (`Lane::take_ranges`), may be read once they have met again.
// word: of the row, 0 beyond the last.
template <int L, bool PLAIN>
ON_LANES void find(const Problem& p, uint32_t row, int part, int32_t word, Near spans) {
    const ranges::Fit fit{word};
    const int width = fit.width(), columns = int(p.columns);
    const auto show_first = [&](float scale, float zero) {
        const float four[4] = {scale, zero, 0.0f, 0.0f};
        near_put(beside(spans, FIRST_RANGE), four);
    };
    if (!width) {
        const int32_t g = p.group[0];
        if (PLAIN && part == 0 && row < p.rows) show_first(p.scale[g * p.scale_stride + row], p.zero[g * p.zero_stride + row]);
        return;
    }
    ROLLED for (int first = part * width; first < columns; first += 2 * L * width) {
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
        if (PLAIN && first == 0) show_first(made.scale, made.zero);
        constexpr int STEP = PLAIN ? PANEL : 1;  // columns of one group
        ROLLED for (int j = first; j < first + width; j += STEP) {
            if (j != first && (PLAIN ? !(p.fresh >> j / PANEL & 1) : p.group[j] == p.group[j - 1])) continue;
            const int32_t g = p.group[j];
            p.scale[g * p.scale_stride + row] = made.scale, p.zero[g * p.zero_stride + row] = made.zero;
        }
    }
}

}  // namespace gptq
