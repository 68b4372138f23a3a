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

// A GPU reads no element across its own size; a CPU does.
void check_aligned(const Rows& rows) {
    require(reinterpret_cast<uintptr_t>(rows.data) % size_of(rows.dtype) == 0, "rows are aligned to their elements");
}

// operation(make(...)) as a function of how it is launched and of what `make` takes. How: (allocate, stream), where
// allocate(bytes) gives the address of device memory that lives until the call returns.
template <class Args, class... P>
auto cuda_function(Args (*make)(P...), std::string (*operation)(const Args&, const Launch&)) {
    return [make, operation](const std::pair<py::function, Address>& how, P... p) {
        const Args a = make(p...);
        check(a);
        check_aligned(a.student);
        check_aligned(a.teacher);
        const int64_t bytes = workspace(a);
        void* memory = bytes > 0 ? at<void>(how.first(bytes).template cast<Address>()) : nullptr;
        const std::string error = operation(a, Launch{memory, at<void>(how.second)});
        if (!error.empty()) throw std::runtime_error(error);
    };
}

}  // namespace

void define_cuda(py::module_& m) {
#define MINILLM_DEFINE(name, Args) m.def(#name, cuda_function(&name##_args, &name));
    MINILLM_ROW_OPERATIONS(MINILLM_DEFINE)
    m.def("holds_rows", [](int64_t N, int64_t V, int dtype) { return holds_rows(N, V, static_cast<DType>(dtype)); });
    m.def("versions", &versions);
}

}  // namespace minillm::python
