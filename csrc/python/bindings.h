// defines: define_rows, define_cuda and the *_args functions: what Python passes, as the arguments of args.h
#pragma once

#include <pybind11/pybind11.h>

#include "../args.h"

namespace minillm::python {

namespace py = pybind11;

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Local to the module, so that two of them can be imported together (the tests do).
inline void define_rows(py::module_& m) {
    py::class_<Rows>(m, "Rows", py::module_local())
        .def(py::init([](uintptr_t address, int dtype, int64_t inner, int64_t outer_stride, int64_t inner_stride) {
                 return Rows{at<char>(address), static_cast<DType>(dtype), inner, outer_stride, inner_stride};
             }),
             py::arg("address"), py::arg("dtype"), py::arg("inner"), py::arg("outer_stride"), py::arg("inner_stride"));
}

template <class Args>
Args pair_args(const Rows& student, const Rows* teacher, int64_t N, int64_t V, double temperature) {
    Args a;
    a.student = student;
    if (teacher != nullptr) a.teacher = *teacher;
    a.N = N;
    a.V = V;
    a.inv_T = 1.0 / temperature;
    return a;
}

inline StatsArgs stats_args(const Rows& student, const Rows* teacher, int64_t N, int64_t V, double temperature,
                            uintptr_t mask, uintptr_t token_ids, uintptr_t stats) {
    StatsArgs a = pair_args<StatsArgs>(student, teacher, N, V, temperature);
    a.mask = at<const uint8_t>(mask);
    a.token_ids = at<const int64_t>(token_ids);
    a.stats = at<float>(stats);
    return a;
}

inline GradArgs grad_args(const Rows& student, const Rows* teacher, int64_t N, int64_t V, double temperature,
                          uintptr_t token_ids, uintptr_t stats, uintptr_t coefficients, const Rows& grad, int64_t width) {
    GradArgs a = pair_args<GradArgs>(student, teacher, N, V, temperature);
    a.token_ids = at<const int64_t>(token_ids);
    a.stats = at<const float>(stats);
    a.coefficients = at<const float>(coefficients);
    a.grad = grad;
    a.width = width;
    return a;
}

inline StatsGradArgs stats_grad_args(const Rows& student, const Rows* teacher, int64_t N, int64_t V, double temperature,
                                     uintptr_t token_ids, uintptr_t coefficients, uintptr_t stats, const Rows& grad,
                                     int64_t width) {
    StatsGradArgs a;
    static_cast<GradArgs&>(a) = grad_args(student, teacher, N, V, temperature, token_ids, 0, coefficients, grad, width);
    a.stats_out = at<float>(stats);
    return a;
}

inline DivergenceArgs divergence_args(const Rows& student, const Rows* teacher, int64_t N, int64_t V, double temperature,
                                      int divergence, float beta, uintptr_t mask, uintptr_t stats, uintptr_t out) {
    DivergenceArgs a = pair_args<DivergenceArgs>(student, teacher, N, V, temperature);
    a.divergence = static_cast<Divergence>(divergence);
    a.beta = beta;
    a.mask = at<const uint8_t>(mask);
    a.stats = at<const float>(stats);
    a.out = at<float>(out);
    return a;
}

inline DivergenceGradArgs divergence_grad_args(const Rows& student, const Rows* teacher, int64_t N, int64_t V,
                                               double temperature, int divergence, float beta, uintptr_t stats,
                                               uintptr_t values, uintptr_t scale, const Rows& grad, int64_t width) {
    DivergenceGradArgs a = pair_args<DivergenceGradArgs>(student, teacher, N, V, temperature);
    a.divergence = static_cast<Divergence>(divergence);
    a.beta = beta;
    a.stats = at<const float>(stats);
    a.values = at<const float>(values);
    a.scale = at<const float>(scale);
    a.grad = grad;
    a.width = width;
    return a;
}

inline SampleArgs sample_args(const Rows& student, const Rows* teacher, int64_t N, int64_t V, double temperature,
                              uintptr_t uniforms, double alpha, int64_t top_k, double top_p, bool greedy,
                              uintptr_t token_ids, uintptr_t logprobs, uintptr_t from_teacher) {
    SampleArgs a = pair_args<SampleArgs>(student, teacher, N, V, temperature);
    a.uniforms = at<const double>(uniforms);
    a.alpha = alpha;
    a.top_k = top_k;
    a.top_p = top_p;
    a.greedy = greedy;
    a.token_ids = at<int64_t>(token_ids);
    a.logprobs = at<float>(logprobs);
    a.from_teacher = at<uint8_t>(from_teacher);
    return a;
}

void define_cuda(py::module_& m);  // cuda.cpp

}  // namespace minillm::python
