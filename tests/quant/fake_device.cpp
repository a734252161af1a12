// Linked to a library of quant/csrc in place of CUDA's runtime: notes what the last call launched, by a device's rules, and lets `fake_run`
// run it, where there is one.

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <string>

namespace {

constexpr int DEVICES = 64;
int64_t device = 0, multiprocessors[DEVICES], each[DEVICES], block[DEVICES], major[DEVICES];
std::map<std::pair<int64_t, const void*>, int> granted;
cudaError_t last = cudaSuccess;

// Kernels are registered before what this file has is made. Of each its name in the source and in the program.
std::map<const void*, std::pair<std::string, std::string>>& names() {
    static std::map<const void*, std::pair<std::string, std::string>> made;
    return made;
}

cudaError_t said(cudaError_t e) { return e != cudaSuccess ? last = e : e; }

}  // namespace

extern "C" {
int64_t fake_launches, fake_launched[6];  // blocks (x, y, z), threads, bytes of dynamic shared memory, whether it may begin early
char fake_kernel[4096];
int (*fake_run)(const char* kernel, const int64_t* launched, void** parameters);  // launched: as above, and blocks of a cluster
int64_t (*fake_fixed)(const char* kernel);                                        // bytes of static shared memory
int fake_clusters = 15;                                                           // that run at once

void fake_device(int64_t number, int64_t processors, int64_t of_each, int64_t of_block, int64_t generation) {
    device = number, multiprocessors[number] = processors, each[number] = of_each, block[number] = of_block, major[number] = generation;
}

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    char* made = abi::__cxa_demangle(name, nullptr, nullptr, nullptr);
    names()[host] = {made != nullptr ? made : name, name};
    std::free(made);
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
// Of launches by `<<<>>>`, which say an earlier call's error as their own: there are none.
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return said(cudaErrorNotSupported); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return said(cudaErrorNotSupported); }
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return 1; }
char __cudaInitModule(void**) { return 1; }

cudaError_t cudaGetLastError() {
    const cudaError_t e = last;
    last = cudaSuccess;
    return e;
}
cudaError_t cudaGetDevice(int* number) { return *number = int(device), cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr asked, int number) {
    const int64_t* const found = asked == cudaDevAttrMultiProcessorCount               ? multiprocessors
                                 : asked == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? each
                                 : asked == cudaDevAttrMaxSharedMemoryPerBlockOptin     ? block
                                 : asked == cudaDevAttrComputeCapabilityMajor           ? major
                                                                                        : nullptr;
    if (found != nullptr) *value = int(found[number]);
    return said(found != nullptr ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > block[device]) return said(cudaErrorInvalidValue);
    return granted[{device, kernel}] = value, cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void* kernel) {
    *found = {};
    if (fake_fixed != nullptr) found->sharedSizeBytes = size_t(fake_fixed(names()[kernel].second.c_str()));
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* found, const void*, const cudaLaunchConfig_t*) {
    return *found = fake_clusters, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* found, const void*, int, size_t, unsigned) {
    return *found = 1, cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel, void** parameters) {
    const dim3 g = c->gridDim, b = c->blockDim;
    const int own = granted[{device, kernel}], most = own > 48 * 1024 ? own : 48 * 1024;
    const bool some = g.x > 0 && g.y > 0 && g.z > 0 && b.x > 0;
    const bool legal = some && g.x < 1u << 31 && g.y < 1 << 16 && g.z < 1 << 16 && b.x * b.y * b.z <= 1024;
    if (!legal || (c->numAttrs > 0 && major[device] < 9)) return said(cudaErrorInvalidConfiguration);
    if (int64_t(c->dynamicSmemBytes) > most) return said(cudaErrorInvalidValue);
    int64_t told[] = {g.x, g.y, g.z, b.x, int64_t(c->dynamicSmemBytes), c->numAttrs, 1};
    for (int i = 0; i < 6; i++) fake_launched[i] = told[i];
    const auto& [name, compiled] = names()[kernel];
    fake_kernel[name.copy(fake_kernel, sizeof fake_kernel - 1)] = 0, fake_launches++;
    if (fake_run == nullptr) return cudaSuccess;
    told[5] = 0;
    for (unsigned i = 0; i < c->numAttrs; i++) {
        if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) told[6] = c->attrs[i].val.clusterDim.x;
        if (c->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization) told[5] = 1;
    }
    return said(fake_run(compiled.c_str(), told, parameters) == 0 ? cudaSuccess : cudaErrorLaunchFailure);
}
}
