// A few rows of x [M, K] times a weight [N, K] with a table of values for each column, transposed: added to out [M, N].
// The twin of quant/kernels/lut_gemv/reference.py.
//
// Plain C ABI. words, values and columns are those of a `Part` in quant/kernels/lut_gemv/__init__.py; x and out are row after row.
//
// Nothing is multiplied by a weight: a call multiplies each column's table by its x, and a weight's code then finds the product. Eight
// weights cost a lookup in registers, an addition and a shift. A row is added up in one order, whatever stands beside it.

#include "products.h"

namespace {

constexpr int VECTORS = 4, ROWS = VECTORS * LANES;
constexpr int PART = 8;               // words that are added up apart
constexpr int64_t HELD = 1 << 18;     // bytes of tables that stay in the cache while all rows are gone through
constexpr int64_t RUN = 2, SPARSE = 64;

constexpr int codes_of(int bits) { return 32 / bits; }

// Words `from` to `to` of the rows of tile `t`. tables: of all columns, from those of word `from` on.
template <int BITS>
INLINE void sweep(const uint32_t* words, const float* table, int64_t count, float* sums) {
    Floats total[VECTORS] = {};
    for (int64_t w = 0; w < count;) {
        Floats part[VECTORS] = {};
        for (const int64_t end = std::min(count, w + PART); w < end; w++, words += ROWS) {
            __builtin_prefetch(words + 16 * ROWS);
            __builtin_prefetch(words + 16 * ROWS + ROWS / 2);
            Words word[VECTORS];
            UNROLL for (int r = 0; r < VECTORS; r++) word[r] = load(words + r * LANES);
            UNROLL for (int j = 0; j < codes_of(BITS); j++, table += entries_of(BITS)) {
                UNROLL for (int r = 0; r < VECTORS; r++) {
                    part[r] += decoded<BITS>(table, word[r]);
                    word[r] = word[r] >> uint32_t(BITS);
                }
            }
        }
        UNROLL for (int r = 0; r < VECTORS; r++) total[r] += part[r];
    }
    std::memcpy(sums, total, sizeof total);
}

using Sweep = void (*)(const uint32_t*, const float*, int64_t, float*);

template <int BITS>
void plain(const uint32_t* words, const float* table, int64_t count, float* sums) {
    sweep<BITS>(words, table, count, sums);
}
#if defined(FUSED)
template <int BITS>
FUSED void fused(const uint32_t* words, const float* table, int64_t count, float* sums) {
    sweep<BITS>(words, table, count, sums);
}
#endif

template <int BITS>
Sweep chosen() {
#if defined(FUSED)
    if (HAS_FUSED) return fused<BITS>;
#endif
    return plain<BITS>;
}

}  // namespace

// n columns have a code of `bits`; column i is input columns[i] of K.
extern "C" void bitgrid_lut_gemv(const uint32_t* words, const float* values, const int64_t* columns, const float* x, float* out,
                                 int64_t rows, int64_t n, int64_t k, int64_t bits, int64_t count, int64_t threads) {
    const Sweep one = bits == 1 ? chosen<1>() : bits == 2 ? chosen<2>() : bits == 3 ? chosen<3>() : chosen<4>();
    const int64_t codes = codes_of(int(bits)), entries = entries_of(int(bits)), own = int64_t(1) << bits;
    const int64_t length = (n + codes - 1) / codes, tiles = (rows + ROWS - 1) / ROWS;
    const int64_t some = std::max<int64_t>(1, HELD / (4 * entries * codes));
    std::vector<float> tables(std::min(some, length) * codes * entries);
    for (int64_t m = 0; m < count; m++) {
        for (int64_t first = 0; first < length; first += some) {
            const int64_t last = std::min(length, first + some);
            for (int64_t c = first * codes; c < last * codes; c++) {
                float* table = tables.data() + (c - first * codes) * entries;
                const float by = c < n ? x[m * k + columns[c]] : 0.0f;
                for (int64_t e = 0; e < entries; e++) table[e] = c < n ? values[c * own + (e & (own - 1))] * by : 0.0f;
            }
            const int64_t bytes = tiles * (last - first) * ROWS * 4;
            each(tiles, RUN, std::min(threads, bytes / LEAST), [&](int64_t t) {
                float sums[ROWS];
                one(words + (t * length + first) * ROWS, tables.data(), last - first, sums);
                for (int64_t r = 0; r < ROWS && t * ROWS + r < rows; r++) out[m * rows + t * ROWS + r] += sums[r];
            });
        }
    }
}

// The n columns of the weight [N, K] that the words stand for. Where codes differ by more than a register of values holds, memory is as
// fast.
extern "C" void bitgrid_lut_values(const uint32_t* words, const float* values, const int64_t* columns, float* out, int64_t rows, int64_t n,
                                   int64_t k, int64_t bits, int64_t threads) {
    const int64_t codes = codes_of(int(bits)), own = int64_t(1) << bits, length = (n + codes - 1) / codes;
    each((rows + ROWS - 1) / ROWS, 1, std::min(threads, rows * n * 4 / LEAST), [&](int64_t t) {
        for (int64_t r = 0; r < ROWS && t * ROWS + r < rows; r++) {
            float* to = out + (t * ROWS + r) * k;
            for (int64_t w = 0; w < length; w++) {
                uint32_t word = words[(t * length + w) * ROWS + r];
                for (int64_t c = w * codes; c < std::min(n, (w + 1) * codes); c++, word >>= bits)
                    to[columns[c]] = values[c * own + (word & (own - 1))];
            }
        }
    });
}

// What single weights differ by from their column's value, row after row: row r has those from starts[r] on.
extern "C" void bitgrid_lut_apart(const int64_t* starts, const int32_t* columns, const float* differences, const float* x, float* out,
                                  int64_t rows, int64_t k, int64_t count, int64_t threads) {
    for (int64_t m = 0; m < count; m++) {
        each((rows + SPARSE - 1) / SPARSE, 1, std::min(threads, 8 * starts[rows] / LEAST), [&](int64_t t) {
            for (int64_t r = t * SPARSE; r < std::min(rows, (t + 1) * SPARSE); r++) {
                float total = 0.0f;
                for (int64_t i = starts[r]; i < starts[r + 1]; i++) total += differences[i] * x[m * k + columns[i]];
                out[m * rows + r] += total;
            }
        });
    }
}
