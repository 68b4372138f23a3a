// defines: for_gradient_rows, clear_outside: what every gradient has in common
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "tile.h"

namespace minillm::cpu::MINILLM_ISA {

// A column outside the support has gradient 0, in a row of NaN too.
static inline void clear_outside(const float* s, const float* t, int64_t n, Scratch& out) {
    for (int64_t i = 0; i < padded_size(n); i += LANES)
        select(outside(F32::load(s + i), F32::load(t + i)), F32(0.0f), F32::load(out.x + i)).store(out.x + i);
}

static inline void write_zeros(const Rows& rows, int64_t row, int64_t begin, int64_t end) {
    memset(rows.row(row) + begin * size_of(rows.dtype), 0, (end - begin) * size_of(rows.dtype));
}

// Faulting in a fresh gradient 4 KiB at a time costs more than computing it, so ask for huge pages before the first write.
// Advice only: harmless where the pages are there already (a gradient in place) or where the kernel does not follow it.
static inline void advise_huge_pages(const Rows& rows, int64_t N, int64_t width) {
#ifdef __linux__
    constexpr uintptr_t page = 2 << 20;
    if (N == 0) return;
    const uintptr_t first = reinterpret_cast<uintptr_t>(rows.row(0));
    const uintptr_t last = reinterpret_cast<uintptr_t>(rows.row(N - 1)) + width * size_of(rows.dtype);
    if (last < first + 2 * page) return;
    const uintptr_t begin = (first + 4095) & ~uintptr_t(4095), end = last & ~uintptr_t(4095);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// write(span) writes the columns of a span and returns true, or returns false for a row whose gradient is zero.
template <class Args, class Write>
void for_gradient_rows(const Args& a, const Write& write) {
    if (a.grad.data != a.student.data) advise_huge_pages(a.grad, a.N, a.width);
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
