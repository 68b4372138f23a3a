// The CUDA part of minillm_kernels._core, compiled by the host compiler: versions, and the launchers by address.
#include "bindings.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "../cuda/launch.h"

namespace minillm::python {
namespace {

using namespace cuda;

// (driver, runtime), as 1000 * major + 10 * minor; driver 0 = none.
py::tuple versions() {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    return py::make_tuple(driver, runtime);
}

// operation(make(...)) as a function of the workspace, the stream, and what `make` takes.
template <class Args, class... P>
auto cuda_function(Args (*make)(P...), std::string (*operation)(const Args&, const Launch&)) {
    return [make, operation](uintptr_t workspace, uintptr_t stream, P... p) {
        const std::string error = operation(make(p...), Launch{at<void>(workspace), at<void>(stream)});
        if (!error.empty()) throw std::runtime_error(error);
    };
}

}  // namespace

void define_cuda(py::module_& m) {
    m.def("cuda_versions", &versions);
    m.def("cuda_row_stats", cuda_function(&stats_args, &row_stats));
    m.def("cuda_row_grad", cuda_function(&grad_args, &row_grad));
    m.def("cuda_row_stats_grad", cuda_function(&stats_grad_args, &row_stats_grad));
    m.def("cuda_holds_rows", [](int64_t N, int64_t V, int dtype) { return holds_rows(N, V, static_cast<DType>(dtype)); });
    m.def("cuda_row_divergence", cuda_function(&divergence_args, &row_divergence));
    m.def("cuda_row_divergence_grad", cuda_function(&divergence_grad_args, &row_divergence_grad));
    m.def("cuda_row_sample", cuda_function(&sample_args, &row_sample));
    // Bytes, of N rows and V columns.
    m.def("cuda_row_stats_workspace", &row_stats_workspace);
    m.def("cuda_row_divergence_workspace", &row_divergence_workspace);
    m.def("cuda_row_sample_workspace", &row_sample_workspace);
}

}  // namespace minillm::python
