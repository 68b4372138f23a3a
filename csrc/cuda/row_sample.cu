// The launchers of the row_sample kernels.
#include "row_sample_filter.cuh"

#include "launch.cuh"

namespace minillm::cuda {

static int64_t tiles(int64_t V) { return (V + TILE - 1) / TILE; }

int64_t workspace(const SampleArgs& a) {
    const int64_t masses = 2 * tiles(a.V) * int64_t(sizeof(TileMass)), best = splits(a.N, a.V) * int64_t(sizeof(Best));
    return a.N * (masses + best + 2 * int64_t(sizeof(float)));
}

std::string row_sample(const SampleArgs& a, const Launch& l) {
    if (a.N == 0) return "";
    SampleBuffers buffers;
    buffers.tiles = int(tiles(a.V));
    buffers.splits = splits(a.N, a.V);
    buffers.filtered = a.top_p < 1.0 || (a.top_k > 0 && a.top_k < a.V);
    buffers.masses = static_cast<TileMass*>(l.workspace);
    buffers.best = reinterpret_cast<Best*>(buffers.masses + 2 * a.N * buffers.tiles);
    buffers.cutoffs = reinterpret_cast<float*>(buffers.best + a.N * buffers.splits);
    const int64_t laws = a.teacher ? 2 * a.N : a.N;
    const std::string error = with_types(a.student, a.teacher, [&](auto s, auto t) {
        using S = decltype(s);
        using T = decltype(t);
        const auto masses = [&](bool filtered) {
            SampleBuffers b = buffers;
            b.filtered = filtered;
            return launch("row_sample_mass_kernel", a, l, row_sample_mass_kernel<S, T>,
                          {(laws * buffers.tiles + WARPS - 1) / WARPS}, a, b);
        };
        std::string error = masses(false);
        if (error.empty() && buffers.filtered) {
            error = launch("row_sample_filter_kernel", a, l, row_sample_filter_kernel<S, T>, {laws}, a, buffers);
            if (error.empty()) error = masses(true);
        }
        if (error.empty() && a.greedy)
            error = launch("row_sample_argmax_kernel", a, l, row_sample_argmax_kernel<S, T>, {a.N * buffers.splits}, a,
                           buffers);
        return error;
    });
    if (!error.empty()) return error;
    return launch("row_sample_draw_kernel", a, l, row_sample_draw_kernel, {(a.N + WARPS - 1) / WARPS}, a, buffers);
}

}  // namespace minillm::cuda
