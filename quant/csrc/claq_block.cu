// One block of CLAQ's columns on a GPU, without a word from the host: a launch for each column, none of which waits for the host.
//
// Launch j has one block of threads that fits and rounds column j, and others that meanwhile take the error of column j - 1 off the columns
// after j. Column j itself lacks that error alone, which its block takes off first. So each weight gets the errors in the order of columns,
// and nobody reads what another block of the same launch writes. Each product, difference and quotient is rounded by itself, as in C++.
// In a chain of launches the fit is all that takes time (some 30 us with 4 centres of 4096 values, 60 with 16, as reckoned): the others'
// share, at most 4 MB in the second-level cache, takes a few us beside it, a launch 2 us.
//
// Plain C ABI; returns a cudaError_t. Columns one after another: block, codes, values, errors, kept are [B, N], contiguous; upper is [B, B],
// with a stride between rows; block is changed. plan is [B] of `Wanted`, on the host, but draws are on the device. tables [B, most] hold
// numbers of the stored type; kept may be null where no plan reserves; given [B, most], or null: centres to round to in place of a column's
// own; wrong is bool [2], set where a table and where a reserved weight does not fit the type. 0 < N <= THREADS * 23.

#include "claq_block.h"
#include "kmeans_fit.h"

namespace {

constexpr int WIDE = 16;  // columns that a block of threads takes an error off

struct Block {
    float* block;
    const float *upper, *given;
    float *codes, *values, *errors, *tables;
    uint8_t *kept, *wrong;
    int64_t stride;
    int columns, n, most, steps, type;
};

// What comes after it is read from the arguments anew, and in no register before: the fit needs all of them.
DEVICE int again(int j) {
#if defined(__CUDACC__)
    asm volatile("" : "+r"(j)::"memory");
#endif
    return j;
}

DEVICE float less(float x, float error, float u) { return __fsub_rn(x, __fmul_rn(error, u)); }

// The error of column j - 1 off WIDE columns after j, THREADS rows of them; `tile` counts both.
DEVICE void take_off(const Block& b, int j, int tile) {
    const int rows = (b.n + THREADS - 1) / THREADS, r = tile % rows * THREADS + threadIdx.x, first = j + 1 + tile / rows * WIDE;
    if (r >= b.n) return;
    const float error = b.errors[int64_t(j - 1) * b.n + r];
    const float* u = b.upper + (j - 1) * b.stride;
    float* x = b.block + r;
#pragma unroll 4
    for (int c = first; c < min(b.columns, first + WIDE); c++) x[int64_t(c) * b.n] = less(x[int64_t(c) * b.n], error, u[c]);
}

// Of ascending middles, how many are below x.
DEVICE int code_of(float x, const float* middles, int k) {
    int low = 0, high = k - 1;
    if (k <= 16) {
        for (int c = 0; c < high; c++) low += x > middles[c];
        return low;
    }
    while (low < high) {
        const int middle = (low + high) / 2;
        if (middles[middle] < x)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// Column j, whose centres are in its table; `sorted`: its values.
DEVICE void round_column(const Block& b, const Wanted& wanted, int j, const float* sorted, float* room) {
    const int k = int(wanted.k), n = b.n, top = int(wanted.top), bottom = int(wanted.bottom);
    float *table = room, *middles = room + MOST, *given = b.tables + int64_t(j) * b.most;
    const float* x = b.block + int64_t(j) * n;
    float *codes = b.codes + int64_t(j) * n, *values = b.values + int64_t(j) * n, *errors = b.errors + int64_t(j) * n;
    __syncthreads();
    // Tables may be off by a 256th of their range; one of equal values by a 1024th.
    const float least = given[0], greatest = given[k - 1], width = greatest - least;
    const float allowed = width > 0 ? width / 256 : fmaxf(fabsf(least), fabsf(greatest)) / 1024;
    __syncthreads();
    for (int c = threadIdx.x; c < b.most; c += THREADS) {
        const float centre = c < k ? given[c] : 0.0f, own = stored(centre, b.type);
        if (b.type != FLOAT32 && !(fabsf(own - centre) <= allowed)) b.wrong[0] = 1;
        table[c] = given[c] = own;
    }
    __syncthreads();
    for (int c = threadIdx.x; c + 1 < k; c += THREADS) middles[c] = (table[c] + table[c + 1]) / 2;
    __syncthreads();
    const float diagonal = b.upper[j * b.stride + j];
    bool differs = false;
    for (int r = threadIdx.x; r < n; r += THREADS) {
        const int code = code_of(x[r], middles, k);
        const float value = table[code];
        codes[r] = float(code);
        values[r] = value;
        errors[r] = __fdiv_rn(__fsub_rn(x[r], value), diagonal);
        differs |= top && stored(x[r], b.type) != value;
    }
    if (!top) return;
    const bool exact = !__syncthreads_or(differs);
    // Both ends as they are, but those that the table gives already. Equal weights at an end are more than were asked for; like those of a
    // table that holds all, they need no reserving.
    const float high = sorted[n - top], low = bottom ? sorted[bottom - 1] : -INFINITY;
    const bool tied = (top < n && sorted[n - top - 1] == high) || (bottom && sorted[bottom] == low);
    if (threadIdx.x == 0 && !(isfinite(stored(sorted[0], b.type)) && isfinite(stored(sorted[n - 1], b.type)))) b.wrong[1] = 1;
    for (int r = threadIdx.x; r < n; r += THREADS) {
        const bool end = x[r] >= high || x[r] <= low;
        const float own = stored(x[r], b.type);
        const bool keep = end && !(own == values[r] && (exact || tied));
        b.kept[int64_t(j) * n + r] = keep;
        if (!keep) continue;
        values[r] = own;
        errors[r] = __fdiv_rn(__fsub_rn(x[r], own), diagonal);
    }
}

template <int ITEMS, bool GIVEN>
GLOBAL void BOUNDS(THREADS, 1)
column(const __grid_constant__ Block b, const __grid_constant__ Wanted wanted, const __grid_constant__ Problem<float> p, int j) {
    DYNAMIC_SHARED(memory);
    __shared__ Small s;
    if (blockIdx.x > 0) return take_off(b, j, blockIdx.x - 1);
    if (j > 0) {
        float* x = b.block + int64_t(j) * b.n;
        const float u = b.upper[(j - 1) * b.stride + j];
        for (int r = threadIdx.x; r < b.n; r += THREADS) x[r] = less(x[r], b.errors[int64_t(j - 1) * b.n + r], u);
        __syncthreads();
    }
    if constexpr (!GIVEN) {
        fit_column<float, ITEMS>(p, p.columns, nullptr, nullptr, p.centres, s, memory);
    } else {
        for (int c = threadIdx.x; c < p.k; c += THREADS) p.centres[c] = b.given[int64_t(j) * b.most + c];
        if (wanted.top) sort_column<float, ITEMS>(p.columns, p.n, memory);
    }
    round_column(b, wanted, again(j), reinterpret_cast<const float*>(memory), reinterpret_cast<float*>(s.list));
}

template <int ITEMS, bool GIVEN>
int solve(const Block& b, const Wanted* plan, int64_t stream) {
    for (int j = 0; j < b.columns; j++) {
        const int rows = (b.n + THREADS - 1) / THREADS, later = j ? b.columns - j - 1 : 0, trials = 2 + int(std::log(double(plan[j].k)));
        const int bins = int(GIVEN ? plan[j].k : plan[j].bins);  // where nothing is fitted, no table of costs takes room
        const Problem<float> p{b.block + int64_t(j) * b.n, nullptr, plan[j].draws, nullptr, b.tables + int64_t(j) * b.most, 0,
                               b.n, int(plan[j].k), bins, b.steps, trials};
        const dim3 blocks(unsigned(1 + rows * ((later + WIDE - 1) / WIDE)));
        const int failed = LAUNCH((column<ITEMS, GIVEN>), blocks, THREADS, (shared_bytes<float, ITEMS>(p)), stream, b, plan[j], p, j);
        if (failed) return failed;
    }
    return 0;
}

template <bool GIVEN>
int solve(const Block& b, const Wanted* plan, int64_t stream) {
    // Odd counts: threads that read neighbouring runs of shared memory do not meet in its banks.
    if (b.n <= 9 * THREADS) return solve<9, GIVEN>(b, plan, stream);
    if (b.n <= 17 * THREADS) return solve<17, GIVEN>(b, plan, stream);
    return solve<23, GIVEN>(b, plan, stream);
}

}  // namespace

extern "C" int bitgrid_claq_block(float* block, const float* upper, int64_t stride, const int64_t* plan, int64_t columns, int64_t n,
                                  int64_t steps, int64_t type, int64_t most, const float* given, float* codes, float* values, float* errors,
                                  float* tables, uint8_t* kept, uint8_t* wrong, int64_t stream) {
    const Block b{block, upper, given, codes, values, errors, tables, kept, wrong, stride, int(columns), int(n), int(most), int(steps),
                  int(type)};
    const Wanted* const wanted = reinterpret_cast<const Wanted*>(plan);
    return given == nullptr ? solve<false>(b, wanted, stream) : solve<true>(b, wanted, stream);
}
