// k-means of one column, one dimension: the twin of quant/kernels/kmeans_columns/batched.py, step by step in the same float64 arithmetic,
// so that both give the same bits (built without fused multiply-add and without reordering of sums).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "sorted_column.h"

namespace {

struct Workspace : Sorting {
    const double* weights = nullptr;  // of the values, in the column's order; null: all are 1
    std::vector<double> weight, mass;  // of sorted values, and their prefix sums
    std::vector<double> sum, square, measure, cost, least, next, from;
    std::vector<int64_t> at, cuts;
    std::vector<double> centres, before;

    double mass_to(int64_t i) const { return weights ? mass[i] : double(i); }
};

// Ascending values with their weights; equal values in the column's order.
template <typename T>
void sorted_with_weights(const T* column, int64_t n, Workspace& w) {
    std::vector<std::pair<double, double>> pairs(n);
    for (int64_t i = 0; i < n; i++) pairs[i] = {double(column[i]), w.weights[i]};
    std::stable_sort(pairs.begin(), pairs.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    w.weight.resize(n);
    for (int64_t i = 0; i < n; i++) w.x[i] = pairs[i].first, w.weight[i] = pairs[i].second;
}

// Prefix sums of weights, weighted values and weighted squares.
inline void weigh(int64_t n, Workspace& w) {
    w.mass.resize(n + 1);
    double m = 0, s = 0, q = 0;
    w.mass[0] = w.sum[0] = w.square[0] = 0;
    for (int64_t i = 0; i < n; i++) {
        const double value = w.weight[i] * w.x[i];
        w.mass[i + 1] = m += w.weight[i];
        w.sum[i + 1] = s += value;
        w.square[i + 1] = q += value * w.x[i];
    }
}

VECTOR void add_above(const float* x, int64_t n, float middle, uint8_t* codes) {
    for (int64_t i = 0; i < n; i++) codes[i] += x[i] > middle;
}

VECTOR void add_above(const double* x, int64_t n, double middle, uint8_t* codes) {
    for (int64_t i = 0; i < n; i++) codes[i] += x[i] > middle;
}

using Four __attribute__((vector_size(32))) = double;
using Loose __attribute__((vector_size(32), aligned(8), may_alias)) = double;

INLINE Loose& at(double* place) { return *reinterpret_cast<Loose*>(place); }
INLINE const Loose& at(const double* place) { return *reinterpret_cast<const Loose*>(place); }

// The best beginning so far of four ends.
struct Ends {
    Four before, best, origin;
    INLINE void begin(const double* earlier) {
        before = at(earlier);
        best = Four{} + INFINITY;
        origin = Four{};
    }
    INLINE void consider(double least, const double* cost, const Four& index) {
        const Four trial = least + at(cost);
        const auto better = (trial < best) & (before <= index);
        best = better ? trial : best;
        origin = better ? index : origin;
    }
    INLINE void end(double* next, double* from) const {
        at(next) = best;
        at(from) = origin;
    }
};

// One more run: next[b] = min over a of least[a] + cost[a, b], from[b] = the first such a, not before that of one run less, which
// `earlier` holds (cuts never move back when a run is added). Ends b from `first` on, a multiple of 8, go eight at a time; indices are
// doubles, as what is compared.
VECTOR void one_more_run(const double* least, const double* cost, int64_t side, int64_t stride, int64_t first, const double* earlier,
                         double* next, double* from) {
    for (int64_t b = first; b < side; b += 8) {
        const int64_t end = std::min(side, b + 8);
        Ends low, high;
        low.begin(earlier + b);
        high.begin(earlier + b + 4);
        int64_t a = int64_t(*std::min_element(earlier + b, earlier + end));
        for (Four index = Four{} + double(a); a < end; a++, index += 1.0) {
            low.consider(least[a], cost + a * stride + b, index);
            high.consider(least[a], cost + a * stride + b + 4, index);
        }
        low.end(next + b, from + b);
        high.end(next + b + 4, from + b + 4);
    }
}

// Sums in eight lanes: value i goes to lane i mod 8, and the lanes are added in order at the end.
VECTOR double lane_sum(const double* values, int64_t n) {
    double lane[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) lane[j] += values[i + j];
    for (int j = 0; i + j < n; j++) lane[j] += values[i + j];
    double total = lane[0];
    for (int j = 1; j < 8; j++) total += lane[j];
    return total;
}

// The lane sum of min(closest, squared distance to centre).
VECTOR double left_over(const double* values, const double* closest, double centre, int64_t n) {
    double lane[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) {
            const double d = values[i + j] - centre, q = d * d;
            lane[j] += q < closest[i + j] ? q : closest[i + j];
        }
    for (int j = 0; i + j < n; j++) {
        const double d = values[i + j] - centre, q = d * d;
        lane[j] += q < closest[i + j] ? q : closest[i + j];
    }
    double total = lane[0];
    for (int j = 1; j < 8; j++) total += lane[j];
    return total;
}

// The same, each distance times its weight.
VECTOR double left_over(const double* values, const double* closest, const double* weights, double centre, int64_t n) {
    double lane[8] = {};
    for (int64_t i = 0; i < n; i++) {
        const double d = values[i] - centre, q = d * d;
        lane[i % 8] += weights[i] * (q < closest[i] ? q : closest[i]);
    }
    double total = lane[0];
    for (int j = 1; j < 8; j++) total += lane[j];
    return total;
}

VECTOR void take_centre(const double* values, double* closest, double centre, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const double d = values[i] - centre, q = d * d;
        closest[i] = q < closest[i] ? q : closest[i];
    }
}

VECTOR void roots_of_gaps(const double* x, double* roots, int64_t n) {
    roots[0] = 0;
    for (int64_t i = 1; i < n; i++) roots[i] = std::sqrt(x[i] - x[i - 1]);
}

VECTOR void at_most(double* values, double most, int64_t n) {
    for (int64_t i = 0; i < n; i++) values[i] = values[i] < most ? values[i] : most;
}

// sums * scale + index.
VECTOR void with_index(double* sums, double scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) sums[i] = sums[i] * scale + double(i);
}

// Squared error of bins a .. b - 1 as one cluster; infinite beyond `side` and, in a's group of eight, before a.
VECTOR void costs_of(const double* count, const double* sum, const double* square, int64_t side, int64_t stride, double* cost) {
    for (int64_t a = 0; a < side; a++) {
        double* row = cost + a * stride;
        for (int64_t b = a / 8 * 8; b < a; b++) row[b] = INFINITY;
        for (int64_t b = a; b < side; b++) {
            const double s = sum[b] - sum[a], q = square[b] - square[a], m = count[b] - count[a];
            row[b] = q - s * s / (m > 0 ? m : 1);
        }
        for (int64_t b = side; b < stride; b++) row[b] = INFINITY;
    }
}

// Prefix sums of values and squares; and, for a partition, `measure`: those of the square roots of gaps. Three chains of additions take
// as long as one.
template <bool GAPS>
void sums_of(int64_t n, int64_t bins, Workspace& w) {
    double *roots = w.measure.data(), *sum = w.sum.data(), *square = w.square.data(), s = 0, q = 0, g = 0;
    const double* x = w.x.data();
    if (GAPS) {
        roots_of_gaps(x, roots, n);
        // One cut in a gap is enough: no gap counts for more than two shares.
        for (int pass = 0; pass < 2; pass++) at_most(roots, 2 * lane_sum(roots + 1, n - 1) / double(bins), n);
    }
    sum[0] = square[0] = 0;
    for (int64_t i = 0; i < n; i++) {
        s += x[i];
        q += x[i] * x[i];
        sum[i + 1] = s;
        square[i + 1] = q;
        if (GAPS) roots[i] = g += roots[i];
    }
}

// Candidate cuts at[0] = 0 <= ... <= at[bins] = n: equal shares of the sum of square roots of gaps (16 parts) and of count (1 part).
void candidates(int64_t n, int64_t bins, Workspace& w) {
    with_index(w.measure.data(), 16 * double(n - 1) / w.measure[n - 1], n);
    w.at.resize(bins + 1);
    w.at[0] = 0;
    w.at[bins] = n;
    const double *measure = w.measure.data(), all = measure[n - 1];
    int64_t i = 0;
    for (int64_t b = 1; b < bins; b++) {
        const double wanted = all * (double(b) / double(bins));
        while (i < n && measure[i] < wanted) i++;
        w.at[b] = i;
    }
}

// The best k consecutive runs of bins, by dynamic programming.
void best_runs(int64_t bins, int64_t k, Workspace& w) {
    const int64_t side = bins + 1, stride = (side + 7) / 8 * 8;
    w.cost.resize(side * stride);
    w.least.resize(3 * stride);
    w.next.resize(stride);
    w.from.assign(k * stride, 0.0);
    double *count = w.least.data(), *sum = count + side, *square = sum + side;
    for (int64_t b = 0; b < side; b++) {
        count[b] = w.mass_to(w.at[b]);
        sum[b] = w.sum[w.at[b]];
        square[b] = w.square[w.at[b]];
    }
    costs_of(count, sum, square, side, stride, w.cost.data());
    w.least.assign(w.cost.begin(), w.cost.begin() + stride);
    for (int64_t c = 1; c < k; c++) {
        double* from = w.from.data() + c * stride;
        // Of the last run only the end of all matters.
        const int64_t first = c + 1 < k ? 0 : bins / 8 * 8;
        one_more_run(w.least.data(), w.cost.data(), side, stride, first, from - stride, w.next.data(), from);
        w.least.swap(w.next);
        w.next.resize(stride);
    }
    w.cuts.resize(k + 1);
    w.cuts[k] = w.at[bins];
    int64_t b = bins;
    for (int64_t c = k - 1; c > 0; c--) {
        b = int64_t(w.from[c * stride + b]);
        w.cuts[c] = w.at[b];
    }
    w.cuts[0] = 0;
}

// How many of the sorted values are <= limit, near a guess.
int64_t count_up_to(const double* x, int64_t n, double limit, int64_t guess) {
    int64_t low = guess, high = guess, step = 1;
    while (high < n && x[high] <= limit) {
        low = high + 1;
        high = std::min(n, high + step);
        step *= 2;
    }
    step = 1;
    while (low > 0 && x[low - 1] > limit) {
        high = low - 1;
        low = std::max<int64_t>(0, low - step);
        step *= 2;
    }
    return std::upper_bound(x + low, x + std::max(low, high), limit) - x;
}

void means_of_cuts(int64_t k, Workspace& w) {
    for (int64_t c = 0; c < k; c++) {
        const int64_t a = w.cuts[c], b = w.cuts[c + 1];
        const double mass = w.mass_to(b) - w.mass_to(a);
        if (!(mass > 0)) continue;  // a cluster without members keeps its centre
        const double mean = (w.sum[b] - w.sum[a]) / mass;
        w.centres[c] = std::min(std::max(mean, w.x[a]), w.x[b - 1]);
    }
}

// From ascending centres: until no cut moves, or the squared moves of the centres are within `tolerance`.
void lloyd(int64_t n, int64_t k, int64_t steps, double tolerance, Workspace& w) {
    for (int64_t step = 0; step < steps; step++) {
        bool moved = step == 0;
        for (int64_t c = 1; c < k; c++) {
            const int64_t cut = count_up_to(w.x.data(), n, (w.centres[c - 1] + w.centres[c]) / 2, w.cuts[c]);
            moved |= cut != w.cuts[c];
            w.cuts[c] = cut;
        }
        if (!moved) return;
        w.before = w.centres;
        means_of_cuts(k, w);
        double shift = 0;
        for (int64_t c = 0; c < k; c++) {
            const double d = w.centres[c] - w.before[c];
            shift += d * d;
        }
        if (shift <= tolerance) return;
    }
}

// Greedy k-means++ on the column in its own order: `draws` are uniform numbers, one for the first centre, then `trials` for each other.
template <typename T>
void plus_plus(const T* column, int64_t n, int64_t k, const double* draws, Workspace& w) {
    const int64_t trials = 2 + int64_t(std::log(double(k)));
    std::vector<double>&closest = w.next, &running = w.measure, &values = w.square;
    std::copy(column, column + n, values.begin());  // the squares are not needed any more
    int64_t first = int64_t(draws[0] * double(n));
    if (w.weights) {
        double total = 0;
        for (int64_t i = 0; i < n; i++) running[i] = total += w.weights[i];
        first = std::upper_bound(running.begin(), running.begin() + n, draws[0] * total) - running.begin();
    }
    w.centres[0] = values[std::min(n - 1, first)];
    closest.assign(n, INFINITY);
    take_centre(values.data(), closest.data(), w.centres[0], n);
    for (int64_t c = 1; c < k; c++) {
        double total = 0;
        for (int64_t i = 0; i < n; i++) running[i] = total += w.weights ? w.weights[i] * closest[i] : closest[i];
        double tried[16], potential[16], least = INFINITY;
        for (int64_t t = 0; t < trials; t++) {
            const double wanted = draws[1 + (c - 1) * trials + t] * total;
            const int64_t at = std::lower_bound(running.begin(), running.begin() + n, wanted) - running.begin();
            tried[t] = values[std::min(n - 1, at)];
            potential[t] = w.weights ? left_over(values.data(), closest.data(), w.weights, tried[t], n)
                                     : left_over(values.data(), closest.data(), tried[t], n);
            least = std::min(least, potential[t]);
        }
        // Two values that are each other's only gain leave the same sum but for rounding: the first counts.
        int64_t best = 0;
        while (potential[best] > least * (1 + 1e-12)) best++;
        w.centres[c] = tried[best];
        take_centre(values.data(), closest.data(), tried[best], n);
    }
    std::sort(w.centres.begin(), w.centres.end());
}

// `weights` [n], or null: all are 1.
template <typename T>
void one_column(const T* column, const double* weights, int64_t n, int64_t k, int64_t bins, int64_t steps, const double* draws, T* out,
                Workspace& w) {
    w.weights = weights;
    w.x.resize(n);
    w.measure.resize(n);
    w.sum.resize(n + 1);
    w.square.resize(n + 1);
    w.centres.resize(k);
    weights ? sorted_with_weights(column, n, w) : sorted(column, n, w);
    int64_t distinct = 1;
    out[0] = T(w.x[0]);
    for (int64_t i = 1; i < n && distinct <= k; i++)
        if (w.x[i] != w.x[i - 1]) {
            if (distinct < k) out[distinct] = T(w.x[i]);
            distinct++;
        }
    if (distinct <= k) {
        for (int64_t c = distinct; c < k; c++) out[c] = out[distinct - 1];
        return;
    }
    double tolerance = 0;
    if (draws) {
        sums_of<false>(n, bins, w);
        if (weights) weigh(n, w);
        const double mass = w.mass_to(n), mean = w.sum[n] / mass;
        tolerance = 1e-4 * (w.square[n] / mass - mean * mean);
        plus_plus(column, n, k, draws, w);
        w.cuts.assign(k + 1, 0);
        w.cuts[k] = n;
    } else {
        sums_of<true>(n, bins, w);
        if (weights) weigh(n, w);
        candidates(n, bins, w);
        if (bins > k)
            best_runs(bins, k, w);
        else
            w.cuts = w.at;
        for (int64_t c = 0; c < k; c++) w.centres[c] = w.x[std::min(w.cuts[c], n - 1)];
        means_of_cuts(k, w);
    }
    lloyd(n, k, steps, tolerance, w);
    for (int64_t c = 0; c < k; c++) out[c] = T(w.centres[c]);
}

// Codes of the nearest of k ascending centres; a value halfway goes to the lower one.
template <typename T>
void nearest_of(const T* x, int64_t n, const T* centres, int64_t k, uint8_t* codes) {
    if (k > 32) {
        std::vector<T> middles(k - 1);
        for (int64_t j = 0; j + 1 < k; j++) middles[j] = (centres[j] + centres[j + 1]) / 2;
        for (int64_t i = 0; i < n; i++) codes[i] = uint8_t(std::lower_bound(middles.begin(), middles.end(), x[i]) - middles.begin());
        return;
    }
    std::memset(codes, 0, n);
    for (int64_t j = 0; j + 1 < k; j++) add_above(x, n, (centres[j] + centres[j + 1]) / 2, codes);
}

}  // namespace
