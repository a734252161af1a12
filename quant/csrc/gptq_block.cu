// gptq_block on a GPU: the loop of gptq_lanes.h, teams of warps in blocks of threads, the factor's panels in shared memory.
//
// Plain C ABI. Columns one after another: block, codes (bytes), values, errors are [B, N], contiguous; upper is [B, B], scale and zero are
// [G, N], with strides between rows; group [B] lies on the host and goes with the launch. plain: whole zeros, and the columns of the block
// and of each group are multiples of 16. values may be null: nobody wants them. loss [N] (or null) is added to; tops [N] is the largest
// code of each row (null: top in all). words [N] (or null) says of each row how its ranges are found (`ranges::Fit`): scale and zero are
// written to then, and odd [1] is added to. Nothing is allocated, copied from the host or waited for.

#include "early.h"
#include "gptq_found.h"
#include "gptq_sweep.h"
#include "gptq_updates.h"

namespace {

using namespace gptq;

constexpr int SIDE = 128;  // threads that copy the factor's first panels

// What runs as a block of threads: TEAMS teams of a warp that solves, whose lanes share a row L at a time or have R rows each, and H that
// help. Warp i is the scheduler i % 4's.
template <int L_, bool PLAIN_, int R_, int TEAMS_, int H_>
struct Form {
    static constexpr int L = L_, R = R_, TEAMS = TEAMS_, H = H_;
    static constexpr bool PLAIN = PLAIN_;
    static constexpr int ROWS = 32 / L * R;                          // of a team
    static constexpr int THREADS = 32 * TEAMS * (1 + H);
    static constexpr int STAGES = TEAMS * H * 32 / SIDE > 1 ? 2 : 1;  // `SIDE`s of helpers that copy
    // Panels that a helper asks for at once: all of its own where these are few numbers; more would delay the first.
    static constexpr int KEPT = L > 1 && H > 1 ? (MOST / PANEL - 2) / H + 1 : 1;
    static constexpr int EVENTS = MOST / UNIT + MOST / PANEL, BARRIERS = TEAMS * EVENTS + 1;
    static_assert(TEAMS * H * 32 >= SIDE && BARRIERS <= THREADS, "");
};

template <int L, bool PLAIN, int R>
struct Solvers {
    using One = Lane<L, PLAIN, R>;
    static constexpr int ARRIVAL = One::ARRIVAL;
    static constexpr int ROWS = 32 / L;  // neighbours in memory are neighbours in the warp
    One lane;
    typename One::Course course;
    template <class F>
    __device__ __forceinline__ void each(F f) {
        f(lane);
    }
    __device__ __forceinline__ void share() {
        if (L == 1) {
            UNROLLED for (int r = 0; r < R; r++)
                UNROLLED for (int c = 0; c < PANEL; c++) lane.x[r][c] = lane.own[r][c % One::OWN];
        } else {
            const int row = threadIdx.x % ROWS;
            UNROLLED for (int c = 0; c < PANEL; c++)
                lane.x[0][c] = __shfl_sync(0xffffffffu, lane.own[0][c % One::OWN], c / One::OWN * ROWS + row);
        }
    }
    __device__ __forceinline__ void start(const Problem& p, const Shared& s, int panel) { course = lane.start(p, s, panel); }
    template <int FROM, int TO>
    __device__ __forceinline__ void go_on(const Problem& p) {
        lane.template go_on<FROM, TO>(p, course);
    }
    template <bool MORE>
    __device__ __forceinline__ void end(const Problem& p) {
        lane.template end<MORE>(p, course);
    }
};

template <class F>
struct Helpers {
    static constexpr int ROWS = F::ROWS / 8, R = F::R, KEPT = F::KEPT;
    static constexpr bool ALL = KEPT * F::H >= MOST / PANEL - 1;
    using One = Updates<ROWS, R, KEPT>;
    One lane;
    template <class G>
    __device__ __forceinline__ void each(G f) {
        f(lane);
    }
    template <int I>
    __device__ __forceinline__ void multiply() {
        lane.products(lane.held[I], [](typename One::Tile& sums, int m, int j, const Left& a, const Right& b) {
            float none[2] = {0.0f, 0.0f};  // of rows that are not there
            asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                : "+f"(One::place_of(sums, none[0], m, j, 0)), "+f"(One::place_of(sums, none[0], m, j, 1)),
                  "+f"(One::place_of(sums, none[0], m, j, 2)), "+f"(One::place_of(sums, none[1], m, j, 3))
                : "r"(bits_of(a.at[0])), "r"(bits_of(a.at[1])), "r"(bits_of(a.at[2])), "r"(bits_of(a.at[3])), "r"(bits_of(b.at[0])),
                  "r"(bits_of(b.at[1])));
        });
    }
};

__device__ __forceinline__ void all() { asm volatile("bar.sync 0;" ::: "memory"); }

#define ASKED(HOW) "{ .reg .pred p; mbarrier." HOW ".parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"

// What is waited for, each once: a unit's errors, and a panel, of each team; all of the factor.
struct Meet {
    Near events, factor;  // `mbarrier`s
    static constexpr int UNITS = MOST / UNIT;
    __device__ static __forceinline__ void make(Near event, uint32_t count) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(event), "r"(count) : "memory");
    }
    __device__ static __forceinline__ void arrive(Near event) {
        together();
        if (threadIdx.x % 32 == 0) asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(event) : "memory");
    }
    __device__ static __forceinline__ bool test(Near event) {
        uint32_t done;
        asm volatile(ASKED("test_wait") : "=r"(done) : "r"(event) : "memory");
        return done;
    }
    __device__ static __forceinline__ void wait(Near event) {
#if __CUDA_ARCH__ >= 900
        uint32_t done;
        do {
            asm volatile(ASKED("try_wait") : "=r"(done) : "r"(event) : "memory");
        } while (!done);
#else
        while (!test(event)) {
        }
#endif
    }
    // Of one that solves.
    __device__ __forceinline__ void ready(int panel) const { panel == 0 ? all() : wait(factor); }
    __device__ __forceinline__ bool arrived(int panel) const { return test(events + 8 * (UNITS + panel)); }
    __device__ __forceinline__ void receive(int panel) const { wait(events + 8 * (UNITS + panel)); }
    __device__ __forceinline__ void send(int unit) const { arrive(events + 8 * unit); }
    // Of those that help.
    __device__ __forceinline__ void hand_over(int panel) const { arrive(events + 8 * (UNITS + panel)); }
    __device__ __forceinline__ void whole(int panel) const {
        if (panel > 1) wait(factor);
    }
    __device__ __forceinline__ void await(int unit) const { wait(events + 8 * unit); }
};

__device__ __forceinline__ Near near(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

template <int FLOATS>
__device__ __forceinline__ void copy(uint32_t to, const float* from, uint32_t bytes = 4 * FLOATS) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(4 * FLOATS), "r"(bytes) : "memory");
}

// Panels FIRST .. LAST - 1 of a factor of MOST columns and whole vectors, by a side of threads: all addresses are so far from a few.
template <int FIRST, int LAST>
__device__ __forceinline__ void stage_whole(const Problem& p, float* factor, uint32_t thread) {
    constexpr int EACH = PANEL / 4, STEP = SIDE / EACH;  // threads to a row, rows at a time
    static_assert(STEP == 2 * PANEL, "a panel's last rows are half of a step");
    const uint32_t i = thread / EACH, column = thread % EACH * 4;
    const float* from = p.upper + (i * p.upper_stride + column);
    const uint32_t to = near(factor + in_factor(i, column));
    UNROLLED for (int k = 0; k < LAST / 2; k++) {
        UNROLLED for (int panel = FIRST; panel < LAST; panel++) {
            if (panel > 2 * k || (panel == 2 * k && i < PANEL))
                copy<4>(to + 4 * (panel_start(panel) + k * STEP * PANEL), from + panel * PANEL);
        }
        from += STEP * p.upper_stride;
    }
}

// Any factor's, FLOATS at a time. What is beyond the factor is 0.
template <int FLOATS>
__device__ __forceinline__ void stage(const Problem& p, float* factor, uint32_t thread, int first, int last) {
    constexpr int EACH = PANEL / FLOATS, STEP = SIDE / EACH;
    static_assert(STEP % UNIT == 0, "rows a step apart have one place in their units");
    const uint32_t i = thread / EACH, column = thread % EACH * FLOATS;
    ROLLED for (int panel = first; panel < last; panel++) {
        const int left = min(int(p.columns) - int(panel * PANEL + column), FLOATS);
        const uint32_t to = near(factor + panel_start(panel) + in_factor(i, column));
        ROLLED for (uint32_t row = i; row < PANEL * (panel + 1); row += STEP) {
            const bool real = row < p.columns && left > 0;
            copy<FLOATS>(to + 4 * (row - i) * PANEL, real ? p.upper + (row * p.upper_stride + panel * PANEL + column) : p.upper,
                         real ? 4 * left : 0);
        }
    }
}

template <int FIRST, int LAST>
__device__ __forceinline__ void staged(const Problem& p, float* factor, uint32_t thread) {
    const bool wide = p.upper_stride % 4 == 0 && reinterpret_cast<uintptr_t>(p.upper) % 16 == 0;
    if (wide && p.columns == MOST)
        stage_whole<FIRST, LAST>(p, factor, thread);
    else
        wide ? stage<4>(p, factor, thread, FIRST, min(LAST, p.panels())) : stage<1>(p, factor, thread, FIRST, min(LAST, p.panels()));
    asm volatile("cp.async.commit_group;" ::: "memory");
}

static_assert(SIDE == MOST, "a pivot for each thread that copies");
struct Memory {
    alignas(16) float factor[FACTOR];
    Pivot pivots[MOST];
    alignas(16) uint64_t barriers[100];
};

template <class F>
__global__ void __launch_bounds__(F::THREADS, F::PLAIN && F::H == 1 ? 2 : 1) solve(const __grid_constant__ Problem p) {
    constexpr int L = F::L, R = F::R, H = F::H, PART = 32 / L;  // PART: rows of a team, R times
    static_assert(F::BARRIERS <= 100, "");
    extern __shared__ __align__(16) char bytes[];
    Memory& memory = *reinterpret_cast<Memory*>(bytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int team = warp % F::TEAMS, helper = warp / F::TEAMS - 1;  // -1: it solves
    float* errors = reinterpret_cast<float*>(bytes + sizeof(Memory)) + team * (F::ROWS * STRIDE);  // [ROWS, STRIDE]
    const uint32_t first = (blockIdx.x * F::TEAMS + team) * F::ROWS;
    const int rank = (helper * F::TEAMS + team) * 32 + lane, side = helper < 0 ? -1 : rank / SIDE;
    const uint32_t thread = rank % SIDE;  // of its side
    const Meet meet{near(memory.barriers + team * F::EVENTS), near(memory.barriers + F::TEAMS * F::EVENTS)};

    // Before the kernels in front are over nothing but the launch's own arguments is read. The next kernel may begin only then: what it
    // reads before its own wait can be written by this one alone.
    if (threadIdx.x < F::BARRIERS) Meet::make(near(memory.barriers + threadIdx.x), threadIdx.x < F::TEAMS * F::EVENTS ? 1 : SIDE);
    await_previous();
    release_next();
    // What comes from farthest first.
    const float diagonal = side == 0 && thread < p.columns ? p.upper[thread * (p.upper_stride + 1)] : 1.0f;
    if (side == 0) staged<0, 2>(p, memory.factor, thread);
    if (side == F::STAGES - 1) staged<2, MOST / PANEL>(p, memory.factor, thread);
    const uint32_t row = settled(first + lane % PART * R);
    const int part = lane / PART;
    // A team all of whose rows are beyond the last does nothing but to copy.
    const bool idle = first >= p.rows;
    if (p.words && !idle) {
        // 2 R warps' work, by those that help, or by both where one does.
        constexpr int WORKERS = H > 1 ? H / R * R : 2;
        const int worker = H > 1 ? helper : helper + 1, r = worker & (R - 1);
        const uint32_t at = row + r;
        const int32_t word = int32_t(bits_of(get(reinterpret_cast<const float*>(p.words) + at, worker >= 0 && at < p.rows)));
        const Near spans = near(errors + (r * PART + lane % PART) * STRIDE);
        const auto each = [&](auto f) {
            ROLLED for (int task = worker < WORKERS ? worker : -1; task >= 0 && task < 2 * R; task += WORKERS) f(part + task / R * L);
            asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(32 * (1 + H)) : "memory");
        };
        each([&](int mine) { survey<L>(p, at, mine, spans); });
        each([&](int mine) { find<L, F::PLAIN>(p, at, mine, word, spans); });
    }
    const Shared shared{settled(near(memory.factor)), settled(near(&memory.pivots[0].diagonal))};
    if (helper < 0) {
        if (idle) {
            all();
        } else {
            Solvers<L, F::PLAIN, R> solvers;
            solvers.lane.begin(p, row, settled(part), settled(near(errors + lane % PART * STRIDE)));
            p.words ? solvers.lane.take_ranges(p) : solvers.lane.fetch_ranges(p, 0);
            sweep<L>(solvers, p, shared, meet);
        }
    } else {
        Helpers<F> helpers;
        if (!idle) helpers.lane.begin(p, lane, first, settled(near(errors)), 1 + helper, H);
        if (side == 0) {
            memory.pivots[thread] = thread < p.columns ? pivot(diagonal) : Pivot{1.0f, 0.0f};
            asm volatile("cp.async.wait_group %0;" ::"n"(2 - F::STAGES) : "memory");
        }
        all();
        if (side == F::STAGES - 1) asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(meet.factor) : "memory");
        if (!idle) update(helpers, p, shared, meet, helper, H);
        asm volatile("cp.async.wait_group 0;" ::: "memory");  // none outlives its thread
    }
}

template <class F>
constexpr int shared_bytes() {
    return sizeof(Memory) + STRIDE * F::ROWS * F::TEAMS * sizeof(float);
}

template <class F>
cudaError_t launch(const Problem& p, cudaStream_t stream) {
    constexpr int ROWS = F::ROWS * F::TEAMS, SHARED = shared_bytes<F>();
    static_assert(SHARED <= 99 * 1024 || F::R > 1, "what a block may have on all GPUs from compute capability 8.0 on");
    const cudaError_t failed = let_have(solve<F>, SHARED);
    if (failed != cudaSuccess) return failed;
    return launch_as(Start(dim3((p.rows + ROWS - 1) / ROWS), F::THREADS, SHARED, stream, p.early), solve<F>, p);
}

using TwoRows = Form<1, true, 2, 4, 2>;

bool two_rows_fit(const Problem& p, bool plain, int64_t shared) {
    const auto aligned = [](const void* x, int to) { return reinterpret_cast<uintptr_t>(x) % to == 0; };
    return plain && p.rows % 64 == 0 && aligned(p.codes, 2) && aligned(p.values, 8) && aligned(p.errors, 8) &&
           shared >= shared_bytes<TwoRows>();
}

// Microseconds on 132 multiprocessors (room: 16896 rows), groups of 128, by lanes of a row, teams of a block, and warps that help each:
//   4096 rows: 11.1 (4, 4, 2), 11.0 (1, 1, 4)     12288: 13.5 (1, 3, 3), 14.2 (1, 4, 3)
//   8192 rows: 11.3 (1, 2, 3), 12.0 (1, 2, 2)     16384: 14.9 (1, 4, 3), 15.1 (1, 4, 2)
// So as few teams as put all blocks on a multiprocessor each: what these share is memory, which limits them. Beyond that by two rows a lane
// (32768 rows: 23.2, 98304: 66.2) from this many times as many rows as room on, a ratio; before by a lane each, two blocks on each.
constexpr int64_t TWO_ROWS_ROOMS[2] = {5, 4};

// The form for all kinds takes three times as long to compile. room: rows that are solved at once by a lane each where a block of four
// teams is on each multiprocessor.
cudaError_t launch(const Problem& p, bool plain, int64_t lanes, int64_t room, cudaStream_t stream) {
    if (!plain) return lanes == 4 ? launch<Form<4, false, 1, 4, 1>>(p, stream) : launch<Form<1, false, 1, 4, 1>>(p, stream);
    if (lanes == TWO_ROWS) return launch<TwoRows>(p, stream);
    if (lanes == 4) return launch<Form<4, true, 1, 4, 2>>(p, stream);
    const int64_t rows = p.rows;
    if (4 * rows <= 2 * room) return launch<Form<1, true, 1, 2, 3>>(p, stream);
    if (4 * rows <= 3 * room) return launch<Form<1, true, 1, 3, 3>>(p, stream);
    return rows <= room ? launch<Form<1, true, 1, 4, 3>>(p, stream) : launch<Form<1, true, 1, 4, 1>>(p, stream);
}

}  // namespace

// lanes of a row: 1, 4, -2 (`TWO_ROWS`), or 0: as was measured to take least time. More shorten a row's time, and repeat its rounding.
extern "C" int bitgrid_gptq_block(const float* block, const float* upper, float* scale, float* zero, const int32_t* group,
                                  int64_t upper_stride, int64_t scale_stride, int64_t zero_stride, int64_t columns, int64_t rows,
                                  int64_t top, int64_t kind, int64_t plain, uint8_t* codes, float* values, float* errors, float* loss,
                                  const float* tops, const int32_t* words, int32_t* odd, int64_t lanes, cudaStream_t stream) {
    Problem p{block, upper,        scale,        zero,        codes,             values,         errors,     loss,      tops, words,
              odd,   upper_stride, scale_stride, zero_stride, uint32_t(columns), uint32_t(rows), float(top), int(kind), 0, 0, 0, {}};
    for (int64_t j = 0; j < columns; j++) p.group[j] = group[j];
    p.count_groups(plain != 0);
    int device = 0, processors = 0, shared = 0;
    cudaError_t failed = cudaGetDevice(&device);
    if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (failed != cudaSuccess) return failed;
    int major = 0;
    if ((failed = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) != cudaSuccess) return failed;
    p.early = major >= 9;
    const int64_t room = int64_t(SIDE) * processors;
    const bool two = two_rows_fit(p, plain != 0, shared);
    if (!lanes) lanes = two && TWO_ROWS_ROOMS[1] * rows > TWO_ROWS_ROOMS[0] * room ? TWO_ROWS : 4 * rows <= room ? 4 : 1;
    if (lanes == TWO_ROWS ? !two : lanes != 1 && lanes != 4) return cudaErrorInvalidValue;
    return launch(p, plain != 0, lanes, room, stream);
}
