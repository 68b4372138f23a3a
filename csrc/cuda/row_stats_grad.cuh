// defines: row_stats_grad_kernel, held_bytes, MAX_PARTS
//
// The statistics of row_stats and the gradient of row_grad in one launch, for coefficients that are known beforehand: a block
// holds a row pair in shared memory, so the logits are read once. 2V elements read and V written, 6V bytes in bf16, where
// two launches move 10V. An H100 or B200 holds 227 KB, V = 57800 in bf16; an A100 163 KB, V = 41000.
//
// The rows arrive by asynchronous copies of 16 bytes (cp.async, from sm_80 on), all of them under way at once, in PIECES that
// are summed while the next ones arrive. A row keeps its distance to an aligned address, so the functions of row_state.cuh
// and row_grad.cuh find it as they would in global memory. Its parts are those of row_stats, summed one after the other:
// the results have the same bits as the two launches'.
#pragma once

#include "row_grad.cuh"
#include "row_state.cuh"

namespace minillm::cuda {

constexpr int PIECES = 8, MAX_PARTS = 8;

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
    // The vectors that begin in columns [first, last).
    __device__ void copy(int first, int last) const {
        for (int i = vectors_before(first) + int(threadIdx.x); i < vectors_before(last); i += THREADS)
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

struct PartStates {
    RowState<float> of[MAX_PARTS];
};
struct RowStatistics {
    float of[STATISTICS];
};

template <class S, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS) row_stats_grad_kernel(StatsGradArgs a, int splits) {
    MINILLM_DYNAMIC_SHARED(memory);
    MINILLM_SHARED(PartStates, parts);
    MINILLM_SHARED(RowStatistics, stats);
    const float inv_T = float(a.inv_T);
    const Columns<S, T> c(a.V);
    const int chunks_a_piece = (c.chunks() + PIECES - 1) / PIECES, columns_a_piece = chunks_a_piece * CHUNK * THREADS;
    for (int64_t row = blockIdx.x; row < a.N; row += gridDim.x) {
        S* g = row_of<S>(a.grad, row);
        const auto columns = gradient_columns<Columns<S, T>>(g, a.V);
        const Part whole(columns, 0, 1);
        write_zeros_behind(g, columns, int(a.width), whole);
        if (!has_gradient(a, row, 1.0f)) {
            write_zeros(g, columns, whole);
            if (threadIdx.x < STATISTICS) store_one(a.stats_out + threadIdx.x * a.N + row, 0.0f);
            continue;
        }
        const HeldRow<S> s(memory, row_of<S>(a.student, row), c.V);
        const HeldRow<T> t(memory + held_bytes(c.V, sizeof(S)), row_of<T>(a.teacher, row), c.V);
        s.copy_edges();
        t.copy_edges();
#pragma unroll 1
        for (int i = 0; i < PIECES; ++i) {
            const int last = i + 1 < PIECES ? min((i + 1) * columns_a_piece, c.V) : c.V;
            s.copy(min(i * columns_a_piece, c.V), last);
            t.copy(min(i * columns_a_piece, c.V), last);
            commit_copies();
        }
        int pieces = 0;  // that have arrived
        const auto wait_for_piece = [&] {
            wait_for_copies<PIECES - 1>();
            commit_copies();  // an empty group, so that the next call waits for the next piece
            __syncthreads();
            ++pieces;
        };
        const auto student_row = c.row(s.at);
        const auto teacher_row = c.row(t.at);
#pragma unroll 1
        for (int i = 0; i < splits; ++i) {
            const Part part(c, i, splits);
            RowState<float> state = RowState<float>::empty();
            for (int chunk = part.first; chunk < part.last;) {
                while (pieces * chunks_a_piece <= chunk) wait_for_piece();
                const int last = min(part.last, pieces * chunks_a_piece);
                add_chunks(state, c, student_row, teacher_row, chunk, last, inv_T);
                chunk = last;
            }
            if (part.is_last) {
                while (pieces < PIECES) wait_for_piece();
                add_single(state, c, student_row, teacher_row, inv_T);
            }
            state = block_merge(state, inv_T);
            if (threadIdx.x == 0) parts.of[i] = state;
        }
        __syncthreads();
        if (threadIdx.x < WARP) {
            const RowState<float> state = merge_parts(parts.of, splits, inv_T);
            if (threadIdx.x == 0) {
                double out[STATISTICS];
                form_stats(a, a.token_ids, row, state, out);
#pragma unroll
                for (int i = 0; i < STATISTICS; ++i) store_one(a.stats_out + i * a.N + row, stats.of[i] = float(out[i]));
            }
        }
        __syncthreads();
        write_row_gradient(a, row, s.at, t.at, g, columns, whole, 1.0f, [&](int i) { return stats.of[i]; });
        __syncthreads();  // before the next row lands where this one is read
    }
}

}  // namespace minillm::cuda
