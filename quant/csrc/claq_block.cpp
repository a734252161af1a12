// One block of CLAQ's columns: k-means of a column with all earlier errors fed back, rounding to the centres in the stored type, reserved
// weights, and its error for the columns after it. The twin of quant/kernels/claq_block/eager.py, bit for bit.
//
// Plain C ABI. Columns one after another: block, codes (bytes), values, errors, kept are [B, N], contiguous; upper is [B, B], with a stride
// between rows; block is changed: it ends as the columns that were rounded. plan is [B] of `Wanted`. type: see `Stored`. tables [B, most]
// hold numbers of the stored type, 0 beyond a column's centres; kept may be null where no plan reserves. given [B, most], or null: centres
// to round to in place of a column's own. Values are finite, N > 0.
//
// Returns 0; 1 where a table, 2 where a reserved weight does not fit the stored type: then nothing after that column is done.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "claq_block.h"
#include "kmeans_one_column.h"

namespace {

// As torch casts float64: by way of float32.
INLINE double stored(double x, int64_t type) { return stored(float(x), type); }

// x less error i times upper[i], i < count, one after another.
template <typename T>
INLINE void take_off(T* x, const T* errors, const T* upper, int64_t stride, int64_t n, int64_t count) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const T *e = errors + i * n, *u = upper + i * stride;
        const T u0 = u[0], u1 = u[stride], u2 = u[2 * stride], u3 = u[3 * stride];
        for (int64_t r = 0; r < n; r++) x[r] = (((x[r] - e[r] * u0) - e[n + r] * u1) - e[2 * n + r] * u2) - e[3 * n + r] * u3;
    }
    for (; i < count; i++) {
        const T *e = errors + i * n, u = upper[i * stride];
        for (int64_t r = 0; r < n; r++) x[r] -= e[r] * u;
    }
}

VECTOR void fed_back(float* x, const float* errors, const float* upper, int64_t stride, int64_t n, int64_t count) {
    take_off(x, errors, upper, stride, n, count);
}
VECTOR void fed_back(double* x, const double* errors, const double* upper, int64_t stride, int64_t n, int64_t count) {
    take_off(x, errors, upper, stride, n, count);
}

template <typename T>
INLINE void look_up(const T* x, const uint8_t* codes, const T* table, T diagonal, int64_t n, T* values, T* errors) {
    for (int64_t r = 0; r < n; r++) {
        const T value = table[codes[r]];
        values[r] = value;
        errors[r] = (x[r] - value) / diagonal;
    }
}

VECTOR void rounded(const float* x, const uint8_t* codes, const float* table, float d, int64_t n, float* values, float* errors) {
    look_up(x, codes, table, d, n, values, errors);
}
VECTOR void rounded(const double* x, const uint8_t* codes, const double* table, double d, int64_t n, double* values, double* errors) {
    look_up(x, codes, table, d, n, values, errors);
}

// Tables may be off by a 256th of their range; one of equal values by a 1024th.
template <typename T>
bool fits(const T* centres, const T* table, int64_t k) {
    const T width = centres[k - 1] - centres[0];
    T size = 0;
    for (int64_t c = 0; c < k; c++) size = std::max(size, std::abs(centres[c]));
    const T allowed = width > 0 ? width / 256 : size / 1024;
    for (int64_t c = 0; c < k; c++)
        if (!(std::abs(table[c] - centres[c]) <= allowed)) return false;
    return true;
}

// Both ends of a column as they are, in the stored type, but those that the table gives already. `sorted`: its values.
template <typename T>
bool reserve(const T* x, const double* sorted, int64_t n, const Wanted& wanted, int64_t type, T diagonal, T* values, T* errors,
             uint8_t* kept) {
    const int64_t top = wanted.top, bottom = wanted.bottom;
    if (!std::isfinite(stored(T(sorted[0]), type)) || !std::isfinite(stored(T(sorted[n - 1]), type))) return false;
    const T high = T(sorted[n - top]), low = bottom ? T(sorted[bottom - 1]) : -T(INFINITY);
    bool exact = true;
    for (int64_t r = 0; r < n && exact; r++) exact = stored(x[r], type) == values[r];
    // Equal weights at an end are more than were asked for; like those of a table that holds all, they need no reserving.
    const bool tied = (top < n && sorted[n - top - 1] == sorted[n - top]) || (bottom && sorted[bottom] == sorted[bottom - 1]);
    for (int64_t r = 0; r < n; r++) {
        kept[r] = 0;
        if (!(x[r] >= high || x[r] <= low)) continue;
        const T own = stored(x[r], type);
        if (own == values[r] && (exact || tied)) continue;
        kept[r] = 1;
        values[r] = own;
        errors[r] = (x[r] - own) / diagonal;
    }
    return true;
}

template <typename T>
int64_t solve(T* block, const T* upper, int64_t stride, const Wanted* plan, int64_t columns, int64_t n, int64_t steps, int64_t type,
              int64_t most, const T* given, uint8_t* codes, T* values, T* errors, T* tables, uint8_t* kept) {
    static thread_local Workspace w;  // kept from call to call
    std::vector<T> centres(most);
    std::fill(tables, tables + columns * most, T(0));
    for (int64_t j = 0; j < columns; j++) {
        T *x = block + j * n, *table = tables + j * most, *value = values + j * n, *error = errors + j * n;
        const Wanted& wanted = plan[j];
        const T diagonal = upper[j * stride + j];
        fed_back(x, errors, upper + j, stride, n, j);
        if (given) {
            std::copy(given + j * most, given + j * most + wanted.k, centres.begin());
            w.x.resize(n);
            if (wanted.top) sorted(x, n, w);
        } else {
            one_column(x, nullptr, n, wanted.k, wanted.bins, steps, wanted.draws, centres.data(), w);
        }
        for (int64_t c = 0; c < wanted.k; c++) table[c] = stored(centres[c], type);
        if (type != FLOAT32 && !fits(centres.data(), table, wanted.k)) return 1;
        nearest_of(x, n, table, wanted.k, codes + j * n);
        rounded(x, codes + j * n, table, diagonal, n, value, error);
        if (wanted.top && !reserve(x, w.x.data(), n, wanted, type, diagonal, value, error, kept + j * n)) return 2;
    }
    return 0;
}

}  // namespace

#define ENTRY(NAME, T)                                                                                                                   \
    extern "C" void NAME(T* block, const T* upper, int64_t stride, const int64_t* plan, int64_t columns, int64_t rows, int64_t steps,    \
                         int64_t type, int64_t most, const T* given, uint8_t* codes, T* values, T* errors, T* tables, uint8_t* kept,     \
                         int64_t* wrong) {                                                                                               \
        *wrong = solve(block, upper, stride, reinterpret_cast<const Wanted*>(plan), columns, rows, steps, type, most, given, codes,      \
                       values, errors, tables, kept);                                                                                    \
    }

ENTRY(bitgrid_claq_block_f32, float)
ENTRY(bitgrid_claq_block_f64, double)
