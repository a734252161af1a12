// A GPU that runs PTX on the host: what a launch, its blocks and its warps hold. NVIDIA, PTX ISA 9.0.

#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int LANES = 32;
constexpr uint64_t SHARED = uint64_t(0x7e) << 56;  // generic addresses of shared memory begin here
constexpr uint32_t RANK = 24;                      // a shared address: the block's rank in its cluster, and 24 bits of a place

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Warp;
struct Inst;
using Handler = void (*)(Warp&, const Inst&, uint32_t lanes);
enum class Kind { PLAIN, BRANCH, EXIT, TOGETHER, ALIGNED };  // TOGETHER: when all lanes of a mask, ALIGNED: of the warp, have come

struct Inst {
    std::string name, text;
    Kind kind = Kind::PLAIN;
    Handler run = nullptr;
    int guard = -1, target = -1;  // of a predicate's register; of an instruction
    bool negated = false, ran = false;
    std::vector<int> at;  // registers
    int n = 0, width = 0;  // of vectors: elements, bytes of each; else a mode
};

// Of each warp of a cluster, how much that it did comes before.
using Clock = std::vector<uint32_t>;
inline void join(Clock& a, const Clock& b) {
    for (size_t i = 0; i < a.size(); i++) a[i] = a[i] < b[i] ? b[i] : a[i];
}

struct Copy {  // under way; the end of a group; or a counter (`to`) that is told when all before are over
    enum { BYTES, END, TELL } kind;
    uint32_t to;
    const uint8_t* from;
    int bytes, given;  // the others are zero
};
struct Counter {  // mbarrier
    int64_t expected = 0, pending = 0, bytes = 0;
    uint32_t phase = 0;
    Clock arrived, done;
};
struct Barrier {
    int warps = 0;
    bool any = false;
    std::vector<Warp*> waiting;
};
struct Stamp {  // the last write of a byte; clock 0: none
    uint32_t clock = 0;
    uint16_t warp = 0;
    uint8_t lane = 0, atomic = 0;
};

constexpr uint32_t SEVERAL = LANES;

struct Reading {  // the last of a byte by a warp (clock 0: none), and the lane, or SEVERAL since all lanes met
    uint32_t clock = 0, met : 26, lane : 6;
    Reading() : met(0), lane(0) {}
    Reading(uint32_t now, uint32_t times, uint32_t by) : clock(now), met(times), lane(by) {}
};

struct Block {
    uint32_t place[3], rank = 0;
    std::vector<uint8_t> shared;
    std::vector<Stamp> wrote;
    std::vector<Reading> read;  // of each byte and warp of the block
    std::map<uint32_t, Counter> counters;
    Barrier barriers[16];
};

struct Buffer {
    uint64_t base, bytes;
    int64_t late;  // what may still be written by the kernel before
    std::vector<uint32_t> wrote, read;  // of each byte the last cluster, from 1 on, that did; of reads ~0: several
};

struct Sent {  // to another block: a value, and the counter that is told
    uint32_t to, counter;
    uint8_t value[8];
    int bytes;
    Warp* by;
    Clock seen;
};

struct Launch {
    uint32_t grid[3], threads[3], cluster = 1;
    std::vector<Block> blocks;  // of the cluster that runs
    std::vector<Warp> warps;
    std::vector<Sent> sent;
    std::vector<Buffer> buffers;
    std::vector<uint8_t> params;
    Buffer* last = nullptr;
    uint32_t number = 0;    // of the cluster that runs, from 1 on
    bool acquired = false;  // it has waited for others' writes, or fenced its own
    bool strict = true, poisoned = false;  // strict: a load in a race is a fault, also where nothing is made of it
    // What memory holds that nothing was written to: no numbers or, for what takes these for a case of its own, wrong ones.
    uint8_t poison[16];
    uint64_t steps = 0, most = 0;  // instructions of warps
    uint32_t phase = 0, arrived = 0;  // of the cluster's barrier
    Clock arriving, released;
};

struct Warp {
    Launch* launch;
    Block* block;
    int id, number;  // in the cluster; in its block
    std::vector<uint64_t> registers;
    uint32_t pc[LANES], exited = 0, held = 0, real = 0;  // held: lanes that wait for others of the warp
    bool waits = false;                                 // for others of the block or the cluster
    bool of_cluster = false, early = false;  // early: the kernel before may still run
    int reduced = -1;  // the predicate that a barrier will write
    uint32_t cluster_phase = 0, current = 0;  // current: the instruction
    Clock clock;
    // How often all lanes did something together, from 1 on. None goes on before all have come there, so that reads in front are before
    // writes behind; a write in front is not before a read behind unless they wait for memory, as a barrier does.
    uint32_t met = 1;
    std::deque<Copy> copies[LANES];
    uint64_t* of(int r) { return &registers[size_t(r) * LANES]; }
    uint32_t now() const { return clock[id]; }
};

template <class T>
T as(uint64_t v) {
    T t;
    std::memcpy(&t, &v, sizeof t);
    return t;
}
template <class T>
uint64_t bits(T t) {
    uint64_t v = 0;
    std::memcpy(&v, &t, sizeof t);
    return v;
}

template <class F>
void each(uint32_t lanes, F f) {
    if (lanes == ~0u)
        for (int l = 0; l < LANES; l++) f(l);
    else
        for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

// Instructions by name, without what changes no result.
using Table = std::map<std::string, Handler>;
void add_arithmetic(Table&);
void add_memory(Table&);
void add_together(Table&);
void settle(Launch&);   // barriers that wait for those only that are over
void deliver(Launch&);  // what is under way
void finish(Warp&, int lane, size_t count);  // copies, the first so many

}  // namespace ptx
