// Linked to a library of quant/csrc in place of CUDA's runtime: notes what the last call launched, by a device's rules.

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <string>

namespace {

constexpr int DEVICES = 8;
int64_t device = 0, multiprocessors[DEVICES], each[DEVICES], block[DEVICES], major[DEVICES];
std::map<std::pair<int64_t, const void*>, int> granted;
cudaError_t last = cudaSuccess;

// Kernels are registered before what this file has is made.
std::map<const void*, std::string>& names() {
    static std::map<const void*, std::string> made;
    return made;
}

cudaError_t said(cudaError_t e) { return e != cudaSuccess ? last = e : e; }

}  // namespace

extern "C" {
int64_t fake_launches, fake_launched[6];  // blocks (x, y, z), threads, bytes of dynamic shared memory, whether it may begin early
char fake_kernel[4096];

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
    names()[host] = made != nullptr ? made : name;
    std::free(made);
}
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
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel, void**) {
    const dim3 g = c->gridDim, b = c->blockDim;
    const int own = granted[{device, kernel}], most = own > 48 * 1024 ? own : 48 * 1024;
    const bool some = g.x > 0 && g.y > 0 && g.z > 0 && b.x > 0;
    const bool legal = some && g.x < 1u << 31 && g.y < 1 << 16 && g.z < 1 << 16 && b.x * b.y * b.z <= 1024;
    if (!legal || (c->numAttrs > 0 && major[device] < 9)) return said(cudaErrorInvalidConfiguration);
    if (int64_t(c->dynamicSmemBytes) > most) return said(cudaErrorInvalidValue);
    const int64_t told[] = {g.x, g.y, g.z, b.x, int64_t(c->dynamicSmemBytes), c->numAttrs};
    for (int i = 0; i < 6; i++) fake_launched[i] = told[i];
    fake_kernel[names()[kernel].copy(fake_kernel, sizeof fake_kernel - 1)] = 0, fake_launches++;
    return cudaSuccess;
}
}
