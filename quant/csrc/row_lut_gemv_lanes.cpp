// The phases of row_lut_gemv.cu on the host, one thread after another, for tests without a GPU.

// Compiled in a fraction of the time.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Og")
#endif

#include "host_threads.h"
#include "row_lut_gemv_cuda.h"

#include <vector>

// As bitgrid_row_lut_gemv of row_lut_gemv.cu.
extern "C" void bitgrid_row_lut_lanes(const uint32_t* words, const void* tables, const void* x, const float* scale, void* out, int64_t rows,
                                      int64_t k, int64_t count, int64_t bits, int64_t half, int64_t bfloat16) {
    const Rows a = rows_of(words, tables, x, scale, out, rows, k, count, bfloat16 != 0);
    host::Launch launch;
    chosen(count, bits, half != 0, [&](auto m, auto b, auto h) {
        constexpr int M = decltype(m)::value, BITS = decltype(b)::value;
        constexpr bool HALF = decltype(h)::value != 0;
        static_assert(shared_bytes(M, BITS, HALF) <= 64 * 1024, "what all devices from capability 8.0 on have");
        std::vector<Four> shared(shared_bytes(M, BITS, HALF) / sizeof(Four));
        std::vector<Lane<M, BITS>> lanes(THREADS);
        const auto block = [&](const auto& phase) { launch.every(THREADS, THREADS, [&](int t) { phase(t, lanes[t]); }); };
        const auto warp = [&](const auto& phase) { launch.every(THREADS, 32, [&](int t) { phase(t, lanes[t]); }); };
        for (int first = 0; first < count; first += M) {
            for (int64_t tile = 0; tile < (rows + ROWS - 1) / ROWS; tile++) {
                std::memset(shared.data(), 0xff, shared.size() * sizeof(Four));  // not a number
                multiply<M, BITS, HALF>(a, Tile{tile, first}, reinterpret_cast<char*>(shared.data()), block, warp);
            }
        }
        return 0;
    });
}
