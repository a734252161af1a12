// A warp of lut_gemv_cuda.h: strips of columns, whose tables it keeps in registers, with tile after tile.

#pragma once

#include "lut_digits.h"

namespace {

// What four codes of a column, the lowest nibbles of `selector`, stand for. changed: the same, the highest bit of each changed, of 4 bits.
template <int BITS>
BOTH uint32_t decode(const uint32_t (&table)[1 << (BITS - 2)], uint32_t selector, uint32_t changed) {
    if constexpr (BITS == 2) return permute(table[0], table[0], selector);
    if constexpr (BITS == 3) return permute(table[0], table[1], selector);
    // A byte below 128 that is not meant is filled with its sign: zero.
    if constexpr (BITS == 4) return permute(table[0], table[1], selector) + permute(table[2], table[3], changed);
}

// Selectors [group of 8, column of 2], the codes of rows g in the lower half and of rows g + 8 in the upper one.
template <int BITS>
BOTH void select(uint32_t (&made)[GROUPS][2], const uint32_t (&w)[2 * BITS]) {
    UNROLL for (int i = 0; i < GROUPS; i++) {
        if constexpr (BITS == 2) made[i][0] = w[i] & 0x33333333u, made[i][1] = w[i] >> 2 & 0x33333333u;
        if constexpr (BITS == 4) made[i][0] = w[2 * i], made[i][1] = w[2 * i + 1];
        if constexpr (BITS == 3) {
            const uint32_t* v = w + i / 2 * 3;
            if (i % 2 == 0) {
                made[i][0] = v[0] & 0x77777777u, made[i][1] = v[1] & 0x77777777u;
            } else {
                made[i][0] = v[2] & 0x77777777u;
                made[i][1] = (v[0] >> 3 & 0x11111111u) | (v[1] >> 2 & 0x22222222u) | (v[2] >> 1 & 0x44444444u);
            }
        }
    }
}

// A warp's tables and digits of a strip.
template <class F, int BITS>
struct Strip {
    static constexpr int ALL = GROUPS * span(BITS), WORDS = 1 << (BITS - 2);
    uint32_t table[ALL][2][HELD][F::P][WORDS];
    uint32_t x[F::M][ALL][2][HELD][2];  // of two digits each

    BOTH void load(const Shared<F>& s, int strip, int thread) {
        UNROLL for (int i = 0; i < ALL; i++) {
            UNROLL for (int c = 0; c < 2; c++) {
                EACH_LANE {
                    const int column = (strip * ALL + i) * 8 + c * 4 + LANE % 4, slot = LANE / 4 % 4, second = LANE / 16;
                    UNROLL for (int p = 0; p < F::P; p++) {
                        const auto line = *reinterpret_cast<const Line<WORDS>*>(s.tables + ((p * s.held + column) << BITS));
                        UNROLL for (int j = 0; j < WORDS; j++) table[i][c][h][p][j] = line.v[j];
                    }
                    UNROLL for (int m = 0; m < F::M; m++) {
                        const uint32_t digits = s.x[m * s.held + column], none = 0x4444u & ~(15u << 4 * slot);
                        UNROLL for (int d = 0; d < 2; d++) x[m][i][d][h][c] = permute(digits, 0u, none | uint32_t(2 * d + second) << 4 * slot);
                    }
                }
            }
        }
    }
};

// The columns of units `first` and on, of which tables are at hand, with all tiles: a warp has a run of (strip, tile) in that order.
template <class F, int BITS>
struct Sweep {
    static constexpr int SPAN = span(BITS), R = radix_bits(BITS);
    const Lut& a;
    const Part& part;
    Shared<F> s;
    int thread, tiles, units, depth;
    int todo, tile, strip, place;         // items to be done, and the next one; where that is in the ring
    int left, ahead_tile, ahead_strip;    // the same of those to be fetched, into the place before
    int second;                         // words from its first unit to the second
    int tile_words;                     // from a tile to the next
    const uint32_t* from;               // codes of the next item
    uint32_t* ring;

    BOTH Sweep(const Lut& lut, const Place& at, const Part& of, int first, int count, void* shared, int given)
        : a(lut), part(of), s(lut, of.held, shared), thread(anew(given)), tiles(int(tiles_of(lut, at))), units(count), depth(lut.depth) {
        const int warp = warp_of(thread), items = (units + SPAN - 1) / SPAN * tiles;
        const int item = items * warp / F::WARPS;
        todo = left = items * (warp + 1) / F::WARPS - item;
        strip = ahead_strip = item / tiles, tile = ahead_tile = item % tiles, place = 0;
        tile_words = int(part.units) * (64 * BITS);
        from = part.words + (at.cluster * a.group + tile) * tile_words + (first + int64_t(strip) * SPAN) * (64 * BITS);
        ring = s.rings + warp * depth * (SLOT / 4);
        enter();
    }

    // A unit that there is not is the one before, for which x has zeros.
    BOTH void enter() { second = ahead_strip * SPAN + 1 < units ? 64 * BITS : 0; }

    BOTH void fetch_next(int to_place) {
        if (left > 0) {
            uint32_t* const to = ring + to_place * (SLOT / 4);
            UNROLL for (int u = 0; u < SPAN; u++) {
                EACH_LANE {
                    const uint32_t* own = from + u * second + LANE * 4;
                    uint32_t* const there = to + u * 64 * BITS + LANE * 4;
                    UNROLL for (int c = 0; c < BITS / 2; c++) send_words<4>(there + c * 128, own + c * 128);
                    if constexpr (BITS == 3) send_words<2>(there + 128 - LANE * 2, own + 128 - LANE * 2);
                }
            }
        }
        sent();
        turn();
    }
    BOTH void turn() {
        left--, from += tile_words;
        if (++ahead_tile == tiles) ahead_tile = 0, ahead_strip++, from += SPAN * 64 * BITS - int64_t(tiles) * tile_words, enter();
    }

    // Fetches what the ring has place for but for one, and what comes next into the second-level cache; `opened`: the former is done.
    BOTH void open() {
        if (HELD > 1 && thread % 32 != 0) return;
        for (int i = 1; i < depth; i++) fetch_next(i - 1);
        for (int i = 0; i < EARLY_ITEMS && left > 0; i++, turn()) {
            EACH_LANE if (LANE < SPAN * 2 * BITS) fetch(from + LANE / (2 * BITS) * second + LANE % (2 * BITS) * 32);
        }
    }
    BOTH void opened() {
        for (int i = 1; i < depth; i++) turn();
    }

    BOTH void wait() const {
        if (depth == DEPTH) {
            arrived<DEPTH - 2>();
        } else {
            arrived<0>();
        }
    }

    BOTH void run() {
        if (HELD > 1 && thread % 32 != 0) return;
        NO_UNROLL while (todo > 0) {
            Strip<F, BITS> t;
            t.load(s, strip, thread);
            const int stop = todo < tiles - tile ? tile + todo : tiles;
            todo -= stop - tile;
            NO_UNROLL for (; tile < stop; tile++) {
                wait();
                add_tile(t);
                place = place + 1 & depth - 1;
            }
            tile = 0, strip++;
        }
    }

    BOTH void add_tile(const Strip<F, BITS>& t) {
        int32_t sum[F::M][3][HELD][4] = {};
        UNROLL for (int u = 0; u < SPAN; u++) {
            uint32_t selectors[HELD][GROUPS][2];
            EACH_LANE {
                const uint32_t* from = ring + place * (SLOT / 4) + u * 64 * BITS;
                uint32_t w[2 * BITS];
                UNROLL for (int c = 0; c < BITS / 2; c++) {
                    const auto line = *reinterpret_cast<const Line<4>*>(from + c * 128 + LANE * 4);
                    UNROLL for (int j = 0; j < 4; j++) w[4 * c + j] = line.v[j];
                }
                if constexpr (BITS == 3) {
                    const auto line = *reinterpret_cast<const Line<2>*>(from + 128 + LANE * 2);
                    w[4] = line.v[0], w[5] = line.v[1];
                }
                select<BITS>(selectors[h], w);
            }
            if (u == SPAN - 1) fetch_next(place + depth - 1 & depth - 1);  // that place was read a turn ago
            UNROLL for (int i = 0; i < GROUPS; i++) multiply(t, sum, selectors, u * GROUPS + i, i);
        }
        put(sum);
    }

    // A group's 64 rows by 8 columns with all rows of x.
    BOTH void multiply(const Strip<F, BITS>& t, int32_t (&sum)[F::M][3][HELD][4], const uint32_t (&selectors)[HELD][GROUPS][2], int of, int i) {
        uint32_t operand[F::P][HELD][4];
        EACH_LANE {
            UNROLL for (int c = 0; c < 2; c++) {
                const uint32_t low = selectors[h][i][c], high = upper_half<BITS>(low);
                const uint32_t changed = BITS == 4 ? low ^ 0x88888888u : 0u;
                const uint32_t changed_high = BITS == 4 ? changed >> 16 : 0u;
                UNROLL for (int p = 0; p < F::P; p++) {
                    operand[p][h][2 * c] = decode<BITS>(t.table[of][c][h][p], low, changed);
                    operand[p][h][2 * c + 1] = decode<BITS>(t.table[of][c][h][p], high, changed_high);
                }
            }
        }
        UNROLL for (int m = 0; m < F::M; m++) {
            multiply_bytes(sum[m][0], operand[0], t.x[m][of][0]);
            multiply_bytes(sum[m][1], operand[1], t.x[m][of][0]);
            multiply_bytes(sum[m][2], operand[0], t.x[m][of][1]);
            if constexpr (F::P == 3) multiply_bytes(sum[m][2], operand[2], t.x[m][of][0]);
        }
    }

    BOTH void put(const int32_t (&sum)[F::M][3][HELD][4]) {
        UNROLL for (int m = 0; m < F::M; m++) {
            int32_t* to = s.whole + (m * a.group + tile) * 256;
            UNROLL for (int i = 0; i < 4; i++) {
                EACH_LANE {
                    add(to + i * 32 + LANE, sum[m][0][h][i]);
                    add(to + 128 + i * 32 + LANE, ((sum[m][1][h][i] << R) + sum[m][2][h][i]) >> cut_bits(BITS));
                }
            }
        }
    }
};

}  // namespace
