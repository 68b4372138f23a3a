// defines: launch, with_type, with_types
#pragma once

#include "launch.h"
#include "tiles.cuh"

namespace minillm::cuda {

// kernel(arguments...) on min(blocks, MAX_BLOCKS) blocks of THREADS; kernels stride over what is left. An error names it.
template <class... P, class... A>
std::string launch(const char* name, const Pair& rows, const Launch& l, void (*kernel)(P...), int64_t blocks,
                   int64_t dynamic_shared, A... arguments) {
    constexpr int64_t MAX_BLOCKS = 1 << 20, MAX_COLUMNS = 1 << 30;
    const unsigned grid = unsigned(blocks < MAX_BLOCKS ? blocks : MAX_BLOCKS);
    if (rows.V > MAX_COLUMNS)
        return std::string(name) + ": " + std::to_string(rows.V) + " columns, at most 2^30 are supported in a row";
    std::string error;
    constexpr int64_t UNASKED = 48 << 10;  // bytes that a block may have without asking
    cudaError_t status = cudaSuccess;
    if (dynamic_shared > UNASKED)
        status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      int(dynamic_shared));
#ifdef __CUDACC__
    if (status == cudaSuccess) {
        kernel<<<grid, THREADS, dynamic_shared, static_cast<cudaStream_t>(l.stream)>>>(arguments...);
        status = cudaGetLastError();
    }
#else
    (void)l;
    if (status == cudaSuccess) error = host_cuda::launch(name, kernel, grid, THREADS, dynamic_shared, arguments...);
#endif
    if (status != cudaSuccess) {
        error = cudaGetErrorString(status);
        cudaGetLastError();  // or the next launch would find it
    }
    if (error.empty()) return "";
    return std::string(name) + "<<<" + std::to_string(grid) + ", " + std::to_string(THREADS) + ", " +
           std::to_string(dynamic_shared) + ">>> on " + std::to_string(rows.N) + " x " + std::to_string(rows.V) +
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
