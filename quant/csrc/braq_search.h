// The errors of BiLLM's candidates in a tile of rows: what braq_search.cu and braq_block.cu share. The twin of braq_search.cpp.
//
// - Counts: a thread block has 32 rows, a lane one of them; warps share the candidates out. Values lie in shared memory with what the first
//   and the last of them add up to, so that a candidate takes three passes over a row.
// - Splits: a warp sorts a row by counting, and each lane does every 32nd threshold by searches and prefix sums.
//
// Sums over the rows of each thread block, in a fixed order: totals [tiles, candidates], tiles of 32 rows for counts and of 16 for splits.

#pragma once

#include <cmath>
#include <cstdint>

#include "warp.h"

namespace {

constexpr int COUNT_ROWS = 32, STRIDE = 33;  // rows of a tile; words from a column to the next, so that no two lanes meet in a bank
constexpr int COUNT_WARPS = 25;              // at most
constexpr int SPLIT_WARPS = 8, SPLIT_ROWS = 16, TOGETHER = 4;  // values that a lane ranks at a time

// As many warps as share the candidates out evenly.
inline int count_warps(int64_t number) {
    const int64_t turns = (number + COUNT_WARPS - 1) / COUNT_WARPS;
    return int((number + turns - 1) / turns);
}
inline int64_t count_bytes(int64_t columns) { return 4 * STRIDE * (3 * columns + 2); }
inline int64_t split_bytes(int64_t columns, int64_t number) {
    return 8 * SPLIT_WARPS * (number + columns + 1) + 4 * SPLIT_WARPS * 2 * columns;
}

struct Values {
    const float* x;
    int64_t stride;    // from a row to the next
    const int* order;  // where the columns lie, one after another; null: as they come
};

DEVICE float at(const Values& v, int64_t row, int i) { return v.x[row * v.stride + (v.order != nullptr ? v.order[i] : i)]; }

// What is left of columns `from` to `to` of a row when they are binarized twice, with means.
DEVICE float left_of(const float* x, int from, int to, float sum) {
    if (from >= to) return 0;
    const float size = float(to - from), mean = sum / size;
    float spread = 0;
#pragma unroll 8
    for (int i = from; i < to; i++) spread += fabsf(x[i * STRIDE] - mean);
    const float scale = spread / size;
    float left_sum = 0, squares = 0;
#pragma unroll 8
    for (int i = from; i < to; i++) {
        const float centred = x[i * STRIDE] - mean, left = centred - copysignf(scale, centred);
        left_sum += left;
        squares += left * left;
    }
    const float second_mean = left_sum / size;
    float second = 0;
#pragma unroll 8
    for (int i = from; i < to; i++) {
        const float centred = x[i * STRIDE] - mean;
        second += fabsf(centred - copysignf(scale, centred) - second_mean);
    }
    const float second_scale = second / size;
    return squares - size * (second_mean * second_mean + second_scale * second_scale);
}

// `counts`: the candidates; null: those from `from` on.
DEVICE void count_tile(const Values& x, const int64_t* counts, int from, double* totals, int rows, int columns, int number, int warps,
                       unsigned char* memory) {
    float *value = reinterpret_cast<float*>(memory), *first = value + columns * STRIDE, *last = first + (columns + 1) * STRIDE;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, start = blockIdx.x * COUNT_ROWS;
    for (int r = warp; r < COUNT_ROWS; r += warps)
        for (int i = lane; i < columns; i += 32) value[i * STRIDE + r] = start + r < rows ? at(x, start + r, i) : 0.0f;
    __syncthreads();
    if (warp == 0) {
        float sum = first[lane] = 0;
#pragma unroll 8
        for (int i = 0; i < columns; i++) first[(i + 1) * STRIDE + lane] = sum += value[i * STRIDE + lane];
    }
    if (warp == warps - 1) {
        float sum = last[columns * STRIDE + lane] = 0;
#pragma unroll 8
        for (int i = columns - 1; i >= 0; i--) last[i * STRIDE + lane] = sum += value[i * STRIDE + lane];
    }
    __syncthreads();
    for (int j = warp; j < number; j += warps) {
        const int k = counts != nullptr ? int(counts[j]) : from + j;
        const float* row = value + lane;
        const float errors = left_of(row, 0, k, first[k * STRIDE + lane]) + left_of(row, k, columns, last[k * STRIDE + lane]);
        const double total = warp_sum(double(errors));
        if (lane == 0) totals[int64_t(blockIdx.x) * number + j] = total;
    }
}

// Σ|x - mean| of `count` values with this sum, of which `number`, with the sum `under`, lie below the mean.
DEVICE double deviation(double sum, double count, double under, double number, double mean) {
    return (sum - under) - (count - number) * mean + number * mean - under;
}

// How many of `count` ascending values are below the limit (or, with `equal`, not above).
DEVICE int place(const float* x, int count, float limit, bool equal) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (x[middle] < limit || (equal && x[middle] == limit))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// One warp's row: `ordered` and `sums` [count + 1] from the values `raw`. Returns the sum of squares.
DEVICE double sort_row(const float* raw, float* ordered, double* sums, int count) {
    const int lane = threadIdx.x % 32;
    for (int start = 0; start < count; start += 32 * TOGETHER) {
        float own[TOGETHER];
        int rank[TOGETHER];
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) own[r] = raw[min(start + r * 32 + lane, count - 1)], rank[r] = 0;
        for (int j = 0; j < count; j++) {
            const float other = raw[j];
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) rank[r] += other < own[r] || (other == own[r] && j < start + r * 32 + lane);
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; r++)
            if (start + r * 32 + lane < count) ordered[rank[r]] = own[r];
    }
    __syncwarp();
    const int per = (count + 31) / 32, from = min(count, lane * per), to = min(count, from + per);
    double sum = 0, squares = 0;
    for (int i = from; i < to; i++) {
        const double v = double(ordered[i]);
        sum += v;
        squares += v * v;
    }
    const double upto = warp_scan(sum);
    const double earlier = __shfl_up_sync(ALL, upto, 1);
    double running = lane ? earlier : 0;
    if (lane == 0) sums[0] = 0;
    for (int i = from; i < to; i++) sums[i + 1] = running += double(ordered[i]);
    __syncwarp();
    return warp_sum(squares);
}

DEVICE double split_error(const float* x, const double* sums, int count, double squares, float threshold) {
    // Low values fill [a, b) of the sorted row; high ones are its two ends. Those equal to the threshold are high.
    const int a = place(x, count, -threshold, true), b = max(a, place(x, count, threshold, false));
    const double inner = sums[b] - sums[a], outer = sums[count] - inner;
    const double count_in = double(b - a), count_out = double(count - (b - a));
    const double least_in = fmax(count_in, 1.0), least_out = fmax(count_out, 1.0);
    const double mean_in = inner / least_in, mean_out = outer / least_out;
    // No float32 lies between a limit and itself rounded up.
    const int below = min(max(place(x, count, __double2float_ru(mean_in), false), a), b);
    const double spread_in = deviation(inner, count_in, sums[below] - sums[a], double(below - a), mean_in);
    const int middle = place(x, count, __double2float_ru(mean_out), false), left = min(middle, a), right = max(middle, b);
    const double under = sums[left] + sums[right] - sums[b];
    const double spread_out = deviation(outer, count_out, under, double(left + right - b), mean_out);
    return squares - count_in * mean_in * mean_in - count_out * mean_out * mean_out - spread_in * spread_in / least_in -
           spread_out * spread_out / least_out;
}

// `skip`: how many columns at the front count for nothing; null for none.
DEVICE void split_tile(const Values& x, const float* thresholds, const int64_t* skip, double* totals, int rows, int columns, int number,
                       unsigned char* memory) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int without = skip != nullptr ? int(*skip) : 0, count = columns - without;
    double* const all = reinterpret_cast<double*>(memory);
    double *own = all + warp * number, *sums = all + SPLIT_WARPS * number + warp * (columns + 1);
    float* raw = reinterpret_cast<float*>(memory + 8 * SPLIT_WARPS * (number + columns + 1)) + warp * 2 * columns;
    float* ordered = raw + columns;
    for (int j = lane; j < number; j += 32) own[j] = 0;
    for (int r = warp; r < SPLIT_ROWS; r += SPLIT_WARPS) {
        const int64_t row = int64_t(blockIdx.x) * SPLIT_ROWS + r;
        if (row >= rows || count < 1) break;
        for (int i = lane; i < count; i += 32) raw[i] = at(x, row, without + i);
        __syncwarp();
        const double squares = sort_row(raw, ordered, sums, count);
        for (int j = lane; j < number; j += 32) own[j] += split_error(ordered, sums, count, squares, thresholds[j]);
        __syncwarp();
    }
    __syncthreads();
    for (int j = threadIdx.x; j < number; j += 32 * SPLIT_WARPS) {
        double total = 0;
        for (int w = 0; w < SPLIT_WARPS; w++) total += all[w * number + j];
        totals[int64_t(blockIdx.x) * number + j] = total;
    }
}

}  // namespace
