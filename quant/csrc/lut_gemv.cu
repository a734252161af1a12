// A few rows of x [M, K] times a weight [N, K] with a table of values for each column, transposed: out [M, N], in one launch.
// Phases and layouts: lut_gemv_cuda.h.
//
// What bounds it. A warp's lookup takes a turn of shared memory for each row of x, two with codes of 3 bits, and stands for 64 weights of
// 2 bits or 32 of 4; loading a word takes another turn. 8192 x 16384 weights on 120 multiprocessors, 15 clusters of 8: 20 700 turns with
// 2 bits, 41 500 with 4; 10.5 and 20.9 us at 1.98 GHz if no turn is lost. Beside a turn stand 4.1 instructions with one row of x, of the 4
// that could be issued, 2.6 with two and 2.1 with four.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "clusters.h"
#include "lut_gemv_cuda.h"

namespace {

extern __shared__ __align__(1024) char memory[];

template <int M>
__global__ void __launch_bounds__(threads(M), 1) product(const __grid_constant__ Lut a) {
    release_next();
    Place at = {blockIdx.x, int64_t(blockIdx.y) * M, 0, 1};
#if __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    at.rank = int(cluster.block_rank()), at.ranks = int(cluster.num_blocks()), at.cluster = blockIdx.x / at.ranks;
#endif
    add_parts<M>(a, at, memory, await_previous, [&](const auto& phase) {
        phase(int(threadIdx.x));
        __syncthreads();
    });
#if __CUDA_ARCH__ >= 900
    cluster.sync();
    finish<M>(a, at, memory, [&](int rank) { return static_cast<void*>(cluster.map_shared_rank(&memory[0], rank)); }, int(threadIdx.x));
    cluster.sync();  // no block leaves while another reads its sums
#else
    finish<M>(a, at, memory, [&](int) { return static_cast<void*>(memory); }, int(threadIdx.x));
#endif
}

template <int M>
cudaError_t launch(Lut a, const Device& device, cudaStream_t stream) {
    const int64_t sums = int64_t(4) * M * SLICES * a.group * ROWS;
    a.tables = (device.shared - sums) / 1024 * 1024;
    const int64_t wide = (a.tiles + a.group - 1) / a.group;
    return launch_clusters(product<M>, a, device, wide, (a.given.count + M - 1) / M, threads(M), a.tables + sums, stream);
}

template <class T>
__global__ void weight(const Part part, T* out, int64_t rows, int64_t k) {
    const int64_t row = int64_t(blockIdx.x) * ROWS + threadIdx.x % ROWS, at = int64_t(blockIdx.y) * (blockDim.x / ROWS) + threadIdx.x / ROWS;
    if (row >= rows || at >= part.length) return;
    const int codes = 32 / part.bits, mask = (1 << part.bits) - 1;
    uint32_t word = part.words[(blockIdx.x * part.length + at) * ROWS + threadIdx.x % ROWS];
    for (int64_t c = at * codes; c < least(part.count, (at + 1) * codes); c++, word >>= part.bits) {
        const float value = part.values[(c << part.bits) + (word & mask)];
        if constexpr (sizeof(T) == 2) {
            out[row * k + part.columns[c]] = to_bfloat16(value);
        } else {
            out[row * k + part.columns[c]] = value;
        }
    }
}

}  // namespace

// parts: addresses of words, values and columns, columns, bits; zeros for those there are not. starts, kept, differences: zeros or those of
// `Apart`. The input scale may be 0.
extern "C" int bitgrid_lut_gemv(
    int64_t words0, int64_t values0, int64_t columns0, int64_t count0, int64_t bits0, int64_t words1, int64_t values1, int64_t columns1,
    int64_t count1, int64_t bits1, int64_t words2, int64_t values2, int64_t columns2, int64_t count2, int64_t bits2, int64_t words3,
    int64_t values3, int64_t columns3, int64_t count3, int64_t bits3, int64_t starts, int64_t kept, int64_t differences, int64_t x,
    int64_t scale, int64_t out, int64_t parts, int64_t rows, int64_t k, int64_t rows_of_x, int64_t bfloat16, int64_t stream) {
    const int64_t five[] = {words0,   values0, columns0, count0, bits0, words1,   values1, columns1, count1, bits1,
                            words2,   values2, columns2, count2, bits2, words3,   values3, columns3, count3, bits3};
    const int64_t three[] = {starts, kept, differences};
    Lut a = lut_of(five, parts, three, reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(scale),
                   reinterpret_cast<void*>(out), rows, k, rows_of_x, bfloat16 != 0);
    Device device;
    int clusters = 0;
    // The clusters are those of any number of rows of x.
    const cudaError_t failed = find(device, clusters, product<1>, threads(1));
    if (failed != cudaSuccess) return failed;
    a.group = group_of(a.tiles, clusters);
    const int m = rows_at_a_time(rows_of_x, a.group, device.shared);
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    if (m == 1) return launch<1>(a, device, on);
    if (m == 2) return launch<2>(a, device, on);
    return launch<4>(a, device, on);
}

// To `found`, on the host: the clusters that run at once. The first number and the stream are not looked at.
extern "C" int bitgrid_lut_clusters(int64_t, int64_t found, int64_t) {
    return tell_clusters(found, product<1>, threads(1));
}

// The columns of the weight [N, K], float32 or bfloat16, that a part's words stand for.
extern "C" int bitgrid_lut_values(int64_t words, int64_t values, int64_t columns, int64_t out, int64_t count, int64_t bits, int64_t rows,
                                  int64_t k, int64_t bfloat16, int64_t stream) {
    const int64_t five[] = {words, values, columns, count, bits};
    const Part part = part_of(five);
    const int threads = 256;
    const dim3 grid(unsigned((rows + ROWS - 1) / ROWS), unsigned((part.length + threads / ROWS - 1) / (threads / ROWS)));
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    if (bfloat16 != 0) {
        weight<<<grid, threads, 0, on>>>(part, reinterpret_cast<uint16_t*>(out), rows, k);
    } else {
        weight<<<grid, threads, 0, on>>>(part, reinterpret_cast<float*>(out), rows, k);
    }
    return cudaGetLastError();
}
