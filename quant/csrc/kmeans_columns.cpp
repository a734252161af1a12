// k-means of columns on threads, and codes of the nearest centres.
//
// Plain C ABI. Columns [C, N] contiguous, N > 0, finite values. `threads` >= 1. `draws`: uniform numbers for a k-means++ start, or null.
// `weights`: of each column's values, `stride` numbers from column to column (0: the same for all), or null.

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "kmeans_one_column.h"

namespace {

template <typename Work>
void shared_out(int64_t count, int64_t threads, const Work& work) {
    threads = std::max<int64_t>(1, std::min(threads, count));
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; t++) others.emplace_back([&, t] { work(count * t / threads, count * (t + 1) / threads); });
    work(0, count / threads);
    for (std::thread& other : others) other.join();
}

template <typename T>
void kmeans(const T* columns, const double* weights, int64_t stride, int64_t count, int64_t n, int64_t k, int64_t bins, int64_t steps,
            int64_t threads, const double* draws, T* centres) {
    shared_out(count, threads, [&](int64_t from, int64_t to) {
        static thread_local Workspace w;  // kept from call to call: columns come one at a time
        for (int64_t c = from; c < to; c++)
            one_column(columns + c * n, weights ? weights + c * stride : nullptr, n, k, bins, steps, draws, centres + c * k, w);
    });
}

template <typename T>
void nearest(const T* columns, int64_t count, int64_t n, const T* centres, int64_t k, int64_t threads, uint8_t* codes) {
    shared_out(count, threads, [&](int64_t from, int64_t to) {
        for (int64_t c = from; c < to; c++) nearest_of(columns + c * n, n, centres + c * k, k, codes + c * n);
    });
}

}  // namespace

extern "C" {

void bitgrid_kmeans_f32(const float* x, const double* weights, int64_t stride, int64_t c, int64_t n, int64_t k, int64_t bins, int64_t steps,
                        int64_t threads, const double* draws, float* centres) {
    kmeans(x, weights, stride, c, n, k, bins, steps, threads, draws, centres);
}
void bitgrid_kmeans_f64(const double* x, const double* weights, int64_t stride, int64_t c, int64_t n, int64_t k, int64_t bins,
                        int64_t steps, int64_t threads, const double* draws, double* centres) {
    kmeans(x, weights, stride, c, n, k, bins, steps, threads, draws, centres);
}
void bitgrid_nearest_f32(const float* x, int64_t c, int64_t n, const float* centres, int64_t k, int64_t threads, uint8_t* codes) {
    nearest(x, c, n, centres, k, threads, codes);
}
void bitgrid_nearest_f64(const double* x, int64_t c, int64_t n, const double* centres, int64_t k, int64_t threads, uint8_t* codes) {
    nearest(x, c, n, centres, k, threads, codes);
}
}
