// A few rows of x [M, K] times a weight [N, K] with a table of values for each column, transposed: out [M, N], in one launch.
// Phases and layouts: lut_gemv_cuda.h.
//
// What bounds it. Parities of 32 x 256 weights are 6 products of 16 x 8 x 256 bits for each of 3, 7 or 15 subsets, 4 for each of 11 whose
// terms are narrow, where one row of x is bfloat16: of 8192 x 16384 weights, on 120 multiprocessors, 648, 1512 and 2448 for each of 480
// schedulers. At 8 turns each that is 2.6, 6.1 and 9.9 us at 1.98 GHz; with all else a scheduler issues 116, 170 and 273 instructions for
// 18, 42 and 68 products, and what was measured with 90 in place of 68 comes to 8 turns a product and 1.7 an instruction. What is read
// takes 7.9, 11.8 and 15.9 us at 4.3 TB/s. Before and after that: the start, one latency of memory for x and tables, whose bits then are
// made while rings of codes fill, and sums sent through the cluster.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "clusters.h"
#include "lut_gemv_cuda.h"

namespace {

extern __shared__ __align__(1024) char memory[];

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t shared_address(const void* of) { return uint32_t(__cvta_generic_to_shared(of)); }

// Sums come to a block of a cluster with a count of their bytes (st.async of the PTX ISA), so that it waits for no block but for these.
// By one thread, before the others of the cluster may send.
__device__ __forceinline__ void expect(uint64_t* counter, int bytes) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(counter)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(counter)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void send_to(int rank, const float* place, float v, const uint64_t* counter) {
    uint32_t to, counted;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(place)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counted) : "r"(shared_address(counter)), "r"(rank));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(v), "r"(counted) : "memory");
}

__device__ __forceinline__ void await_all(const uint64_t* counter) {
    asm volatile(
        "{\n.reg .pred there;\n"
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 there, [%0], 0;\n"
        "@!there bra again;\n}" ::"r"(shared_address(counter))
        : "memory");
}
#endif

template <class F>
__global__ void __launch_bounds__(THREADS, 1) product(const __grid_constant__ Lut a) {
    release_next();
    Place at = {blockIdx.x, int64_t(blockIdx.y) * F::M, 0, 1};
#if __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    at.rank = int(cluster.block_rank()), at.ranks = a.ranks;
    uint32_t number;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
    at.cluster = number;
    if (threadIdx.x == 0) expect(Shared<F>(a, memory).counter, bytes_given<F>(a, at));
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");  // nothing else was written that others are to see
#endif
    const auto each = [&](const auto& phase) {
        phase(int(threadIdx.x));
        __syncthreads();
    };
    add_parts<F>(a, at, memory, await_previous, each);
#if __CUDA_ARCH__ >= 900
    cluster.barrier_wait();  // all of its blocks have begun, and so have shared memory
    const uint64_t* counter = Shared<F>(a, memory).counter;
    give<F>(a, at, memory, [&](int rank, const float* place, float v) { send_to(rank, place, v, counter); }, int(threadIdx.x));
    if (a.starts != nullptr) __syncthreads();
#else
    each([&](int thread) { give<F>(a, at, memory, [](int, float* place, float v) { *place = v; }, thread); });
#endif
    if (a.starts != nullptr) each([&](int thread) { gather<F>(a, at, memory, thread); });
#if __CUDA_ARCH__ >= 900
    await_all(counter);
#endif
    finish<F>(a, at, memory, int(threadIdx.x));
}

template <class F>
cudaError_t launch(const Lut& a, const Device& device, cudaStream_t stream) {
    const int64_t wide = (a.tiles + a.group - 1) / a.group, high = (a.given.count + F::M - 1) / F::M;
    return launch_clusters(product<F>, a, device, wide, high, THREADS, device.shared, stream);
}

using Most = Form<1, 3>;
static_assert(CLUSTER <= MOST_RANKS, "places for sums");

// A warp has 32 rows, each thread 32 columns of one: quant/kernels/lut_gemv/fragments.py.
template <class T>
__global__ void weight(const Part part, T* out, int64_t rows, int64_t k) {
    const int64_t row = int64_t(blockIdx.x) * TILE + threadIdx.x % TILE, unit = blockIdx.y;
    const int i = threadIdx.x % 16, tile = threadIdx.x % TILE / 16, w = threadIdx.x / TILE;
    if (row >= rows) return;
    const uint32_t* words = part.words + (int64_t(blockIdx.x) * part.units + unit) * slot_words(part.bits) + tile * part.bits * 128 +
                            (i % 8 * 4 + w % 4) * 4 + w / 4 * 2 + i / 8;
    uint32_t plane[4] = {};
    UNROLL for (int b = 0; b < 4; b++) {
        if (b < part.bits) plane[b] = words[b * 128];
    }
    for (int j = 0; j < 32 && unit * UNIT + w * 32 + j < part.count; j++) {
        uint32_t code = 0;
        UNROLL for (int b = 0; b < 4; b++) code |= (plane[b] >> j & 1u) << b;
        const int64_t column = unit * UNIT + w * 32 + j;
        const float value = part.values[(column << part.bits) + code];
        const int64_t to = row * k + part.columns[column];
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
    const int64_t five[] = {words0, values0, columns0, count0, bits0, words1,   values1, columns1,
                            count1, bits1,   words2,   values2, columns2, count2, bits2};
    const int64_t three[] = {starts, kept, differences};
    Device device;
    int clusters = 0;
    // The clusters are those of any number of rows of x.
    const cudaError_t failed = find(device, clusters, product<Most>, THREADS);
    if (failed != cudaSuccess) return failed;
    Lut a = lut_of(five, parts, three, reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(scale),
                   reinterpret_cast<void*>(out), rows, k, rows_of_x, bfloat16 != 0, clusters, device.ranks());
    cudaError_t done = cudaSuccess;
    const bool found = with_form(a, device.shared, [&](auto form) {
        done = launch<decltype(form)>(a, device, reinterpret_cast<cudaStream_t>(stream));
    });
    return found ? done : cudaErrorLaunchOutOfResources;
}

// To `found`, on the host: the clusters that run at once. The first number and the stream are not looked at.
extern "C" int bitgrid_lut_clusters(int64_t, int64_t found, int64_t) {
    return tell_clusters(found, product<Most>, THREADS);
}

// The columns of the weight [N, K], float32 or bfloat16, that a part's words stand for.
extern "C" int bitgrid_lut_values(int64_t words, int64_t values, int64_t columns, int64_t out, int64_t count, int64_t bits, int64_t rows,
                                  int64_t k, int64_t bfloat16, int64_t stream) {
    const int64_t five[] = {words, values, columns, count, bits};
    const Part part = part_of(five);
    const int threads = TILE * WORDS;
    const dim3 grid(unsigned((rows + TILE - 1) / TILE), unsigned(part.units));
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    const Start start(grid, threads, 0, on);
    return bfloat16 != 0 ? launch_as(start, weight<uint16_t>, part, reinterpret_cast<uint16_t*>(out), rows, k)
                         : launch_as(start, weight<float>, part, reinterpret_cast<float*>(out), rows, k);
}
