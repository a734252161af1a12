// A few rows of x [M, K] times a weight [N, K] with a table of values for each row, transposed: out [M, N], in one launch.
// Phases and layouts: row_lut_gemv_cuda.h.
//
// What bounds it, with one row of x and float16 tables: instructions. Of 4 weights of a lane two lookups and one load of x take three turns
// of shared memory, and 15 instructions are issued (two shifts, two masks, three loads, four conversions, four multiply-adds); with what a
// run costs besides, 590 of 128 weights. 8192 x 8192 weights on 132 multiprocessors: 11 900 turns, and 73 200 instructions, which four
// schedulers issue in 18 300 cycles or 9.2 us at 1.98 GHz; reading the words takes 8.4 us with 4 bits and 4.2 with 2 at 4 TB/s.
// Measured on an H200, 8192 x 16384: 30.8 us with 4 bits, 26.7 with 2. A block is a tile of 32 rows: fewer than 132 of them leave
// multiprocessors idle.

#include <cuda_runtime.h>

#include "early.h"
#include "row_lut_gemv_cuda.h"

namespace {

extern __shared__ __align__(128) char memory[];

template <int M, int BITS, bool HALF>
__global__ void __launch_bounds__(THREADS, M == 4 ? 1 : 2) product(const __grid_constant__ Rows a) {
    Lane<M, BITS> lane;
    multiply<M, BITS, HALF>(
        a, Tile{blockIdx.x, int(blockIdx.y) * M}, memory,
        [&](const auto& phase) {
            phase(int(threadIdx.x), lane);
            __syncthreads();
        },
        [&](const auto& phase) {
            phase(int(threadIdx.x), lane);
            __syncwarp();
        });
}

// A warp has a unit of columns, one for each lane, and goes through the rows of a tile.
template <class T>
__global__ void weight(const Rows a, int bits, bool half, T* out) {
    __shared__ float table[16][ROWS + 1];
    const int64_t tile = blockIdx.x, own = (tile << bits) * ROWS;
    for (int i = threadIdx.x; i < ROWS << bits; i += blockDim.x) {
        const int64_t at = own + i;
        const float value = half ? from_half(static_cast<const uint16_t*>(a.tables)[at]) : static_cast<const float*>(a.tables)[at];
        table[i / ROWS][i % ROWS] = value;
    }
    __syncthreads();
    const int64_t unit = int64_t(blockIdx.y) * (blockDim.x / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x % 32, word = lane * bits / 32, shift = lane * bits % 32;
    const int64_t column = unit * UNIT + lane;
    if (column >= a.given.k) return;
    const uint32_t* words = a.words + (tile * a.units + unit) * bits * ROWS;
    for (int r = 0; r < ROWS && tile * ROWS + r < a.rows; r++) {
        uint32_t code = words[word * ROWS + r] >> shift;
        if (shift + bits > 32) code |= words[(word + 1) * ROWS + r] << (32 - shift);
        const float value = table[code & ((1 << bits) - 1)][r];
        const int64_t to = (tile * ROWS + r) * a.given.k + column;
        if constexpr (sizeof(T) == 2) {
            out[to] = to_bfloat16(value);
        } else {
            out[to] = value;
        }
    }
}

}  // namespace

// The input scale may be 0. half: tables are float16, else float32.
extern "C" int bitgrid_row_lut_gemv(int64_t words, int64_t tables, int64_t x, int64_t scale, int64_t out, int64_t rows, int64_t k,
                                    int64_t count, int64_t bits, int64_t half, int64_t bfloat16, int64_t stream) {
    const auto codes = reinterpret_cast<const uint32_t*>(words);
    const Rows a = rows_of(codes, reinterpret_cast<const void*>(tables), reinterpret_cast<const void*>(x),
                           reinterpret_cast<const float*>(scale), reinterpret_cast<void*>(out), rows, k, count, bfloat16 != 0);
    return chosen(count, bits, half != 0, [&](auto m, auto b, auto h) {
        constexpr int M = decltype(m)::value, BITS = decltype(b)::value;
        constexpr bool HALF = decltype(h)::value != 0;
        constexpr int shared = shared_bytes(M, BITS, HALF);
        const auto function = product<M, BITS, HALF>;
        if (shared > 48 * 1024) {  // which a block has without asking
            const cudaError_t failed = let_have(function, shared);
            if (failed != cudaSuccess) return int(failed);
        }
        const dim3 grid(unsigned((rows + ROWS - 1) / ROWS), unsigned((count + M - 1) / M));
        return int(launch_as(Start(grid, THREADS, shared, reinterpret_cast<cudaStream_t>(stream)), function, a));
    });
}

// The weight [N, K] itself, float32 or bfloat16.
extern "C" int bitgrid_row_lut_values(int64_t words, int64_t tables, int64_t out, int64_t rows, int64_t k, int64_t bits, int64_t half,
                                      int64_t bfloat16, int64_t stream) {
    const auto codes = reinterpret_cast<const uint32_t*>(words);
    const Rows a = rows_of(codes, reinterpret_cast<const void*>(tables), nullptr, nullptr, nullptr, rows, k, 1, false);
    const int threads = 256;
    const dim3 grid(unsigned((rows + ROWS - 1) / ROWS), unsigned((a.units + threads / 32 - 1) / (threads / 32)));
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    const Start start(grid, threads, 0, on);
    return bfloat16 != 0 ? launch_as(start, weight<uint16_t>, a, int(bits), half != 0, reinterpret_cast<uint16_t*>(out))
                         : launch_as(start, weight<float>, a, int(bits), half != 0, reinterpret_cast<float*>(out));
}
