// How kernels are launched, also before the one in front is over, where a device can (9.0).

#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace {

// What a call of the runtime returned; a later one does not say it again.
inline cudaError_t told(cudaError_t e) {
    if (e != cudaSuccess) cudaGetLastError();
    return e;
}

// How a kernel starts: in clusters of `cluster` blocks side by side, where a number is given; `early`: it may begin while the kernel in
// front of it still runs, and waits by `await_previous`.
struct Start {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};

    Start(dim3 blocks, unsigned threads, size_t shared, cudaStream_t stream, bool early = false, unsigned cluster = 0) {
        config.gridDim = blocks, config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared, config.stream = stream;
        config.attrs = attributes;
        if (cluster > 0) {
            cudaLaunchAttribute& a = attributes[config.numAttrs++];
            a.id = cudaLaunchAttributeClusterDimension;
            a.val.clusterDim.x = cluster, a.val.clusterDim.y = 1, a.val.clusterDim.z = 1;
        }
        if (early) {
            cudaLaunchAttribute& a = attributes[config.numAttrs++];
            a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
            a.val.programmaticStreamSerializationAllowed = 1;
        }
    }
    Start(const Start&) = delete;  // `config` has the address of `attributes`
};

// The error of this very launch, where cudaGetLastError would say an earlier call's as well.
template <class... Parameters, class... Values>
cudaError_t launch_as(const Start& start, void (*kernel)(Parameters...), const Values&... values) {
    return told(cudaLaunchKernelEx(&start.config, kernel, values...));
}

// Before a launch with more than 48 KB of shared memory, static and dynamic together: dynamic bytes that blocks of the kernel may have.
template <class Kernel>
cudaError_t let_have(Kernel* kernel, int64_t bytes) {
    return told(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
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
