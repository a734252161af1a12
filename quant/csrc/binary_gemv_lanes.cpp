// The phases of binary_gemv.cu on the host, one thread after another and a warp's lanes together, for tests without a GPU.

// Compiled in a fraction of the time.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Og")
#endif

#include "binary_gemv_cuda.h"

#include <vector>

namespace {

template <int G>
void product(const Signs& a, int ranks) {
    const int64_t bytes = shared_bytes(G, a.share, a.group, a.slices), clusters = ((a.tiles + 1) / 2 + a.group - 1) / a.group;
    std::vector<std::vector<Four>> shared(ranks, std::vector<Four>(bytes / 16 + 1));
    for (int64_t first = 0; first < a.given.count; first += 2 * G) {
        for (int64_t c = 0; c < clusters; c++) {
            const auto all = [](const auto& phase) {
                for (int t = 0; t < threads(G); t++) phase(t);
            };
            for (int r = 0; r < ranks; r++) {
                for (Four& f : shared[r]) std::memset(&f, 0xff, sizeof f);
                add_units<G>(a, Place{c, first, r, ranks}, shared[r].data(), [] {}, all);
            }
            const auto of = [&](int rank) { return static_cast<void*>(shared[rank].data()); };
            for (int r = 0; r < ranks; r++) all([&](int t) { finish<G>(a, Place{c, first, r, ranks}, of, t); });
        }
    }
}

}  // namespace

// As bitgrid_binary_gemv of binary_gemv.cu, for blocks that are whole units. Nothing is written where no row of x fits.
extern "C" void bitgrid_binary_lanes(const uint32_t* words, const float* tables, const int32_t* salient, const float* largest,
                                     const void* x, const float* scale, void* out, int64_t rows, int64_t k, int64_t block, int64_t count,
                                     int64_t bfloat16, int64_t at_once, int64_t ranks, int64_t limit) {
    Signs a = signs_of(words, tables, salient, largest, x, scale, out, rows, k, block, count, bfloat16 != 0);
    plan(a, at_once, ranks);
    const int g = rows_at_a_time(a, limit);
    if (g == 1) product<1>(a, int(ranks));
    if (g == 2) product<2>(a, int(ranks));
    if (g == 4) product<4>(a, int(ranks));
}
