// The errors of BiLLM's candidates in one block of columns, x [N, C] row after row. The twin of quant/kernels/braq_search/batched.py.
//
// Plain C ABI. Every function writes, for each tile of rows, the sums of its rows over all candidates: totals [tiles, candidates], tiles of
// 8 rows for counts and of 64 for splits. A row's error is a float32 (splits: float64) sum of its own values alone.

#include <cmath>

#include "products.h"

namespace {

constexpr int64_t RUN = 4, SPLIT_ROWS = 64;

INLINE Floats magnitude(Floats v) { return (Floats)((Words)v & 0x7fffffffu); }
INLINE Floats signed_as(Floats scale, Floats v) { return (Floats)((Words)scale | ((Words)v & 0x80000000u)); }

// Of eight rows at a time: what is left of columns `from` to `to` when they are binarized twice, with means.
INLINE Floats left_of(const Floats* x, int64_t from, int64_t to, Floats sum) {
    if (from == to) return Floats{};
    const float size = float(to - from);
    const Floats mean = sum / size;
    Floats spread{};
    for (int64_t i = from; i < to; i++) spread += magnitude(x[i] - mean);
    const Floats scale = spread / size;
    Floats left_sum{}, squares{};
    for (int64_t i = from; i < to; i++) {
        const Floats centred = x[i] - mean, left = centred - signed_as(scale, centred);
        left_sum += left;
        squares += left * left;
    }
    const Floats second_mean = left_sum / size;
    Floats second{};
    for (int64_t i = from; i < to; i++) {
        const Floats centred = x[i] - mean;
        second += magnitude(centred - signed_as(scale, centred) - second_mean);
    }
    const Floats second_scale = second / size;
    return squares - size * (second_mean * second_mean + second_scale * second_scale);
}

struct Counts {
    const float* x;
    const int64_t* counts;
    double* totals;
    int64_t rows, columns, number;
};

INLINE void tile(const Counts& c, int64_t t) {
    // Columns as vectors of eight rows, and what the first and the last of them add up to.
    std::vector<float> memory((3 * c.columns + 3) * LANES);
    Floats *x = reinterpret_cast<Floats*>((reinterpret_cast<uintptr_t>(memory.data()) + 31) & ~uintptr_t(31));
    Floats *first = x + c.columns, *last = first + c.columns + 1;
    for (int64_t r = 0; r < LANES; r++) {
        const int64_t row = t * LANES + r;
        for (int64_t i = 0; i < c.columns; i++) x[i][r] = row < c.rows ? c.x[row * c.columns + i] : 0.0f;
    }
    first[0] = last[c.columns] = Floats{};
    for (int64_t i = 0; i < c.columns; i++) first[i + 1] = first[i] + x[i];
    for (int64_t i = c.columns; i-- > 0;) last[i] = last[i + 1] + x[i];
    for (int64_t j = 0; j < c.number; j++) {
        const int64_t k = c.counts[j];
        const Floats errors = left_of(x, 0, k, first[k]) + left_of(x, k, c.columns, last[k]);
        double total = 0;
        for (int r = 0; r < LANES; r++) total += double(errors[r]);
        c.totals[t * c.number + j] = total;
    }
}

void plain(const Counts& c, int64_t t) { tile(c, t); }
#if defined(FUSED)
FUSED void fused(const Counts& c, int64_t t) { tile(c, t); }
#endif

// Σ|x - mean| of `count` values with this sum, of which `number`, with the sum `under`, lie below the mean.
double deviation(double sum, double count, double under, double number, double mean) {
    return (sum - under) - (count - number) * mean + number * mean - under;
}

double at_least_one(double count) { return std::max(count, 1.0); }

struct Splits {
    const float *x, *thresholds;
    double* totals;
    int64_t rows, columns, number;
};

void split(const Splits& c, int64_t t) {
    double* totals = c.totals + t * c.number;
    std::fill_n(totals, c.number, 0.0);
    std::vector<double> wide(c.columns), sums(c.columns + 1);
    const auto place = [&](double v, bool beyond) {
        return (beyond ? std::upper_bound(wide.begin(), wide.end(), v) : std::lower_bound(wide.begin(), wide.end(), v)) - wide.begin();
    };
    for (int64_t row = t * SPLIT_ROWS; row < std::min(c.rows, (t + 1) * SPLIT_ROWS); row++) {
        std::copy_n(c.x + row * c.columns, c.columns, wide.begin());
        std::sort(wide.begin(), wide.end());
        double squares = 0;
        for (int64_t i = 0; i < c.columns; i++) {
            sums[i + 1] = sums[i] + wide[i];
            squares += wide[i] * wide[i];
        }
        const double all = sums[c.columns];
        for (int64_t j = 0; j < c.number; j++) {
            const double threshold = c.thresholds[j];
            // Low values fill [a, b) of the sorted row; high ones are its two ends. Those equal to the threshold are high.
            const int64_t a = place(-threshold, true), b = std::max<int64_t>(a, place(threshold, false));
            const double inner = sums[b] - sums[a], outer = all - inner;
            const double count_in = double(b - a), count_out = double(c.columns - (b - a));
            const double mean_in = inner / at_least_one(count_in), mean_out = outer / at_least_one(count_out);
            const int64_t below = std::clamp<int64_t>(place(mean_in, false), a, b);
            const double spread_in = deviation(inner, count_in, sums[below] - sums[a], double(below - a), mean_in);
            const int64_t middle = place(mean_out, false), left = std::min(middle, a), right = std::max(middle, b);
            const double under = sums[left] + sums[right] - sums[b];
            const double spread_out = deviation(outer, count_out, under, double(left + right - b), mean_out);
            totals[j] += squares - count_in * mean_in * mean_in - count_out * mean_out * mean_out -
                         spread_in * spread_in / at_least_one(count_in) - spread_out * spread_out / at_least_one(count_out);
        }
    }
}

}  // namespace

extern "C" void bitgrid_braq_counts(const float* x, const int64_t* counts, double* totals, int64_t rows, int64_t columns, int64_t number,
                                    int64_t threads) {
    const Counts c{x, counts, totals, rows, columns, number};
    void (*one)(const Counts&, int64_t) = plain;
#if defined(FUSED)
    if (HAS_FUSED) one = fused;
#endif
    each((rows + LANES - 1) / LANES, RUN, threads, [&](int64_t t) { one(c, t); });
}

extern "C" void bitgrid_braq_splits(const float* x, const float* thresholds, double* totals, int64_t rows, int64_t columns, int64_t number,
                                    int64_t threads) {
    const Splits c{x, thresholds, totals, rows, columns, number};
    each((rows + SPLIT_ROWS - 1) / SPLIT_ROWS, 1, threads, [&](int64_t t) { split(c, t); });
}
