// The 81 quantiles 0.10, 0.11 .. 0.90 of a block's |m|, interpolated linearly between two values that are exact: by the bits of all values,
// which for numbers that are 0 or more are in their order. A pass counts values by their next bits, and its last thread block finds in
// which count each target lies; the next pass counts those values only that begin like a target.

#pragma once

#include "braq_block.h"

namespace {

// `number` values with these bits.
template <int PASS>
DEVICE void add(State& s, uint32_t bits, uint32_t number) {
    if (PASS == 0) {
        atomicAdd(&s.first[bits >> 16], number);
        return;
    }
    const int row = s.row_of_bin[bits >> 16];
    if (row == NONE) return;
    const int digit = row * DIGITS + int(bits >> 8 & 255);
    if (PASS == 1) {
        atomicAdd(&s.second[digit], number);
        return;
    }
    const int next = s.row_of_digit[digit];
    if (next != NONE) atomicAdd(&s.third[next * DIGITS + int(bits & 255)], number);
}

// Sums over the threads up to each.
DEVICE int scanned(int v, int* room) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    v = warp_scan(v);
    if (lane == 31) room[warp] = v;
    __syncthreads();
    for (int w = 0; w < warp; w++) v += room[w];
    return v;
}

// Which of all values, counted from 0 in ascending order, a target is.
DEVICE int wanted(int target, int values) {
    const int below = int(int64_t(10 + target / 2) * (values - 1) / 100);
    return target % 2 ? min(below + 1, values - 1) : below;
}

template <int PASS>
GLOBAL void BOUNDS(PICK_THREADS, 1) pick(const __grid_constant__ Block b, int blocks) {
    __shared__ int upto[PICK_THREADS], key[TARGETS], room[32];
    State& s = *b.state;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, values = b.rows * b.columns;
    const uint32_t* const bits = reinterpret_cast<const uint32_t*>(b.m);
    // Zeros, which may be many, are counted together; those of salient columns count too.
    uint32_t zeros = 0;
    for (int e = blockIdx.x * PICK_THREADS + threadIdx.x; e < values; e += blocks * PICK_THREADS) {
        if (b.salient[e % b.columns]) continue;
        const uint32_t v = bits[e] & 0x7fffffffu;
        if (v)
            add<PASS>(s, v, 1);
        else
            zeros++;
    }
    zeros = warp_sum(zeros);
    if (blockIdx.x == 0 && threadIdx.x == 0) zeros += uint32_t(b.rows * int(s.count));
    if (lane == 0 && zeros) add<PASS>(s, 0, zeros);
    if (!last(s.arrived + 2 + PASS, blocks)) return;

    if (PASS == 0) {
        int own = 0;
#pragma unroll 8
        for (int i = 0; i < RUN; i++) own += int(s.first[threadIdx.x * RUN + i]);
        upto[threadIdx.x] = scanned(own, room);
        __syncthreads();
        if (threadIdx.x < TARGETS) {
            const int rank = wanted(threadIdx.x, values);
            int low = 0, high = PICK_THREADS - 1;
            while (low < high) {
                const int middle = (low + high) / 2;
                if (upto[middle] <= rank)
                    low = middle + 1;
                else
                    high = middle;
            }
            int before = low ? upto[low - 1] : 0, bin = low * RUN;
            while (before + int(s.first[bin]) <= rank) before += int(s.first[bin++]);
            key[threadIdx.x] = bin;
            s.rank[threadIdx.x] = rank - before;
            s.bits[threadIdx.x] = uint32_t(bin) << 16;
        }
    } else {
        for (int t = warp; t < TARGETS; t += PICK_THREADS / 32) {
            const int start = s.row[t] * DIGITS + lane * 8, rank = s.rank[t];
            const uint32_t* const counts = (PASS == 1 ? s.second : s.third) + start;
            int own = 0;
            for (int i = 0; i < 8; i++) own += int(counts[i]);
            const int sum = warp_scan(own);
            __syncwarp();  // all lanes have read the rank that one of them replaces
            if (sum <= rank || sum - own > rank) continue;
            int before = sum - own, i = 0;
            while (before + int(counts[i]) <= rank) before += int(counts[i++]);
            key[t] = start + i;
            s.rank[t] = rank - before;
            s.bits[t] |= uint32_t(lane * 8 + i) << (PASS == 1 ? 8 : 0);
        }
    }
    __syncthreads();
    if (PASS < 2) {
        if (threadIdx.x >= TARGETS) return;
        // Targets that begin alike share the counts of the first of them.
        int first = 0;
        while (key[first] != key[threadIdx.x]) first++;
        s.row[threadIdx.x] = first;
        (PASS == 0 ? s.row_of_bin : s.row_of_digit)[key[threadIdx.x]] = uint8_t(first);
    } else if (threadIdx.x < QUANTILES) {
        const int t = threadIdx.x;
        const float below = __uint_as_float(s.bits[2 * t]), above = __uint_as_float(s.bits[2 * t + 1]);
        const float fraction = __fdiv_rn(float(int64_t(10 + t) * (values - 1) % 100), 100.0f);
        s.thresholds[t] = __fadd_rn(below, __fmul_rn(__fsub_rn(above, below), fraction));
    }
}

template <int PASS>
int picked(const Block& b, int64_t stream) {
    const unsigned blocks = std::min<unsigned>(tiles_of(int64_t(b.rows) * b.columns, 4 * PICK_THREADS), PICK_BLOCKS);
    return LAUNCH(pick<PASS>, dim3(blocks), unsigned(PICK_THREADS), 0, stream, b, int(blocks));
}

}  // namespace
