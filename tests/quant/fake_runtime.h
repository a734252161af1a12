// As much of CUDA's runtime as a launch (quant/csrc/cta.h) calls, with a device's rules for shared memory, for tests on the host.

#pragma once

#include <cstddef>
#include <cstdint>

#define __forceinline__
#define __device__

struct dim3 {
    unsigned x, y = 1, z = 1;
    explicit dim3(unsigned x) : x(x) {}
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
using cudaStream_t = void*;
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};

namespace fake {
inline int64_t most = 227 * 1024, fixed = 0, granted = 0;  // bytes of shared memory: of the device, static, dynamic as asked for
inline cudaError_t last = cudaSuccess;
inline cudaError_t said(bool good) {
    if (!good) last = cudaErrorInvalidValue;
    return good ? cudaSuccess : cudaErrorInvalidValue;
}
}  // namespace fake

inline cudaError_t cudaGetLastError() {
    const cudaError_t e = fake::last;
    fake::last = cudaSuccess;
    return e;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = int(fake::most), cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* own, const void*) {
    own->sharedSizeBytes = size_t(fake::fixed);
    return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
    const bool good = bytes >= 0 && bytes + fake::fixed <= fake::most;
    if (good) fake::granted = bytes;
    return fake::said(good);
}
inline cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void** given, size_t bytes, cudaStream_t) {
    const int64_t limit = fake::fixed + fake::granted > 48 * 1024 ? fake::granted : 48 * 1024 - fake::fixed;
    if (int64_t(bytes) > limit) return fake::said(false);
    const auto kernel = reinterpret_cast<void (*)(int, const double*)>(const_cast<void*>(function));
    kernel(*static_cast<int*>(given[0]), *static_cast<double**>(given[1]));
    return cudaSuccess;
}
