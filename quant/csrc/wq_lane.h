// One lane of a warp on the GPU: the policy of wq_fragments.h.

#pragma once

#include "early.h"
#include "wq_state.h"

namespace {

using namespace fragments;

struct Lane {
    template <class T>
    using Of = T;

    template <class T>
    static __device__ __forceinline__ T& at(T& v, int) {
        return v;
    }
    template <class F>
    __device__ __forceinline__ void lanes(const F& f) {
        f(int(threadIdx.x % LANES));
    }

    static __device__ __forceinline__ uint32_t shared(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }
    __device__ __forceinline__ void fetch16(uint8_t* to, const uint8_t* from, bool there) {
        asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(shared(to)), "l"(from),
                     "r"(int(there))
                     : "memory");
    }
    __device__ __forceinline__ void fetch8(uint8_t* to, const uint8_t* from) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared(to)), "l"(from) : "memory");
    }
    // Zeros where `inside` is false.
    __device__ __forceinline__ void fetch16_or_zeros(uint8_t* to, const uint8_t* from, bool there, bool inside) {
        asm volatile("{.reg .pred p; setp.ne.b32 p, %3, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %2;}" ::"r"(shared(to)), "l"(from),
                     "r"(inside ? 16 : 0), "r"(int(there))
                     : "memory");
    }
    __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    // All but the last `LEFT` groups of copies, those of the warp's other lanes too.
    template <int LEFT>
    __device__ __forceinline__ void arrived() {
        asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
        __syncwarp();
    }
    // Warps of team `number` wait for each other; what they have copied and stored is there for both.
    template <int C>
    __device__ __forceinline__ void team(int number) {
        if constexpr (C != 1) asm volatile("bar.sync %0, %1;" ::"r"(number + 1), "n"(C * LANES) : "memory");
    }
    // What the warp's lanes have stored is there for each other.
    __device__ __forceinline__ void together() { __syncwarp(); }

    static __device__ __forceinline__ void load16(uint32_t* to, const uint8_t* from) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
    static __device__ __forceinline__ void load8(uint32_t* to, const uint8_t* from) {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        to[0] = v.x, to[1] = v.y;
    }
    // Past the first cache: what a kernel before has just written may be read.
    static __device__ __forceinline__ void read16(uint32_t* to, const uint8_t* from) {
        const uint4 v = __ldcg(reinterpret_cast<const uint4*>(from));
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
    static __device__ __forceinline__ void read8(uint32_t* to, const uint8_t* from) {
        const uint2 v = __ldcg(reinterpret_cast<const uint2*>(from));
        to[0] = v.x, to[1] = v.y;
    }
    static __device__ __forceinline__ void store8(uint8_t* to, const uint32_t* v) {
        *reinterpret_cast<uint2*>(to) = make_uint2(v[0], v[1]);
    }
    static __device__ __forceinline__ void store16(uint8_t* to, const uint32_t* v) {
        *reinterpret_cast<uint4*>(to) = make_uint4(v[0], v[1], v[2], v[3]);
    }

    // The same in registers of their own: the compiler would reckon them anew at each use. That threadIdx.y and z are 0 it does not know.
    static __device__ __forceinline__ uint32_t kept(uint32_t v, int number) { return v ^ (number == 0 ? threadIdx.y : threadIdx.z); }
    static __device__ __forceinline__ const uint8_t* kept(const uint8_t* v) {
        asm volatile("" : "+l"(v));
        return v;
    }

    // `number` times `apart` bytes after `from`, in one instruction.
    static __device__ __forceinline__ const uint8_t* along(const uint8_t* from, int number, int apart) {
        const uint8_t* at;
        asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(at) : "r"(number), "r"(apart), "l"(from));
        return at;
    }

    static __device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
    static __device__ __forceinline__ float half(uint32_t bits) {
        float v;
        asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(v) : "r"(bits));
        return v;
    }
    static __device__ __forceinline__ uint32_t pack2(float low, float high) {
        uint32_t made;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(made) : "f"(high), "f"(low));
        return made;
    }
    static __device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
        uint32_t made;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(made) : "r"(a), "r"(b), "r"(c));
        return made;
    }
    // (word & mask) | base in one instruction, which the compiler makes two of.
    static __device__ __forceinline__ uint32_t chosen(uint32_t word, uint32_t mask, uint32_t base) {
        uint32_t made;
        asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(made) : "r"(word), "r"(mask), "r"(base));
        return made;
    }

    // Bytes of a and b, 0 to 7, as digits of `of` in base 16 say.
    static __device__ __forceinline__ uint32_t bytes(uint32_t a, uint32_t b, uint32_t of) { return __byte_perm(a, b, of); }
    static __device__ __forceinline__ uint32_t most2(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
    template <class S>
    static __device__ __forceinline__ void most_of_eight(S& s) {
        UNROLLED for (int i = 4; i > 0; i /= 2) s.most = max(s.most, __shfl_xor_sync(0xffffffffu, s.most, i));
    }
    template <class S>
    static __device__ __forceinline__ void sum_of_eight(S& s) {
        UNROLLED for (int i = 4; i > 0; i /= 2) s.all += __shfl_xor_sync(0xffffffffu, s.all, i);
    }
    template <class S, class F>
    static __device__ __forceinline__ void count(S& s, const F& of) {
        const auto o = of(s);
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(o.d[0]), "+r"(o.d[1]), "+r"(o.d[2]), "+r"(o.d[3])
            : "r"(o.a[0]), "r"(o.a[1]), "r"(o.a[2]), "r"(o.a[3]), "r"(o.b[0]), "r"(o.b[1]));
    }
    template <class S, class F>
    static __device__ __forceinline__ void multiply(S& s, const F& of) {
        const Operands o = of(s);
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(o.d[0]), "+f"(o.d[1]), "+f"(o.d[2]), "+f"(o.d[3])
            : "r"(o.a[0]), "r"(o.a[1]), "r"(o.a[2]), "r"(o.a[3]), "r"(o.b[0]), "r"(o.b[1]));
    }

    template <int KIND>
    static __device__ __forceinline__ void pack8(uint32_t* made, const float* v) {
        UNROLLED for (int i = 0; i < 4; i++) {
            if constexpr (KIND == 1) made[i] = pack2(v[2 * i], v[2 * i + 1]);
            if constexpr (KIND == 2) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(made[i]) : "f"(v[2 * i + 1]), "f"(v[2 * i]));
        }
    }
    static __device__ __forceinline__ void store_floats(uint8_t* out, const float* v) {
        float4* to = reinterpret_cast<float4*>(out);
        to[0] = make_float4(v[0], v[1], v[2], v[3]), to[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
    template <class S>
    static __device__ __forceinline__ void exchange(S& s) {
        const bool odd = threadIdx.x & 4;
        UNROLLED for (int i = 0; i < 2; i++) UNROLLED for (int j = 0; j < 4; j++) {
            const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? s.made[0][i][j] : s.made[1][i][j], 4);
            s.made[0][i][j] = odd ? got : s.made[0][i][j], s.made[1][i][j] = odd ? s.made[1][i][j] : got;
        }
    }
};

}  // namespace
