// A few rows of x times a weight of 2, 3, 4 or 8 bits on tensor cores: what a warp does, for the GPU and, lane by lane, for the host.
//
// Layout of the weight: quant/kernels/wq_gemv/fragments.py. A warp multiplies 16 rows of the weight (m16n8k16, operands in bfloat16) with
// up to 8 C columns of numbers in bfloat16, adding up in float32. A bfloat16 row of x is one column; another row is three, whose sum it is
// exactly. The scale of a group is applied to its sum; what the zero takes off is a multiple of the sum of the group's x.
//
// Where x is bfloat16, operands are codes as they are masked out of their words: under the exponent of 128, a code is 128 + code · 2^AT,
// exactly. What the 128 add is 128 times the sum of x, which comes out of the same products with 1 and 128 in place of codes, and is
// taken off a group's sum: of codes of 0 nothing is left, as both sums are cut off alike. That is at about 2^-23 of a sum's size, which 128
// enlarges by up to seven bits; of 24, a result in bfloat16 keeps 8. Where x is three columns, 128 is taken off every code before.
//
// The warps of a block share 16 R rows: warp w takes the steps (128 columns) w, w + 8, ... A stage of a warp's ring in shared memory is a
// step: codes and ranges of R tiles, and x. It is copied well ahead of its use, so that what is in flight does not depend on registers, and
// warps do not wait for each other before the end. A row of x comes out the same bit for bit whatever stands beside it: a column of the
// product never meets another one, and sums are taken in one order.
//
// C is 1, or 2 for more rows of x than one product has columns: then two warps are a team. They take the same steps of neighbouring tiles,
// R each, copy half of the rows of x each, and read those of both: what they read of x beside a code, which would be the most of all that
// a block reads, is what a block of C = 1 with half the rows reads. A team's warps wait for each other once a step.
//
// P, the policy, is one lane of a warp (device) or 32 lanes in turn (host): `Of<T>` is what a lane has, or 32 of them; `lanes(f)` calls
// f(lane) for those that there are; `at(v, lane)` is the lane's own.

#pragma once

#include "wq_state.h"

namespace fragments {

// x of a step in shared memory: rows (of bfloat16, columns of a product) of 256 bytes. Odd ones have slices exchanged two by two, so that
// a slice of eight columns is read without conflicts.
BOTH constexpr int turned(int row, int chunk) { return row * 256 + (chunk ^ (row & 1) * 4) * 16; }

// One warp of a block. FLUSHES: runs of 128 / FLUSHES columns of a step that have a scale each. PARTS: columns that a row of x takes.
template <class P, int BITS, int R, int FLUSHES, int PARTS, int C>
struct Warp {
    static constexpr int EVERY = SLICES / FLUSHES, DEEP = deep(BITS, R, C), MIDDLE = middle(BITS, R, C), CODES = code_bytes(BITS);
    static constexpr int AT_ONCE = tiles_at_once(BITS, R, C), CHAINS = chains_of(BITS, PARTS);
    // Lanes below 16 copy ranges, some of them twice, and the others the first row of x with the same instruction.
    static constexpr bool MERGED = PARTS == 1 && R * FLUSHES <= 2;
    static constexpr bool TWICE = BITS == 8 && PARTS == 1;  // codes are a sum of two operands
    static constexpr float FACTOR = 1.f / (1 << place_of(BITS, 1));
    using S = State<BITS, R, C>;
    template <class T>
    using Of = typename P::template Of<T>;

    const Call& call;
    uint8_t *ring, *team;  // its own; that of the first of its team
    int now, before;  // stages to use next, and used last: that one is free; bytes from `ring`
    int warp, first, ahead, row, rows;  // warp: or team; first: tile; ahead: the step to fetch next; row, rows: of x, that it copies
    Of<S> state;

    // Number `w` of a block that begins with a tile and a row of x.
    BOTH Warp(const Call& c, uint8_t* memory, int w, int tile, int row_of_x)
        : call(c), ring(memory + w * c.apart), team(ring - w % C * c.apart), now(0), before((c.depth - 1) * c.slot), warp(w / C),
          first(tile + w % C * R), ahead(warp), row(row_of_x + w % C * c.own) {
        // What there is not is something else that there is.
        if (C != 1 && first >= c.tiles) first = c.tiles - 1;
        if (C != 1 && row >= c.count) row = row_of_x;
        rows = c.count - row < c.own ? c.count - row : c.own;
    }

    // A tile that there is not is the last one again.
    BOTH int64_t tile(int r) const { return first + r < call.tiles ? first + r : call.tiles - 1; }

    // Codes and ranges of the next step; with `X`, also the first piece of x where that goes along.
    template <bool X>
    BOTH void fetch(P& p, uint8_t* to) {
        p.lanes([&](int lane) {
            const S& s = P::at(state, lane);
            const int flush = FLUSHES == 1 ? 0 : lane / call.pieces() % FLUSHES, group = call.group_of(ahead * SLICES + flush * EVERY);
            const bool of_x = MERGED && lane >= 16;
            const uint8_t* from = P::along(s.ranges, of_x ? ahead : group, MERGED ? s.ranges_apart : call.group_bytes);
            uint8_t* own = to + 16 * lane;
            UNROLLED for (int r = 0; r < R; r++) {
                const uint8_t* words = s.codes[r] + int64_t(ahead) * CODES;
                UNROLLED for (int l = 0; l < BITS / 2; l++) p.fetch16(own + r * CODES + 512 * l, words + 512 * l, true);
                if constexpr (BITS == 3) p.fetch8(to + r * CODES + 512 + 8 * lane, words + 512 - 8 * lane);
            }
            if constexpr (MERGED)
                p.fetch16_or_zeros(to + s.ranges_to, from, X || !of_x, ahead < s.ranges_steps);
            else
                p.fetch16(own + R * CODES, from, s.ranges_here);
            // A second turn is the second tile: only where one tile's ranges take all lanes.
            if constexpr (R * FLUSHES * 8 > LANES)
                if (R * FLUSHES * call.pieces() > LANES)
                    p.fetch16(own + R * CODES + 512, from + (tile(1) - first) * call.groups * call.group_bytes, true);
        });
    }

    // What a lane has of piece `i` of x, and of the input scale after it: where it is, of step 0, where it goes, and of how many steps. A
    // piece is a row of float32, or two of bfloat16: none and row 0, rows 1 and 2, ...
    struct Piece {
        const uint8_t* from;
        int apart, to, steps;  // apart: bytes from a step to the next
        bool there;
    };
    BOTH bool two_rows() const { return PARTS == 1 || call.half_x; }  // in a piece
    BOTH int pieces_of_x() const {
        return (two_rows() ? rows / 2 + 1 : rows) + (PARTS != 1 && call.input_scale != nullptr ? 1 : 0);
    }
    BOTH Piece piece(int i, int lane) {
        const S& s = P::at(state, lane);
        const uint8_t* from = s.x + int64_t(i) * 4 * call.columns;
        const int m = 2 * i - 1 + lane / 16;
        if (PARTS == 1 || (call.half_x && 2 * i <= rows)) return {from, 2 * COLUMNS, s.x_to + i * 512, s.x_steps, m >= 0 && m < rows};
        if (!call.half_x && i < rows) return {from, 4 * COLUMNS, s.x_to + i * 512, s.x_steps, true};
        from = reinterpret_cast<const uint8_t*>(call.input_scale) + lane * 16;
        return {from, 4 * COLUMNS, call.given_bytes() - 512 + lane * 16, steps_with(lane * 4), true};
    }
    // Steps that have a column number `column`.
    BOTH int steps_with(int column) const { return (call.columns - column + COLUMNS - 1) / COLUMNS; }

    // x of the step that is fetched next.
    BOTH void fetch_x(P& p, uint8_t* to) {
        p.lanes([&](int lane) {
            UNROLLED for (int i = MERGED ? 1 : 0; i <= MOST / 2; i++) {
                if (i > 0 && i >= pieces_of_x()) break;
                const Piece x = piece(i, lane);
                p.fetch16_or_zeros(to + x.to, P::along(x.from, ahead, x.apart), x.there, ahead < x.steps);
            }
        });
    }

    // Fills the ring but for one stage, and but for x; codes first, which take longest.
    BOTH void open(P& p) {
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            const int pieces = call.pieces(), part = MERGED ? lane % (R * FLUSHES * pieces) : lane;
            UNROLLED for (int r = 0; r < R; r++)
                s.codes[r] = P::kept(call.words + tile(r) * call.steps * CODES + 16 * lane);
            s.ranges = call.ranges + tile(part / (pieces * FLUSHES)) * call.groups * call.group_bytes + part % pieces * 16;
            s.ranges_here = lane < R * FLUSHES * pieces;
            s.ranges_apart = call.group_bytes, s.ranges_to = R * CODES + part * 16, s.ranges_steps = call.steps;
        });
        UNROLLED for (int i = 0; i < DEEP - 1; i++) {
            if (i >= call.depth - 1) break;
            if (ahead < call.steps) fetch<false>(p, ring + i * call.slot);
            ahead += WARPS;
            p.commit();
        }
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            s.g = lane / 4 * (call.half_ranges ? 8 : 16);
            // Columns that there are not are others, or, of a team's warps that do not know each other's rows, whatever was there before.
            const int m = lane / 16 - 1, chunk = lane % 16, last = (C == 1 ? rows : MOST / PARTS) * PARTS - 1;
            const int column = lane / 4 < last ? lane / 4 : last;
            s.x = call.x + (two_rows() ? int64_t(row + m) * call.columns * 2 + chunk * 16 : int64_t(row) * call.columns * 4 + lane * 16);
            s.x = P::kept(s.x);
            s.x_to = PARTS == 1 ? turned(m, chunk) : two_rows() ? m * 256 + chunk * 16 : lane * 16;
            s.x_steps = steps_with(two_rows() ? chunk * 8 : lane * 4);
            if (MERGED && lane >= 16) {
                s.ranges = s.x, s.ranges_apart = 2 * COLUMNS;
                s.ranges_to = call.given_at + s.x_to, s.ranges_steps = s.x_steps;
            }
            s.ranges = P::kept(s.ranges);
            s.even = (PARTS == 1 ? call.given_at : 0) + column * 256 + lane % 4 * 16 + column % 2 * 64;
            s.odd = s.even - column % 2 * 128;
            UNROLLED for (int c = 0; c < C; c++) UNROLLED for (int i = 0; i < R; i++)
                UNROLLED for (int j = 0; j < 4; j++) s.sums[c][i][j] = 0.f;
            UNROLLED for (int i = 0; i < 4; i++) s.ones[i] = P::kept(i % 2 == 0 ? ONES : PARTS == 1 ? BASE : 0u, i / 2);
        });
    }

    // x of the stages that are in the ring, by way of registers: copies would be counted after codes that may come later.
    BOTH void begin(P& p) {
        for (int i = 0; i < pieces_of_x(); i++)
            p.lanes([&](int lane) {
                const Piece x = piece(i, lane);
                const int all = x.there ? call.depth - 1 : 0, apart = PARTS == 1 ? 2 * COLUMNS : x.apart;
                const int mine = (x.steps - warp + WARPS - 1) / WARPS, some = mine < all ? mine : all;
                const uint8_t* from = P::kept(x.from + int64_t(warp) * apart);
                uint8_t* to = ring + call.given_at + x.to;
                uint32_t kept[DEEP - 1][4];
                UNROLLED for (int u = 0; u < DEEP - 1; u++) {
                    UNROLLED for (int j = 0; j < 4; j++) kept[u][j] = 0;
                    if (u < some) P::read16(kept[u], from + u * WARPS * apart);
                }
                UNROLLED for (int u = 0; u < DEEP - 1; u++)
                    if (u < all) P::store16(to + u * call.slot, kept[u]);
            });
    }

    // All but the stages after the next one.
    BOTH void arrived(P& p) {
        if (call.depth == DEEP)
            p.template arrived<DEEP - 2>();
        else if (call.depth == MIDDLE)
            p.template arrived<MIDDLE - 2>();
        else
            p.template arrived<0>();
    }

    // A step's x as three columns a row: what is left after the nearest bfloat16 is exact; after three nothing is.
    BOTH void split(P& p, const uint8_t* given, uint8_t* made, int step) {
        p.lanes([&](int lane) {
            const bool inside = step * COLUMNS + 4 * lane < call.columns;
            for (int m = 0; m < rows; m++) {
                uint32_t kept[4];
                float v[4];
                if (call.half_x) {
                    P::load8(kept, given + m * 256 + lane * 8);
                    UNROLLED for (int i = 0; i < 2; i++) v[2 * i] = float_of(kept[i] << 16), v[2 * i + 1] = float_of(kept[i] & 0xffff0000u);
                } else {
                    P::load16(kept, given + m * 512 + lane * 16);
                    UNROLLED for (int i = 0; i < 4; i++) v[i] = float_of(kept[i]);
                }
                if (call.input_scale != nullptr) {
                    P::load16(kept, given + call.given_bytes() - 512 + lane * 16);
                    UNROLLED for (int i = 0; i < 4; i++) v[i] = inside ? v[i] / float_of(kept[i]) : 0.f;
                }
                UNROLLED for (int part = 0; part < 3; part++) {
                    UNROLLED for (int i = 0; i < 2; i++) {
                        kept[i] = P::pack2(v[2 * i], v[2 * i + 1]);
                        v[2 * i] -= float_of(kept[i] << 16), v[2 * i + 1] -= float_of(kept[i] & 0xffff0000u);
                    }
                    P::store8(made + turned(3 * m + part, lane / 2) + lane % 2 * 8, kept);
                }
            }
        });
    }

    // Operand number `I`. 8 bits: of two that a code is the sum of, the one that `HIGH` says.
    template <int I, int HIGH>
    BOTH static uint32_t operand(const uint32_t* w) {
        if constexpr (TWICE) return eight<P, I, HIGH>(w);
        else if constexpr (PARTS == 1) return held<P, BITS, I>(w);
        else return pair<P, BITS, I>(w);
    }

    // A product of 16 columns: pairs 4 H to 4 H + 3 of a slice, and half H of x.
    template <int Q, int H, int T, int HIGH>
    BOTH void multiply(P& p) {
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            constexpr int I = 8 * Q + 4 * H;
            const uint32_t* w = s.w[T];
            s.a[0] = operand<I, HIGH>(w), s.a[1] = operand<I + 1, HIGH>(w);
            s.a[2] = operand<I + 2, HIGH>(w), s.a[3] = operand<I + 3, HIGH>(w);
        });
        UNROLLED for (int c = 0; c < C; c++)
            P::multiply(state, [c](S& s) { return Operands{s.d[c][T][TWICE ? HIGH : H % CHAINS], s.a, s.b[C == 1 ? Q : c] + 2 * H}; });
        if constexpr (TWICE && HIGH == 0) multiply<Q, H, T, 1>(p);
    }

    // Of all tiles that are multiplied at once, from slice `Q` to the last that shares its scale; with the first of them, x alone.
    template <int Q, int H, bool FIRST>
    BOTH void products(P& p, const uint8_t* x) {
        if constexpr (C != 1 && H == 0)
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                UNROLLED for (int c = 0; c < C; c++) P::load16(s.b[c], x + c * call.apart + (Q % 2 ? s.odd : s.even) + 64 * Q);
            });
        if constexpr (FIRST)
            UNROLLED for (int c = 0; c < C; c++)
                P::multiply(state, [c](S& s) { return Operands{s.t[c][TWICE ? 0 : H % CHAINS], s.ones, s.b[C == 1 ? Q : c] + 2 * H}; });
        multiply<Q, H, 0, 0>(p);
        if constexpr (AT_ONCE == 2) multiply<Q, H, 1, 0>(p);
        if constexpr (H == 0) products<Q, 1, FIRST>(p, x);
        if constexpr (H == 1 && (Q + 1) % EVERY != 0) products<Q + 1, 0, FIRST>(p, x);
    }

    // Column `c` of two, of eight number `e`: of x alone; and of tile `r`, multiplied as number `t`.
    BOTH static void total(S& s, int e, int c) {
        const float *once = s.t[e][0], *again = s.t[e][1];
        s.total[e][c] = CHAINS == 1 || TWICE ? once[c] : once[c] + again[c];
        // Of 8 bits, both products are of all columns.
        s.base[e][c] = TWICE ? once[2 + c] + once[2 + c] : CHAINS == 1 ? once[2 + c] : P::fma(again[2 + c], FACTOR, once[2 + c]);
    }
    BOTH static void flush(S& s, int e, int c, int r, int t) {
        UNROLLED for (int i = c; i < 4; i += 2) {
            const float rest = P::fma(s.offset[t][i / 2], s.total[e][c], s.sums[e][r][i]);
            float sum = CHAINS == 1 ? s.d[e][t][0][i] : P::fma(s.d[e][t][1][i], FACTOR, s.d[e][t][0][i]);
            if (PARTS == 1) sum -= s.base[e][c];
            s.sums[e][r][i] = P::fma(s.scale[t][i / 2], sum, rest);
        }
    }

    // What shares a scale, of the tiles from number `FROM` on.
    template <int Q, int FROM>
    BOTH void run(P& p, const uint8_t* stage, const uint8_t* x) {
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            const uint8_t* ranges = stage + R * CODES + s.g;
            UNROLLED for (int t = 0; t < AT_ONCE; t++) {
                load_codes<P, BITS>(s.w[t], stage + (FROM + t) * CODES, lane);
                UNROLLED for (int c = 0; c < C; c++) UNROLLED for (int h = 0; h < 2; h++) UNROLLED for (int i = 0; i < 4; i++)
                    s.d[c][t][h][i] = s.t[c][h][i] = 0.f;
            }
            constexpr int number = FROM * FLUSHES + Q / EVERY;
            if (call.half_ranges)
                UNROLLED for (int t = 0; t < AT_ONCE; t++) half_ranges<P>(s.scale[t], s.offset[t], ranges + (number + t * FLUSHES) * 64);
            else
                UNROLLED for (int t = 0; t < AT_ONCE; t++) ranges_of<P>(s.scale[t], s.offset[t], ranges + (number + t * FLUSHES) * 128);
        });
        products<Q, 0, FROM == 0>(p, x);
        // One row of bfloat16 is in all columns, of which the first counts.
        UNROLLED for (int c = 0; c < 2; c++)
            if (c == 0 || C != 1 || rows * PARTS > 1)
                p.lanes([&](int lane) {
                    S& s = P::at(state, lane);
                    UNROLLED for (int e = 0; e < C; e++) {
                        if (FROM == 0) total(s, e, c);
                        UNROLLED for (int t = 0; t < AT_ONCE; t++) flush(s, e, c, FROM + t, t);
                    }
                });
        // Of 3 bits and 16 columns, x is read again for these tiles: kept, it would take too many registers.
        if constexpr (FROM + AT_ONCE < R) run<Q, FROM + AT_ONCE>(p, stage, C != 1 && BITS == 3 ? x + P::kept(0u, 0) : x);
    }

    // The stage after those on their way, and this one's x as it is multiplied.
    BOTH void bring(P& p, int step) {
        if (ahead < call.steps) fetch<true>(p, ring + before), fetch_x(p, ring + before + call.given_at);
        ahead += WARPS;
        p.commit();
        if constexpr (PARTS != 1) split(p, ring + now + call.given_at, ring + call.depth * call.slot, step);
    }

    BOTH void use(P& p) {
        const uint8_t *stage = ring + now, *x = team + (PARTS == 1 ? now : call.depth * call.slot);
        if constexpr (C == 1)
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                UNROLLED for (int q = 0; q < SLICES; q++) P::load16(s.b[q], x + (q % 2 ? s.odd : s.even) + 64 * q);
            });
        run<0, 0>(p, stage, x);
        if constexpr (FLUSHES == 4) run<1, 0>(p, stage, x);
        if constexpr (FLUSHES != 1) run<2, 0>(p, stage, x);
        if constexpr (FLUSHES == 4) run<3, 0>(p, stage, x);
        before = now, now += call.slot;
        if (now == call.depth * call.slot) now = 0;
    }

    BOTH void over(P& p) {
        for (int step = warp; step < call.steps; step += WARPS) {
            arrived(p);
            // Both have copied x of this step, and have used that of the last, which is overwritten next.
            p.template team<C>(warp);
            bring(p, step);
            if constexpr (PARTS != 1) p.together(), p.template team<C>(warp);
            use(p);
        }
    }

    // The warp's sums [R, 16, C, MOST] into its own part of the ring, which is free by then.
    BOTH void close(P& p) {
        p.template arrived<0>();
        p.template team<C>(warp);
        float* to = reinterpret_cast<float*>(ring);
        p.lanes([&](int lane) {
            UNROLLED for (int e = 0; e < C; e++) UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < 4; i++)
                to[((r * ROWS + lane / 4 + i / 2 * 8) * C + e) * MOST + lane % 4 * 2 + i % 2] = P::at(state, lane).sums[e][r][i];
        });
    }
};

// Sums of all warps into out; by all warps.
template <class P, int R, int PARTS, int C>
BOTH void finish(P& p, const Call& call, int warp, int tile, int first, const uint8_t* memory) {
    const int rest = call.count - first, rows = rest < call.together ? rest : call.together;
    for (int base = warp * LANES; base < rows * C * R * ROWS; base += C * WARPS * LANES) {
        p.lanes([&](int lane) {
            const int e = base + lane, m = e / (C * R * ROWS), row = e % (C * R * ROWS), n = tile * ROWS + row;
            if (m >= rows || n >= call.rows) return;
            float total = 0.f;
            UNROLLED for (int part = 0; part < PARTS; part++) {
                const uint8_t* from = memory + 4 * (row * MOST + m * PARTS + part);
                if constexpr (C != 1) {
                    from = memory + row / (R * ROWS) * call.apart;
                    from += 4 * ((row % (R * ROWS) * C + m / call.own) * MOST + m % call.own * PARTS + part);
                }
                float sum = 0.f;
                UNROLLED for (int w = 0; w < WARPS; w++) sum += *reinterpret_cast<const float*>(from + w * C * call.apart);
                total += sum;
            }
            const int64_t at = int64_t(first + m) * call.rows + n;
            if (call.half_x)
                *reinterpret_cast<uint16_t*>(call.out + 2 * at) = uint16_t(P::pack2(total, 0.f));
            else
                *reinterpret_cast<float*>(call.out + 4 * at) = total;
        });
    }
}

}  // namespace fragments
