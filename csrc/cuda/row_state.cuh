// defines: add_chunks, add_single, warp_merge, block_merge, merge_parts, TokenLogits, form_stats: the state of a row (rowmath/state.h) by a block
//
// A chunk is first summed as if all its columns were in the support, from the origins that the thread already has: no masks,
// no search for the maximum. Its sums tell whether that was right: a column of -inf, NaN, a value outside exp2's range makes
// one of them NaN or infinite, a logit more than 2^8 above its origin makes Z large. Then the chunk, still in registers, is
// summed again from its own maxima, which become the origins (a thread's first chunk begins there), and if that fails too,
// with masks. fp32 throughout: a chunk adds 16 or 32 terms, a thread a few dozen chunks; the statistics are formed in double from
// the merged state.
#pragma once

#include "tiles.cuh"

namespace minillm::cuda {

constexpr float MAX_SUM = 256.0f;

template <class T>
__device__ bool acceptable(const PairSums<float>& x) {
    if constexpr (std::is_same_v<T, NoTeacher>) return x.Zs < MAX_SUM && fabsf(x.B) <= FLT_MAX;
    return x.Zs < MAX_SUM && x.Zt < MAX_SUM && fabsf(x.A + x.B + x.C) <= FLT_MAX;
}

// Of N columns whose logits are a(i), b(i), as if all were in the support.
template <int N, class T, class A, class B>
__device__ PairSums<float> plain_sums(const A& a, const B& b, float ms, float mt, float k) {
    PairSums<float> sums = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
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

// Chunks [first, last) of a row pair, added to the thread's state.
template <class S, class T, int W>
__device__ void add_chunks(RowState<float>& state, const Columns<S, T>& c, const Row<S, W>& student_row,
                           const Row<T, W>& teacher_row, int first, int last, float inv_T) {
    constexpr bool pair = !std::is_same_v<T, NoTeacher>;
    constexpr int N = Columns<S, T>::COLUMNS;
    const float k = inv_T * float(LOG2E);
    for (int chunk = first; chunk < last; ++chunk) {
        const Chunk<S, T, N> columns(c, student_row, teacher_row, chunk);
        const auto student = [&](int i) { return columns.s[i / W][i % W]; };
        const auto teacher = [&](int i) { return columns.t[i / W][i % W]; };
        PairSums<float> sums;
        if (!state.is_empty()) {
            sums = plain_sums<N, T>(student, teacher, state.ms, state.mt, k);
            if (acceptable<T>(sums)) {
                state = added(state, RowState<float>::of(state.ms, state.mt, sums));
                continue;
            }
        }
        float ms = student(0), mt = teacher(0);
#pragma unroll
        for (int i = 1; i < N; ++i) {
            ms = max_of(student(i), ms);
            if constexpr (pair) mt = max_of(teacher(i), mt);
        }
        if constexpr (!pair) mt = -INFINITY;
        sums = plain_sums<N, T>(student, teacher, ms, mt, k);
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
}

template <class S, class T>
__device__ void add_single(RowState<float>& state, const Single<S, T>& one, float inv_T) {
    if (one.v < 0) return;
    const float x = one.student(), y = one.teacher(), k = inv_T * float(LOG2E);
    state = merge(state, masked_state<1, T>([&](int) { return x; }, [&](int) { return y; }, k), inv_T);
}

__device__ inline RowState<double> widen(const RowState<float>& x) { return {x.ms, x.mt, x.Zs, x.Zt, x.A, x.B, x.C}; }

// Of the token of a row whose log-probability is asked for; NaN where it does not exist: an error would need a synchronisation.
struct TokenLogits {
    bool asked;
    float s = NAN, t = NAN;

    __device__ TokenLogits(const Pair& a, const int64_t* token_ids, int64_t row) : asked(token_ids != nullptr) {
        const int64_t y = asked ? token_ids[row] : -1;
        if (y < 0 || y >= a.V) return;
        s = value_at(a.student, row, y);
        t = a.teacher ? value_at(a.teacher, row, y) : s;
    }
};

// By one thread: the statistics of a row.
__device__ inline void form_stats(const Pair& a, const TokenLogits& y, const RowState<float>& state,
                                  double (&out)[STATISTICS]) {
    const RowState<double> x = widen(state);
    finish(x, a.inv_T, bool(a.teacher), out);
    if (!y.asked) return;
    const bool is_outside = outside(y.s, y.t) && !x.is_empty();
    const double logprob_s = is_outside ? -INFINITY : (double(y.s) - x.ms) * a.inv_T - out[STUDENT_LOGZ];
    const double logprob_t = is_outside ? -INFINITY : (double(y.t) - x.mt) * a.inv_T - out[TEACHER_LOGZ];
    out[STUDENT_LOGPROBS] = logprob_s;
    if (a.teacher) out[TEACHER_LOGPROBS] = logprob_t;
}

// In lane 0: the states of the first LANES lanes, rebased to their maxima and added.
template <int LANES = WARP>
__device__ RowState<float> warp_merge(RowState<float> x, float inv_T) {
    const auto larger = [](float a, float b) { return max_of(a, b); };
    const float ms = __shfl_sync(ALL_LANES, warp_reduce<LANES>(x.ms, larger), 0);
    const float mt = __shfl_sync(ALL_LANES, warp_reduce<LANES>(x.mt, larger), 0);
    x = rebased(x, ms, mt, inv_T);
    return warp_reduce<LANES>(x, [](const RowState<float>& a, const RowState<float>& b) { return added(a, b); });
}

// In thread 0, by the whole block.
__device__ inline RowState<float> block_merge(const RowState<float>& x, float inv_T) {
    return across_warps(warp_merge(x, inv_T), [=](const RowState<float>& y) { return warp_merge<WARPS>(y, inv_T); });
}

// In lane 0, by a warp: the state of a row from those of its parts.
__device__ inline RowState<float> merge_parts(const RowState<float>* parts, int splits, float inv_T) {
    RowState<float> state = RowState<float>::empty();
    for (int i = threadIdx.x % WARP; i < splits; i += WARP) state = merge(state, parts[i], inv_T);
    return warp_merge(state, inv_T);
}

}  // namespace minillm::cuda
