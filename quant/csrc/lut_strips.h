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

// Units `first` and on, of which bits are at hand, with all tiles: a warp has a run of (unit, tile) in that order. A lane reads of codes
// what it copied itself.
template <class F, int BITS>
struct Sweep {
    static constexpr int SLOT = slot_words(BITS), N = parities(BITS);
    static_assert(SMALL / 4 / SLOT >= 2, "one place is read while another is written");
    using Bits = uint32_t[N][F::M][F::P][HELD][2];
    using Sums = int32_t[F::M][F::P][2][HELD][4];
    int thread, tiles, depth;   // depth: places of the ring
    int todo, unit, tile;       // items to be done, and the next one
    int place;                  // of the next one in the ring
    int left, ahead;            // items to be fetched, and the tile of the next one
    int step, jump;             // words from a tile to the next one, and from the one after the last to the next unit
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

    BOTH void wait(int bytes) const {
        if (bytes == WIDE) {
            arrived<WIDE / 4 / SLOT - 1>();
        } else if (bytes == RING) {
            arrived<RING / 4 / SLOT - 1>();
        } else {
            arrived<SMALL / 4 / SLOT - 1>();
        }
    }

    BOTH void run(const Lut& a, void* shared) {
        if (HELD > 1 && thread % 32 != 0) return;
        const Shared<F> s(a, shared);
        thread = anew(thread);
        Bits bits;
        NO_UNROLL for (; todo > 0; unit++, tile = 0) {
            take(bits, s.bits + unit * (N * F::M * F::P * 64));
            const int last = smaller(tiles, tile + todo);
            todo -= last - tile;
            NO_UNROLL for (; tile < last; tile++) {
                wait(a.ring);
                Sums sum = {};
                add_item(sum, bits);
                put(sum, s.whole + tile * TILE, a.group * TILE);
            }
        }
    }

    BOTH void take(Bits& bits, const uint32_t* from) const {
        UNROLL for (int i = 0; i < N; i++) {
            UNROLL for (int m = 0; m < F::M; m++) {
                UNROLL for (int p = 0; p < F::P; p++) {
                    EACH_LANE {
                        const int place = ((i * F::M + m) * F::P + p) * 64 + (LANE ^ i % 8 * 4) * 2;
                        const auto line = *reinterpret_cast<const Line<2>*>(from + place);
                        bits[i][m][p][h][0] = line.v[0], bits[i][m][p][h][1] = line.v[1];
                    }
                }
            }
        }
    }

    // Parities in the order of a Gray code: each differs from the one before by a bit of the codes.
    BOTH void add_item(Sums& sum, const Bits& bits) {
        uint32_t plane[2][BITS][HELD][4], parity[2][HELD][4] = {};
        EACH_LANE {
            UNROLL for (int c = 0; c < 2 * BITS; c++) {
                const auto line = *reinterpret_cast<const Line<4>*>(ring + place * SLOT + c * 128 + LANE * 4);
                UNROLL for (int j = 0; j < 4; j++) plane[c / BITS][c % BITS][h][j] = line.v[j];
            }
        }
        fetch_next();  // into the place that was read
        UNROLL for (int i = 1; i <= N; i++) {
            const int changed = i % 2 != 0 ? 0 : i % 4 != 0 ? 1 : i % 8 != 0 ? 2 : 3;
            UNROLL for (int t = 0; t < 2; t++) {
                EACH_LANE {
                    UNROLL for (int j = 0; j < 4; j++) parity[t][h][j] ^= plane[t][changed][h][j];
                }
            }
            UNROLL for (int m = 0; m < F::M; m++) {
                UNROLL for (int p = 0; p < F::P; p++) {
                    UNROLL for (int t = 0; t < 2; t++) multiply_bits(sum[m][p][t], parity[t], bits[i - 1][m][p]);
                }
            }
        }
    }

    // A lane has two neighbouring bits of a byte of four rows (for the highest of all see lut_gemv_cuda.h), and ends with all bits of one.
    // No sum of an item has more than 28 bits: 256 (2^BITS - 1) numbers of 16.
    BOTH void put(const Sums& sum, int32_t* to, int rows) const {
        UNROLL for (int m = 0; m < F::M; m++) {
            int32_t low[2][2][HELD], high[2][2][HELD];
            UNROLL for (int t = 0; t < 2; t++) {
                UNROLL for (int half = 0; half < 2; half++) {
                    EACH_LANE {
                        int32_t byte[F::P];
                        UNROLL for (int p = 0; p < F::P; p++) {
                            const int times = p < F::P - 1 || LANE % 4 < 3 ? 2 : F::P == 3 ? -1 : -2;
                            byte[p] = (sum[m][p][t][h][2 * half] + times * sum[m][p][t][h][2 * half + 1]) * (1 << LANE % 4 * 2);
                        }
                        low[t][half][h] = byte[0] + byte[1] * 256;
                        high[t][half][h] = F::P == 3 ? byte[2] : byte[2] + byte[F::P - 1] * 256;
                    }
                }
            }
            UNROLL for (int half = 0; half < 2; half++) {
                halve<2>(low[0][half], low[1][half], thread);
                halve<2>(high[0][half], high[1][half], thread);
            }
            halve<1>(low[0][0], low[0][1], thread);
            halve<1>(high[0][0], high[0][1], thread);
            EACH_LANE {
                const int32_t least_of = low[0][0][h], rest = high[0][0][h];
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
