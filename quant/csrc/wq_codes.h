// Codes as lanes of a warp find them in words (layout: quant/kernels/wq_gemv/fragments.py), and what they become as operands of tensor
// cores. P, the policy: wq_fragments.h.

#pragma once

#include "bits.h"
#include "wq_call.h"

namespace fragments {

constexpr uint32_t ONES = 0x3f803f80u, BASE = 0x43004300u;  // pairs of 1 and of 128

// Where codes of the pairs 4 h to 4 h + 3 of a slice are in a significand: those of a product of 16 columns, at one place.
BOTH constexpr int place_of(int bits, int h) { return h == 0 || bits > 3 ? 0 : bits; }

// Two codes of `BITS` at bit `AT` + `SHIFT` of both halves of a word, as bfloat16: 128 + code · 2^AT.
template <class P, int BITS, int SHIFT, int AT>
BOTH uint32_t window(uint32_t word) {
    return P::chosen(word >> SHIFT, (((1u << BITS) - 1u) << AT) * 0x00010001u, BASE);
}

// Pair `I` of a step that a lane has, of 32: 128 + code · 2^AT, of 2, 3 and 4 bits.
template <class P, int BITS, int I>
BOTH uint32_t held(const uint32_t* w) {
    constexpr int h = I / 4 % 2, at = place_of(BITS, h);
    if constexpr (BITS == 2) {
        return window<P, 2, I % 4 * 4, at>(w[I / 8]);
    } else if constexpr (BITS == 3) {
        constexpr int u = I / 16 * 3, i = I / 8 % 2 * 4 + I % 4;
        if constexpr (i < 6) {
            return window<P, 3, i % 2 * 6, at>(w[u + i / 2]);
        } else if constexpr (h == 0) {
            return window<P, 3, 12, at>(w[u + i - 6]);
        } else if constexpr (i == 6) {
            return window<P, 3, 12 - at, at>(w[u + 2]);
        } else {
            uint32_t code = P::chosen(w[u] >> (15 - at), 0x00010001u << at, BASE);
            code = P::chosen(w[u + 1] >> (14 - at), 0x00020002u << at, code);
            return P::chosen(w[u + 2] >> (13 - at), 0x00040004u << at, code);
        }
    } else {
        static_assert(BITS == 4);
        return window<P, 4, I % 4 * 4, 0>(w[I / 4]);
    }
}

// 8 bits: 128 + the lower seven; and 128 or 256, as the exponent's lowest bit is the code's highest. Their sum is 256 + code.
template <class P, int I, int HIGH>
BOTH uint32_t eight(const uint32_t* w) {
    return P::chosen(w[I / 2] >> (I % 2 * 8), HIGH ? 0x00800080u : 0x007f007fu, BASE);
}

// The codes themselves.
template <class P, int BITS, int I>
BOTH uint32_t pair(const uint32_t* w) {
    if constexpr (BITS == 8) {
        return P::fma2(eight<P, I, 0>(w), ONES, P::fma2(eight<P, I, 1>(w), ONES, 0xc380c380u));
    } else {
        constexpr uint32_t at = place_of(BITS, I / 4 % 2), factor = (127 - at) << 7, less = 0x8000u | (127 + 7 - at) << 7;
        return P::fma2(held<P, BITS, I>(w), factor * 0x00010001u, less * 0x00010001u);
    }
}

// Scale and offset of the two rows of a lane, of float16 scale and zero, and of float32.
template <class P>
BOTH void half_ranges(float* scale, float* offset, const uint8_t* from) {
    uint32_t v[2];
    P::load8(v, from);
    UNROLLED for (int i = 0; i < 2; i++) {
        scale[i] = P::half(v[i] & 0xffffu);
        offset[i] = -(P::half(v[i] >> 16) * scale[i]);
    }
}

template <class P>
BOTH void ranges_of(float* scale, float* offset, const uint8_t* from) {
    uint32_t v[4];
    P::load16(v, from);
    UNROLLED for (int i = 0; i < 2; i++) scale[i] = float_of(v[2 * i]), offset[i] = float_of(v[2 * i + 1]);
}

template <class P, int BITS>
BOTH void load_codes(uint32_t* w, const uint8_t* from, int lane) {
    if constexpr (BITS == 3) {
        P::load16(w, from + 16 * lane);
        P::load8(w + 4, from + 512 + 8 * lane);
    } else {
        UNROLLED for (int l = 0; l < BITS / 2; l++) P::load16(w + 4 * l, from + 512 * l + 16 * lane);
    }
}

}  // namespace fragments
