// row_divergence and row_divergence_grad: the divergences whose mixture needs both normalisers first (divergence.h).
//
// The value is a second read of the pair (2V elements after row_stats' 2V), the gradient a third read and one write. Two
// exponentials and a logarithm an element: bound by arithmetic rather than by memory.
#include "gradient_rows.h"

namespace minillm::cpu::MINILLM_ISA {

struct RowLog {
    float ms, mt;
    F32 log2Zs, log2Zt;
    static RowLog of(const float* stats, int64_t N, int64_t row) {
        const float log2e = float(LOG2E);
        return {stats[STUDENT_ORIGIN * N + row], stats[TEACHER_ORIGIN * N + row],
                F32(log2e * stats[STUDENT_LOGZ * N + row]), F32(log2e * stats[TEACHER_LOGZ * N + row])};
    }
};

struct DivergenceSums {
    double value, slope;
};

template <Divergence D>
static DivergenceSums divergence_span(const DivergenceArgs& a, const Span& span) {
    Scratch scratch_s, scratch_t;
    const RowLog r = RowLog::of(a.stats, a.N, span.row);
    DivergenceSums sums = {0, 0};
    for (int64_t tile = span.first_tile; tile < span.last_tile; ++tile) {
        const int64_t begin = tile * TILE, n = a.V - begin < TILE ? a.V - begin : TILE;
        const float* s = widen_tile(a.student, span.row, begin, n, scratch_s);
        const float* t = widen_tile(a.teacher, span.row, begin, n, scratch_t);
        F32 value(0.0f), slope(0.0f);
        for_pairs(s, t, n, r.ms, r.mt, float(a.inv_T * LOG2E), [&](int64_t, F32 x, F32 y) {
            const auto term = divergence_term<D>(x - r.log2Zs, y - r.log2Zt, F32(a.beta));
            value += term.value;
            slope += term.q_slope;
        });
        sums.value += sum_lanes(value);
        sums.slope += sum_lanes(slope);
    }
    return {value_unit(D) * sums.value, slope_unit(D) * sums.slope};
}

template <Divergence D>
static void divergence_grad_span(const DivergenceGradArgs& a, const Span& span) {
    Scratch scratch_s, scratch_t, out;
    const RowLog r = RowLog::of(a.stats, a.N, span.row);
    const float scale = a.scale[span.row] * float(a.inv_T);
    const F32 of_slope(scale * float(slope_unit(D))), of_q(scale * a.values[a.N + span.row]);
    for (int64_t tile = span.first_tile; tile < span.last_tile; ++tile) {
        const int64_t begin = tile * TILE, n = a.V - begin < TILE ? a.V - begin : TILE;
        const float* s = widen_tile(a.student, span.row, begin, n, scratch_s);
        const float* t = widen_tile(a.teacher, span.row, begin, n, scratch_t);
        for_pairs(s, t, n, r.ms, r.mt, float(a.inv_T * LOG2E), [&](int64_t i, F32 x, F32 y) {
            const auto term = divergence_term<D>(x - r.log2Zs, y - r.log2Zt, F32(a.beta));
            (of_slope * term.q_slope - of_q * term.q).store(out.x + i);
        });
        clear_outside(s, t, n, out);
        store_tile(a.grad, span.row, begin, n, out, false);
    }
}

#define MINILLM_SPAN(name) divergence_span<Divergence::name>,
#define MINILLM_GRAD_SPAN(name) divergence_grad_span<Divergence::name>,

void row_divergence(const DivergenceArgs& a) {
    constexpr DivergenceSums (*table[])(const DivergenceArgs&, const Span&) = {MINILLM_DIVERGENCES(MINILLM_SPAN)};
    const auto span_sums = table[static_cast<int>(a.divergence)];
    const int64_t parts = splits(a.N, a.V);
    Buffer<DivergenceSums> partial(a.N * parts);
    parallel_for(a.threads, a.N * parts, [&](int64_t unit) {
        const Span span = span_of(unit, parts, a.V);
        const bool unread = a.mask != nullptr && a.mask[span.row] == 0;
        partial.data[unit] = unread ? DivergenceSums{0, 0} : span_sums(a, span);
    });
    for (int64_t row = 0; row < a.N; ++row) {
        DivergenceSums sums = {0, 0};
        for (int64_t i = row * parts; i < (row + 1) * parts; ++i) {
            sums.value += partial.data[i].value;
            sums.slope += partial.data[i].slope;
        }
        const bool unread = a.mask != nullptr && a.mask[row] == 0;
        const bool empty = !unread && isnan(a.stats[STUDENT_LOGZ * a.N + row]);  // empty support: sums of nothing, but NaN
        a.out[row] = empty ? NAN : float(sums.value);
        a.out[a.N + row] = empty ? NAN : float(sums.slope);
    }
}

void row_divergence_grad(const DivergenceGradArgs& a) {
    constexpr void (*table[])(const DivergenceGradArgs&, const Span&) = {MINILLM_DIVERGENCES(MINILLM_GRAD_SPAN)};
    const auto write_span = table[static_cast<int>(a.divergence)];
    for_gradient_rows(a, [&](const Span& span) {
        if (a.scale[span.row] == 0.0f) return false;
        write_span(a, span);
        return true;
    });
}

}  // namespace minillm::cpu::MINILLM_ISA
