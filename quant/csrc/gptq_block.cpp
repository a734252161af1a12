// One block of the GPTQ column solver: round a column, spread its error over the later columns of the block.
// The twin of quant/kernels/gptq_block/reference.py.
//
// Plain C ABI. Column-major: block, codes, values, errors are [B, N] (a column's N rows lie together), upper is [B, B], scale and
// zero are [G, N], group is [B] (row of scale and zero of each column). tops is [N], the largest code of each row, or null: then it is top
// in all. kind: how codes and values belong together, see `Kind`. words is [N], or null: of each row how its ranges are found, see `Fit`;
// scale and zero are written to then, and odd is added to. For float alone.
// block is not changed. threads >= 1: rows are independent of each other.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#include "ranges.h"
#include "versions.h"

#define VECTOR VERSIONS("avx2")
// A version of its own, not a clone: it takes twice as many rows at a time.
#if !defined(BITGRID_PLAIN) && defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define WIDER 64
#define WIDE __attribute__((target("avx512f")))
#endif

namespace {

enum Kind : int64_t { SHIFTED = 0, REAL_ZERO = 1, MINIMUM = 2 };

// Rows are taken LANES at a time, in four registers of W bytes; errors of a block of 128 columns of them stay in the first-level cache.
template <typename T, int W>
using Vector __attribute__((vector_size(W))) = T;
template <typename T, int W>
constexpr int64_t WIDTH = W / sizeof(T);
template <typename T, int W>
constexpr int64_t LANES = 4 * WIDTH<T, W>;

template <typename T>
struct Magic;  // adding and taking away 1.5 · 2^(mantissa bits) rounds to a whole number, half to even
template <>
struct Magic<float> {
    static constexpr float round = 12582912.0f, far = 2097152.0f;
};
template <>
struct Magic<double> {
    static constexpr double round = 6755399441055744.0, far = 1125899906842624.0;
};

// All of a vector: comparisons choose lane by lane.
template <typename T, int W>
INLINE Vector<T, W> nearest(Vector<T, W> x) {
    // Beyond `far` every code is clamped anyway; the trick needs a small number.
    x = x > Magic<T>::far ? Magic<T>::far - Vector<T, W>{} : x;
    x = x < -Magic<T>::far ? -Magic<T>::far - Vector<T, W>{} : x;
    return (x + Magic<T>::round) - Magic<T>::round;
}

template <typename T, int W>
INLINE Vector<T, W> limited(Vector<T, W> x, Vector<T, W> top) {
    x = x < T(0) ? Vector<T, W>{} : x;
    return x > top ? top : x;
}

constexpr int64_t AHEAD = 8;  // columns that are fetched before their turn
constexpr int64_t RUN = 4;    // neighbouring LANES that one thread takes together

template <typename T>
struct Block {
    const T *block, *upper;
    T *scale, *zero;
    const T* tops;
    const int64_t* group;
    const int32_t* words;
    int32_t* odd;
    int64_t columns, rows;
    T top;
    int64_t kind;
    T *codes, *values, *errors;
};

// Rows `first` .. `first + count` of a block: what the steps of one column share.
template <typename T, int W>
struct Lanes {
    static constexpr int64_t width = WIDTH<T, W>, all = LANES<T, W>;
    using Vec = Vector<T, W>;
    using Sums = Vec[4];
    const Block<T>& b;
    const T* turned;  // upper transposed: what column j needs lies together
    const int64_t first, count;
    T* own;  // errors of these rows, [B, LANES], zero beyond `count`
    Sums tops;

    INLINE Lanes(const Block<T>& b, const T* turned, int64_t first, int64_t count, T* own)
        : b(b), turned(turned), first(first), count(count), own(own) {
        for (Vec& top : tops) top = b.top - Vec{};
        if (b.tops) fetch(b.tops + first, T(0), tops);
    }

    // `count` numbers from `from`, `otherwise` after them.
    INLINE void fetch(const T* from, T otherwise, Sums& to) const {
        if (count == all) {
            std::memcpy(to, from, sizeof to);
            return;
        }
        T padded[all];
        for (int64_t l = 0; l < all; l++) padded[l] = l < count ? from[l] : otherwise;
        std::memcpy(to, padded, sizeof to);
    }

    // Scale and zero of all groups that are found here: all rows of one kind at once.
    INLINE void find() const {
        const int32_t* words = b.words + first;
        for (int64_t l = 0; l < count; l++) {
            const ranges::Fit fit{words[l]};
            if (fit.width() && std::find(words, words + l, words[l]) == words + l)
                for (int64_t start = 0; start < b.columns; start += fit.width()) find(fit, words, l, start);
        }
    }

    // Of one group in those rows from `from` on that have this word.
    INLINE void find(ranges::Fit fit, const int32_t* words, int64_t from, int64_t start) const {
        Sums low, high, seen{}, w;
        load(start, low);
        std::memcpy(high, low, sizeof high);
        for (int64_t j = start; j < start + fit.width(); j++) {
            load(j, w);
            for (int part = 0; part < 4; part++) {
                low[part] = w[part] < low[part] ? w[part] : low[part];
                high[part] = w[part] > high[part] ? w[part] : high[part];
                seen[part] += w[part] * T(0);
            }
        }
        T lows[all], highs[all], sums[all];
        std::memcpy(lows, low, sizeof lows), std::memcpy(highs, high, sizeof highs), std::memcpy(sums, seen, sizeof sums);
        int32_t odds = 0;
        for (int64_t l = from; l < count; l++) {
            if (words[l] != fit.word) continue;
            bool odd;
            const ranges::Affine made = fit.found(lows[l], highs[l], sums[l], odd);
            odds += odd;
            for (int64_t j = start; j < start + fit.width(); j++) {
                if (j != start && b.group[j] == b.group[j - 1]) continue;
                const int64_t at = b.group[j] * b.rows + first + l;
                b.scale[at] = made.scale, b.zero[at] = made.zero;
            }
        }
        if (odds) __atomic_fetch_add(b.odd, odds, __ATOMIC_RELAXED);
    }

    INLINE void load(int64_t j, Sums& sum) const { fetch(b.block + j * b.rows + first, T(0), sum); }

    // Columns lie pages apart and often share a few sets of the caches: fetched a little before their turn, and no sooner.
    INLINE void ahead(int64_t j) const {
        j += AHEAD;
        const int64_t at = j < b.columns ? j * b.rows + first : (j - b.columns) * b.rows + first + all;
        for (int64_t l = 0; l < all; l += 64 / sizeof(T)) {
            __builtin_prefetch(b.block + at + l, 0);
            __builtin_prefetch(b.codes + at + l, 1);
            __builtin_prefetch(b.values + at + l, 1);
            __builtin_prefetch(b.errors + at + l, 1);
        }
    }

    INLINE void subtract(int64_t i, T u, Sums& sum) const {
        Vec e;
        for (int part = 0; part < 4; part++) {
            std::memcpy(&e, own + i * all + part * width, sizeof e);
            sum[part] -= e * u;
        }
    }

    INLINE void subtract(int64_t i, T u, Sums& one, T v, Sums& two) const {
        Vec e;
        for (int part = 0; part < 4; part++) {
            std::memcpy(&e, own + i * all + part * width, sizeof e);
            one[part] -= e * u;
            two[part] -= e * v;
        }
    }

    INLINE void round(int64_t j, const Sums& sum) const {
        const int64_t grid = b.group[j] * b.rows + first, at = j * b.rows + first;
        const T diagonal = turned[j * b.columns + j];
        Sums scales, zeros, codes, values, errors;
        fetch(b.scale + grid, T(1), scales);
        fetch(b.zero + grid, T(0), zeros);
        for (int part = 0; part < 4; part++) {
            const Vec w = sum[part], scale = scales[part], zero = zeros[part], top = tops[part];
            Vec code, value;
            if (b.kind == MINIMUM) {
                // A group of equal values has scale 0; its minimum alone is exact.
                const Vec steps = scale == T(0) ? Vec{} : (w - zero) / (scale == T(0) ? T(1) - Vec{} : scale);
                code = nearest<T, W>(limited<T, W>(steps, top));
                value = code * scale + zero;
            } else {
                code = b.kind == REAL_ZERO ? nearest<T, W>(w / scale + zero) : nearest<T, W>(w / scale) + zero;
                code = limited<T, W>(code, top);
                value = (code - zero) * scale;
            }
            codes[part] = code, values[part] = value, errors[part] = (w - value) / diagonal;
        }
        std::memcpy(own + j * all, errors, sizeof errors);
        std::memcpy(b.codes + at, codes, count * sizeof(T));
        std::memcpy(b.values + at, values, count * sizeof(T));
        std::memcpy(b.errors + at, errors, count * sizeof(T));
        for (int64_t l = count; l < all; l++) own[j * all + l] = T(0);
    }
};

// Two columns at a time: each error is loaded once for both, and eight sums hide the time an addition takes.
template <typename T, int W>
INLINE void lanes(const Block<T>& b, const T* turned, int64_t first, const int64_t count, T* own) {
    const Lanes<T, W> rows(b, turned, first, count, own);
    typename Lanes<T, W>::Sums one, two;
    int64_t j = 0;
    for (; j + 1 < b.columns; j += 2) {
        const T *row = turned + j * b.columns, *next = row + b.columns;
        rows.ahead(j);
        rows.ahead(j + 1);
        rows.load(j, one);
        rows.load(j + 1, two);
        for (int64_t i = 0; i < j; i++) rows.subtract(i, row[i], one, next[i], two);
        rows.round(j, one);
        rows.subtract(j, next[j], two);
        rows.round(j + 1, two);
    }
    if (j < b.columns) {
        rows.load(j, one);
        for (int64_t i = 0; i < j; i++) rows.subtract(i, turned[j * b.columns + i], one);
        rows.round(j, one);
    }
}

template <typename T, int W>
INLINE void found_and_solved(const Block<T>& b, const T* turned, int64_t first, int64_t count, T* own) {
    if constexpr (std::is_same_v<T, float>)
        if (b.words) Lanes<float, W>(b, turned, first, count, own).find();
    // The usual number is a constant to the compiler.
    count == LANES<T, W> ? lanes<T, W>(b, turned, first, LANES<T, W>, own) : lanes<T, W>(b, turned, first, count, own);
}

VECTOR void lanes_f32(const Block<float>& b, const float* turned, int64_t first, int64_t count, float* own) {
    found_and_solved<float, 32>(b, turned, first, count, own);
}
VECTOR void lanes_f64(const Block<double>& b, const double* turned, int64_t first, int64_t count, double* own) {
    found_and_solved<double, 32>(b, turned, first, count, own);
}

template <typename T>
using Run = void (*)(const Block<T>&, const T*, int64_t, int64_t, T*);

// How rows are solved here, and how many at a time.
template <typename T>
struct Way {
    Run<T> run;
    int64_t lanes;
};

#ifdef WIDER
WIDE void wide_f32(const Block<float>& b, const float* turned, int64_t first, int64_t count, float* own) {
    found_and_solved<float, WIDER>(b, turned, first, count, own);
}
#endif

inline Way<float> way(float) {
#ifdef WIDER
    if (__builtin_cpu_supports("avx512f")) return {wide_f32, LANES<float, WIDER>};
#endif
    return {lanes_f32, LANES<float, 32>};
}
inline Way<double> way(double) { return {lanes_f64, LANES<double, 32>}; }

template <typename T>
void solve(const Block<T>& b, int64_t threads) {
    std::vector<T> turned(b.columns * b.columns);
    for (int64_t i = 0; i < b.columns; i++)
        for (int64_t j = i; j < b.columns; j++) turned[j * b.columns + i] = b.upper[i * b.columns + j];
    const Way<T> way = ::way(T());
    const int64_t all = way.lanes, parts = (b.rows + all - 1) / all;
    std::atomic<int64_t> next{0};
    auto work = [&] {
        std::vector<T> own(b.columns * all);
        for (int64_t p; (p = next.fetch_add(RUN)) < parts;) {
            for (int64_t first = p * all, end = std::min(b.rows, first + RUN * all); first < end; first += all)
                way.run(b, turned.data(), first, std::min(all, b.rows - first), own.data());
        }
    };
    std::vector<std::thread> others;
    for (int64_t t = 1; t < std::min(threads, parts); t++) others.emplace_back(work);
    work();
    for (std::thread& t : others) t.join();
}

}  // namespace

#define ENTRY(NAME, T)                                                                                                                       \
    extern "C" void NAME(const T* block, const T* upper, T* scale, T* zero, const T* tops, const int64_t* group, const int32_t* words,       \
                         int32_t* odd, int64_t columns, int64_t rows, int64_t top, int64_t kind, T* codes, T* values, T* errors,             \
                         int64_t threads) {                                                                                                  \
        solve(Block<T>{block, upper, scale, zero, tops, group, words, odd, columns, rows, T(top), kind, codes, values, errors}, threads);    \
    }

ENTRY(bitgrid_gptq_block_f32, float)
ENTRY(bitgrid_gptq_block_f64, double)
