// How products with packed weights start: in clusters of blocks that add up shares of the columns, or, on devices older than 9.0, in blocks
// that stand alone.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "products_cuda.h"

namespace {

constexpr int CLUSTER = 8;

struct Device {
    int shared, processors;  // shared: bytes that a block may ask for
    bool clusters;

    int ranks() const { return clusters ? CLUSTER : 1; }  // blocks of a cluster
    int at_once() const { return clusters ? int(clusters_at_once(processors, CLUSTER)) : processors; }
};

inline cudaError_t find(Device& found) {
    int device, major;
    cudaError_t failed = cudaGetDevice(&device);
    if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device);
    if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (failed == cudaSuccess) found.clusters = major >= 9;
    return failed;
}

// `wide` clusters side by side and `high` rows of them, each block with `threads` and `shared` bytes.
template <typename Problem>
cudaError_t launch_clusters(void (*kernel)(Problem), const Problem& a, const Device& on, int64_t wide, int64_t high, int threads,
                            int64_t shared, cudaStream_t stream) {
    const cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (failed != cudaSuccess) return failed;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(wide * on.ranks()), unsigned(high));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = stream;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(on.ranks()), attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    config.attrs = &attribute, config.numAttrs = on.clusters ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, a);
}

}  // namespace
