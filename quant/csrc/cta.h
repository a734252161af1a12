// What kernels of one source for a GPU and, in tests, for an emulated thread block on the host share. The emulation
// (tests/quant/cuda_on_host.h) is included before and brings CUDA's names and these macros with it.

#pragma once

// Static shared memory that a kernel may have; the emulation lets the dynamic one have the rest of the 227 KB of compute capability 9.0.
#define MOST_STATIC (24 * 1024)

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <cstdint>

#include "early.h"

#define DEVICE __device__ __forceinline__
#define GLOBAL __global__
#define BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define BY_ANY  // what several threads store the same to, in any order
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define LAUNCH(kernel, blocks, threads, bytes, stream, ...) bitgrid_launched(kernel, blocks, threads, bytes, stream, __VA_ARGS__)

namespace {

// A cudaError_t. Without asking, a block gets 48 KB of shared memory, static and dynamic together. What is asked for is all that the device
// has, the same in every call: threads of the host do not take it from each other.
template <class... Parameters, class... Values>
int bitgrid_launched(void (*kernel)(Parameters...), dim3 blocks, unsigned threads, int64_t bytes, int64_t stream, const Values&... values) {
    cudaError_t e = cudaSuccess;
    if (bytes > 0) {
        cudaFuncAttributes own;
        e = cudaFuncGetAttributes(&own, kernel);
        const int64_t fixed = e == cudaSuccess ? int64_t(own.sharedSizeBytes) : 0;
        if (e == cudaSuccess && fixed + bytes > 48 * 1024) {
            int device = 0, most = 0;
            e = cudaGetDevice(&device);
            if (e == cudaSuccess) e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
            if (e == cudaSuccess) e = let_have(kernel, most - fixed);
        }
    }
    if (e != cudaSuccess) return int(told(e));
    return int(launch_as(Start(blocks, threads, size_t(bytes), reinterpret_cast<cudaStream_t>(stream)), kernel, values...));
}

}  // namespace

#endif
