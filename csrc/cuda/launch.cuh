// defines: Grid, launch, with_type, with_types
#pragma once

#include "launch.h"
#include "tiles.cuh"

namespace minillm::cuda {

struct Grid {
    int64_t blocks;              // kernels stride over what is left behind the first MAX_BLOCKS
    int64_t dynamic_shared = 0;  // bytes a block
    int cluster = 1;             // blocks that run at the same time: a power of two
};

// kernel(arguments...) on blocks of THREADS. An error names it.
template <class... P, class... A>
std::string launch(const char* name, const Pair& rows, const Launch& l, void (*kernel)(P...), const Grid& shape,
                   A... arguments) {
    constexpr int64_t MAX_BLOCKS = 1 << 20, MAX_COLUMNS = 1 << 30;
    const unsigned grid = unsigned(shape.blocks < MAX_BLOCKS ? shape.blocks : MAX_BLOCKS);
    if (rows.V > MAX_COLUMNS)
        return std::string(name) + ": " + std::to_string(rows.V) + " columns, at most 2^30 are supported in a row";
    std::string error;
    constexpr int64_t UNASKED = 48 << 10;  // bytes that a block may have without asking
    cudaError_t status = cudaSuccess;
    if (shape.dynamic_shared > UNASKED)
        status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      int(shape.dynamic_shared));
#ifdef __CUDACC__
    if (status == cudaSuccess) {
        cudaLaunchAttribute clusters = {};
        clusters.id = cudaLaunchAttributeClusterDimension;
        clusters.val.clusterDim = {unsigned(shape.cluster), 1, 1};
        cudaLaunchConfig_t how = {};
        how.gridDim = grid;
        how.blockDim = THREADS;
        how.dynamicSmemBytes = size_t(shape.dynamic_shared);
        how.stream = static_cast<cudaStream_t>(l.stream);
        how.attrs = &clusters;
        how.numAttrs = shape.cluster > 1;
        status = cudaLaunchKernelEx(&how, kernel, P(arguments)...);
    }
#else
    (void)l;
    if (status == cudaSuccess)
        error = host_cuda::launch(name, kernel, grid, THREADS, shape.dynamic_shared, shape.cluster, arguments...);
#endif
    if (status != cudaSuccess) {
        error = cudaGetErrorString(status);
        cudaGetLastError();  // or the next launch would find it
    }
    if (error.empty()) return "";
    return std::string(name) + "<<<" + std::to_string(grid) + ", " + std::to_string(THREADS) + ", " +
           std::to_string(shape.dynamic_shared) + ">>> on " + std::to_string(rows.N) + " x " + std::to_string(rows.V) +
           " logits: " + error;
}

// body(E()) for the element type of some rows.
template <class Body>
std::string with_type(DType type, const Body& body) {
    if (type == DType::fp32) return body(float());
    if (type == DType::bf16) return body(__nv_bfloat16());
    return body(__half());
}

// body(S(), T()), NoTeacher for T where there is none.
template <class Body>
std::string with_types(const Rows& student, const Rows& teacher, const Body& body) {
    return with_type(student.dtype, [&](auto s) {
        if (!teacher) return body(s, NoTeacher());
        return with_type(teacher.dtype, [&](auto t) { return body(s, t); });
    });
}

}  // namespace minillm::cuda
