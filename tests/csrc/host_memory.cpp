// Global memory behind host_cuda.h, what a kernel may touch and what it has touched; and the few calls of cudart that the
// launchers make.
#include <map>
#include <unordered_set>

#include "host_cuda.h"

namespace host_cuda {

Counters counters;

namespace {

std::map<uintptr_t, uintptr_t> allowed;  // begin -> end
std::unordered_set<uintptr_t> loaded, stored;

}  // namespace

void allow(const void* begin, int64_t bytes) {
    uintptr_t& end = allowed[reinterpret_cast<uintptr_t>(begin)];
    end = std::max(end, reinterpret_cast<uintptr_t>(begin) + uintptr_t(bytes));
}
void allow_everything() { allowed.clear(); }

void touch(const void* p, int bytes, bool store) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p), held = reinterpret_cast<uintptr_t>(dynamic_shared());
    if (at % unsigned(bytes) != 0) fail("misaligned access of " + std::to_string(bytes) + " bytes");
    if (held != 0 && held <= at && at + unsigned(bytes) <= held + dynamic_shared_bytes()) return;
    if (!allowed.empty()) {
        auto i = allowed.upper_bound(at);
        bool inside = false;
        while (i != allowed.begin() && !inside) inside = at + unsigned(bytes) <= (--i)->second;
        if (!inside) fail(std::string(store ? "writes" : "reads") + " outside of the memory it was given");
    }
    if (!settings.count) return;
    (store ? counters.stored : counters.loaded) += bytes;
    for (uintptr_t sector = at / 32; sector <= (at + unsigned(bytes) - 1) / 32; ++sector) (store ? stored : loaded).insert(sector);
}

void count_sectors() {
    counters.sectors_loaded += int64_t(loaded.size());
    counters.sectors_stored += int64_t(stored.size());
    loaded.clear();
    stored.clear();
}

}  // namespace host_cuda

// ---- cudart ------------------------------------------------------------------------------------------------------------

constexpr int RESERVED = 1 << 10;  // of a multiprocessor's shared memory, for each block

// Another device for each size of clusters: what a launcher has asked a device once it need not ask again.
cudaError_t cudaGetDevice(int* device) { return *device = host_cuda::settings.most_blocks_a_cluster, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? host_cuda::settings.processors
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? host_cuda::settings.shared_memory
             : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? host_cuda::settings.shared_memory + RESERVED
             : attribute == cudaDevAttrReservedSharedMemoryPerBlock ? RESERVED
             : attribute == cudaDevAttrClusterLaunch ? host_cuda::settings.most_blocks_a_cluster > 1 : 0;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->ptxVersion = 90;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* how) {
    *clusters = int(how->attrs[0].val.clusterDim.x) <= host_cuda::settings.most_blocks_a_cluster;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
    return bytes <= host_cuda::settings.shared_memory ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
