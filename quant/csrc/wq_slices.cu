// 9 to 16 rows of x [M, K] of bfloat16 times a weight [N, K] of 4 bits, transposed: out [M, N]; the bits are those of wq_gemv.cu. What a
// warp does: wq_slices.h. One launch a call, of one block a multiprocessor.

#include <cuda_runtime.h>

#include "wq_lane.h"
#include "wq_slices.h"
#include "wq_start.h"

namespace {

using namespace fragments;

struct SideLane : Lane {
    // How many have been counted before, once what the warp has stored is there for all; what these have stored is there then.
    static __device__ __forceinline__ int counted(int* counter) {
        int before = 0;
        __syncwarp();
        if (threadIdx.x % LANES == 0) asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
        before = __shfl_sync(0xffffffffu, before, 0);
        __syncwarp();
        return before;
    }
    static __device__ __forceinline__ void cleared(int* counter) {
        if (threadIdx.x % LANES == 0) *counter = 0;
    }
};

template <int R, int DEPTH>
__global__ void __launch_bounds__(SIDE * LANES, 1) product(const __grid_constant__ Slices all) {
    extern __shared__ __align__(128) uint8_t memory[];
    SideLane p;
    SideWarp<SideLane, R, DEPTH> work(all, memory, __shfl_sync(0xffffffffu, int(threadIdx.x / LANES), 0), blockIdx.x);
    work.open(p);
    release_next();
    await_previous();
    work.bring(p);
    __syncthreads();
    work.sums_of_x(p);
    __syncthreads();
    work.over(p);
}

template <int R, int DEPTH>
cudaError_t launch(Slices& all, int blocks, bool early, cudaStream_t stream) {
    Device device;
    const cudaError_t e = found(device);
    if (e != cudaSuccess) return e;
    const int64_t bytes = sliced(all, R, blocks, DEPTH);
    if (bytes > device.shared_block) {
        if constexpr (DEPTH != least_side(R)) return launch<R, least_side(R)>(all, blocks, early, stream);
        return cudaErrorInvalidValue;
    }
    return start<product<R, DEPTH>>(all, device, dim3(WARPS * blocks), SIDE, bytes, early, stream);
}

}  // namespace

// As `bitgrid_wq_gemv` of wq_gemv.cu without an input scale. sums: float32 [tiles of 16 rows, 8, 256], of any contents; arrived: int32
// [tiles], zeros, which it leaves as zeros. at_once: tiles of a warp, 1 or 2; blocks: that share the rows, 8 times as many in all.
extern "C" int bitgrid_wq_slices(int64_t words, int64_t ranges, int64_t x, int64_t out, int64_t sums, int64_t arrived, int64_t rows,
                                 int64_t columns, int64_t groups, int64_t bits, int64_t count, int64_t half_ranges, int64_t at_once,
                                 int64_t blocks, int64_t early, int64_t stream) {
    Slices all = {};
    all.call = described(words, ranges, x, 0, out, rows, columns, groups, count, half_ranges, 1);
    all.sums = reinterpret_cast<float*>(sums), all.arrived = reinterpret_cast<int*>(arrived);
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    if (!is_sliced(all.call) || bits != SIDE_BITS) return cudaErrorInvalidValue;
    return at_once == 1 ? launch<1, deep_side(1)>(all, int(blocks), early != 0, on)
                        : launch<2, deep_side(2)>(all, int(blocks), early != 0, on);
}
