// A warp of lut_gemv_cuda.h: unit after unit of columns of a turn, each with tiles of rows.

#pragma once

#include "lut_bits.h"

namespace {

// Of two numbers the first in lanes without this bit of their number, else the second: the sum of that of both lanes that differ in it.
template <int STEP>
BOTH void halve(int32_t (&first)[HELD], const int32_t (&second)[HELD], int thread) {
#if defined(__CUDA_ARCH__)
    const bool later = (thread & STEP) != 0;
    const int32_t kept = later ? second[0] : first[0], given = later ? first[0] : second[0];
    first[0] = kept + __shfl_xor_sync(~0u, given, STEP);
#else
    int32_t made[HELD];
    EACH_LANE made[h] = (LANE & STEP) != 0 ? second[h] + second[h ^ STEP] : first[h] + first[h ^ STEP];
    EACH_LANE first[h] = made[h];
#endif
}

ANYWHERE constexpr int ones(int v) { return v == 0 ? 0 : v % 2 + ones(v / 2); }

// The subsets of a code's bits that have a parity, in the order of products: first those with the lowest bit, then of the rest those with
// the next one, and so on, so that planes are done with one after another.
ANYWHERE constexpr int subset_at(int bits, int i) {
    constexpr int two[] = {1, 3, 2}, three[] = {1, 3, 7, 5, 6, 2, 4}, four[] = {1, 3, 7, 5, 13, 15, 11, 9, 10, 14, 6, 2, 4, 12, 8};
    return bits == 2 ? two[i] : bits == 3 ? three[i] : four[i];
}
// The bit that no subset has from the one after number i on, if it is in that one; or -1.
ANYWHERE constexpr int done_at(int bits, int i) {
    for (int b = 0; b < bits; b++) {
        if (i == parities(bits) - (1 << (bits - 1 - b))) return b;
    }
    return -1;
}

// Where terms of a subset are kept: first those of one bit, then the others.
ANYWHERE constexpr int kept_at(int bits, int subset) {
    int highest = 0;
    while (subset >> highest > 1) highest++;
    return ones(subset) == 1 ? highest : bits + subset - 2 - highest;
}

// Units `first` and on, of which bits are at hand, with all tiles: a warp has a run of (unit, tile) in that order. A lane reads of codes
// what it copied itself.
template <class F, int BITS>
struct Sweep {
    static constexpr int SLOT = slot_words(BITS), N = parities(BITS), ALL = bytes_before<F>(BITS, N);
    static constexpr bool NARROW = F::narrow(BITS);
    static_assert(SMALL / 4 / SLOT >= 2, "one place is read while another is written");
    using Bits = uint32_t[N][F::M][F::P][HELD][2];
    using Planes = uint32_t[2][BITS][HELD][4];
    struct Sums {
        int32_t of[F::M][F::P][2][HELD][4];
        int32_t crossed[NARROW ? 2 : 1][2][HELD][4];  // of narrow terms, if there are any
    };
    struct Half {
        int32_t low[2][2][HELD], high[2][2][HELD];
    };
    using Halves = Half[F::M];
    // Where there are registers for it, codes are read in the item's time before theirs, and sums go to shared memory in the next one's.
    static constexpr bool AHEAD = F::P == 3 ? F::M < 4 : BITS < 4, LATE = F::M == 1 && F::P == 3;
    int thread, tiles, depth;   // depth: places of the ring
    int todo, unit, tile;       // items to be done, and the next one
    int place;                  // of the next one in the ring
    int left, ahead;            // items to be fetched, and the tile of the next one
    int step, jump;             // words from a tile to the next one, and from the one after the last to the next unit
    int narrow;                 // steps of the others that one of narrow terms is
    const uint32_t* from;       // codes of the next item to be fetched
    uint32_t* ring;

    BOTH void begin(const Lut& a, const Place& at, const Part& part, int first, int units, void* shared, int given) {
        thread = anew(given), tiles = tiles_of(a, at), depth = a.ring / (4 * SLOT);
        const int warp = warp_of(thread), items = tiles * units, item = items * warp / WARPS;
        todo = left = items * (warp + 1) / WARPS - item;
        unit = (tiles == a.group ? a.by_tiles : a.by_last).of(item), tile = ahead = item - unit * tiles, place = 0;
        step = part.units * SLOT, jump = SLOT - tiles * step;
        from = part.words + ((at.cluster * a.group + tile) * part.units + first + unit) * SLOT;
        ring = Shared<F>(a, shared).rings + warp * (a.ring / 4);
    }

    BOTH void fetch_next() {
        if (left > 0) {
            uint32_t* const to = ring + place * SLOT;
            EACH_LANE {
                UNROLL for (int c = 0; c < 2 * BITS; c++) send<4>(to + c * 128 + LANE * 4, from + c * 128 + LANE * 4);
            }
        }
        sent();
        left--, from += step;
        if (++ahead == tiles) ahead = 0, from += jump;
        if (++place == depth) place = 0;
    }

    // As many items as the ring has places, or those from number `begun` on, or up to there.
    BOTH void open(int begun, int last) {
        if (HELD > 1 && thread % 32 != 0) return;
        for (int i = begun; i < last; i++) fetch_next();
    }

    // Items follow each other without a pause of the products: while those of one are made, the planes of the next one come to where no
    // more subset needs this one's, and the sums of the one before go to shared memory.
    BOTH void run(const Lut& a, void* shared) {
        if ((HELD > 1 && thread % 32 != 0) || todo == 0) return;
        const Shared<F> s(a, shared);
        thread = anew(thread);
        if constexpr (NARROW) narrow = 1 << (steps_of<F, BITS>(s, 0) - narrow_steps<F, BITS>(s));
        a.ring == RING ? run_through<RING>(s, a.group * TILE) : run_through<SMALL>(s, a.group * TILE);
    }

    template <int BYTES>
    BOTH void run_through(const Shared<F>& s, int rows) {
        constexpr int LEFT = BYTES / 4 / SLOT - 1, HALF = 1 << (BITS - 1);  // subsets with the lowest bit
        Bits bits;
        Planes plane;
        uint32_t parity[2][HELD][4];
        Sums before = {};
        int32_t* to = s.whole + tile * TILE;  // the first item adds zeros
        if constexpr (AHEAD) read_all<LEFT>(plane);
        NO_UNROLL for (; todo > 0; unit++, tile = 0) {
            take(bits, s.bits + unit * (ALL * F::M * 64));
            const int last = smaller(tiles, tile + todo);
            todo -= last - tile;
            if constexpr (!AHEAD) {
                NO_UNROLL for (; tile < last; tile++) {
                    Sums sum = {};
                    add_subsets<0, N, LEFT>(sum, bits, plane, parity, before, to, rows);
                    put(sum, s.whole + tile * TILE, rows);
                }
                continue;
            }
            // From the middle of an item to that of the next one, so that what is read is used in the same turn.
            Sums sum = {};
            add_subsets<0, HALF, LEFT>(sum, bits, plane, parity, before, to, rows);
            to = s.whole + tile * TILE;
            NO_UNROLL while (++tile < last) {
                add_subsets<HALF, N, LEFT>(sum, bits, plane, parity, before, to, rows);
                if constexpr (!LATE) put(sum, to, rows);
                before = sum, sum = {};
                add_subsets<0, HALF, LEFT>(sum, bits, plane, parity, before, to, rows);
                to += TILE;
            }
            add_subsets<HALF, N, LEFT>(sum, bits, plane, parity, before, to, rows);
            if constexpr (!LATE) put(sum, to, rows);
            before = sum;
        }
        if constexpr (LATE) put(before, to, rows);
    }

    BOTH void take(Bits& bits, const uint32_t* from) const {
        UNROLL for (int i = 0; i < N; i++) {
            UNROLL for (int m = 0; m < F::M; m++) {
                UNROLL for (int p = 0; p < bytes_of<F>(BITS, i); p++) {
                    EACH_LANE {
                        const int place = (bytes_before<F>(BITS, i) * F::M + m * bytes_of<F>(BITS, i) + p) * 64 + (LANE ^ i % 8 * 4) * 2;
                        const auto line = *reinterpret_cast<const Line<2>*>(from + place);
                        bits[i][m][p][h][0] = line.v[0], bits[i][m][p][h][1] = line.v[1];
                    }
                }
            }
        }
    }

    // Of a bit of the codes.
    BOTH void read(Planes& plane, int bit) const {
        EACH_LANE {
            UNROLL for (int t = 0; t < 2; t++) {
                const auto line = *reinterpret_cast<const Line<4>*>(ring + place * SLOT + (t * BITS + bit) * 128 + LANE * 4);
                UNROLL for (int j = 0; j < 4; j++) plane[t][bit][h][j] = line.v[j];
            }
        }
    }

    template <int LEFT>
    BOTH void read_all(Planes& plane) {
        arrived<LEFT>();
        UNROLL for (int b = 0; b < BITS; b++) read(plane, b);
        fetch_next();  // into the place that was read
    }

    // Subsets I to END - 1 of an item. With the first ones go the sums of the item before, to shared memory; planes that no more subset
    // needs become the next item's. After a warp's last item come some that nobody uses.
    template <int I, int END, int LEFT>
    BOTH void add_subsets(Sums& sum, const Bits& bits, Planes& plane, uint32_t (&parity)[2][HELD][4], const Sums& before, int32_t* to,
                          int rows) {
        Halves halves;
        if constexpr (!AHEAD && I == 0) read_all<LEFT>(plane);
        add_from<I, END, LEFT>(sum, bits, plane, parity, before, halves, to, rows);
        if constexpr (AHEAD && END == N) fetch_next();
    }
    template <int I, int END, int LEFT>
    BOTH void add_from(Sums& sum, const Bits& bits, Planes& plane, uint32_t (&parity)[2][HELD][4], const Sums& before, Halves& halves,
                       int32_t* to, int rows) {
        constexpr int SUBSET = subset_at(BITS, I), KEPT = kept_at(BITS, SUBSET), DONE = done_at(BITS, I - 1);
        constexpr int BYTES = bytes_of<F>(BITS, KEPT);
        constexpr bool FRESH = ones(SUBSET) < 4;
        constexpr int CHANGED = FRESH ? SUBSET : SUBSET ^ subset_at(BITS, I - (I > 0));
        if constexpr (AHEAD && DONE == 0) arrived<LEFT>();
        if constexpr (AHEAD && DONE >= 0) read(plane, DONE);
        UNROLL for (int t = 0; t < 2; t++) {
            EACH_LANE {
                UNROLL for (int j = 0; j < 4; j++) {
                    uint32_t odd = FRESH ? 0 : parity[t][h][j];
                    UNROLL for (int b = 0; b < BITS; b++) {
                        if ((CHANGED >> b & 1) != 0) odd ^= plane[t][b][h][j];
                    }
                    parity[t][h][j] = odd;
                }
            }
        }
        UNROLL for (int m = 0; m < F::M; m++) {
            UNROLL for (int p = 0; p < BYTES; p++) {
                UNROLL for (int t = 0; t < 2; t++) {
                    multiply_bits((BYTES < F::P ? sum.crossed[p % 2] : sum.of[m][p])[t], parity[t], bits[KEPT][m][p]);
                }
            }
        }
        if constexpr (LATE && I == 0) join(halves, before);
        if constexpr (LATE && I == 1) halve_once(halves);
        if constexpr (LATE && I == (BITS == 2 ? 1 : 2)) halve_again(halves, to, rows);
        if constexpr (AHEAD && I + 1 == N) read(plane, BITS - 1);
        if constexpr (I + 1 < END) add_from<I + 1, END, LEFT>(sum, bits, plane, parity, before, halves, to, rows);
    }

    // A lane has two neighbouring bits of a byte of four rows (for the highest of all see lut_gemv_cuda.h), and ends with all bits of one.
    // No sum of an item has more than 28 bits: 256 (2^BITS - 1) numbers of 16; 31 with narrow ones, times 2^4, of which 8 a column count.
    BOTH void put(const Sums& sum, int32_t* to, int rows) const {
        Halves halves;
        join(halves, sum);
        halve_once(halves);
        halve_again(halves, to, rows);
    }
    BOTH void join(Halves& halves, const Sums& sum) const {
        UNROLL for (int m = 0; m < F::M; m++) {
            UNROLL for (int t = 0; t < 2; t++) {
                UNROLL for (int half = 0; half < 2; half++) {
                    EACH_LANE {
                        const int last = LANE % 4 < 3 ? 2 : F::P == 3 ? -1 : -2, times = 1 << LANE % 4 * 2;
                        const auto two = [&](const int32_t (&d)[4], int by) { return d[2 * half] + by * d[2 * half + 1]; };
                        const auto& of = sum.of[m];
                        int32_t low = (two(of[0][t][h], 2) + two(of[1][t][h], 2) * 256) * times;
                        if constexpr (NARROW) {
                            const int sign = LANE % 4 < 3 ? 2 : -2;
                            low += (two(sum.crossed[0][t][h], 2) + two(sum.crossed[1][t][h], sign) * 256) * (times * narrow);
                        }
                        halves[m].low[t][half][h] = low;
                        if constexpr (F::P == 3) {
                            halves[m].high[t][half][h] = two(of[2][t][h], last) * times;
                        } else {
                            halves[m].high[t][half][h] = (two(of[2][t][h], 2) + two(of[F::P - 1][t][h], last) * 256) * times;
                        }
                    }
                }
            }
        }
    }
    BOTH void halve_once(Halves& halves) const {
        UNROLL for (int m = 0; m < F::M; m++) {
            UNROLL for (int half = 0; half < 2; half++) {
                halve<2>(halves[m].low[0][half], halves[m].low[1][half], thread);
                halve<2>(halves[m].high[0][half], halves[m].high[1][half], thread);
            }
        }
    }
    BOTH void halve_again(Halves& halves, int32_t* to, int rows) const {
        UNROLL for (int m = 0; m < F::M; m++) {
            halve<1>(halves[m].low[0][0], halves[m].low[0][1], thread);
            halve<1>(halves[m].high[0][0], halves[m].high[0][1], thread);
            EACH_LANE {
                const int32_t least_of = halves[m].low[0][0][h], rest = halves[m].high[0][0][h];
                int32_t* own = to + m * F::COUNTS * rows + LANE % 4 * 8 + LANE / 4;
                add(own, least_of & 65535);
                if constexpr (F::P == 3) {
                    add(own + rows, (least_of >> 16) + rest);
                } else {
                    add(own + rows, (least_of >> 16) + (rest & 65535));
                    add(own + 2 * rows, rest >> 16);
                }
            }
        }
    }
};

}  // namespace
