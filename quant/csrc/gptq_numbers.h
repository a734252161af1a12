// Arithmetic, and memory, of gptq_lanes.h: for a GPU, and for the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "bits.h"

#ifdef __CUDACC__
#define ON_LANES __device__ __forceinline__
#define UNROLLED _Pragma("unroll")
#define BY_SIXTEEN _Pragma("unroll 16")
#define ROLLED _Pragma("unroll 1")
#else
#define ON_LANES inline
#define UNROLLED
#define BY_SIXTEEN
#define ROLLED
#endif

namespace gptq {

// ---- arithmetic, each operation rounded by itself where it does not say otherwise ----

ON_LANES float times(float a, float b) {
#ifdef __CUDACC__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}
ON_LANES float plus(float a, float b) {
#ifdef __CUDACC__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}
ON_LANES float minus(float a, float b) {
#ifdef __CUDACC__
    return __fsub_rn(a, b);
#else
    return a - b;
#endif
}
ON_LANES float over(float a, float b) {
#ifdef __CUDACC__
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}
// 1 / b, of numbers that are neither too large nor too small for it (`LEAST_SCALE` and the like).
ON_LANES float inverse(float b) {
#ifdef __CUDACC__
    // As __frcp_rn does, without its branch to what takes the others.
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
    return __fmaf_rn(y, -__fmaf_rn(y, b, -1.0f), y);
#else
    return 1.0f / b;
#endif
}
ON_LANES float fused(float a, float b, float c) {
#ifdef __CUDACC__
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
}
// `low` for NaN.
ON_LANES float limited(float x, float low, float high) {
#ifdef __CUDACC__
    return fminf(fmaxf(x, low), high);
#else
    x = x > low ? x : low;
    return x < high ? x : high;
#endif
}
// Whole number nearest to |x| <= 2^22, halves to even: 1.5 · 2^23 and more have no bits for a fraction.
ON_LANES float nearest(float x) { return minus(plus(x, 12582912.0f), 12582912.0f); }

// Plus this, the last byte of a whole number in 0 .. 255 is that of the float.
constexpr float BYTES = 0x1p23f;

// x - e · u, rounded once: half the instructions of all updates.
ON_LANES float less(float x, float e, float u) { return fused(-e, u, x); }

// a / b, y being 1 / b; see gptq_lanes.h.
ON_LANES float divided(float a, float b, float y) {
    const float q = times(a, y);
    return fused(fused(-q, b, a), y, q);
}

ON_LANES void count(int32_t* odd) {
#ifdef __CUDACC__
    atomicAdd(odd, 1);
#else
    ++*odd;
#endif
}

// What a warp's lanes wrote before comes before what they do next.
ON_LANES void together() {
#ifdef __CUDACC__
    __syncwarp();
#endif
}

// Whether to load what may not be used: a GPU does, without a branch. Tests that look for races want what is used alone.
ON_LANES constexpr bool ahead([[maybe_unused]] bool used) {
#if defined(__CUDACC__) && !defined(BITGRID_LOADS_USED)
    return true;
#else
    return used;
#endif
}

// A copy that the compiler has to keep: else it makes addresses anew again and again, from constants that take long to read.
ON_LANES uint32_t settled(uint32_t x) {
#ifdef __CUDACC__
    uint32_t made;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(made) : "r"(x), "r"(threadIdx.x));
    return made;
#else
    return x;
#endif
}
ON_LANES float* settled(float* x) {
#ifdef __CUDACC__
    const uint64_t bits = reinterpret_cast<uint64_t>(x);
    return reinterpret_cast<float*>(uint64_t(settled(uint32_t(bits >> 32))) << 32 | settled(uint32_t(bits)));
#else
    return x;
#endif
}

// What has been made stays so: it is not made later, where it is used.
ON_LANES void pin(float& x) {
#ifdef __CUDACC__
    asm volatile("" : "+f"(x));
#endif
}

// The compiler moves no instruction across. Never taken, which it does not know: `low` is 0 or odd.
ON_LANES void fence(uint32_t low) {
#ifdef __CUDACC__
    if (low == 2u) {
        asm volatile("exit;");
        __builtin_unreachable();
    }
#endif
}
// And `loaded`, which is not this NaN, has come before.
ON_LANES void fence(uint32_t low, float loaded) {
#ifdef __CUDACC__
    if (low == 2u && bits_of(loaded) == 0x7fedcba9u) {
        asm volatile("exit;");
        __builtin_unreachable();
    }
#endif
}

// ---- memory, in the order in which it is written here: the compiler neither delays loads nor makes addresses anew ----

struct alignas(16) Four {
    float at[4];
};

#ifdef __CUDACC__
using Near = uint32_t;  // an address in shared memory
ON_LANES Near beside(Near base, int floats) { return base + 4 * floats; }
ON_LANES void near_two(Near at, float& a, float& b) { asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "r"(at)); }
ON_LANES Four near_four(Near at) {
    Four x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.at[0]), "=f"(x.at[1]), "=f"(x.at[2]), "=f"(x.at[3]) : "r"(at));
    return x;
}
ON_LANES void near_put(Near at, const float* x) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}
#else
using Near = float*;
ON_LANES Near beside(Near base, int floats) { return base + floats; }
ON_LANES void near_two(Near at, float& a, float& b) { a = at[0], b = at[1]; }
ON_LANES Four near_four(Near at) { return {{at[0], at[1], at[2], at[3]}}; }
ON_LANES void near_put(Near at, const float* x) { std::memcpy(at, x, 4 * sizeof(float)); }
#endif

// The next column's index, from the one before: not each from the first, which takes more.
ON_LANES void advance(uint32_t& at, uint32_t rows) {
#ifdef __CUDACC__
    asm("add.u32 %0, %0, %1;" : "+r"(at) : "r"(rows));
#else
    at += rows;
#endif
}

// Without a branch, and without "memory": what is stored is read by `redo` alone.
template <bool ALWAYS>
ON_LANES void put(float* to, float x, bool real) {
#ifdef __CUDACC__
    if (ALWAYS)
        asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(x));
    else
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.f32 [%1], %2; }" ::"r"(uint32_t(real)), "l"(to), "f"(x));
#else
    if (ALWAYS || real) *to = x;
#endif
}
// The last byte of `x`, a float's bits.
template <bool ALWAYS>
ON_LANES void put_byte(uint8_t* to, float x, bool real) {
#ifdef __CUDACC__
    if (ALWAYS)
        asm volatile("st.global.u8 [%0], %1;" ::"l"(to), "r"(bits_of(x)));
    else
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.u8 [%1], %2; }" ::"r"(uint32_t(real)), "l"(to), "r"(bits_of(x)));
#else
    if (ALWAYS || real) *to = uint8_t(bits_of(x));
#endif
}
// Two beside each other, 2 bytes aligned.
ON_LANES void put_bytes(uint8_t* to, float x, float y) {
#ifdef __CUDACC__
    asm volatile("{ .reg .b32 a; prmt.b32 a, %1, %2, 0x0040; st.global.u16 [%0], a; }" ::"l"(to), "r"(bits_of(x)), "r"(bits_of(y)));
#else
    to[0] = uint8_t(bits_of(x)), to[1] = uint8_t(bits_of(y));
#endif
}
// Two beside each other, 8 bytes aligned.
ON_LANES void put_two(float* to, float x, float y) {
#ifdef __CUDACC__
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y));
#else
    to[0] = x, to[1] = y;
#endif
}
// What is there, or 0.
ON_LANES float get(const float* from, bool real) {
#ifdef __CUDACC__
    float x = 0.0f;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p ld.global.f32 %0, [%2]; }" : "+f"(x) : "r"(uint32_t(real)), "l"(from));
    return x;
#else
    return real ? *from : 0.0f;
#endif
}

}  // namespace gptq
