// defines: row_divergence_kernel, row_divergence_finish_kernel, row_divergence_grad_kernel
//
// The divergences whose mixture needs both normalisers first (rowmath/divergence.h). The value is a second read of the pair
// (2V elements after row_stats' 2V), the gradient a third read and one write. Two exponentials and, but for tvd, a logarithm
// an element. Chunks are tried without masks first, as in row_stats.
#pragma once

#include "gradient_rows.cuh"

namespace minillm::cuda {

// A column takes twice the registers that it takes in row_stats: half as many at a time.
template <class S, class T>
using DivergenceColumns = Columns<S, T, CHUNK / 2>;

struct RowLog {
    float ms, mt, log2Zs, log2Zt;

    __device__ RowLog(const float* stats, int64_t N, int64_t row)
        : ms(stats[STUDENT_ORIGIN * N + row]),
          mt(stats[TEACHER_ORIGIN * N + row]),
          log2Zs(float(LOG2E) * stats[STUDENT_LOGZ * N + row]),
          log2Zt(float(LOG2E) * stats[TEACHER_LOGZ * N + row]) {}
};

struct DivergenceSums {
    float value, slope;
};
struct AddSums {
    __device__ DivergenceSums operator()(const DivergenceSums& a, const DivergenceSums& b) const {
        return {a.value + b.value, a.slope + b.slope};
    }
};

template <Divergence D>
__device__ void add_term(DivergenceSums& sums, float lq, float lp, float beta) {
    const auto term = divergence_term<D>(lq, lp, beta);
    sums.value += term.value;
    sums.slope += term.q_slope;
}

template <Divergence D>
__device__ void add_masked_term(DivergenceSums& sums, const RowLog& r, float a, float b, float k, float beta) {
    const bool out = outside(a, b);
    add_term<D>(sums, relative(a, r.ms, k, out, -r.log2Zs), relative(b, r.mt, k, out, -r.log2Zt), beta);
}

template <Divergence D, class S, class T>
__device__ DivergenceSums part_divergence(const S* s, const T* t, const DivergenceColumns<S, T>& c,
                                          const Part& part, const RowLog& r, float k, float beta) {
    constexpr int W = DivergenceColumns<S, T>::WIDTH;
    const auto student_row = c.row(s);
    const auto teacher_row = c.row(t);
    const Single<S, T> single(c, s, t, part.is_last);
    DivergenceSums total = {0.0f, 0.0f};
    for (int chunk = part.first; chunk < part.last; ++chunk) {
        const Chunk<S, T, CHUNK / 2> columns(c, student_row, teacher_row, chunk);
#pragma unroll
        for (int j = 0; j < c.UNITS; ++j) {
            const auto& a = columns.s[j];
            const auto& b = columns.t[j];
            DivergenceSums sums = {0.0f, 0.0f};
            float check = 0.0f;
#pragma unroll
            for (int i = 0; i < W; ++i) {
                const float lq = fmaf(a[i] - r.ms, k, -r.log2Zs), lp = fmaf(b[i] - r.mt, k, -r.log2Zt);
                add_term<D>(sums, lq, lp, beta);
                check += 0.0f * (a[i] - b[i]);  // NaN where one of them is not finite, whatever the term makes of it
            }
            if (check + 0.0f * (sums.value + sums.slope) != 0.0f) {
                sums = {0.0f, 0.0f};
#pragma unroll
                for (int i = 0; i < W; ++i) add_masked_term<D>(sums, r, a[i], b[i], k, beta);
            }
            total.value += sums.value;
            total.slope += sums.slope;
        }
    }
    if (single.v >= 0) add_masked_term<D>(total, r, single.student(), single.teacher(), k, beta);
    return total;
}

// sums: [N, splits].
template <Divergence D, class S, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    row_divergence_kernel(DivergenceArgs a, int splits, DivergenceSums* sums) {
    for (int64_t i = blockIdx.x; i < a.N * splits; i += gridDim.x) {
        const int64_t index = a.N * splits - 1 - i;  // backwards: what row_stats read last is in the cache still
        const int64_t row = index / splits;
        if (unread(a.mask, row)) continue;
        const S* s = row_of<S>(a.student, row);
        const T* t = row_of<T>(a.teacher, row);
        const DivergenceColumns<S, T> c(a.V);
        const Part part(c, int(index % splits), splits);
        const RowLog r(a.stats, a.N, row);
        const DivergenceSums x = part_divergence<D>(s, t, c, part, r, float(a.inv_T * LOG2E), a.beta);
        const DivergenceSums total = block_reduce(x, AddSums());
        if (threadIdx.x == 0) sums[index] = total;
    }
}

// A thread a row.
static __global__ void __launch_bounds__(THREADS, BLOCKS)
    row_divergence_finish_kernel(DivergenceArgs a, int splits, const DivergenceSums* sums) {
    const double of_value = value_unit(a.divergence), of_slope = slope_unit(a.divergence);
    for (int64_t row = int64_t(blockIdx.x) * THREADS + threadIdx.x; row < a.N; row += int64_t(gridDim.x) * THREADS) {
        double value = 0, slope = 0;
        if (!unread(a.mask, row)) {
            for (int i = 0; i < splits; ++i) {
                value += of_value * sums[row * splits + i].value;
                slope += of_slope * sums[row * splits + i].slope;
            }
            // An empty support: the sums of nothing, but NaN.
            if (isnan(a.stats[STUDENT_LOGZ * a.N + row])) value = slope = NAN;
        }
        store_one(a.out + row, float(value));
        store_one(a.out + a.N + row, float(slope));
    }
}

template <Divergence D, class S, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS) row_divergence_grad_kernel(DivergenceGradArgs a, int splits) {
    for (int64_t index = blockIdx.x; index < a.N * splits; index += gridDim.x) {
        const int64_t row = index / splits;
        const S* s = row_of<S>(a.student, row);
        const T* t = row_of<T>(a.teacher, row);
        S* g = row_of<S>(a.grad, row);
        const auto c = gradient_columns<DivergenceColumns<S, T>>(g, a.V);
        const Part part(c, int(index % splits), splits);
        write_zeros_behind(g, c, int(a.width), part);
        if (a.scale[row] == 0.0f) {
            write_zeros(g, c, part);
            continue;
        }
        const RowLog r(a.stats, a.N, row);
        const float scale = a.scale[row] * float(a.inv_T), beta = a.beta;
        const float of_slope = scale * float(slope_unit(D)), of_q = scale * a.values[a.N + row];
        const GradientOrigins o = {r.ms, r.mt, float(a.inv_T * LOG2E), -1, 0.0f, -r.log2Zs, -r.log2Zt};
        write_gradient(s, t, g, c, part, o, [&](float lq, float lp) {
            const auto term = divergence_term<D>(lq, lp, beta);
            return of_slope * term.q_slope - of_q * term.q;
        });
    }
}

}  // namespace minillm::cuda
