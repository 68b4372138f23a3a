// The launcher of row_scale_kernel.
#include "row_scale.cuh"

#include "launch.cuh"

namespace minillm::cuda {

std::string row_scale(const ScaleArgs& a, const Launch& l) {
    constexpr int64_t columns_a_block = 16 * THREADS, most_blocks = 2048;  // the grid strides over what is left
    if (a.N * a.V == 0) return "";
    const int64_t wanted = (a.N * a.V + columns_a_block - 1) / columns_a_block;
    return with_type(a.student.dtype, [&](auto e) {
        const Grid shape = {wanted < most_blocks ? wanted : most_blocks};
        return launch("row_scale_kernel", a, l, row_scale_kernel<decltype(e)>, shape, a);
    });
}

}  // namespace minillm::cuda
