// What the products with packed weights in CUDA C++ share. The phases of a kernel between its barriers are functions of a thread's number,
// so that a plain compiler makes them too: a test then runs the same source, one thread after another.

#pragma once

#include <cstdint>
#include <cstring>

#include "bits.h"

#if defined(__CUDACC__)
#define BOTH __device__ __forceinline__
#define ANYWHERE __host__ __device__
#define BY_A_WARP
#define UNROLL _Pragma("unroll")
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(n) PRAGMA(unroll n)
#define NO_UNROLL _Pragma("unroll 1")
#else
#define BOTH inline
#define ANYWHERE
#define BY_A_WARP __attribute__((noinline, no_sanitize("thread")))  // its threads together: no race, as here they come one by one
#define UNROLL
#define UNROLL_BY(n)
#define NO_UNROLL
#endif

namespace {

// x [M, K] as it is given, and the input scale [K] or null.
struct Given {
    const void* x;
    const float* scale;
    int64_t k, count;
    bool bfloat16;
};

// A block's place in the grid and its cluster.
struct Place {
    int64_t cluster, first_row;  // of x
    int rank, ranks;
};

BOTH int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Zero beyond the last row.
BOTH float read_x(const Given& from, int64_t row, int64_t column) {
    if (row >= from.count) return 0.0f;
    const int64_t at = row * from.k + column;
    const float x = from.bfloat16 ? float_of(uint32_t(static_cast<const uint16_t*>(from.x)[at]) << 16)
                                  : static_cast<const float*>(from.x)[at];
    return from.scale == nullptr ? x : x / from.scale[column];
}

BOTH uint16_t to_bfloat16(float v) {
    const uint32_t bits = bits_of(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

BOTH void write(void* out, int64_t at, float v, bool bfloat16) {
    if (bfloat16) {
        static_cast<uint16_t*>(out)[at] = to_bfloat16(v);
    } else {
        static_cast<float*>(out)[at] = v;
    }
}

// Four numbers in one load.
struct alignas(16) Four {
    float v[4];
};

// Words of the weight are read once.
BOTH uint32_t stream(const uint32_t* from) {
#if defined(__CUDA_ARCH__)
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
#else
    return *from;
#endif
}

BOTH void fetch(const void* from) {
#if defined(__CUDA_ARCH__)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

// What a warp does together: on the host the first thread of a warp is all its lanes.
#if defined(__CUDA_ARCH__)
constexpr int HELD = 1;  // lanes that a thread is
#else
constexpr int HELD = 32;
#endif
#define EACH_LANE for (int h = 0; h < HELD; h++)
#define LANE (HELD == 1 ? int(uint32_t(thread) % 32u) : h)

// Four bytes of a and b, numbered from 0 to 7, as the lowest four digits in base 16 of `of` say, none of which is 8 or more.
BOTH uint32_t picked(uint32_t a, uint32_t b, uint32_t of) {
#if defined(__CUDA_ARCH__)
    // __byte_perm masks the selector first, of which bit 3 is never set.
    uint32_t made;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(made) : "r"(a), "r"(b), "r"(of));
    return made;
#else
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t made = 0;
    for (int i = 0; i < 4; i++) made |= uint32_t(both >> 8 * (of >> 4 * i & 7u) & 255u) << 8 * i;
    return made;
#endif
}

// To a warp's sums of a product of 16 x 8, as lanes hold them, what `of(row, column)` gives: tensor cores on the host.
template <class Of>
BOTH void add_to_sums(int32_t (&sums)[HELD][4], const Of& of) {
    for (int i = 0; i < 16; i++)
        for (int n = 0; n < 8; n++) sums[i % 8 * 4 + n / 2][i / 8 * 2 + n % 2] += of(i, n);
}

template <int N>
struct alignas(4 * N) Line {
    uint32_t v[N];
};

// The number of a thread's warp, so that the compiler knows it to be one for all of its lanes.
BOTH int warp_of(int thread) {
#if defined(__CUDA_ARCH__)
    return __shfl_sync(~0u, thread / 32, 0);
#else
    return thread / 32;
#endif
}

// The same, of which the compiler keeps nothing that was made of it before: for want of registers.
BOTH int anew(int thread) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(thread));
#endif
    return thread;
}

BOTH void barrier() {
#if defined(__CUDA_ARCH__)
    __syncwarp();
#endif
}

BOTH void add(int32_t* to, int32_t v) {
#if defined(__CUDA_ARCH__)
    atomicAdd(to, v);
#else
    __atomic_fetch_add(to, v, __ATOMIC_RELAXED);
#endif
}

// Starts to copy to shared memory; `arrived`: all but those of the last LEFT calls of `sent`.
template <int N>
BOTH void send(uint32_t* to, const uint32_t* from) {
    static_assert(N == 4, "16 bytes");
#if defined(__CUDA_ARCH__)
    const uint32_t place = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
#else
    std::memcpy(to, from, 4 * N);
#endif
}

BOTH void sent() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int LEFT>
BOTH void arrived() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

}  // namespace
