// defines: row_stats_kernel, row_stats_finish_kernel
//
// Every statistic of a row (pair) in one read: 2V elements, two exponentials an element. Each thread keeps the RowState of its
// columns; shuffles, then shared memory, merge the block's in a fixed order; a second kernel merges those of a row's parts and
// forms the statistics.
#pragma once

#include "row_state.cuh"

namespace minillm::cuda {

// states: [N, splits].
template <class S, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS) row_stats_kernel(StatsArgs a, int splits, RowState<float>* states) {
    const float inv_T = float(a.inv_T);
    for (int64_t index = blockIdx.x; index < a.N * splits; index += gridDim.x) {
        const int64_t row = index / splits;
        if (unread(a.mask, row)) continue;
        const S* s = row_of<S>(a.student, row);
        const T* t = row_of<T>(a.teacher, row);
        const Columns<S, T> c(a.V);
        const Part part(c, int(index % splits), splits);
        const Single<S, T> single(c, s, t, part.is_last);
        RowState<float> state = RowState<float>::empty();
        add_chunks(state, c, c.row(s), c.row(t), part.first, part.last, inv_T);
        add_single(state, single, inv_T);
        state = block_merge(state, inv_T);
        if (threadIdx.x == 0) states[index] = state;
    }
}

// A warp a row.
static __global__ void __launch_bounds__(THREADS, BLOCKS)
    row_stats_finish_kernel(StatsArgs a, int splits, const RowState<float>* states) {
    const int lane = threadIdx.x % WARP;
    for (int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP; row < a.N; row += int64_t(gridDim.x) * WARPS) {
        double out[STATISTICS] = {};
        if (!unread(a.mask, row)) {
            const RowState<float> state = merge_parts(states + row * splits, splits, float(a.inv_T));
            if (lane == 0) form_stats(a, TokenLogits(a, a.token_ids, row), state, out);
        }
        if (lane != 0) continue;
#pragma unroll
        for (int i = 0; i < STATISTICS; ++i) store_one(a.stats + i * a.N + row, float(out[i]));
    }
}

}  // namespace minillm::cuda
