// A few rows of x times a weight of 2, 3, 4 or 8 bits on tensor cores: what a warp does, for the GPU and, lane by lane, for the host.
//
// Layout of the weight: quant/kernels/wq_gemv/fragments.py. A warp multiplies 16 rows of the weight (m16n8k16: codes as bfloat16, which are
// exact) with up to 8 columns of numbers in bfloat16, adding up in float32. A bfloat16 row of x is one column; another row is three, whose
// sum it is exactly. The scale of a group is applied to its sum; what the zero takes off is a multiple of the sum of the group's x.
//
// The warps of a block share 16 R rows: warp w takes the steps (128 columns) w, w + 8, ... Each lane copies its own codes into a ring in
// shared memory well ahead of their use, so that what is in flight does not depend on registers. A row of x comes out the same bit for bit
// whatever stands beside it: a column of the product never meets another one, and sums are taken in one order.
//
// P, the policy, is one lane of a warp (device) or 32 lanes in turn (host): `Of<T>` is what a lane has, or 32 of them; `lanes(f)` calls
// f(lane) for those that there are; `at(v, lane)` is the lane's own.

#pragma once

#include "wq_call.h"

namespace fragments {

BOTH float float_of(uint32_t bits) {
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

BOTH uint32_t bits_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof v);
    return bits;
}

// Two codes of `BITS` at bit `AT` + `SHIFT` of both halves of a word, as bfloat16. With the exponent of 128 the code is the lower part of
// a significand of 8 bits: 128 + code · 2^AT.
template <class P, int BITS, int SHIFT, int AT>
BOTH uint32_t window(uint32_t word) {
    constexpr uint32_t mask = (((1u << BITS) - 1u) << AT) * 0x00010001u;
    constexpr uint32_t factor = uint32_t(127 - AT) << 7, less = 0x8000u | uint32_t(127 + 7 - AT) << 7;
    return P::fma2(P::chosen(word >> SHIFT, mask, 0x43004300u), factor * 0x00010001u, less * 0x00010001u);
}

// Pair `I` of a step that a lane has, of 32.
template <class P, int BITS, int I>
BOTH uint32_t pair(const uint32_t* w) {
    if constexpr (BITS == 2) {
        constexpr int i = I % 8;
        return window<P, 2, i / 3 * 6, i % 3 * 2>(w[I / 8]);
    } else if constexpr (BITS == 3) {
        constexpr int u = I / 16 * 3, v = I % 16, i = v % 5;
        if constexpr (v < 15) return window<P, 3, i / 2 * 6, i % 2 * 3>(w[u + v / 5]);
        uint32_t code = P::chosen(w[u] >> 15, 0x00010001u, 0x43004300u);
        code = P::chosen(w[u + 1] >> 14, 0x00020002u, code);
        code = P::chosen(w[u + 2] >> 13, 0x00040004u, code);
        return P::fma2(code, 0x3f803f80u, 0xc300c300u);
    } else if constexpr (BITS == 4) {
        return window<P, 4, I % 4 * 4, 0>(w[I / 4]);
    } else {
        // The exponent's lowest bit is the code's highest: 128 or 256. 1 · that - 256, and 1 · (128 + lower 7 bits) + what came out.
        const uint32_t word = w[I / 2] >> (I % 2 * 8);
        const uint32_t high = P::fma2(P::chosen(word, 0x00800080u, 0x43004300u), 0x3f803f80u, 0xc380c380u);
        return P::fma2(P::chosen(word, 0x007f007fu, 0x43004300u), 0x3f803f80u, high);
    }
}

template <int BITS, int R>
struct State {
    uint32_t w[2 * BITS];       // a step's codes
    uint32_t b[SLICES][4];      // a step of x: b[q][2 h], b[q][2 h + 1] belong to half h of slice q
    uint32_t a[4];              // a product's codes
    float d[2][4];              // two products' sums: neither waits for the other
    float sums[R][4];           // rows g, g, g + 8, g + 8 and columns 2 t, 2 t + 1 of lane 4 g + t
    const uint8_t *codes, *ranges;  // what the lane copies of the first tile's next step, and of its first group
    int64_t group;                  // of the next step: bytes from `ranges`
    const uint8_t *x, *totals;      // of the next step, in shared memory
    float scale[2], offset[2];      // of the rows g and g + 8
    uint32_t total[2];              // sums of x
};

// Scale and offset of the two rows of a lane.
template <class P>
BOTH void load_ranges(float* scale, float* offset, const uint8_t* from, int g, int half_ranges) {
    if (half_ranges) {
        uint32_t v[2];
        P::load8(v, from + 8 * g);
        UNROLLED for (int i = 0; i < 2; i++) {
            scale[i] = P::half(v[i] & 0xffffu);
            offset[i] = -(P::half(v[i] >> 16) * scale[i]);
        }
    } else {
        uint32_t v[4];
        P::load16(v, from + 16 * g);
        UNROLLED for (int i = 0; i < 2; i++) scale[i] = float_of(v[2 * i]), offset[i] = float_of(v[2 * i + 1]);
    }
}

template <class P, int BITS>
BOTH void load_codes(uint32_t* w, const uint8_t* from, int lane) {
    if constexpr (BITS == 3) {
        P::load16(w, from + 16 * lane);
        P::load8(w + 4, from + 512 + 8 * lane);
    } else {
        UNROLLED for (int l = 0; l < BITS / 2; l++) P::load16(w + 4 * l, from + 512 * l + 16 * lane);
    }
}

// One warp of a block. FLUSHES: runs of 128 / FLUSHES columns of a step that have a scale each.
template <class P, int BITS, int R, int FLUSHES>
struct Warp {
    static constexpr int D = depth(BITS, FLUSHES), EVERY = SLICES / FLUSHES;
    using S = State<BITS, R>;

    const Call& call;
    uint8_t *ring, *now, *before;  // stages to use next, and used last: that one is free
    const uint8_t* x;              // of the panel: bfloat16, a column after another
    const float* totals;           // of the panel: [steps, FLUSHES, MOST], sums of x
    int warp, first, ahead;        // first: tile; ahead: the step to fetch next
    int codes_apart[R], ranges_apart[R];  // bytes from the first tile's; a tile that there is not is the last one again
    typename P::template Of<S> state;

    BOTH Warp(const Call& c, uint8_t* memory, int w, int tile)
        : call(c), ring(memory + w * D * c.slot), now(ring), before(ring), x(memory + WARPS * D * c.slot), warp(w), first(tile),
          ahead(w) {
        UNROLLED for (int r = 0; r < R; r++) {
            const int t = tile + r < c.tiles ? r : c.tiles - 1 - tile;
            codes_apart[r] = t * c.steps * code_bytes(BITS), ranges_apart[r] = t * c.groups * 16 * c.pieces();
        }
        totals = reinterpret_cast<const float*>(x + c.columns_of(c.together) * c.stride);
    }

    BOTH uint8_t* after(uint8_t* stage) const { return stage + call.slot < ring + D * call.slot ? stage + call.slot : ring; }

    // The warp's next stage, of tile number r; stages are steps, then tiles.
    BOTH void fetch(P& p, uint8_t* to, int r) {
        if (ahead < call.steps) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                const uint8_t* from = s.codes + codes_apart[r];
                uint8_t* own = to + 16 * lane;
                UNROLLED for (int l = 0; l < BITS / 2; l++) p.fetch16(own + 512 * l, from + 512 * l);
                if constexpr (BITS == 3) p.fetch8(to + 512 + 8 * lane, from + 512 - 8 * lane);
                const int flush = lane >> (call.half_ranges ? 2 : 3);
                if (r == 0) s.group = int64_t(call.group_of(ahead * SLICES + flush * EVERY)) * (16 * call.pieces());
                if (flush < FLUSHES) p.fetch16(own + code_bytes(BITS), s.ranges + (s.group + ranges_apart[r]));
                if (r == R - 1) s.codes += WARPS * code_bytes(BITS);
            });
        }
        if (r == R - 1) ahead += WARPS;
        p.commit();
    }

    // Fills the ring but for one stage.
    BOTH void open(P& p) {
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            s.codes = call.words + (int64_t(first) * call.steps + warp) * code_bytes(BITS) + 16 * lane;
            s.ranges = call.ranges + (int64_t(first) * call.groups * call.pieces() + (lane & (call.pieces() - 1))) * 16;
            UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < 4; i++) s.sums[r][i] = 0.f;
        });
        UNROLLED for (int i = 0; i < D - 1; i++) fetch(p, ring + i * call.slot, i % R);
        before = ring + (D - 1) * call.slot;
    }

    template <int Q, int H>
    BOTH void multiply(P& p) {
        p.lanes([&](int lane) {
            S& s = P::at(state, lane);
            s.a[0] = pair<P, BITS, 8 * Q + 4 * H>(s.w), s.a[1] = pair<P, BITS, 8 * Q + 4 * H + 1>(s.w);
            s.a[2] = pair<P, BITS, 8 * Q + 4 * H + 2>(s.w), s.a[3] = pair<P, BITS, 8 * Q + 4 * H + 3>(s.w);
        });
        P::multiply(state, Q, H);
    }

    // Ranges and sums of x are fetched before the products that they are for.
    template <int Q>
    BOTH void slice(P& p, const uint8_t* slot, int r) {
        if constexpr (Q % EVERY == 0)
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                UNROLLED for (int h = 0; h < 2; h++) UNROLLED for (int i = 0; i < 4; i++) s.d[h][i] = 0.f;
                const uint8_t* at = slot + code_bytes(BITS) + Q / EVERY * 16 * call.pieces();
                load_ranges<P>(s.scale, s.offset, at, lane / 4, call.half_ranges);
                P::load8(s.total, s.totals + Q / EVERY * MOST * 4);
            });
        multiply<Q, 0>(p);
        multiply<Q, 1>(p);
        if constexpr (Q % EVERY == EVERY - 1)
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                UNROLLED for (int i = 0; i < 4; i++) {
                    const float rest = P::fma(s.offset[i / 2], float_of(s.total[i % 2]), s.sums[r][i]);
                    s.sums[r][i] = P::fma(s.scale[i / 2], s.d[0][i] + s.d[1][i], rest);
                }
            });
    }

    // The steps of panel number `panel`, whose x and totals are there.
    BOTH void over(P& p, int panel) {
        const int begin = panel * (call.panel / WARPS), end = begin + call.panel / WARPS;
        p.lanes([&](int lane) {
            const int column = lane / 4, last = call.columns_of(call.together) - 1;
            P::at(state, lane).x = x + (column < last ? column : last) * call.stride + warp * (2 * COLUMNS) + lane % 4 * 16;
            P::at(state, lane).totals = reinterpret_cast<const uint8_t*>(totals + warp * FLUSHES * MOST + lane % 4 * 2);
        });
        for (int j = begin; j < end && warp + WARPS * j < call.steps; j++) {
            p.lanes([&](int lane) {
                S& s = P::at(state, lane);
                UNROLLED for (int q = 0; q < SLICES; q++) P::load16(s.b[q], s.x + 64 * q);
                s.x += WARPS * 2 * COLUMNS;
            });
            UNROLLED for (int r = 0; r < R; r++) {
                p.template arrived<D - 2>();
                fetch(p, before, (D - 1 + r) % R);
                p.lanes([&](int lane) { load_codes<P, BITS>(P::at(state, lane).w, now, lane); });
                slice<0>(p, now, r);
                slice<1>(p, now, r);
                slice<2>(p, now, r);
                slice<3>(p, now, r);
                before = now, now = after(now);
            }
            p.lanes([&](int lane) { P::at(state, lane).totals += WARPS * FLUSHES * MOST * 4; });
        }
    }

    // The warp's sums [R, 16, MOST] into its own part of the ring, which is free by then.
    BOTH void close(P& p) {
        p.template arrived<0>();
        float* to = reinterpret_cast<float*>(ring);
        p.lanes([&](int lane) {
            UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < 4; i++)
                to[(r * ROWS + lane / 4 + i / 2 * 8) * MOST + lane % 4 * 2 + i % 2] = P::at(state, lane).sums[r][i];
        });
    }
};

template <int TURNS>
struct Loaded {
    uint32_t of[TURNS][8];
};

// x of a panel as columns of bfloat16, and its sums over what shares a scale; by all warps, for rows of x from `first` on. PARTS: as in the
// call, known where there is nothing to be computed. TURNS: eights that are on their way to a lane before the first is used.
template <class P, int FLUSHES, int PARTS, int TURNS>
BOTH void place_parts(P& p, const Call& call, int warp, int panel, int first, uint8_t* x) {
    float* totals = reinterpret_cast<float*>(x + call.columns_of(call.together) * call.stride);
    const int begin = panel * call.panel, left = call.steps - begin, steps = left < call.panel ? left : call.panel;
    const int rest = call.count - first, rows = rest < call.together ? rest : call.together;
    const int eights = steps * (COLUMNS / 8), all = rows * eights;
    for (int start = warp * LANES; start < all; start += TURNS * WARPS * LANES) {
        typename P::template Of<Loaded<TURNS>> loaded;
        p.lanes([&](int lane) {
            UNROLLED for (int u = 0; u < TURNS; u++) {
                const int e = start + u * WARPS * LANES + lane, m = e / eights, column = begin * COLUMNS + (e - m * eights) * 8;
                uint32_t* to = P::at(loaded, lane).of[u];
                UNROLLED for (int i = 0; i < 8; i++) to[i] = 0;
                if (e < all && column < call.columns) {
                    const int64_t at = int64_t(first + m) * call.columns + column;
                    P::read16(to, call.x + (PARTS == 1 || call.half_x ? 2 : 4) * at);
                    if (PARTS != 1 && !call.half_x) P::read16(to + 4, call.x + 4 * at + 16);
                }
            }
        });
        UNROLLED for (int u = 0; u < TURNS; u++) {
            typename P::template Of<float> total;
            p.lanes([&](int lane) {
                const int e = start + u * WARPS * LANES + lane, m = e / eights, eight = e - m * eights;
                uint32_t* kept = P::at(loaded, lane).of[u];
                float v[8];
                if (PARTS == 1 || call.half_x)
                    UNROLLED for (int i = 0; i < 4; i++) v[2 * i] = float_of(kept[i] << 16), v[2 * i + 1] = float_of(kept[i] & 0xffff0000u);
                else
                    UNROLLED for (int i = 0; i < 8; i++) v[i] = float_of(kept[i]);
                const int column = begin * COLUMNS + eight * 8;
                if (PARTS != 1 && call.input_scale != nullptr && e < all && column < call.columns)
                    UNROLLED for (int i = 0; i < 8; i++) v[i] = v[i] / call.input_scale[column + i];
                P::at(total, lane) = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
                if (e >= all) return;
                uint8_t* to = x + m * PARTS * call.stride + eight * 16;
                // What is left after the nearest bfloat16 is exact; after three nothing is.
                for (int part = 0; part < PARTS; part++) {
                    if (PARTS != 1) UNROLLED for (int i = 0; i < 4; i++) {
                        kept[i] = P::pack2(v[2 * i], v[2 * i + 1]);
                        v[2 * i] -= float_of(kept[i] << 16), v[2 * i + 1] -= float_of(kept[i] & 0xffff0000u);
                    }
                    P::store16(to + part * call.stride, kept);
                }
            });
            UNROLLED for (int apart = 1; apart < 16 / FLUSHES; apart *= 2) P::fold(total, apart);
            p.lanes([&](int lane) {
                const int e = start + u * WARPS * LANES + lane, m = e / eights, eight = e - m * eights;
                if (e >= all || eight % (16 / FLUSHES) != 0) return;
                float* to = totals + eight / (16 / FLUSHES) * MOST + m * PARTS;
                to[0] = P::at(total, lane);
                for (int part = 1; part < PARTS; part++) to[part] = 0.f;
            });
        }
    }
}

template <class P, int FLUSHES>
BOTH void place(P& p, const Call& call, int warp, int panel, int first, uint8_t* x) {
    if (call.parts == 1)
        place_parts<P, FLUSHES, 1, 4>(p, call, warp, panel, first, x);
    else
        place_parts<P, FLUSHES, 3, 1>(p, call, warp, panel, first, x);
}

// Sums of all warps, `apart` bytes from one warp's to the next, into out; by all warps.
template <class P, int R>
BOTH void finish(P& p, const Call& call, int warp, int tile, int first, const uint8_t* ring, int apart) {
    const int rest = call.count - first, rows = rest < call.together ? rest : call.together;
    for (int base = warp * LANES; base < rows * R * ROWS; base += WARPS * LANES) {
        p.lanes([&](int lane) {
            const int e = base + lane, m = e / (R * ROWS), row = e % (R * ROWS), n = tile * ROWS + row;
            if (m >= rows || n >= call.rows) return;
            float total = 0.f;
            for (int part = 0; part < call.parts; part++) {
                const uint8_t* from = ring + 4 * (row * MOST + m * call.parts + part);
                float sum = 0.f;
                UNROLLED for (int w = 0; w < WARPS; w++) sum += *reinterpret_cast<const float*>(from + w * apart);
                total += sum;
            }
            const int64_t at = int64_t(first + m) * call.rows + n;
            if (call.half_x) {
                const uint16_t made = uint16_t(P::pack2(total, 0.f));
                memcpy(call.out + 2 * at, &made, 2);
            } else {
                memcpy(call.out + 4 * at, &total, 4);
            }
        });
    }
}

}  // namespace fragments
