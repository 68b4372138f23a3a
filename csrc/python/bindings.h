// defines: what Python passes, as the arguments of args.h; define_cuda
//
// Memory comes as an address; rows as (address, dtype, inner, outer_stride, inner_stride), none as None; a pair as (student
// rows, teacher rows, N, V, temperature). minillm_kernels/_core.pyi has the signatures, backends/compiled.py makes the calls.
#pragma once

#include <pybind11/pybind11.h>

#include "checks.h"

namespace minillm::python {

namespace py = pybind11;
using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

inline Rows rows_of(py::handle x) {
    if (x.is_none()) return {};
    const auto [address, dtype, inner, outer_stride, inner_stride] =
        x.cast<std::tuple<Address, int, int64_t, int64_t, int64_t>>();
    return {at<char>(address), static_cast<DType>(dtype), inner, outer_stride, inner_stride};
}

inline Pair pair_of(const py::tuple& x) {
    const auto [student, teacher, N, V, temperature] = x.cast<std::tuple<py::object, py::object, int64_t, int64_t, double>>();
    const Pair pair = {rows_of(student), rows_of(teacher), N, V, 1.0 / temperature};
    require(N <= 0 || teacher.is_none() || pair.teacher, "the teacher's rows have an address");
    return pair;
}

// name_args for each operation: its arguments from what Python passes after the pair.

inline StatsArgs row_stats_args(const py::tuple& pair, Address mask, Address token_ids, Address stats) {
    return {pair_of(pair), at<const uint8_t>(mask), at<const int64_t>(token_ids), at<float>(stats)};
}

inline GradArgs row_grad_args(const py::tuple& pair, Address token_ids, Address stats, Address coefficients,
                              const py::tuple& grad, int64_t width, Address factor) {
    return {pair_of(pair), at<const int64_t>(token_ids), at<const float>(stats), at<const float>(coefficients),
            rows_of(grad), width, at<const float>(factor)};
}

inline StatsGradArgs row_stats_grad_args(const py::tuple& pair, Address token_ids, Address coefficients, Address stats,
                                         const py::tuple& grad, int64_t width) {
    return {row_grad_args(pair, token_ids, 0, coefficients, grad, width, 0), at<float>(stats)};
}

inline ScaleArgs row_scale_args(const py::tuple& pair, Address factor) { return {pair_of(pair), at<const float>(factor)}; }

inline DivergenceArgs row_divergence_args(const py::tuple& pair, int divergence, float beta, Address mask, Address stats,
                                          Address out) {
    return {pair_of(pair), static_cast<Divergence>(divergence), beta, at<const uint8_t>(mask), at<const float>(stats),
            at<float>(out)};
}

inline DivergenceGradArgs row_divergence_grad_args(const py::tuple& pair, int divergence, float beta, Address stats,
                                                   Address values, Address scale, const py::tuple& grad, int64_t width) {
    return {pair_of(pair), static_cast<Divergence>(divergence), beta, at<const float>(stats), at<const float>(values),
            at<const float>(scale), rows_of(grad), width};
}

inline SampleArgs row_sample_args(const py::tuple& pair, Address uniforms, double alpha, int64_t top_k, double top_p,
                                  bool greedy, Address token_ids, Address logprobs, Address from_teacher) {
    return {pair_of(pair), at<const double>(uniforms), alpha, top_p, top_k, greedy, at<int64_t>(token_ids),
            at<float>(logprobs), at<uint8_t>(from_teacher)};
}

void define_cuda(py::module_& m);  // cuda.cpp

}  // namespace minillm::python
