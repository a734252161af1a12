// Instructions that read and write memory, and what compute-sanitizer looks for on a device: accesses beside buffers, at odd addresses, of
// shared memory that nothing was written to, and by two threads with no barrier in between.

#include <algorithm>
#include <cstdio>

#include "state.h"

namespace ptx {
namespace {

enum Access { READ, WRITE, ATOMIC };

[[noreturn]] void fail(const char* what, uint64_t address, int bytes, int lane) {
    char text[200];
    std::snprintf(text, sizeof text, "lane %d, %d bytes at %#llx: %s", lane, bytes, static_cast<unsigned long long>(address), what);
    throw Fault(text);
}

// value: what is written. The same from several threads is what is there, whoever comes last.
uint8_t* shared_at(Warp& w, int lane, uint32_t address, int bytes, Access how, bool far, const uint8_t* value = nullptr) {
    const uint32_t rank = address >> RANK, at = address & ((1u << RANK) - 1);
    Launch& a = *w.launch;
    if (rank >= a.blocks.size() || (!far && rank != w.block->rank)) fail("shared memory of no block, or of another", address, bytes, lane);
    Block& block = a.blocks[rank];
    if (at + bytes > block.shared.size()) fail("outside shared memory", at, bytes, lane);
    const size_t warps = a.warps.size() / a.blocks.size();  // of a block
    if (how != WRITE && &block != w.block) fail("a read of another block's shared memory, which nobody has needed yet", at, bytes, lane);
    for (size_t i = at; i < at + bytes; i++) {
        Stamp& last = block.wrote[i];
        if (last.clock == 0 && how == ATOMIC) fail("shared memory that nothing was written to", i, bytes, lane);
        const bool mine = last.warp == w.id && (last.lane == lane || last.clock < w.now());
        const bool before = last.clock == 0 || mine || (last.warp != w.id && last.clock <= w.clock[last.warp]);
        const bool same = (how == ATOMIC && last.atomic) || (value != nullptr && value[i - at] == block.shared[i]);
        if (!before && how == READ && !a.strict) {
            a.poisoned = true;  // which it may load, but not use
            continue;
        }
        if (!before && !same) fail("a race with a write of shared memory", i, bytes, lane);
        Reading* const read = &block.read[i * warps];
        if (how != WRITE) {
            Reading& own = read[w.number];
            own = {w.now(), w.met, own.met == w.met && own.lane != uint32_t(lane) ? SEVERAL : uint32_t(lane)};
        }
        if (how == READ) continue;
        for (size_t v = 0, id = rank * warps; v < warps && how == WRITE && a.strict; v++, id++) {
            const bool own = id == size_t(w.id);
            const bool by_another = own ? read[v].met == w.met && read[v].lane != uint32_t(lane) : read[v].clock > w.clock[id];
            if (by_another) fail("a race with a read of shared memory", i, bytes, lane);
        }
        last = {w.now(), uint16_t(w.id), uint8_t(lane), uint8_t(how == ATOMIC)};
    }
    return &block.shared[at];
}

// Blocks of a launch, but for those of a cluster, wait for each other by nothing but what `acquired` notes.
void check_blocks(Launch& a, Buffer& b, int lane, uint64_t address, int bytes, Access how, const uint8_t* value) {
    for (size_t i = address - b.base, end = i + bytes; i < end; i++) {
        const bool other = b.wrote[i] != 0 && b.wrote[i] != a.number;
        const bool seen = how == WRITE && b.read[i] != 0 && b.read[i] != a.number;
        const bool same = how == WRITE && value[i + bytes - end] == reinterpret_cast<const uint8_t*>(b.base)[i];
        if ((other || seen) && !same && !a.acquired) fail("a race with what another block writes or reads", address, bytes, lane);
        if (how == READ) b.read[i] = b.read[i] == 0 || b.read[i] == a.number ? a.number : ~0u;
        if (how == WRITE) b.wrote[i] = a.number;
    }
}

uint8_t* global_at(Warp& w, int lane, uint64_t address, int bytes, Access how, const uint8_t* value = nullptr) {
    Launch& a = *w.launch;
    const auto inside = [&](const Buffer& b) { return address >= b.base && address + bytes <= b.base + b.bytes; };
    if (a.last == nullptr || !inside(*a.last)) {
        const auto found = std::find_if(a.buffers.begin(), a.buffers.end(), inside);
        if (found == a.buffers.end()) fail("outside all buffers", address, bytes, lane);
        a.last = &*found;
    }
    if (w.early && a.last->late) fail("before the kernel in front is over, which may write it", address, bytes, lane);
    if (how != ATOMIC) check_blocks(a, *a.last, lane, address, bytes, how, value);
    return reinterpret_cast<uint8_t*>(address);
}

uint8_t* place(Warp& w, int lane, uint64_t address, int bytes, Access how, char space, const uint8_t* value = nullptr) {
    if (address % bytes) fail("not a multiple of its size", address, bytes, lane);
    if (space == 's') return shared_at(w, lane, uint32_t(address), bytes, how, false, value);
    if (space == 'e' && address >= SHARED) return shared_at(w, lane, uint32_t(address), bytes, how, true, value);
    return global_at(w, lane, address, bytes, how, value);
}

template <char SPACE>
void load(Warp& w, const Inst& i, uint32_t lanes) {
    const int n = i.n, size = i.width < 0 ? -i.width : i.width;  // negative: signed
    each(lanes, [&](int l) {
        const uint64_t address = w.of(i.at[n])[l] + w.of(i.at[n + 1])[l];
        const uint8_t* from;
        if constexpr (SPACE == 'p') {
            if (address + n * size > w.launch->params.size()) fail("outside the parameters", address, n * size, l);
            from = &w.launch->params[address];
        } else {
            w.launch->poisoned = false;
            from = place(w, l, address, n * size, READ, SPACE);
            if (w.launch->poisoned) from = w.launch->poison;
        }
        for (int k = 0; k < n; k++) {
            uint64_t v = 0;
            std::memcpy(&v, from + k * size, size);
            if (i.width < 0) v = uint64_t(int64_t(v << (64 - 8 * size)) >> (64 - 8 * size));
            w.of(i.at[k])[l] = v;
        }
    });
}
template <char SPACE>
void store(Warp& w, const Inst& i, uint32_t lanes) {
    const int n = i.n, size = i.width < 0 ? -i.width : i.width;
    each(lanes, [&](int l) {
        uint8_t value[16];
        for (int k = 0; k < n; k++) std::memcpy(value + k * size, &w.of(i.at[2 + k])[l], size);
        std::memcpy(place(w, l, w.of(i.at[0])[l] + w.of(i.at[1])[l], n * size, WRITE, SPACE, value), value, n * size);
    });
}
template <char SPACE, class T, class F>
void atomic(Warp& w, const Inst& i, uint32_t lanes, F f) {
    each(lanes, [&](int l) {
        uint8_t* at = place(w, l, w.of(i.at[1])[l] + w.of(i.at[2])[l], sizeof(T), ATOMIC, SPACE);
        T old;
        std::memcpy(&old, at, sizeof old);
        const T made = f(old, as<T>(w.of(i.at[3])[l]));
        std::memcpy(at, &made, sizeof made);
        w.of(i.at[0])[l] = bits(old);
    });
    w.launch->acquired |= i.name.find("acq_rel") != std::string::npos;
}

Counter& counter(Warp& w, uint32_t address) {
    const auto found = w.launch->blocks[address >> RANK].counters.find(address);
    if (found == w.launch->blocks[address >> RANK].counters.end()) throw Fault("an mbarrier that was not made");
    return found->second;
}
void count(Counter& c) {
    if (c.pending < 0) throw Fault("more arrivals at an mbarrier than it expects");
    if (c.pending > 0 || c.bytes != 0) return;
    c.pending = c.expected, c.phase++, c.done = c.arrived;
}
void arrive(Warp& w, Counter& c) {
    join(c.arrived, w.clock), w.clock[w.id]++;
    c.pending--, count(c);
}

// cp.async [to], [from], bytes of each, bytes that are read: the others are zero.
void copy(Warp& w, const Inst& i, uint32_t lanes) {
    each(lanes, [&](int l) {
        const uint32_t to = uint32_t(w.of(i.at[0])[l] + w.of(i.at[1])[l]);
        const uint64_t from = w.of(i.at[2])[l] + w.of(i.at[3])[l];
        const int bytes = int(w.of(i.at[4])[l]), given = i.at.size() > 5 ? int(uint32_t(w.of(i.at[5])[l])) : bytes;
        if (to % bytes || from % bytes) fail("copied to or from what is not a multiple of its size", from, bytes, l);
        if (given < 0 || given > bytes) fail("more bytes than are copied", from, given, l);
        const Copy mine = {Copy::BYTES, to, given ? global_at(w, l, from, given, READ) : nullptr, bytes, given};
        bool again = false;  // lanes may copy the same
        each(lanes & ((1u << l) - 1), [&](int other) {
            const Copy& c = w.copies[other].back();
            again |= c.to == mine.to && c.from == mine.from && c.bytes == bytes && c.given == given;
        });
        if (!again) {
            std::memcpy(shared_at(w, l, to, bytes, WRITE, false), w.launch->poison, bytes);
            // Until it is over, and waited for, nobody may look.
            Stamp* const last = &w.block->wrote[to & ((1u << RANK) - 1)];
            for (int k = 0; k < bytes; k++) last[k] = {~0u, uint16_t(w.id), 255, 0};
        }
        w.copies[l].push_back(mine);
    });
}
void commit(Warp& w, const Inst&, uint32_t lanes) {
    each(lanes, [&](int l) { w.copies[l].push_back({Copy::END, 0, nullptr, 0, 0}); });
}
void wait(Warp& w, const Inst& i, uint32_t lanes) {
    each(lanes, [&](int l) {
        size_t left = w.of(i.at[0])[l], at = w.copies[l].size();
        for (; at > 0; at--)
            if (w.copies[l][at - 1].kind == Copy::END && left-- == 0) break;
        finish(w, l, at);
    });
}
void tell_after(Warp& w, const Inst& i, uint32_t lanes) {
    each(lanes, [&](int l) { w.copies[l].push_back({Copy::TELL, uint32_t(w.of(i.at[0])[l] + w.of(i.at[1])[l]), nullptr, 0, 0}); });
}

void make_counter(Warp& w, const Inst& i, uint32_t lanes) {
    each(lanes, [&](int l) {
        const uint32_t address = uint32_t(w.of(i.at[0])[l] + w.of(i.at[1])[l]);
        if (address % 8) fail("an mbarrier that is not aligned", address, 8, l);
        const int64_t expected = uint32_t(w.of(i.at[2])[l]);
        shared_at(w, l, address, 8, WRITE, false);
        const Clock none(w.clock.size());
        w.block->counters[address] = {expected, expected, 0, 0, none, none};
    });
}
template <bool BYTES>
void at_counter(Warp& w, const Inst& i, uint32_t lanes) {
    each(lanes, [&](int l) {
        const uint32_t address = uint32_t(w.of(i.at[1])[l] + w.of(i.at[2])[l]);
        shared_at(w, l, address, 8, ATOMIC, false);
        Counter& c = counter(w, address);
        if (BYTES) c.bytes += uint32_t(w.of(i.at[3])[l]);
        arrive(w, c);
    });
}
void ask_counter(Warp& w, const Inst& i, uint32_t lanes) {
    each(lanes, [&](int l) {
        const uint32_t address = uint32_t(w.of(i.at[1])[l] + w.of(i.at[2])[l]);
        shared_at(w, l, address, 8, ATOMIC, false);
        Counter& c = counter(w, address);
        const bool over = (c.phase & 1) != (w.of(i.at[3])[l] & 1);
        if (over) join(w.clock, c.done);
        w.of(i.at[0])[l] = over;
    });
}
void send(Warp& w, const Inst& i, uint32_t lanes) {
    each(lanes, [&](int l) {
        Sent s = {uint32_t(w.of(i.at[0])[l] + w.of(i.at[1])[l]), uint32_t(w.of(i.at[3])[l] + w.of(i.at[4])[l]), {}, i.width, &w, w.clock};
        std::memcpy(s.value, &w.of(i.at[2])[l], i.width);
        if (s.to % i.width) fail("not a multiple of its size", s.to, i.width, l);
        std::memcpy(shared_at(w, l, s.to, i.width, WRITE, true), w.launch->poison, i.width);
        w.launch->sent.push_back(s);
    });
    w.clock[w.id]++;
}

template <class F>
void address(Warp& w, const Inst& i, uint32_t lanes, F f) {
    each(lanes, [&](int l) { w.of(i.at[0])[l] = f(w.of(i.at[1])[l], l); });
}

}  // namespace

void finish(Warp& w, int lane, size_t count) {
    for (; count > 0; count--) {
        const Copy c = w.copies[lane].front();
        w.copies[lane].pop_front();
        if (c.kind == Copy::TELL) arrive(w, counter(w, c.to));
        if (c.kind != Copy::BYTES) continue;
        const uint32_t at = c.to & ((1u << RANK) - 1);
        std::memset(&w.block->shared[at], 0, c.bytes);
        if (c.given) std::memcpy(&w.block->shared[at], c.from, c.given);
        for (int k = 0; k < c.bytes; k++) w.block->wrote[at + k] = {w.now(), uint16_t(w.id), uint8_t(lane), 0};
    }
}

void deliver(Launch& a) {
    for (const Sent& s : a.sent) {
        std::memcpy(&a.blocks[s.to >> RANK].shared[s.to & ((1u << RANK) - 1)], s.value, s.bytes);
        Counter& c = counter(*s.by, s.counter);
        c.bytes -= s.bytes;
        join(c.arrived, s.seen);
        count(c);
    }
    a.sent.clear();
    // Copies that a counter is told of: their threads need not wait for them.
    for (Warp& w : a.warps)
        for (int l = 0; l < LANES; l++) {
            const auto last = std::find_if(w.copies[l].rbegin(), w.copies[l].rend(), [](const Copy& c) { return c.kind == Copy::TELL; });
            finish(w, l, size_t(w.copies[l].rend() - last));
        }
}

void add_memory(Table& t) {
    t["ld.param"] = load<'p'>, t["ld.shared"] = load<'s'>, t["ld.global"] = load<'g'>, t["ld"] = load<'e'>;
    t["st.shared"] = store<'s'>, t["st.global"] = store<'g'>, t["st"] = store<'e'>;
#define ATOM(NAME, SPACE, T, E)                                                  \
    t["atom." NAME] = [](Warp& w, const Inst& i, uint32_t m) {                   \
        atomic<SPACE, T>(w, i, m, [](T a, T b) -> T { return E; });              \
    }
    ATOM("shared.add.u32", 's', uint32_t, a + b);
    ATOM("shared.min.s32", 's', int32_t, std::min(a, b));
    ATOM("global.add.u32", 'g', uint32_t, a + b);
    ATOM("acq_rel.global.add.s32", 'g', int32_t, a + b);
    ATOM("global.add.u64", 'g', uint64_t, a + b);
    t["cp.async"] = copy, t["cp.async.commit_group"] = commit, t["cp.async.wait_group"] = wait;
    t["cp.async.mbarrier.arrive.noinc"] = tell_after;
    t["mbarrier.init"] = make_counter, t["mbarrier.arrive"] = at_counter<false>, t["mbarrier.arrive.expect_tx"] = at_counter<true>;
    t["mbarrier.test_wait.parity"] = t["mbarrier.try_wait.parity"] = ask_counter;
    t["st.async"] = send;
    const Handler none = [](Warp&, const Inst&, uint32_t) {};
    t["membar.gl"] = [](Warp& w, const Inst&, uint32_t) { w.launch->acquired = true; };
    t["fence.mbarrier_init.release.cluster"] = t["griddepcontrol.launch_dependents"] = none;
    t["prefetch.global.L2"] = none;  // of addresses that need not be there
    t["griddepcontrol.wait"] = [](Warp& w, const Inst&, uint32_t) { w.early = false; };
    t["cvta.to.global.u64"] = [](Warp& w, const Inst& i, uint32_t m) { address(w, i, m, [](uint64_t v, int) { return v; }); };
    t["cvta.to.shared.u64"] = [](Warp& w, const Inst& i, uint32_t m) { address(w, i, m, [](uint64_t v, int) { return v - SHARED; }); };
    t["cvta.shared.u64"] = [](Warp& w, const Inst& i, uint32_t m) { address(w, i, m, [](uint64_t v, int) { return v + SHARED; }); };
    t["mapa.u64"] = t["mapa.shared::cluster.u32"] = [](Warp& w, const Inst& i, uint32_t m) {
        const uint64_t rank = uint64_t((1u << (32 - RANK)) - 1) << RANK;
        address(w, i, m, [&](uint64_t v, int l) { return (v & ~rank) | uint64_t(uint32_t(w.of(i.at[2])[l])) << RANK; });
    };
}

}  // namespace ptx
