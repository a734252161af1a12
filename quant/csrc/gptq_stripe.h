// The columns of a block in a few vectors of its rows: see gptq_block.cpp.
//
// PANEL columns at a time are in registers ("pull": off each, the errors of all columns before it are taken in their order). A column is a
// chain of some ten operations that wait for each other, a division first and last. Between the columns of one panel, the errors before
// that panel are taken off the next: independent operations for a processor to do while a chain waits.
//
// All but the fused operation is rounded operation by operation: results have the same bits whatever the vectors' width.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "ranges.h"
#include "versions.h"

// Clang has functions of whole vectors, and takes vectors of 64 bytes in no assembly of a function that is not for AVX-512 itself.
#if defined(__has_builtin)
#if defined(__clang__) && __has_builtin(__builtin_elementwise_fma) && __has_builtin(__builtin_elementwise_roundeven)
#define ELEMENTWISE
#endif
#endif
#if !defined(BITGRID_PLAIN) && defined(__x86_64__) && (defined(ELEMENTWISE) || (defined(__GNUC__) && !defined(__clang__)))
#define ON_X86
#if !defined(__clang__)
#define BY_ASSEMBLY
#endif
#endif
#if defined(__aarch64__) || (defined(__FP_FAST_FMA) && defined(__FP_FAST_FMAF))
#define LANES_ARE_FUSED
#endif

#if defined(__GNUC__)
#define INLINED __attribute__((always_inline))
#else
#define INLINED
#endif

namespace {

enum Kind : int64_t { SHIFTED = 0, REAL_ZERO = 1, MINIMUM = 2 };

template <typename T, int W>
using Vector __attribute__((vector_size(W))) = T;
template <typename T, int W>
constexpr int64_t WIDTH = W / sizeof(T);
// A stripe is VECTORS vectors of rows, a panel PANEL columns: its weights lie in half of the registers, or three quarters of 16. Enough
// for the time that a fused operation takes; and a stripe's errors leave the first-level cache room for all else.
template <int W>
constexpr int VECTORS = W == 32 ? 3 : 2;
template <int W>
constexpr int64_t PANEL = W == 32 ? 4 : 8;
template <typename T, int W>
constexpr int64_t ROWS = VECTORS<W> * WIDTH<T, W>;

// x - e · u, rounded once.
template <typename T, int W>
INLINE Vector<T, W> less(Vector<T, W> x, Vector<T, W> e, Vector<T, W> u) {
#ifdef BY_ASSEMBLY
    if constexpr (W > 16) {
        // No expression: where compilers may fuse one product, they may fuse others.
        if constexpr (std::is_same_v<T, float>)
            asm("vfnmadd231ps %2, %1, %0" : "+v"(x) : "v"(e), "v"(u));
        else
            asm("vfnmadd231pd %2, %1, %0" : "+v"(x) : "v"(e), "v"(u));
        return x;
    }
#endif
#ifdef ELEMENTWISE
    return __builtin_elementwise_fma(-e, u, x);
#else
    for (int64_t l = 0; l < WIDTH<T, W>; l++) x[l] = std::fma(-e[l], u[l], x[l]);
    return x;
#endif
}

// The same of one number for all lanes, which AVX-512 takes from memory: the fewer instructions, the further a processor sees ahead.
template <typename T, int W>
INLINE Vector<T, W> less(Vector<T, W> x, Vector<T, W> e, const T* u) {
#ifdef BY_ASSEMBLY
    if constexpr (W == 64) {
        if constexpr (std::is_same_v<T, float>)
            asm("vfnmadd231ps %2%{1to16%}, %1, %0" : "+v"(x) : "v"(e), "m"(*u));
        else
            asm("vfnmadd231pd %2%{1to8%}, %1, %0" : "+v"(x) : "v"(e), "m"(*u));
        return x;
    }
#endif
    return less<T, W>(x, e, *u - Vector<T, W>{});
}

// To a whole number, half to even.
template <typename T, int W>
INLINE Vector<T, W> nearest(Vector<T, W> x) {
#ifdef BY_ASSEMBLY
    if constexpr (W == 64) {
        if constexpr (std::is_same_v<T, float>)
            asm("vrndscaleps $8, %1, %0" : "=v"(x) : "v"(x));
        else
            asm("vrndscalepd $8, %1, %0" : "=v"(x) : "v"(x));
        return x;
    }
    if constexpr (W == 32) {
        if constexpr (std::is_same_v<T, float>)
            asm("vroundps $8, %1, %0" : "=x"(x) : "x"(x));
        else
            asm("vroundpd $8, %1, %0" : "=x"(x) : "x"(x));
        return x;
    }
#endif
#ifdef ELEMENTWISE
    return __builtin_elementwise_roundeven(x);
#else
    for (int64_t l = 0; l < WIDTH<T, W>; l++) x[l] = std::nearbyint(x[l]);
    return x;
#endif
}

// NaN stays.
template <typename T, int W>
INLINE Vector<T, W> limited(Vector<T, W> x, Vector<T, W> top) {
    Vector<T, W> none{};
#ifdef BY_ASSEMBLY
    if constexpr (W > 16) asm("" : "+v"(none));  // of a zero that they know, compilers make two instructions
#endif
    x = none > x ? none : x;
    return top < x ? top : x;
}

template <typename T>
struct Block {
    const T *block, *upper;
    T *scale, *zero;
    const T* tops;
    const int64_t* group;
    const int32_t* words;
    int32_t* odd;
    int64_t stride, columns, rows;
    T top;
    int64_t kind;
    uint8_t* codes;
    T *values, *errors;
};

// A thread's memory: errors of its stripe [B, ROWS], then the panel that is rounded [PANEL, ROWS]. Aligned: no vector lies in two lines.
template <typename T>
struct Own {
    std::vector<T> memory;
    T* start;
    explicit Own(int64_t count) : memory(count + 64 / sizeof(T)) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data());
        start = memory.data() + ((at + 63) / 64 * 64 - at) / sizeof(T);
    }
    Own(const Own&) = delete;
};

// ROWS rows of a block from `first` on.
template <typename T, int W>
struct Stripe {
    static constexpr int64_t width = WIDTH<T, W>, all = ROWS<T, W>, panel = PANEL<W>;
    using Vec = Vector<T, W>;
    using Few = Vec[VECTORS<W>];
    using Sums = Few[panel];
    const Block<T>& b;
    const int64_t first;
    T *own, *given;
    Vec tops[VECTORS<W>];

    INLINE Stripe(const Block<T>& b, int64_t first, T* own) : b(b), first(first), own(own), given(own + b.columns * all) {
        for (int v = 0; v < VECTORS<W>; v++) tops[v] = b.tops ? at(b.tops + first, v) : b.top - Vec{};
    }

    INLINE static Vec at(const T* from, int v) {
        Vec x;
        std::memcpy(&x, from + v * width, sizeof x);
        return x;
    }
    INLINE static void put(T* to, int v, Vec x) { std::memcpy(to + v * width, &x, sizeof x); }
    INLINE static void put_codes(uint8_t* to, int v, Vec x) {
        // By way of 32 bits, for which processors have instructions.
        const auto made = __builtin_convertvector(__builtin_convertvector(x, Vector<int32_t, 4 * width>), Vector<uint8_t, width>);
        std::memcpy(to + v * width, &made, sizeof made);
    }

    INLINE static void fetch(const T* from, Few& to) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS<W>; v++) to[v] = at(from, v);
    }

    // Columns lie pages apart and often share a few sets of the caches: fetched a little before their turn, and no sooner.
    INLINE void ahead(int64_t j) const {
        const int64_t in = j + 2 * panel, out = j + panel;
        const int64_t from = in < b.columns ? in * b.rows + first : (in - b.columns) * b.rows + first + all;
        const int64_t to = out < b.columns ? out * b.rows + first : (out - b.columns) * b.rows + first + all;
        __builtin_prefetch(b.codes + to, 1);
        for (int64_t l = 0; l < all; l += 64 / sizeof(T)) {
            __builtin_prefetch(b.block + from + l, 0);
            __builtin_prefetch(b.values + to + l, 1);
            __builtin_prefetch(b.errors + to + l, 1);
        }
    }

    INLINE void load(int64_t start, Sums& sums) const {
#pragma GCC unroll 8
        for (int64_t c = 0; c < panel; c++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS<W>; v++) sums[c][v] = start + c < b.columns ? at(b.block + (start + c) * b.rows + first, v) : Vec{};
    }

    // Error i off a panel's columns; u: its row of the factor.
    INLINE void subtract(int64_t i, const T* u, Sums& sums) const {
        Vec e[VECTORS<W>];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS<W>; v++) e[v] = at(own + i * all, v);
#pragma GCC unroll 8
        for (int64_t c = 0; c < panel; c++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS<W>; v++) sums[c][v] = less<T, W>(sums[c][v], e[v], u + c);
    }

    // Of a panel whose rows of the factor are `u`: column j, its `c`th, is w; its errors come back.
    INLINE void round(int64_t j, int64_t c, const T* u, const Few& w, Few& errors) const {
        const int64_t grid = b.group[j] * b.rows + first, to = j * b.rows + first;
        const Vec diagonal = u[j * panel + c] - Vec{};
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS<W>; v++) {
            const Vec scale = at(b.scale + grid, v), zero = at(b.zero + grid, v);
            Vec code, value;
            if (b.kind == MINIMUM) {
                // A group of equal values has scale 0; its minimum alone is exact.
                const Vec steps = scale == T(0) ? Vec{} : (w[v] - zero) / (scale == T(0) ? T(1) - Vec{} : scale);
                code = nearest<T, W>(limited<T, W>(steps, tops[v]));
                value = code * scale + zero;
            } else {
                code = b.kind == REAL_ZERO ? nearest<T, W>(w[v] / scale + zero) : nearest<T, W>(w[v] / scale) + zero;
                code = limited<T, W>(code, tops[v]);
                value = (code - zero) * scale;
            }
            errors[v] = (w[v] - value) / diagonal;
            put(own + j * all, v, errors[v]);
            put_codes(b.codes + to, v, code);
            put(b.values + to, v, value);
            put(b.errors + to, v, errors[v]);
        }
    }

    // Error i off `w`, the `c`th column of a panel.
    INLINE static void subtract(const T* u, int64_t i, int64_t c, const Few& error, Few& w) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS<W>; v++) w[v] = less<T, W>(w[v], error[v], u + i * panel + c);
    }

    // Columns start .. end - 1, one panel. between(): what is done after each while it is not finished.
    template <typename Between>
    INLINE void solve(int64_t start, int64_t end, const T* u, const Between& between) const {
        Few w, error;
        fetch(given, w);
        for (int64_t j = start; j < end; j++) {
            ahead(j);
            round(j, j - start, u, w, error);
            // The next column but for this one's error, which is at hand: not by way of memory.
            if (j + 1 < end) {
                const int64_t c = j + 1 - start;
                fetch(given + c * all, w);
                for (int64_t i = start; i < j; i++) {
                    Few before;
                    fetch(own + i * all, before);
                    subtract(u, i, c, before, w);
                }
                subtract(u, j, c, error, w);
            }
            between();
        }
    }

    INLINE void solve(const T* panels) const {
        Sums sums;
        load(0, sums);
        for (int64_t start = 0; start < b.columns; start += panel) {
            const T *mine = panels + start * b.columns, *later = mine + panel * b.columns;
#pragma GCC unroll 8
            for (int64_t c = 0; c < panel; c++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS<W>; v++) put(given + c * all, v, sums[c][v]);
            const int64_t end = std::min(start + panel, b.columns);
            if (end == b.columns) {
                solve(start, end, mine, [] {});
                break;
            }
            load(end, sums);
            int64_t i = 0;
            solve(start, end, mine, [&]() INLINED {
                for (const int64_t share = i + start / panel; i < share; i++) subtract(i, later + i * panel, sums);
            });
            for (; i < end; i++) subtract(i, later + i * panel, sums);
        }
    }
};

// Scale and zero of all groups that are found here, of `count` rows: all rows of one kind at once.
template <int W>
struct Finding {
    static constexpr int64_t width = WIDTH<float, W>, all = ROWS<float, W>;
    using Vec = Vector<float, W>;
    const Block<float>& b;
    const int64_t first, count;

    INLINE void load(int64_t j, Vec (&to)[VECTORS<W>]) const {
        const float* from = b.block + j * b.rows + first;
        float padded[all];
        for (int64_t l = 0; l < all; l++) padded[l] = l < count ? from[l] : 0.0f;
        std::memcpy(to, count == all ? from : padded, sizeof to);
    }

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
        Vec low[VECTORS<W>], high[VECTORS<W>], seen[VECTORS<W>]{}, w[VECTORS<W>];
        load(start, low);
        std::memcpy(high, low, sizeof high);
        for (int64_t j = start; j < start + fit.width(); j++) {
            load(j, w);
            for (int v = 0; v < VECTORS<W>; v++) {
                low[v] = w[v] < low[v] ? w[v] : low[v];
                high[v] = w[v] > high[v] ? w[v] : high[v];
                seen[v] += w[v] * 0.0f;
            }
        }
        float lows[all], highs[all], sums[all];
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
};

}  // namespace
