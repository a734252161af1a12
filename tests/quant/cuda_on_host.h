// Runs a kernel's source on the host, for tests: the threads of a block are contexts of one thread, which change places at barriers, and
// blocks run one after the other. Included before the source. Reading or writing past the end of the dynamic shared memory stops the
// process; it begins as NaNs. Built with -fsanitize=thread, threads are such of ThreadSanitizer's (its fibers), for which barriers are all
// that orders what they do: an exchange between lanes is no barrier, as on a GPU.

#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "../../quant/csrc/cta.h"
#include "../../quant/csrc/host_threads.h"

#define DEVICE inline
#define GLOBAL inline
#define BOUNDS(threads, blocks)
#define __shared__ static
#define __restrict__
#define __grid_constant__
#define DYNAMIC_SHARED(name) unsigned char* const name = emulated::memory
#define BY_ANY __attribute__((noinline, no_sanitize("thread")))
#define LAUNCH(kernel, blocks, threads, bytes, stream, ...) \
    emulated::launch(blocks, int(threads), bytes, [&] { (kernel)(__VA_ARGS__); })

using std::isfinite;
using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace emulated {

using namespace host;

constexpr int64_t STACK = 256 * 1024, MOST_SHARED = 227 * 1024;

struct Group {
    int size = 0, arrived = 0;
    int64_t turn = 0;
    char meetings[2];  // of turns of even and odd number
};

struct Context {
    Fiber fiber;
    jmp_buf place;
    ucontext_t start;
    std::vector<char> stack;
    bool entered = false, ended = false;
    int shuffles = 0;
};

inline unsigned char* memory = nullptr;
inline std::vector<Context> contexts;
inline std::vector<Group> warps;
inline Group block;
inline std::function<void()> work;
inline jmp_buf caller;
inline Fiber caller_fiber;
inline char block_begins, block_over;
inline int thread = 0, alive = 0;
inline int64_t idle = 0;
inline uint64_t slots[2][1024];
inline int vote;
inline dim3 at(0);
inline int64_t* asked = nullptr;  // [4]: where launches are written down instead of run

// To the next thread that has not ended.
inline void go_on() {
    Context* next;
    Fiber fiber;
    bool entered;
    {
        const Unseen own;
        do thread = (thread + 1) % int(contexts.size());
        while (contexts[thread].ended);
        next = &contexts[thread], fiber = next->fiber;
        entered = std::exchange(next->entered, true);
    }
    change_to(fiber);
    if (entered) _longjmp(next->place, 1);
    setcontext(&next->start);
}

inline void enter() {
    after(&block_begins);
    work();
    before(&block_over);
    Fiber back;
    bool others;
    {
        const Unseen own;
        contexts[thread].ended = true;
        others = --alive > 0, back = caller_fiber;
    }
    if (others) go_on();
    change_to(back);
    _longjmp(caller, 1);
}

inline void yield() {
    Context& own = contexts[thread];
    if (++idle > 100 * int64_t(contexts.size())) {
        std::fprintf(stderr, "threads wait for each other for ever\n");
        std::abort();
    }
    if (_setjmp(own.place)) return;
    go_on();
}

inline void meet(Group& g) {
    const Unseen own;
    const int64_t turn = g.turn;
    if (++g.arrived == g.size) {
        g.arrived = 0;
        g.turn++;
        idle = 0;
        return;
    }
    while (g.turn == turn) yield();
}

inline void wait(Group& g) {
    char* const meeting = [&] {
        const Unseen own;
        return &g.meetings[g.turn % 2];
    }();
    before(meeting);
    meet(g);
    after(meeting);
}

template <class Work>
int launch(dim3 blocks, int threads, int64_t bytes, const Work& kernel) {
    const bool grid = blocks.x >= 1 && blocks.x < 1u << 31 && blocks.y >= 1 && blocks.y < 1 << 16 && blocks.z == 1;
    if (!grid || threads < 1 || threads > 1024 || bytes < 0 || bytes + MOST_STATIC > MOST_SHARED) return 1;
    if (asked) {
        const int64_t said[4] = {blocks.x, blocks.y, threads, bytes};
        std::copy_n(said, 4, asked);
        return 0;
    }
    const int64_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
    char* area = static_cast<char*>(mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(area + room, page, PROT_NONE);
    memory = reinterpret_cast<unsigned char*>(area + room - (bytes + 15) / 16 * 16);
    work = kernel;
    for (unsigned y = 0; y < blocks.y; y++)
        for (unsigned x = 0; x < blocks.x; x++) {
            at = dim3(x, y);
            std::memset(area, 0xff, room);
            contexts.resize(threads);
            warps.assign((threads + 31) / 32, Group());
            block = Group();
            block.size = alive = threads;
            vote = 0;
            for (int t = 0; t < threads; t++) {
                Context& c = contexts[t];
                c.fiber = made_fiber();
                c.entered = c.ended = false;
                c.shuffles = 0;
                c.stack.resize(STACK);
                warps[t / 32].size++;
                getcontext(&c.start);
                c.start.uc_stack.ss_sp = c.stack.data();
                c.start.uc_stack.ss_size = STACK;
                c.start.uc_link = nullptr;
                makecontext(&c.start, enter, 0);
            }
            thread = 0;
            idle = 0;
            caller_fiber = own_fiber();
            if (!_setjmp(caller)) {
                contexts[0].entered = true;
                before(&block_begins);
                change_to(contexts[0].fiber);
                setcontext(&contexts[0].start);
            }
            after(&block_over);
            for (Context& c : contexts) end(c.fiber);
        }
    munmap(area, room + page);
    return 0;
}

// The value of another lane of the warp. A lane is never more than one exchange ahead: two slots do.
template <typename T>
T exchanged(T value, int lane) {
    const Unseen emulation;
    uint64_t(&own)[1024] = slots[contexts[thread].shuffles++ % 2];
    std::memcpy(&own[thread], &value, sizeof value);
    meet(warps[thread / 32]);
    std::memcpy(&value, &own[thread / 32 * 32 + lane], sizeof value);
    return value;
}

struct Place {
    int x, y;
};

}  // namespace emulated

#define threadIdx (emulated::Place{emulated::thread, 0})
#define blockIdx (emulated::Place{int(emulated::at.x), int(emulated::at.y)})

extern "C" void emulated_ask(int64_t* asked) { emulated::asked = asked; }

inline void __syncthreads() { emulated::wait(emulated::block); }
inline void __syncwarp() { emulated::wait(emulated::warps[emulated::thread / 32]); }

inline int __syncthreads_or(int v) {
    __syncthreads();
    const emulated::Unseen emulation;
    emulated::vote |= v != 0;
    emulated::meet(emulated::block);
    const int found = emulated::vote;
    emulated::meet(emulated::block);
    emulated::vote = 0;
    emulated::meet(emulated::block);
    return found;
}

template <typename T>
T __shfl_sync(unsigned, T v, int source, int width = 32) {
    const int lane = emulated::thread % 32;
    return emulated::exchanged(v, lane / width * width + source % width);
}
template <typename T>
T __shfl_up_sync(unsigned, T v, int d, int width = 32) {
    const int lane = emulated::thread % 32;
    return emulated::exchanged(v, lane % width >= d ? lane - d : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T v, int d) {
    return emulated::exchanged(v, (emulated::thread % 32) ^ d);
}
inline unsigned __ballot_sync(unsigned, bool v) {
    const emulated::Unseen emulation;
    const int warp = emulated::thread / 32;
    uint64_t(&own)[1024] = emulated::slots[emulated::contexts[emulated::thread].shuffles++ % 2];
    own[emulated::thread] = v;
    emulated::meet(emulated::warps[warp]);
    unsigned found = 0;
    for (int l = 0; l < emulated::warps[warp].size; l++) found |= unsigned(own[warp * 32 + l]) << l;
    return found;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int atomicMin(int* at, int v) {
    const emulated::Unseen emulation;
    return std::exchange(*at, std::min(*at, v));
}
template <typename T>
T atomicAdd(T* at, T v) {
    const emulated::Unseen emulation;
    return std::exchange(*at, *at + v);
}
inline void __threadfence() {}
inline float __uint_as_float(unsigned v) {
    float f;
    std::memcpy(&f, &v, sizeof f);
    return f;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __double2float_rd(double v) {
    const float f = float(v);
    return double(f) > v ? std::nextafter(f, -INFINITY) : f;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __double2float_ru(double v) { return -__double2float_rd(-v); }

// What CUB's BlockRadixSort of CUDA 13 takes; next to nothing where the kernel runs, so that reading past the end is found out.
template <int ITEMS>
int64_t sort_room() {
    return emulated::asked ? max(18528, 4 * 512 * ITEMS) : 4 * ITEMS;
}

// With numbers that go with their keys.
template <int ITEMS>
void sort_block(float (&keys)[ITEMS], int (&numbers)[ITEMS], void*) {
    static std::vector<std::pair<float, int>> all;
    if (threadIdx.x == 0) all.resize(ITEMS * emulated::contexts.size());
    __syncthreads();
    for (int j = 0; j < ITEMS; j++) all[threadIdx.x * ITEMS + j] = {keys[j], numbers[j]};
    __syncthreads();
    if (threadIdx.x == 0) std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    __syncthreads();
    for (int j = 0; j < ITEMS; j++) keys[j] = all[threadIdx.x * ITEMS + j].first, numbers[j] = all[threadIdx.x * ITEMS + j].second;
    __syncthreads();
}

// Ascending: thread t has the ranks from t * ITEMS on.
template <int ITEMS>
void sort_block(float (&keys)[ITEMS], void*) {
    static std::vector<float> all;
    if (threadIdx.x == 0) all.resize(ITEMS * emulated::contexts.size());
    __syncthreads();
    std::copy_n(keys, ITEMS, all.begin() + threadIdx.x * ITEMS);
    __syncthreads();
    if (threadIdx.x == 0) std::sort(all.begin(), all.end());
    __syncthreads();
    std::copy_n(all.begin() + threadIdx.x * ITEMS, ITEMS, keys);
    __syncthreads();
}
