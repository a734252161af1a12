// A few rows of x [M, K] times a weight [N, K] with a table of values for each column, transposed: out [M, N], in one launch.
// Phases and layouts: lut_gemv_cuda.h.
//
// What bounds it. With one row of bfloat16, of 16 weights a lane, an operand of a tensor core's product: 13.5 instructions of 2 bits, 16.4
// of 3 and 26.8 of 4 are left to those units that take two turns for a warp (PRMT, LOP3, shifts), beside 3 products and 7 to 16 for others.
// 8192 x 16384 weights on 120 multiprocessors are 546 such operands for each of 480 schedulers: 14 700, 17 900 and 29 200 turns, 7.4, 9.0
// and 14.8 us at 1.98 GHz; what is read takes 7.9, 11.8 and 15.9 at 4.3 TB/s.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "clusters.h"
#include "lut_gemv_cuda.h"

namespace {

extern __shared__ __align__(1024) char memory[];

template <class F>
__global__ void __launch_bounds__(F::THREADS, 1) product(const __grid_constant__ Lut a) {
    release_next();
    Place at = {blockIdx.x, int64_t(blockIdx.y) * F::M, 0, 1};
#if __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    at.rank = int(cluster.block_rank()), at.ranks = int(cluster.num_blocks()), at.cluster = blockIdx.x / at.ranks;
#endif
    add_parts<F>(a, at, memory, await_previous, [&](const auto& phase) {
        phase(int(threadIdx.x));
        __syncthreads();
    });
#if __CUDA_ARCH__ >= 900
    cluster.sync();
    finish<F>(a, at, memory, [&](int rank) { return static_cast<void*>(cluster.map_shared_rank(&memory[0], rank)); }, int(threadIdx.x));
    cluster.sync();  // no block leaves while another reads its sums
#else
    finish<F>(a, at, memory, [&](int) { return static_cast<void*>(memory); }, int(threadIdx.x));
#endif
}

template <class F>
cudaError_t launch(const Lut& a, const Device& device, cudaStream_t stream) {
    const int64_t wide = (a.tiles + a.group - 1) / a.group, high = (a.given.count + F::M - 1) / F::M;
    return launch_clusters(product<F>, a, device, wide, high, F::THREADS, device.shared, stream);
}

using Most = Form<1, 2>;  // threads

// Nibble `j` of the upper or lower half, of a column's rows g or g + 8: quant/kernels/lut_gemv/fragments.py.
template <class T>
__global__ void weight(const Part part, T* out, int64_t rows, int64_t k) {
    const int64_t row = int64_t(blockIdx.x) * TILE + threadIdx.x % TILE, unit = int64_t(blockIdx.y) * (blockDim.x / TILE) + threadIdx.x / TILE;
    if (row >= rows || unit >= part.units) return;
    const int i = threadIdx.x % TILE / 4, shift = i / 8 * 16 + threadIdx.x % 4 * 4;
    const uint32_t* words = part.words + (blockIdx.x * part.units + unit) * (64 * part.bits);
    for (int c = 0; c < UNIT && unit * UNIT + c < part.count; c++) {
        const int lane = i % 8 * 4 + c % 4, group = c / 8, later = c / 4 % 2;
        const auto word = [&](int w) {
            const int piece = w / 4, width = part.bits == 3 && piece == 1 ? 2 : 4;
            return words[piece * 128 + lane * width + w % 4] >> shift;
        };
        uint32_t code = 0;
        if (part.bits == 2) code = word(group) >> 2 * later & 3u;
        if (part.bits == 4) code = word(2 * group + later) & 15u;
        if (part.bits == 3) {
            const int of = group / 2 * 3, v = group % 2 * 2 + later;
            if (v < 3) {
                code = word(of + v) & 7u;
            } else {
                for (int b = 0; b < 3; b++) code |= (word(of + b) >> 3 & 1u) << b;
            }
        }
        const float value = part.values[((unit * UNIT + c) << part.bits) + code];
        const int64_t to = row * k + part.columns[unit * UNIT + c];
        if constexpr (sizeof(T) == 2) {
            out[to] = to_bfloat16(value);
        } else {
            out[to] = value;
        }
    }
}

}  // namespace

// parts: addresses of words, values and columns, columns, bits; zeros for those there are not. starts, kept, differences: zeros or those of
// `Apart`. The input scale may be 0.
extern "C" int bitgrid_lut_gemv(
    int64_t words0, int64_t values0, int64_t columns0, int64_t count0, int64_t bits0, int64_t words1, int64_t values1, int64_t columns1,
    int64_t count1, int64_t bits1, int64_t words2, int64_t values2, int64_t columns2, int64_t count2, int64_t bits2, int64_t starts,
    int64_t kept, int64_t differences, int64_t x, int64_t scale, int64_t out, int64_t parts, int64_t rows, int64_t k, int64_t rows_of_x,
    int64_t bfloat16, int64_t stream) {
    const int64_t five[] = {words0, values0, columns0, count0, bits0, words1, values1, columns1, count1, bits1, words2, values2, columns2, count2, bits2};
    const int64_t three[] = {starts, kept, differences};
    Device device;
    int clusters = 0;
    // The clusters are those of any number of rows of x.
    const cudaError_t failed = find(device, clusters, product<Most>, Most::THREADS);
    if (failed != cudaSuccess) return failed;
    const Lut a = lut_of(five, parts, three, reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(scale),
                         reinterpret_cast<void*>(out), rows, k, rows_of_x, bfloat16 != 0, clusters, device.shared);
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    if (bfloat16 != 0) return rows_of_x == 1 ? launch<Form<1, 2>>(a, device, on) : launch<Form<2, 2>>(a, device, on);
    return rows_of_x == 1 ? launch<Form<1, 3>>(a, device, on) : launch<Form<2, 3>>(a, device, on);
}

// To `found`, on the host: the clusters that run at once. The first number and the stream are not looked at.
extern "C" int bitgrid_lut_clusters(int64_t, int64_t found, int64_t) {
    return tell_clusters(found, product<Most>, Most::THREADS);
}

// The columns of the weight [N, K], float32 or bfloat16, that a part's words stand for.
extern "C" int bitgrid_lut_values(int64_t words, int64_t values, int64_t columns, int64_t out, int64_t count, int64_t bits, int64_t rows,
                                  int64_t k, int64_t bfloat16, int64_t stream) {
    const int64_t five[] = {words, values, columns, count, bits};
    const Part part = part_of(five);
    const int threads = 256, units = threads / TILE;
    const dim3 grid(unsigned((rows + TILE - 1) / TILE), unsigned((part.units + units - 1) / units));
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    if (bfloat16 != 0) {
        weight<<<grid, threads, 0, on>>>(part, reinterpret_cast<uint16_t*>(out), rows, k);
    } else {
        weight<<<grid, threads, 0, on>>>(part, reinterpret_cast<float*>(out), rows, k);
    }
    return cudaGetLastError();
}
