// gptq_block on a GPU: the loop of gptq_lanes.h, THREADS / L rows to a block of threads, the factor's panels in shared memory.
//
// Plain C ABI. Columns one after another: block, codes, values, errors are [B, N], contiguous; upper is [B, B], scale and zero are [G, N],
// with strides between rows; group [B] lies on the host and goes with the launch. plain: whole zeros and one group for each 32 columns.
// loss [N] (or null) is added to; tops [N] is the largest code of each row (null: top in all). words [N] (or null) says of each row how its
// ranges are found (`ranges::Fit`): scale and zero are written to then, and odd [1] is added to. Nothing is allocated, copied from the host or
// waited for.

#include "gptq_lanes.h"

namespace {

using namespace gptq;

constexpr int THREADS = 128;  // shared memory has room for two such blocks on a multiprocessor, registers for three

template <int L, bool PLAIN>
struct Warp {
    using One = Lane<L, PLAIN, THREADS / L>;
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

template <int BYTES>
__device__ __forceinline__ void copy_async(float* to, const float* from, int bytes) {
    // What is beyond `bytes` is filled with 0.
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
}

// Panels first .. last - 1 of the factor, FLOATS at a time.
template <int FLOATS>
__device__ __forceinline__ void stage(const Problem& p, float* factor, int first, int last) {
    ROLLED for (int panel = first; panel < last; panel++) {
        float* to = factor + panel_start(panel);
        BY_FOUR for (int at = threadIdx.x * FLOATS; at < PANEL * PANEL * (panel + 1); at += THREADS * FLOATS) {
            const uint32_t i = at / PANEL, column = panel * PANEL + at % PANEL;
            const int left = i < p.columns ? int(p.columns) - int(column) : 0;
            const int bytes = 4 * max(0, min(left, FLOATS));
            copy_async<4 * FLOATS>(to + at, bytes ? p.upper + i * p.upper_stride + column : p.upper, bytes);
        }
    }
}

struct Memory {
    alignas(16) float factor[FACTOR];
    Pivot pivots[MOST];
};

template <int L, bool PLAIN>
__global__ void __launch_bounds__(THREADS, 3) solve(const __grid_constant__ Problem p) {
    constexpr int ROWS = THREADS / L;
    extern __shared__ __align__(16) char bytes[];
    Memory& memory = *reinterpret_cast<Memory*>(bytes);
    float* errors = reinterpret_cast<float*>(bytes + sizeof(Memory));  // [KEPT, ROWS]

    const int panels = (p.columns + PANEL - 1) / PANEL;
    const bool wide = p.upper_stride % 4 == 0 && reinterpret_cast<uintptr_t>(p.upper) % 16 == 0;
    wide ? stage<4>(p, memory.factor, 0, 1) : stage<1>(p, memory.factor, 0, 1);
    asm volatile("cp.async.commit_group;" ::: "memory");
    wide ? stage<4>(p, memory.factor, 1, panels) : stage<1>(p, memory.factor, 1, panels);
    asm volatile("cp.async.commit_group;" ::: "memory");

    Warp<L, PLAIN> warp;
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * (32 / L) + lane % (32 / L);
    if (p.words) {
        warp.lane.find(p, blockIdx.x * ROWS + row, lane / (32 / L));
        __syncwarp();  // all lanes read what one of them found
    }
    warp.lane.begin(p, blockIdx.x * ROWS + row, lane / (32 / L), errors + row);
    for (uint32_t j = threadIdx.x; j < MOST; j += THREADS)
        memory.pivots[j] = j < p.columns ? pivot(p.upper[j * (p.upper_stride + 1)]) : Pivot{1.0f, 0.0f};

    const Shared shared{memory.factor, memory.pivots};
    sweep(warp, p, shared, [](int panel) {
        if (panel == 0) {
            asm volatile("cp.async.wait_group 1;" ::: "memory");
            __syncthreads();
        } else if (panel == 1) {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
            __syncthreads();
        } else if (L > 1) {
            __syncwarp();  // a row's errors are stored by its first lane
        }
    });
}

template <int L, bool PLAIN>
cudaError_t launch(const Problem& p, cudaStream_t stream) {
    constexpr int ROWS = THREADS / L, SHARED = sizeof(Memory) + KEPT * ROWS * sizeof(float);
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
              odd,   upper_stride, scale_stride, zero_stride, uint32_t(columns), uint32_t(rows), float(top), int(kind), {}};
    for (int64_t j = 0; j < columns; j++) p.group[j] = group[j];
    if (!lanes) {
        int device = 0, processors = 0;
        cudaError_t failed = cudaGetDevice(&device);
        if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        if (failed != cudaSuccess) return failed;
        for (lanes = 4; lanes > 1 && rows * lanes > int64_t(THREADS) * processors;) lanes /= 2;
    }
    return launch(p, plain != 0, lanes, stream);
}
