// gptq_block on a GPU: the loop of gptq_lanes.h, TEAMS teams of two warps to a block of threads, the factor's panels in shared memory.
//
// Plain C ABI. Columns one after another: block, codes, values, errors are [B, N], contiguous; upper is [B, B], scale and zero are [G, N],
// with strides between rows; group [B] lies on the host and goes with the launch. plain: whole zeros, and the columns of the block and of
// each group are multiples of 16. loss [N] (or null) is added to; tops [N] is the largest code of each row (null: top in all). words [N]
// (or null) says of each row how its ranges are found (`ranges::Fit`): scale and zero are written to then, and odd [1] is added to. Nothing
// is allocated, copied from the host or waited for.

#include "gptq_found.h"
#include "gptq_updates.h"

namespace {

using namespace gptq;

// Warps that solve, and as many that help them. Shared memory has room for two such blocks on a multiprocessor.
constexpr int TEAMS = 4, SIDE = 32 * TEAMS, THREADS = 2 * SIDE;

template <int L, bool PLAIN>
struct Solvers {
    using One = Lane<L, PLAIN>;
    static constexpr int ROWS = 32 / L;  // neighbours in memory are neighbours in the warp
    One lane;
    typename One::Course course;
    template <class F>
    __device__ __forceinline__ void each(F f) {
        f(lane);
    }
    __device__ __forceinline__ void share() {
        if (L == 1) {
            UNROLLED for (int c = 0; c < PANEL; c++) lane.x[c] = lane.own[c % One::OWN];
        } else {
            const int row = threadIdx.x % ROWS;
            UNROLLED for (int c = 0; c < PANEL; c++)
                lane.x[c] = __shfl_sync(0xffffffffu, lane.own[c % One::OWN], c / One::OWN * ROWS + row);
        }
    }
    __device__ __forceinline__ void start(const Problem& p, const Shared& s, int panel) { course = lane.start(p, s, panel); }
    template <bool MORE>
    __device__ __forceinline__ void end(const Problem& p) {
        lane.template end<MORE>(p, course);
    }
};

template <int L>
struct Helpers {
    Updates<L> lane;
    template <class F>
    __device__ __forceinline__ void each(F f) {
        f(lane);
    }
};

// How the warps of a team meet: one barrier for errors, one for what is handed over, after those of the block.
struct Meet {
    int errors, panels;
    __device__ __forceinline__ explicit Meet(int team) : errors(1 + 2 * team), panels(2 + 2 * team) {}
    __device__ static __forceinline__ void all() { asm volatile("bar.sync 0;" ::: "memory"); }
    __device__ static __forceinline__ void wait(int barrier) { asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory"); }
    __device__ static __forceinline__ void arrive(int barrier) { asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory"); }
    // Of one that solves.
    __device__ __forceinline__ void ready(int) const { all(); }
    __device__ __forceinline__ void receive(int) const { wait(panels); }
    __device__ __forceinline__ void send(int) const { arrive(errors); }
    // Of one that helps.
    __device__ __forceinline__ void hand_over(int) const { arrive(panels); }
    __device__ static __forceinline__ void whole() {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        all();
    }
    __device__ __forceinline__ void await(int panel) const {
        if (panel == 0) whole();
        wait(errors);
    }
};

__device__ __forceinline__ Near near(const float* at) { return uint32_t(__cvta_generic_to_shared(at)); }

template <int FLOATS>
__device__ __forceinline__ void copy(uint32_t to, const float* from, uint32_t bytes = 4 * FLOATS) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(4 * FLOATS), "r"(bytes) : "memory");
}

// Panels FIRST .. LAST - 1 of a factor of MOST columns and whole vectors, by half of the threads: all addresses are so far from a few.
template <int FIRST, int LAST>
__device__ __forceinline__ void stage_whole(const Problem& p, float* factor, uint32_t thread) {
    constexpr int EACH = PANEL / 4, STEP = SIDE / EACH;  // threads to a row, rows at a time
    static_assert(STEP == 2 * PANEL, "a panel's last rows are half of a step");
    const uint32_t i = thread / EACH, column = thread % EACH * 4;
    const float* from = p.upper + (i * p.upper_stride + column);
    const uint32_t to = near(factor + i * PANEL + column);
    UNROLLED for (int k = 0; k < LAST / 2; k++) {
        UNROLLED for (int panel = FIRST; panel < LAST; panel++) {
            if (panel > 2 * k || (panel == 2 * k && i < PANEL)) copy<4>(to + 4 * (panel_start(panel) + k * STEP * PANEL), from + panel * PANEL);
        }
        from += STEP * p.upper_stride;
    }
}

// Any factor's, FLOATS at a time. What is beyond the factor is 0.
template <int FLOATS>
__device__ __forceinline__ void stage(const Problem& p, float* factor, uint32_t thread, int first, int last) {
    constexpr int EACH = PANEL / FLOATS, STEP = SIDE / EACH;
    const uint32_t i = thread / EACH, column = thread % EACH * FLOATS;
    ROLLED for (int panel = first; panel < last; panel++) {
        const int left = min(int(p.columns) - int(panel * PANEL + column), FLOATS);
        const uint32_t to = near(factor + panel_start(panel) + column);
        ROLLED for (uint32_t row = i; row < PANEL * (panel + 1); row += STEP) {
            const bool real = row < p.columns && left > 0;
            copy<FLOATS>(to + 4 * row * PANEL, real ? p.upper + (row * p.upper_stride + panel * PANEL + column) : p.upper, real ? 4 * left : 0);
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

// A copy that the compiler has to keep: else it makes addresses anew again and again, from registers that take long to read.
__device__ __forceinline__ uint32_t settled(uint32_t x) {
    uint32_t made;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(made) : "r"(x), "r"(threadIdx.x));
    return made;
}
static_assert(SIDE == MOST, "a pivot for each thread that helps");
struct Memory {
    alignas(16) float factor[FACTOR];
    Pivot pivots[MOST];
};

template <int L, bool PLAIN>
__global__ void __launch_bounds__(THREADS, PLAIN && L == 1 ? 2 : 1) solve(const __grid_constant__ Problem p) {
    constexpr int ROWS = 32 / L;  // of a team
    extern __shared__ __align__(16) char bytes[];
    Memory& memory = *reinterpret_cast<Memory*>(bytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int team = warp % TEAMS;
    const bool helps = warp >= TEAMS;
    float* errors = reinterpret_cast<float*>(bytes + sizeof(Memory)) + team * (ROWS * STRIDE);  // [ROWS, STRIDE]
    const uint32_t first = (blockIdx.x * TEAMS + team) * ROWS, thread = team * 32 + lane;  // of its side
    const Meet meet(team);

    // What comes from farthest first.
    const float diagonal = helps && thread < p.columns ? p.upper[thread * (p.upper_stride + 1)] : 1.0f;
    if (helps) {
        staged<0, 2>(p, memory.factor, thread);
        staged<2, MOST / PANEL>(p, memory.factor, thread);
    }
    const uint32_t row = settled(first + lane % ROWS);
    const int part = lane / ROWS;
    if (p.words && first < p.rows) {
        const int mine = part + helps * L;
        const Near spans = near(errors + lane % ROWS * STRIDE);
        const int32_t word = row < p.rows ? p.words[row] : 0;
        survey<L>(p, row, mine, spans);
        meet.wait(meet.errors);
        find<L, PLAIN>(p, row, mine, word, spans);
        meet.wait(meet.errors);
    }
    // A team all of whose rows are beyond the last does nothing but to copy.
    const bool idle = first >= p.rows;
    const Shared shared{settled(near(memory.factor)), settled(near(&memory.pivots[0].diagonal))};
    if (!helps) {
        Solvers<L, PLAIN> solvers;
        if (idle) {
            UNROLLED for (int panel = 0; panel < 2; panel++)
                if (panel < p.panels()) meet.ready(panel);
        } else {
            solvers.lane.begin(p, row, settled(part), settled(near(errors + lane % ROWS * STRIDE)));
            solvers.lane.fetch_ranges(p, 0);
            sweep<L>(solvers, p, shared, meet);
        }
    } else {
        Helpers<L> helpers;
        if (!idle) helpers.lane.begin(p, lane, first, settled(near(errors)));
        memory.pivots[thread] = thread < p.columns ? pivot(diagonal) : Pivot{1.0f, 0.0f};
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        meet.all();
        if (!idle)
            update(helpers, p, shared, meet);
        else if (p.panels() > 1)
            meet.whole();
    }
}

template <int L, bool PLAIN>
cudaError_t launch(const Problem& p, cudaStream_t stream) {
    constexpr int ROWS = SIDE / L, SHARED = sizeof(Memory) + STRIDE * ROWS * sizeof(float);
    static_assert(SHARED <= 99 * 1024, "what a block may have on all GPUs from compute capability 8.0 on");
    const cudaError_t failed = cudaFuncSetAttribute(solve<L, PLAIN>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
    if (failed != cudaSuccess) return failed;
    solve<L, PLAIN><<<(p.rows + ROWS - 1) / ROWS, THREADS, SHARED, stream>>>(p);
    return cudaGetLastError();
}

// The form for all kinds takes three times as long to compile; it has no version for 2 lanes.
cudaError_t launch(const Problem& p, bool plain, int64_t lanes, cudaStream_t stream) {
    if (!plain) return lanes == 4 ? launch<4, false>(p, stream) : launch<1, false>(p, stream);
    return lanes == 1 ? launch<1, true>(p, stream) : lanes == 2 ? launch<2, true>(p, stream) : launch<4, true>(p, stream);
}

}  // namespace

// lanes of a row: 1, 2, 4, or 0: as many as leave a block of threads to a multiprocessor. More shorten a row's time, and
// repeat its rounding.
extern "C" int bitgrid_gptq_block(const float* block, const float* upper, float* scale, float* zero, const int32_t* group,
                                  int64_t upper_stride, int64_t scale_stride, int64_t zero_stride, int64_t columns, int64_t rows, int64_t top,
                                  int64_t kind, int64_t plain, float* codes, float* values, float* errors, float* loss, const float* tops,
                                  const int32_t* words, int32_t* odd, int64_t lanes, cudaStream_t stream) {
    Problem p{block, upper,        scale,        zero,        codes,             values,         errors,     loss,      tops, words,
              odd,   upper_stride, scale_stride, zero_stride, uint32_t(columns), uint32_t(rows), float(top), int(kind), {}, 0, 0};
    for (int64_t j = 0; j < columns; j++) p.group[j] = group[j];
    p.count_groups(plain != 0);
    if (!lanes) {
        int device = 0, processors = 0;
        cudaError_t failed = cudaGetDevice(&device);
        if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        if (failed != cudaSuccess) return failed;
        for (lanes = 4; lanes > 1 && rows * lanes > int64_t(SIDE) * processors;) lanes /= 2;
    }
    return launch(p, plain != 0, lanes, stream);
}
