// A warp of lut_gemv_cuda.h: tile after tile of rows, each with all units of columns of a turn.

#pragma once

#include "lut_bits.h"

namespace {

// Units `first` and on, of which bits are at hand, with all tiles: a warp has a run of (tile, unit) in that order.
template <class F, int BITS>
struct Sweep {
    static constexpr int SLOT = slot_words(BITS), LONG = RING / 4 / SLOT, SHORT = SMALL / 4 / SLOT, N = parities(BITS);
    static_assert(SHORT >= 2, "one place is read while another is written");
    using Sums = int32_t[F::M][F::P][2][HELD][4];
    const Lut& a;
    Shared<F> s;
    int thread, units, depth;
    int todo, tile, unit, place;  // items to be done, and the next one; where that is in the ring
    int left, ahead, ahead_place; // the same of those to be fetched
    int64_t jump;                 // words from a tile's last unit of the turn to the next tile's first
    const uint32_t* from;         // codes of the next item to be fetched
    uint32_t* ring;

    BOTH Sweep(const Lut& lut, const Place& at, const Part& part, int first, int count, void* shared, int given)
        : a(lut), s(lut, part.held, shared), thread(anew(given)), units(count), depth(lut.ring == RING ? LONG : SHORT) {
        const int warp = warp_of(thread), items = int(tiles_of(lut, at)) * units;
        const int item = items * warp / F::WARPS;
        todo = left = items * (warp + 1) / F::WARPS - item;
        tile = units > 0 ? item / units : 0, unit = ahead = units > 0 ? item % units : 0, place = ahead_place = 0;
        jump = (part.units - units) * SLOT;
        from = part.words + ((at.cluster * lut.group + tile) * part.units + first + unit) * SLOT;
        ring = s.rings + warp * (lut.ring / 4);
    }

    BOTH void fetch_next() {
        if (left > 0) {
            uint32_t* const to = ring + ahead_place * SLOT;
            EACH_LANE {
                UNROLL for (int c = 0; c < 2 * BITS; c++) send<4>(to + c * 128 + LANE * 4, from + c * 128 + LANE * 4);
            }
        }
        sent();
        turn();
    }
    BOTH void turn() {
        left--, from += SLOT;
        if (++ahead == units) ahead = 0, from += jump;
        if (++ahead_place == depth) ahead_place = 0;
    }

    // Fetches what the ring has place for but for one; `opened`: that is done.
    BOTH void open() {
        if (HELD > 1 && thread % 32 != 0) return;
        for (int i = 1; i < depth; i++) fetch_next();
    }
    BOTH void opened() {
        for (int i = 1; i < depth; i++) turn();
    }

    BOTH void wait() const {
        if (a.ring == RING) {
            arrived<LONG - 2>();
        } else {
            arrived<SHORT - 2>();
        }
    }

    BOTH void run() {
        if (HELD > 1 && thread % 32 != 0) return;
        Sums sum = {};
        NO_UNROLL while (todo > 0) {
            wait();
            add_item(sum);
            if (++place == depth) place = 0;
            todo--;
            if (++unit == units || todo == 0) {
                put(sum);
                tile++, unit = 0;
            }
        }
    }

    // Parities in the order of a Gray code: each differs from the one before by a bit of the codes.
    BOTH void add_item(Sums& sum) {
        uint32_t plane[2][BITS][HELD][4], parity[2][HELD][4] = {};
        EACH_LANE {
            UNROLL for (int c = 0; c < 2 * BITS; c++) {
                const auto line = *reinterpret_cast<const Line<4>*>(ring + place * SLOT + c * 128 + LANE * 4);
                UNROLL for (int j = 0; j < 4; j++) plane[c / BITS][c % BITS][h][j] = line.v[j];
            }
        }
        fetch_next();  // into the place that was read a turn ago
        const uint32_t* bits = s.bits + unit * (N * F::M * F::P * 64);
        UNROLL for (int i = 1; i <= N; i++) {
            const int changed = i % 2 != 0 ? 0 : i % 4 != 0 ? 1 : i % 8 != 0 ? 2 : 3;
            UNROLL for (int t = 0; t < 2; t++) {
                EACH_LANE {
                    UNROLL for (int j = 0; j < 4; j++) parity[t][h][j] ^= plane[t][changed][h][j];
                }
            }
            UNROLL for (int m = 0; m < F::M; m++) {
                UNROLL for (int p = 0; p < F::P; p++) {
                    uint32_t b[HELD][2];
                    EACH_LANE {
                        const int lane = LANE ^ (i - 1) % 8 * 4;
                        const auto line = *reinterpret_cast<const Line<2>*>(bits + (((i - 1) * F::M + m) * F::P + p) * 64 + lane * 2);
                        b[h][0] = line.v[0], b[h][1] = line.v[1];
                    }
                    UNROLL for (int t = 0; t < 2; t++) multiply_bits(sum[m][p][t], parity[t], b);
                }
            }
        }
    }

    // A lane has two neighbouring bits of a byte; for the highest of all see lut_gemv_cuda.h.
    BOTH void put(Sums& sum) {
        UNROLL for (int m = 0; m < F::M; m++) {
            UNROLL for (int p = 0; p < F::P; p++) {
                int32_t* to = s.whole + (m * F::P + p) * (a.group * TILE) + tile * TILE;
                UNROLL for (int t = 0; t < 2; t++) {
                    EACH_LANE {
                        UNROLL for (int half = 0; half < 2; half++) {
                            int32_t(&v)[4] = sum[m][p][t][h];
                            const int times = p < F::P - 1 || LANE % 4 < 3 ? 2 : F::P == 3 ? -1 : -2;
                            add(to + t * 16 + half * 8 + LANE / 4, (v[2 * half] + times * v[2 * half + 1]) * (1 << LANE % 4 * 2));
                            v[2 * half] = v[2 * half + 1] = 0;
                        }
                    }
                }
            }
        }
    }
};

}  // namespace
