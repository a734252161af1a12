// A few rows of x [M, K] times a weight [N, K] of signs, transposed: out [M, N]. The twin of quant/kernels/binary_gemv/reference.py.
//
// Plain C ABI. words, tables and salient are laid out as `Packed` in quant/kernels/binary_gemv/__init__.py says; x and out are row after
// row.
//
// A row has eight values in a block of columns, four for plain and four for salient ones: they lie in one register, and two bits of a
// weight with its column's flag find its value. A row is added up in one order, whatever stands beside it: blocks by 8 lanes, the blocks,
// then the lanes.

#include "products.h"

namespace {

constexpr int ROWS = 8, VECTORS = 16;  // of a tile; of a unit of columns
constexpr int64_t RUN = 4;

struct Call {
    const uint32_t* words;
    const float* tables;
    const uint32_t* salient;
    int64_t units, blocks, block;  // block: vectors of one
    const float* x;
};

// As many vectors as CHUNK share their tables.
template <int CHUNK>
INLINE void sweep(const Call& c, int64_t t, float* sums) {
    const uint32_t* words = c.words + t * c.units * ROWS * LANES;
    const float* tables = c.tables + t * c.blocks * ROWS * LANES;
    const uint32_t* salient = c.salient;
    const float* x = c.x;
    Floats total[ROWS] = {};
    for (int64_t u = 0; u < c.units; u++, words += ROWS * LANES) {
        UNROLL for (int line = 0; line < ROWS * LANES / 16; line++) __builtin_prefetch(words + 8 * ROWS * LANES + 16 * line);
        for (int first = 0; first < VECTORS; first += CHUNK, salient += CHUNK * LANES, x += CHUNK * LANES) {
            const float* own = tables + std::min((u * VECTORS + first) / c.block, c.blocks - 1) * ROWS * LANES;
            UNROLL for (int r = 0; r < ROWS; r++) {
                const Floats table = load(own + r * LANES);
                Words word = load(words + r * LANES) >> uint32_t(2 * first);
                Floats part{};
                UNROLL for (int v = 0; v < CHUNK; v++) {
                    part += looked_up(table, (word & 3u) | load(salient + v * LANES)) * load(x + v * LANES);
                    word = word >> 2u;
                }
                total[r] += part;
            }
        }
    }
    for (int r = 0; r < ROWS; r++) sums[r] = sum(total[r]);
}

using Sweep = void (*)(const Call&, int64_t, float*);

template <int CHUNK>
void plain(const Call& c, int64_t t, float* sums) {
    sweep<CHUNK>(c, t, sums);
}
#if defined(FUSED)
template <int CHUNK>
FUSED void fused(const Call& c, int64_t t, float* sums) {
    sweep<CHUNK>(c, t, sums);
}
#endif

template <int CHUNK>
Sweep chosen() {
#if defined(FUSED)
    if (HAS_FUSED) return fused<CHUNK>;
#endif
    return plain<CHUNK>;
}

INLINE void decode(const Call& c, int64_t t, int64_t rows, int64_t columns, float* out) {
    for (int64_t r = 0; r < ROWS && t * ROWS + r < rows; r++) {
        float* to = out + (t * ROWS + r) * columns;
        for (int64_t v = 0; v * LANES < columns; v++) {
            const Words word = load(c.words + ((t * c.units + v / VECTORS) * ROWS + r) * LANES) >> uint32_t(2 * (v % VECTORS));
            const Floats table = load(c.tables + ((t * c.blocks + std::min(v / c.block, c.blocks - 1)) * ROWS + r) * LANES);
            const Floats value = looked_up(table, (word & 3u) | load(c.salient + v * LANES));
            std::memcpy(to + v * LANES, &value, std::min<int64_t>(LANES, columns - v * LANES) * sizeof(float));
        }
    }
}

void plain_decode(const Call& c, int64_t t, int64_t rows, int64_t columns, float* out) { decode(c, t, rows, columns, out); }
#if defined(FUSED)
FUSED void fused_decode(const Call& c, int64_t t, int64_t rows, int64_t columns, float* out) { decode(c, t, rows, columns, out); }
#endif

}  // namespace

// The weight [N, K] that the words stand for.
extern "C" void bitgrid_binary_values(const uint32_t* words, const float* tables, const uint32_t* salient, float* out, int64_t rows,
                                      int64_t columns, int64_t block, int64_t threads) {
    constexpr int64_t unit = VECTORS * LANES;
    const Call c{words, tables, salient, (columns + unit - 1) / unit, (columns + block - 1) / block, block / LANES, nullptr};
    auto one = plain_decode;
#if defined(FUSED)
    if (HAS_FUSED) one = fused_decode;
#endif
    each((rows + ROWS - 1) / ROWS, RUN, std::min(threads, rows * columns * 4 / LEAST), [&](int64_t t) { one(c, t, rows, columns, out); });
}

// block: columns of one, a multiple of 8.
extern "C" void bitgrid_binary_gemv(const uint32_t* words, const float* tables, const uint32_t* salient, const float* x, float* out,
                                    int64_t rows, int64_t columns, int64_t block, int64_t count, int64_t threads) {
    constexpr int64_t unit = VECTORS * LANES;
    const int64_t tiles = (rows + ROWS - 1) / ROWS, units = (columns + unit - 1) / unit;
    const int64_t vectors = block / LANES;
    const Sweep one = vectors % 16 == 0 ? chosen<16>() : vectors % 8 == 0 ? chosen<8>() : vectors % 4 == 0 ? chosen<4>() : chosen<1>();
    std::vector<float> padded(units * unit);
    for (int64_t m = 0; m < count; m++) {
        std::copy_n(x + m * columns, columns, padded.data());
        const Call c{words, tables, salient, units, (columns + block - 1) / block, vectors, padded.data()};
        each(tiles, RUN, std::min(threads, tiles * units * ROWS * LANES * 4 / LEAST), [&](int64_t t) {
            float sums[ROWS];
            one(c, t, sums);
            for (int64_t r = 0; r < ROWS && t * ROWS + r < rows; r++) out[m * rows + t * ROWS + r] = sums[r];
        });
    }
}
