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
    return told(failed);
}

// `wide` clusters side by side and `high` rows of them.
inline dim3 clustered(const Device& on, int64_t wide, int64_t high) { return dim3(unsigned(wide * on.ranks()), unsigned(high)); }

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
        cudaError_t failed = let_have(kernel, shared);
        if (failed != cudaSuccess) return failed;
        if (on.clusters) {
            const Start start(clustered(on, 1, 1), unsigned(threads), size_t(shared), nullptr, false, CLUSTER);
            failed = cudaOccupancyMaxActiveClusters(&answer, kernel, &start.config);
        } else {
            failed = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&answer, kernel, threads, size_t(shared));
            answer *= on.processors;
        }
        if (failed != cudaSuccess) return told(failed);
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
    const cudaError_t failed = let_have(kernel, on.shared);
    if (failed != cudaSuccess) return failed;
    const unsigned cluster = on.clusters ? CLUSTER : 0;
    const Start start(clustered(on, wide, high), unsigned(threads), size_t(shared), stream, EARLY && on.clusters, cluster);
    return launch_as(start, kernel, a);
}

}  // namespace
