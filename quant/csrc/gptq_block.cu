// gptq_block on a GPU: the loop of gptq_lanes.h, THREADS / L rows to a block of threads, the factor's panels in shared memory.
//
// Plain C ABI. Columns one after another: block, codes, values, errors are [B, N], contiguous; upper is [B, B], scale and zero are [G, N],
// with strides between rows; group [B] lies on the host and goes with the launch. plain: whole zeros, and the columns of the block and of
// each group are multiples of 16. loss [N] (or null) is added to; tops [N] is the largest code of each row (null: top in all). words [N]
// (or null) says of each row how its ranges are found (`ranges::Fit`): scale and zero are written to then, and odd [1] is added to. Nothing
// is allocated, copied from the host or waited for.

#include "gptq_lanes.h"

namespace {

using namespace gptq;

constexpr int THREADS = 128;  // shared memory and registers have room for two such blocks on a multiprocessor

template <int L, bool PLAIN>
struct Warp {
    using One = Lane<L, PLAIN>;
    static constexpr int ROWS = 32 / L;  // neighbours in memory are neighbours in the warp
    One lane;
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
};

__device__ __forceinline__ Near near(const float* at) { return uint32_t(__cvta_generic_to_shared(at)); }

// Panels first .. last - 1 of the factor, FLOATS at a time. What is beyond the factor is 0.
template <int FLOATS>
__device__ __forceinline__ void stage(const Problem& p, float* factor, int first, int last) {
    constexpr int EACH = PANEL / FLOATS, STEP = THREADS / EACH;  // threads to a row, rows at a time
    const uint32_t i = threadIdx.x / EACH, column = threadIdx.x % EACH * FLOATS;
    const int64_t step = STEP * p.upper_stride;
    const float* from = p.upper + (i * p.upper_stride + first * PANEL + column);
    uint32_t to = near(factor + panel_start(first) + i * PANEL + column);
    ROLLED for (int panel = first; panel < last; panel++, from += PANEL) {
        const int left = min(int(p.columns) - int(panel * PANEL + column), FLOATS);
        const float* at = from;
#pragma unroll 4
        for (uint32_t k = 0; k < MOST / STEP; k++, at += step) {
            const uint32_t row = i + k * STEP, bytes = row < p.columns && left > 0 ? 4 * left : 0;
            asm volatile("{ .reg .pred p; setp.lt.u32 p, %0, %1; @p cp.async.ca.shared.global [%2], [%3], %4, %5; }" ::"r"(row),
                         "r"(PANEL * (panel + 1)), "r"(to + 4 * k * STEP * PANEL), "l"(bytes ? at : p.upper), "n"(4 * FLOATS), "r"(bytes)
                         : "memory");
        }
        to += 4 * PANEL * PANEL * (panel + 1);
    }
}

// A copy that the compiler has to keep: else it makes addresses anew again and again, from registers that take long to read.
__device__ __forceinline__ uint32_t settled(uint32_t x) {
    uint32_t made;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(made) : "r"(x), "r"(threadIdx.x));
    return made;
}
static_assert(THREADS == MOST, "a pivot for each thread");
struct Memory {
    alignas(16) float factor[FACTOR];
    Pivot pivots[MOST];
};

template <int L, bool PLAIN>
__global__ void __launch_bounds__(THREADS, 2) solve(const __grid_constant__ Problem p) {
    constexpr int ROWS = THREADS / L;
    extern __shared__ __align__(16) char bytes[];
    Memory& memory = *reinterpret_cast<Memory*>(bytes);
    float* errors = reinterpret_cast<float*>(bytes + sizeof(Memory));  // [ROWS, STRIDE]

    const int panels = (p.columns + PANEL - 1) / PANEL;
    const bool wide = p.upper_stride % 4 == 0 && reinterpret_cast<uintptr_t>(p.upper) % 16 == 0;
    const auto staged = [&](int first, int last) {
        wide ? stage<4>(p, memory.factor, first, last) : stage<1>(p, memory.factor, first, last);
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

    Warp<L, PLAIN> warp;
    const int lane = threadIdx.x % 32, part = lane / (32 / L), local = threadIdx.x / 32 * (32 / L) + lane % (32 / L);
    const uint32_t row = settled(blockIdx.x * ROWS + local);
    if (p.words) {
        warp.lane.find(p, row, part);
        __syncwarp();  // all lanes read what one of them found
    }
    // What comes from farthest first.
    warp.lane.begin(p, row, settled(part), settled(near(errors + local * STRIDE)));
    const uint32_t j = threadIdx.x;
    const float diagonal = j < p.columns ? p.upper[j * (p.upper_stride + 1)] : 1.0f;
    staged(0, min(panels, 2));
    staged(2, panels);
    memory.pivots[j] = j < p.columns ? pivot(diagonal) : Pivot{1.0f, 0.0f};

    if (blockIdx.x * ROWS + threadIdx.x / 32 * (32 / L) >= p.rows) {
        // All of the warp's rows are beyond the last, which another warp solves, perhaps twice.
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
        return;
    }
    const Shared shared{settled(near(memory.factor)), settled(near(&memory.pivots[0].diagonal))};
    // What the lanes of a row store of its errors is the same: each reads its own.
    sweep(warp, p, shared, [](int panel) {
        if (panel)
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        else
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();
    });
}

template <int L, bool PLAIN>
cudaError_t launch(const Problem& p, cudaStream_t stream) {
    constexpr int ROWS = THREADS / L, SHARED = sizeof(Memory) + STRIDE * ROWS * sizeof(float);
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
        for (lanes = 4; lanes > 1 && rows * lanes > int64_t(THREADS) * processors;) lanes /= 2;
    }
    return launch(p, plain != 0, lanes, stream);
}
