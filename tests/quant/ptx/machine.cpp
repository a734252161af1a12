// Runs launches of a kernel in PTX: the blocks of a cluster, and of them the warps, in turns. A warp's lanes that are furthest behind go
// first, up to where others are; those that reach what lanes do together wait there for the others.

#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>

#include "state.h"

namespace ptx {
namespace {

struct Constant {
    int at;
    std::string kind;
    uint64_t value;
};
struct Program {
    int registers = 0;
    std::vector<Constant> constants;
    std::vector<Inst> code;
};

const Table& table() {
    static const Table made = [] {
        Table t;
        return add_arithmetic(t), add_memory(t), add_together(t), t;
    }();
    return made;
}

// Lines: "R count"; "C register kind value"; "I kind guard negated target n width name registers... | text".
Program read(const char* text) {
    Program p;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
        std::istringstream in(line.substr(1));
        if (line[0] == 'R') in >> p.registers;
        if (line[0] == 'C') {
            Constant c;
            in >> c.at >> c.kind >> c.value, p.constants.push_back(c);
        }
        if (line[0] != 'I') continue;
        Inst i;
        int kind;
        in >> kind >> i.guard >> i.negated >> i.target >> i.n >> i.width >> i.name;
        i.kind = Kind(kind);
        std::string word;
        while (in >> word && word != "|") i.at.push_back(std::stoi(word));
        std::getline(in >> std::ws, i.text);
        const auto found = table().find(i.name);
        if (found != table().end()) i.run = found->second;
        if (i.run == nullptr && i.kind != Kind::BRANCH && i.kind != Kind::EXIT) throw Fault("no instruction " + i.name + ": " + i.text);
        p.code.push_back(i);
    }
    return p;
}

uint64_t special(const Launch& a, const Warp& w, const std::string& kind, uint64_t value, int lane) {
    const uint32_t* const of = a.threads;
    const uint32_t t = uint32_t(w.number * LANES + lane), thread[] = {t % of[0], t / of[0] % of[1], t / of[0] / of[1]};
    const int axis = kind.back() - 'x';
    if (kind == "value") return value;
    if (kind == "shared") return (uint64_t(w.block->rank) << RANK) + value;
    if (kind == "laneid") return uint64_t(lane);
    if (kind == "cluster_ctarank") return w.block->rank;
    if (kind == "cluster_nctarank") return a.cluster;
    if (kind.rfind("tid.", 0) == 0) return thread[axis];
    if (kind.rfind("ntid.", 0) == 0) return a.threads[axis];
    if (kind.rfind("ctaid.", 0) == 0) return w.block->place[axis];
    if (kind.rfind("nctaid.", 0) == 0) return a.grid[axis];
    if (kind.rfind("clusterid.", 0) == 0) return axis == 0 ? w.block->place[0] / a.cluster : w.block->place[axis];
    throw Fault("no special register %" + kind);
}

uint32_t all_of(const Warp& w) { return w.real & ~w.exited; }

// Lanes of which the instruction, which they do together, is to be done by those that have come to it.
uint32_t wanted(Warp& w, const Inst& i, uint32_t lanes) {
    if (i.kind == Kind::ALIGNED) return all_of(w);
    return uint32_t(w.of(i.at.back())[__builtin_ctz(lanes)]) & all_of(w);
}

void step(Warp& w, Program& p, int turns) {
    while (turns > 0 && !w.waits) {
        const uint32_t able = all_of(w) & ~w.held;
        if (able == 0) {
            if (w.held) throw Fault("lanes wait for others of their warp, which are elsewhere");
            return;
        }
        uint32_t pc = ~0u, next = ~0u, lanes = 0;
        each(able, [&](int l) { pc = std::min(pc, w.pc[l]); });
        each(able, [&](int l) { w.pc[l] == pc ? void(lanes |= 1u << l) : void(next = std::min(next, w.pc[l])); });
        w.current = pc;
        for (bool go = true; go;) {
            w.current = pc;
            Inst& i = p.code[pc];
            i.ran = true;
            turns--, w.launch->steps++;
            uint32_t m = lanes;
            if (i.guard >= 0) {
                const uint64_t* own = w.of(i.guard);
                each(lanes, [&](int l) {
                    if ((own[l] & 1) == uint64_t(i.negated)) m &= ~(1u << l);
                });
            }
            if (i.kind == Kind::PLAIN) {
                if (m) i.run(w, i, m);
                pc++;
            } else if (i.kind == Kind::BRANCH) {
                if (m == lanes || m == 0) {
                    pc = m ? uint32_t(i.target) : pc + 1;
                } else {
                    each(lanes, [&](int l) { w.pc[l] = m >> l & 1 ? uint32_t(i.target) : pc + 1; });
                    break;
                }
            } else if (i.kind == Kind::EXIT) {
                each(lanes, [&](int l) { w.pc[l] = pc + 1; });
                each(m, [&](int l) { finish(w, l, w.copies[l].size()); });
                w.exited |= m, w.held = 0;
                if (w.exited == w.real) settle(*w.launch);
                break;
            } else {
                each(lanes, [&](int l) { w.pc[l] = m >> l & 1 ? pc : pc + 1; });
                w.held |= m;
                uint32_t here = 0;
                each(w.held, [&](int l) { here |= uint32_t(w.pc[l] == pc) << l; });
                const uint32_t all = m ? wanted(w, i, m) : ~0u;
                if (m && (all & ~here) == 0) {
                    w.held &= ~all;
                    each(all, [&](int l) { w.pc[l] = pc + 1; });
                    w.met += all == all_of(w);
                    i.run(w, i, all);
                }
                break;
            }
            if (pc >= next || turns <= 0) {
                each(lanes, [&](int l) { w.pc[l] = pc; });
                go = false;
            }
        }
    }
}

void begin(Launch& a, const Program& p, uint32_t first, size_t shared, bool early) {
    const uint32_t all = a.threads[0] * a.threads[1] * a.threads[2], warps = (all + LANES - 1) / LANES;
    a.blocks.resize(a.cluster), a.warps.resize(a.cluster * warps), a.sent.clear();
    a.number = first / a.cluster + 1, a.acquired = false;
    a.phase = 0, a.arriving.assign(a.warps.size(), 0), a.released = a.arriving;
    for (uint32_t rank = 0; rank < a.cluster; rank++) {
        Block& b = a.blocks[rank];
        b.counters.clear();
        for (Barrier& each : b.barriers) each = {};
        const uint32_t n = first + rank;
        b.rank = rank, b.place[0] = n % a.grid[0], b.place[1] = n / a.grid[0] % a.grid[1], b.place[2] = n / a.grid[0] / a.grid[1];
        b.shared.assign(shared, a.poison[0]), b.wrote.assign(shared, {}), b.read.assign(shared * warps, {});
        for (uint32_t i = 0; i < warps; i++) {
            Warp& w = a.warps[rank * warps + i];
            w.held = w.exited = w.cluster_phase = 0, w.waits = w.of_cluster = false, w.reduced = -1;
            w.launch = &a, w.block = &b, w.id = int(rank * warps + i), w.number = int(i), w.early = early;
            w.real = all - i * LANES >= LANES ? ~0u : (1u << (all - i * LANES)) - 1;
            std::fill_n(w.pc, LANES, 0);
            w.clock.assign(a.warps.size(), 0), w.clock[w.id] = 1, w.met = 1;
            w.registers.assign(size_t(p.registers) * LANES, 0xfff8'dead'fff8'deadu);
            for (const Constant& c : p.constants)
                for (int l = 0; l < LANES; l++) w.of(c.at)[l] = special(a, w, c.kind, c.value, l);
        }
    }
}

std::string where(const Warp& w, const Program& p) {
    const uint32_t* const at = w.block->place;
    std::ostringstream said;
    said << "block " << at[0] << ", " << at[1] << ", " << at[2] << ", warp " << w.number << ", instruction " << w.current << ": "
         << p.code[w.current].text;
    return said.str();
}

uint8_t poison_of(uint64_t seed) { return seed % 2 ? 0x3d : 0xff; }

void run(Launch& a, Program& p, size_t shared, bool early, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::fill_n(a.poison, sizeof a.poison, poison_of(seed));
    std::vector<uint32_t> order(a.grid[0] * a.grid[1] * a.grid[2] / a.cluster);
    std::iota(order.begin(), order.end(), 0);
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (const uint32_t cluster : order) {
        begin(a, p, cluster * a.cluster, shared, early);
        std::vector<int> turn(a.warps.size());
        std::iota(turn.begin(), turn.end(), 0);
        for (bool living = true; living;) {
            bool moved = false;
            if (seed) std::shuffle(turn.begin(), turn.end(), random);
            for (const int t : turn) {
                Warp& w = a.warps[t];
                if (w.waits || w.exited == w.real) continue;
                moved = true;
                try {
                    step(w, p, seed ? 1 + int(random() % 400) : 1000);
                } catch (const Fault& f) {
                    throw Fault(std::string(f.what()) + "; " + where(w, p));
                }
            }
            deliver(a);
            living = std::any_of(a.warps.begin(), a.warps.end(), [](const Warp& w) { return w.exited != w.real; });
            if (a.steps > a.most) throw Fault("it does not end; " + where(a.warps[0], p));
            if (living && !moved) {
                std::string said = "all wait at barriers that others do not reach";
                for (const Warp& w : a.warps)
                    if (w.waits) said += "; " + where(w, p);
                throw Fault(said);
            }
        }
    }
}

}  // namespace
}  // namespace ptx

extern "C" {

// Texts are cut to so many bytes.
ptx::Program* ptx_read(const char* text, char* said, int64_t bytes) {
    try {
        return new ptx::Program(ptx::read(text));
    } catch (const std::exception& e) {
        return std::snprintf(said, size_t(bytes), "%s", e.what()), nullptr;
    }
}

// shape: blocks (x, y, z), threads (x, y, z), blocks of a cluster, bytes of shared memory, whether it may begin early, seed of the order
// (0: one after another), most instructions of warps, whether
// loads in a race are faults. buffers: of each its address, its bytes, and whether the kernel before may still write it. Of `ran` what each
// instruction did is noted. Instructions of warps, or -1: what is wrong is said.
int64_t ptx_run(ptx::Program* p, const int64_t* shape, const void* params, int64_t size, const int64_t* buffers, int64_t count,
                uint8_t* ran, char* said, int64_t bytes) {
    ptx::Launch a;
    for (int i = 0; i < 3; i++) a.grid[i] = uint32_t(shape[i]), a.threads[i] = uint32_t(shape[3 + i]);
    a.cluster = uint32_t(shape[6]), a.most = uint64_t(shape[10]), a.strict = shape[11] != 0;
    a.params.assign(static_cast<const uint8_t*>(params), static_cast<const uint8_t*>(params) + size);
    for (int64_t i = 0; i < count; i++) {
        const size_t size = size_t(buffers[3 * i + 1]);
        a.buffers.push_back({uint64_t(buffers[3 * i]), size, buffers[3 * i + 2], std::vector<uint32_t>(size), std::vector<uint32_t>(size)});
    }
    try {
        ptx::run(a, *p, size_t(shape[7]), shape[8] != 0, uint64_t(shape[9]));
    } catch (const std::exception& e) {
        return std::snprintf(said, size_t(bytes), "%s", e.what()), -1;
    }
    for (size_t i = 0; i < p->code.size(); i++) ran[i] |= p->code[i].ran;
    return int64_t(a.steps);
}
}
