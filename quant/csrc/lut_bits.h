// What blocks of lut_gemv_cuda.h, which says what for, have in shared memory, and how they make bits of x and tables.

#pragma once

#include <cmath>

#include "bit_products.h"

namespace {

constexpr int TILE = 32;                          // rows
constexpr int UNIT = 256;                         // columns
constexpr int MOST_TILES = 20, MOST_PARTS = 3;    // of a cluster; of a weight
constexpr int HELPERS = 8;                        // threads that share a row's kept weights
constexpr int HEAD = 256;                         // bytes: the largest x of each warp and row of x, sums of first values, a counter
constexpr int WORDS = UNIT / 32;                  // of a unit's columns
constexpr int APART = 36;                         // numbers from 32 columns' x to the next, so that lanes meet in no bank
constexpr int WARPS = 8, THREADS = 32 * WARPS;    // of a block
constexpr int MOST_RANKS = 8;                     // blocks of a cluster
constexpr int RING = 12 * 1024, SMALL = 8 * 1024;  // bytes of codes that a warp has place for

// Rows of x at a time, and bytes of a product's whole number: three where x is bfloat16, four where it is float32.
template <int ROWS_OF_X, int BYTES>
struct Form {
    static constexpr int M = ROWS_OF_X, P = BYTES;
    static constexpr int TOP = P == 3 ? 22 : 30;   // whole numbers are below 2^TOP
    static constexpr int COUNTS = P == 3 ? 2 : 3;  // numbers of 16 bits, but for the last, that a row's sum is
    // Of wider codes the operand of a unit's columns has more words than a lane has registers for.
    static constexpr int MOST_BITS = M == 1 ? 4 : P == 3 && M == 2 ? 3 : 2;
    // Whether terms of more than one bit of a code are two bytes, of steps of their own: below 2^15 of them.
    ANYWHERE static constexpr bool narrow(int bits) { return P == 3 && bits == 4; }
};

// Parities of a code's bits that there are, but for the empty one: first those of one bit each. Bytes of those before number i.
ANYWHERE constexpr int parities(int bits) { return (1 << bits) - 1; }
template <class F>
ANYWHERE constexpr int bytes_before(int bits, int i) {
    return i * F::P - (F::narrow(bits) && i > bits ? i - bits : 0);
}
template <class F>
ANYWHERE constexpr int bytes_of(int bits, int i) {
    return F::narrow(bits) && i >= bits ? 2 : F::P;
}
ANYWHERE constexpr int slot_words(int bits) { return TILE * UNIT / 32 * bits; }

struct Part {
    const uint32_t* words;    // [T, units, 256 bits]: quant/kernels/lut_gemv/fragments.py, as for the rest
    const float* values;      // [columns, 2^bits]
    const float* terms;       // [units, parities, 8, 8, 4]
    const float* firsts;      // [units, 256, 2]
    const float* crossed;     // [units, 256], where there are 4 bits: the largest term of more than one bit
    const int64_t* columns;   // ascending: those of all columns are not read
    int64_t count;            // columns
    int units;                // of a row
    int share, held;          // units of a block; those at a time
    int bits;
};

// Divides whole numbers below 2^11 times the divisor, whose product with it is below 2^20.
struct Divisor {
    uint32_t by, inverse;
    explicit Divisor(uint32_t d = 1) : by(d), inverse(((1u << 20) + d - 1) / d) {}
    BOTH int of(int v) const { return int(uint32_t(v) * inverse >> 20); }
};

struct Lut {
    Part part[MOST_PARTS];
    int parts;
    const int64_t* starts;    // of the rows' kept weights, or null
    const int32_t* kept;      // their columns
    const float* differences;
    Given given;
    void* out;
    int64_t rows;             // of the weight
    int tiles, group;         // of the weight; of a cluster
    int ring;                 // bytes
    int ranks, own;           // blocks of a cluster; rows of a group that one of them finishes
    Divisor by_own, by_tiles, by_last;  // the latter: tiles of the last cluster
};

BOTH int smaller(int a, int b) { return a < b ? a : b; }
BOTH int tiles_of(const Lut& a, const Place& at) { return smaller(a.group, a.tiles - int(at.cluster) * a.group); }

// Shared memory: head, sums [row of x, row of the group] in float32, those that arrive [rank, row of x, row of the rank], whole numbers
// [row of x, number, row of the group], rings, bits and x.
template <class F>
ANYWHERE constexpr int64_t fixed_bytes(int group, int ring) {
    return HEAD + F::M * group * TILE * 4 * (2 + F::COUNTS) + F::M * MOST_RANKS * 4 + int64_t(WARPS) * ring;
}
template <class F>
ANYWHERE constexpr int64_t unit_bytes(int bits) {
    return F::M * (4 * WORDS * APART + bytes_before<F>(bits, parities(bits)) * UNIT);
}

template <class F>
struct Shared {
    uint32_t* largest;  // [M, WARPS]
    uint32_t* crossed;  // [WARPS], of terms of more than one bit, if they are narrow
    int32_t* totals;    // [M, 2]: the lowest 15 bits, and the others
    uint64_t* counter;  // of bytes that other blocks send
    float* sums;
    float* arrived;
    int32_t* whole;
    uint32_t* rings;
    uint32_t* bits;     // [unit, parity, M, byte, 8 places of bits, 8 words]
    float* x;           // of a part, as is what follows
    int row_of_x;

    BOTH Shared(const Lut& a, void* memory) {
        char* const base = static_cast<char*>(memory);
        const int rows = F::M * a.group * TILE;
        largest = reinterpret_cast<uint32_t*>(base), crossed = largest + F::M * WARPS;
        totals = reinterpret_cast<int32_t*>(crossed + WARPS);
        counter = reinterpret_cast<uint64_t*>(base + HEAD) - 1;
        sums = reinterpret_cast<float*>(base + HEAD);
        arrived = sums + rows;
        whole = reinterpret_cast<int32_t*>(arrived + rows + F::M * MOST_RANKS);
        rings = reinterpret_cast<uint32_t*>(whole + F::COUNTS * rows);
        bits = rings + WARPS * (a.ring / 4);
    }
    BOTH Shared(const Lut& a, const Part& part, void* memory) : Shared(a, memory) {
        x = reinterpret_cast<float*>(bits + part.held * (bytes_before<F>(part.bits, parities(part.bits)) * F::M * 64));
        row_of_x = part.held * WORDS * APART;
    }

    BOTH uint32_t most_of(const uint32_t* warps) const {
        uint32_t most = 0;
        UNROLL for (int w = 0; w < WARPS; w++) most = warps[w] > most ? warps[w] : most;
        return most;
    }
    BOTH uint32_t largest_of(int m) const { return most_of(largest + m * WARPS); }
};

// 2^n, for n from -126 to 127; a number times 2^n for any n of twice that.
BOTH float power(int n) { return float_of(uint32_t(n + 127) << 23); }
BOTH float scaled(float v, int n) { return v * power(n / 2) * power(n - n / 2); }
BOTH int exponent_of(uint32_t bits) { return int(bits >> 23) - 127; }
BOTH bool finite(uint32_t largest) { return largest < 0x7f800000u; }

// The power of two that products are times, as whole numbers, by the largest of them: which is not to be rounded up to 2^TOP.
template <class F>
BOTH int steps(uint32_t largest) {
    const int n = F::TOP - 1 - exponent_of(largest + 2);
    return n < 126 ? n : 126;
}
// The most for narrow terms, of which none is to be rounded up to 2^15.
template <class F>
BOTH int most_narrow_steps(const Shared<F>& s) {
    return 14 - exponent_of(s.most_of(s.crossed) + 2);
}
// Of a part's terms, and of its narrow ones, whose steps are no finer than the others', and no coarser than 2^4 of them.
template <class F, int BITS>
BOTH int steps_of(const Shared<F>& s, int m) {
    const int n = steps<F>(s.largest_of(m));
    if constexpr (!F::narrow(BITS)) return n;
    return smaller(n, most_narrow_steps(s) + 4);
}
template <class F, int BITS>
BOTH int narrow_steps(const Shared<F>& s) {
    return smaller(most_narrow_steps(s), steps_of<F, BITS>(s, 0));
}

// The whole number nearest a product, below 2^TOP. Of three bytes it is the lowest 23 bits, less 2^22, of a sum that has no bits behind
// them: the word that stands for the highest bit then counts all numbers.
template <class F>
BOTH uint32_t shifted(float a, float b) {
    static_assert(F::P == 3, "23 bits");
#if defined(__CUDA_ARCH__)
    return bits_of(__fmaf_rn(a, b, 12582912.f));
#else
    return bits_of(std::fmaf(a, b, 12582912.f));
#endif
}
template <class F>
BOTH int32_t nearest(float a, float b) {
    if constexpr (F::P == 3) {
        return int32_t(shifted<F>(a, b) - 0x4b400000u);
    } else {
#if defined(__CUDA_ARCH__)
        return __float2int_rn(__fmul_rn(a, b));
#else
        return std::fabs(a * b) < 2147483648.f ? int32_t(std::nearbyintf(a * b)) : 0;
#endif
    }
}

// Of some columns of a row of x, as it is given; zeros beyond the last row.
template <class F, int N>
BOTH void load_x(float (&to)[N], const Given& from, int64_t row, const int (&column)[N]) {
    if (row < from.count) {
        if constexpr (F::P == 3) {
            const uint16_t* x = static_cast<const uint16_t*>(from.x) + row * from.k;
            UNROLL for (int i = 0; i < N; i++) to[i] = float_of(uint32_t(x[column[i]]) << 16);
        } else {
            const float* x = static_cast<const float*>(from.x) + row * from.k;
            UNROLL for (int i = 0; i < N; i++) to[i] = x[column[i]];
        }
    } else {
        UNROLL for (int i = 0; i < N; i++) to[i] = 0.f;
    }
}

// Terms of tables that a thread makes bits of: 32 columns of a parity, those of its first turns ahead of their use.
template <class F, int BITS>
struct Terms {
    static constexpr int N = parities(BITS), AHEAD = BITS == 2 || F::P == 4 ? 1 : 2;
    Four v[AHEAD][8];

    BOTH void load_one(Four (&to)[8], const Part& part, int first, int count, int at) {
        if (at >= count * N * WORDS) {
            UNROLL for (int j = 0; j < 8; j++) to[j] = {};  // so that those of a turn before do not take registers until then
            return;
        }
        const Four* from = reinterpret_cast<const Four*>(part.terms) + (first * N + at / WORDS) * (UNIT / 4) + at % WORDS;
        UNROLL for (int j = 0; j < 8; j++) to[j] = from[j * WORDS];
    }
    BOTH void load(const Part& part, int first, int count, int thread) {
        UNROLL for (int t = 0; t < AHEAD; t++) load_one(v[t], part, first, count, thread + t * THREADS);
    }
    // Into the second-level cache, of `all` units what comes after those.
    BOTH void fetch_rest(const Part& part, int first, int count, int all, int thread) const {
        const int done = smaller(count * N * WORDS, AHEAD * THREADS);
        NO_UNROLL for (int i = thread + done; i < all * N * WORDS; i += THREADS) fetch(part.terms + first * (N * UNIT) + i * 32);
    }
};

// Where x of a column lies.
ANYWHERE constexpr int place_of(int i) { return i / 32 * APART + i % 32; }

// The largest of a warp.
BY_A_WARP BOTH void keep_largest(uint32_t* to, uint32_t v, int thread) {
#if defined(__CUDA_ARCH__)
    v = __reduce_max_sync(~0u, v);
    if (thread % 32 == 0) *to = v;
#else
    if (thread % 32 == 0 || v > *to) *to = v;
#endif
}

// x of a block's columns: the largest product, if that is `wanted`, and of the first `kept` units x itself. Zeros beyond the last column.
// `before()`: when all is under way but for x; `beside()`: when x is.
template <class F, int BITS, class Before, class Beside>
BOTH void take_inputs(const Lut& a, const Place& at, const Part& part, int first, int count, int kept, bool wanted, void* shared,
                      int given, const Before& before, const Beside& beside) {
    const int thread = anew(given);
    constexpr int BATCH = F::M == 1 ? 8 : 4;  // columns whose x is under way together
    const Shared<F> s(a, part, shared);
    const int made = count * UNIT, own = smaller(made, int(part.count) - first * UNIT);
    uint32_t most[F::M] = {}, most_crossed = 0;
    int begin = thread;
    do {
        float x[F::M][BATCH], scale[BATCH], size[BATCH] = {}, crossed[BATCH] = {};
        int column[BATCH];  // no load waits for a branch: beyond the last column that one is read
        UNROLL for (int b = 0; b < BATCH; b++) column[b] = smaller(first * UNIT + begin + b * THREADS, int(part.count) - 1);
        if (wanted) {
            UNROLL for (int b = 0; b < BATCH; b++) size[b] = part.firsts[2 * column[b]];
            if constexpr (F::narrow(BITS)) {
                UNROLL for (int b = 0; b < BATCH; b++) crossed[b] = part.crossed[column[b]];
            }
        }
        if (part.count != a.given.k) {
            UNROLL for (int b = 0; b < BATCH; b++) column[b] = int(part.columns[column[b]]);
        }
        if (begin == thread) before();
        UNROLL for (int m = 0; m < F::M; m++) load_x<F>(x[m], a.given, at.first_row + m, column);
        if (a.given.scale != nullptr) {
            UNROLL for (int b = 0; b < BATCH; b++) scale[b] = a.given.scale[column[b]];
        }
        if (begin == thread) beside();
        if (a.given.scale != nullptr) {
            UNROLL for (int b = 0; b < BATCH; b++) {
                UNROLL for (int m = 0; m < F::M; m++) x[m][b] /= scale[b];
            }
        }
        float* to = s.x + place_of(begin);
        UNROLL for (int b = 0; b < BATCH; b++) {
            const int i = begin + b * THREADS;
            UNROLL for (int m = 0; m < F::M; m++) {
                const float v = i < own ? x[m][b] : 0.f;
                if (i < kept * UNIT) to[m * s.row_of_x + b * place_of(THREADS)] = v;
                const uint32_t product = bits_of(v * size[b]) & 0x7fffffffu;
                most[m] = product > most[m] ? product : most[m];
            }
            if constexpr (F::narrow(BITS)) {
                const uint32_t product = bits_of((i < own ? x[0][b] : 0.f) * crossed[b]) & 0x7fffffffu;
                most_crossed = product > most_crossed ? product : most_crossed;
            }
        }
        begin += BATCH * THREADS;
    } while (begin < made);
    UNROLL for (int m = 0; m < F::M; m++) {
        if (wanted) keep_largest(s.largest + m * WARPS + warp_of(thread), most[m], thread);
    }
    if constexpr (F::MOST_BITS == 4) {
        if (wanted) keep_largest(s.crossed + warp_of(thread), most_crossed, thread);
    }
}

// Bits of x times 32 columns' terms of a parity, of this many bytes: of two those of a number, the highest as a sign.
template <class F>
BOTH void make_bits(uint32_t* to, const float* from, const Four (&terms)[8], float step, int parity, int bytes) {
    const Four* x = reinterpret_cast<const Four*>(from);
    uint32_t whole[32], made[8 * F::P];
    UNROLL for (int j = 0; j < 8; j++) {
        const Four four = x[j];
        UNROLL for (int e = 0; e < 4; e++) {
            if constexpr (F::P == 3) {
                whole[4 * j + e] = shifted<F>(four.v[e] * step, terms[j].v[e]);
            } else {
                whole[4 * j + e] = uint32_t(nearest<F>(four.v[e] * step, terms[j].v[e]));
            }
        }
    }
    transpose<F::P>(made, whole);
    if constexpr (F::P == 3) made[23] = ~0u;
    UNROLL for (int n = 0; n < 8 * F::P; n++) {
        if (n < 16 || n < 8 * bytes) to[n / 8 * 64 + (n % 8 ^ parity % 8) * 8] = made[n];
    }
}

// Bits of x times tables' terms: a thread has 32 columns of a parity. And sums of first values.
template <class F, int BITS>
BOTH void take_bits(const Lut& a, const Part& part, int first, int count, Terms<F, BITS>& terms, void* shared, int given) {
    const int thread = anew(given);
    constexpr int N = parities(BITS), BATCH = 8, AHEAD = Terms<F, BITS>::AHEAD;
    const Shared<F> s(a, part, shared);
    float step[F::M], narrow = 0.f;  // of all terms, and of narrow ones
    UNROLL for (int m = 0; m < F::M; m++) step[m] = power(steps_of<F, BITS>(s, m));  // of what is not finite, too: `give` drops that
    if constexpr (F::narrow(BITS)) narrow = power(narrow_steps<F, BITS>(s));
    const float* values = part.firsts + first * (2 * UNIT) + 1;
    float value[BATCH] = {};
    UNROLL for (int b = 0; b < BATCH; b++) {
        if (b < count) value[b] = values[2 * (thread + b * THREADS)];
    }
    const int all = count * N * WORDS;
    NO_UNROLL for (int begin = thread; begin < all; begin += AHEAD * THREADS) {
        UNROLL for (int t = 0; t < AHEAD; t++) {
            const int i = begin + t * THREADS;
            if (i >= all) break;
            const int word = i % WORDS, which = i / WORDS, unit = which / N, parity = which % N;
            const int bytes = bytes_of<F>(BITS, parity);
            int before = which * F::P;
            if constexpr (F::narrow(BITS)) before = unit * bytes_before<F>(BITS, N) + bytes_before<F>(BITS, parity);
            UNROLL for (int m = 0; m < F::M; m++) {
                uint32_t* to = s.bits + (before * F::M + m * bytes) * 64 + word % 4 * 2 + word / 4;
                const float by = F::narrow(BITS) && parity >= BITS ? narrow : step[m];
                make_bits<F>(to, s.x + m * s.row_of_x + (unit * WORDS + word) * APART, terms.v[t], by, parity, bytes);
            }
            terms.load_one(terms.v[t], part, first, count, i + AHEAD * THREADS);
        }
    }
    int32_t low[F::M] = {}, high[F::M] = {};
    static_assert(THREADS == UNIT, "a thread has a column of each unit");
    NO_UNROLL for (int begin = 0; begin < count; begin += BATCH) {
        UNROLL for (int b = 0; b < BATCH; b++) {
            if (begin + b >= count) break;
            if (begin > 0) value[b] = values[2 * (thread + (begin + b) * THREADS)];
            UNROLL for (int m = 0; m < F::M; m++) {
                const int32_t q = nearest<F>(s.x[m * s.row_of_x + place_of(thread) + (begin + b) * place_of(THREADS)] * step[m], value[b]);
                low[m] += q & 32767, high[m] += q >> 15;
            }
        }
    }
    UNROLL for (int m = 0; m < F::M; m++) add_all(s.totals + 2 * m, low[m]), add_all(s.totals + 2 * m + 1, high[m]);
}

// Sums of whole numbers, before each part.
template <class F>
BOTH void clear(const Lut& a, void* shared, int thread) {
    const Shared<F> s(a, shared);
    if (thread < F::M * 2) s.totals[thread] = 0;
    NO_UNROLL for (int i = thread; i < F::M * F::COUNTS * a.group * TILE; i += THREADS) s.whole[i] = 0;
}

}  // namespace
