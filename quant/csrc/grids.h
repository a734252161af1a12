// The grids of quant/grids.py and the codes of quant/affine.py, operation by operation: the same bits as torch makes.

#pragma once

#include <cmath>
#include <limits>

#include "exact.h"

namespace {

using Bytes __attribute__((vector_size(8))) = uint8_t;

enum Grid : int64_t { G_ASYM, G_SYM, AWQ_ASYM, OMNI, Q_SYM, HQQ, KIVI, ABSMAX };

INLINE Floats magnitude(Floats v) { return (Floats)((Ints)v & 0x7fffffff); }

// The first `count` lanes, 0 after them.
INLINE Floats first(Floats v, int64_t count) {
    Floats kept{};
    std::memcpy(&kept, &v, count * sizeof(float));
    return kept;
}

// To float16 and back.
inline float half(float v) {
    const float size = std::fabs(v);
    if (!(size < 65520.0f)) return size == size ? std::copysign(std::numeric_limits<float>::infinity(), v) : v;
    // Subnormal numbers are 2^-24 apart, which those from a half on are in float32.
    if (size < 6.103515625e-05f) return std::copysign((size + 0.5f) - 0.5f, v);
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits = (bits + 0xfff + (bits >> 13 & 1)) & ~uint32_t(0x1fff);
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

struct Range {
    float low, high;
};

struct Affine {
    float scale, zero;
};

// `Grid.limits` of the least and greatest of a group.
inline Range limits(int64_t grid, float low, float high) {
    const float most = std::max(-low, high);
    switch (grid) {
        case G_ASYM:
            low = std::min(low, 0.0f), high = std::max(high, 0.0f);
            return low == 0 && high == 0 ? Range{-1, 1} : Range{low, high};
        case G_SYM:
            return most == 0 ? Range{-1, 1} : Range{low < 0 ? -most : 0.0f, most};
        case Q_SYM:
        case ABSMAX:
            return {-most, most};
        default:
            return {low, high};
    }
}

inline float step(int64_t grid, float a, float b, float top, float half_top) {
    switch (grid) {
        case AWQ_ASYM:
            return std::max(b - a, 1e-5f) / top;
        case OMNI:
            return std::min(std::max((b - a) / top, 1e-5f), 1e4f);
        case Q_SYM:
            return b / half_top;
        case ABSMAX:
            return std::max(b, 1e-5f) / half_top;
        case HQQ:
            return b - a <= 1e-4f ? 1.0f : 1.0f / std::min((1.0f / (b - a)) * top, 2e4f);
        default:
            return (b - a) / top;
    }
}

// `affine_of`.
inline Affine affine(int64_t grid, Range r, int64_t bits, bool halves) {
    float a = r.low, b = r.high;
    const float top = float((1 << bits) - 1), middle = float(1 << (bits - 1));
    if (grid == OMNI && a == b) a = std::min(a, 0.0f), b = std::max(b, 0.0f);
    float scale = a == 0 && b == 0 ? 1.0f : step(grid, a, b, top, middle - 1);
    if (halves) scale = half(scale);
    switch (grid) {
        case G_ASYM:
        case AWQ_ASYM:
            return {scale, std::min(std::max(std::nearbyint(-a / scale), 0.0f), top)};
        case OMNI:
            return {scale, std::nearbyint(std::min(std::max(-a / scale, -1e4f), 1e4f))};
        case HQQ:
            return {scale, halves ? half(-a / scale) : -a / scale};
        case KIVI:
            return {scale, halves ? half(a) : a};
        default:
            return {scale, middle};
    }
}

// `unfit_float16` of a group with this least and greatest value.
inline bool unfit(int64_t grid, Affine g, Range r, int64_t bits) {
    bool right = std::isfinite(g.scale) && g.scale >= std::ldexp(1.0f, int(bits) - 24);
    const float size = std::fabs(g.zero);
    if (grid == KIVI) {
        right = right || (g.scale == 0 && r.low == r.high);
        return !(right && std::isfinite(g.zero) && (size <= 512 * g.scale || g.scale == 0));
    }
    return !(right && (grid != HQQ || size <= 512));
}

// A group's affine in every lane, and what it needs to round. REAL: zeros are real numbers of codes; MINIMUM: they are values.
enum Kind { WHOLE, REAL, MINIMUM };

INLINE Kind kind_of(int64_t grid) { return grid == HQQ ? REAL : grid == KIVI ? MINIMUM : WHOLE; }

template <Kind KIND>
struct Lanes {
    Floats scale, zero, top, round = all(ROUND);

    INLINE Lanes(Affine g, int64_t bits) : scale(all(g.scale)), zero(all(g.zero)), top(all(float((1 << bits) - 1))) {
        // A group of equal values has scale 0: its codes are 0.
        if (KIND == MINIMUM && g.scale == 0) top = Floats{}, divisor = all(1.0f);
        else divisor = scale;
    }

    INLINE Floats code(Floats v) const {
        if (KIND == WHOLE) return least(greatest(((v / divisor + round) - round) + zero, Floats{}), top);
        if (KIND == REAL) return least(greatest(((v / divisor + zero) + round) - round, Floats{}), top);
        return (least(greatest((v - zero) / divisor, Floats{}), top) + round) - round;
    }
    INLINE Floats value(Floats code) const { return KIND == MINIMUM ? code * scale + zero : (code - zero) * scale; }

   private:
    Floats divisor;
};

// Eight codes at a time as a stream of bits, the lowest first; `count` codes from a multiple of eight on.
inline void pack(const uint8_t* codes, int64_t count, int64_t bits, uint8_t* to) {
    for (int64_t i = 0; i < count; i += 8, to += bits) {
        const int64_t some = std::min<int64_t>(8, count - i);
        uint64_t word = 0;
        for (int64_t l = 0; l < some; l++) word |= uint64_t(codes[i + l]) << (bits * l);
        for (int64_t byte = 0; byte < (some * bits + 7) / 8; byte++) to[byte] = uint8_t(word >> (8 * byte));
    }
}

}  // namespace
