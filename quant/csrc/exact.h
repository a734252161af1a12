// Vectors whose results are to be the bits that torch makes: without multiply-add.

#pragma once

#include "products.h"

#define VECTOR VERSIONS("avx2")
#if defined(__clang__)
#pragma clang fp contract(off)
#endif

namespace {

// Adding and taking away 1.5 · 2^23 rounds to a whole number, half to even. Beyond 2^22 it does not, where every code is clamped anyway.
constexpr float ROUND = 12582912.0f;

INLINE Floats all(float v) { return v - Floats{}; }
// A NaN in `a` stays.
INLINE Floats least(Floats a, Floats b) { return b < a ? b : a; }
INLINE Floats greatest(Floats a, Floats b) { return b > a ? b : a; }

// `count` values, fewer than a vector has, `otherwise` after them.
INLINE Floats tail(const float* from, int64_t count, float otherwise) {
    Floats v = all(otherwise);
    std::memcpy(&v, from, count * sizeof(float));
    return v;
}

}  // namespace
