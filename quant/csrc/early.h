// A kernel that starts before the one in front of it is over, where a device can (9.0).

#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace {

// early: it may begin while the kernel in front of it still runs, and waits by `await_previous`.
template <class Problem>
cudaError_t launch_early(void (*kernel)(Problem), const Problem& problem, dim3 blocks, unsigned threads, size_t shared, bool early,
                         cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks, config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared, config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute, config.numAttrs = early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, problem);
}

// Any other kernel. Returns the error of this very launch, where cudaGetLastError would say an earlier call's as well.
template <class... Parameters, class... Values>
cudaError_t launch_after(void (*kernel)(Parameters...), dim3 blocks, unsigned threads, size_t shared, cudaStream_t stream,
                         const Values&... values) {
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks, config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared, config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, values...);
}

// Lets the next kernel begin, up to where it waits in turn.
__device__ __forceinline__ void release_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernels before are over and what they wrote is there.
__device__ __forceinline__ void await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace
