// The launcher of row_stats_grad_kernel, and which rows it takes.
#include "row_stats_grad.cuh"

#include <atomic>

#include "launch.cuh"

namespace minillm::cuda {

// How a row pair is held.
struct Held {
    int blocks;  // one, or a cluster of more; 0: it is too long
    int64_t bytes;  // of a block's shared memory
};

static Held held(int64_t V, DType type, int blocks) { return {blocks, 2 * held_bytes(slice_of(V, blocks), size_of(type))}; }

static int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    cudaDeviceGetAttribute(&value, which, device);
    return value;
}

// 8 is the most that every device with clusters takes whole; a part of a device (MIG) may have room for less, and a device or
// code before compute capability 9.0 has none. Asked once a device.
static int most_blocks_a_cluster(int device) {
    constexpr int DEVICES = 64, MOST = 8;
    static std::atomic<int> known[DEVICES];  // 0: not asked yet
    if (device >= DEVICES) return 1;
    if (const int most = known[device]) return most;
    const auto kernel = row_stats_grad_kernel<float, float, true>;
    const void* const function = reinterpret_cast<const void*>(kernel);
    int most = 1;
    cudaFuncAttributes code = {};
    if (attribute(cudaDevAttrClusterLaunch, device) != 0 && cudaFuncGetAttributes(&code, function) == cudaSuccess &&
        code.ptxVersion >= 90) {
        const int bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - int(code.sharedSizeBytes);
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        cudaLaunchAttribute clusters = {};
        clusters.id = cudaLaunchAttributeClusterDimension;
        cudaLaunchConfig_t how = {};
        how.blockDim = dim3(THREADS);
        how.dynamicSmemBytes = size_t(bytes);
        how.attrs = &clusters;
        how.numAttrs = 1;
        for (most = MOST; most > 1; most /= 2) {
            int at_once = 0;
            how.gridDim = dim3(unsigned(most));
            clusters.val.clusterDim = {unsigned(most), 1, 1};
            if (cudaOccupancyMaxActiveClusters(&at_once, function, &how) == cudaSuccess && at_once > 0) break;
        }
    }
    cudaGetLastError();  // what was refused here is no error of a launch
    return known[device] = most;
}

// As few blocks a row as leave room for a second one on a multiprocessor, which loads while the first one computes; or, where
// there is no room for two, as few as can hold it.
static Held how_to_hold(int64_t V, DType type) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return held(V, type, 1);  // the launch says what is missing
    constexpr int64_t OWN = 1 << 10;  // what the kernel has beside the rows
    const int64_t of_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const int64_t of_all = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    const int64_t reserved = attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
    Held alone = {0, 0};
    for (int blocks = 1, most = most_blocks_a_cluster(device); blocks <= most; blocks *= 2) {
        const Held x = held(V, type, blocks);
        if (x.bytes + OWN > of_block) continue;
        if (2 * (x.bytes + OWN + reserved) <= of_all) return x;
        if (alone.blocks == 0) alone = x;
    }
    return alone;
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
        const auto kernel = x.blocks == 1 ? row_stats_grad_kernel<S, S, false> : row_stats_grad_kernel<S, S, true>;
        return launch("row_stats_grad_kernel", a, l, kernel, shape, a, x.blocks);
    });
}

}  // namespace minillm::cuda
