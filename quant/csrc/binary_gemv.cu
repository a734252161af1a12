// A few rows of x [M, K] times a weight [N, K] of signs, transposed: out [M, N], in one launch. Phases and layouts: binary_gemv_cuda.h.
//
// What bounds it. With one or two rows of x in bfloat16, 16 rows of 512 columns take 331 instructions of a warp, of which half of a
// scheduler's turns can issue 193 (128 permutations, 34 masks, 16 shifts), and 32 matrix products of 16 x 8 x 32 bytes. 8192 x 16384
// weights on 120 multiprocessors, 15 clusters of 8: 36 times that each scheduler, 13 900 turns, 7.0 us at 1.98 GHz; what else is issued
// takes a part of the other half of them. Of the weight are read, with blocks of 128, 50 MB: 11.6 us at 4.35 TB/s, of which 98 KB a
// multiprocessor are on their way while digits of x are made, asked for after x. Measured on an H200: 17.9 us, products alone 17.4, so that
// something besides these turns holds them up.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "binary_gemv_cuda.h"
#include "clusters.h"

namespace {

extern __shared__ __align__(1024) char memory[];

template <class X, int G, bool RING>
__global__ void __launch_bounds__(threads(G, PLANES_FOR<X>), 1) product(const __grid_constant__ Signs a) {
    release_next();
    Place at = {blockIdx.x, int64_t(blockIdx.y) * 2 * G, 0, 1};
#if __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    uint32_t number;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
    at.rank = int(cluster.block_rank()), at.ranks = int(cluster.num_blocks()), at.cluster = number;
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");  // nothing was written that others are to see
#endif
    add_units<X, G, RING>(a, at, memory, await_previous, [&](const auto& phase) {
        phase(int(threadIdx.x));
        __syncthreads();
    });
#if __CUDA_ARCH__ >= 900
    cluster.barrier_wait();  // all of its blocks have begun, and so have shared memory
    const auto shared_of = [&](int rank) { return static_cast<void*>(cluster.map_shared_rank(&memory[0], rank)); };
    give<G, PLANES_FOR<X>>(a, at, memory, shared_of, int(threadIdx.x));
    cluster.sync();
#else
    give<G, PLANES_FOR<X>>(a, at, memory, [&](int) { return static_cast<void*>(memory); }, int(threadIdx.x));
    __syncthreads();
#endif
    finish<G, PLANES_FOR<X>>(a, at, memory, int(threadIdx.x));
}

// A weight, of all four digits.
BOTH float value_at(const Signs& a, int64_t row, int64_t column) {
    const int64_t tile = row / TILE, line = row % TILE, unit = column / UNIT;
    const uint32_t word = a.words[(tile * a.units + unit) * 64 + line * 8 + column % 8];
    const int code = int(word >> column % UNIT / 8 * 2 & 3u), kind = kind_of(a.kinds + unit * 16, int(column % UNIT)) / 4;
    const uint32_t* high = a.tables + ((tile * a.blocks + column / a.block) * TILE + line) * 4;
    const uint32_t* low = high + a.tiles * a.blocks * TILE * 4;
    const auto digit = [&](uint32_t of) { return of >> 8 * code & 255u; };
    const uint32_t made = digit(high[2 * kind]) << 24 | digit(high[2 * kind + 1]) << 16 | digit(low[kind]) << 8 | digit(low[2 + kind]);
    return float(int32_t(made - OFFSET)) * ONE_OF_MOST * at_least(a.largest[row]);
}

// For blocks that cut a unit, and shares that no shared memory holds: a warp for each result.
__global__ void product_of_rows(const __grid_constant__ Signs a) {
    const int64_t row = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32, m = blockIdx.y;
    if (row >= a.rows) return;
    float sum = 0.0f;
    for (int64_t c = threadIdx.x % 32; c < a.given.k; c += 32) sum += value_at(a, row, c) * read_x(a.given, m, c);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) write(a.out, m * a.rows + row, sum, a.given.bfloat16);
}

template <class X, int G, bool RING>
cudaError_t launch(const Signs& a, const Device& device, cudaStream_t stream) {
    const int64_t wide = ((a.tiles + 1) / 2 + a.group - 1) / a.group;
    const int64_t shared = shared_bytes(G, a, device.ranks());
    const int64_t high = (a.given.count + 2 * G - 1) / (2 * G);
    return launch_clusters(product<X, G, RING>, a, device, wide, high, threads(G, PLANES_FOR<X>), shared, stream);
}

template <class X, int G>
cudaError_t launch(const Signs& a, const Device& device, cudaStream_t stream) {
    if constexpr (has_ring(G)) {
        if (a.ring > 0) return launch<X, G, true>(a, device, stream);
    }
    return launch<X, G, false>(a, device, stream);
}

template <class X>
cudaError_t launch_of(const Signs& a, int g, const Device& device, cudaStream_t stream) {
    return g == 1 ? launch<X, 1>(a, device, stream) : g == 2 ? launch<X, 2>(a, device, stream) : launch<X, 4>(a, device, stream);
}

template <class T>
__global__ void weight(const __grid_constant__ Signs a, T* out) {
    const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t row = int64_t(blockIdx.y) * TILE; row < least(a.rows, (int64_t(blockIdx.y) + 1) * TILE) && column < a.given.k; row++) {
        if constexpr (sizeof(T) == 2) {
            out[row * a.given.k + column] = to_bfloat16(value_at(a, row, column));
        } else {
            out[row * a.given.k + column] = value_at(a, row, column);
        }
    }
}

Signs made_of(int64_t words, int64_t tables, int64_t kinds, int64_t largest, int64_t x, int64_t scale, int64_t out, int64_t rows,
              int64_t k, int64_t block, int64_t count, int64_t bfloat16) {
    return signs_of(reinterpret_cast<const uint32_t*>(words), reinterpret_cast<const uint32_t*>(tables),
                    reinterpret_cast<const uint32_t*>(kinds), reinterpret_cast<const float*>(largest), reinterpret_cast<const void*>(x),
                    reinterpret_cast<const float*>(scale), reinterpret_cast<void*>(out), rows, k, block, count, bfloat16 != 0);
}

}  // namespace

// Addresses of a `Packed` of quant/kernels/binary_gemv/digits.py, x and out. The input scale may be 0.
extern "C" int bitgrid_binary_gemv(int64_t words, int64_t tables, int64_t kinds, int64_t largest, int64_t x, int64_t scale, int64_t out,
                                   int64_t rows, int64_t k, int64_t block, int64_t count, int64_t bfloat16, int64_t stream) {
    Signs a = made_of(words, tables, kinds, largest, x, scale, out, rows, k, block, count, bfloat16);
    Device device;
    int clusters = 0;
    // The clusters are those of any number of rows of x.
    const cudaError_t failed = find(device, clusters, product<uint16_t, 1, true>, threads(1, 2));
    if (failed != cudaSuccess) return failed;
    plan(a, clusters, device.ranks());
    const int g = block % UNIT == 0 ? rows_at_a_time(a, device.ranks(), device.shared) : 0;
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    if (g > 0) return bfloat16 != 0 ? launch_of<uint16_t>(a, g, device, on) : launch_of<float>(a, g, device, on);
    return launch_as(Start(dim3(unsigned((rows + 7) / 8), unsigned(count)), 256, 0, on), product_of_rows, a);
}

// To `found`, on the host: the clusters that run at once. The first number and the stream are not looked at.
extern "C" int bitgrid_binary_clusters(int64_t, int64_t found, int64_t) {
    return tell_clusters(found, product<uint16_t, 1, true>, threads(1, 2));
}

// The weight [N, K], float32 or bfloat16.
extern "C" int bitgrid_binary_values(int64_t words, int64_t tables, int64_t kinds, int64_t largest, int64_t out, int64_t rows, int64_t k,
                                     int64_t block, int64_t bfloat16, int64_t stream) {
    const Signs a = made_of(words, tables, kinds, largest, 0, 0, out, rows, k, block, 1, bfloat16);
    const dim3 grid(unsigned((k + 127) / 128), unsigned(a.tiles));
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    const Start start(grid, 128, 0, on);
    return bfloat16 != 0 ? launch_as(start, weight<uint16_t>, a, reinterpret_cast<uint16_t*>(out))
                         : launch_as(start, weight<float>, a, reinterpret_cast<float*>(out));
}
