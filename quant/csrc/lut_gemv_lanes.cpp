// The phases of lut_gemv.cu on the host, one thread after another, for tests without a GPU.

// Compiled in a fraction of the time.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Og")
#endif

#include "host_threads.h"
#include "lut_gemv_cuda.h"

#include <atomic>
#include <vector>

namespace {

template <class F>
void product(const Lut& a, int64_t limit, int ranks) {
    host::Launch launch;
    const int64_t clusters = (a.tiles + a.group - 1) / a.group;
    std::vector<std::vector<Four>> shared(ranks, std::vector<Four>(limit / 16));
    for (int64_t first = 0; first < a.given.count; first += F::M) {
        for (int64_t c = 0; c < clusters; c++) {
            const auto all = [&](const auto& phase) { launch.every(THREADS, THREADS, phase); };
            const auto of = [&](int rank) { return static_cast<void*>(shared[rank].data()); };
            for (auto& block : shared) {
                for (Four& f : block) std::memset(&f, 0xff, sizeof f);  // not a number
            }
            std::vector<std::atomic<int>> given(ranks);
            for (int r = 0; r < ranks; r++) {
                const Place at = {c, first, r, ranks};
                const auto send = [&](int rank, const float* place, float v) {
                    const int64_t offset = reinterpret_cast<const char*>(place) - static_cast<const char*>(of(r));
                    std::memcpy(static_cast<char*>(of(rank)) + offset, &v, sizeof v);
                    given[rank] += sizeof v;
                };
                add_parts<F>(a, at, of(r), [] {}, all);
                all([&](int t) { give<F>(a, at, of(r), send, t); });
            }
            for (int r = 0; r < ranks; r++) {
                const Place at = {c, first, r, ranks};
                if (given[r] != bytes_given<F>(a, at)) continue;  // a GPU's would wait for ever
                all([&](int t) { gather<F>(a, at, of(r), t); });
                all([&](int t) { finish<F>(a, at, of(r), t); });
            }
        }
    }
}

}  // namespace

// As bitgrid_lut_gemv of lut_gemv.cu, with parts and kept weights as lists of addresses and numbers.
extern "C" void bitgrid_lut_lanes(const int64_t* parts, const int64_t* kept, const void* x, const float* scale, void* out, int64_t count,
                                  int64_t rows, int64_t k, int64_t rows_of_x, int64_t bfloat16, int64_t at_once, int64_t ranks,
                                  int64_t limit) {
    Lut a = lut_of(parts, count, kept, x, scale, out, rows, k, rows_of_x, bfloat16 != 0, at_once, ranks);
    with_form(a, limit, [&](auto form) { product<decltype(form)>(a, limit, int(ranks)); });
}
