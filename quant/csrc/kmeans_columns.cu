// k-means of columns on a GPU: a thread block does a whole column, without a word from the host. The steps are those of
// kmeans_columns.cpp; sums are float64, in another order than there, so that results agree to rounding.
//
// - Float32 columns of up to THREADS * 23 values stay on the chip: sorted values and their prefix sums in shared memory; in registers, for
//   a k-means++ start, each thread's values and their squared distances to the nearest centre.
// - All others are sorted by the caller (`ordered`), and sums and distances lie in `scratch`, `stride` doubles for each column.
// - What a k-means++ candidate would gain needs no pass over the values: between a new centre t and a neighbour L, the values from their
//   middle on gain (x - L)² - (x - t)², which is linear in x and thus known from prefix sums. Only the draw of candidates takes a pass,
//   since their order is that of the column.
// - A Lloyd step searches every middle in the sorted values by a warp, 32 probes at a time.
//
// Plain C ABI; every entry returns a cudaError_t. Columns [C, N] contiguous, N > 0, finite. `draws`: uniform numbers for k-means++, or
// null.

#include "kmeans_column.h"
#if defined(__CUDACC__)
#include <cub/block/block_radix_sort.cuh>
#endif

namespace {

// The compiler widens values to float64 once, for all rounds. For the longest columns the registers do not suffice for that.
#if defined(__CUDACC__)
template <typename T>
DEVICE void forgotten(T& value) {
    asm volatile("" : "+f"(value));
}
#else
template <typename T>
void forgotten(T&) {}
#endif

// A thread's values, in the column's own order, and their squared distances to the nearest centre: in registers, or in scratch.
template <typename T, int ITEMS>
struct Own {
    T value[ITEMS];
    double closest[ITEMS];
    DEVICE Own(double*, int) {}
    template <class F>
    DEVICE void each(const F& f) {
#pragma unroll
        for (int j = 0; j < ITEMS; j++) {
            if (ITEMS > 17) forgotten(value[j]);
            f(j, value[j], closest[j]);
        }
    }
};

template <typename T>
struct Own<T, 0> {
    double* closest;
    T* value;
    int per;
    DEVICE Own(double* scratch, int number) : closest(scratch), value(reinterpret_cast<T*>(scratch + THREADS * number)), per(number) {}
    template <class F>
    DEVICE void each(const F& f) {
        for (int j = 0; j < per; j++) f(j, value[j * THREADS + threadIdx.x], closest[j * THREADS + threadIdx.x]);
    }
};

// Greedy k-means++. Which of the two lists in `s` holds the ascending centres.
template <typename T, int ITEMS>
DEVICE int plus_plus(Column<T>& c, const Problem<T>& p, const T* values, double* scratch) {
    Small& s = c.s;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, from = threadIdx.x * c.per, n = c.n;
    Own<T, ITEMS> own(scratch, c.per);
    own.each([&](int j, T& value, double& closest) {
        const bool inside = from + j < n;
        value = inside ? values[from + j] : T(0);
        closest = inside ? INFINITY : 0.0;
    });
    double pick = double(values[min(int64_t(n - 1), int64_t(p.draws[0] * double(n)))]);
    if (threadIdx.x == 0) s.list[0][0] = pick;
    if (threadIdx.x < p.trials && p.k > 1) s.draw[threadIdx.x] = p.draws[1 + threadIdx.x], s.where[threadIdx.x] = n - 1;
    for (int number = 1; number < p.k; number++) {
        const double* list = s.list[(number - 1) % 2];
        double mine = 0, end, all;
        own.each([&](int, T& value, double& closest) {
            const double d = double(value) - pick, q = d * d;
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
            const double from_left = (t - l) * (2 * (c.wide[b] - c.wide[a]) - (l + t) * double(b - a));
            const double from_right = (r - t) * ((r + t) * double(e - b) - 2 * (c.wide[e] - c.wide[b]));
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
DEVICE void sort_block(float (&keys)[ITEMS], void* room) {
    Sorting<ITEMS>(*reinterpret_cast<typename Sorting<ITEMS>::TempStorage*>(room)).Sort(keys);
}

template <int ITEMS>
constexpr int64_t sort_room() {
    return sizeof(typename Sorting<ITEMS>::TempStorage);
}
#endif

template <typename T, int ITEMS>
GLOBAL void BOUNDS(THREADS, 1) fit(Problem<T> p) {
    DYNAMIC_SHARED(memory);
    __shared__ Small s;
    const int64_t column = blockIdx.x;
    const T* values = p.columns + column * p.n;
    T* out = p.centres + column * p.k;
    int first = 1;
    while (33 * first <= p.n) first *= 33;
    double* scratch = p.scratch + column * p.stride;
    const T* x;
    double *wide, *table;
    if constexpr (ITEMS > 0) {
        T* kept = reinterpret_cast<T*>(memory);
        wide = table = reinterpret_cast<double*>(memory + THREADS * ITEMS * sizeof(T));
        T keys[ITEMS];
#pragma unroll
        for (int j = 0; j < ITEMS; j++) keys[j] = j * THREADS + threadIdx.x < p.n ? values[j * THREADS + threadIdx.x] : T(INFINITY);
        sort_block(keys, wide);
#pragma unroll
        for (int j = 0; j < ITEMS; j++) kept[threadIdx.x * ITEMS + j] = keys[j];
        __syncthreads();
        x = kept;
    } else {
        x = p.ordered + column * p.n;
        wide = scratch;
        table = reinterpret_cast<double*>(memory);
    }
    const int per = ITEMS > 0 ? ITEMS : (p.n + THREADS - 1) / THREADS;
    Column<T> c{x, wide, table, s, p.n, per, first};
    if (c.few(p.k, out)) return;
    double* centres = s.list[0];
    double tolerance = 0;
    if (p.draws != nullptr) {
        const double square = c.total([&](int i) { return double(x[i]) * double(x[i]); });
        const double mean = c.prefix([&](int i) { return double(x[i]); }) / double(p.n);
        tolerance = 1e-4 * (square / double(p.n) - mean * mean);
        centres = s.list[plus_plus<T, ITEMS>(c, p, values, scratch + p.n + 1)];
        for (int i = threadIdx.x; i <= p.k; i += THREADS) s.cuts[i] = i < p.k ? 0 : p.n;
        __syncthreads();
    } else {
        c.partition(p, centres);
    }
    c.lloyd(p.k, p.steps, tolerance, centres);
    for (int i = threadIdx.x; i < p.k; i += THREADS) out[i] = T(centres[i]);
}

template <typename T, int ITEMS>
int launch(const Problem<T>& p, int64_t columns, int64_t stream) {
    const int64_t side = p.bins + 1, table = p.draws == nullptr && p.bins > p.k ? side * (side + 1) / 2 * 8 : 0;
    int64_t bytes = table;
    if constexpr (ITEMS > 0) {
        const int64_t wide = 8 * (int64_t(p.n) + 1), room = sort_room<ITEMS>();
        const int64_t more = wide > room ? wide : room;
        bytes = THREADS * ITEMS * int64_t(sizeof(T)) + (table > more ? table : more);
    }
    return LAUNCH((fit<T, ITEMS>), dim3(unsigned(columns)), THREADS, bytes, stream, p);
}

template <typename T>
int kmeans(const T* columns, const T* ordered, int64_t count, int64_t n, int64_t k, int64_t bins, int64_t steps, int64_t trials,
           const double* draws, double* scratch, int64_t stride, T* centres, int64_t stream) {
    if (count == 0) return 0;
    const Problem<T> p{columns, ordered, draws, scratch, centres, stride, int(n), int(k), int(bins), int(steps), int(trials)};
    if constexpr (sizeof(T) == 4) {
        // Odd counts: threads that read neighbouring runs of shared memory do not meet in its banks.
        if (ordered == nullptr && n <= 9 * THREADS) return launch<T, 9>(p, count, stream);
        if (ordered == nullptr && n <= 17 * THREADS) return launch<T, 17>(p, count, stream);
        if (ordered == nullptr) return launch<T, 23>(p, count, stream);
    }
    return launch<T, 0>(p, count, stream);
}

constexpr int PART = 4 * 256;  // values that a block codes

// Codes of the nearest of k ascending centres; a value halfway goes to the lower one.
template <typename T>
GLOBAL void BOUNDS(256, 4) code(const T* columns, const T* centres, uint8_t* codes, int n, int k) {
    __shared__ T middles[MOST];
    const T* own = centres + int64_t(blockIdx.x) * k;
    for (int j = threadIdx.x; j + 1 < k; j += 256) middles[j] = (own[j] + own[j + 1]) / 2;
    __syncthreads();
    const int64_t column = int64_t(blockIdx.x) * n;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int i = blockIdx.y * PART + r * 256 + threadIdx.x;
        if (i >= n) break;
        const T x = columns[column + i];
        int low = 0, high = k - 1;
        if (k <= 16) {
            for (int j = 0; j < high; j++) low += x > middles[j];
        } else {
            while (low < high) {
                const int middle = (low + high) / 2;
                if (middles[middle] < x)
                    low = middle + 1;
                else
                    high = middle;
            }
        }
        codes[column + i] = uint8_t(low);
    }
}

template <typename T>
int nearest(const T* columns, int64_t count, int64_t n, const T* centres, int64_t k, uint8_t* codes, int64_t stream) {
    if (count == 0) return 0;
    const dim3 blocks(unsigned(count), unsigned((n + PART - 1) / PART));
    return LAUNCH(code<T>, blocks, 256, 0, stream, columns, centres, codes, int(n), int(k));
}

}  // namespace

extern "C" {

int bitgrid_kmeans_f32(const float* x, const float* ordered, int64_t c, int64_t n, int64_t k, int64_t bins, int64_t steps, int64_t trials,
                       const double* draws, double* scratch, int64_t stride, float* centres, int64_t stream) {
    return kmeans(x, ordered, c, n, k, bins, steps, trials, draws, scratch, stride, centres, stream);
}
int bitgrid_kmeans_f64(const double* x, const double* ordered, int64_t c, int64_t n, int64_t k, int64_t bins, int64_t steps, int64_t trials,
                       const double* draws, double* scratch, int64_t stride, double* centres, int64_t stream) {
    return kmeans(x, ordered, c, n, k, bins, steps, trials, draws, scratch, stride, centres, stream);
}
int bitgrid_nearest_f32(const float* x, int64_t c, int64_t n, const float* centres, int64_t k, uint8_t* codes, int64_t stream) {
    return nearest(x, c, n, centres, k, codes, stream);
}
int bitgrid_nearest_f64(const double* x, int64_t c, int64_t n, const double* centres, int64_t k, uint8_t* codes, int64_t stream) {
    return nearest(x, c, n, centres, k, codes, stream);
}
}
