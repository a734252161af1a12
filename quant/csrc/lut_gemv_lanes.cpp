// The phases of lut_gemv.cu on the host, one thread after another, for tests without a GPU.

// Compiled in a fraction of the time.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Og")
#endif

#include "lut_gemv_cuda.h"

#include <vector>

namespace {

template <int M>
void product(Lut a, int64_t limit, int ranks) {
    const int64_t sums = int64_t(4) * M * SLICES * a.group * ROWS, clusters = (a.tiles + a.group - 1) / a.group;
    a.tables = (limit - sums) / 1024 * 1024;
    std::vector<std::vector<Four>> shared(ranks, std::vector<Four>((a.tables + sums) / 16 + 1));
    for (int64_t first = 0; first < a.given.count; first += M) {
        for (int64_t c = 0; c < clusters; c++) {
            const auto all = [](const auto& phase) {
                for (int t = 0; t < threads(M); t++) phase(t);
            };
            for (int r = 0; r < ranks; r++) {
                for (Four& f : shared[r]) std::memset(&f, 0xff, sizeof f);  // not a number
                add_parts<M>(a, Place{c, first, r, ranks}, shared[r].data(), [] {}, all);
            }
            for (int r = 0; r < ranks; r++) {
                const auto of = [&](int other) { return static_cast<void*>(shared[other].data()); };
                all([&](int t) { finish<M>(a, Place{c, first, r, ranks}, shared[r].data(), of, t); });
            }
        }
    }
}

}  // namespace

// As bitgrid_lut_gemv of lut_gemv.cu, with parts and kept weights as lists of addresses and numbers.
extern "C" void bitgrid_lut_lanes(const int64_t* parts, const int64_t* kept, const void* x, const float* scale, void* out, int64_t count,
                                  int64_t rows, int64_t k, int64_t rows_of_x, int64_t bfloat16, int64_t at_once, int64_t ranks, int64_t limit) {
    Lut a = lut_of(parts, count, kept, x, scale, out, rows, k, rows_of_x, bfloat16 != 0);
    a.group = group_of(a.tiles, at_once);
    const int m = rows_at_a_time(rows_of_x, a.group, limit);
    if (m == 1) return product<1>(a, limit, int(ranks));
    if (m == 2) return product<2>(a, limit, int(ranks));
    product<4>(a, limit, int(ranks));
}
