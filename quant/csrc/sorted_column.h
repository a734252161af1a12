// A column's values in ascending order, as float64.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bits.h"
#include "versions.h"

#define VECTOR VERSIONS("avx512f", "avx2")  // they compute the same bits

namespace {

struct Sorting {
    std::vector<double> x;  // the result
    std::vector<uint32_t> keys, other;
    std::vector<float> values, ordered;
};

// Whole numbers below 2^20 that rise with the values; within bounds even where a value is no number.
VECTOR void keys_of(const float* values, int64_t n, float least, float scale, uint32_t* keys) {
    for (int64_t i = 0; i < n; i++) keys[i] = uint32_t(int32_t((values[i] - least) * scale)) & 0xfffff;
}

VECTOR void widen(const float* values, int64_t n, double* x) {
    for (int64_t i = 0; i < n; i++) x[i] = values[i];
}

VECTOR void extremes(const float* values, int64_t n, float& least, float& most) {
    using Eight __attribute__((vector_size(32))) = float;
    using Loose __attribute__((vector_size(32), aligned(4), may_alias)) = float;
    least = most = values[0];
    Eight low = Eight{} + least, high = low;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const Eight v = *reinterpret_cast<const Loose*>(values + i);
        low = v < low ? v : low;
        high = v > high ? v : high;
    }
    for (; i < n; i++) least = std::min(least, values[i]), most = std::max(most, values[i]);
    for (int j = 0; j < 8; j++) least = std::min(least, low[j]), most = std::max(most, high[j]);
}

VECTOR bool falls(const float* x, int64_t n) {
    int found = 0;
    for (int64_t i = 0; i < n; i++) found |= x[i] > x[i + 1];
    return found;
}

// Ascending values by their places in the range: two passes of 10 bits, whose counters are hit evenly, unlike those of exponents; then
// the few that share a key. False where many do, as far outliers make them.
bool sorted_by_place(const float* column, int64_t n, Sorting& w) {
    float least, most;
    extremes(column, n, least, most);
    const float scale = 1048000.0f / (most - least);
    if (!(scale > 0 && scale < INFINITY)) return false;
    w.keys.resize(n);
    w.values.resize(n);
    w.ordered.resize(n);
    keys_of(column, n, least, scale, w.keys.data());
    uint32_t counts[2][1024] = {};
    for (int64_t i = 0; i < n; i++) {
        counts[0][w.keys[i] & 1023]++;
        counts[1][w.keys[i] >> 10]++;
    }
    uint32_t at[2] = {};
    for (int c = 0; c < 1024; c++)
        for (int pass = 0; pass < 2; pass++) {
            const uint32_t here = counts[pass][c];
            counts[pass][c] = at[pass];
            at[pass] += here;
        }
    float *half = w.values.data(), *x = w.ordered.data();
    for (int64_t i = 0; i < n; i++) half[counts[0][w.keys[i] & 1023]++] = column[i];
    for (int64_t i = 0; i < n; i++) x[counts[1][uint32_t(int32_t((half[i] - least) * scale)) >> 10 & 1023]++] = half[i];
    int64_t moves = 8 * n;
    for (int64_t part = 1; part < n; part += 64) {
        const int64_t end = std::min(n, part + 64);
        if (!falls(x + part - 1, end - part)) continue;
        for (int64_t i = part; i < end; i++) {
            const float v = x[i];
            int64_t j = i;
            for (; j > 0 && x[j - 1] > v; j--) x[j] = x[j - 1];
            x[j] = v;
            moves -= i - j;
        }
        if (moves < 0) return false;
    }
    // As by their bits, -0 comes before 0.
    const auto zeros = std::equal_range(w.ordered.begin(), w.ordered.end(), 0.0f);
    std::partition(zeros.first, zeros.second, [](float v) { return std::signbit(v); });
    widen(x, n, w.x.data());
    return true;
}

// Ascending by the bits of float32, three passes of 11.
void sorted_by_bits(const float* column, int64_t n, Sorting& w) {
    w.keys.resize(n);
    w.other.resize(n);
    uint32_t counts[3][2048] = {};
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = bits_of(column[i]);
        u ^= (u >> 31) ? 0xffffffffu : 0x80000000u;
        w.keys[i] = u;
        counts[0][u & 2047]++;
        counts[1][(u >> 11) & 2047]++;
        counts[2][u >> 22]++;
    }
    for (int pass = 0; pass < 3; pass++) {
        uint32_t at = 0;
        for (uint32_t& c : counts[pass]) {
            const uint32_t here = c;
            c = at;
            at += here;
        }
        const int shift = 11 * pass;
        for (int64_t i = 0; i < n; i++) {
            const uint32_t u = w.keys[i];
            w.other[counts[pass][(u >> shift) & 2047]++] = u;
        }
        std::swap(w.keys, w.other);
    }
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = w.keys[i];
        u ^= (u >> 31) ? 0x80000000u : 0xffffffffu;
        w.x[i] = float_of(u);
    }
}

void sorted(const float* column, int64_t n, Sorting& w) {
    if (!sorted_by_place(column, n, w)) sorted_by_bits(column, n, w);
}

void sorted(const double* column, int64_t n, Sorting& w) {
    std::copy(column, column + n, w.x.begin());
    std::sort(w.x.begin(), w.x.end());
}

}  // namespace
