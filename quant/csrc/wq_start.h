// How products with affine codes are launched.

#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "early.h"

namespace {

struct Device {
    int number, multiprocessors, shared_each, shared_block;

    // Bytes of shared memory for a block where two are on a multiprocessor, or of teams one; the device keeps 1 kB for each.
    int most(int teams = 1) const { return teams == 1 ? shared_each / 2 - 1024 : shared_block; }
};

cudaError_t found(Device& device) {
    static Device kept[64];
    static std::atomic<uint64_t> known{0};
    int number;
    cudaError_t e = cudaGetDevice(&number);
    if (e != cudaSuccess || number >= 64) return e != cudaSuccess ? told(e) : cudaErrorInvalidDevice;
    if (known.load() >> number & 1) return device = kept[number], cudaSuccess;
    device.number = number;
    e = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, number);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&device.shared_each, cudaDevAttrMaxSharedMemoryPerMultiprocessor, number);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&device.shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
    if (e != cudaSuccess) return told(e);
    kept[number] = device;
    known.fetch_or(uint64_t(1) << number);
    return cudaSuccess;
}

// A kernel of one problem, by blocks of so many warps.
template <auto KERNEL, class Problem>
cudaError_t start(const Problem& problem, const Device& device, dim3 blocks, int warps, int64_t bytes, bool early, cudaStream_t stream) {
    static std::atomic<uint64_t> prepared{0};
    cudaError_t e;
    if (!(prepared.load() >> device.number & 1)) {
        if ((e = let_have(KERNEL, device.shared_block)) != cudaSuccess) return e;
        e = cudaFuncSetAttribute(KERNEL, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
        if (e != cudaSuccess) return told(e);
        prepared.fetch_or(uint64_t(1) << device.number);
    }
    return launch_as(Start(blocks, unsigned(warps) * 32, size_t(bytes), stream, early), KERNEL, problem);
}

}  // namespace
