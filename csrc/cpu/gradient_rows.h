// defines: for_gradient_rows, clear_outside: what every gradient has in common
#pragma once

#include "memory.h"
#include "tile.h"

namespace minillm::cpu::MINILLM_ISA {

// A column outside the support, or that the student excludes, has gradient 0, in a row of NaN too.
static inline void clear_outside(const float* s, const float* t, int64_t n, Scratch& out) {
    for (int64_t i = 0; i < padded_size(n); i += LANES) {
        const F32 a = F32::load(s + i), b = F32::load(t + i);
        const IntVector no_gradient = outside(a, b) | (a == F32(-INFINITY));
        select(no_gradient, F32(0.0f), F32::load(out.x + i)).store(out.x + i);
    }
}

static inline void write_zeros(const Rows& rows, int64_t row, int64_t begin, int64_t end) {
    memset(rows.row(row) + begin * size_of(rows.dtype), 0, (end - begin) * size_of(rows.dtype));
}

// write(span) writes the columns of a span and returns true, or returns false for a row whose gradient is zero.
template <class Args, class Write>
void for_gradient_rows(const Args& a, const Write& write) {
    if (a.grad.data != a.student.data && a.N > 0)
        advise_huge_pages(a.grad.row(0), a.grad.row(a.N - 1) + a.width * size_of(a.grad.dtype));
    const int64_t parts = splits(a.N, a.V);
    parallel_for(a.threads, a.N * parts, [&](int64_t unit) {
        const Span span = span_of(unit, parts, a.V);
        const int64_t begin = span.first_tile * TILE;
        const int64_t end = span.last_tile * TILE < a.V ? span.last_tile * TILE : a.V;
        if (!write(span)) write_zeros(a.grad, span.row, begin, end);
        if (end == a.V) write_zeros(a.grad, span.row, a.V, a.width);
    });
}

}  // namespace minillm::cpu::MINILLM_ISA
