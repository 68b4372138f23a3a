// defines: row_stats_kernel, row_stats_finish_kernel
//
// Every statistic of a row (pair) in one read: 2V elements, two exponentials an element. Each thread keeps the RowState
// (rowmath/state.h) of its columns; shuffles, then shared memory, merge the block's in a fixed order; a second kernel merges
// those of a row's parts and forms the statistics.
//
// A chunk is first summed as if all its columns were in the support, from the origins that the thread already has: no masks,
// no search for the maximum. Its sums tell whether that was right: a column of -inf, NaN, a value outside exp2's range makes
// one of them NaN or infinite, a logit more than 2^8 above its origin makes Z large. Then the chunk, still in registers, is
// summed again from its own maxima, which become the origins (a thread's first chunk begins there), and if that fails too,
// with masks. fp32 throughout: a chunk adds 16 terms, a thread a few dozen chunks; the statistics are formed in double from
// the merged state.
#pragma once

#include "rows.cuh"

namespace minillm::cuda {

constexpr float MAX_SUM = 256.0f;

template <class T>
__device__ bool acceptable(const PairSums<float>& x) {
    if constexpr (std::is_same_v<T, NoTeacher>) return x.Zs < MAX_SUM && fabsf(x.B) <= FLT_MAX;
    return x.Zs < MAX_SUM && x.Zt < MAX_SUM && fabsf(x.A + x.B + x.C) <= FLT_MAX;
}

// Of a chunk whose logits are a(i), b(i), as if all were in the support.
template <class T, class A, class B>
__device__ PairSums<float> plain_sums(const A& a, const B& b, float ms, float mt, float k) {
    PairSums<float> sums = {};
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
        if constexpr (std::is_same_v<T, NoTeacher>)
            sums.add_student((a(i) - ms) * k);
        else
            sums.add((a(i) - ms) * k, (b(i) - mt) * k);
    }
    return sums;
}

// The state of n columns whose logits are a(i), b(i), by masks and from their own maxima.
template <int N, class T, class A, class B>
__device__ RowState<float> masked_state(const A& a, const B& b, float k) {
    constexpr bool pair = !std::is_same_v<T, NoTeacher>;
    float ms = -INFINITY, mt = -INFINITY;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const bool out = pair ? outside(a(i), b(i)) : a(i) == -INFINITY;
        ms = max_of(out ? -INFINITY : a(i), ms);
        if constexpr (pair) mt = max_of(out ? -INFINITY : b(i), mt);
    }
    PairSums<float> sums = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if constexpr (pair) {
            const bool out = outside(a(i), b(i));
            sums.add(relative(a(i), ms, k, out), relative(b(i), mt, k, out));
        } else {
            sums.add_student(relative(a(i), ms, k, a(i) == -INFINITY));
        }
    }
    return RowState<float>::of(ms, mt, sums);
}

template <class S, class T>
__device__ RowState<float> part_state(const S* s, const T* t, const Columns<S, T>& c, const Part& part, float inv_T) {
    constexpr bool pair = !std::is_same_v<T, NoTeacher>;
    constexpr int W = Columns<S, T>::WIDTH;
    const float k = inv_T * float(LOG2E);
    const auto student_row = c.row(s);
    const auto teacher_row = c.row(t);
    RowState<float> state = RowState<float>::empty();
    for (int chunk = part.first; chunk < part.last; ++chunk) {
        const Chunk<S, T, CHUNK> columns(c, student_row, teacher_row, chunk);
        const auto student = [&](int i) { return columns.s[i / W][i % W]; };
        const auto teacher = [&](int i) { return columns.t[i / W][i % W]; };
        PairSums<float> sums;
        if (!state.is_empty()) {
            sums = plain_sums<T>(student, teacher, state.ms, state.mt, k);
            if (acceptable<T>(sums)) {
                state = added(state, RowState<float>::of(state.ms, state.mt, sums));
                continue;
            }
        }
        float ms = student(0), mt = teacher(0);
#pragma unroll
        for (int i = 1; i < CHUNK; ++i) {
            ms = max_of(student(i), ms);
            if constexpr (pair) mt = max_of(teacher(i), mt);
        }
        if constexpr (!pair) mt = -INFINITY;
        sums = plain_sums<T>(student, teacher, ms, mt, k);
        if (acceptable<T>(sums)) {
            state = merge(state, RowState<float>::of(ms, mt, sums), inv_T);
            continue;
        }
#pragma unroll
        for (int j = 0; j < c.UNITS; ++j) {
            const auto s_j = [&](int i) { return student(j * W + i); };
            const auto t_j = [&](int i) { return teacher(j * W + i); };
            state = merge(state, masked_state<W, T>(s_j, t_j, k), inv_T);
        }
    }
    const int v = part.is_last ? c.single() : -1;
    if (v >= 0) {
        const float x = student_row[v], y = teacher_row[v];
        state = merge(state, masked_state<1, T>([&](int) { return x; }, [&](int) { return y; }, k), inv_T);
    }
    return state;
}

__device__ inline RowState<double> widen(const RowState<float>& x) { return {x.ms, x.mt, x.Zs, x.Zt, x.A, x.B, x.C}; }

// One thread: the statistics of a row.
__device__ inline void write_stats(const StatsArgs& a, int64_t row, const RowState<float>& state) {
    const RowState<double> x = widen(state);
    double out[STATISTICS];
    finish(x, a.inv_T, bool(a.teacher), out);
    if (a.token_ids != nullptr) {
        const int64_t y = a.token_ids[row];
        double logprob_s = NAN, logprob_t = NAN;  // no synchronisation to raise an error for a token that does not exist
        if (0 <= y && y < a.V) {
            const float s = value_at(a.student, row, y), t = a.teacher ? value_at(a.teacher, row, y) : s;
            const bool is_outside = outside(s, t) && !x.is_empty();
            logprob_s = is_outside ? -INFINITY : (double(s) - x.ms) * a.inv_T - out[STUDENT_LOGZ];
            logprob_t = is_outside ? -INFINITY : (double(t) - x.mt) * a.inv_T - out[TEACHER_LOGZ];
        }
        out[STUDENT_LOGPROB] = logprob_s;
        if (a.teacher) out[TEACHER_LOGPROB] = logprob_t;
    }
#pragma unroll
    for (int i = 0; i < STATISTICS; ++i) store_one(a.stats + i * a.N + row, float(out[i]));
}

// In lane 0: all lanes' states, rebased to the warp's maxima and added.
__device__ inline RowState<float> warp_merge(RowState<float> x, float inv_T) {
    const auto larger = [](float a, float b) { return max_of(a, b); };
    const float ms = __shfl_sync(ALL_LANES, warp_reduce(x.ms, larger), 0);
    const float mt = __shfl_sync(ALL_LANES, warp_reduce(x.mt, larger), 0);
    x = rebased(x, ms, mt, inv_T);
    return warp_reduce(x, [](const RowState<float>& a, const RowState<float>& b) { return added(a, b); });
}

struct MergeStates {
    float inv_T;
    __device__ RowState<float> operator()(const RowState<float>& a, const RowState<float>& b) const {
        return merge(a, b, inv_T);
    }
};

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
        const RowState<float> state = across_warps(warp_merge(part_state(s, t, c, part, inv_T), inv_T), MergeStates{inv_T});
        if (threadIdx.x == 0) states[index] = state;
    }
}

// A warp a row.
static __global__ void __launch_bounds__(THREADS, BLOCKS)
    row_stats_finish_kernel(StatsArgs a, int splits, const RowState<float>* states) {
    const int lane = threadIdx.x % WARP;
    const MergeStates merge_states = {float(a.inv_T)};
    for (int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP; row < a.N; row += int64_t(gridDim.x) * WARPS) {
        if (unread(a.mask, row)) {
            for (int i = lane; i < STATISTICS; i += WARP) store_one(a.stats + i * a.N + row, 0.0f);
            continue;
        }
        RowState<float> state = RowState<float>::empty();
        for (int64_t i = lane; i < splits; i += WARP) state = merge_states(state, states[row * splits + i]);
        state = warp_merge(state, merge_states.inv_T);
        if (lane == 0) write_stats(a, row, state);
    }
}

}  // namespace minillm::cuda
