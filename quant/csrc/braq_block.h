// What the kernels of braq_block.cu share: a block of columns, what is known of it so far, and how a launch's last thread block sums up.

#pragma once

#include <algorithm>

#include "braq_search.h"

namespace {

constexpr int MOST_COLUMNS = 384;
constexpr int QUANTILES = 81, TARGETS = 2 * QUANTILES;  // a quantile lies between two values
constexpr int PICK_THREADS = 1024, PICK_BLOCKS = 264, BINS = 1 << 15, DIGITS = 256, RUN = BINS / PICK_THREADS;
constexpr int NONE = 255;
static_assert(TARGETS < NONE, "a target's number fits a byte");

struct State {
    uint32_t arrived[16];
    int64_t count;  // of salient columns
    float threshold, thresholds[QUANTILES];
    int order[MOST_COLUMNS];
    int rank[TARGETS], row[TARGETS];  // of each target: where it is among the values that begin like it, and whose counts these are
    uint32_t bits[TARGETS];           // how it begins
    uint32_t first[BINS], second[TARGETS * DIGITS], third[TARGETS * DIGITS];
    uint8_t row_of_bin[BINS], row_of_digit[TARGETS * DIGITS];  // NONE: no target begins so
};

struct Block {
    const float *weight, *diagonal;  // of the first of these columns
    float* m;                        // [rows, columns]
    double* totals;
    State* state;
    // Of the first of these columns, or of this block of columns.
    uint8_t *signs, *second, *split, *salient;
    float *scale, *mean;
    float* errors;  // [rows, columns]
    unsigned long long* wrong;
    int64_t stride, step, width, blocks;  // of a row of weights, of the diagonal, of a row of signs; blocks of columns
    int rows, columns, least, number, type, hessian;
};

// Whether this thread block is the last of its launch to come here. It then sees what all others have written.
DEVICE bool last(uint32_t* arrived, int blocks) {
    // The first thread's fences stand for the block: barriers order the others' reads and writes around them.
    bool all = false;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        all = atomicAdd(arrived, 1u) == uint32_t(blocks - 1);
        if (all) *arrived = 0;
        __threadfence();
    }
    return __syncthreads_or(all);
}

// Of `number` candidates, at most as many as threads, the first whose sum over all tiles is the least; the first where none is a number.
// All threads know it.
DEVICE int first_least(const double* totals, int tiles, int number, int threads, unsigned char* memory) {
    double* const room = reinterpret_cast<double*>(memory);
    const int parts = threads / number, part = threadIdx.x / number, candidate = threadIdx.x % number;
    if (part < parts) {
        double sum = 0;
#pragma unroll 8
        for (int t = part; t < tiles; t += parts) sum += totals[int64_t(t) * number + candidate];
        room[part * number + candidate] = sum;
    }
    __syncthreads();
    int best = number;
    if (threadIdx.x < 32) {
        double least = INFINITY;
        for (int j = threadIdx.x; j < number; j += 32) {
            double total = 0;
            for (int p = 0; p < parts; p++) total += room[p * number + j];
            if (total < least) least = total, best = j;
        }
        for (int d = 16; d; d /= 2) {
            const double other = __shfl_xor_sync(ALL, least, d);
            const int at = __shfl_xor_sync(ALL, best, d);
            if (other < least || (other == least && at < best)) least = other, best = at;
        }
    }
    __syncthreads();
    int* const found = reinterpret_cast<int*>(memory);
    if (threadIdx.x == 0) *found = best < number ? best : 0;
    __syncthreads();
    return *found;
}

unsigned tiles_of(int64_t rows, int64_t size) { return unsigned((rows + size - 1) / size); }

}  // namespace
