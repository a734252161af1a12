// What a warp does in wq_fragments.h, on the host and 32 lanes in turn: for tests where there is no GPU. Slow.
//
// Copies into the ring arrive when they are waited for, not before, and what lies there until then is poison. The product of a tensor core
// is cut off to float32 after each step, as theirs are.

// Compiled in a fraction of the time.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Og")
#endif

#include "wq_floats.h"
#include "wq_single.h"
#include "wq_slices.h"
#include "wq_weight.h"
#include "wq_whole.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <utility>
#include <vector>

namespace {

using namespace fragments;

float cut(double v) {
    float f = float(v);
    return std::fabs(double(f)) > std::fabs(v) ? std::nextafterf(f, 0.f) : f;
}

float upper(uint32_t pair) { return float_of(pair & 0xffff0000u); }
float lower(uint32_t pair) { return float_of(pair << 16); }

// To the nearest bfloat16, even where two are.
uint32_t rounded(float v) {
    const uint32_t bits = bits_of(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

struct Lanes32 {
    template <class T>
    struct Of {
        T lane[LANES];
    };
    struct Copy {
        uint8_t* to;
        const uint8_t* from;
        int bytes;
    };
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> pending;

    template <class T>
    static T& at(Of<T>& v, int lane) {
        return v.lane[lane];
    }
    template <class F>
    void lanes(const F& f) {
        for (int lane = 0; lane < LANES; lane++) f(lane);
    }

    void fetch(uint8_t* to, const uint8_t* from, int bytes) {
        if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) std::abort();
        memset(to, 0xff, bytes);
        open.push_back({to, from, bytes});
    }
    void fetch16(uint8_t* to, const uint8_t* from, bool there) {
        if (there) fetch(to, from, 16);
    }
    void fetch8(uint8_t* to, const uint8_t* from) { fetch(to, from, 8); }
    void fetch16_or_zeros(uint8_t* to, const uint8_t* from, bool there, bool inside) {
        alignas(16) static const uint8_t zeros[16] = {};
        if (there) fetch(to, inside ? from : zeros, 16);
    }
    void commit() { pending.push_back(std::move(open)), open.clear(); }
    template <int LEFT>
    void arrived() {
        for (; int(pending.size()) > LEFT; pending.pop_front())
            for (const Copy& c : pending.front()) memcpy(c.to, c.from, c.bytes);
    }

    void together() {}
    template <int C>
    void team(int) {}
    static uint32_t kept(uint32_t v, int) { return v; }
    static const uint8_t* kept(const uint8_t* v) { return v; }
    static const uint8_t* along(const uint8_t* from, int number, int apart) { return from + int64_t(number) * apart; }

    static void load(uint32_t* to, const uint8_t* from, int bytes) {
        if (reinterpret_cast<uintptr_t>(from) % bytes) std::abort();
        memcpy(to, from, bytes);
    }
    static void load16(uint32_t* to, const uint8_t* from) { load(to, from, 16); }
    static void load8(uint32_t* to, const uint8_t* from) { load(to, from, 8); }
    static void read16(uint32_t* to, const uint8_t* from) { load(to, from, 16); }
    static void read8(uint32_t* to, const uint8_t* from) { load(to, from, 8); }
    static void store16(uint8_t* to, const uint32_t* from) { memcpy(to, from, 16); }
    static void store8(uint8_t* to, const uint32_t* from) { memcpy(to, from, 8); }

    static int counted(int* counter) { return (*counter)++; }
    static void cleared(int* counter) { *counter = 0; }

    static float fma(float a, float b, float c) { return std::fma(a, b, c); }
    static float half(uint32_t bits) {
        const int exponent = bits >> 10 & 31, significand = bits & 1023;
        const float size = exponent == 31  ? significand ? NAN : INFINITY
                           : exponent == 0 ? std::ldexp(float(significand), -24)
                                           : std::ldexp(float(significand + 1024), exponent - 25);
        return bits >> 15 ? -size : size;
    }
    static uint32_t pack2(float low, float high) { return rounded(low) | rounded(high) << 16; }
    static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
        return pack2(std::fma(lower(a), lower(b), lower(c)), std::fma(upper(a), upper(b), upper(c)));
    }

    static uint32_t chosen(uint32_t word, uint32_t mask, uint32_t base) { return (word & mask) | base; }

    static uint32_t bytes(uint32_t a, uint32_t b, uint32_t of) {
        const uint64_t both = a | uint64_t(b) << 32;
        uint32_t made = 0;
        for (int i = 0; i < 4; i++) made |= uint32_t(both >> 8 * (of >> 4 * i & 7) & 255) << 8 * i;
        return made;
    }
    static uint32_t most2(uint32_t a, uint32_t b) { return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffffu, b & 0xffffu); }
    template <class S>
    static void most_of_eight(Of<S>& states) {
        for (int lane = 0; lane < LANES; lane += 8) {
            int most = 0;
            for (int i = 0; i < 8; i++) most = std::max(most, states.lane[lane + i].most);
            for (int i = 0; i < 8; i++) states.lane[lane + i].most = most;
        }
    }
    template <class S>
    static void sum_of_eight(Of<S>& states) {
        for (int lane = 0; lane < LANES; lane += 8) {
            int all = 0;
            for (int i = 0; i < 8; i++) all += states.lane[lane + i].all;
            for (int i = 0; i < 8; i++) states.lane[lane + i].all = all;
        }
    }
    // mma.m16n8k32: NVIDIA, PTX ISA, fragments of matrices of bytes.
    template <class S, class F>
    static void count(Of<S>& states, const F& of) {
        Bytes all[LANES];
        for (int lane = 0; lane < LANES; lane++) all[lane] = of(states.lane[lane]);
        for (int lane = 0; lane < LANES; lane++)
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4, half_of = i / 2, column = lane % 4 * 2 + i % 2;
                for (int k = 0; k < 32; k++) {
                    const int t = k % 16 / 4, later = k / 16, byte = k % 4;
                    const uint32_t a = all[4 * row + t].a[half_of + 2 * later], b = all[4 * column + t].b[later];
                    all[lane].d[i] += int(a >> 8 * byte & 255) * int(int8_t(b >> 8 * byte));
                }
            }
    }

    // mma.m16n8k16: NVIDIA, PTX ISA, fragments of matrices with 16-bit floats.
    template <class S, class F>
    static void multiply(Of<S>& states, const F& of) {
        Operands all[LANES];
        for (int lane = 0; lane < LANES; lane++) all[lane] = of(states.lane[lane]);
        for (int lane = 0; lane < LANES; lane++)
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4, half_of = i / 2, column = lane % 4 * 2 + i % 2;
                double sum = all[lane].d[i];
                for (int k = 0; k < 16; k++) {
                    const int t = k % 8 / 2, later = k / 8;
                    const uint32_t a = all[4 * row + t].a[half_of + 2 * later], b = all[4 * column + t].b[later];
                    sum += k % 2 ? double(upper(a)) * upper(b) : double(lower(a)) * lower(b);
                }
                all[lane].d[i] = cut(sum);
            }
    }

    template <int KIND>
    static void pack8(uint32_t* made, const float* v) {
        for (int i = 0; i < 4; i++) made[i] = pack2(v[2 * i], v[2 * i + 1]);
    }
    static void store_floats(uint8_t* out, const float* v) { memcpy(out, v, 32); }
    template <class S>
    static void exchange(Of<S>& states) {
        for (int lane = 0; lane < LANES; lane++)
            if (!(lane & 4)) std::swap(states.lane[lane].made[1], states.lane[lane + 4].made[0]);
    }
};

// What a team's warps do with their steps: one of them, then the other, up to each barrier.
template <int PARTS, class Work>
void by_turns(const Call& call, Lanes32* p, Work* work) {
    for (int step = work[0].warp, first = 0; step < call.steps; step += WARPS, first = 1 - first) {
        const int order[] = {first, 1 - first};
        for (const int i : order) work[i].arrived(p[i]);
        for (const int i : order) {
            work[i].bring(p[i], step);
            if (PARTS == 1) work[i].use(p[i]);
        }
        if (PARTS != 1)
            for (const int i : order) work[i].use(p[i]);
    }
}

// The blocks of a grid one after another; in a block, all warps up to each barrier.
template <int BITS, int R, int FLUSHES, int PARTS, int C = 1>
void product(Call call, int most) {
    const int bytes = arranged(call, BITS, R, FLUSHES, most, C), warps = C * WARPS;
    using Work = Warp<Lanes32, BITS, R, FLUSHES, PARTS, C>;
    std::vector<uint8_t> space(bytes + 128);
    uint8_t* memory = space.data() + (128 - reinterpret_cast<uintptr_t>(space.data()) % 128);
    for (int first = 0; first < call.count; first += call.together)
        for (int tile = 0; tile < call.tiles; tile += C * R) {
            memset(memory, 0xff, bytes);
            std::vector<Lanes32> p(warps);
            std::vector<Work> work;
            for (int w = 0; w < warps; w++) work.emplace_back(call, memory, w, tile, first);
            for (int w = 0; w < warps; w++) work[w].open(p[w]);
            for (int w = 0; w < warps; w += C) {
                for (int i = w; i < w + C; i++) work[i].begin(p[i]);
                if constexpr (C == 1) work[w].over(p[w]);
                else by_turns<PARTS>(call, &p[w], &work[w]);
                for (int i = w; i < w + C; i++) work[i].close(p[i]);
            }
            for (int w = 0; w < warps; w++) finish<Lanes32, R, PARTS, C>(p[w], call, w, tile, first, memory);
        }
}

// One row of x by blocks of two teams, of which some have tiles, several, or none. False where there is no room, or a tile would be left.
// `most`: the bytes of half of a multiprocessor.
template <class Work>
bool balanced(Call call, int most) {
    const int blocks = call.tiles > 3 ? 1 : 2, bytes = Work::bytes(call, blocks);
    if (call.tiles % Work::R || bytes > most || !counted(call)) return false;
    std::vector<uint8_t> space(bytes + 16);
    uint8_t* memory = space.data() + (16 - reinterpret_cast<uintptr_t>(space.data()) % 16);
    for (int block = 0; block < blocks; block++) {
        memset(memory, 0xff, bytes);
        std::vector<Lanes32> p(TEAMS * WARPS);
        std::vector<Work> work;
        for (int w = 0; w < TEAMS * WARPS; w++) work.emplace_back(call, memory, w, block, blocks);
        for (int w = 0; w < TEAMS * WARPS; w++) work[w].open(p[w]), work[w].begin(p[w]);
        for (int w = 0; w < TEAMS * WARPS; w++) work[w].over(p[w]);
        for (int w = 0; w < TEAMS * WARPS; w++) work[w].finish(p[w], block);
    }
    return true;
}

// One row of x by blocks of a tile, where the room is a block's.
template <bool HALF>
bool single(const Call& call, int most) {
    using Work = Single<Lanes32, HALF>;
    constexpr int BYTES = WARPS * Work::A::APART;
    if (BYTES > most || !Work::A::holds(call)) return false;
    std::vector<uint8_t> memory(BYTES + 16);
    for (int tile = 0; tile < call.tiles; tile++) {
        uint8_t* own = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16);
        std::fill(memory.begin(), memory.end(), uint8_t(0xff));
        std::vector<Lanes32> p(WARPS);
        std::vector<Work> work;
        for (int w = 0; w < WARPS; w++) work.emplace_back(call, own, w, tile);
        for (int w = 0; w < WARPS; w++) work[w].open(p[w]), work[w].begin(p[w]), work[w].over(p[w]), work[w].close(p[w]);
        for (int w = 0; w < WARPS; w++) work[w].finish(p[w]);
    }
    return true;
}

template <int BITS, bool HALF>
bool alone(const Call& call, int most) {
    if constexpr (BITS == 2) {
        return balanced<Whole<Lanes32, HALF, 2, SHORT>>(call, most) || balanced<Whole<Lanes32, HALF, 2, MIDDLE>>(call, most) ||
               balanced<Whole<Lanes32, HALF, 2, LONG>>(call, 2 * most) || balanced<Whole<Lanes32, HALF, 1, SHORT>>(call, most);
    } else {
        if (balanced<Floats<Lanes32, BITS, HALF>>(call, most)) return true;
        if constexpr (BITS == 4) return single<HALF>(call, most);
        return false;
    }
}

// Tiles of a block: as many as there are, of the numbers that a GPU's blocks have.
template <int BITS, int PARTS>
void product(const Call& call, int most) {
    switch ((call.tiles == 1 ? 10 : call.tiles == 2 || BITS == 8 || flushes_of(call) != 1 ? 20 : 40) + flushes_of(call)) {
        case 11: return product<BITS, 1, 1, PARTS>(call, most);
        case 12: return product<BITS, 1, 2, PARTS>(call, most);
        case 14: return product<BITS, 1, 4, PARTS>(call, most);
        case 21: return product<BITS, 2, 1, PARTS>(call, most);
        case 22: return product<BITS, 2, 2, PARTS>(call, most);
        case 24: return product<BITS, 2, 4, PARTS>(call, most);
        default:
            if constexpr (BITS != 8) return product<BITS, 4, 1, PARTS>(call, most);
    }
}

// By teams, of some numbers of tiles, of bits and of scales a step: of all, this would take half as long again to compile. False: not
// these.
template <int BITS>
bool by_teams(const Call& call, int most) {
    const Call wide = fragments::by_teams(call, 2);
    const int flushes = flushes_of(call);
    if constexpr (BITS == 4) {
        if (call.parts != 1 && flushes == 1) return product<BITS, 1, 1, 3, 2>(wide, most), true;
        if (call.parts == 1 && flushes == 1 && call.tiles <= 2) return product<BITS, 1, 1, 1, 2>(wide, most), true;
        if (call.parts == 1 && flushes == 4) return product<BITS, 2, 4, 1, 2>(wide, most), true;
    }
    if constexpr (BITS == 8)
        if (call.parts == 1 && flushes == 2) return product<BITS, 1, 2, 1, 2>(wide, most), true;
    if (call.parts == 1 && flushes == 1) return product<BITS, 2, 1, 1, 2>(wide, most), true;
    return false;
}

template <int BITS>
void product(const Call& call, int most) {
    if (call.count > MOST && by_teams<BITS>(call, most)) return;
    if constexpr (BITS != 8)
        if (is_alone(call) && (call.half_ranges ? alone<BITS, true>(call, most) : alone<BITS, false>(call, most))) return;
    call.parts == 1 ? product<BITS, 1>(call, most) : product<BITS, 3>(call, most);
}

// Blocks that come in any order: the last ones first.
template <int R, int DEPTH>
int slices(Slices s, int blocks, int64_t most) {
    const int64_t bytes = sliced(s, R, blocks, DEPTH);
    if (bytes > most) {
        if constexpr (DEPTH != least_side(R)) return slices<R, least_side(R)>(s, blocks, most);
        return 1;
    }
    std::vector<uint8_t> space(bytes + 128);
    uint8_t* memory = space.data() + (128 - reinterpret_cast<uintptr_t>(space.data()) % 128);
    for (int block = WARPS * blocks - 1; block >= 0; block--) {
        memset(memory, 0xff, bytes);
        std::vector<Lanes32> p(SIDE);
        std::vector<SideWarp<Lanes32, R, DEPTH>> work;
        for (int w = 0; w < SIDE; w++) work.emplace_back(s, memory, w, block);
        for (int w = 0; w < SIDE; w++) work[w].open(p[w]), work[w].bring(p[w]);
        for (int w = 0; w < SIDE; w++) work[w].sums_of_x(p[w]);
        for (int w = 0; w < SIDE; w++) work[w].over(p[w]);
    }
    return 0;
}

template <int BITS>
void weight(const Call& call) {
    Lanes32 p;
    for (int tile = 0; tile < call.tiles; tile++)
        for (int step = 0; step < call.steps; step++) {
            Lanes32::Of<Step<BITS>> state;
            read_step<Lanes32, BITS>(p, call, state, tile, step);
            call.half_x ? write_step<Lanes32, BITS, 1>(p, call, state, tile, step)
                        : write_step<Lanes32, BITS, 0>(p, call, state, tile, step);
        }
}

}  // namespace

// As `bitgrid_wq_gemv` in wq_gemv.cu, but for `most`: bytes of shared memory.
extern "C" void bitgrid_wq_gemv(int64_t words, int64_t ranges, int64_t x, int64_t input_scale, int64_t out, int64_t rows, int64_t columns,
                                int64_t groups, int64_t bits, int64_t count, int64_t half_ranges, int64_t half_x, int64_t most) {
    const Call call = described(words, ranges, x, input_scale, out, rows, columns, groups, count, half_ranges, half_x);
    const int m = int(most);
    bits == 2 ? product<2>(call, m) : bits == 3 ? product<3>(call, m) : bits == 4 ? product<4>(call, m) : product<8>(call, m);
}

// As in wq_slices.cu, of `most` bytes of shared memory. 1 where that is not enough, or the product is not one of these.
extern "C" int bitgrid_wq_slices(int64_t words, int64_t ranges, int64_t x, int64_t out, int64_t sums, int64_t arrived, int64_t rows,
                                 int64_t columns, int64_t groups, int64_t bits, int64_t count, int64_t half_ranges, int64_t at_once,
                                 int64_t blocks, int64_t most) {
    Slices s = {};
    s.call = described(words, ranges, x, 0, out, rows, columns, groups, count, half_ranges, 1);
    s.sums = reinterpret_cast<float*>(sums), s.arrived = reinterpret_cast<int*>(arrived);
    if (!is_sliced(s.call) || bits != SIDE_BITS) return 1;
    return at_once == 1 ? slices<1, deep_side(1)>(s, int(blocks), most) : slices<2, deep_side(2)>(s, int(blocks), most);
}

// half_out: 1: out is bfloat16, 0: float32.
extern "C" void bitgrid_wq_values(int64_t words, int64_t ranges, int64_t out, int64_t rows, int64_t columns, int64_t groups, int64_t bits,
                                  int64_t half_ranges, int64_t half_out) {
    const Call call = described(words, ranges, 0, 0, out, rows, columns, groups, 1, half_ranges, half_out);
    bits == 2 ? weight<2>(call) : bits == 3 ? weight<3>(call) : bits == 4 ? weight<4>(call) : weight<8>(call);
}
