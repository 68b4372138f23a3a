// The module minillm_kernels._core. Memory comes as addresses, sizes and strides, so it is built against no particular
// torch; minillm_kernels/ checks types, devices and shapes before it calls, checks.h what is left.
#include "bindings.h"

#include <algorithm>
#include <string>

#include "../cpu/entry.h"
#include "../cpu/memory.h"
#include "../cpu/pages.h"

namespace py = pybind11;
using namespace minillm;
using namespace minillm::python;

namespace {

constexpr int MAX_THREADS = 1024;  // OpenMP ends the process where it cannot start as many as it was asked for

// What a CPU can look at: the numbers that choose where an operation reads.
template <class Args>
void check_contents(const Args&) {}

template <class IsRead>
void check_token_ids(const Pair& a, const int64_t* token_ids, const IsRead& is_read) {
    for (int64_t i = 0; token_ids != nullptr && i < a.N; ++i) {
        const int64_t y = token_ids[i];
        if ((y < 0 || y >= a.V) && is_read(i))
            throw py::index_error("token id " + std::to_string(y) + " in row " + std::to_string(i) +
                                  " is outside the vocabulary [0, " + std::to_string(a.V) +
                                  "); exclude rows without a token by the mask or by ignore_index");
    }
}
void check_contents(const StatsArgs& a) {
    check_token_ids(a, a.token_ids, [&](int64_t i) { return a.mask == nullptr || a.mask[i] != 0; });
}
void check_contents(const StatsGradArgs& a) {
    check_token_ids(a, a.token_ids, [&](int64_t i) {
        bool any = false;
        for (int c = 0; c < COEFFICIENTS; ++c) any = any || a.coefficients[c * a.N + i] != 0.0f;
        return any;
    });
}

void check_contents(const SampleArgs& a) {
    for (int64_t i = 0; i < 2 * a.N; ++i)
        if (!(0.0 <= a.uniforms[i] && a.uniforms[i] < 1.0))  // NaN fails
            throw py::value_error("uniforms must lie in [0, 1), got " + std::to_string(a.uniforms[i]) + " in row " +
                                  std::to_string(i / 2));
}

// operation(make(...)) as a function of the number of threads and of what `make` takes.
template <class Args, class... P>
auto cpu_function(Args (*make)(P...), void (*operation)(const Args&)) {
    return [make, operation](int threads, P... p) {
        Args a = make(p...);
        check(a);
        check_contents(a);
        a.threads = std::clamp(threads, 1, MAX_THREADS);
        py::gil_scoped_release release;
        operation(a);
    };
}

void define_cpu(py::module_ m) {
#define MINILLM_DEFINE(name, Args) m.def(#name, cpu_function(&name##_args, &cpu::name));
    MINILLM_ROW_OPERATIONS(MINILLM_DEFINE)
    m.def("advise_huge_pages", [](Address address, size_t bytes) {
        cpu::advise_huge_pages(at<const char>(address), at<const char>(address) + bytes);
    });
    py::class_<cpu::Pages>(m, "Pages", py::buffer_protocol())
        .def(py::init<size_t>())
        .def_buffer([](const cpu::Pages& p) {
            return py::buffer_info(reinterpret_cast<uint8_t*>(p.data()), py::ssize_t(p.bytes()));
        });
    m.def("instruction_set", &cpu::instruction_set);
    m.def("use_instruction_set", &cpu::use_instruction_set);
    m.attr("TILE") = cpu::TILE;
}

template <size_t N>
py::tuple names(const char* const (&list)[N]) {
    py::tuple result(N);
    for (size_t i = 0; i < N; ++i) result[i] = py::str(list[i]);
    return result;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    define_cpu(m.def_submodule("cpu"));
#ifdef MINILLM_CUDA
    py::module_ cuda = m.def_submodule("cuda");
    define_cuda(cuda);
#endif
    m.attr("CUDA_ARCHITECTURES") = MINILLM_CUDA_ARCHITECTURES;  // "" when built without nvcc
    // The orders that Python and C++ must share.
    m.attr("STATISTICS") = names({MINILLM_STATISTICS(MINILLM_NAME)});
    m.attr("COEFFICIENTS") = names({MINILLM_COEFFICIENTS(MINILLM_NAME)});
    m.attr("DIVERGENCES") = names({MINILLM_DIVERGENCES(MINILLM_NAME)});
}
