// A few rows of x [M, K] times a weight [N, K] with a table of values for each row, transposed: added to out [M, N].
// The twin of quant/kernels/row_lut_gemv/reference.py.
//
// Plain C ABI. words and tables, these in float32, are laid out as `Packed` in quant/kernels/row_lut_gemv/__init__.py says; x and out are
// row after row.
//
// Lanes are columns: a row's table lies in one register, or two with 4 bits, in which the codes of eight columns find their weights at
// once, and all rows of x read these. A row is added up in one order, whatever stands beside it: 32 columns by 8 lanes, then these sums
// over a chunk of columns, then the lanes, then the chunks.

#include "products.h"

namespace {

constexpr int ROWS = 32, UNIT = 32, GROUPS = UNIT / LANES;
constexpr int64_t CHUNK = 32;  // units whose words, and x, stay in the first-level cache while all rows of a tile are gone through
constexpr int TOGETHER = 2;    // rows of the weight that share what is read of x

// Eight codes, the first in the lowest bits.
template <int BITS>
INLINE uint32_t group_of(const uint32_t* unit, int group) {
    const int at = group * LANES * BITS, word = at / 32, shift = at % 32;
    uint32_t codes = unit[word * ROWS] >> shift;
    if (shift + LANES * BITS > 32) codes |= unit[(word + 1) * ROWS] << (32 - shift);
    return codes;
}

template <int BITS>
INLINE Floats weights(const float* table, uint32_t codes) {
    constexpr uint32_t B = BITS;
    return decoded<BITS>(table, (Words{} + codes) >> Words{0, B, 2 * B, 3 * B, 4 * B, 5 * B, 6 * B, 7 * B});
}

// Rows r and r + 1 of a tile, units 0 to `count`, M rows of x `stride` apart: sums [M][2].
template <int BITS, int M>
INLINE void sweep(const uint32_t* words, const float* tables, const float* x, int64_t stride, int64_t count, float* sums) {
    Floats total[M][TOGETHER] = {};
    for (int64_t u = 0; u < count; u++, words += BITS * ROWS, x += UNIT) {
        Floats part[M][TOGETHER] = {};
        UNROLL for (int g = 0; g < GROUPS; g++) {
            Floats w[TOGETHER];
            UNROLL for (int r = 0; r < TOGETHER; r++) w[r] = weights<BITS>(tables + r * entries_of(BITS), group_of<BITS>(words + r, g));
            UNROLL for (int m = 0; m < M; m++) {
                const Floats given = load(x + m * stride + g * LANES);
                UNROLL for (int r = 0; r < TOGETHER; r++) part[m][r] += w[r] * given;
            }
        }
        UNROLL for (int m = 0; m < M; m++) {
            UNROLL for (int r = 0; r < TOGETHER; r++) total[m][r] += part[m][r];
        }
    }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < TOGETHER; r++) sums[m * TOGETHER + r] = sum(total[m][r]);
}

template <int BITS>
INLINE void row_of(const uint32_t* words, const float* table, int64_t units, float* out) {
    for (int64_t u = 0; u < units; u++, words += BITS * ROWS) {
        UNROLL for (int g = 0; g < GROUPS; g++) {
            const Floats w = weights<BITS>(table, group_of<BITS>(words, g));
            std::memcpy(out + u * UNIT + g * LANES, &w, sizeof w);
        }
    }
}

using Sweep = void (*)(const uint32_t*, const float*, const float*, int64_t, int64_t, float*);
using Row = void (*)(const uint32_t*, const float*, int64_t, float*);

template <int BITS, int M>
void plain(const uint32_t* words, const float* tables, const float* x, int64_t stride, int64_t count, float* sums) {
    sweep<BITS, M>(words, tables, x, stride, count, sums);
}
template <int BITS>
void plain_row(const uint32_t* words, const float* table, int64_t units, float* out) {
    row_of<BITS>(words, table, units, out);
}
#if defined(FUSED)
template <int BITS, int M>
FUSED void fused(const uint32_t* words, const float* tables, const float* x, int64_t stride, int64_t count, float* sums) {
    sweep<BITS, M>(words, tables, x, stride, count, sums);
}
template <int BITS>
FUSED void fused_row(const uint32_t* words, const float* table, int64_t units, float* out) {
    row_of<BITS>(words, table, units, out);
}
#endif

template <int BITS>
Sweep sweep_for(int64_t m) {
#if defined(FUSED)
    if (HAS_FUSED) return m == 1 ? fused<BITS, 1> : m == 2 ? fused<BITS, 2> : fused<BITS, 4>;
#endif
    return m == 1 ? plain<BITS, 1> : m == 2 ? plain<BITS, 2> : plain<BITS, 4>;
}

template <int BITS>
Row row_for() {
#if defined(FUSED)
    if (HAS_FUSED) return fused_row<BITS>;
#endif
    return plain_row<BITS>;
}

// A tile's tables [2^bits][32], row after row as they are looked up.
void spread(const float* tables, int64_t bits, float* to) {
    const int64_t entries = entries_of(int(bits)), own = int64_t(1) << bits;
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t e = 0; e < entries; e++) to[r * entries + e] = tables[(e & (own - 1)) * ROWS + r];
}

}  // namespace

extern "C" void bitgrid_row_lut_gemv(const uint32_t* words, const float* tables, const float* x, float* out, int64_t rows, int64_t k,
                                     int64_t bits, int64_t count, int64_t threads) {
    const int64_t units = (k + UNIT - 1) / UNIT, width = units * UNIT, tiles = (rows + ROWS - 1) / ROWS;
    std::vector<float> given(count * width);  // zeros beyond the last column
    for (int64_t m = 0; m < count; m++) std::copy(x + m * k, x + (m + 1) * k, given.begin() + m * width);
    each(tiles, 1, std::min(threads, tiles * units * bits * ROWS * 4 / LEAST), [&](int64_t t) {
        float table[ROWS * 16], sums[4 * TOGETHER];
        spread(tables + (t * ROWS << bits), bits, table);
        for (int64_t first = 0; first < units; first += CHUNK) {
            for (int64_t m = 0, some; m < count; m += some) {
                some = count - m >= 4 ? 4 : count - m >= 2 ? 2 : 1;
                const Sweep one = bits == 2 ? sweep_for<2>(some) : bits == 3 ? sweep_for<3>(some) : sweep_for<4>(some);
                const uint32_t* from = words + (t * units + first) * bits * ROWS;
                const float* by = given.data() + m * width + first * UNIT;
                for (int64_t r = 0; r < ROWS && t * ROWS + r < rows; r += TOGETHER) {
                    one(from + r, table + r * entries_of(int(bits)), by, width, std::min(CHUNK, units - first), sums);
                    for (int64_t i = 0; i < some * TOGETHER; i++) {
                        const int64_t row = t * ROWS + r + i % TOGETHER;
                        if (row < rows) out[(m + i / TOGETHER) * rows + row] += sums[i];
                    }
                }
            }
        }
    });
}

// The weight [N, K] itself.
extern "C" void bitgrid_row_lut_values(const uint32_t* words, const float* tables, float* out, int64_t rows, int64_t k, int64_t bits,
                                       int64_t threads) {
    const int64_t units = (k + UNIT - 1) / UNIT;
    const Row one = bits == 2 ? row_for<2>() : bits == 3 ? row_for<3>() : row_for<4>();
    each((rows + ROWS - 1) / ROWS, 1, std::min(threads, rows * k * 4 / LEAST), [&](int64_t t) {
        float table[ROWS * 16];
        spread(tables + (t * ROWS << bits), bits, table);
        std::vector<float> row(units * UNIT);
        for (int64_t r = 0; r < ROWS && t * ROWS + r < rows; r++) {
            one(words + t * units * bits * ROWS + r, table + r * entries_of(int(bits)), units, row.data());
            std::copy(row.begin(), row.begin() + k, out + (t * ROWS + r) * k);
        }
    });
}
