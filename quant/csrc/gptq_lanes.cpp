// The GPU's column loop of gptq_block on the host, lane by lane: for tests. Arguments as of gptq_block.cu, with the lanes of a row
// in place of the stream. Also its division.

// Compiled in a fraction of the time.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Og")
#endif

#include "gptq_lanes.h"

#include <algorithm>
#include <vector>

namespace {

using namespace gptq;

template <int L, bool PLAIN>
struct Emulated {
    using One = Lane<L, PLAIN>;
    One lane[L];
    template <class F>
    void each(F f) {
        for (One& l : lane) f(l);
    }
    void share() {
        for (One& l : lane)
            for (int c = 0; c < PANEL; c++) l.x[c] = lane[c / One::OWN].own[c % One::OWN];
    }
};

template <int L, bool PLAIN>
void solve(const Problem& p) {
    // Poisoned: what is read without having been written shows.
    std::vector<Four> factor(FACTOR / 4, Four{{NAN, NAN, NAN, NAN}});
    std::vector<Pivot> pivots(MOST, Pivot{1.0f, 0.0f});
    std::vector<float> errors(STRIDE, NAN);
    float* panels = factor[0].at;
    for (int at = 0; at < int((p.columns + PANEL - 1) / PANEL); at++)
        for (int i = 0; i < PANEL * (at + 1); i++)
            for (int c = 0; c < PANEL; c++) {
                const uint32_t column = at * PANEL + c;
                const bool real = uint32_t(i) < p.columns && column < p.columns;
                panels[panel_start(at) + i * PANEL + c] = real ? p.upper[i * p.upper_stride + column] : 0.0f;
            }
    for (uint32_t j = 0; j < p.columns; j++) pivots[j] = pivot(p.upper[j * p.upper_stride + j]);
    const Shared shared{panels, &pivots[0].diagonal};
    // One row beyond the last first, as a warp may have: it stores what the last row's lanes do, and not after them.
    for (uint32_t at = 0; at <= p.rows; at++) {
        const uint32_t row = at ? at - 1 : p.rows;
        Emulated<L, PLAIN> lanes;
        std::fill(errors.begin(), errors.end(), NAN);
        if (p.words)
            for (uint32_t part = 0; part < L; part++) Lane<L, PLAIN>::find(p, row, part);
        uint32_t part = 0;
        lanes.each([&](auto& lane) { lane.begin(p, row, part++, errors.data()); });
        sweep(lanes, p, shared, [](int) {});
    }
}

template <bool PLAIN>
void solve(const Problem& p, int64_t lanes) {
    lanes == 1 ? solve<1, PLAIN>(p) : lanes == 2 ? solve<2, PLAIN>(p) : solve<4, PLAIN>(p);
}

}  // namespace

extern "C" void bitgrid_gptq_lanes(const float* block, const float* upper, float* scale, float* zero, const int32_t* group,
                                   int64_t upper_stride, int64_t scale_stride, int64_t zero_stride, int64_t columns, int64_t rows, int64_t top,
                                   int64_t kind, int64_t plain, float* codes, float* values, float* errors, float* loss, const float* tops,
                                   const int32_t* words, int32_t* odd, int64_t lanes) {
    Problem p{block, upper,        scale,        zero,        codes,             values,         errors,     loss,      tops, words,
              odd,   upper_stride, scale_stride, zero_stride, uint32_t(columns), uint32_t(rows), float(top), int(kind), {}, 0, 0};
    std::copy(group, group + columns, p.group);
    p.count_groups(plain != 0);
    plain ? solve<true>(p, lanes) : solve<false>(p, lanes);
}

// How many of a [count] / b are not what the processor's division gives.
extern "C" void bitgrid_gptq_division(const float* a, int64_t count, const float* b, int64_t divisors, int64_t* wrong) {
    *wrong = 0;
    for (int64_t d = 0; d < divisors; d++) {
        const float y = inverse(b[d]);
        for (int64_t i = 0; i < count; i++) *wrong += divided(a[i], b[d], y) != a[i] / b[d];
    }
}
