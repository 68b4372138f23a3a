// defines: row_stats_grad_kernel, held_bytes, slice_of
//
// The statistics of row_stats and the gradient of row_grad in one launch, for coefficients that are known beforehand: a block
// holds a row pair in shared memory, so the logits are read once. 2V elements read and V written, 6V bytes in bf16, where
// two launches move 10V. A multiprocessor holds two rows, one of which loads while the other one computes: V = 28000 in bf16 on
// an H100 or B200, 20000 on an A100.
//
// Rows of up to twice that are held by a cluster of two blocks, a slice each, which is to its block what a row is to a block
// alone. The blocks of a row read each other's states, and each forms the statistics itself from the same numbers: one wait
// a row.
//
// The rows arrive by asynchronous copies of 16 bytes (cp.async, from sm_80 on), all of them under way at once, in PIECES that
// are summed while the next ones arrive. A row keeps its distance to an aligned address, so the functions of row_state.cuh
// and row_grad.cuh find it as they would in global memory.
#pragma once

#include "cluster.cuh"
#include "row_grad.cuh"
#include "row_state.cuh"

namespace minillm::cuda {

constexpr int PIECES = 8;

// 16 bytes from global to shared memory, both aligned.
__device__ inline void copy_async(void* to, const void* from) {
    MINILLM_TOUCH(from, 16, false);
#if !defined(__CUDACC__)
    host_cuda::copy_async(to, from);
#elif __CUDA_ARCH__ >= 800
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#else
    *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
}
// A thread's copies since the last call are a group.
__device__ inline void commit_copies() {
#if !defined(__CUDACC__)
    host_cuda::commit_copies();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until no more than N of the thread's groups are under way.
template <int N>
__device__ void wait_for_copies() {
#if !defined(__CUDACC__)
    host_cuda::wait_for_copies(N);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Shared memory for a row, wherever it lies modulo 16 bytes.
MINILLM_HD int64_t held_bytes(int64_t V, int64_t element) { return (V * element + 15) / 16 * 16 + 16; }

// The columns of a row that each block of a cluster takes, the last one what is left: vectors lie in one slice.
MINILLM_HD int64_t slice_of(int64_t V, int blocks) { return blocks == 1 ? V : (V + 8 * blocks - 1) / (8 * blocks) * 8; }

// A row on its way to shared memory.
template <class E>
struct HeldRow {
    static constexpr int W = 16 / sizeof(E);
    const E* from;
    E* at;
    int V, lead, vectors;  // columns before the first aligned vector, and the vectors

    __device__ HeldRow(char* memory, const E* from, int V) : from(from), V(V) {
        const unsigned behind = reinterpret_cast<uintptr_t>(from) % 16;
        at = reinterpret_cast<E*>(memory + behind);
        lead = min(int((16 - behind) % 16 / sizeof(E)), V);
        vectors = (V - lead) / W;
    }
    // The vectors that begin in columns [begin, end).
    __device__ void copy(int begin, int end) const {
        for (int i = vectors_before(begin) + int(threadIdx.x); i < vectors_before(end); i += THREADS)
            copy_async(at + lead + i * W, from + lead + i * W);
    }
    // What no vector holds, less than W columns on either side.
    __device__ void copy_edges() const {
        const int i = threadIdx.x, v = i < lead ? i : i + vectors * W;
        if (v < V) at[v] = load_raw(from + v);
    }

private:
    __device__ int vectors_before(int column) const { return column <= lead ? 0 : min((column - lead + W - 1) / W, vectors); }
};

struct RowStatistics {
    float of[STATISTICS];
};

template <class S, class T, int BLOCKS_A_ROW>
__global__ void __launch_bounds__(THREADS, BLOCKS) row_stats_grad_kernel(StatsGradArgs a) {
    if constexpr (BLOCKS_A_ROW > 1 && !MINILLM_CLUSTERS) return;
    MINILLM_DYNAMIC_SHARED(memory);
    MINILLM_SHARED(RowState<float>, mine);
    MINILLM_SHARED(RowStatistics, stats);
    const float inv_T = float(a.inv_T);
    const Cluster<BLOCKS_A_ROW> cluster = {};
    const int slice = int(slice_of(a.V, BLOCKS_A_ROW)), first = min(cluster.rank() * slice, int(a.V));
    const bool is_last = cluster.rank() + 1 == BLOCKS_A_ROW;
    const Columns<S, T> c(min(slice, int(a.V) - first));
    const int chunks_a_piece = (c.chunks() + PIECES - 1) / PIECES, columns_a_piece = chunks_a_piece * c.COLUMNS * THREADS;
    for (int64_t row = blockIdx.x / BLOCKS_A_ROW; row < a.N; row += gridDim.x / BLOCKS_A_ROW) {
        S* g = row_of<S>(a.grad, row) + first;
        const auto columns = gradient_columns<Columns<S, T>>(g, c.V);
        const Part whole(columns, 0, 1);
        if (is_last) write_zeros_behind(g, columns, int(a.width) - first, whole);
        if (!has_gradient(a, row, 1.0f)) {
            write_zeros(g, columns, whole);
            if (first == 0 && threadIdx.x < STATISTICS) store_one(a.stats_out + threadIdx.x * a.N + row, 0.0f);
            continue;
        }
        const HeldRow<S> s(memory, row_of<S>(a.student, row) + first, c.V);
        const HeldRow<T> t(memory + held_bytes(slice, sizeof(S)), row_of<T>(a.teacher, row) + first, c.V);
        s.copy_edges();
        t.copy_edges();
#pragma unroll 1
        for (int i = 0; i < PIECES; ++i) {
            const int begin = i == 0 ? 0 : min(c.head + i * columns_a_piece, c.V);
            const int end = i + 1 < PIECES ? min(c.head + (i + 1) * columns_a_piece, c.V) : c.V;
            s.copy(begin, end);
            t.copy(begin, end);
            commit_copies();
        }
        const auto student_row = c.row(s.at);
        const auto teacher_row = c.row(t.at);
        RowState<float> state = RowState<float>::empty();
#pragma unroll 1
        for (int i = 0; i < PIECES; ++i) {
            wait_for_copies<PIECES - 1>();
            commit_copies();  // an empty group, so that the next turn waits for the next piece
            __syncthreads();
            add_chunks(state, c, student_row, teacher_row, min(i * chunks_a_piece, c.chunks()),
                       min((i + 1) * chunks_a_piece, c.chunks()), inv_T);
        }
        add_single(state, Single<S, T>(c, s.at, t.at), inv_T);
        state = block_merge(state, inv_T);
        if (BLOCKS_A_ROW > 1 && threadIdx.x == 0) mine = state;
        // Before another block may write its gradient, perhaps over the student.
        const TokenLogits token(a, threadIdx.x == 0 ? a.token_ids : nullptr, row);
        cluster.arrive();
        cluster.wait();  // the states of all are there
        if (threadIdx.x < WARP) {
            RowState<float> all = state;
            if constexpr (BLOCKS_A_ROW > 1) {
                all = RowState<float>::empty();
                if (int(threadIdx.x) < BLOCKS_A_ROW) all = *cluster.of_block(&mine, int(threadIdx.x));
                all = warp_merge(all, inv_T);
            }
            if (threadIdx.x == 0) {
                double out[STATISTICS];
                form_stats(a, token, all, out);
#pragma unroll
                for (int i = 0; i < STATISTICS; ++i) {
                    stats.of[i] = float(out[i]);
                    if (first == 0) store_one(a.stats_out + i * a.N + row, stats.of[i]);
                }
            }
        }
        __syncthreads();
        cluster.arrive();  // has read the others' states
        write_row_gradient(a, row, s.at, t.at, g, columns, whole, 1.0f, [&](int i) { return stats.of[i]; }, first);
        __syncthreads();  // before the next row lands where this one is read
        cluster.wait();   // before the others' memory of this row goes
    }
}

}  // namespace minillm::cuda
