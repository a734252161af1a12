// One block of CLAQ's columns on a GPU, without a word from the host: a launch for each column, none of which waits for the host.
//
// Launch j has one block of threads for each part that fits and rounds column j, and others that meanwhile take the error of column j - 1
// off the columns after j. Column j itself lacks that error alone, which its block takes off first. So each weight gets the errors in the
// order of columns, and nobody reads what another block of the same launch writes. Each product, difference and quotient is rounded by
// itself, as in C++. In a chain of launches the fit is all that takes time (some 25 us with 4 centres of 4096 values, 55 with 16, as
// reckoned): the others' share, a few MB in the second-level cache, takes a few us beside it, a launch 2 us. Parts are blocks of linears
// that have one factor: none of them reads another, and a fit leaves all multiprocessors but one free, so that several take the time of
// one.
//
// Plain C ABI; returns a cudaError_t. parts is [count] of `Part`, and plan [count, B] of `Wanted`, on the host, but what they point to is
// on the device. Columns one after another: block, codes (bytes), values, errors, kept are [B, N], contiguous; upper is [B, B], with a
// stride between rows; block is changed. tables [B, most] hold numbers of the stored type; kept may be null where no plan reserves; given
// [B, most], or null: centres to round to in place of a column's own; wrong is bool [2], set where a table and where a reserved weight does
// not fit the type. 0 < N <= THREADS * 23. The parts of a call, PARTS at most, have N in one of the ranges (0, 9], (9, 17] and (17, 23]
// THREADS, as a sum's order depends on it, and all of them have centres given, or none has.

#include <algorithm>

#include "claq_block.h"
#include "kmeans_fit.h"

namespace {

constexpr int WIDE = 16;  // columns that a block of threads takes an error off
constexpr int PARTS = 8;  // as quant/kernels/claq_block/cuda.py has it

struct Part {
    float* block;
    const float* given;
    uint8_t* codes;
    float *values, *errors, *tables;
    uint8_t *kept, *wrong;
    int64_t n, most, type;
};

struct Launch {
    Part part[PARTS];
    Wanted wanted[PARTS];
    Problem<float> fit[PARTS];
    const float* upper;
    int64_t stride;
    int count, columns, steps;
};

// What comes after it is read from the arguments anew, and in no register before: the fit needs all of them.
DEVICE int again(int number) {
#if defined(__CUDACC__)
    asm volatile("" : "+r"(number)::"memory");
#endif
    return number;
}

DEVICE float less(float x, float error, float u) { return __fsub_rn(x, __fmul_rn(error, u)); }

// The error of column j - 1 off WIDE columns after j, THREADS rows of them; `tile` counts both.
DEVICE void take_off(const Launch& l, const Part& b, int j, int tile) {
    const int n = int(b.n), rows = (n + THREADS - 1) / THREADS, r = tile % rows * THREADS + threadIdx.x, first = j + 1 + tile / rows * WIDE;
    if (r >= n) return;
    const float error = b.errors[int64_t(j - 1) * n + r];
    const float* u = l.upper + (j - 1) * l.stride;
    float *x = b.block + r, own[WIDE];
    // All that is read comes before all that is written, which it might be for all the compiler knows: else each would wait for the last.
#pragma unroll
    for (int i = 0; i < WIDE; i++)
        if (first + i < l.columns) own[i] = less(x[int64_t(first + i) * n], error, u[first + i]);
#pragma unroll
    for (int i = 0; i < WIDE; i++)
        if (first + i < l.columns) x[int64_t(first + i) * n] = own[i];
}

constexpr int BATCH = 5;  // values whose loads, codes and quotients a thread has under way at once

// Of ascending middles, how many are below each x.
DEVICE void codes_of(const float (&x)[BATCH], const float* middles, int k, int (&codes)[BATCH]) {
#pragma unroll
    for (int i = 0; i < BATCH; i++) codes[i] = 0;
    if (k <= 16) {
        for (int c = 0; c < k - 1; c++) {
            const float middle = middles[c];
#pragma unroll
            for (int i = 0; i < BATCH; i++) codes[i] += x[i] > middle;
        }
        return;
    }
    // k is a power of two.
    for (int step = k / 2; step; step /= 2)
#pragma unroll
        for (int i = 0; i < BATCH; i++) codes[i] += middles[codes[i] + step - 1] < x[i] ? step : 0;
}

DEVICE BY_ANY void raise(uint8_t* flag) { *flag = 1; }

// Column j of a part, whose centres are in its table; `sorted`: its values.
DEVICE void round_column(const Launch& l, int number, int j, const float* sorted, float* room) {
    const Part& b = l.part[number];
    const Wanted& wanted = l.wanted[number];
    const int k = int(wanted.k), n = int(b.n), top = int(wanted.top), bottom = int(wanted.bottom);
    float *table = room, *middles = room + MOST, *given = b.tables + int64_t(j) * b.most;
    const float* x = b.block + int64_t(j) * n;
    uint8_t* codes = b.codes + int64_t(j) * n;
    float *values = b.values + int64_t(j) * n, *errors = b.errors + int64_t(j) * n;
    __syncthreads();
    // Tables may be off by a 256th of their range; one of equal values by a 1024th.
    const float least = given[0], greatest = given[k - 1], width = greatest - least;
    const float allowed = width > 0 ? width / 256 : fmaxf(fabsf(least), fabsf(greatest)) / 1024;
    __syncthreads();
    for (int c = threadIdx.x; c < b.most; c += THREADS) {
        const float centre = c < k ? given[c] : 0.0f, own = stored(centre, b.type);
        if (b.type != FLOAT32 && !(fabsf(own - centre) <= allowed)) raise(b.wrong);
        table[c] = given[c] = own;
    }
    __syncthreads();
    for (int c = threadIdx.x; c + 1 < k; c += THREADS) middles[c] = (table[c] + table[c + 1]) / 2;
    __syncthreads();
    const float diagonal = l.upper[j * l.stride + j];
    bool differs = false;
    for (int first = threadIdx.x; first < n; first += BATCH * THREADS) {
        float own[BATCH];
        int code[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) own[i] = x[min(first + i * THREADS, n - 1)];
        codes_of(own, middles, k, code);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int r = first + i * THREADS;
            if (r >= n) continue;
            const float value = table[code[i]];
            codes[r] = uint8_t(code[i]);
            values[r] = value;
            errors[r] = __fdiv_rn(__fsub_rn(own[i], value), diagonal);
            differs |= top && stored(own[i], b.type) != value;
        }
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
GLOBAL void BOUNDS(THREADS, 1) column(const __grid_constant__ Launch l, int j) {
    DYNAMIC_SHARED(memory);
    __shared__ Small s;
    // All fits begin before what is taken off beside them.
    if (blockIdx.x >= l.count) return take_off(l, l.part[blockIdx.x % l.count], j, blockIdx.x / l.count - 1);
    const Part& b = l.part[blockIdx.x];
    const Problem<float>& p = l.fit[blockIdx.x];
    if (j > 0) {
        float* const x = b.block + int64_t(j) * b.n;
        const float u = l.upper[(j - 1) * l.stride + j];
        const float* errors = b.errors + int64_t(j - 1) * b.n;
        float own[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int r = i * THREADS + threadIdx.x;
            if (r < b.n) own[i] = less(x[r], errors[r], u);
        }
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int r = i * THREADS + threadIdx.x;
            if (r < b.n) x[r] = own[i];
        }
        __syncthreads();
    }
    if constexpr (!GIVEN) {
        fit_column<float, ITEMS>(p, p.columns, nullptr, nullptr, p.centres, s, memory);
    } else {
        for (int c = threadIdx.x; c < p.k; c += THREADS) p.centres[c] = b.given[int64_t(j) * b.most + c];
        if (l.wanted[blockIdx.x].top) sort_column<float, ITEMS>(p.columns, p.n, memory);
    }
    round_column(l, again(blockIdx.x), j, reinterpret_cast<const float*>(memory), reinterpret_cast<float*>(s.list));
}

template <int ITEMS, bool GIVEN>
int solve(Launch& l, const Wanted* plan, int64_t stream) {
    for (int j = 0; j < l.columns; j++) {
        const int later = j ? (l.columns - j - 1 + WIDE - 1) / WIDE : 0;
        int64_t tiles = 0, bytes = 0;
        for (int i = 0; i < l.count; i++) {
            const Part& b = l.part[i];
            const Wanted& wanted = l.wanted[i] = plan[int64_t(i) * l.columns + j];
            const int bins = int(GIVEN ? wanted.k : wanted.bins);  // where nothing is fitted, no table of costs takes room
            l.fit[i] = {b.block + j * b.n, nullptr, wanted.draws, nullptr, b.tables + j * b.most, 0, int(b.n), int(wanted.k), bins, l.steps,
                        2 + int(std::log(double(wanted.k)))};
            tiles = std::max(tiles, (b.n + THREADS - 1) / THREADS * later);
            bytes = std::max(bytes, shared_bytes<float, ITEMS>(l.fit[i]));
        }
        const dim3 blocks(unsigned(l.count * (1 + tiles)));
        const int failed = LAUNCH((column<ITEMS, GIVEN>), blocks, THREADS, bytes, stream, l, j);
        if (failed) return failed;
    }
    return 0;
}

template <bool GIVEN>
int solve(Launch& l, const Wanted* plan, int64_t stream) {
    // Odd counts: threads that read neighbouring runs of shared memory do not meet in its banks.
    if (l.part[0].n <= 9 * THREADS) return solve<9, GIVEN>(l, plan, stream);
    if (l.part[0].n <= 17 * THREADS) return solve<17, GIVEN>(l, plan, stream);
    return solve<23, GIVEN>(l, plan, stream);
}

}  // namespace

extern "C" int bitgrid_claq_blocks(const float* upper, int64_t stride, const int64_t* parts, const int64_t* plan, int64_t count,
                                   int64_t columns, int64_t steps, int64_t stream) {
    Launch l{};
    std::memcpy(l.part, parts, count * sizeof(Part));
    l.upper = upper, l.stride = stride, l.count = int(count), l.columns = int(columns), l.steps = int(steps);
    const Wanted* const wanted = reinterpret_cast<const Wanted*>(plan);
    return l.part[0].given == nullptr ? solve<false>(l, wanted, stream) : solve<true>(l, wanted, stream);
}
