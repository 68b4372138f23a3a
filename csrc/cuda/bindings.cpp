// The CUDA part of minillm_kernels._core, compiled by the host compiler: versions, and the launchers by address.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "launch.h"

namespace py = pybind11;

namespace minillm::cuda {
namespace {

// (driver, runtime), as 1000 * major + 10 * minor; driver 0 = none.
py::tuple versions() {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    return py::make_tuple(driver, runtime);
}

void row_stats(py::tuple student, py::tuple teacher, int64_t N, int64_t V, float temperature, uintptr_t mask,
               uintptr_t token_ids, uintptr_t stats, uintptr_t stream) {
    const auto rows = [](const py::tuple& t) {  // (address, dtype, row stride); address 0 = absent
        return Rows{reinterpret_cast<const void*>(t[0].cast<uintptr_t>()), t[1].cast<int>(), t[2].cast<int64_t>()};
    };
    StatsArgs a;
    a.student = rows(student);
    a.teacher = rows(teacher);
    a.N = N;
    a.V = V;
    a.inv_T = 1.0f / temperature;
    a.mask = reinterpret_cast<const uint8_t*>(mask);
    a.token_ids = reinterpret_cast<const int64_t*>(token_ids);
    a.stats = reinterpret_cast<float*>(stats);
    const std::string error = launch_row_stats(a, reinterpret_cast<void*>(stream));
    if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace

void define_bindings(py::module_& m) {
    m.def("cuda_versions", &versions);
    m.def("cuda_row_stats", &row_stats);
}

}  // namespace minillm::cuda
