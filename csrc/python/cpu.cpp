// The module minillm_kernels._core. Memory comes as addresses, sizes and strides, so it is built against no particular
// torch; minillm_kernels/backends/ checks types, devices and shapes before it calls.
#include "bindings.h"

#include <string>

#include "../cpu/entry.h"
#include "../cpu/memory.h"

namespace py = pybind11;
using namespace minillm;
using namespace minillm::python;

namespace {

StatsArgs checked_stats_args(const Rows& student, const Rows* teacher, int64_t N, int64_t V, double temperature,
                             uintptr_t mask, uintptr_t token_ids, uintptr_t stats) {
    const StatsArgs a = stats_args(student, teacher, N, V, temperature, mask, token_ids, stats);
    for (int64_t i = 0; a.token_ids != nullptr && i < N; ++i) {
        const int64_t y = a.token_ids[i];
        if ((a.mask == nullptr || a.mask[i] != 0) && (y < 0 || y >= V))
            throw py::index_error("token id " + std::to_string(y) + " in row " + std::to_string(i) +
                                  " is outside the vocabulary [0, " + std::to_string(V) +
                                  "); exclude rows without a token by the mask or by ignore_index");
    }
    return a;
}

// operation(make(...)) as a function of the number of threads and of what `make` takes.
template <class Args, class... P>
auto cpu_function(Args (*make)(P...), void (*operation)(const Args&)) {
    return [make, operation](int threads, P... p) {
        Args a = make(p...);
        a.threads = threads;
        py::gil_scoped_release release;
        operation(a);
    };
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    define_rows(m);
    m.def("row_stats", cpu_function(&checked_stats_args, &cpu::row_stats));
    m.def("row_grad", cpu_function(&grad_args, &cpu::row_grad));
    m.def("row_divergence", cpu_function(&divergence_args, &cpu::row_divergence));
    m.def("row_divergence_grad", cpu_function(&divergence_grad_args, &cpu::row_divergence_grad));
    m.def("row_sample", cpu_function(&sample_args, &cpu::row_sample));
    m.def("advise_huge_pages", [](uintptr_t address, size_t bytes) {
        cpu::advise_huge_pages(at<const char>(address), at<const char>(address) + bytes);
    });
    m.def("instruction_set", &cpu::instruction_set);
    m.def("use_instruction_set", &cpu::use_instruction_set);
    m.attr("TILE") = cpu::TILE;
#ifdef MINILLM_CUDA
    define_cuda(m);
#endif
    m.attr("CUDA_ARCHITECTURES") = MINILLM_CUDA_ARCHITECTURES;  // "" when built without nvcc
}
