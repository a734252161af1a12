// The phases of binary_gemv.cu on the host, one thread after another and a warp's lanes together, for tests without a GPU.

// Compiled in a fraction of the time.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Og")
#endif

#include "binary_gemv_cuda.h"
#include "host_threads.h"

#include <vector>

namespace {

template <class X, int G, bool RING>
void product(const Signs& a, int ranks) {
    host::Launch launch;
    const int64_t bytes = shared_bytes(G, a, ranks), clusters = ((a.tiles + 1) / 2 + a.group - 1) / a.group;
    std::vector<std::vector<Four>> shared(ranks, std::vector<Four>(bytes / 16 + 1));
    const auto of = [&](int rank) { return static_cast<void*>(shared[rank].data()); };
    constexpr int THREADS = threads(G, PLANES_FOR<X>);
    const auto all = [&](const auto& phase) { launch.every(THREADS, THREADS, phase); };
    for (int64_t first = 0; first < a.given.count; first += 2 * G) {
        for (int64_t c = 0; c < clusters; c++) {
            const auto place = [&](int r) { return Place{c, first, r, ranks}; };
            for (int r = 0; r < ranks; r++)
                for (Four& f : shared[r]) std::memset(&f, 0xff, sizeof f);
            for (int r = 0; r < ranks; r++) add_units<X, G, RING>(a, place(r), of(r), [] {}, all);
            for (int r = 0; r < ranks; r++) all([&](int t) { give<G, PLANES_FOR<X>>(a, place(r), of(r), of, t); });
            for (int r = 0; r < ranks; r++) all([&](int t) { finish<G, PLANES_FOR<X>>(a, place(r), of(r), t); });
        }
    }
}

template <class X, int G>
void product(const Signs& a, int ranks) {
    if constexpr (has_ring(G)) {
        if (a.ring > 0) return product<X, G, true>(a, ranks);
    }
    product<X, G, false>(a, ranks);
}

template <class X>
void product_of(const Signs& a, int g, int ranks) {
    if (g == 1) product<X, 1>(a, ranks);
    if (g == 2) product<X, 2>(a, ranks);
    if (g == 4) product<X, 4>(a, ranks);
}

}  // namespace

// As bitgrid_binary_gemv of binary_gemv.cu, for blocks that are whole units. Nothing is written where no row of x fits.
extern "C" void bitgrid_binary_lanes(const uint32_t* words, const uint32_t* tables, const uint32_t* kinds, const float* largest,
                                     const void* x, const float* scale, void* out, int64_t rows, int64_t k, int64_t block, int64_t count,
                                     int64_t bfloat16, int64_t at_once, int64_t ranks, int64_t limit) {
    Signs a = signs_of(words, tables, kinds, largest, x, scale, out, rows, k, block, count, bfloat16 != 0);
    plan(a, at_once, ranks);
    const int g = rows_at_a_time(a, ranks, limit);
    if (bfloat16 != 0) {
        product_of<uint16_t>(a, g, int(ranks));
    } else {
        product_of<float>(a, g, int(ranks));
    }
}
