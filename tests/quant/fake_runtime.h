// As much of CUDA's runtime as launches (quant/csrc/cta.h, early.h, wq_start.h, clusters.h) call, with a device's rules for shared memory
// and clusters, for tests on the host.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>
#include <utility>

#define __forceinline__
#define __device__

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101, cudaErrorLaunchOutOfResources = 701 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrComputeCapabilityMajor
};
using cudaStream_t = void*;
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace fake {
inline int64_t most = 227 * 1024, fixed = 0;  // bytes of shared memory: of the device, static
inline int device = 0, major = 9, asked = 0;  // asked: how often for clusters, or blocks, at once
inline std::map<std::pair<int, const void*>, int64_t> granted;  // of a device and kernel: dynamic, as asked for
inline cudaError_t last = cudaSuccess;
inline cudaError_t said(bool good) {
    if (!good) last = cudaErrorInvalidValue;
    return good ? cudaSuccess : cudaErrorInvalidValue;
}
inline bool fits(const void* function, int64_t bytes) {
    const int64_t own = granted[{device, function}];
    return bytes <= (fixed + own > 48 * 1024 ? own : 48 * 1024 - fixed);
}
// Of the last launch: blocks of a cluster, 0 where it had none, and whether it might begin early.
inline unsigned cluster = 0;
inline bool early = false;
inline cudaLaunchConfig_t config;
}  // namespace fake

inline cudaError_t cudaGetLastError() {
    const cudaError_t e = fake::last;
    fake::last = cudaSuccess;
    return e;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = fake::device, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr asked, int) {
    *value = asked == cudaDevAttrMultiProcessorCount              ? 132
             : asked == cudaDevAttrComputeCapabilityMajor         ? fake::major
             : asked == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? int(fake::most) + 1024
                                                                  : int(fake::most);
    return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* own, void (*)(P...)) {
    own->sharedSizeBytes = size_t(fake::fixed);
    return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return fake::said(value >= 0 && value <= 100);
    const bool good = value >= 0 && value + fake::fixed <= fake::most;
    if (good) fake::granted[{fake::device, function}] = value;
    return fake::said(good);
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*function)(P...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(function), attribute, value);
}
template <class P>
cudaError_t cudaOccupancyMaxActiveClusters(int* found, void (*)(P), const cudaLaunchConfig_t*) {
    return fake::asked++, *found = 15, cudaSuccess;
}
template <class P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* found, void (*)(P), int, size_t) {
    return fake::asked++, *found = 1, cudaSuccess;
}
template <class... P, class... V>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const V&... given) {
    fake::config = *config, fake::cluster = 0, fake::early = false;
    for (unsigned i = 0; i < config->numAttrs; i++) {
        const cudaLaunchAttribute& own = config->attrs[i];
        const auto& side = own.val.clusterDim;
        if (own.id == cudaLaunchAttributeClusterDimension) fake::cluster = side.x * side.y * side.z;
        if (own.id == cudaLaunchAttributeProgrammaticStreamSerialization) fake::early = own.val.programmaticStreamSerializationAllowed;
    }
    const bool known = fake::major >= 9 || config->numAttrs == 0;
    const bool whole = fake::cluster == 0 || config->gridDim.x % fake::cluster == 0;
    if (!known || !whole || !fake::fits(reinterpret_cast<const void*>(kernel), int64_t(config->dynamicSmemBytes))) return fake::said(false);
    std::apply(kernel, std::tuple<P...>(given...));
    return cudaSuccess;
}
