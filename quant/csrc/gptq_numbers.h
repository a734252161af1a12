// Arithmetic, and memory, of gptq_lanes.h: for a GPU, and for the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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
ON_LANES uint32_t bits_of(float x) {
#ifdef __CUDACC__
    return __float_as_uint(x);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
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
ON_LANES float float_of(uint32_t bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
#endif
}
// Whole number nearest to |x| <= 2^22, halves to even: 1.5 · 2^23 and more have no bits for a fraction. Its bits are WHOLE_BITS more.
constexpr uint32_t WHOLE_BITS = 0x4b400000u;
ON_LANES uint32_t whole_bits(float x) { return bits_of(plus(x, 12582912.0f)); }
ON_LANES float from_whole_bits(uint32_t bits) { return minus(float_of(bits), 12582912.0f); }
ON_LANES float nearest(float x) { return from_whole_bits(whole_bits(x)); }
// Byte i as a number.
ON_LANES float byte_of(uint32_t word, int i) {
#ifdef __CUDACC__
    return minus(float_of(__byte_perm(word, 0x4b000000u, 0x7540 + i)), 8388608.0f);
#else
    return float(word >> 8 * i & 255u);
#endif
}

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

// What has been made stays so: it is not made later, where it is used.
ON_LANES void pin(float& x) {
#ifdef __CUDACC__
    asm volatile("" : "+f"(x));
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
template <int N>
ON_LANES void near_some(Near at, float* x) {
    if (N == 2) near_two(at, x[0], x[1]);
    UNROLLED for (int c = 0; c + 4 <= N; c += 4) {
        const Four four = near_four(beside(at, c));
        UNROLLED for (int i = 0; i < 4; i++) x[c + i] = four.at[i];
    }
}
ON_LANES void near_put(Near at, const float* x) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}
ON_LANES void near_put_two(Near at, const float* x) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(x[0]), "f"(x[1]) : "memory");
}
ON_LANES uint32_t near_word(Near at) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at));
    return x;
}
template <int N>
ON_LANES void near_put_words(Near at, const uint32_t* x) {
    if (N == 4)
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x[0]), "r"(x[1]), "r"(x[N - 2]), "r"(x[N - 1]) : "memory");
    else if (N == 1)
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x[0]) : "memory");
    else
        asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x[0]), "r"(x[N - 1]) : "memory");
}
// The compiler moves no volatile instruction across, and nothing that makes x [n]. Never taken, which it does not know: the address is a
// multiple of 16.
ON_LANES void fence(Near at, int which, const float* x, int n) {
    if (at == uint32_t(16 * which + 2)) {
        UNROLLED for (int i = 0; i < n; i++) asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x[i]));
        asm volatile("exit;");
        __builtin_unreachable();
    }
}
#else
using Near = float*;
ON_LANES Near beside(Near base, int floats) { return base + floats; }
ON_LANES void near_two(Near at, float& a, float& b) { a = at[0], b = at[1]; }
ON_LANES Four near_four(Near at) { return {{at[0], at[1], at[2], at[3]}}; }
template <int N>
ON_LANES void near_some(Near at, float* x) {
    std::memcpy(x, at, N * sizeof(float));
}
ON_LANES void near_put(Near at, const float* x) { std::memcpy(at, x, 4 * sizeof(float)); }
ON_LANES void near_put_two(Near at, const float* x) { std::memcpy(at, x, 2 * sizeof(float)); }
ON_LANES uint32_t near_word(Near at) { return bits_of(*at); }
template <int N>
ON_LANES void near_put_words(Near at, const uint32_t* x) {
    std::memcpy(at, x, N * sizeof(float));
}
ON_LANES void fence(Near, int, const float*, int) {}
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
