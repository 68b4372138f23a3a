// defines: require, check: that the numbers which Python passes describe memory which an operation can walk
//
// A kernel takes them on trust. What an address points to, and for how many bytes, nobody can see from here.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <string>

#include "../args.h"

namespace minillm::python {

inline void require(bool condition, const char* expected) {
    if (!condition) throw pybind11::value_error(std::string("minillm_kernels._core: ") + expected);
}

inline void check(const Rows& rows) {
    require(DType::fp32 <= rows.dtype && rows.dtype <= DType::fp16, "a dtype is 0 (fp32), 1 (bf16) or 2 (fp16)");
    require(rows.inner >= 1, "rows have at least one row in their inner dimension");
}

inline void check(const Pair& a) {
    require(a.N >= 0 && a.V >= 1, "a pair has N >= 0 rows of V >= 1 columns");
    require(a.N == 0 || a.V <= (int64_t(1) << 56) / a.N, "a pair has at most 2^56 elements");
    require(std::isfinite(float(a.inv_T)) && a.inv_T > 0, "the temperature is positive, and its inverse is finite in fp32");
    require(a.N == 0 || a.student, "the student's rows have an address");
    check(a.student);
    check(a.teacher);
}

// A number for each row, or several.
template <class T>
void check_array(const Pair& a, const T* array, const char* expected, bool may_be_null = false) {
    require(array != nullptr || may_be_null || a.N == 0, expected);
    require(reinterpret_cast<uintptr_t>(array) % alignof(T) == 0, "an array is aligned to the type of its elements");
}

inline void check_gradient(const Pair& a, const Rows& grad, int64_t width) {
    check(grad);
    require(a.N == 0 || grad, "the gradient's rows have an address");
    require(grad.dtype == a.student.dtype && width >= a.V, "the gradient has the student's dtype and at least V columns");
}

inline void check_divergence(const Pair& a, Divergence divergence) {
    require(Divergence::jsd <= divergence && divergence <= Divergence::tvd, "a divergence is an index into DIVERGENCES");
    require(a.N == 0 || a.teacher, "a divergence has a teacher");
}

inline void check(const StatsArgs& a) {
    check(static_cast<const Pair&>(a));
    check_array(a, a.token_ids, "token_ids", true);
    check_array(a, a.stats, "row_stats has stats to write");
}

inline void check(const GradArgs& a, bool has_stats = true) {
    check(static_cast<const Pair&>(a));
    check_array(a, a.token_ids, "token_ids", true);
    check_array(a, a.stats, "a gradient has stats to read", !has_stats);
    check_array(a, a.coefficients, "a gradient has coefficients to read");
    check_gradient(a, a.grad, a.width);
}

inline void check(const StatsGradArgs& a) {
    check(a, false);
    check_array(a, a.stats_out, "row_stats_grad has stats to write");
}

inline void check(const ScaleArgs& a) {
    check(static_cast<const Pair&>(a));
    require(a.factor != nullptr, "row_scale has a factor to read");
}

inline void check(const DivergenceArgs& a) {
    check(static_cast<const Pair&>(a));
    check_divergence(a, a.divergence);
    check_array(a, a.stats, "a divergence has stats to read");
    check_array(a, a.out, "a divergence has values to write");
}

inline void check(const DivergenceGradArgs& a) {
    check(static_cast<const Pair&>(a));
    check_divergence(a, a.divergence);
    check_array(a, a.stats, "a gradient has stats to read");
    check_array(a, a.values, "a gradient has values to read");
    check_array(a, a.scale, "a gradient has a scale to read");
    check_gradient(a, a.grad, a.width);
}

inline void check(const SampleArgs& a) {
    check(static_cast<const Pair&>(a));
    require(0.0 <= a.alpha && a.alpha <= 1.0, "alpha lies in [0, 1]");
    require(a.alpha == 0.0 || a.N == 0 || a.teacher, "alpha > 0 has a teacher");
    check_array(a, a.uniforms, "a sample has uniforms to read");
    check_array(a, a.token_ids, "a sample has token_ids to write");
    check_array(a, a.logprobs, "a sample has logprobs to write");
    check_array(a, a.from_teacher, "a sample has from_teacher to write");
}

}  // namespace minillm::python
