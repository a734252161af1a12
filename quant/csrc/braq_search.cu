// The errors of BiLLM's candidates in one block of columns on a GPU, x [N, C] row after row. The twin of braq_search.cpp.
//
// Plain C ABI; every entry returns a cudaError_t and writes sums over the rows of each thread block, in a fixed order: totals [tiles,
// candidates], tiles of 32 rows for counts and of 16 for splits.

#include "braq_search.h"

namespace {

GLOBAL void BOUNDS(32 * COUNT_WARPS, 1)
count_errors(const float* x, const int64_t* counts, double* totals, int rows, int columns, int number, int warps) {
    DYNAMIC_SHARED(memory);
    count_tile(Values{x, columns, nullptr}, counts, 0, totals, rows, columns, number, warps, memory);
}

GLOBAL void BOUNDS(32 * SPLIT_WARPS, 2)
split_errors(const float* x, const float* thresholds, const int64_t* skip, double* totals, int rows, int columns, int number) {
    DYNAMIC_SHARED(memory);
    split_tile(Values{x, columns, nullptr}, thresholds, skip, totals, rows, columns, number, memory);
}

}  // namespace

extern "C" int bitgrid_braq_counts(const float* x, const int64_t* counts, double* totals, int64_t rows, int64_t columns, int64_t number,
                                   int64_t stream) {
    if (rows == 0 || number == 0) return 0;
    const int warps = count_warps(number);
    const dim3 tiles(unsigned((rows + COUNT_ROWS - 1) / COUNT_ROWS));
    return LAUNCH(count_errors, tiles, unsigned(32 * warps), count_bytes(columns), stream, x, counts, totals, int(rows), int(columns),
                  int(number), warps);
}

extern "C" int bitgrid_braq_splits(const float* x, const float* thresholds, const int64_t* skip, double* totals, int64_t rows,
                                   int64_t columns, int64_t number, int64_t stream) {
    if (rows == 0 || number == 0) return 0;
    const dim3 tiles(unsigned((rows + SPLIT_ROWS - 1) / SPLIT_ROWS));
    return LAUNCH(split_errors, tiles, unsigned(32 * SPLIT_WARPS), split_bytes(columns, number), stream, x, thresholds, skip, totals,
                  int(rows), int(columns), int(number));
}
