// What the products with packed weights share: vectors of eight numbers, and threads that wait between calls.

#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "versions.h"

// A version for machines with multiply-add, chosen at run time; no clones, since none can be made for two extensions together. There the
// compiler may fuse: no other twin is to be met bit for bit.
#if !defined(BITGRID_PLAIN) && defined(__GNUC__) && defined(__x86_64__)
#define FUSED __attribute__((target("avx2,fma"), optimize("fp-contract=fast")))
#endif
#if defined(__clang__)
#pragma clang fp contract(fast)
#endif
#if defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 8")
#else
#define UNROLL
#endif
#if defined(FUSED)
#define HAS_FUSED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#endif

namespace {

using Floats __attribute__((vector_size(32))) = float;
using Words __attribute__((vector_size(32))) = uint32_t;
using Ints __attribute__((vector_size(32))) = int32_t;

constexpr int LANES = 8;
constexpr int64_t LEAST = 1 << 17;  // bytes of words that are worth another thread

INLINE Floats load(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

INLINE Words load(const uint32_t* from) {
    Words v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// Entries of a table of eight: of each lane's number the lowest three bits count.
INLINE Floats looked_up(Floats table, Words index) {
#if defined(__GNUC__) && !defined(__clang__)
    return __builtin_shuffle(table, (Ints)index);
#else
    Floats found;
    for (int l = 0; l < LANES; l++) found[l] = table[index[l] & 7u];
    return found;
#endif
}

// Fewer than eight values of a table stand there several times over: then the bits of the next code do no harm.
constexpr int entries_of(int bits) { return bits > 3 ? 16 : 8; }

// Entries of such a table, by codes in the lowest bits of each lane's number.
template <int BITS>
INLINE Floats decoded(const float* table, Words code) {
    if constexpr (BITS < 4) return looked_up(load(table), code);
    const Ints upper = (Ints)(code << 28u) >> 31;
    return upper ? looked_up(load(table + LANES), code) : looked_up(load(table), code);
}

INLINE float sum(Floats v) {
    float lane[LANES];
    std::memcpy(lane, &v, sizeof v);
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// Threads that wait between calls: a call may take less time than starting one. They wait asleep, where spinning would take the cores from
// threads of other libraries. Never freed, since they may outlive static objects. A child of fork has none of its parent's threads and
// makes a pool of its own.
class Pool {
   public:
    static Pool& own() {
        static std::atomic<Pool*> current{nullptr};
        Pool* seen = current.load();
        if (seen != nullptr && seen->process == getpid()) return *seen;
        Pool* made = new Pool;
        if (current.compare_exchange_strong(seen, made)) return *made;
        delete made;
        return *seen;
    }

    // `work` in this thread and in at most `others` more; returns when none of them is in it.
    void run(const std::function<void()>& work, int64_t others) {
        const std::unique_lock<std::mutex> turn(busy, std::try_to_lock);
        if (others < 1 || !turn) return work();  // no thread to be had: another call has them
        {
            const std::lock_guard<std::mutex> hold(state);
            try {
                for (; threads < others; threads++) std::thread(&Pool::help, this).detach();
            } catch (const std::system_error&) {  // fewer will do
            }
            job = &work, open = others;
        }
        wake.notify_all();
        work();
        {
            const std::lock_guard<std::mutex> hold(state);
            open = 0;
        }
        // The others are about to end: longer than this takes to fall asleep and be woken.
        for (int i = 0; i < 100 && active > 0; i++) std::this_thread::yield();
        std::unique_lock<std::mutex> hold(state);
        done.wait(hold, [this] { return active == 0; });
    }

   private:
    void help() {
        std::unique_lock<std::mutex> hold(state);
        for (;;) {
            wake.wait(hold, [this] { return open > 0; });
            const std::function<void()>& work = *job;
            open--, active++;
            hold.unlock();
            work();
            hold.lock();
            if (--active == 0) done.notify_one();
        }
    }

    const pid_t process = getpid();
    std::mutex busy, state;
    std::condition_variable wake, done;
    const std::function<void()>* job = nullptr;
    int64_t threads = 0, open = 0;
    std::atomic<int64_t> active{0};
};

// `one(t)` for every t below `tiles`, `run` neighbours by one of at most `threads` threads at a time.
template <class One>
void each(int64_t tiles, int64_t run, int64_t threads, const One& one) {
    std::atomic<int64_t> next{0};
    const std::function<void()> work = [&] {
        for (int64_t t; (t = next.fetch_add(run)) < tiles;)
            for (const int64_t end = std::min(tiles, t + run); t < end; t++) one(t);
    };
    Pool::own().run(work, std::min(threads, (tiles + run - 1) / run) - 1);
}

}  // namespace
