// The one file that knows Python: minillm_kernels._core. Memory comes as addresses, sizes and strides, so the module is
// built against no particular torch; minillm_kernels/backends/ checks types, devices and shapes before it calls.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/memory.h"
#include "cpu/rows.h"
#ifdef MINILLM_CUDA
#include "cuda/launch.h"
#endif

namespace py = pybind11;
using minillm::Divergence;
using namespace minillm::cpu;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Rows make_rows(uintptr_t address, int dtype, int64_t inner, int64_t outer_stride, int64_t inner_stride) {
    return {at<char>(address), static_cast<DType>(dtype), inner, outer_stride, inner_stride};
}

template <class Args>
Args make_args(const Rows& student, const Rows* teacher, int64_t N, int64_t V, double temperature, int threads) {
    Args a;
    a.student = student;
    if (teacher != nullptr) a.teacher = *teacher;
    a.N = N;
    a.V = V;
    a.inv_T = 1.0 / temperature;
    a.threads = threads;
    return a;
}

void check_token_ids(const int64_t* ids, const uint8_t* mask, int64_t N, int64_t V) {
    for (int64_t i = 0; ids != nullptr && i < N; ++i)
        if ((mask == nullptr || mask[i] != 0) && (ids[i] < 0 || ids[i] >= V))
            throw py::index_error("token id " + std::to_string(ids[i]) + " in row " + std::to_string(i) +
                                  " is outside the vocabulary [0, " + std::to_string(V) +
                                  "); exclude rows without a token by the mask or by ignore_index");
}

void row_stats_py(const Rows& student, const Rows* teacher, int64_t N, int64_t V, double temperature, int threads,
                  uintptr_t mask, uintptr_t token_ids, uintptr_t stats) {
    StatsArgs a = make_args<StatsArgs>(student, teacher, N, V, temperature, threads);
    a.mask = at<const uint8_t>(mask);
    a.token_ids = at<const int64_t>(token_ids);
    a.stats = at<float>(stats);
    check_token_ids(a.token_ids, a.mask, N, V);
    py::gil_scoped_release release;
    row_stats(a);
}

void row_grad_py(const Rows& student, const Rows* teacher, int64_t N, int64_t V, double temperature, int threads,
                 uintptr_t token_ids, uintptr_t stats, uintptr_t coefficients, const Rows& grad, int64_t width) {
    GradArgs a = make_args<GradArgs>(student, teacher, N, V, temperature, threads);
    a.token_ids = at<const int64_t>(token_ids);
    a.stats = at<const float>(stats);
    a.coefficients = at<const float>(coefficients);
    a.grad = grad;
    a.width = width;
    py::gil_scoped_release release;
    row_grad(a);
}

void row_divergence_py(const Rows& student, const Rows& teacher, int64_t N, int64_t V, double temperature, int threads,
                       int divergence, float beta, uintptr_t mask, uintptr_t stats, uintptr_t out) {
    DivergenceArgs a = make_args<DivergenceArgs>(student, &teacher, N, V, temperature, threads);
    a.divergence = static_cast<Divergence>(divergence);
    a.beta = beta;
    a.mask = at<const uint8_t>(mask);
    a.stats = at<const float>(stats);
    a.out = at<float>(out);
    py::gil_scoped_release release;
    row_divergence(a);
}

void row_divergence_grad_py(const Rows& student, const Rows& teacher, int64_t N, int64_t V, double temperature,
                            int threads, int divergence, float beta, uintptr_t stats, uintptr_t values,
                            uintptr_t scale, const Rows& grad, int64_t width) {
    DivergenceGradArgs a = make_args<DivergenceGradArgs>(student, &teacher, N, V, temperature, threads);
    a.divergence = static_cast<Divergence>(divergence);
    a.beta = beta;
    a.stats = at<const float>(stats);
    a.values = at<const float>(values);
    a.scale = at<const float>(scale);
    a.grad = grad;
    a.width = width;
    py::gil_scoped_release release;
    row_divergence_grad(a);
}

void row_sample_py(const Rows& student, const Rows* teacher, int64_t N, int64_t V, double temperature, int threads,
                   uintptr_t uniforms, double alpha, int64_t top_k, double top_p, bool greedy, uintptr_t token_ids,
                   uintptr_t logprobs, uintptr_t from_teacher) {
    SampleArgs a = make_args<SampleArgs>(student, teacher, N, V, temperature, threads);
    a.uniforms = at<const double>(uniforms);
    a.alpha = alpha;
    a.top_k = top_k;
    a.top_p = top_p;
    a.greedy = greedy;
    a.token_ids = at<int64_t>(token_ids);
    a.logprobs = at<float>(logprobs);
    a.from_teacher = at<uint8_t>(from_teacher);
    py::gil_scoped_release release;
    row_sample(a);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    py::class_<Rows>(m, "Rows").def(py::init(&make_rows), py::arg("address"), py::arg("dtype"), py::arg("inner"),
                                    py::arg("outer_stride"), py::arg("inner_stride"));
    m.def("row_stats", &row_stats_py);
    m.def("row_grad", &row_grad_py);
    m.def("row_divergence", &row_divergence_py);
    m.def("row_divergence_grad", &row_divergence_grad_py);
    m.def("row_sample", &row_sample_py);
    m.def("advise_huge_pages", [](uintptr_t address, size_t bytes) {
        advise_huge_pages(at<const char>(address), at<const char>(address) + bytes);
    });
    m.def("instruction_set", &instruction_set);
    m.def("use_instruction_set", &use_instruction_set);
    m.attr("TILE") = TILE;
#ifdef MINILLM_CUDA
    minillm::cuda::define_bindings(m);
#endif
    m.attr("CUDA_ARCHITECTURES") = MINILLM_CUDA_ARCHITECTURES;  // "" when built without nvcc
}
