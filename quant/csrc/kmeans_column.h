// k-means of one column by a thread block, from sorted values and their prefix sums: what kmeans_columns.cu builds on.

#pragma once

#include <cmath>
#include <cstdint>

#include "warp.h"

namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32, MOST = 256, TRIALS = 8;
constexpr int TABLE_CENTRES = 32, SIDE = 64 + 4 * TABLE_CENTRES + 1;  // of dynamic programming

template <typename T>
struct Problem {
    const T *columns, *ordered;
    const double* draws;
    double* scratch;
    T* centres;
    int64_t stride;
    int n, k, bins, steps, trials;
    const double *weights = nullptr, *ordered_weights = nullptr;  // of the values, as in `columns` and as in `ordered`; null: all are 1
    int64_t apart = 0;                                            // numbers from a column's weights to the next one's
};

struct Small {
    double list[2][MOST], totals[WARPS], potential[TRIALS], tried[TRIALS], draw[TRIALS], tolerance;
    double count[SIDE], sum[SIDE], square[SIDE], least[2][SIDE];
    int at[MOST + 1], cuts[MOST + 1], where[TRIALS], place[TRIALS];
    uint8_t from[TABLE_CENTRES][SIDE];
};
static_assert(sizeof(Small) <= 20 * 1024 && sizeof(Small) <= MOST_STATIC);  // as quant/kernels/kmeans_columns/cuda.py reckons

// The greatest value of the type that is not above: x <= limit says the same of both for every x of the type.
template <typename T>
DEVICE T down(double limit);
template <>
DEVICE float down<float>(double limit) {
    return __double2float_rd(limit);
}
template <>
DEVICE double down<double>(double limit) {
    return limit;
}

// Sums of the threads before this one (returned) and up to it (`end`), and of all. A thread's end has the bits of its neighbour's
// beginning. Everybody calls it; the next call must be a barrier away.
DEVICE double scan(double mine, double* totals, double& end, double& all) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const double upto = warp_scan(mine);
    if (lane == 31) totals[warp] = upto;
    __syncthreads();
    const double whole = warp_scan(totals[lane % WARPS], WARPS);
    const double earlier = __shfl_sync(ALL, whole, warp ? warp - 1 : 0), next = __shfl_sync(ALL, whole, warp);
    all = __shfl_sync(ALL, whole, WARPS - 1);
    const double neighbours = __shfl_up_sync(ALL, upto, 1), base = warp ? earlier : 0;
    end = lane == 31 ? next : base + upto;
    return lane ? base + neighbours : base;
}

// A column at work. `x`: its sorted values; each thread has `per` neighbours of them.
template <typename T, bool WEIGHED>
struct Column {
    const T* x;
    double* wide;  // [n + 1]
    double* table;
    Small& s;
    int n, per, first;  // first: stride of the first probes
    double* mass;       // [n + 1], of weights: sums of the first ones; null where all are 1

    // What values [a, b) weigh.
    DEVICE double count(int a, int b) const {
        if constexpr (WEIGHED) return mass[b] - mass[a];
        return double(b - a);
    }
    DEVICE double weighed(int i, double v) const {
        if constexpr (WEIGHED) return count(i, i + 1) * v;
        return v;
    }
    // Sums of threads are rounded: what weighs no more than this may weigh nothing.
    DEVICE double nothing() const {
        if constexpr (WEIGHED) return mass[n] / double(int64_t(1) << 44);
        return 0;
    }

    // to[i + 1]: sum of the first i + 1 numbers f(i). Returns the whole sum.
    template <class F>
    DEVICE double prefix(double* to, const F& f) {
        const int from = threadIdx.x * per, end = min(n, from + per);
        double mine = 0, upto, all;
        for (int i = from; i < end; i++) mine += f(i);
        double running = scan(mine, s.totals, upto, all);
        if (threadIdx.x == 0) to[0] = 0;
        for (int i = from; i < end; i++) to[i + 1] = running += f(i);
        __syncthreads();
        return all;
    }

    // Of values and weights, into `wide`.
    DEVICE double sums() {
        return prefix(wide, [&](int i) { return weighed(i, double(x[i])); });
    }
    DEVICE double square(int i) const { return weighed(i, double(x[i]) * double(x[i])); }

    template <class F>
    DEVICE double total(const F& f) {
        const int from = threadIdx.x * per, to = min(n, from + per);
        double mine = 0, end, all;
        for (int i = from; i < to; i++) mine += f(i);
        scan(mine, s.totals, end, all);
        __syncthreads();
        return all;
    }

    // How many sorted values are <= each limit; by a warp together. The answers lie within 33 strides of `low`, of which 32 probes, an odd
    // number of words apart, leave one.
    template <int NUMBER>
    DEVICE void reached(const T (&limit)[NUMBER], int (&low)[NUMBER]) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < NUMBER; r++) low[r] = 0;
        for (int stride = first; stride; stride /= 33) {
#pragma unroll
            for (int r = 0; r < NUMBER; r++) {
                const int i = low[r] + (lane + 1) * stride - 1;
                low[r] += stride * __popc(__ballot_sync(ALL, i < n && x[min(i, n - 1)] <= limit[r]));
            }
        }
    }

    // The same in two rounds of PROBES probes a lane, for up to (32 PROBES + 1)² - 1 values: a step waits for each round.
    template <int NUMBER, int PROBES>
    DEVICE void reached_in_two(const T (&limit)[NUMBER], int (&low)[NUMBER]) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < NUMBER; r++) low[r] = 0;
#pragma unroll
        for (int stride = 32 * PROBES + 1; stride; stride /= 32 * PROBES + 1) {
            int passed[NUMBER];
#pragma unroll
            for (int r = 0; r < NUMBER; r++) {
                passed[r] = 0;
#pragma unroll
                for (int q = 0; q < PROBES; q++) {
                    const int i = low[r] + (32 * q + lane + 1) * stride - 1;
                    passed[r] += __popc(__ballot_sync(ALL, i < n && x[min(i, n - 1)] <= limit[r]));
                }
            }
#pragma unroll
            for (int r = 0; r < NUMBER; r++) low[r] += stride * passed[r];
        }
    }

    // Few values are the centres themselves: true where that is so.
    DEVICE bool few(int k, T* out) {
        const int from = threadIdx.x * per, to = min(n, from + per);
        double end, all;
        int rank = 0;
        for (int i = max(1, from); i < to; i++) rank += x[i] != x[i - 1];
        rank = int(scan(double(rank), s.totals, end, all));
        __syncthreads();
        const int distinct = int(all) + 1;
        if (distinct > k) return false;
        for (int i = max(1, from); i < to; i++)
            if (x[i] != x[i - 1]) out[++rank] = x[i];
        if (threadIdx.x == 0) out[0] = x[0];
        for (int c = distinct + threadIdx.x; c < k; c += THREADS) out[c] = x[n - 1];
        return true;
    }

    // Cuts s.at[0] = 0 <= ... <= s.at[bins] = n: equal shares of the sum of square roots of gaps (16 parts) and of count (1 part).
    DEVICE void candidates(int bins) {
        const int from = threadIdx.x * per, to = min(n, from + per);
        for (int i = from; i < to; i++) wide[i] = i ? sqrt(double(x[i]) - double(x[i - 1])) : 0.0;
        for (int pass = 0; pass < 2; pass++) {
            // One cut in a gap is enough: no gap counts for more than two shares.
            const double most = 2 * total([&](int i) { return wide[i]; }) / double(bins);
            for (int i = from; i < to; i++) wide[i] = fmin(wide[i], most);
        }
        double mine = 0, end, all;
        for (int i = from; i < to; i++) mine += wide[i];
        double running = scan(mine, s.totals, end, all);
        const double scale = 16 * double(n - 1) / all;
        for (int i = from; i < to; i++) {
            running += wide[i];
            wide[i] = running * scale + double(i);
        }
        __syncthreads();
        const double whole = wide[n - 1];
        for (int b = threadIdx.x; b <= bins; b += THREADS) {
            const double wanted = whole * (double(b) / double(bins));
            int low = 0, high = n;  // the first that is not below
            while (low < high) {
                const int middle = (low + high) / 2;
                if (wide[middle] < wanted)
                    low = middle + 1;
                else
                    high = middle;
            }
            s.at[b] = b == 0 ? 0 : b == bins ? n : low;
        }
        __syncthreads();
    }

    // The best k consecutive runs of bins into s.cuts, by dynamic programming: four threads for each end of a run. Overwrites the table.
    DEVICE void best_runs(int bins, int k) {
        const int side = bins + 1, group = threadIdx.x / 4, part = threadIdx.x % 4;
        const auto cost = [&](int a, int b) -> double& { return table[a * side - a * (a - 1) / 2 + b - a]; };
        const double none = nothing();
        for (int i = threadIdx.x; i < side * side; i += THREADS) {
            const int a = i / side, b = i % side;
            if (a > b) continue;
            const double sum = s.sum[b] - s.sum[a], square = s.square[b] - s.square[a], count = s.count[b] - s.count[a];
            cost(a, b) = square - sum * sum / (count > none ? count : 1.0);
        }
        __syncthreads();
        for (int b = threadIdx.x; b < side; b += THREADS) {
            s.least[0][b] = cost(0, b);
            s.from[0][b] = 0;
        }
        __syncthreads();
        for (int c = 1; c < k; c++) {
            const double* least = s.least[(c - 1) % 2];
            for (int start = 1; start < side; start += THREADS / 4) {
                const int b = start + group;
                double best = INFINITY;
                int origin = 0;
                // Cuts never move back when a run is added.
                if (b < side)
                    for (int a = s.from[c - 1][b] + part; a <= b; a += 4) {
                        const double trial = least[a] + cost(a, b);
                        if (trial < best) best = trial, origin = a;
                    }
                for (int d = 1; d < 4; d *= 2) {
                    const double other = __shfl_xor_sync(ALL, best, d);
                    const int its = __shfl_xor_sync(ALL, origin, d);
                    if (other < best || (other == best && its < origin)) best = other, origin = its;
                }
                if (part == 0 && b < side) s.least[c % 2][b] = best, s.from[c][b] = uint8_t(origin);
            }
            if (threadIdx.x == 0) s.least[c % 2][0] = 0, s.from[c][0] = 0;
            __syncthreads();
        }
        if (threadIdx.x == 0) {
            int b = bins;
            s.cuts[k] = s.at[bins];
            for (int c = k - 1; c > 0; c--) {
                b = s.from[c][b];
                s.cuts[c] = s.at[b];
            }
            s.cuts[0] = 0;
        }
        __syncthreads();
    }

    // Of cluster c of s.cuts; a cluster that weighs nothing keeps its centre.
    DEVICE double mean_of(int c, double centre) const { return mean_of(s.cuts[c], s.cuts[c + 1], centre); }
    // Of values [a, b).
    DEVICE double mean_of(int a, int b, double centre) const {
        if (b <= a || (WEIGHED && !(count(a, b) > nothing()))) return centre;
        return fmin(fmax((wide[b] - wide[a]) / count(a, b), double(x[a])), double(x[b - 1]));
    }

    // Ascending centres: `wide` is left with prefix sums.
    DEVICE void partition(const Problem<T>& p, double* centres) {
        candidates(p.bins);
        const bool searched = p.bins > p.k;
        if (searched) {
            prefix(wide, [&](int i) { return square(i); });
            for (int b = threadIdx.x; b <= p.bins; b += THREADS) s.square[b] = wide[s.at[b]];
            __syncthreads();
        }
        sums();
        if (searched) {
            for (int b = threadIdx.x; b <= p.bins; b += THREADS) s.sum[b] = wide[s.at[b]], s.count[b] = count(0, s.at[b]);
            __syncthreads();
            best_runs(p.bins, p.k);
            sums();
        } else {
            for (int c = threadIdx.x; c <= p.k; c += THREADS) s.cuts[c] = s.at[c];
            __syncthreads();
        }
        for (int c = threadIdx.x; c < p.k; c += THREADS) centres[c] = mean_of(c, double(x[min(s.cuts[c], n - 1)]));
        __syncthreads();
    }

    // As `lloyd`, of up to NUMBER + 1 centres by one warp, whose steps wait for no other.
    template <int NUMBER, int PROBES>
    DEVICE void lloyd_by_a_warp(int k, int steps, double tolerance, double* centres) {
        const int lane = threadIdx.x;
        int cut[NUMBER];
#pragma unroll
        for (int r = 0; r < NUMBER; r++) cut[r] = -1;
        double centre = lane < k ? centres[lane] : 0.0;
        for (int step = 0; step < steps; step++) {
            T limit[NUMBER];
            int found[NUMBER];
#pragma unroll
            for (int r = 0; r < NUMBER; r++) {
                const int c = max(1, min(r + 1, k - 1));
                limit[r] = down<T>((centres[c - 1] + centres[c]) / 2);
            }
            __syncwarp();
            reached_in_two<NUMBER, PROBES>(limit, found);
            bool moved = step == 0;
            int a = 0, b = n;
#pragma unroll
            for (int r = 0; r < NUMBER; r++) {
                if (r + 1 >= k) continue;
                moved |= found[r] != cut[r];
                cut[r] = found[r];
                if (lane == r) b = found[r];
                if (lane == r + 1) a = found[r];
            }
            if (!moved) break;
            double shift = 0;
            if (lane < k) {
                const double mean = mean_of(a, b, centre);
                shift = (mean - centre) * (mean - centre);
                centres[lane] = centre = mean;
            }
            // Of the lanes beyond there is nothing to add.
#pragma unroll
            for (int d = (NUMBER + 1) / 2; d; d /= 2) shift += __shfl_xor_sync(ALL, shift, d);
            __syncwarp();
            if (__shfl_sync(ALL, shift, 0) <= tolerance) break;
        }
    }

    // From ascending centres: until no cut moves, or the squared moves of the centres are within `tolerance`.
    DEVICE void lloyd(int k, int steps, double tolerance, double* centres) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const bool two = n < 65 * 65, four = n < 129 * 129;  // probes a lane that do
        if (k <= 8 && four) {
            if (warp > 0)
                ;
            else if (k <= 4)
                two ? lloyd_by_a_warp<3, 2>(k, steps, tolerance, centres) : lloyd_by_a_warp<3, 4>(k, steps, tolerance, centres);
            else
                two ? lloyd_by_a_warp<7, 2>(k, steps, tolerance, centres) : lloyd_by_a_warp<7, 4>(k, steps, tolerance, centres);
            __syncthreads();
            return;
        }
        for (int step = 0; step < steps; step++) {
            bool moved = step == 0;
            for (int c = 1 + warp; c < k; c += WARPS) {
                const T limit[1] = {down<T>((centres[c - 1] + centres[c]) / 2)};
                int cut[1];
                if (four)
                    reached_in_two<1, 4>(limit, cut);
                else
                    reached(limit, cut);
                moved |= cut[0] != s.cuts[c];
                __syncwarp();
                if (lane == 0) s.cuts[c] = cut[0];
            }
            if (!__syncthreads_or(moved)) break;
            double shift = 0;
            if (warp * 32 < k) {
                const int c = threadIdx.x;
                if (c < k) {
                    const double mean = mean_of(c, centres[c]);
                    shift = (mean - centres[c]) * (mean - centres[c]);
                    centres[c] = mean;
                }
                shift = warp_sum(shift);
                if (lane == 0) s.totals[warp] = shift;
            }
            __syncthreads();
            shift = 0;
            for (int w = 0; w * 32 < k; w++) shift += s.totals[w];
            if (shift <= tolerance) break;
        }
        __syncthreads();
    }
};

}  // namespace
