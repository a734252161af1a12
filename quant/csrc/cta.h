// What kernels of one source for a GPU and, in tests, for an emulated thread block on the host share. The emulation
// (tests/quant/cuda_on_host.h) is included before and brings CUDA's names and these macros with it.

#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__
#define GLOBAL __global__
#define BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define LAUNCH(kernel, blocks, threads, bytes, stream, ...) bitgrid_launched(kernel, blocks, threads, bytes, stream, __VA_ARGS__)

namespace {

// A cudaError_t. More than 48 KB of shared memory have to be asked for.
template <class... Parameters, class... Values>
int bitgrid_launched(void (*kernel)(Parameters...), dim3 blocks, unsigned threads, int64_t bytes, int64_t stream, const Values&... values) {
    if (bytes > 48 * 1024) {
        const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
        if (refused != cudaSuccess) return cudaGetLastError(), int(refused);
    }
    kernel<<<blocks, threads, size_t(bytes), reinterpret_cast<cudaStream_t>(stream)>>>(values...);
    return int(cudaGetLastError());
}

}  // namespace

#endif
