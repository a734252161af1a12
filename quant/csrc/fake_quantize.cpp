// Rows x [R, n], each rounded to a grid of its own: the twin of quant/kernels/fake_quantize/reference.py, bit for bit.
// Plain C ABI. The operations of a value are those of quant/grids.py and quant/affine.py, in their order.

#include "products.h"

// Versions for wider vectors, chosen when the library is loaded: without multiply-add, since results are to be the same.
#if !defined(BITGRID_PLAIN) && defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define VECTOR __attribute__((target_clones("avx2", "default")))
#else
#define VECTOR
#endif
#if defined(__clang__)
#pragma clang fp contract(off)
#endif

namespace {

// Adding and taking away 1.5 · 2^23 rounds to a whole number, half to even. Beyond 2^22 it does not, where every code is clamped anyway.
constexpr float ROUND = 12582912.0f;
constexpr int64_t ROWS = 32;  // of a tile

INLINE Floats all(float v) { return v - Floats{}; }
// A NaN in `a` stays.
INLINE Floats least(Floats a, Floats b) { return b < a ? b : a; }
INLINE Floats greatest(Floats a, Floats b) { return b > a ? b : a; }

struct Grid {
    float scale, zero, top;
};

// Of finite limits, or infinite ones.
Grid grid_of(float low, float high, int64_t bits, bool symmetric) {
    const float top = float((int64_t(1) << bits) - 1);
    if (symmetric) {
        const float most = std::max(-low, high);
        const float half = float((int64_t(1) << (bits - 1)) - 1);
        return {most == 0 ? 1.0f : std::max(most, 1e-5f) / half, float(int64_t(1) << (bits - 1)), top};
    }
    if (low == high) low = std::min(low, 0.0f), high = std::max(high, 0.0f);
    const float scale = low == 0 && high == 0 ? 1.0f : std::clamp((high - low) / top, 1e-5f, 1e4f);
    const float ratio = std::clamp(-low / scale, -1e4f, 1e4f);
    return {scale, (ratio + ROUND) - ROUND, top};
}

// A grid in every lane, and what it needs to round.
struct Lanes {
    Floats scale, zero, top, round = all(ROUND);

    INLINE explicit Lanes(const Grid& g) : scale(all(g.scale)), zero(all(g.zero)), top(all(g.top)) {}

    INLINE Floats rounded(Floats x) const {
        const Floats code = ((x / scale + round) - round) + zero;
        return (least(greatest(code, Floats{}), top) - zero) * scale;
    }
};

struct Rows {
    const float* x;
    float* out;
    float clip;
    int64_t rows, width, bits;
    bool symmetric;
};

// `count` values, fewer than a vector has, `otherwise` after them.
INLINE Floats tail(const float* from, int64_t count, float otherwise) {
    Floats v = all(otherwise);
    std::memcpy(&v, from, count * sizeof(float));
    return v;
}

VECTOR void tile(const Rows& r, int64_t t) {
    const int64_t whole = r.width - r.width % LANES, left = r.width - whole;
    for (int64_t row = t * ROWS; row < std::min(r.rows, (t + 1) * ROWS); row++) {
        const float* x = r.x + row * r.width;
        float* out = r.out + row * r.width;
        Floats low = tail(x + whole, left, x[0]), high = low;
        Ints unordered = low != low;
        for (int64_t i = 0; i < whole; i += LANES) {
            const Floats v = load(x + i);
            low = least(low, v), high = greatest(high, v);
            unordered |= v != v;
        }
        float lows[LANES], highs[LANES];
        std::memcpy(lows, &low, sizeof low), std::memcpy(highs, &high, sizeof high);
        bool nan = false;
        for (int l = 0; l < LANES; l++) nan |= unordered[l] != 0;
        Grid g = grid_of(*std::min_element(lows, lows + LANES) * r.clip, *std::max_element(highs, highs + LANES) * r.clip, r.bits, r.symmetric);
        if (nan) g.scale = __builtin_nanf("");
        const Lanes own(g);
        for (int64_t i = 0; i < whole; i += LANES) {
            const Floats v = own.rounded(load(x + i));
            std::memcpy(out + i, &v, sizeof v);
        }
        const Floats v = own.rounded(tail(x + whole, left, 0.0f));
        std::memcpy(out + whole, &v, left * sizeof(float));
    }
}

}  // namespace

extern "C" void bitgrid_fake_quantize(const float* x, float* out, const float* clip, int64_t rows, int64_t width, int64_t bits,
                                      int64_t symmetric, int64_t threads) {
    const Rows r{x, out, *clip, rows, width, bits, symmetric != 0};
    each((rows + ROWS - 1) / ROWS, 1, threads, [&](int64_t t) { tile(r, t); });
}
