// The GPU's column loop of gptq_block on the host, lane by lane: for tests. Arguments as of gptq_block.cu, with the lanes of a row
// in place of the stream. Also its division.

// Compiled in a fraction of the time.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Og")
#endif

#include "gptq_found.h"
#include "gptq_updates.h"

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

using namespace gptq;

constexpr int LANES = 32;

template <int L, bool PLAIN>
struct Solvers {
    using One = Lane<L, PLAIN>;
    static constexpr int ROWS = LANES / L;
    One lane[LANES];
    typename One::Course course[LANES];
    template <class F>
    void each(F f) {
        for (One& l : lane) f(l);
    }
    void share() {
        for (int i = 0; i < LANES; i++)
            for (int c = 0; c < PANEL; c++) lane[i].x[c] = lane[c / One::OWN * ROWS + i % ROWS].own[c % One::OWN];
    }
    void start(const Problem& p, const Shared& s, int panel) {
        for (int i = 0; i < LANES; i++) course[i] = lane[i].start(p, s, panel);
    }
    template <bool MORE>
    void end(const Problem& p) {
        for (int i = 0; i < LANES; i++) lane[i].template end<MORE>(p, course[i]);
    }
};

template <int L>
struct Helpers {
    Updates<L> lane[LANES];
    template <class F>
    void each(F f) {
        for (Updates<L>& l : lane) f(l);
    }
};

// The two warps of a team, of which one runs at a time: `first` whenever it need not wait. Their barriers are those of gptq_block.cu.
class Team {
  public:
    enum Warp { SOLVES, HELPS };
    struct Barrier {
        int arrived = 0;
    };
    Barrier all, errors, panels;

    explicit Team(Warp first) : first_(first), runs_(first) {}

    void begin(Warp warp) {
        std::unique_lock<std::mutex> lock(mutex_);
        turn_.wait(lock, [&] { return runs_ == warp; });
    }
    void end(Warp warp) {
        std::unique_lock<std::mutex> lock(mutex_);
        ended_[warp] = true;
        if (!ended_[1 - warp]) choose();
    }
    void meet(Warp warp, Barrier& barrier, bool wait = true) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (++barrier.arrived == 2) {
            barrier.arrived = 0;
            if (awaits_[1 - warp] == &barrier) awaits_[1 - warp] = nullptr;
        } else if (wait) {
            awaits_[warp] = &barrier;
        }
        choose();
        turn_.wait(lock, [&] { return runs_ == warp; });
    }

  private:
    std::mutex mutex_;
    std::condition_variable turn_;
    const Warp first_;
    int runs_;
    bool ended_[2] = {};
    Barrier* awaits_[2] = {};

    void choose() {
        const auto can = [&](int warp) { return !ended_[warp] && !awaits_[warp]; };
        runs_ = can(first_) ? first_ : 1 - first_;
        if (!can(runs_)) {
            std::fputs("gptq_lanes: the warps of a team wait for each other\n", stderr);
            std::abort();
        }
        turn_.notify_all();
    }
};

struct Meet {
    Team& team;
    // Of the warp that solves.
    void ready(int) { team.meet(Team::SOLVES, team.all); }
    void receive(int) { team.meet(Team::SOLVES, team.panels); }
    void send(int) { team.meet(Team::SOLVES, team.errors, false); }
    // Of the one that helps.
    void hand_over(int) { team.meet(Team::HELPS, team.panels, false); }
    void whole() { team.meet(Team::HELPS, team.all); }
    void await(int panel) {
        if (panel == 0) whole();
        team.meet(Team::HELPS, team.errors);
    }
};

template <int L, bool PLAIN>
void solve(const Problem& p) {
    // Poisoned: what is read without having been written shows.
    std::vector<Four> factor(FACTOR / 4, Four{{NAN, NAN, NAN, NAN}});
    std::vector<Pivot> pivots(MOST, Pivot{1.0f, 0.0f});
    constexpr int ROWS = LANES / L;  // of a team
    std::vector<float> errors(ROWS * STRIDE, NAN);
    float* panels = factor[0].at;
    for (int at = 0; at < int((p.columns + PANEL - 1) / PANEL); at++)
        for (int i = 0; i < PANEL * (at + 1); i++)
            for (int c = 0; c < PANEL; c++) {
                const uint32_t column = at * PANEL + c;
                const bool real = uint32_t(i) < p.columns && column < p.columns;
                panels[panel_start(at) + i * PANEL + c] = real ? p.upper[i * p.upper_stride + column] : 0.0f;
            }
    for (uint32_t j = 0; j < p.columns; j++) pivots[j] = pivot(p.upper[j * p.upper_stride + j]);
    const Shared shared{panels, &pivots[0].diagonal};
    for (uint32_t first = 0; first < p.rows; first += ROWS) {
        std::fill(errors.begin(), errors.end(), NAN);
        const auto spans = [&](int lane) { return errors.data() + lane % ROWS * STRIDE; };
        if (p.words) {
            for (int i = 0; i < 2 * LANES; i++) survey<L>(p, first + i % ROWS, i / ROWS, spans(i));
            for (int i = 0; i < 2 * LANES; i++) {
                const uint32_t row = first + i % ROWS;
                find<L, PLAIN>(p, row, i / ROWS, row < p.rows ? p.words[row] : 0, spans(i));
            }
        }
        Solvers<L, PLAIN> solvers;
        Helpers<L> helpers;
        for (int i = 0; i < LANES; i++) {
            solvers.lane[i].begin(p, first + i % ROWS, i / ROWS, spans(i));
            solvers.lane[i].fetch_ranges(p, 0);
            helpers.lane[i].begin(p, i, first, errors.data());
        }
        Team team(first / ROWS % 2 ? Team::SOLVES : Team::HELPS);
        Meet meet{team};
        std::thread other([&] {
            team.begin(Team::HELPS);
            team.meet(Team::HELPS, team.all);  // the first panels of the factor
            update(helpers, p, shared, meet);
            team.end(Team::HELPS);
        });
        team.begin(Team::SOLVES);
        sweep<L>(solvers, p, shared, meet);
        team.end(Team::SOLVES);
        other.join();
    }
}

template <bool PLAIN>
void solve(const Problem& p, int64_t lanes) {
    lanes == 1 ? solve<1, PLAIN>(p) : lanes == 2 ? solve<2, PLAIN>(p) : solve<4, PLAIN>(p);
}

}  // namespace

extern "C" void bitgrid_gptq_lanes(const float* block, const float* upper, float* scale, float* zero, const int32_t* group,
                                   int64_t upper_stride, int64_t scale_stride, int64_t zero_stride, int64_t columns, int64_t rows, int64_t top,
                                   int64_t kind, int64_t plain, float* codes, float* values, float* errors, float* loss, const float* tops,
                                   const int32_t* words, int32_t* odd, int64_t lanes) {
    Problem p{block, upper,        scale,        zero,        codes,             values,         errors,     loss,      tops, words,
              odd,   upper_stride, scale_stride, zero_stride, uint32_t(columns), uint32_t(rows), float(top), int(kind), {}, 0, 0};
    std::copy(group, group + columns, p.group);
    p.count_groups(plain != 0);
    plain ? solve<true>(p, lanes) : solve<false>(p, lanes);
}

// How many of a [count] / b are not what the processor's division gives.
extern "C" void bitgrid_gptq_division(const float* a, int64_t count, const float* b, int64_t divisors, int64_t* wrong) {
    *wrong = 0;
    for (int64_t d = 0; d < divisors; d++) {
        const float y = inverse(b[d]);
        for (int64_t i = 0; i < count; i++) *wrong += divided(a[i], b[d], y) != a[i] / b[d];
    }
}
