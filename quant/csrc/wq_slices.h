// 9 to 16 rows of x of bfloat16 times a weight of 4 bits whose groups are whole steps: what a warp does. Layout, operands and the
// order of sums are those of wq_fragments.h, and so are the bits.
//
// There each block reads all of x, which with so many rows is as much as the codes: more than the cache that all multiprocessors share
// gives in the time in which memory gives the codes. Here a block has a slice of the columns, the steps s, s + 8, ..., that are warp s's
// there, and keeps x of these in shared memory. Its warps take tiles of its own rows, R at once. A slice's sums of a tile go to memory;
// whichever slice is the last to have them adds up all eight, in their order.
//
// What a step's x adds (its sum times 1 and times 128) is the same for all tiles, and is kept beside x.

#pragma once

#include "wq_state.h"

namespace fragments {

constexpr int SIDE_BITS = 4;
constexpr int SIDE = 16;                     // warps of a block
constexpr int X_BYTES = 2 * ROWS * COLUMNS;  // of a step: two times eight rows of 256 bytes
constexpr int TABLE_BYTES = 128;             // of a step: [eight, t, (sums of columns 2 t and 2 t + 1, what 128 adds to them)]
constexpr int PART = 2 * LANES * 4;          // numbers of a tile's sums: [eight, lane, 4]

// Stages of a warp's ring of R tiles; where much x leaves no room for them, those that are left.
BOTH constexpr int deep_side(int r) { return r == 1 ? 6 : 5; }
BOTH constexpr int least_side(int r) { return r == 1 ? 6 : 3; }

struct Slices {
    Call call;
    float* sums;         // [tiles, WARPS, PART]
    int* arrived;        // [tiles]; zeros before and after
    int most, together;  // steps of a slice; tiles of a block
    int slot;            // bytes of a stage of a warp's ring
};

inline bool is_sliced(const Call& c) {
    return c.parts == 1 && c.count <= 2 * MOST && (c.groups == 1 || c.columns / c.groups % COLUMNS == 0);
}

// Divides the work among blocks, and the shared memory of one among x and rings of `depth` stages; returns its bytes.
inline int64_t sliced(Slices& s, int r, int blocks, int depth) {
    s.most = (s.call.steps + WARPS - 1) / WARPS, s.together = (s.call.tiles + blocks - 1) / blocks;
    s.slot = stage_bytes(SIDE_BITS, r, 1, s.call.pieces(), 0);
    return int64_t(s.most) * (X_BYTES + TABLE_BYTES) + SIDE * depth * s.slot;
}

template <int R>
struct Sliced {
    uint32_t w[R][2 * SIDE_BITS], b[2][4], a[4];  // codes of a step; of x, a slice of the eight number e; the products' other operand
    float d[2][R][4], sums[2][R][4];              // as in State
    const uint8_t *codes[R], *ranges;             // what the lane copies, of step 0 or group 0 of the tiles that are fetched
    int x[2];                                     // where its column of x is in a step: slices of even and odd number
    float scale[R][2], offset[R][2], given[2][4];
};

template <class P, int R, int DEPTH>
struct SideWarp {
    static constexpr int CODES = code_bytes(SIDE_BITS);
    static_assert(chains_of(SIDE_BITS, 1) == 1, "all slices of a step in one chain");
    using S = Sliced<R>;

    const Slices& all;
    const Call& call;
    uint8_t *x, *table, *ring;  // of the block; of the block; its own
    int warp, slice, own;       // own: steps of the slice
    int first, end;             // its first tile, and the end of the block's
    int goal, next;             // tile and step that are fetched next
    int now, before;            // as in Warp
    typename P::template Of<S> state;

    BOTH SideWarp(const Slices& s, uint8_t* memory, int w, int block)
        : all(s), call(s.call), x(memory), table(memory + s.most * X_BYTES), ring(table + s.most * TABLE_BYTES + w * DEPTH * s.slot),
          warp(w), slice(block % WARPS), own((call.steps - slice + WARPS - 1) / WARPS), first(block / WARPS * s.together + w * R),
          end((block / WARPS + 1) * s.together), goal(first), next(0), now(0), before((DEPTH - 1) * s.slot) {
        if (end > call.tiles) end = call.tiles;
        if (own == 0) goal = end;
    }

    // A tile that there is not is the last one again.
    BOTH void aim(P& p) {
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            const int last = call.tiles - 1, t = goal + (R == 1 ? 0 : lane / call.pieces() % R);
            UNROLLED for (int r = 0; r < R; r++)
                s.codes[r] = call.words + (int64_t(goal + r < last ? goal + r : last) * call.steps + slice) * CODES + 16 * lane;
            s.ranges = call.ranges + int64_t(t < last ? t : last) * call.groups * call.group_bytes + lane % call.pieces() * 16;
        });
    }

    // Codes and ranges of the next step.
    BOTH void fetch(P& p, uint8_t* to) {
        if (goal < end) {
            p.lanes([&](int lane) {
                const S& s = P::at(state, lane);
                const int group = call.group_of((slice + next * WARPS) * SLICES);
                uint8_t* mine = to + 16 * lane;
                UNROLLED for (int r = 0; r < R; r++) {
                    const uint8_t* words = P::along(s.codes[r], next, WARPS * CODES);
                    UNROLLED for (int l = 0; l < SIDE_BITS / 2; l++) p.fetch16(mine + r * CODES + 512 * l, words + 512 * l, true);
                }
                p.fetch16(mine + R * CODES, P::along(s.ranges, group, call.group_bytes), lane < R * call.pieces());
            });
            if (++next == own) {
                next = 0, goal += SIDE * R;
                if (goal < end) aim(p);
            }
        }
        p.commit();
    }

    // Fills the ring but for one stage.
    BOTH void open(P& p) {
        aim(p);
        for (int i = 0; i < DEPTH - 1; i++) fetch(p, ring + i * all.slot);
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            const int g = lane / 4, at = g * 256 + lane % 4 * 16;
            s.x[0] = at + g % 2 * 64, s.x[1] = at - g % 2 * 64;
        });
    }

    // Two rows of the slice's x, of every second step, as `turned` has them: by way of registers, since copies would be counted after
    // codes.
    BOTH void bring(P& p) {
        constexpr int TURNS = 16;
        for (int i = warp / 8; i < own; i += 2 * TURNS)
            p.lanes([&](int lane) {
                const int m = warp % 8 * 2 + lane / 16, chunk = lane % 16, g = m % 8;
                const uint8_t* from = call.x + 2 * (int64_t(m) * call.columns + slice * COLUMNS + chunk * 8);
                uint8_t* to = x + m * 256 + (chunk ^ (g & 1) * 4) * 16;
                uint32_t kept[TURNS][4];
                UNROLLED for (int u = 0; u < TURNS; u++) {
                    const int step = i + 2 * u;
                    UNROLLED for (int j = 0; j < 4; j++) kept[u][j] = 0;
                    if (step < own && m < call.count && (slice + step * WARPS) * COLUMNS + chunk * 8 < call.columns)
                        P::read16(kept[u], from + step * (2 * WARPS * COLUMNS));
                }
                UNROLLED for (int u = 0; u < TURNS; u++)
                    if (i + 2 * u < own) P::store16(to + (i + 2 * u) * X_BYTES, kept[u]);
            });
    }

    // A slice of 32 columns of eight number `e`.
    template <int Q>
    BOTH static void load_x(S& s, const uint8_t* step, int e) {
        P::load16(s.b[e], step + s.x[Q % 2] + 64 * Q + 2048 * e);
    }

    template <int Q>
    BOTH void add_up(const uint8_t* step, P& p) {
        UNROLLED for (int e = 0; e < 2; e++) {
            p.lanes([&](int lane) { load_x<Q>(P::at(state, lane), step, e); });
            UNROLLED for (int h = 0; h < 2; h++) P::multiply(state, [e, h](S& s) { return Operands{s.d[e][0], s.a, s.b[e] + 2 * h}; });
        }
        if constexpr (Q + 1 < SLICES) add_up<Q + 1>(step, p);
    }

    // What x adds in some of the slice's steps.
    BOTH void sums_of_x(P& p) {
        for (int i = warp; i < own; i += SIDE) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                UNROLLED for (int j = 0; j < 4; j++) s.a[j] = j % 2 == 0 ? ONES : BASE;
                UNROLLED for (int e = 0; e < 2; e++) UNROLLED for (int j = 0; j < 4; j++) s.d[e][0][j] = 0.f;
            });
            add_up<0>(x + i * X_BYTES, p);
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                UNROLLED for (int e = 0; e < 2; e++) {
                    uint32_t made[4];
                    UNROLLED for (int c = 0; c < 4; c++) made[c] = bits_of(s.d[e][0][c]);
                    if (lane < 4) P::store16(table + i * TABLE_BYTES + e * 64 + lane * 16, made);
                }
            });
        }
    }

    template <int Q, int H>
    BOTH void products(P& p, const uint8_t* step) {
        if constexpr (H == 0)
            p.lanes([&](int lane) {
                UNROLLED for (int e = 0; e < 2; e++) load_x<Q>(P::at(state, lane), step, e);
            });
        UNROLLED for (int r = 0; r < R; r++) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                constexpr int I = 8 * Q + 4 * H;
                const uint32_t* w = s.w[r];
                s.a[0] = held<P, SIDE_BITS, I>(w), s.a[1] = held<P, SIDE_BITS, I + 1>(w);
                s.a[2] = held<P, SIDE_BITS, I + 2>(w), s.a[3] = held<P, SIDE_BITS, I + 3>(w);
            });
            UNROLLED for (int e = 0; e < 2; e++)
                P::multiply(state, [e, r](S& s) { return Operands{s.d[e][r], s.a, s.b[e] + 2 * H}; });
        }
        if constexpr (H == 0) products<Q, 1>(p, step);
        if constexpr (H == 1 && Q + 1 < SLICES) products<Q + 1, 0>(p, step);
    }

    // Step `i` of the slice, of the tiles in the stage that is next.
    BOTH void use(P& p, int i) {
        const uint8_t* stage = ring + now;
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            const uint8_t* ranges = stage + R * CODES + lane / 4 * (call.half_ranges ? 8 : 16);
            UNROLLED for (int r = 0; r < R; r++) {
                load_codes<P, SIDE_BITS>(s.w[r], stage + r * CODES, lane);
                UNROLLED for (int e = 0; e < 2; e++) UNROLLED for (int j = 0; j < 4; j++) s.d[e][r][j] = 0.f;
            }
            if (call.half_ranges)
                UNROLLED for (int r = 0; r < R; r++) half_ranges<P>(s.scale[r], s.offset[r], ranges + r * 64);
            else
                UNROLLED for (int r = 0; r < R; r++) ranges_of<P>(s.scale[r], s.offset[r], ranges + r * 128);
        });
        products<0, 0>(p, x + i * X_BYTES);
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            UNROLLED for (int e = 0; e < 2; e++) {
                uint32_t kept[4];
                P::load16(kept, table + i * TABLE_BYTES + e * 64 + lane % 4 * 16);
                UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int j = 0; j < 4; j++) {
                    const float rest = P::fma(s.offset[r][j / 2], float_of(kept[j % 2]), s.sums[e][r][j]);
                    s.sums[e][r][j] = P::fma(s.scale[r][j / 2], s.d[e][r][j] - float_of(kept[2 + j % 2]), rest);
                }
            }
        });
        before = now, now += all.slot;
        if (now == DEPTH * all.slot) now = 0;
    }

    // Sums of tiles from number `tile` on, to memory; by the last of the slices, those of all, to out.
    BOTH void close(P& p, int tile) {
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int e = 0; e < 2; e++) {
                uint32_t kept[4];
                UNROLLED for (int j = 0; j < 4; j++) kept[j] = bits_of(s.sums[e][r][j]);
                if (tile + r < end) P::store16(part(tile + r, slice, e, lane), kept);
            }
        });
        if (P::counted(all.arrived + tile) != WARPS - 1) return;
        for (int r = 0; r < R && tile + r < end; r++)
            p.lanes([&](int lane) {
                UNROLLED for (int e = 0; e < 2; e++) {
                    uint32_t kept[WARPS][4];
                    UNROLLED for (int w = 0; w < WARPS; w++) P::read16(kept[w], part(tile + r, w, e, lane));
                    UNROLLED for (int j = 0; j < 4; j++) {
                        float sum = 0.f;
                        UNROLLED for (int w = 0; w < WARPS; w++) sum += float_of(kept[w][j]);
                        const int m = e * MOST + lane % 4 * 2 + j % 2, n = (tile + r) * ROWS + lane / 4 + j / 2 * 8;
                        if (m < call.count && n < call.rows)
                            *reinterpret_cast<uint16_t*>(call.out + 2 * (int64_t(m) * call.rows + n)) = uint16_t(P::pack2(sum, 0.f));
                    }
                }
            });
        P::cleared(all.arrived + tile);
    }
    BOTH uint8_t* part(int tile, int w, int e, int lane) const {
        return reinterpret_cast<uint8_t*>(all.sums + (int64_t(tile) * WARPS + w) * PART + (e * LANES + lane) * 4);
    }

    BOTH void over(P& p) {
        for (int tile = first; tile < end; tile += SIDE * R) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                UNROLLED for (int e = 0; e < 2; e++) UNROLLED for (int r = 0; r < R; r++)
                    UNROLLED for (int j = 0; j < 4; j++) s.sums[e][r][j] = 0.f;
            });
            for (int i = 0; i < own; i++) {
                p.template arrived<DEPTH - 2>();
                fetch(p, ring + before);
                use(p, i);
            }
            close(p, tile);
        }
    }
};

}  // namespace fragments
