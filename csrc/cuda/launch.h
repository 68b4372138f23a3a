// defines: the arguments and launchers of the CUDA operations, and define_bindings
//
// Launchers take device pointers, sizes, strides in elements, a type code and a stream; they never synchronise, and return
// an empty string or an error that names the kernel and its launch shape.
#pragma once

#include <stdint.h>

#include <string>

namespace pybind11 {
class module_;
}

namespace minillm::cuda {

struct Rows {
    const void* data = nullptr;  // device memory
    int dtype = 0;               // 0 fp32, 1 bf16, 2 fp16
    int64_t stride = 0;          // elements between rows
};

// As csrc/cpu/rows.h StatsArgs: stats is [STATISTICS, N] on the device, mask and token_ids may be null.
struct StatsArgs {
    Rows student, teacher;
    int64_t N = 0, V = 0;
    float inv_T = 1.0f;
    const uint8_t* mask = nullptr;
    const int64_t* token_ids = nullptr;
    float* stats = nullptr;
};

std::string launch_row_stats(const StatsArgs& args, void* stream);

void define_bindings(pybind11::module_& m);

}  // namespace minillm::cuda
