// The GPU's column loop of gptq_block on the host, lane by lane: for tests. Arguments as of gptq_block.cu, with the lanes of a row
// in place of the stream. Also its division.

// Compiled in a fraction of the time.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Og")
#endif

#include "gptq_found.h"
#include "gptq_sweep.h"
#include "gptq_updates.h"
#include "host_threads.h"

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

template <int L, bool PLAIN, int R>
struct Solvers {
    using One = Lane<L, PLAIN, R>;
    static constexpr int ARRIVAL = One::ARRIVAL;
    static constexpr int ROWS = LANES / L;
    One lane[LANES];
    typename One::Course course[LANES];
    template <class F>
    void each(F f) {
        for (One& l : lane) f(l);
    }
    void share() {
        for (int i = 0; i < LANES; i++)
            for (int r = 0; r < R; r++)
                for (int c = 0; c < PANEL; c++) lane[i].x[r][c] = lane[c / One::OWN * ROWS + i % ROWS].own[r][c % One::OWN];
    }
    void start(const Problem& p, const Shared& s, int panel) {
        for (int i = 0; i < LANES; i++) course[i] = lane[i].start(p, s, panel);
    }
    template <int FROM, int TO>
    void go_on(const Problem& p) {
        for (int i = 0; i < LANES; i++) lane[i].template go_on<FROM, TO>(p, course[i]);
    }
    template <bool MORE>
    void end(const Problem& p) {
        for (int i = 0; i < LANES; i++) lane[i].template end<MORE>(p, course[i]);
    }
};

template <int ROWS, int R, int KEPT_>
struct Helpers {
    static constexpr int KEPT = KEPT_;
    static constexpr bool ALL = false;
    using One = Updates<ROWS, R, KEPT>;
    One lane[LANES];
    template <class F>
    void each(F f) {
        for (One& l : lane) f(l);
    }
    // What a GPU multiplies of it.
    static double operand(float x) { return float_of(bits_of(x) & OPERAND); }
    // Sums of eight products, exact but for one rounding; a GPU's are cut off.
    template <int I>
    void multiply() {
        struct Product {
            typename One::Tile* sums;
            int m, j;
            Left a;
            Right b;
        };
        std::vector<Product> of[LANES];
        for (int i = 0; i < LANES; i++)
            lane[i].products(lane[i].held[I], [&](typename One::Tile& sums, int m, int j, const Left& a, const Right& b) {
                of[i].push_back({&sums, m, j, a, b});
            });
        for (size_t n = 0; n < of[0].size(); n++)
            for (int i = 0; i < LANES; i++)
                for (int d = 0; d < 4; d++) {
                    const int g = i / 4, t = i % 4, column = 2 * t + d % 2;
                    double sum = 0.0;
                    for (int k = 0; k < 8; k++)
                        sum += operand(of[4 * g + k % 4][n].a.at[k / 4 * 2 + d / 2]) * operand(of[4 * column + k % 4][n].b.at[k / 4]);
                    float none = 0.0f;
                    float& to = One::place_of(*of[i][n].sums, none, of[i][n].m, of[i][n].j, d);
                    to = float(to + sum);
                }
    }
};

// The warps of a team, of which one runs at a time: the first of `order` that need not wait.
class Team {
  public:
    struct Event {
        bool there = false;
    };

    explicit Team(std::vector<int> order) : order_(std::move(order)), ended_(order_.size()), awaited_(order_.size()), runs_(order_[0]) {}

    void begin(int warp) {
        const host::Unseen team;
        std::unique_lock<std::mutex> lock(mutex_);
        turn_.wait(lock, [&] { return runs_ == warp; });
    }
    void end(int warp) {
        const host::Unseen team;
        std::unique_lock<std::mutex> lock(mutex_);
        ended_[warp] = true;
        choose();
    }
    void signal(int warp, Event& event) {
        host::before(&event);
        const host::Unseen team;
        std::unique_lock<std::mutex> lock(mutex_);
        event.there = true;
        choose();
        turn_.wait(lock, [&] { return runs_ == warp; });
    }
    void await(int warp, Event& event) {
        wait(warp, event);
        host::after(&event);
    }
    bool arrived(Event& event) {
        if (!is_there(event)) return false;
        host::after(&event);
        return true;
    }

  private:
    void wait(int warp, Event& event) {
        const host::Unseen team;
        std::unique_lock<std::mutex> lock(mutex_);
        if (event.there) return;
        awaited_[warp] = &event;
        choose();
        turn_.wait(lock, [&] { return runs_ == warp; });
        awaited_[warp] = nullptr;
    }
    static bool is_there(const Event& event) {
        const host::Unseen team;
        return event.there;
    }

    std::mutex mutex_;
    std::condition_variable turn_;
    const std::vector<int> order_;
    std::vector<char> ended_;
    std::vector<const Event*> awaited_;
    int runs_;

    void choose() {
        bool all = true;
        for (const int warp : order_) {
            all &= ended_[warp] != 0;
            if (ended_[warp] || (awaited_[warp] && !awaited_[warp]->there)) continue;
            if (warp != runs_) runs_ = warp, turn_.notify_all();
            return;
        }
        if (all) return;
        std::fputs("gptq_lanes: the warps of a team wait for each other\n", stderr);
        std::abort();
    }
};

struct Meet {
    Team& team;
    std::vector<Team::Event>&units, &panels;
    int warp;
    // Of the warp that solves.
    void ready(int) {}
    bool arrived(int panel) { return panel % 2 && team.arrived(panels.at(panel)); }  // also where it need not
    void receive(int panel) { team.await(warp, panels.at(panel)); }
    void send(int unit) { team.signal(warp, units.at(unit)); }
    // Of those that help.
    void hand_over(int panel) { team.signal(warp, panels.at(panel)); }
    void whole(int) {}
    void await(int unit) { team.await(warp, units.at(unit)); }
};

template <int L, bool PLAIN, int R = 1>
void solve(const Problem& p) {
    // Poisoned: what is read without having been written shows.
    std::vector<Four> factor(FACTOR / 4, Four{{NAN, NAN, NAN, NAN}});
    std::vector<Pivot> pivots(MOST, Pivot{1.0f, 0.0f});
    constexpr int ROWS = LANES / L;  // of a team, R times
    std::vector<float> errors(R * ROWS * STRIDE, NAN);
    float* panels = factor[0].at;
    for (int at = 0; at < int((p.columns + PANEL - 1) / PANEL); at++)
        for (int i = 0; i < PANEL * (at + 1); i++)
            for (int c = 0; c < PANEL; c++) {
                const uint32_t column = at * PANEL + c;
                const bool real = uint32_t(i) < p.columns && column < p.columns;
                panels[panel_start(at) + in_factor(i, c)] = real ? p.upper[i * p.upper_stride + column] : 0.0f;
            }
    for (uint32_t j = 0; j < p.columns; j++) pivots[j] = pivot(p.upper[j * p.upper_stride + j]);
    const Shared shared{panels, &pivots[0].diagonal};
    for (uint32_t first = 0; first < p.rows; first += R * ROWS) {
        std::fill(errors.begin(), errors.end(), NAN);
        const auto spans = [&](int row) { return errors.data() + row * STRIDE; };
        const auto row = [&](int slot) { return first + slot % ROWS * R + slot / ROWS; };
        if (p.words) {
            for (int i = 0; i < 2 * R * LANES; i++) {
                const int slot = i % (R * ROWS);
                survey<L>(p, row(slot), i / (R * ROWS), spans(slot));
            }
            for (int i = 0; i < 2 * R * LANES; i++) {
                const int slot = i % (R * ROWS);
                find<L, PLAIN>(p, row(slot), i / (R * ROWS), row(slot) < p.rows ? p.words[row(slot)] : 0, spans(slot));
            }
        }
        Solvers<L, PLAIN, R> solvers;
        for (int i = 0; i < LANES; i++) {
            solvers.lane[i].begin(p, first + i % ROWS * R, i / ROWS, spans(i % ROWS));
            p.words ? solvers.lane[i].take_ranges(p) : solvers.lane[i].fetch_ranges(p, 0);
        }
        // One to three warps that help, in some order.
        const int round = first / (R * ROWS), helpers = 1 + round % 3;
        std::vector<int> order(1 + helpers);
        for (int i = 0; i <= helpers; i++) order[i] = (i + round / 3) % (1 + helpers);
        if (round % 2) std::reverse(order.begin(), order.end());
        Team team(order);
        std::vector<Team::Event> units(MOST / UNIT), handed(MOST / PANEL);
        std::vector<Helpers<4 / L * R, R, R == 1 ? 3 : 1>> helper(helpers);
        std::vector<std::thread> others;
        for (int h = 0; h < helpers; h++) {
            for (int i = 0; i < LANES; i++) helper[h].lane[i].begin(p, i, first, errors.data(), 1 + h, helpers);
            others.emplace_back([&, h] {
                Meet meet{team, units, handed, 1 + h};
                team.begin(1 + h);
                update(helper[h], p, shared, meet, h, helpers);
                team.end(1 + h);
            });
        }
        Meet meet{team, units, handed, 0};
        team.begin(0);
        sweep<L>(solvers, p, shared, meet);
        team.end(0);
        for (std::thread& other : others) other.join();
    }
}

template <bool PLAIN>
void solve(const Problem& p, int64_t lanes) {
    if (PLAIN && lanes == TWO_ROWS) return solve<1, PLAIN, PLAIN ? 2 : 1>(p);
    lanes == 1 ? solve<1, PLAIN>(p) : solve<4, PLAIN>(p);
}

}  // namespace

extern "C" void bitgrid_gptq_lanes(const float* block, const float* upper, float* scale, float* zero, const int32_t* group,
                                   int64_t upper_stride, int64_t scale_stride, int64_t zero_stride, int64_t columns, int64_t rows,
                                   int64_t top, int64_t kind, int64_t plain, uint8_t* codes, float* values, float* errors, float* loss,
                                   const float* tops, const int32_t* words, int32_t* odd, int64_t lanes) {
    Problem p{block, upper,        scale,        zero,        codes,             values,         errors,     loss,      tops, words,
              odd,   upper_stride, scale_stride, zero_stride, uint32_t(columns), uint32_t(rows), float(top), int(kind), 0, 0, 0, {}};
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
