// The grids of quant/grids.py for one group in float32, operation by operation: the same bits as torch makes. Compiles for a GPU, too:
// no product is added to anything, so that nothing can be fused.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FOR_EITHER __host__ __device__ __forceinline__
#else
#define FOR_EITHER inline
#endif

namespace ranges {

enum Grid : int64_t { G_ASYM, G_SYM, AWQ_ASYM, OMNI, Q_SYM, HQQ, KIVI, ABSMAX };

struct Range {
    float low, high;
};

struct Affine {
    float scale, zero;
};

FOR_EITHER float lesser(float a, float b) { return b < a ? b : a; }
FOR_EITHER float greater(float a, float b) { return a < b ? b : a; }
FOR_EITHER bool finite(float v) { return fabsf(v) < INFINITY; }

// To float16 and back.
FOR_EITHER float half(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    const uint32_t sign = bits & 0x80000000u;
    const float size = fabsf(v);
    if (!(size < 65520.0f)) {
        bits = size == size ? sign | 0x7f800000u : bits;
    } else if (size < 6.103515625e-05f) {
        // Subnormal numbers are 2^-24 apart, which those from a half on are in float32.
        const float near = (size + 0.5f) - 0.5f;
        std::memcpy(&bits, &near, sizeof bits);
        bits |= sign;
    } else {
        bits = (bits + 0xfff + (bits >> 13 & 1)) & ~uint32_t(0x1fff);
    }
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

// `Grid.limits` of the least and greatest of a group.
FOR_EITHER Range limits(int64_t grid, float low, float high) {
    const float most = greater(-low, high);
    switch (grid) {
        case G_ASYM:
            low = lesser(low, 0.0f), high = greater(high, 0.0f);
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

FOR_EITHER float step(int64_t grid, float a, float b, float top, float half_top) {
    switch (grid) {
        case AWQ_ASYM:
            return greater(b - a, 1e-5f) / top;
        case OMNI:
            return lesser(greater((b - a) / top, 1e-5f), 1e4f);
        case Q_SYM:
            return b / half_top;
        case ABSMAX:
            return greater(b, 1e-5f) / half_top;
        case HQQ:
            return b - a <= 1e-4f ? 1.0f : 1.0f / lesser((1.0f / (b - a)) * top, 2e4f);
        default:
            return (b - a) / top;
    }
}

// `affine_of`.
FOR_EITHER Affine affine(int64_t grid, Range r, int64_t bits, bool halves) {
    float a = r.low, b = r.high;
    const float top = float((1 << bits) - 1), middle = float(1 << (bits - 1));
    if (grid == OMNI && a == b) a = lesser(a, 0.0f), b = greater(b, 0.0f);
    float scale = a == 0 && b == 0 ? 1.0f : step(grid, a, b, top, middle - 1);
    if (halves) scale = half(scale);
    switch (grid) {
        case G_ASYM:
        case AWQ_ASYM:
            return {scale, lesser(greater(nearbyintf(-a / scale), 0.0f), top)};
        case OMNI:
            return {scale, nearbyintf(lesser(greater(-a / scale, -1e4f), 1e4f))};
        case HQQ:
            return {scale, halves ? half(-a / scale) : -a / scale};
        case KIVI:
            return {scale, halves ? half(a) : a};
        default:
            return {scale, middle};
    }
}

// `unfit_float16` of a group with this least and greatest value.
FOR_EITHER bool unfit(int64_t grid, Affine g, Range r, int64_t bits) {
    bool right = finite(g.scale) && g.scale >= float(1 << bits) * 0x1p-24f;
    const float size = fabsf(g.zero);
    if (grid == KIVI) {
        right = right || (g.scale == 0 && r.low == r.high);
        return !(right && finite(g.zero) && (size <= 512 * g.scale || g.scale == 0));
    }
    return !(right && (grid != HQQ || size <= 512));
}

// How a launch of gptq_block finds a row's ranges: `Fits` of quant/kernels/gptq_block.
struct Fit {
    int32_t word;
    FOR_EITHER int32_t width() const { return word >> 8; }
    FOR_EITHER int64_t grid() const { return word >> 4 & 7; }
    FOR_EITHER bool halves() const { return word >> 3 & 1; }
    FOR_EITHER int64_t bits() const { return (word & 7) + 1; }

    // seen: 0 times each value, added up. odd: see `Fits`.
    FOR_EITHER Affine found(float low, float high, float seen, bool& odd) const {
        const Affine made = affine(grid(), limits(grid(), low, high), bits(), halves());
        odd = !(seen == 0) || (halves() && unfit(grid(), made, {low, high}, bits())) || ((grid() == HQQ || grid() == KIVI) && low == 0);
        return made;
    }
};

}  // namespace ranges
