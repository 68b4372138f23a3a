// defines: write_row_gradient: the gradient of any weighted sum of the statistics (gradient.h) with respect to the student's row.
//
// One read of the pair and one write: 3V elements a row. The coefficients decide which exponentials are needed: q always,
// p only for the forward KL. A row whose coefficients are all zero is written as zeros without being read. As in row_stats,
// a plain loop over raw memory whose results are accepted when they are finite, and a masked loop for the rest.
#pragma once

#include "gradient_rows.h"

namespace minillm::cpu::MINILLM_ISA {

// n columns, a multiple of the register. False: something is not finite, and the masked loop must do it. `target` is where
// they will be written: fetched while they are computed, or the burst of stores at the end of a tile waits for memory.
template <Needs NEEDS, DType S, DType T>
static bool plain_gradient(const GradientRow<float>& g, const char* student, const char* teacher, int64_t n, float scale,
                           Scratch& out, const char* target) {
    const F32 ms(g.ms), mt(g.mt), k(scale);
    F32 finite_so_far(0.0f);  // 0 * x is NaN for x = NaN, inf
    for (int64_t i = 0; i < n; i += LANES) {
        __builtin_prefetch(target + i * size_of(S), 1);
        const F32 s = (load<S>(student, i) - ms) * k;
        const F32 t = NEEDS == Needs::student ? s : (load<T>(teacher, i) - mt) * k;
        const F32 x = gradient<NEEDS>(g, s, t);
        finite_so_far += F32(0.0f) * x;
        // Where the student alone is -inf, q = 0 hides it from x, but p is not 0.
        if constexpr (NEEDS == Needs::pair) finite_so_far += F32(0.0f) * s;
        x.store(out.x + i);
    }
    return sum_lanes(finite_so_far) == 0.0;
}

template <Needs NEEDS>
static void grad_span(const GradArgs& a, const Span& span, const GradientRow<float>& g) {
    Scratch scratch_s, scratch_t, out;
    const float scale = float(a.inv_T * LOG2E);
    const auto plain = [&](int64_t begin, int64_t n) {
        const char* s = a.student.row(span.row) + begin * size_of(a.student.dtype);
        const char* target = a.grad.row(span.row) + begin * size_of(a.grad.dtype);
        return with_type(a.student.dtype, [&](auto S) {
            if constexpr (NEEDS == Needs::student) {
                return plain_gradient<NEEDS, S.value, S.value>(g, s, s, n, scale, out, target);
            } else {
                const char* t = a.teacher.row(span.row) + begin * size_of(a.teacher.dtype);
                return with_type(a.teacher.dtype, [&](auto T) {
                    return plain_gradient<NEEDS, S.value, T.value>(g, s, t, n, scale, out, target);
                });
            }
        });
    };
    const auto masked = [&](int64_t begin, int64_t n) {
        const float* s = widen_tile(a.student, span.row, begin, n, scratch_s);
        if constexpr (NEEDS == Needs::student) {
            for_one(s, n, g.ms, scale, [&](int64_t i, F32 x) { g.of_student(x).store(out.x + i); });
            clear_outside(s, s, n, out);
        } else {
            const float* t = widen_tile(a.teacher, span.row, begin, n, scratch_t);
            for_pairs(s, t, n, g.ms, g.mt, scale,
                      [&](int64_t i, F32 x, F32 y) { gradient<NEEDS>(g, x, y).store(out.x + i); });
            clear_outside(s, t, n, out);
        }
    };
    const auto finish = [&](int64_t begin, int64_t n, bool finite) {
        if (a.token_ids != nullptr) {
            const int64_t y = a.token_ids[span.row] - begin;
            if (0 <= y && y < n) out.x[y] += g.ky;
        }
        store_tile(a.grad, span.row, begin, n, out, finite);
    };
    for (int64_t tile = span.first_tile; tile < span.last_tile; ++tile) {
        const int64_t begin = tile * TILE, n = a.V - begin < TILE ? a.V - begin : TILE, whole = n / LANES * LANES;
        if (whole > 0) {
            const bool finite = plain(begin, whole);
            if (!finite) masked(begin, whole);
            finish(begin, whole, finite);
        }
        if (whole < n) {
            masked(begin + whole, n - whole);
            finish(begin + whole, n - whole, false);
        }
    }
}

// The columns of a span; false, and nothing written, for a row without a coefficient.
static inline bool write_row_gradient(const GradArgs& a, const Span& span) {
    const auto stat = [&](int i) { return a.stats[i * a.N + span.row]; };
    const float factor = a.factor == nullptr ? 1.0f : *a.factor;
    const auto coef = [&](int i) { return factor * a.coefficients[i * a.N + span.row]; };
    bool any = false;
    for (int i = 0; i < COEFFICIENTS; ++i) any = any || coef(i) != 0.0f;
    if (!any) return false;
    const auto g = GradientRow<float>::make(stat, coef, float(a.inv_T));
    if (!a.teacher)
        grad_span<Needs::student>(a, span, g);
    else if (g.is_simple())
        grad_span<Needs::simple_pair>(a, span, g);
    else
        grad_span<Needs::pair>(a, span, g);
    return true;
}

}  // namespace minillm::cpu::MINILLM_ISA
