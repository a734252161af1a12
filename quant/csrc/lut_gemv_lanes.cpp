// The phases of lut_gemv.cu on the host, one thread after another, for tests without a GPU.

// Compiled in a fraction of the time.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Og")
#endif

#include "lut_gemv_cuda.h"

#include <vector>

namespace {

template <class F>
void product(const Lut& a, int64_t limit, int ranks) {
    const int64_t clusters = (a.tiles + a.group - 1) / a.group;
    std::vector<std::vector<Four>> shared(ranks, std::vector<Four>(limit / 16));
    for (int64_t first = 0; first < a.given.count; first += F::M) {
        for (int64_t c = 0; c < clusters; c++) {
            const auto all = [](const auto& phase) {
                for (int t = 0; t < F::THREADS; t++) phase(t);
            };
            for (int r = 0; r < ranks; r++) {
                for (Four& f : shared[r]) std::memset(&f, 0xff, sizeof f);  // not a number
                add_parts<F>(a, Place{c, first, r, ranks}, shared[r].data(), [] {}, all);
            }
            for (int r = 0; r < ranks; r++) {
                const auto of = [&](int other) { return static_cast<void*>(shared[other].data()); };
                all([&](int t) { finish<F>(a, Place{c, first, r, ranks}, shared[r].data(), of, t); });
            }
        }
    }
}

}  // namespace

// As bitgrid_lut_gemv of lut_gemv.cu, with parts and kept weights as lists of addresses and numbers.
extern "C" void bitgrid_lut_lanes(const int64_t* parts, const int64_t* kept, const void* x, const float* scale, void* out, int64_t count,
                                  int64_t rows, int64_t k, int64_t rows_of_x, int64_t bfloat16, int64_t at_once, int64_t ranks, int64_t limit) {
    Lut a = lut_of(parts, count, kept, x, scale, out, rows, k, rows_of_x, bfloat16 != 0, at_once, limit);
    with_form(a, limit, [&](auto form) { product<decltype(form)>(a, limit, int(ranks)); });
}
