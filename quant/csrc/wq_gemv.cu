// A few rows of x [M, K] times a weight [N, K] of 2, 3, 4 or 8 bits, transposed: out [M, N]; and the weight itself.
// The twin of quant/kernels/wq_gemv/reference.py; what a warp does: wq_fragments.h.
//
// One launch a call: every block reads x, and rounds its own part of out. A block has 16 R rows of the weight, R such that all blocks are
// on the GPU at once, two on a multiprocessor: with about 40 kB each on their way, memory is kept busy. More than 8 rows of x are
// multiplied by blocks of twice as many warps, in teams, one on a multiprocessor. One row, where groups are whole steps, is for some sizes
// multiplied by blocks of which three are on a multiprocessor (wq_single.h), or by one on each (wq_balanced.h).

#include <cuda_runtime.h>

#include "wq_floats.h"
#include "wq_lane.h"
#include "wq_single.h"
#include "wq_start.h"
#include "wq_weight.h"
#include "wq_whole.h"

namespace {

using namespace fragments;

// What a warp does, and then all warps of the block have done. What does not depend on a kernel before comes before that is waited for.
template <class Work>
__device__ __forceinline__ void multiply(Work& work, Lane& p) {
    work.open(p);
    release_next();
    await_previous();
    work.begin(p);
    work.over(p);
    work.close(p);
    __syncthreads();
}

template <int BITS, int R, int FLUSHES, int PARTS, int C>
__global__ void __launch_bounds__(C * WARPS * LANES, 2 / C) product(const __grid_constant__ Call call) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x / LANES), 0), first = blockIdx.y * call.together, tile = blockIdx.x * (C * R);
    Lane p;
    Warp<Lane, BITS, R, FLUSHES, PARTS, C> work(call, memory, warp, tile, first);
    multiply(work, p);
    finish<Lane, R, PARTS, C>(p, call, warp, tile, first, memory);
}

template <bool HALF>
__global__ void __launch_bounds__(WARPS * LANES, BLOCKS_ALONE) single(const __grid_constant__ Call call) {
    extern __shared__ __align__(128) uint8_t memory[];
    Lane p;
    Single<Lane, HALF> work(call, memory, __shfl_sync(0xffffffffu, int(threadIdx.x / LANES), 0), blockIdx.x);
    multiply(work, p);
    work.finish(p);
}

// The next product's blocks fetch codes beside this one's. Of 2 and 3 bits they may at once; of 4 bits, of which more are on their way,
// when the product before is over, so that x does not wait for them.
template <int BITS>
constexpr bool AT_ONCE = BITS < 4;

template <class Work>
__global__ void __launch_bounds__(TEAMS * WARPS * LANES, 2) balanced(const __grid_constant__ Call call) {
    extern __shared__ __align__(128) uint8_t memory[];
    Lane p;
    Work work(call, memory, __shfl_sync(0xffffffffu, int(threadIdx.x / LANES), 0), blockIdx.x, gridDim.x);
    work.open(p);
    if (AT_ONCE<Work::BITS>) release_next();
    await_previous();
    if (!AT_ONCE<Work::BITS>) release_next();
    work.begin(p);
    __syncthreads();
    work.over(p);
    __syncthreads();
    work.finish(p, blockIdx.x);
}

// A block has the steps of a tile that follow one another, so that what all blocks write at a time lies together. TURNS: steps of a warp,
// all of whose codes are on their way before the first is used.
constexpr int TURNS = 1;

template <int BITS, int KIND>
__global__ void __launch_bounds__(WARPS * LANES) weight(const __grid_constant__ Call call) {
    Lane p;
    Step<BITS> steps[TURNS];
    const int first = blockIdx.x * (TURNS * WARPS) + __shfl_sync(0xffffffffu, int(threadIdx.x / LANES), 0);
    UNROLLED for (int u = 0; u < TURNS; u++)
        if (first + u * WARPS < call.steps) read_step<Lane, BITS>(p, call, steps[u], blockIdx.y, first + u * WARPS);
    UNROLLED for (int u = 0; u < TURNS; u++)
        if (first + u * WARPS < call.steps) write_step<Lane, BITS, KIND>(p, call, steps[u], blockIdx.y, first + u * WARPS);
}

// One row of x by blocks of a tile each. `done`: false where it is not to be multiplied so.
template <bool HALF>
cudaError_t single_launched(const Call& call, const Device& device, bool early, cudaStream_t stream, bool& done) {
    using A = Arranged<HALF>;
    constexpr int BYTES = WARPS * A::APART;
    // And no block more, for which there may be registers.
    const int most = device.shared_each / BLOCKS_ALONE - 1024, least = device.shared_each / (BLOCKS_ALONE + 1);
    done = BYTES <= most && A::holds(call) && call.tiles <= 2 * device.multiprocessors;
    if (!done) return cudaSuccess;
    return start<single<HALF>>(call, device, dim3(call.tiles), WARPS, BYTES > least ? BYTES : least, early, stream);
}

// One row by a block on each multiprocessor, with half of its memory or, WHOLE, all. `done`: false where there is no room for it, or a tile
// would be left.
template <class Work, bool WHOLE = false>
cudaError_t balanced_launched(Call call, const Device& device, bool early, cudaStream_t stream, bool& done) {
    const int blocks = call.tiles < device.multiprocessors ? call.tiles : device.multiprocessors;
    const int bytes = Work::bytes(call, blocks), least = device.shared_each / 3;
    if (!(done = call.tiles % Work::R == 0 && counted(call) && bytes <= (WHOLE ? device.shared_block : device.most()))) return cudaSuccess;
    // And no third block, for which there may be room.
    return start<balanced<Work>>(call, device, dim3(blocks), TEAMS * WARPS, bytes > least ? bytes : least, early, stream);
}

// Whether a block on each multiprocessor is measured to be faster than two of other forms: with 4 bits where each team has one tile, or one
// of three, as the others' blocks would then have four; with 3 with up to two; with 2 always.
inline bool is_balanced(const Call& call, int bits, const Device& device) {
    const int each = (call.tiles + TEAMS * device.multiprocessors - 1) / (TEAMS * device.multiprocessors);
    return bits == 2 || (bits == 4 ? each == 1 || each == 3 : each <= 2);
}

// One row, where groups are whole steps. `done`: false where blocks of more rows are faster.
template <int BITS, bool HALF>
cudaError_t alone_launched(const Call& call, const Device& device, bool early, cudaStream_t stream, bool& done) {
    cudaError_t said = cudaSuccess;
    if constexpr (BITS == 4) said = single_launched<HALF>(call, device, early, stream, done);
    if (done || !is_balanced(call, BITS, device)) return said;
    if constexpr (BITS != 2) {
        return balanced_launched<Floats<Lane, BITS, HALF>>(call, device, early, stream, done);
    } else {
        said = balanced_launched<Whole<Lane, HALF, 2, SHORT>>(call, device, early, stream, done);
        if (!done) said = balanced_launched<Whole<Lane, HALF, 2, MIDDLE>>(call, device, early, stream, done);
        if (!done) said = balanced_launched<Whole<Lane, HALF, 2, LONG>, true>(call, device, early, stream, done);
        if (!done) said = balanced_launched<Whole<Lane, HALF, 1, SHORT>>(call, device, early, stream, done);
        return said;
    }
}

template <int BITS, int R, int FLUSHES, int PARTS, int C>
cudaError_t launch(Call call, const Device& device, bool early, cudaStream_t stream) {
    int bytes = arranged(call, BITS, R, FLUSHES, device.most(C), C);
    // And no third, for which there would be room where x is short: blocks of the next product, which begin early, would take it on some
    // multiprocessors, and these would have more to do than others.
    if (C == 1 && R > 1 && bytes < device.shared_each / 3) bytes = device.shared_each / 3;
    const dim3 blocks((call.tiles + C * R - 1) / (C * R), (call.count + call.together - 1) / call.together);
    return start<product<BITS, R, FLUSHES, PARTS, C>>(call, device, blocks, C * WARPS, bytes, early, stream);
}

// Blocks of teams: of two tiles or, where so many are not on the GPU at once, of four. With three columns a row always of two.
template <int BITS, int PARTS>
cudaError_t by_teams(const Call& call, const Device& device, bool early, cudaStream_t stream) {
    const int flushes = flushes_of(call);
    Call twice = call;
    const bool two = PARTS == 1 && (call.tiles + 1) / 2 > device.multiprocessors &&
                     arranged(twice, BITS, 2, flushes, device.most(2), 2) <= device.most(2);
    if constexpr (PARTS == 1) {
        if (two && flushes == 1) return launch<BITS, 2, 1, PARTS, 2>(call, device, early, stream);
        if (two && flushes == 2) return launch<BITS, 2, 2, PARTS, 2>(call, device, early, stream);
        if (two) return launch<BITS, 2, 4, PARTS, 2>(call, device, early, stream);
    }
    if (flushes == 1) return launch<BITS, 1, 1, PARTS, 2>(call, device, early, stream);
    if (flushes == 2) return launch<BITS, 1, 2, PARTS, 2>(call, device, early, stream);
    return launch<BITS, 1, 4, PARTS, 2>(call, device, early, stream);
}

template <int BITS, int PARTS>
cudaError_t multiplied(const Call& call, bool early, cudaStream_t stream) {
    Device device;
    const cudaError_t e = found(device);
    if (e != cudaSuccess) return e;
    const int parts = (call.count + call.together - 1) / call.together, flushes = flushes_of(call);
    if constexpr (PARTS == 1 && BITS != 8)
        if (is_alone(call)) {
            bool done = false;
            const cudaError_t said = call.half_ranges ? alone_launched<BITS, true>(call, device, early, stream, done)
                                                      : alone_launched<BITS, false>(call, device, early, stream, done);
            if (done) return said;
        }
    // Few tiles are read for some rows of x after others, by blocks that are all there at once.
    if (call.count > MOST && call.tiles * parts > 2 * device.multiprocessors) {
        Call wide = fragments::by_teams(call, 2);
        if (arranged(wide, BITS, 1, flushes, device.most(2), 2) <= device.most(2))
            return by_teams<BITS, PARTS>(wide, device, early, stream);
    }
    // As many tiles as let all blocks be there at once, where two such blocks fit a multiprocessor.
    int tiles = 1;
    while (tiles < (flushes == 1 && BITS != 8 ? 4 : 2) && (call.tiles + tiles - 1) / tiles * parts > 2 * device.multiprocessors) {
        Call twice = call;
        if (arranged(twice, BITS, 2 * tiles, flushes, device.most()) > device.most()) break;
        tiles *= 2;
    }
    switch (tiles * 10 + flushes) {
        case 11: return launch<BITS, 1, 1, PARTS, 1>(call, device, early, stream);
        case 12: return launch<BITS, 1, 2, PARTS, 1>(call, device, early, stream);
        case 14: return launch<BITS, 1, 4, PARTS, 1>(call, device, early, stream);
        case 21: return launch<BITS, 2, 1, PARTS, 1>(call, device, early, stream);
        case 22: return launch<BITS, 2, 2, PARTS, 1>(call, device, early, stream);
        case 24: return launch<BITS, 2, 4, PARTS, 1>(call, device, early, stream);
        default:
            if constexpr (BITS != 8) return launch<BITS, 4, 1, PARTS, 1>(call, device, early, stream);
            return cudaErrorInvalidValue;
    }
}

template <int BITS>
cudaError_t multiplied(const Call& call, bool early, cudaStream_t stream) {
    return call.parts == 1 ? multiplied<BITS, 1>(call, early, stream) : multiplied<BITS, 3>(call, early, stream);
}

template <int BITS>
cudaError_t written(const Call& call, int kind, cudaStream_t stream) {
    const dim3 grid((call.steps + TURNS * WARPS - 1) / (TURNS * WARPS), call.tiles);
    const auto kernel = kind == 0 ? weight<BITS, 0> : kind == 1 ? weight<BITS, 1> : weight<BITS, 2>;
    return launch_as(Start(grid, WARPS * LANES, 0, stream), kernel, call);
}

}  // namespace

// words, ranges: as fragments.py lays them out; half_ranges: 1 where ranges are float16 scale and zero, 0 where float32 scale and offset.
// x [count, columns] and out [count, rows]: bfloat16 where half_x is 1, else float32; all but out at addresses that are multiples of 16.
// input_scale: float32 [columns], or 0. early: 1 where this kernel may begin, and fetch codes, while the one before it still runs (needs
// compute capability 9.0): what kernels that still run write, that one and those that it began beside, must be neither words nor ranges.
extern "C" int bitgrid_wq_gemv(int64_t words, int64_t ranges, int64_t x, int64_t input_scale, int64_t out, int64_t rows, int64_t columns,
                               int64_t groups, int64_t bits, int64_t count, int64_t half_ranges, int64_t half_x, int64_t early,
                               int64_t stream) {
    const Call call = described(words, ranges, x, input_scale, out, rows, columns, groups, count, half_ranges, half_x);
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    switch (bits) {
        case 2: return multiplied<2>(call, early != 0, on);
        case 3: return multiplied<3>(call, early != 0, on);
        case 4: return multiplied<4>(call, early != 0, on);
        default: return multiplied<8>(call, early != 0, on);
    }
}

// kind of out: 0 float32, 1 bfloat16, 2 float16; its address is a multiple of 16.
extern "C" int bitgrid_wq_values(int64_t words, int64_t ranges, int64_t out, int64_t rows, int64_t columns, int64_t groups, int64_t bits,
                                 int64_t half_ranges, int64_t kind, int64_t stream) {
    const Call call = described(words, ranges, 0, 0, out, rows, columns, groups, 1, half_ranges, 0);
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    switch (bits) {
        case 2: return written<2>(call, int(kind), on);
        case 3: return written<3>(call, int(kind), on);
        case 4: return written<4>(call, int(kind), on);
        default: return written<8>(call, int(kind), on);
    }
}
