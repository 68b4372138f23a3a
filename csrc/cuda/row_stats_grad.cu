// The launcher of row_stats_grad_kernel, and which rows it takes.
#include "row_stats_grad.cuh"

#include <atomic>

#include "launch.cuh"

namespace minillm::cuda {

// How a row pair is held.
struct Held {
    int blocks;     // one, or a cluster of two; 0: it is too long
    int64_t bytes;  // of a block's shared memory
};

constexpr int PAIR = 2;  // blocks a cluster

static int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    cudaDeviceGetAttribute(&value, which, device);
    return value;
}

// Whether blocks of this device run in pairs: a device or code before compute capability 9.0 has no clusters, and a part of a
// device (MIG) may have no room for one. Asked once a device.
static bool takes_pairs(int device) {
    constexpr int DEVICES = 64, NO = 1, YES = 2;
    static std::atomic<int> known[DEVICES];  // 0: not asked yet
    if (device >= DEVICES) return false;
    if (const int answer = known[device]) return answer == YES;
    const auto kernel = row_stats_grad_kernel<float, float, PAIR>;
    const void* const function = reinterpret_cast<const void*>(kernel);
    int at_once = 0;
    cudaFuncAttributes code = {};
    if (attribute(cudaDevAttrClusterLaunch, device) != 0 && cudaFuncGetAttributes(&code, function) == cudaSuccess &&
        code.ptxVersion >= 90) {
        const int bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) / 2 -
                          attribute(cudaDevAttrReservedSharedMemoryPerBlock, device) - int(code.sharedSizeBytes);
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        cudaLaunchAttribute clusters = {};
        clusters.id = cudaLaunchAttributeClusterDimension;
        clusters.val.clusterDim = {PAIR, 1, 1};
        cudaLaunchConfig_t how = {};
        how.gridDim = dim3(PAIR);
        how.blockDim = dim3(THREADS);
        how.dynamicSmemBytes = size_t(bytes);
        how.attrs = &clusters;
        how.numAttrs = 1;
        if (cudaOccupancyMaxActiveClusters(&at_once, function, &how) != cudaSuccess) at_once = 0;
    }
    cudaGetLastError();  // what was refused here is no error of a launch
    known[device] = at_once > 0 ? YES : NO;
    return at_once > 0;
}

// By one block or two, where a multiprocessor has room for a second row, which loads while the first one computes. Longer
// rows are faster in two launches: 8192 of 128256 bf16 columns took an H100 3.7 ms in two launches, which move 10 bytes a
// column at 0.94 of the bandwidth of a copy, and 4.6 ms in clusters of 8, which move 6 and wait for each other.
static Held how_to_hold(int64_t V, DType type) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return {1, 2 * held_bytes(V, size_of(type))};  // the launch says what is missing
    constexpr int64_t OWN = 1 << 10;  // what the kernel has beside the rows
    const int64_t of_all = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    const int64_t reserved = attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
    for (int blocks = 1; blocks <= (takes_pairs(device) ? PAIR : 1); ++blocks) {
        const Held x = {blocks, 2 * held_bytes(slice_of(V, blocks), size_of(type))};
        if (2 * (x.bytes + OWN + reserved) <= of_all) return x;
    }
    return {0, 0};
}

bool holds_rows(int64_t N, int64_t V, DType type) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    const int64_t blocks = how_to_hold(V, type).blocks;
    return blocks > 0 && N * blocks >= attribute(cudaDevAttrMultiProcessorCount, device);
}

std::string row_stats_grad(const StatsGradArgs& a, const Launch& l) {
    if (a.N == 0) return "";
    if (!a.teacher || a.student.dtype != a.teacher.dtype)
        return "row_stats_grad_kernel: takes a student and a teacher of one type";
    const Held x = how_to_hold(a.V, a.student.dtype);
    if (x.blocks == 0) return "row_stats_grad_kernel: " + std::to_string(a.V) + " columns are more than this device holds";
    const Grid shape = {a.N * x.blocks, x.bytes, x.blocks};
    return with_type(a.student.dtype, [&](auto s) {
        using S = decltype(s);
        const auto kernel = x.blocks == 1 ? row_stats_grad_kernel<S, S, 1> : row_stats_grad_kernel<S, S, PAIR>;
        return launch("row_stats_grad_kernel", a, l, kernel, shape, a);
    });
}

}  // namespace minillm::cuda
