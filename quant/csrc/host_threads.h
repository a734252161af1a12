// Threads of a GPU's block on the host, for tests.
//
// Built with -fsanitize=thread, each of them is one of ThreadSanitizer's (a fiber), and nothing but barriers orders what they do: that two
// of them meet in memory without a barrier in between is reported, although they run in turn.

#pragma once

#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#include <ucontext.h>

extern "C" {
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
}
#endif

namespace host {

#if defined(__SANITIZE_THREAD__)
using Fiber = void*;
inline Fiber made_fiber() { return __tsan_create_fiber(0); }
inline Fiber own_fiber() { return __tsan_get_current_fiber(); }
// A function of its own would be entered by one and left by the other.
__attribute__((always_inline)) inline void change_to(Fiber f) { __tsan_switch_to_fiber(f, __tsan_switch_to_fiber_no_sync); }
inline void end(Fiber f) { __tsan_destroy_fiber(f); }
// What a thread did before it called `before` comes before what another does once it has called `after`.
inline void before(void* meeting) { __tsan_release(meeting); }
inline void after(void* meeting) { __tsan_acquire(meeting); }
// What an emulation itself does and waits for, which no thread of a block does.
struct Unseen {
    Unseen() { __tsan_ignore_thread_begin(), AnnotateIgnoreSyncBegin(__FILE__, __LINE__); }
    ~Unseen() { AnnotateIgnoreSyncEnd(__FILE__, __LINE__), __tsan_ignore_thread_end(); }
};
#else
using Fiber = int;
inline Fiber made_fiber() { return 0; }
inline Fiber own_fiber() { return 0; }
inline void change_to(Fiber) {}
inline void end(Fiber) {}
inline void before(void*) {}
inline void after(void*) {}
struct Unseen {
    Unseen() {}
};
#endif

// A launch, as long as it is there; what the host does meanwhile is no thread's.
#if defined(__SANITIZE_THREAD__)
class Launch {
  public:
    Launch() = default;
    Launch(const Launch&) = delete;

    // `phase(t)` by every thread t below `threads`, one after another, then a barrier of each `group` of them.
    void every(int threads, int group, const std::function<void(int)>& phase) {
        while (int(all.size()) < threads) all.push_back(std::make_unique<One>());
        met_.resize(threads, &edges_.begun);
        char(&now)[1024] = meetings_[phases_++ % 2];
        launch = this, work_ = &phase;
        for (number_ = 0; number_ < threads; number_++) {
            One& one = *all[number_];
            last_ = met_[number_], next_ = met_[number_] = &now[number_ / group];
            getcontext(&one.place);
            one.place.uc_stack.ss_sp = one.stack.data(), one.place.uc_stack.ss_size = one.stack.size(), one.place.uc_link = nullptr;
            makecontext(&one.place, enter, 0);
            change_to(one.fiber);
            swapcontext(&caller_, &one.place);
        }
    }

  private:
    struct One {
        Fiber fiber = made_fiber();
        std::vector<char> stack = std::vector<char>(256 * 1024);
        ucontext_t place;
    };
    struct Edges {
        char begun, over;
        Edges() { before(&begun); }
        ~Edges() { after(&over); }
    };
    static inline std::vector<std::unique_ptr<One>> all;
    static inline Launch* launch;
    char meetings_[2][1024];  // of groups, of every second phase
    std::vector<char*> met_;  // each thread's last barrier
    char *last_, *next_;
    int phases_ = 0, number_;
    const std::function<void(int)>* work_;
    Fiber back_ = own_fiber();
    ucontext_t caller_;
    Edges edges_;
    Unseen own_;

    // Neither entered nor left, as the sanitizer sees it.
    __attribute__((no_sanitize("thread"))) static void enter() {
        Launch& own = *launch;
        after(own.last_);
        (*own.work_)(own.number_);
        before(own.next_), before(&own.edges_.over);
        change_to(own.back_);
        setcontext(&own.caller_);
    }
};
#else
struct Launch {
    template <class Phase>
    void every(int threads, int, const Phase& phase) const {
        for (int t = 0; t < threads; t++) phase(t);
    }
};
#endif

}  // namespace host
