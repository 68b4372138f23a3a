// defines: gradient_columns, write_zeros, GradientOrigins, write_gradient: what every gradient has in common
//
// One read of the pair and one write: 3V elements. Units start where the gradient's row is aligned, so all stores but a few
// are vectors; a column's gradient does not depend on the others. As in row_stats a unit is first computed as if all its
// columns were in the support, and again with masks if a result or s - t is not finite. A thread writes only columns that it
// has read before, so the gradient may overwrite the student.
#pragma once

#include "tiles.cuh"

namespace minillm::cuda {

// C: the Columns.
template <class C, class S>
__device__ C gradient_columns(const S* g, int64_t V) {
    return C(V, int((0 - reinterpret_cast<uintptr_t>(g)) % (C::WIDTH * sizeof(S)) / sizeof(S)));
}

// For a row that is not read.
template <class C, class S>
__device__ void write_zeros(S* g, const C& c, const Part& part) {
    constexpr int W = C::WIDTH;
    const Raw<S, W> zeros = {};
    for (int chunk = part.first; chunk < part.last; ++chunk)
        for (int j = 0; j < c.UNITS; ++j)
            if (const int u = c.unit(chunk, j); u < c.units) store(g + c.head + u * W, zeros);
    if (part.is_last && c.single() >= 0) store_one(g + c.single(), 0.0f);
}
// Columns [V, width).
template <class C, class S>
__device__ void write_zeros_behind(S* g, const C& c, int width, const Part& part) {
    if (!part.is_last) return;
    for (int v = c.V + int(threadIdx.x); v < width; v += THREADS) store_one(g + v, 0.0f);
}

// of(s, t): the gradient in a column from (z - m) k + plus of either model, k = log2(e)/T; `token` also gets ky.
struct GradientOrigins {
    float ms, mt, k;
    int token;  // -1: none
    float ky, plus_s = 0.0f, plus_t = 0.0f;
};

template <class S, class T, class Of>
__device__ float masked_gradient(const GradientOrigins& o, float a, float b, const Of& of) {
    constexpr bool pair = !std::is_same_v<T, NoTeacher>;
    const bool out = pair ? outside(a, b) : a == -INFINITY;
    const float x = of(relative(a, o.ms, o.k, out, o.plus_s), pair ? relative(b, o.mt, o.k, out, o.plus_t) : 0.0f);
    return out || a == -INFINITY ? 0.0f : x;  // what the student excludes has gradient 0 beside any teacher
}

template <class S, class T, class C, class Of>
__device__ void write_gradient(const S* s, const T* t, S* g, const C& c, const Part& part, const GradientOrigins& o,
                               const Of& of) {
    constexpr bool pair = !std::is_same_v<T, NoTeacher>;
    constexpr int W = C::WIDTH;
    const auto student_row = c.row(s);
    const auto teacher_row = c.row(t);
    for (int chunk = part.first; chunk < part.last; ++chunk) {
        const Chunk<S, T, C::UNITS * W> columns(c, student_row, teacher_row, chunk);
#pragma unroll
        for (int j = 0; j < c.UNITS; ++j) {
            const int u = c.unit(chunk, j), v = c.head + u * W;
            if (u >= c.units) continue;
            const auto& a = columns.s[j];
            const auto& b = columns.t[j];
            float x[W], check = 0.0f;  // 0 times something that is not finite is NaN
#pragma unroll
            for (int i = 0; i < W; ++i) {
                const float p = fmaf(a[i] - o.ms, o.k, o.plus_s), q = pair ? fmaf(b[i] - o.mt, o.k, o.plus_t) : 0.0f;
                x[i] = of(p, q);
                check += 0.0f * x[i] + 0.0f * (p - q);
            }
            if (check != 0.0f) {
#pragma unroll
                for (int i = 0; i < W; ++i) x[i] = masked_gradient<S, T>(o, a[i], b[i], of);
            }
            const int at = o.token - v;
            if (0 <= at && at < W) {
#pragma unroll
                for (int i = 0; i < W; ++i) x[i] += i == at ? o.ky : 0.0f;
            }
            store(g + v, Raw<S, W>::of(x));
        }
    }
    const Single<S, T> single(c, s, t, part.is_last);
    if (single.v < 0) return;
    const float x = masked_gradient<S, T>(o, single.student(), single.teacher(), of);
    store_one(g + single.v, x + (single.v == o.token ? o.ky : 0.0f));
}

}  // namespace minillm::cuda
