// defines: row_grad_kernel, and its parts for row_stats_grad.cuh
//
// The gradient of any weighted sum of the statistics (rowmath/gradient.h) with respect to the student's row: one read of the
// pair and one write, 3V elements, one exponential an element (two where the forward KL has a coefficient). A row whose
// coefficients are all zero is written as zeros without being read. No thread waits for another.
#pragma once

#include "gradient_rows.cuh"

namespace minillm::cuda {

__device__ inline float coefficient(const GradArgs& a, int i, int64_t row, float factor) {
    return factor * a.coefficients[i * a.N + row];
}
__device__ inline bool has_gradient(const GradArgs& a, int64_t row, float factor) {
    bool any = false;
    for (int i = 0; i < COEFFICIENTS; ++i) any = any || coefficient(a, i, row, factor) != 0.0f;
    return any;
}

// The columns of c that are in the part, from stat(i): the statistics of the row. s, t, g and c begin at column `first`.
template <class S, class T, class C, class Stat>
__device__ void write_row_gradient(const GradArgs& a, int64_t row, const S* s, const T* t, S* g, const C& c,
                                   const Part& part, float factor, const Stat& stat, int first = 0) {
    const auto coef = [&](int i) { return coefficient(a, i, row, factor); };
    const auto r = GradientRow<float>::make(stat, coef, float(a.inv_T));
    const int64_t y = a.token_ids == nullptr ? -1 : a.token_ids[row];
    const int token = 0 <= y - first && y - first < c.V ? int(y - first) : -1;
    const GradientOrigins o = {r.ms, r.mt, float(a.inv_T * LOG2E), token, r.ky};
    if constexpr (std::is_same_v<T, NoTeacher>) {
        write_gradient(s, t, g, c, part, o, [&](float x, float y) { return gradient<Needs::student>(r, x, y); });
    } else if (r.is_simple()) {
        write_gradient(s, t, g, c, part, o, [&](float x, float y) { return gradient<Needs::simple_pair>(r, x, y); });
    } else {
        write_gradient(s, t, g, c, part, o, [&](float x, float y) { return gradient<Needs::pair>(r, x, y); });
    }
}

template <class S, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS) row_grad_kernel(GradArgs a, int splits) {
    const float factor = a.factor == nullptr ? 1.0f : load_one(a.factor);
    if (a.factor != nullptr && factor == 1.0f) return;
    for (int64_t i = blockIdx.x; i < a.N * splits; i += gridDim.x) {
        const int64_t index = a.N * splits - 1 - i;  // backwards: what row_stats read last is in the cache still
        const int64_t row = index / splits;
        const S* s = row_of<S>(a.student, row);
        const T* t = row_of<T>(a.teacher, row);
        S* g = row_of<S>(a.grad, row);
        const auto c = gradient_columns<Columns<S, T>>(g, a.V);
        const Part part(c, int(index % splits), splits);
        write_zeros_behind(g, c, int(a.width), part);
        if (has_gradient(a, row, factor))
            write_row_gradient(a, row, s, t, g, c, part, factor, [&](int i) { return a.stats[i * a.N + row]; });
        else
            write_zeros(g, c, part);
    }
}

}  // namespace minillm::cuda
