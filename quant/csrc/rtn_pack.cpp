// Groups of a weight, each rounded to a grid fitted to it: the twin of quant/kernels/rtn_pack/reference.py, bit for bit. Plain C ABI.

#include "grids.h"

namespace {

constexpr int64_t AT_ONCE = 4096;  // weights of a tile, about
constexpr int STEPS = 80;          // shrunk ranges of the search
constexpr float LEAST_VALUE = 1e-30f;

struct Groups {
    const float* x;  // [G, width]
    float *scale, *zero;  // [G]
    uint8_t* told;   // [G]: 1 not finite, 2 unfit for float16, 4 the search is too close to call
    uint8_t *codes, *stream;  // or null
    double* error;   // [G], or null
    int64_t grid, bits, width, groups;
    bool halves, search, fit, encode;
};

// x^2.4 = (x · x^-0.2)³, with the fifth root by four of Newton's steps: off by 2e-6 of itself at most.
INLINE Floats power(Floats x) {
    x = greatest(x, all(LEAST_VALUE));
    const Floats start = 1278266572.0f - __builtin_convertvector((Ints)x, Floats) * 0.2f;
    Floats y = (Floats)__builtin_convertvector(start, Ints);
    for (int i = 0; i < 4; i++) {
        const Floats square = y * y;
        y = y * (1.2f - 0.2f * (x * (square * square * y)));
    }
    const Floats root = x * y;
    return root * root * root;
}

template <Kind KIND>
INLINE double search_error(const Groups& g, const float* x, Affine affine) {
    const Lanes<KIND> own(affine, g.bits);
    const int64_t whole = g.width - g.width % LANES;
    double total = 0;
    for (int64_t start = 0; start < whole; start += 32 * LANES) {
        Floats part{};
        for (int64_t i = start; i < std::min(whole, start + 32 * LANES); i += LANES) {
            const Floats v = load(x + i);
            part += power(magnitude(own.value(own.code(v)) - v));
        }
        total += sum(part);
    }
    if (whole < g.width) {
        const Floats v = tail(x + whole, g.width - whole, x[0]);
        total += sum(first(power(magnitude(own.value(own.code(v)) - v)), g.width - whole));
    }
    return total;
}

// The range of least error. Torch adds up in float32 in an order of its own: where that may decide, `close` says so.
template <Kind KIND>
INLINE Affine searched(const Groups& g, const float* x, Range range, bool& close) {
    Affine made[STEPS];
    double error[STEPS];
    int best = 0;
    for (int i = 0; i < STEPS; i++) {
        const float p = float(1 - i / 100.0);
        made[i] = affine(g.grid, {p * range.low, p * range.high}, g.bits, g.halves);
        error[i] = search_error<KIND>(g, x, made[i]);
        close |= !std::isfinite(error[i]) || !(made[i].scale > 0);
        if (error[i] < error[best]) best = i;
    }
    // Sums of n numbers of one sign, each off by a unit, in any order; and what `power` and the sums here are off by.
    const double slack = (g.width + 8) * 0x1p-24 + 1e-5;
    const double bound = error[best] * (1 + slack) / (1 - slack);
    for (int i = 0; i < STEPS; i++)
        close |= error[i] <= bound && (made[i].scale != made[best].scale || made[i].zero != made[best].zero);
    close |= error[best] < LEAST_VALUE;
    return made[best];
}

INLINE Range range_of(const float* x, int64_t width, float& total) {
    const int64_t whole = width - width % LANES;
    Floats low = tail(x + whole, width - whole, x[0]), high = low, added = first(low, width - whole);
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats v = load(x + i);
        low = least(low, v), high = greatest(high, v), added += v;
    }
    float lows[LANES], highs[LANES];
    std::memcpy(lows, &low, sizeof low), std::memcpy(highs, &high, sizeof high);
    total = sum(added);
    return {*std::min_element(lows, lows + LANES), *std::max_element(highs, highs + LANES)};
}

template <Kind KIND>
INLINE double put(const Groups& g, const float* x, Affine affine, uint8_t* to) {
    const Lanes<KIND> own(affine, g.bits);
    double total = 0;
    for (int64_t i = 0; i < g.width; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, g.width - i);
        const Floats v = count == LANES ? load(x + i) : tail(x + i, count, 0.0f), code = own.code(v);
        const Bytes bytes = __builtin_convertvector(__builtin_convertvector(code, Ints), Bytes);
        std::memcpy(to + i, &bytes, count);
        if (g.error != nullptr) {
            const Floats off = first(own.value(code) - v, count);
            total += sum(off * off);
        }
    }
    return total;
}

template <Kind KIND>
INLINE void tile_of(const Groups& g, int64_t start, int64_t end, uint8_t* codes) {
    for (int64_t i = start; i < end; i++) {
        const float* x = g.x + i * g.width;
        if (g.fit) {
            float total;
            bool close = false;
            const Range range = range_of(x, g.width, total), wide = limits(g.grid, range.low, range.high);
            const bool broken = !std::isfinite(total);
            const Affine made = g.search && !broken ? searched<KIND>(g, x, wide, close) : affine(g.grid, wide, g.bits, g.halves);
            g.scale[i] = made.scale, g.zero[i] = made.zero;
            g.told[i] = uint8_t(broken | (g.halves && unfit(g.grid, made, range, g.bits)) << 1 | close << 2);
        }
        if (g.encode) {
            const double error = put<KIND>(g, x, {g.scale[i], g.zero[i]}, codes + (i - start) * g.width);
            if (g.error != nullptr) g.error[i] = error;
        }
    }
}

VECTOR void tile(const Groups& g, int64_t start, int64_t end, uint8_t* codes) {
    switch (kind_of(g.grid)) {
        case REAL:
            return tile_of<REAL>(g, start, end, codes);
        case MINIMUM:
            return tile_of<MINIMUM>(g, start, end, codes);
        default:
            return tile_of<WHOLE>(g, start, end, codes);
    }
}

}  // namespace

// fit: scales, zeros and `told` are made, with `search` of ranges of least error; else they are given. encode: codes, stream and error are.
extern "C" void bitgrid_rtn_pack(const float* x, float* scale, float* zero, uint8_t* told, uint8_t* codes, uint8_t* stream, double* error,
                                 int64_t grid, int64_t bits, int64_t width, int64_t groups, int64_t halves, int64_t search, int64_t fit,
                                 int64_t encode, int64_t threads) {
    const Groups g{x, scale, zero, told, codes, stream, error, grid, bits, width, groups, halves != 0, search != 0, fit != 0, encode != 0};
    // Of a multiple of eight groups, so that a tile's stream starts with a byte.
    const int64_t rows = 8 * std::max<int64_t>(1, AT_ONCE / (8 * width));
    each((groups + rows - 1) / rows, 1, threads, [&](int64_t t) {
        const int64_t start = t * rows, end = std::min(groups, start + rows), count = (end - start) * width;
        std::vector<uint8_t> own(encode && codes == nullptr ? count : 0);
        uint8_t* to = codes == nullptr ? own.data() : codes + start * width;
        tile(g, start, end, to);
        if (encode && stream != nullptr) pack(to, count, bits, stream + start * width / 8 * bits);
    });
}

namespace {

// One half-quadratic step of HQQ, where no error is left over when it is shrunk: `large` says of a group that one may be.
VECTOR void hqq_step(const float* x, Affine own, float* moved, float* size, uint8_t* large, float known, int64_t bits, int64_t width) {
    const Lanes<REAL> lanes(own, bits);
    Ints over{};
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, width - i);
        const Floats v = count == LANES ? load(x + i) : tail(x + i, count, x[i]), code = lanes.code(v);
        const Floats error = magnitude(v - lanes.value(code)), move = code - v / lanes.scale;
        over |= error > all(known);
        std::memcpy(moved + i, &move, count * sizeof(float)), std::memcpy(size + i, &error, count * sizeof(float));
    }
    bool any = false;
    for (int l = 0; l < LANES; l++) any |= over[l] != 0;
    *large = any;
}

}  // namespace

// Groups x, with scale and zero [G] ▸ codes less x / scale, and |x - x̂|, both like x. known: errors up to it are shrunk to 0.
extern "C" void bitgrid_hqq_step(const float* x, const float* scale, const float* zero, float* moved, float* size, uint8_t* large,
                                 const float* known, int64_t bits, int64_t width, int64_t groups, int64_t threads) {
    each(groups, std::max<int64_t>(1, AT_ONCE / width), threads, [&](int64_t g) {
        hqq_step(x + g * width, {scale[g], zero[g]}, moved + g * width, size + g * width, large + g, *known, bits, width);
    });
}
