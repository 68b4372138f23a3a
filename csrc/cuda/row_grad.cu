// The launcher of row_grad_kernel.
#include "row_grad.cuh"

#include "launch.cuh"

namespace minillm::cuda {

std::string row_grad(const GradArgs& a, const Launch& l) {
    if (a.N == 0) return "";
    const int parts = splits(a.N, a.V);
    return with_types(a.student, a.teacher, [&](auto s, auto t) {
        return launch("row_grad_kernel", a, l, row_grad_kernel<decltype(s), decltype(t)>, {a.N * parts}, a, parts);
    });
}

}  // namespace minillm::cuda
