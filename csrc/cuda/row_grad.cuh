// defines: row_grad_kernel
//
// The gradient of any weighted sum of the statistics (rowmath/gradient.h) with respect to the student's row: one read of the
// pair and one write, 3V elements, one exponential an element (two where the forward KL has a coefficient). A row whose
// coefficients are all zero is written as zeros without being read. No thread waits for another.
#pragma once

#include "gradient_rows.cuh"

namespace minillm::cuda {

template <class S, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS) row_grad_kernel(GradArgs a, int splits) {
    constexpr bool pair = !std::is_same_v<T, NoTeacher>;
    for (int64_t index = blockIdx.x; index < a.N * splits; index += gridDim.x) {
        const int64_t row = index / splits;
        const S* s = row_of<S>(a.student, row);
        const T* t = row_of<T>(a.teacher, row);
        S* g = row_of<S>(a.grad, row);
        const auto c = gradient_columns<Columns<S, T>>(g, a.V);
        const Part part(c, int(index % splits), splits);
        const auto stat = [&](int i) { return a.stats[i * a.N + row]; };
        const auto coef = [&](int i) { return a.coefficients[i * a.N + row]; };
        bool any = false;
        for (int i = 0; i < COEFFICIENTS; ++i) any = any || coef(i) != 0.0f;
        write_zeros_behind(g, c, int(a.width), part);
        if (!any) {
            write_zeros(g, c, part);
            continue;
        }
        const auto r = GradientRow<float>::make(stat, coef, float(a.inv_T));
        const int64_t y = a.token_ids == nullptr ? -1 : a.token_ids[row];
        const int token = 0 <= y && y < a.V ? int(y) : -1;
        const GradientOrigins o = {r.ms, r.mt, float(a.inv_T * LOG2E), token, r.ky};
        if constexpr (!pair) {
            write_gradient(s, t, g, c, part, o, [&](float x, float y) { return gradient<Needs::student>(r, x, y); });
        } else if (r.is_simple()) {
            write_gradient(s, t, g, c, part, o, [&](float x, float y) { return gradient<Needs::simple_pair>(r, x, y); });
        } else {
            write_gradient(s, t, g, c, part, o, [&](float x, float y) { return gradient<Needs::pair>(r, x, y); });
        }
    }
}

}  // namespace minillm::cuda
