// The launcher of row_stats_grad_kernel, and which rows it takes.
#include "row_stats_grad.cuh"

#include "launch.cuh"

namespace minillm::cuda {

static int64_t shared_bytes(int64_t V, DType type) { return 2 * held_bytes(V, size_of(type)); }

bool holds_rows(int64_t N, int64_t V, DType type) {
    constexpr int64_t OWN = 1 << 10;  // what the kernel has beside the rows
    int device = 0, shared_memory = 0, processors = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    return N >= processors && splits(N, V) <= MAX_PARTS && shared_bytes(V, type) + OWN <= shared_memory;
}

std::string row_stats_grad(const StatsGradArgs& a, const Launch& l) {
    if (a.N == 0) return "";
    if (!a.teacher || a.student.dtype != a.teacher.dtype)
        return "row_stats_grad_kernel: takes a student and a teacher of one type";
    const int parts = splits(a.N, a.V);
    if (parts > MAX_PARTS)
        return "row_stats_grad_kernel: " + std::to_string(a.V) + " columns are more than a block can hold";
    return with_type(a.student.dtype, [&](auto s) {
        using S = decltype(s);
        return launch("row_stats_grad_kernel", a, l, row_stats_grad_kernel<S, S>, a.N, shared_bytes(a.V, a.student.dtype),
                      a, parts);
    });
}

}  // namespace minillm::cuda
