// row_stats: the statistics of rows; few rows are split over the threads, and their states merged.
#include "row_state.h"

namespace minillm::cpu::MINILLM_ISA {

void row_stats(const StatsArgs& a) {
    const int64_t parts = splits(a.N, a.V);
    Buffer<RowState<double>> states(a.N * parts);
    parallel_for(a.threads, a.N * parts, [&](int64_t unit) {
        const Span span = span_of(unit, parts, a.V);
        if (!unread(a.mask, span.row)) states.data[unit] = span_state(a, span);
    });
    parallel_for(parts > 1 ? a.threads : 1, a.N, [&](int64_t row) {
        if (unread(a.mask, row)) return write_no_stats(a.stats, a.N, row);
        RowState<double> state = states.data[row * parts];
        for (int64_t i = 1; i < parts; ++i) state = merge(state, states.data[row * parts + i], a.inv_T);
        write_stats(a, row, state);
    });
}

}  // namespace minillm::cpu::MINILLM_ISA
