// row_stats_grad: the statistics of row_stats and the gradient of row_grad in one visit of each row, for coefficients that are
// known beforehand: a row pair that fits in the cache is read from memory once. The same bits as the two operations.
#include "row_grad.h"
#include "row_state.h"

namespace minillm::cpu::MINILLM_ISA {

void row_stats_grad(const StatsGradArgs& a) {
    StatsArgs of_stats;
    static_cast<Pair&>(of_stats) = a;
    of_stats.token_ids = a.token_ids;
    of_stats.stats = a.stats_out;
    GradArgs of_gradient = a;
    of_gradient.stats = a.stats_out;
    const auto no_coefficient = [&](int64_t row) {
        for (int i = 0; i < COEFFICIENTS; ++i)
            if (a.coefficients[i * a.N + row] != 0.0f) return false;
        return true;
    };
    if (splits(a.N, a.V) > 1) {  // few rows: the threads share each of them
        Buffer<uint8_t> mask(a.N);
        for (int64_t row = 0; row < a.N; ++row) mask.data[row] = !no_coefficient(row);
        of_stats.mask = mask.data;
        row_stats(of_stats);
        row_grad(of_gradient);
        return;
    }
    for_gradient_rows(of_gradient, [&](const Span& span) {
        if (no_coefficient(span.row)) {
            write_no_stats(a.stats_out, a.N, span.row);
            return false;
        }
        write_stats(of_stats, span.row, span_state(of_stats, span));
        return write_row_gradient(of_gradient, span);
    });
}

}  // namespace minillm::cpu::MINILLM_ISA
