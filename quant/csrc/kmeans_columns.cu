// k-means of columns on a GPU: a thread block does a whole column, without a word from the host. The steps are those of
// kmeans_columns.cpp; sums are float64, in another order than there, so that results agree to rounding.
//
// - Float32 columns of up to THREADS * 23 values stay on the chip: sorted values and their prefix sums in shared memory; in registers, for
//   a k-means++ start, each thread's values and their squared distances to the nearest centre.
// - All others are sorted by the caller (`ordered`), and sums and distances lie in `scratch`, `stride` doubles for each column.
// - Weights: a sum of the first ones stands beside that of the values, and what is summed is weighed. Columns of up to THREADS * 17 values
//   stay on the chip.
// - What a k-means++ candidate would gain needs no pass over the values: between a new centre t and a neighbour L, the values from their
//   middle on gain (x - L)² - (x - t)², which is linear in x and thus known from prefix sums. Only the draw of candidates takes a pass,
//   since their order is that of the column.
// - A Lloyd step searches every middle in the sorted values by a warp, 32 probes at a time.
//
// Plain C ABI; every entry returns a cudaError_t. Columns [C, N] contiguous, N > 0, finite. `draws`: uniform numbers for k-means++, or
// null. `weights`: of each column's values, `apart` numbers from column to column (0: the same for all), or null; `ordered_weights`
// [C, N] go with `ordered`.

#include "kmeans_fit.h"

namespace {

template <typename T, int ITEMS, bool WEIGHED>
GLOBAL void BOUNDS(THREADS, 1) fit(Problem<T> p) {
    DYNAMIC_SHARED(memory);
    __shared__ Small s;
    const int64_t column = blockIdx.x;
    const T* const ordered = ITEMS > 0 ? nullptr : p.ordered + column * p.n;
    const double *weights = WEIGHED ? p.weights + column * p.apart : nullptr, *beside = nullptr;
    if (WEIGHED && ITEMS == 0) beside = p.ordered_weights + column * p.n;
    fit_column<T, ITEMS, WEIGHED>(p, p.columns + column * p.n, ordered, p.scratch + column * p.stride, p.centres + column * p.k, s, memory,
                                  weights, beside);
}

template <typename T, int ITEMS, bool WEIGHED>
int launch(const Problem<T>& p, int64_t columns, int64_t stream) {
    return LAUNCH((fit<T, ITEMS, WEIGHED>), dim3(unsigned(columns)), THREADS, (shared_bytes<T, ITEMS, WEIGHED>(p)), stream, p);
}

template <typename T>
int kmeans(const T* columns, const T* ordered, const double* weights, int64_t apart, const double* ordered_weights, int64_t count,
           int64_t n, int64_t k, int64_t bins, int64_t steps, int64_t trials, const double* draws, double* scratch, int64_t stride,
           T* centres, int64_t stream) {
    if (count == 0) return 0;
    const Problem<T> p{columns,  ordered,   draws,      scratch,     centres, stride,          int(n),
                       int(k),   int(bins), int(steps), int(trials), weights, ordered_weights, apart};
    if constexpr (sizeof(T) == 4) {
        // Odd counts: threads that read neighbouring runs of shared memory do not meet in its banks.
        if (ordered == nullptr && weights != nullptr && n <= 9 * THREADS) return launch<T, 9, true>(p, count, stream);
        if (ordered == nullptr && weights != nullptr) return launch<T, 17, true>(p, count, stream);
        if (ordered == nullptr && n <= 9 * THREADS) return launch<T, 9, false>(p, count, stream);
        if (ordered == nullptr && n <= 17 * THREADS) return launch<T, 17, false>(p, count, stream);
        if (ordered == nullptr) return launch<T, 23, false>(p, count, stream);
    }
    return weights != nullptr ? launch<T, 0, true>(p, count, stream) : launch<T, 0, false>(p, count, stream);
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

int bitgrid_kmeans_f32(const float* x, const float* ordered, const double* weights, int64_t apart, const double* ordered_weights, int64_t c,
                       int64_t n, int64_t k, int64_t bins, int64_t steps, int64_t trials, const double* draws, double* scratch,
                       int64_t stride, float* centres, int64_t stream) {
    return kmeans(x, ordered, weights, apart, ordered_weights, c, n, k, bins, steps, trials, draws, scratch, stride, centres, stream);
}
int bitgrid_kmeans_f64(const double* x, const double* ordered, const double* weights, int64_t apart, const double* ordered_weights,
                       int64_t c, int64_t n, int64_t k, int64_t bins, int64_t steps, int64_t trials, const double* draws, double* scratch,
                       int64_t stride, double* centres, int64_t stream) {
    return kmeans(x, ordered, weights, apart, ordered_weights, c, n, k, bins, steps, trials, draws, scratch, stride, centres, stream);
}
int bitgrid_nearest_f32(const float* x, int64_t c, int64_t n, const float* centres, int64_t k, uint8_t* codes, int64_t stream) {
    return nearest(x, c, n, centres, k, codes, stream);
}
int bitgrid_nearest_f64(const double* x, int64_t c, int64_t n, const double* centres, int64_t k, uint8_t* codes, int64_t stream) {
    return nearest(x, c, n, centres, k, codes, stream);
}
}
