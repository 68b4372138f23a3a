// The launcher of row_stats_kernel and row_stats_finish_kernel.
#include "row_stats.cuh"

#include "launch.cuh"

namespace minillm::cuda {

int64_t workspace(const StatsArgs& a) { return a.N * splits(a.N, a.V) * int64_t(sizeof(RowState<float>)); }

std::string row_stats(const StatsArgs& a, const Launch& l) {
    if (a.N == 0) return "";
    const int parts = splits(a.N, a.V);
    auto* states = static_cast<RowState<float>*>(l.workspace);
    const std::string error = with_types(a.student, a.teacher, [&](auto s, auto t) {
        return launch("row_stats_kernel", a, l, row_stats_kernel<decltype(s), decltype(t)>, {a.N * parts}, a, parts, states);
    });
    if (!error.empty()) return error;
    return launch("row_stats_finish_kernel", a, l, row_stats_finish_kernel, {(a.N + WARPS - 1) / WARPS}, a, parts, states);
}

}  // namespace minillm::cuda
