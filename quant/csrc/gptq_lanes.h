// The column loop of gptq_block for a row of the weight that several lanes of a warp share. Compiles for a GPU (gptq_block.cu) and,
// with the exchange between lanes emulated, for the host (gptq_lanes.cpp).
//
// A row's columns are taken PANEL at a time. First every lane takes the errors of all finished panels off its own PANEL / L columns
// ("pull": no exchange, many independent sums); then the lanes give each other their columns, once a panel; then each of them solves the
// panel, all with the same result, so that no exchange and no barrier stands between two columns. Each column's subtractions are made in
// the order of the plain loop, each operation rounded by itself: results are those of the plain loop, bit for bit.
//
// Divisions: with y = 1 / b rounded to nearest, q = a · y and r = a - q · b (fused), q + r · y (fused) is a / b rounded to nearest, as
// long as r is exact and nothing overflows. Near the middle between two floats q is off by half a unit (proof: Markstein 1990) or, only
// where a's mantissa is below b's, by up to 1.5 units less 2^-23 of one, where what is left of the error is smaller than the distance
// to the middle. Rows where a number is too small or too large for that are solved again with plain divisions (`redo`).
//
// Ranges that are found here (`Problem.words`) are found before all that, from the block as it is given: the loop reads them as if given.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ranges.h"

#ifdef __CUDACC__
#define ON_LANES __device__ __forceinline__
#define UNROLLED _Pragma("unroll")
#define BY_FOUR _Pragma("unroll 4")
#define BY_SIXTEEN _Pragma("unroll 16")
#define ROLLED _Pragma("unroll 1")
#else
#define ON_LANES inline
#define UNROLLED
#define BY_FOUR
#define BY_SIXTEEN
#define ROLLED
#endif

namespace gptq {

constexpr int PANEL = 32, MOST = 128;  // columns
constexpr int KEPT = MOST - PANEL;     // columns whose errors a later panel needs

constexpr int STRETCH = 8;  // columns whose instructions the compiler may mix

enum Kind : int { WHOLE = 0, REAL_ZERO = 1, MINIMUM = 2 };

struct Problem {
    const float *block, *upper;                      // [B, N], [B, B]
    float *scale, *zero;                             // [G, N]; written to where ranges are found here
    float *codes, *values, *errors;                  // [B, N]
    float* loss;                                     // [N], added to; may be null
    const float* tops;                               // [N], largest code of each row; null: top in all
    const int32_t* words;                            // [N], how each row's ranges are found (`ranges::Fit`); null: all are given
    int32_t* odd;                                    // added to where words are there
    int64_t upper_stride, scale_stride, zero_stride;  // floats between rows
    uint32_t columns, rows;                          // B, N; B * N < 2^30
    float top;
    int kind;
    int32_t group[MOST];  // row of scale and zero of each column
};

// ---- arithmetic, each operation rounded by itself ----

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
ON_LANES float inverse(float b) {
#ifdef __CUDACC__
    return __frcp_rn(b);
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
// Whole number nearest to |x| <= 2^22, halves to even: 1.5 · 2^23 and more have no bits for a fraction.
ON_LANES float nearest(float x) { return minus(plus(x, 12582912.0f), 12582912.0f); }

// a / b, y being 1 / b; see above.
ON_LANES float divided(float a, float b, float y) {
    const float q = times(a, y);
    return fused(fused(-q, b, a), y, q);
}

// A copy that the compiler knows nothing about: multiples of it for 32 columns are not kept in registers from panel to panel.
ON_LANES uint32_t opaque(uint32_t x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
    return x;
}
// A 32-bit number of bytes from an address that all lanes share is an operand of a load or store, without arithmetic.
ON_LANES float& beyond(float* base, uint32_t bytes) { return *reinterpret_cast<float*>(reinterpret_cast<char*>(base) + bytes); }
ON_LANES float beyond(const float* base, uint32_t bytes) {
    return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(base) + bytes);
}

ON_LANES void count(int32_t* odd) {
#ifdef __CUDACC__
    atomicAdd(odd, 1);
#else
    ++*odd;
#endif
}

// Without a branch: between branches the compiler orders instructions as it likes.
ON_LANES void put(float* base, uint32_t bytes, float x, bool real) {
#ifdef __CUDACC__
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.f32 [%1], %2; }" ::"r"(uint32_t(real)), "l"(&beyond(base, bytes)), "f"(x)
                 : "memory");
#else
    if (real) beyond(base, bytes) = x;
#endif
}

// ---- what the fast divisions take ----

// Scales and diagonals within these; differences of 0 or at least 2^-60; sums of squared errors below 2^90, so that a weight
// whose quotient overflows (|w| > 2^77) cannot be missed.
constexpr float LEAST_SCALE = 0x1p-50f, MOST_SCALE = 0x1p60f, LEAST_DIAGONAL = 0x1p-30f, MOST_DIAGONAL = 0x1p30f, MOST_LOSS = 0x1p90f;
constexpr float MOST_ZERO = 0x1p20f;             // of whole zeros: what `nearest` takes
constexpr uint32_t LEAST_BITS = 2u * 0x21800000u;  // of 2^-60, without the sign

struct alignas(8) Pivot {
    float diagonal, inverse;  // inverse NaN where the diagonal is out of range: then every error is
};

ON_LANES Pivot pivot(float diagonal) {
    const bool fits = fabsf(diagonal) >= LEAST_DIAGONAL && fabsf(diagonal) <= MOST_DIAGONAL;
    return {diagonal, fits ? inverse(diagonal) : NAN};
}

struct alignas(16) Four {
    float at[4];
};

// The factor's panels one after another: panel p is rows 0 .. 32 p + 31 of its 32 columns.
ON_LANES constexpr int panel_start(int panel) { return PANEL * PANEL * (panel * (panel + 1) / 2); }
constexpr int FACTOR = PANEL * PANEL * ((MOST / PANEL) * (MOST / PANEL + 1) / 2);

struct Shared {
    const float* factor;  // [FACTOR], 16 bytes aligned; 0 beyond B
    const Pivot* pivots;  // [MOST]; beyond B with inverse 0, so that errors are 0 there
};

struct Range {
    float scale, inverse, zero;
};

// One of L lanes of a row. PLAIN: whole zeros, one group for each panel. STRIDE: between a row's errors in shared memory.
template <int L, bool PLAIN, int STRIDE>
struct Lane {
    static constexpr int OWN = PANEL / L;
    float x[PANEL], own[OWN], next[OWN];
    float scales[PLAIN ? 1 : PANEL], zeros[PLAIN ? 1 : PANEL];
    float loss, top;
    uint32_t low;  // least |w - q| but 0, as the float's bits without the sign, less 1
    uint32_t row, part;
    bool alive;     // false beyond the last row: such lanes do what the last row's do, and store nothing
    float* errors;  // [KEPT], STRIDE apart

    ON_LANES void begin(const Problem& p, uint32_t given_row, uint32_t given_part, float* given_errors) {
        alive = given_row < p.rows;
        row = alive ? given_row : p.rows - 1;
        part = given_part, errors = given_errors;
        loss = 0.0f, low = 0xffffffffu;
        top = p.tops ? p.tops[row] : p.top;
        fetch(p, 0);
    }

    // Scales and zeros of a row's groups, which its lanes share. Another lane's may be read after they have met. Before `begin`, so that
    // no registers hold columns meanwhile.
    ON_LANES static void find(const Problem& p, uint32_t row, uint32_t part) {
        const ranges::Fit fit{row < p.rows ? p.words[row] : 0};
        const uint32_t width = fit.width();
        if (!width) return;
        ROLLED for (uint32_t first = part * width; first < p.columns; first += L * width) {
            const float* from = p.block + (first * p.rows + row);
            float low = INFINITY, high = -INFINITY, seen = 0.0f;
            BY_SIXTEEN for (uint32_t c = 0; c < width; c++, from += p.rows) {
                const float w = *from;
                low = fminf(low, w), high = fmaxf(high, w);
                seen = plus(seen, times(w, 0.0f));
            }
            bool odd;
            const ranges::Affine made = fit.found(low, high, seen, odd);
            if (odd) count(p.odd);
            ROLLED for (uint32_t j = first; j < first + width; j++) {
                const int32_t g = p.group[j];
                if (j != first && g == p.group[j - 1]) continue;
                p.scale[g * p.scale_stride + row] = made.scale, p.zero[g * p.zero_stride + row] = made.zero;
            }
        }
    }

    ON_LANES void fetch(const Problem& p, uint32_t first) {
        const uint32_t column = first + part * OWN, step = opaque(4 * p.rows);
        const int real = int(p.columns) - int(column);
        uint32_t at = opaque(4 * (column * p.rows + row));
        UNROLLED for (int c = 0; c < OWN; c++, at += step) next[c] = c < real ? beyond(p.block, at) : 0.0f;
    }

    // Loads that the pull hides.
    ON_LANES void start(const Problem& p, int panel) {
        const uint32_t first = panel * PANEL;
        UNROLLED for (int c = 0; c < OWN; c++) own[c] = next[c];
        UNROLLED for (int c = 0; c < (PLAIN ? 1 : PANEL); c++) {
            const bool real = first + c < p.columns;
            scales[c] = real ? p.scale[p.group[first + c] * p.scale_stride + row] : 1.0f;
            zeros[c] = real ? p.zero[p.group[first + c] * p.zero_stride + row] : 0.0f;
        }
        if (first + PANEL < p.columns) fetch(p, first + PANEL);
    }

    ON_LANES void pull(const Shared& s, int panel) {
        const float *u = s.factor + panel_start(panel) + part * OWN, *e = errors;
        BY_FOUR for (int i = 0; i < panel * PANEL; i++, u += PANEL, e += STRIDE) {
            const float error = *e;
            UNROLLED for (int c = 0; c < OWN; c += 4) {
                const Four f = *reinterpret_cast<const Four*>(u + c);
                UNROLLED for (int d = 0; d < 4; d++) own[c + d] = minus(own[c + d], times(error, f.at[d]));
            }
        }
    }

    ON_LANES Range range(float scale, float zero, int kind) {
        bool fits = fabsf(scale) >= LEAST_SCALE && fabsf(scale) <= MOST_SCALE;
        if (kind == WHOLE) fits &= fabsf(zero) <= MOST_ZERO && zero == nearest(zero);
        // A group of equal values has scale 0; its minimum alone is exact: 0 steps.
        const bool flat = kind == MINIMUM && scale == 0.0f;
        if (!fits && !flat) low = 0;
        return {scale, flat ? 0.0f : inverse(scale), zero};
    }

    // All columns of the panel, in x.
    ON_LANES void round(const Problem& p, const Shared& s, int panel) {
        const int first = panel * PANEL;
        const float* u = s.factor + panel_start(panel) + first * PANEL;
        const int real = alive ? int(p.columns) - first : 0;
        const bool needed = first < KEPT && part == 0;
        const uint32_t step = opaque(4 * p.rows);
        uint32_t at = opaque(4 * (first * p.rows + row));
        Range own_range{};
        float least = 0.0f, most = top;
        if (PLAIN) {
            own_range = range(scales[0], zeros[0], WHOLE);
            least = -own_range.zero, most = top - own_range.zero;
        }
        UNROLLED for (int c = 0; c < PANEL; c++, at += step, u += PANEL) {
            const Pivot pivot = s.pivots[first + c];
            float code, value;
            if (PLAIN) {
                // Cut before rounding: the same, as its ends are whole.
                const float whole = nearest(limited(divided(x[c], own_range.scale, own_range.inverse), least, most));
                code = plus(whole, own_range.zero);
                value = times(whole, own_range.scale);
            } else {
                // One form for all kinds: what a kind does not have is 0, and adding 0 is exact.
                const Range r = range(scales[c], zeros[c], p.kind);
                const float whole_zero = p.kind == WHOLE ? r.zero : 0.0f, real_zero = p.kind == REAL_ZERO ? r.zero : 0.0f;
                const float minimum = p.kind == MINIMUM ? r.zero : 0.0f;
                const float steps = plus(divided(minus(x[c], minimum), r.scale, r.inverse), real_zero);
                const float whole = nearest(limited(steps, -whole_zero, top - whole_zero));
                code = plus(whole, whole_zero);
                value = plus(times(minus(whole, real_zero), r.scale), minimum);
            }
            const float missed = minus(x[c], value);
            const uint32_t size = 2u * bits_of(missed) - 1u;
            low = size < low ? size : low;
            const float error = divided(missed, pivot.diagonal, pivot.inverse);
            loss = fused(error, error, loss);
            if (needed) errors[(first + c) * STRIDE] = error;
            store(p, at, c < real, c, code, value, error);
            UNROLLED for (int d = (c + 1) / 4 * 4; d < PANEL; d += 4) {
                const Four f = *reinterpret_cast<const Four*>(u + d);
                UNROLLED for (int i = 0; i < 4; i++)
                    if (d + i > c) x[d + i] = minus(x[d + i], times(error, f.at[i]));
            }
            // The row is solved again anyway. Rare: the branch is there to keep what follows behind it. Else the compiler loads so much
            // early that it has no registers for what was fetched from global memory.
            if (PLAIN && c % STRETCH == STRETCH - 1 && low == 0) return;
        }
    }

    // The lanes of a row share the stores.
    ON_LANES void store(const Problem& p, uint32_t at, bool real, int c, float code, float value, float error) {
        if (L == 1) {
            put(p.codes, at, code, real);
            put(p.values, at, value, real);
            put(p.errors, at, error, real);
        } else if (L == 2) {
            put(part ? p.values : p.codes, at, part ? value : code, real);
            put(p.errors, at, error, real && part == (c & 1));
        } else {
            put(part == 0 ? p.codes : part == 1 ? p.values : p.errors, at, part == 0 ? code : part == 1 ? value : error, real && part < 3);
        }
    }

    ON_LANES void finish(const Problem& p) {
        if (!alive || part) return;
        if (low < LEAST_BITS - 1u || !(loss < MOST_LOSS)) redo(p);
        if (p.loss) p.loss[row] = plus(p.loss[row], loss);
    }

    // The row once more, with divisions for any number.
    ON_LANES void redo(const Problem& p) {
        loss = 0.0f;
        ROLLED for (uint32_t j = 0; j < p.columns; j++) {
            const uint32_t at = j * p.rows + row;
            float w = p.block[at];
            ROLLED for (uint32_t i = 0; i < j; i++) w = minus(w, times(p.errors[i * p.rows + row], p.upper[i * p.upper_stride + j]));
            const float scale = p.scale[p.group[j] * p.scale_stride + row], zero = p.zero[p.group[j] * p.zero_stride + row];
            float code, value;
            if (p.kind == MINIMUM) {
                code = scale == 0.0f ? 0.0f : over(minus(w, zero), scale);
                code = rintf(code < 0.0f ? 0.0f : code > top ? top : code);
                value = plus(times(code, scale), zero);
            } else {
                code = over(w, scale);
                code = p.kind == REAL_ZERO ? rintf(plus(code, zero)) : plus(rintf(code), zero);
                code = code < 0.0f ? 0.0f : code > top ? top : code;
                value = times(minus(code, zero), scale);
            }
            const float error = over(minus(w, value), p.upper[j * p.upper_stride + j]);
            loss = fused(error, error, loss);
            p.codes[at] = code, p.values[at] = value, p.errors[at] = error;
        }
    }
};

// `Lanes` says how the lanes of a row run and exchange: `each(f)` is f of every lane, `share` gives all of them all own columns.
// `ready(panel)` returns when that panel of the factor is in shared memory.
template <class Lanes, class Ready>
ON_LANES void sweep(Lanes& lanes, const Problem& p, const Shared& s, Ready ready) {
    const int panels = (p.columns + PANEL - 1) / PANEL;
    ROLLED for (int panel = 0; panel < panels; panel++) {
        lanes.each([&](auto& lane) { lane.start(p, panel); });
        ready(panel);
        lanes.each([&](auto& lane) { lane.pull(s, panel); });
        lanes.share();
        lanes.each([&](auto& lane) { lane.round(p, s, panel); });
    }
    lanes.each([&](auto& lane) { lane.finish(p); });
}

}  // namespace gptq
