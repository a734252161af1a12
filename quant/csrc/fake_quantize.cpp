// Rows x [R, n], each rounded to a grid of its own: the twin of quant/kernels/fake_quantize/reference.py, bit for bit.
// Plain C ABI. The operations of a value are those of quant/grids.py and quant/affine.py, in their order.

#include "exact.h"

namespace {

constexpr int64_t ROWS = 32;  // of a tile

struct Grid {
    float scale, zero, top, half;
};

struct Rows {
    const float* x;
    float clip;
    int64_t rows, width, bits;
    bool symmetric;
    float* out;           // values [R, n], or
    int8_t* codes;        // codes less `half` [R, n],
    float *scale, *zero;  // [R], zeros less `half`
};

// Of a row without NaN.
INLINE Grid grid_of(float low, float high, const Rows& r) {
    const float top = float((int64_t(1) << r.bits) - 1), half = float(int64_t(1) << (r.bits - 1));
    if (r.symmetric) {
        const float most = std::max(-low, high);
        return {most == 0 ? 1.0f : std::max(most, 1e-5f) / (half - 1), half, top, half};
    }
    if (low == high) low = std::min(low, 0.0f), high = std::max(high, 0.0f);
    const float scale = low == 0 && high == 0 ? 1.0f : std::clamp((high - low) / top, 1e-5f, 1e4f);
    const float ratio = std::clamp(-low / scale, -1e4f, 1e4f);
    return {scale, (ratio + ROUND) - ROUND, top, half};
}

INLINE Grid range(const Rows& r, const float* x) {
    const int64_t whole = r.width - r.width % LANES;
    Floats low = tail(x + whole, r.width - whole, x[0]), high = low;
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
    Grid g = grid_of(*std::min_element(lows, lows + LANES) * r.clip, *std::max_element(highs, highs + LANES) * r.clip, r);
    if (nan) g.scale = __builtin_nanf("");
    return g;
}

// A grid in every lane, and what it needs to round.
struct Lanes {
    Floats scale, zero, top, half, round = all(ROUND);

    INLINE explicit Lanes(const Grid& g) : scale(all(g.scale)), zero(all(g.zero)), top(all(g.top)), half(all(g.half)) {}

    INLINE Floats code(Floats x) const { return least(greatest(((x / scale + round) - round) + zero, Floats{}), top); }
    INLINE Floats rounded(Floats x) const { return (code(x) - zero) * scale; }
    INLINE void encode(Floats x, int8_t* to, int64_t count) const {
        const Ints whole = __builtin_convertvector(code(x) - half, Ints);
        for (int64_t l = 0; l < count; l++) to[l] = int8_t(whole[l]);
    }
};

VECTOR void tile(const Rows& r, int64_t t) {
    const int64_t whole = r.width - r.width % LANES, left = r.width - whole;
    for (int64_t row = t * ROWS; row < std::min(r.rows, (t + 1) * ROWS); row++) {
        const float* x = r.x + row * r.width;
        const Grid g = range(r, x);
        const Lanes own(g);
        if (r.codes != nullptr) {
            int8_t* codes = r.codes + row * r.width;
            r.scale[row] = g.scale, r.zero[row] = g.zero - g.half;
            for (int64_t i = 0; i < whole; i += LANES) own.encode(load(x + i), codes + i, LANES);
            own.encode(tail(x + whole, left, 0.0f), codes + whole, left);
        } else {
            float* out = r.out + row * r.width;
            for (int64_t i = 0; i < whole; i += LANES) {
                const Floats v = own.rounded(load(x + i));
                std::memcpy(out + i, &v, sizeof v);
            }
            const Floats v = own.rounded(tail(x + whole, left, 0.0f));
            std::memcpy(out + whole, &v, left * sizeof(float));
        }
    }
}

void run(const Rows& r, int64_t threads) {
    each((r.rows + ROWS - 1) / ROWS, 1, threads, [&](int64_t t) { tile(r, t); });
}

}  // namespace

extern "C" void bitgrid_fake_quantize(const float* x, float* out, const float* clip, int64_t rows, int64_t width, int64_t bits,
                                      int64_t symmetric, int64_t threads) {
    run({x, *clip, rows, width, bits, symmetric != 0, out, nullptr, nullptr, nullptr}, threads);
}

extern "C" void bitgrid_encode_rows(const float* x, int8_t* codes, float* scale, float* zero, const float* clip, int64_t rows,
                                    int64_t width, int64_t bits, int64_t symmetric, int64_t threads) {
    run({x, *clip, rows, width, bits, symmetric != 0, nullptr, codes, scale, zero}, threads);
}
