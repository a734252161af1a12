// A few rows of x [M, K] times a weight [N, K] of 2, 3, 4 or 8 bits, transposed: out [M, N].
// The twin of quant/kernels/wq_gemv/reference.py.
//
// Plain C ABI. words and ranges are laid out as `Packed` in quant/kernels/wq_gemv/__init__.py says; x and out are row after row. columns is
// a multiple of 32, and so is the number of them that a group has. threads >= 1: rows of the weight are independent of each other.
//
// Codes are masked out of their words and stay where they are in them: read as a number that is the code times a power of two, and x was
// divided by the same power before. Both are exact, so that eight weights cost one AND, one conversion and one multiply-add, and no shift.
// A row is added up in one order, whatever stands beside it: groups by 8 lanes, then the groups, then the lanes.

#include "products.h"

namespace {

constexpr int ROWS = 8;
constexpr int STEP = 4;       // vectors of a row: the fewest that share a scale
constexpr int AHEAD = 2048;   // bytes: how far before their use words are fetched
constexpr int64_t RUN = 4;    // neighbouring tiles that one thread takes together

// What one word of each lane holds, or three words where codes have 3 bits.
constexpr int words_of(int bits) { return bits == 3 ? 3 : 1; }
constexpr int vectors_of(int bits) { return 32 * words_of(bits) / bits; }
constexpr int size_of(int bits) { return words_of(bits) * ROWS * LANES; }
// The power of two that code `v` of a lane comes out multiplied by. The last one of a word would reach the sign: it is shifted.
constexpr int power(int bits, int v) {
    if (bits == 3) return v < 30 ? 3 * (v % 10) : 0;
    return v < vectors_of(bits) - 1 ? bits * v : 0;
}

INLINE Words at(const uint32_t* unit, int word, int row) { return load(unit + (word * ROWS + row) * LANES); }

template <int BITS, int V>
INLINE Floats codes(const uint32_t* unit, int row) {
    Words code;
    if constexpr (BITS == 3 && V >= 30)
        code = (at(unit, V - 30, row) >> 30u) | ((at(unit, 2, row) >> uint32_t(V - 2)) & 4u);
    else if constexpr (BITS == 3)
        code = at(unit, V / 10, row) & (7u << power(BITS, V));
    else if constexpr (V < vectors_of(BITS) - 1)
        code = at(unit, 0, row) & (((1u << BITS) - 1u) << power(BITS, V));
    else
        code = at(unit, 0, row) >> uint32_t(32 - BITS);
    return __builtin_convertvector((Ints)code, Floats);
}

struct Call {
    const uint32_t* words;
    const float* ranges;
    int64_t rows, columns, groups, bits, count;
    float* out;
    int64_t units, flush;  // flush: STEPs of vectors after which sums are multiplied by their scale
    const float *x, *sums;  // by `spread`

    int64_t width() const { return units * vectors_of(bits) * LANES; }
    // Rows of x that are taken together, of those from `m` on.
    int64_t together(int64_t m) const { return count - m < 3 ? 1 : 4; }
};

// x as `sweep` reads it: for each part of rows taken together [width / 8][rows][8], divided by the codes' powers of two, and its sums over
// what is added up between two scales, lane by lane. Rows and columns that there are not are zeros.
void spread(const Call& c, const float* given, float* x, float* sums) {
    const int vectors = vectors_of(int(c.bits)), chunk = STEP * int(c.flush);
    float factor[32];
    for (int v = 0; v < vectors; v++) factor[v] = 1.0f / float(1u << power(int(c.bits), v));
    for (int64_t m = 0, wide; m < c.count; m += wide) {
        wide = c.together(m);
        for (int64_t first = 0; first < c.width() / LANES; first += chunk, sums += wide * LANES) {
            for (int64_t i = 0; i < wide; i++) {
                Floats all{};
                for (int64_t v = first; v < first + chunk; v++) {
                    Floats own{};
                    if (m + i < c.count && v * LANES < c.columns) own = load(given + (m + i) * c.columns + v * LANES);
                    all += own;
                    own = own * factor[v % vectors];
                    std::memcpy(x + (v * wide + i) * LANES, &own, sizeof own);
                }
                std::memcpy(sums + i * LANES, &all, sizeof all);
            }
        }
        x += c.width() * wide;
    }
}

// Scales of a tile's groups, one after the other.
struct Groups {
    const float *now, *const last;
    int64_t left;
    const int64_t every;  // sums that belong to a group

    INLINE void next() {
        if (--left > 0) return;
        left = every;
        // Beyond the last column everything is zero.
        now += now == last ? 0 : 2 * ROWS;
        __builtin_prefetch(now + 16 * 2 * ROWS);
    }
};

// M rows of x and as many rows of a tile as there are registers for eight sums.
template <int BITS, int FLUSH, int M>
struct Sweep {
    static constexpr int own = ROWS / M, held = vectors_of(BITS), chunk = STEP * FLUSH, span = std::max(held, chunk);
    using Sums = Floats[own][M];

    static INLINE void clear(Sums& sums) {
        UNROLL for (int r = 0; r < own; r++) {
            UNROLL for (int m = 0; m < M; m++) sums[r][m] = Floats{};
        }
    }

    template <int V>
    static INLINE void vectors(const uint32_t* words, const float* x, const float* sums, Groups& groups, Sums& part, Sums& total) {
        if constexpr (V < span) {
            const uint32_t* unit = words + V / held * size_of(BITS);
            if constexpr (V % held == 0) {
                UNROLL for (int line = 0; line < size_of(BITS) / 16; line++) __builtin_prefetch(unit + AHEAD / 4 + 16 * line);
            }
            if constexpr (V % chunk == 0) clear(part);
            Floats given[M];
            UNROLL for (int m = 0; m < M; m++) given[m] = load(x + (V * M + m) * LANES);
            UNROLL for (int r = 0; r < own; r++) {
                const Floats code = codes<BITS, V % held>(unit, r);
                UNROLL for (int m = 0; m < M; m++) part[r][m] += code * given[m];
            }
            if constexpr (V % chunk == chunk - 1) {
                UNROLL for (int r = 0; r < own; r++) {
                    const float scale = groups.now[r], offset = groups.now[ROWS + r];
                    UNROLL for (int m = 0; m < M; m++) {
                        total[r][m] += part[r][m] * scale;
                        total[r][m] += load(sums + (V / chunk * M + m) * LANES) * offset;
                    }
                }
                groups.next();
            }
            vectors<V + 1>(words, x, sums, groups, part, total);
        }
    }

    // Rows `first` .. of tile `t`, rows `m` .. of x.
    static INLINE void run(const Call& c, int64_t t, int first, int64_t m, const float* x, const float* sums) {
        const uint32_t* words = c.words + t * c.units * size_of(BITS) + first * LANES;
        const float* ranges = c.ranges + t * c.groups * 2 * ROWS + first;
        const int64_t every = c.columns / c.groups / (chunk * LANES);
        Groups groups{ranges, ranges + (c.groups - 1) * 2 * ROWS, every, every};
        Sums part, total;
        clear(total);
        for (int64_t v = 0; v < c.units * held; v += span) {
            vectors<0>(words, x, sums, groups, part, total);
            words += span / held * size_of(BITS);
            x += span * M * LANES;
            sums += span / chunk * M * LANES;
        }
        float lanes[own][M];
        UNROLL for (int r = 0; r < own; r++) {
            UNROLL for (int i = 0; i < M; i++) lanes[r][i] = sum(total[r][i]);
        }
        const int64_t row = t * ROWS + first;
        for (int i = 0; i < M && m + i < c.count; i++)
            for (int r = 0; r < own && row + r < c.rows; r++) c.out[(m + i) * c.rows + row + r] = lanes[r][i];
    }
};

template <int BITS, int FLUSH>
INLINE void tile(const Call& c, int64_t t) {
    const float *x = c.x, *sums = c.sums;
    for (int64_t m = 0, wide; m < c.count; m += wide) {
        wide = c.together(m);
        if (wide == 1)
            Sweep<BITS, FLUSH, 1>::run(c, t, 0, m, x, sums);
        else
            for (int first = 0; first < ROWS; first += ROWS / 4) Sweep<BITS, FLUSH, 4>::run(c, t, first, m, x, sums);
        x += c.width() * wide;
        sums += c.width() / (STEP * FLUSH) * wide;
    }
}

using Tile = void (*)(const Call&, int64_t);

// Without multiply-add one kind of step is enough: it suits every group.
template <int BITS>
void plain(const Call& c, int64_t t) {
    tile<BITS, 1>(c, t);
}
#if defined(FUSED)
template <int BITS, int FLUSH>
FUSED void fused(const Call& c, int64_t t) {
    tile<BITS, FLUSH>(c, t);
}
#endif

template <int BITS>
Tile chosen(Call& c) {
#if defined(FUSED)
    if (HAS_FUSED) {
        const int64_t steps = c.columns / c.groups / (STEP * LANES);
        c.flush = steps % 4 == 0 ? 4 : steps % 2 == 0 ? 2 : 1;
        return c.flush == 4 ? fused<BITS, 4> : c.flush == 2 ? fused<BITS, 2> : fused<BITS, 1>;
    }
#endif
    c.flush = 1;
    return plain<BITS>;
}

// The weight itself: of row `row` of a tile the columns of a unit from `first` on. own: scale and offset of the group, of `width` columns.
template <int BITS, int V>
INLINE void decode(const uint32_t* unit, int row, int64_t first, int64_t columns, int64_t width, const float* ranges, const float* own,
                   float* to) {
    if constexpr (V < vectors_of(BITS)) {
        const int64_t column = first + V * LANES;
        if (column >= columns) return;
        if constexpr (V % STEP == 0) own = ranges + column / width * 2 * ROWS + row;
        constexpr float factor = 1.0f / float(1u << power(BITS, V));
        const Floats value = codes<BITS, V>(unit, row) * factor * own[0] + own[ROWS];
        std::memcpy(to + column, &value, sizeof value);
        decode<BITS, V + 1>(unit, row, first, columns, width, ranges, own, to);
    }
}

template <int BITS>
INLINE void decode_tile(const Call& c, int64_t t) {
    const int64_t columns = vectors_of(BITS) * LANES;
    for (int row = 0; row < ROWS && t * ROWS + row < c.rows; row++)
        for (int64_t u = 0; u < c.units; u++)
            decode<BITS, 0>(c.words + (t * c.units + u) * size_of(BITS), row, u * columns, c.columns, c.columns / c.groups,
                            c.ranges + t * c.groups * 2 * ROWS, nullptr, c.out + (t * ROWS + row) * c.columns);
}

template <int BITS>
void plain_decode(const Call& c, int64_t t) {
    decode_tile<BITS>(c, t);
}
#if defined(FUSED)
template <int BITS>
FUSED void fused_decode(const Call& c, int64_t t) {
    decode_tile<BITS>(c, t);
}
#endif

template <int BITS>
Tile chosen_decode() {
#if defined(FUSED)
    if (HAS_FUSED) return fused_decode<BITS>;
#endif
    return plain_decode<BITS>;
}

}  // namespace

// The weight [N, K] that the words stand for.
extern "C" void bitgrid_wq_values(const uint32_t* words, const float* ranges, float* out, int64_t rows, int64_t columns, int64_t groups,
                                  int64_t bits, int64_t threads) {
    Call c{words, ranges, rows, columns, groups, bits, 0, out, 0, 1, nullptr, nullptr};
    const int64_t unit = vectors_of(int(bits)) * LANES;
    c.units = (columns + unit - 1) / unit;
    const Tile one = bits == 2 ? chosen_decode<2>() : bits == 3 ? chosen_decode<3>() : bits == 4 ? chosen_decode<4>() : chosen_decode<8>();
    each((rows + ROWS - 1) / ROWS, RUN, std::min(threads, rows * columns * 4 / LEAST), [&](int64_t t) { one(c, t); });
}

extern "C" void bitgrid_wq_gemv(const uint32_t* words, const float* ranges, const float* x, float* out, int64_t rows, int64_t columns,
                                int64_t groups, int64_t bits, int64_t count, int64_t threads) {
    Call c{words, ranges, rows, columns, groups, bits, count, out, 0, 1, nullptr, nullptr};
    const int64_t unit = vectors_of(int(bits)) * LANES, tiles = (rows + ROWS - 1) / ROWS;
    c.units = (columns + unit - 1) / unit;
    const Tile one = bits == 2 ? chosen<2>(c) : bits == 3 ? chosen<3>(c) : bits == 4 ? chosen<4>(c) : chosen<8>(c);
    int64_t wide = 0;
    for (int64_t m = 0; m < count; m += c.together(m)) wide += c.together(m);
    const int64_t inputs = wide * c.width();
    std::vector<float> memory(inputs + inputs / (STEP * c.flush) + 16);
    // On a line of the caches, so that no load needs two of them.
    float* const to = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
    spread(c, x, to, to + inputs);
    c.x = to, c.sums = to + inputs;
    const int64_t bytes = tiles * c.units * size_of(int(bits)) * 4 * count;
    each(tiles, RUN, std::min(threads, bytes / LEAST), [&](int64_t t) { one(c, t); });
}
