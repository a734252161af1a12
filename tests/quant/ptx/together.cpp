// Instructions of a warp's lanes together, and barriers.

#include <algorithm>

#include "state.h"

namespace ptx {
namespace {

// Lane of which each gets the value, and whether there is one. NVIDIA, PTX ISA, `shfl.sync`.
template <class F>
void shuffle(Warp& w, const Inst& i, uint32_t lanes, F source) {
    const bool tells = i.at.size() == 6;
    const uint64_t *a = w.of(i.at[1 + tells]), *b = w.of(i.at[2 + tells]), *c = w.of(i.at[3 + tells]);
    uint64_t got[LANES], there[LANES];
    each(lanes, [&](int l) {
        const int segment = int(c[l] >> 8 & 31), least = l & segment, most = least | (int(c[l] & 31) & ~segment);
        const auto [from, good] = source(l, int(b[l] & 31), least, most, segment);
        const int j = good ? from : l;
        if (!(lanes >> j & 1)) throw Fault("a value of lane " + std::to_string(j) + ", which takes no part");
        got[l] = uint32_t(a[j]), there[l] = good;
    });
    each(lanes, [&](int l) {
        w.of(i.at[0])[l] = got[l];
        if (tells) w.of(i.at[1])[l] = there[l];
    });
}
struct From {
    int lane;
    bool good;
};

template <class F>
void reduce(Warp& w, const Inst& i, uint32_t lanes, F f) {
    const uint64_t* a = w.of(i.at[1]);
    uint32_t all = uint32_t(a[__builtin_ctz(lanes)]);
    each(lanes & (lanes - 1), [&](int l) { all = f(all, uint32_t(a[l])); });
    each(lanes, [&](int l) { w.of(i.at[0])[l] = all; });
}

// A product of 16 x 8, added to c: lane 4 g + t has rows g and g + 8 of a and of the sums, column g of b; of a register's E elements of a,
// columns E t to E t + E - 1, and as many 4 E further on in the last two registers. PTX ISA, "Matrix Fragments for mma".
template <int E, class Sum, class Product>
void product(Warp& w, const Inst& i, uint32_t lanes, Product f) {
    if (lanes != ~0u) throw Fault("mma by a part of a warp");
    uint64_t *d[4], *a[4], *b[2], *c[4];
    for (int k = 0; k < 4; k++) d[k] = w.of(i.at[k]), a[k] = w.of(i.at[4 + k]), c[k] = w.of(i.at[10 + k]);
    for (int k = 0; k < 2; k++) b[k] = w.of(i.at[8 + k]);
    Sum sums[16][8];
    for (int row = 0; row < 16; row++)
        for (int n = 0; n < 8; n++) {
            Sum s = 0;
            for (int k = 0; k < 8 * E; k += E) {
                const int t = k / E % 4, far = k / E / 4;
                s += f(uint32_t(a[row / 8 + 2 * far][row % 8 * 4 + t]), uint32_t(b[far][n * 4 + t]));
            }
            sums[row][n] = s;
        }
    for (int row = 0; row < 16; row++)
        for (int n = 0; n < 8; n++) {
            const int k = row / 8 * 2 + n % 2, l = row % 8 * 4 + n / 2;
            if constexpr (std::is_floating_point_v<Sum>)
                d[k][l] = bits(float(sums[row][n] + as<float>(c[k][l])));
            else
                d[k][l] = uint32_t(sums[row][n] + int32_t(c[k][l]));
        }
}

double brains(uint32_t a, uint32_t b) {  // a multiprocessor's own sums are less exact, in the last bits of float
    const auto v = [](uint32_t x) { return double(as<float>(uint64_t(x))); };
    return v(a << 16) * v(b << 16) + v(a & 0xffff0000u) * v(b & 0xffff0000u);
}
double shorts(uint32_t a, uint32_t b) {  // of float32 what tf32 has
    return double(as<float>(uint64_t(a & 0xffffe000u))) * double(as<float>(uint64_t(b & 0xffffe000u)));
}
int32_t bytes(uint32_t a, uint32_t b) {
    int32_t s = 0;
    for (int e = 0; e < 32; e += 8) s += int32_t(a >> e & 255) * int8_t(b >> e);
    return s;
}

void settle(Launch& a, Block& block, int number) {
    Barrier& bar = block.barriers[number];
    int living = 0;
    for (Warp& w : a.warps) living += w.block == &block && w.exited != w.real;
    if (bar.waiting.empty() || int(bar.waiting.size()) < (bar.warps ? bar.warps : living)) return;
    Clock all = bar.waiting[0]->clock;
    for (Warp* w : bar.waiting) join(all, w->clock);
    for (Warp* w : bar.waiting) {
        w->clock = all, w->clock[w->id]++, w->waits = false;
        if (w->reduced >= 0) each(w->real & ~w->exited, [&](int l) { w->of(w->reduced)[l] = bar.any; });
        w->reduced = -1;
    }
    bar = {};
}

void arrive(Warp& w, uint64_t number, int warps, int reduced, bool any) {
    if (number > 15) throw Fault("barrier " + std::to_string(number));
    Barrier& bar = w.block->barriers[number];
    if (bar.waiting.empty()) bar.warps = warps;
    if (bar.warps != warps) throw Fault("a barrier that is one of other warps");
    w.waits = true, w.reduced = reduced, bar.any |= any;
    bar.waiting.push_back(&w);
    settle(*w.launch, *w.block, int(number));
}

void block_barrier(Warp& w, const Inst& i, uint32_t lanes) {
    const int first = __builtin_ctz(lanes);
    const uint64_t threads = i.at.size() > 1 ? uint32_t(w.of(i.at[1])[first]) : 0;
    if (threads % LANES) throw Fault("a barrier of no whole warps");
    arrive(w, uint32_t(w.of(i.at[0])[first]), int(threads / LANES), -1, false);
}
void either_barrier(Warp& w, const Inst& i, uint32_t lanes) {
    bool any = false;
    each(lanes, [&](int l) { any |= w.of(i.at[2])[l] & 1; });
    arrive(w, w.of(i.at[1])[__builtin_ctz(lanes)], 0, i.at[0], any);
}

template <bool RELEASES>
void cluster_arrive(Warp& w, const Inst&, uint32_t) {
    if (w.cluster_phase > w.launch->phase) throw Fault("arrived twice at the cluster's barrier");
    w.cluster_phase++;
    if (RELEASES) join(w.launch->arriving, w.clock), w.clock[w.id]++;
    settle(*w.launch);
}
void cluster_wait(Warp& w, const Inst&, uint32_t) {
    if (w.cluster_phase > w.launch->phase)
        w.waits = w.of_cluster = true;
    else
        join(w.clock, w.launch->released);
}

}  // namespace

void settle(Launch& a) {
    for (Block& block : a.blocks)
        for (int i = 0; i < 16; i++) settle(a, block, i);
    bool all = true, any = false;
    for (Warp& w : a.warps) all &= w.exited == w.real || w.cluster_phase > a.phase, any |= w.cluster_phase > a.phase;
    if (!all || !any) return;
    a.phase++, a.released = a.arriving;
    for (Warp& w : a.warps)
        if (w.of_cluster) w.waits = w.of_cluster = false, join(w.clock, a.released);
}

void add_together(Table& t) {
#define SHUFFLE(NAME, J, GOOD)                                                      \
    t["shfl.sync." NAME ".b32"] = [](Warp& w, const Inst& i, uint32_t m) {          \
        shuffle(w, i, m, [](int l, int b, int least, int most, int segment) {       \
            return (void)l, (void)least, (void)segment, From{J, GOOD};              \
        });                                                                         \
    }
    SHUFFLE("up", l - b, l - b >= most);
    SHUFFLE("down", l + b, l + b <= most);
    SHUFFLE("bfly", l ^ b, (l ^ b) <= most);
    SHUFFLE("idx", least | (b & ~segment), (least | (b & ~segment)) <= most);
    t["vote.sync.ballot.b32"] = [](Warp& w, const Inst& i, uint32_t m) {
        uint32_t v = 0;
        each(m, [&](int l) { v |= uint32_t(w.of(i.at[1])[l] & 1) << l; });
        each(m, [&](int l) { w.of(i.at[0])[l] = v; });
    };
    using In = const Inst&;
    t["redux.sync.add.s32"] = [](Warp& w, In i, uint32_t m) { reduce(w, i, m, [](uint32_t a, uint32_t b) { return a + b; }); };
    t["redux.sync.max.u32"] = [](Warp& w, In i, uint32_t m) { reduce(w, i, m, [](uint32_t a, uint32_t b) { return std::max(a, b); }); };
    t["bar.warp.sync"] = [](Warp& w, const Inst&, uint32_t) { w.clock[w.id]++; };
    t["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = [](Warp& w, In i, uint32_t m) { product<2, double>(w, i, m, brains); };
    t["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"] = [](Warp& w, In i, uint32_t m) { product<1, double>(w, i, m, shorts); };
    t["mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"] = [](Warp& w, In i, uint32_t m) { product<4, int32_t>(w, i, m, bytes); };
    t["mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"] = [](Warp& w, In i, uint32_t m) {
        product<32, int32_t>(w, i, m, [](uint32_t a, uint32_t b) { return __builtin_popcount(a & b); });
    };
    t["bar.sync"] = block_barrier, t["bar.red.or.pred"] = either_barrier;
    t["barrier.cluster.arrive"] = cluster_arrive<true>, t["barrier.cluster.arrive.relaxed"] = cluster_arrive<false>;
    t["barrier.cluster.wait"] = cluster_wait;
}

}  // namespace ptx
