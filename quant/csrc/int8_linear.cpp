// Sums of products of codes: a [M, K] times w [N, K], transposed: out [M, N], exact in 32 bits.
//
// Plain C ABI; everything is row after row. Pairs of products are added up in one instruction, from codes widened to 16 bits: those of a
// once a call, those of w where they are read. A thread takes a tile of rows of w and goes through a chunk of columns at a time, so that
// the chunk's part of both stays in the caches.

#include "products.h"

#if defined(FUSED)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t TILE = 32, ROWS = 4, CHUNK = 1024, STEP = 16;  // rows of w, of them at once; columns, of them at once

struct Call {
    const int16_t* a;  // [count, stride], zeros from column `columns` on
    const int8_t* w;
    int32_t* out;
    int64_t rows, columns, count, stride;
};

// One part of the sums of M rows of a and ROWS rows of w, columns `first` to `last`.
template <int M>
INLINE void plain_part(const int16_t* const* a, const int8_t* const* w, int64_t first, int64_t last, int32_t (*sums)[M]) {
    for (int r = 0; r < ROWS; r++)
        for (int m = 0; m < M; m++) {
            int32_t total = 0;
            for (int64_t k = first; k < last; k++) total += int32_t(a[m][k]) * int32_t(w[r][k]);
            sums[r][m] += total;
        }
}

#if defined(FUSED)
template <int M>
FUSED inline void fused_part(const int16_t* const* a, const int8_t* const* w, int64_t first, int64_t last, int32_t (*sums)[M]) {
    __m256i total[ROWS][M];
    for (int r = 0; r < ROWS; r++)
        for (int m = 0; m < M; m++) total[r][m] = _mm256_setzero_si256();
    int64_t k = first;
    for (; k + STEP <= last; k += STEP) {
        __m256i given[M];
        for (int m = 0; m < M; m++) given[m] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a[m] + k));
        for (int r = 0; r < ROWS; r++) {
            const __m256i code = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w[r] + k)));
            for (int m = 0; m < M; m++) total[r][m] = _mm256_add_epi32(total[r][m], _mm256_madd_epi16(code, given[m]));
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int m = 0; m < M; m++) {
            int32_t lanes[8], all = 0;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), total[r][m]);
            for (int l = 0; l < 8; l++) all += lanes[l];
            for (int64_t rest = k; rest < last; rest++) all += int32_t(a[m][rest]) * int32_t(w[r][rest]);
            sums[r][m] += all;
        }
}
#endif

// Rows of w that there are not are the last one again, and not written.
template <int M, typename Part>
INLINE void tile(const Call& c, int64_t t, const Part& part) {
    const int64_t begin = t * TILE, end = std::min(c.rows, begin + TILE);
    for (int64_t row = begin; row < end; row++)
        for (int64_t m = 0; m < c.count; m++) c.out[m * c.rows + row] = 0;
    for (int64_t first = 0; first < c.columns; first += CHUNK) {
        const int64_t last = std::min(c.columns, first + CHUNK);
        for (int64_t m = 0; m < c.count; m += M) {
            const int16_t* a[M];
            for (int i = 0; i < M; i++) a[i] = c.a + std::min(m + i, c.count - 1) * c.stride;
            for (int64_t row = begin; row < end; row += ROWS) {
                const int8_t* w[ROWS];
                for (int r = 0; r < ROWS; r++) w[r] = c.w + std::min(row + r, c.rows - 1) * c.columns;
                int32_t sums[ROWS][M] = {};
                part(a, w, first, last, sums);
                for (int r = 0; r < ROWS && row + r < end; r++)
                    for (int i = 0; i < M && m + i < c.count; i++) c.out[(m + i) * c.rows + row + r] += sums[r][i];
            }
        }
    }
}

template <int M>
void plain(const Call& c, int64_t t) {
    tile<M>(c, t, [](auto... given) { plain_part<M>(given...); });
}
#if defined(FUSED)
template <int M>
FUSED void fused(const Call& c, int64_t t) {
    tile<M>(c, t, [](const int16_t* const* a, const int8_t* const* w, int64_t first, int64_t last, int32_t (*sums)[M]) FUSED {
        fused_part<M>(a, w, first, last, sums);
    });
}
#endif

}  // namespace

extern "C" void bitgrid_int8_sums(const int8_t* a, const int8_t* w, int32_t* out, int64_t rows, int64_t columns, int64_t count,
                                  int64_t threads) {
    const int64_t stride = (columns + STEP - 1) / STEP * STEP;
    std::vector<int16_t> wide(count * stride);
    for (int64_t m = 0; m < count; m++) std::copy_n(a + m * columns, columns, wide.data() + m * stride);
    const Call c{wide.data(), w, out, rows, columns, count, stride};
    auto one = count > 1 ? plain<2> : plain<1>;
#if defined(FUSED)
    if (HAS_FUSED) one = count > 1 ? fused<2> : fused<1>;
#endif
    each((rows + TILE - 1) / TILE, 1, std::min(threads, rows * columns * count / LEAST), [&](int64_t t) { one(c, t); });
}
