// How products with packed weights start: in clusters of blocks that add up shares of the columns, or, on devices older than 9.0, in blocks
// that stand alone.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

#include "early.h"
#include "products_cuda.h"

namespace {

constexpr int CLUSTER = 8;    // blocks, where there are clusters
constexpr bool EARLY = true;  // a product may begin, and fetch codes, while the kernel before it still runs

struct Device {
    int number, shared, processors;  // shared: bytes that a block may ask for
    bool clusters;

    int ranks() const { return clusters ? CLUSTER : 1; }
};

inline cudaError_t find(Device& found) {
    int major;
    cudaError_t failed = cudaGetDevice(&found.number);
    const int& device = found.number;
    if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device);
    if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (failed == cudaSuccess) found.clusters = major >= 9;
    return failed;
}

// How a kernel starts: `wide` clusters side by side and `high` rows of them, each block with `threads` and `shared` bytes.
struct Start {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};

    Start(const Device& on, int64_t wide, int64_t high, int threads, int64_t shared, cudaStream_t stream) {
        config.gridDim = dim3(unsigned(wide * on.ranks()), unsigned(high));
        config.blockDim = dim3(unsigned(threads));
        config.dynamicSmemBytes = size_t(shared);
        config.stream = stream;
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim.x = unsigned(on.ranks()), attributes[0].val.clusterDim.y = 1, attributes[0].val.clusterDim.z = 1;
        attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[1].val.programmaticStreamSerializationAllowed = 1;
        config.attrs = attributes, config.numAttrs = !on.clusters ? 0 : EARLY ? 2 : 1;
    }
    Start(const Start&) = delete;  // `config` has the address of `attributes`
};

// Clusters of the kernel that run at once, or blocks where there are no clusters: asked once for each device, kernel and size. A cluster
// lies in one of the GPU's parts, and these need not have whole clusters of multiprocessors: the 132 of an H200 may take 15 clusters of 8
// and not 16, the last of which would run alone after them. No number is made up: what the device does not say is an error.
template <typename Problem>
cudaError_t at_once(int& found, void (*kernel)(Problem), const Device& on, int threads, int64_t shared) {
    static std::mutex mutex;
    static std::map<std::tuple<int, void (*)(Problem), int64_t>, int> known;
    const std::lock_guard<std::mutex> held(mutex);
    int& answer = known[{on.number, kernel, shared}];
    if (answer == 0) {
        cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (failed != cudaSuccess) return failed;
        if (on.clusters) {
            Start start(on, 1, 1, threads, shared, nullptr);
            start.config.numAttrs = 1;
            failed = cudaOccupancyMaxActiveClusters(&answer, kernel, &start.config);
        } else {
            failed = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&answer, kernel, threads, size_t(shared));
            answer *= on.processors;
        }
        if (failed != cudaSuccess) return failed;
        if (answer == 0) return cudaErrorLaunchOutOfResources;
    }
    found = answer;
    return cudaSuccess;
}

// The device, and how many clusters of a kernel run at once whose blocks leave a multiprocessor no room for a second.
template <typename Problem>
cudaError_t find(Device& device, int& clusters, void (*kernel)(Problem), int threads) {
    const cudaError_t failed = find(device);
    return failed != cudaSuccess ? failed : at_once(clusters, kernel, device, threads, device.shared);
}

// How many those are, to an address on the host.
template <typename Problem>
cudaError_t tell_clusters(int64_t found, void (*kernel)(Problem), int threads) {
    Device device;
    int clusters = 0;
    const cudaError_t failed = find(device, clusters, kernel, threads);
    *reinterpret_cast<int64_t*>(found) = clusters;
    return failed;
}

template <typename Problem>
cudaError_t launch_clusters(void (*kernel)(Problem), const Problem& a, const Device& on, int64_t wide, int64_t high, int threads,
                            int64_t shared, cudaStream_t stream) {
    // All that the device has, the same in every call: threads of the host do not take it from each other.
    const cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, on.shared);
    if (failed != cudaSuccess) return failed;
    const Start start(on, wide, high, threads, shared, stream);
    return cudaLaunchKernelEx(&start.config, kernel, a);
}

}  // namespace
