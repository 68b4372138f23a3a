// defines: row_stats_kernel
//
// One block a row: each thread keeps a RowState (rowmath/state.h) of its columns, a tree merges the threads' states in a
// fixed order, and thread 0 writes the statistics. One read of the pair: 2V elements a row. No atomics, so the same bits
// every time. Plain CUDA: no torch, no Python.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <float.h>

#include "../rowmath/state.h"

namespace minillm::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

constexpr int STATS_THREADS = 256;
constexpr int STATS_COLUMNS = 4;  // columns a thread takes at a time, so that their loads are in flight together

// (z - m) log2(e)/T, kept finite: 2^x of it is 0 where it overflows or where the column is outside the support.
__device__ inline float relative(float z, float origin, float scale, bool outside) {
    return outside ? -FLT_MAX : fmaxf((z - origin) * scale, -FLT_MAX) + 0.0f * z;  // the last term keeps NaN
}

template <class S, class T>
__device__ RowState<float> thread_state(const S* s, const T* t, int64_t V, float inv_T) {
    RowState<float> state = RowState<float>::empty();
    const float scale = inv_T * float(LOG2E);
    for (int64_t base = threadIdx.x; base < V; base += int64_t(STATS_THREADS) * STATS_COLUMNS) {
        float a[STATS_COLUMNS], b[STATS_COLUMNS];
        bool out[STATS_COLUMNS];
        float ms = -INFINITY, mt = -INFINITY;
#pragma unroll
        for (int i = 0; i < STATS_COLUMNS; ++i) {
            const int64_t v = base + int64_t(i) * STATS_THREADS;
            a[i] = v < V ? widen(s[v]) : -INFINITY;
            b[i] = t == nullptr ? a[i] : v < V ? widen(t[v]) : -INFINITY;
            out[i] = 0.5f * a[i] + 0.5f * b[i] == -INFINITY;
            ms = out[i] ? ms : fmaxf(ms, a[i]);
            mt = out[i] ? mt : fmaxf(mt, b[i]);
        }
        PairSums<float> sums = {};
#pragma unroll
        for (int i = 0; i < STATS_COLUMNS; ++i)
            sums.add(relative(a[i], ms, scale, out[i]), relative(b[i], mt, scale, out[i]));
        state = merge(state, RowState<float>::of(ms, mt, sums), inv_T);
    }
    return state;
}

struct StatsParams {
    const void *student, *teacher;
    int64_t student_stride, teacher_stride, N, V;
    float inv_T;
    const uint8_t* mask;
    const int64_t* token_ids;
    float* stats;
};

template <class S, class T>
__global__ void __launch_bounds__(STATS_THREADS) row_stats_kernel(StatsParams p) {
    __shared__ RowState<float> states[STATS_THREADS];
    for (int64_t row = blockIdx.x; row < p.N; row += gridDim.x) {
        const S* s = static_cast<const S*>(p.student) + row * p.student_stride;
        const T* t = p.teacher == nullptr ? nullptr : static_cast<const T*>(p.teacher) + row * p.teacher_stride;
        const bool unread = p.mask != nullptr && p.mask[row] == 0;
        if (!unread) states[threadIdx.x] = thread_state(s, t, p.V, p.inv_T);
        for (int half = STATS_THREADS / 2; half > 0; half /= 2) {
            __syncthreads();  // the states that this round reads are written
            if (!unread && threadIdx.x < half)
                states[threadIdx.x] = merge(states[threadIdx.x], states[threadIdx.x + half], p.inv_T);
        }
        if (threadIdx.x == 0) {
            float out[STATISTICS] = {};
            if (!unread) {
                const RowState<float> x = states[0];
                finish(x, p.inv_T, t != nullptr, out);
                const int64_t y = p.token_ids == nullptr ? -1 : p.token_ids[row];
                if (p.token_ids != nullptr && y >= 0 && y < p.V) {
                    const float a = widen(s[y]), b = t == nullptr ? a : widen(t[y]);
                    const bool outside = 0.5f * a + 0.5f * b == -INFINITY && !x.is_empty();
                    out[STUDENT_LOGPROB] = outside ? -INFINITY : (a - x.ms) * p.inv_T - out[STUDENT_LOGZ];
                    if (t != nullptr)
                        out[TEACHER_LOGPROB] = outside ? -INFINITY : (b - x.mt) * p.inv_T - out[TEACHER_LOGZ];
                } else if (p.token_ids != nullptr) {  // no synchronisation to raise an error: NaN
                    out[STUDENT_LOGPROB] = out[TEACHER_LOGPROB] = NAN;
                }
            }
            for (int i = 0; i < STATISTICS; ++i) p.stats[i * p.N + row] = out[i];
        }
        __syncthreads();  // before the next row overwrites the states
    }
}

}  // namespace minillm::cuda
