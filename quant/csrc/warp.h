// What all lanes of a warp do together.

#pragma once

#include "cta.h"

namespace {

constexpr unsigned ALL = 0xffffffffu;

template <typename T>
DEVICE T warp_sum(T v) {
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(ALL, v, d);
    return v;
}

// Of each lane: the sum of its number and of those before it among `width` neighbours.
template <typename T>
DEVICE T warp_scan(T v, int width = 32) {
    const int lane = threadIdx.x % width;
    for (int d = 1; d < width; d *= 2) {
        const T before = __shfl_up_sync(ALL, v, d, width);
        if (lane >= d) v += before;
    }
    return v;
}

}  // namespace
