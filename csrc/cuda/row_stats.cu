// The launcher of row_stats_kernel.
#include "launch.h"
#include "row_stats.cuh"

namespace minillm::cuda {

template <class S, class T>
static std::string launch(const StatsArgs& a, cudaStream_t stream) {
    const StatsParams p = {a.student.data, a.teacher.data, a.student.stride, a.teacher.stride, a.N,    a.V,
                           a.inv_T,        a.mask,         a.token_ids,      a.stats};
    const unsigned grid = unsigned(a.N < 1 << 20 ? a.N : 1 << 20);  // the kernel strides over the rest
    row_stats_kernel<S, T><<<grid, STATS_THREADS, 0, stream>>>(p);
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return "";
    return std::string("row_stats_kernel<<<") + std::to_string(grid) + ", " + std::to_string(STATS_THREADS) +
           ">>> on " + std::to_string(a.N) + " x " + std::to_string(a.V) + " logits: " + cudaGetErrorString(error);
}

template <class S>
static std::string launch_with_teacher(const StatsArgs& a, cudaStream_t stream) {
    if (a.teacher.data == nullptr || a.teacher.dtype == 0) return launch<S, float>(a, stream);
    return a.teacher.dtype == 1 ? launch<S, __nv_bfloat16>(a, stream) : launch<S, __half>(a, stream);
}

std::string launch_row_stats(const StatsArgs& a, void* stream) {
    if (a.N == 0) return "";
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    if (a.student.dtype == 0) return launch_with_teacher<float>(a, s);
    return a.student.dtype == 1 ? launch_with_teacher<__nv_bfloat16>(a, s) : launch_with_teacher<__half>(a, s);
}

}  // namespace minillm::cuda
