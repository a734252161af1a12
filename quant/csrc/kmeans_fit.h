// k-means of one column by a thread block, from its values to its centres: what kmeans_columns.cu and claq_block.cu share.

#pragma once

#include "kmeans_column.h"
#if defined(__CUDACC__)
#include <cub/block/block_radix_sort.cuh>
#endif

namespace {

// The compiler widens values to float64 once, for all rounds. For the longest columns, and where weights are read beside, registers do not
// suffice for that.
#if defined(__CUDACC__)
template <typename T>
DEVICE void forgotten(T& value) {
    asm volatile("" : "+f"(value));
}
#else
template <typename T>
void forgotten(T&) {}
#endif

// A thread's values, in the column's own order, and their squared distances to the nearest centre, weighed: in registers, or in scratch.
template <typename T, int ITEMS, bool WEIGHED>
struct Own {
    T value[ITEMS];
    double closest[ITEMS];
    DEVICE Own(double*, int) {}
    template <class F>
    DEVICE void each(const F& f) {
#pragma unroll
        for (int j = 0; j < ITEMS; j++) {
            if (ITEMS > (WEIGHED ? 9 : 17)) forgotten(value[j]);
            f(j, value[j], closest[j]);
        }
    }
};

template <typename T, bool WEIGHED>
struct Own<T, 0, WEIGHED> {
    double* closest;
    T* value;
    int per;
    DEVICE Own(double* scratch, int number) : closest(scratch), value(reinterpret_cast<T*>(scratch + THREADS * number)), per(number) {}
    template <class F>
    DEVICE void each(const F& f) {
        for (int j = 0; j < per; j++) f(j, value[j * THREADS + threadIdx.x], closest[j * THREADS + threadIdx.x]);
    }
};

// Greedy k-means++. Which of the two lists in `s` holds the ascending centres. `weights` of the values, if WEIGHED.
template <typename T, int ITEMS, bool WEIGHED>
DEVICE int plus_plus(Column<T, WEIGHED>& c, const Problem<T>& p, const T* values, const double* weights, double* scratch) {
    Small& s = c.s;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, from = threadIdx.x * c.per, n = c.n;
    Own<T, ITEMS, WEIGHED> own(scratch, c.per);
    // What value j of this thread weighs: read anew each time, since registers have no room for it.
    const auto weight = [&](int j) { return from + j < n ? weights[from + j] : 0.0; };
    own.each([&](int j, T& value, double& closest) {
        const bool inside = from + j < n;
        value = inside ? values[from + j] : T(0);
        closest = inside && !(WEIGHED && !(weight(j) > 0)) ? INFINITY : 0.0;
    });
    double pick;
    if constexpr (WEIGHED) {
        double mine = 0, end, all;
        own.each([&](int j, T&, double&) { mine += weight(j); });
        if (threadIdx.x == 0) s.where[0] = n - 1;
        const double base = scan(mine, s.totals, end, all), wanted = p.draws[0] * all;
        // Where the running sum goes beyond the draw.
        if (wanted < end && (base <= wanted || threadIdx.x == 0)) {
            double running = base;
            int found = -1, last = 0;
            own.each([&](int j, T&, double&) {
                const double w = weight(j);
                running += w;
                if (found < 0 && running > wanted) found = j;
                if (w > 0) last = j;
            });
            atomicMin(&s.where[0], from + (found < 0 ? last : found));
        }
        __syncthreads();
        pick = double(values[min(s.where[0], n - 1)]);
        __syncthreads();
    } else {
        pick = double(values[min(int64_t(n - 1), int64_t(p.draws[0] * double(n)))]);
    }
    if (threadIdx.x == 0) s.list[0][0] = pick;
    if (threadIdx.x < p.trials && p.k > 1) s.draw[threadIdx.x] = p.draws[1 + threadIdx.x], s.where[threadIdx.x] = n - 1;
    for (int number = 1; number < p.k; number++) {
        const double* list = s.list[(number - 1) % 2];
        double mine = 0, end, all;
        own.each([&](int j, T& value, double& closest) {
            const double d = double(value) - pick, q = WEIGHED ? weight(j) * (d * d) : d * d;
            closest = q < closest ? q : closest;
            mine += closest;
        });
        const double base = scan(mine, s.totals, end, all);
        // Where the running sum reaches each draw. Bases rise but for rounding: the first thread counts.
        for (int t = 0; t < p.trials; t++) {
            const double wanted = s.draw[t] * all;
            if (wanted > end || (wanted <= base && threadIdx.x)) continue;
            double running = base;
            int found = -1, last = 0;
            own.each([&](int j, T&, double& closest) {
                running += closest;
                if (found < 0 && running >= wanted) found = j;
                if (closest > 0) last = j;
            });
            atomicMin(&s.where[t], from + (found < 0 ? last : found));
        }
        __syncthreads();
        if (warp < p.trials) {
            const double t = double(values[min(s.where[warp], n - 1)]);
            int below = 0;  // centres that are not above
            for (int i = lane; i < number + lane; i += 32) below += __popc(__ballot_sync(ALL, i < number && list[min(i, number - 1)] <= t));
            const bool left = below > 0, right = below < number;
            const double l = left ? list[below - 1] : t, r = right ? list[below] : t;
            // Values of [a, b) come from the left neighbour, of [b, e) from the right one.
            const T limit[3] = {down<T>((l + t) / 2), down<T>((l + r) / 2), down<T>((t + r) / 2)};
            int at[3];
            c.reached(limit, at);
            const int b = !left ? 0 : !right ? n : at[1], a = left ? at[0] : 0, e = right ? at[2] : n;
            const double from_left = (t - l) * (2 * (c.wide[b] - c.wide[a]) - (l + t) * c.count(a, b));
            const double from_right = (r - t) * ((r + t) * c.count(b, e) - 2 * (c.wide[e] - c.wide[b]));
            if (lane == 0) {
                s.potential[warp] = all - from_left - from_right;
                s.tried[warp] = t;
                s.place[warp] = below;
            }
        }
        __syncthreads();
        double least = INFINITY;
        for (int t = 0; t < p.trials; t++) least = fmin(least, s.potential[t]);
        // Two values that are each other's only gain leave the same sum but for rounding: the first counts.
        int best = 0;
        const double most = least > 0 ? least * (1 + 1e-12) : least;
        while (best + 1 < p.trials && s.potential[best] > most) best++;
        pick = s.tried[best];
        const int place = s.place[best], i = threadIdx.x;
        if (i <= number) s.list[number % 2][i] = i < place ? list[i] : i == place ? pick : list[i - 1];
        if (i < p.trials && number + 1 < p.k) s.draw[i] = p.draws[1 + number * p.trials + i], s.where[i] = n - 1;
    }
    __syncthreads();
    return (p.k - 1) % 2;
}

#if defined(__CUDACC__)
template <int ITEMS>
using Sorting = cub::BlockRadixSort<float, THREADS, ITEMS>;
template <int ITEMS>
using PairSorting = cub::BlockRadixSort<float, THREADS, ITEMS, int>;

template <int ITEMS>
DEVICE void sort_block(float (&keys)[ITEMS], void* room) {
    Sorting<ITEMS>(*reinterpret_cast<typename Sorting<ITEMS>::TempStorage*>(room)).Sort(keys);
}

// The numbers go with their keys.
template <int ITEMS>
DEVICE void sort_block(float (&keys)[ITEMS], int (&numbers)[ITEMS], void* room) {
    PairSorting<ITEMS>(*reinterpret_cast<typename PairSorting<ITEMS>::TempStorage*>(room)).Sort(keys, numbers);
}

template <int ITEMS>
constexpr int64_t sort_room() {
    constexpr int64_t one = sizeof(typename Sorting<ITEMS>::TempStorage), two = sizeof(typename PairSorting<ITEMS>::TempStorage);
    return one > two ? one : two;
}
#endif

// Ascending `values` at the beginning of `memory`, which has room for them and for sorting.
template <typename T, int ITEMS>
DEVICE const T* sort_column(const T* values, int n, unsigned char* memory) {
    T* kept = reinterpret_cast<T*>(memory);
    T keys[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j++) keys[j] = j * THREADS + threadIdx.x < n ? values[j * THREADS + threadIdx.x] : T(INFINITY);
    sort_block(keys, memory + THREADS * ITEMS * sizeof(T));
#pragma unroll
    for (int j = 0; j < ITEMS; j++) kept[threadIdx.x * ITEMS + j] = keys[j];
    __syncthreads();
    return kept;
}

// The same, with the sums of the first weights into mass [n + 1], which may lie right behind the values.
template <typename T, int ITEMS>
DEVICE const T* sort_weighed(const T* values, const double* weights, int n, unsigned char* memory, double* mass, Small& s) {
    T* kept = reinterpret_cast<T*>(memory);
    T keys[ITEMS];
    int number[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        number[j] = j * THREADS + threadIdx.x;
        keys[j] = number[j] < n ? values[number[j]] : T(INFINITY);
    }
    sort_block(keys, number, memory + THREADS * ITEMS * sizeof(T));
    double own[ITEMS], mine = 0, end, all;
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        own[j] = number[j] < n ? weights[number[j]] : 0.0;
        mine += own[j];
        kept[threadIdx.x * ITEMS + j] = keys[j];
    }
    // Behind its barrier nobody sorts any more.
    double running = scan(mine, s.totals, end, all);
    if (threadIdx.x == 0) mass[0] = 0;
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        running += own[j];
        if (int(threadIdx.x) * ITEMS + j < n) mass[threadIdx.x * ITEMS + j + 1] = running;
    }
    __syncthreads();
    return kept;
}

// Centres of `values` into `out`, by all threads; `memory`: shared, `shared_bytes` of it. With ITEMS, the sorted values are left at its
// beginning; else `ordered` are given, and `scratch`. Ends without a barrier.
template <typename T, int ITEMS, bool WEIGHED = false>
DEVICE void fit_column(const Problem<T>& p, const T* values, const T* ordered, double* scratch, T* out, Small& s, unsigned char* memory,
                       const double* weights = nullptr, const double* ordered_weights = nullptr) {
    int first = 1;
    while (33 * first <= p.n) first *= 33;
    const int per = ITEMS > 0 ? ITEMS : (p.n + THREADS - 1) / THREADS;
    const T* x;
    double *wide, *table, *mass = nullptr;
    if constexpr (ITEMS > 0) {
        wide = table = reinterpret_cast<double*>(memory + THREADS * ITEMS * sizeof(T));
        if constexpr (WEIGHED) {
            mass = wide;
            wide = table = mass + p.n + 1;
            x = sort_weighed<T, ITEMS>(values, weights, p.n, memory, mass, s);
        } else {
            x = sort_column<T, ITEMS>(values, p.n, memory);
        }
    } else {
        x = ordered;
        wide = scratch;
        table = reinterpret_cast<double*>(memory);
        if constexpr (WEIGHED) mass = scratch + p.n + 1 + 2 * THREADS * per;
    }
    Column<T, WEIGHED> c{x, wide, table, s, p.n, per, first, mass};
    if constexpr (WEIGHED && ITEMS == 0) c.prefix(mass, [&](int i) { return ordered_weights[i]; });
    if (c.few(p.k, out)) return;
    double* centres = s.list[0];
    double tolerance = 0;
    if (p.draws != nullptr) {
        const double square = c.total([&](int i) { return c.square(i); }), all = c.count(0, p.n);
        const double mean = c.sums() / all;
        // Not kept in registers meanwhile, which have no room. All that is written to `s` until it is read has barriers behind it.
        if (threadIdx.x == 0) s.tolerance = 1e-4 * (square / all - mean * mean);
        centres = s.list[plus_plus<T, ITEMS, WEIGHED>(c, p, values, weights, scratch + p.n + 1)];
        for (int i = threadIdx.x; i <= p.k; i += THREADS) s.cuts[i] = i < p.k ? 0 : p.n;
        __syncthreads();
        tolerance = s.tolerance;
    } else {
        c.partition(p, centres);
    }
    c.lloyd(p.k, p.steps, tolerance, centres);
    for (int i = threadIdx.x; i < p.k; i += THREADS) out[i] = T(centres[i]);
}

// Of dynamic shared memory.
template <typename T, int ITEMS, bool WEIGHED = false>
int64_t shared_bytes(const Problem<T>& p) {
    const int64_t side = p.bins + 1, table = p.draws == nullptr && p.bins > p.k ? side * (side + 1) / 2 * 8 : 0;
    if constexpr (ITEMS > 0) {
        const int64_t wide = 8 * (int64_t(p.n) + 1), room = sort_room<ITEMS>(), mass = WEIGHED ? wide : 0;
        const int64_t more = mass + (table > wide ? table : wide);
        return THREADS * ITEMS * int64_t(sizeof(T)) + (more > room ? more : room);
    } else {
        return table;
    }
}

}  // namespace
