// defines: DType, Rows, Pair, the row operations and their arguments, as every compiled backend takes them
#pragma once

#include <stdint.h>

#include "rowmath/divergence.h"
#include "rowmath/gradient.h"
#include "rowmath/state.h"

namespace minillm {

enum class DType : int { fp32, bf16, fp16 };
MINILLM_HD int64_t size_of(DType t) { return t == DType::fp32 ? 4 : 2; }

// N = outer * inner rows of contiguous columns: row i starts (i / inner) * outer_stride + (i % inner) * inner_stride
// elements after data. Two strides, so that logits[:, :-1] needs no copy.
struct Rows {
    char* data = nullptr;
    DType dtype = DType::fp32;
    int64_t inner = 1, outer_stride = 0, inner_stride = 0;

    explicit MINILLM_HD operator bool() const { return data != nullptr; }
    MINILLM_HD char* row(int64_t i) const {
        return data + ((i / inner) * outer_stride + (i % inner) * inner_stride) * size_of(dtype);
    }
};

// What every operation has: N rows of V columns of a student and, unless teacher.data is null, of a teacher. Python's is in
// minillm_kernels/rows.py.
struct Pair {
    Rows student, teacher;
    int64_t N = 0, V = 0;
    double inv_T = 1.0;
    int threads = 1;  // of the CPU
};

// mask[i] == 0: row i is not read and its results are 0. mask and token_ids may be null.
// stats: [STATISTICS, N].
struct StatsArgs : Pair {
    const uint8_t* mask = nullptr;
    const int64_t* token_ids = nullptr;
    float* stats = nullptr;
};

// grad: N rows of `width` >= V columns of the student's dtype; columns from V on are set to 0. May be the student itself.
// coefficients: [COEFFICIENTS, N]; a row whose coefficients are all 0 is not read. factor, unless null, is a number in memory
// that multiplies all of them; where it is 1 nothing is done: the gradient stands there already.
struct GradArgs : Pair {
    const int64_t* token_ids = nullptr;
    const float* stats = nullptr;
    const float* coefficients = nullptr;
    Rows grad;
    int64_t width = 0;
    const float* factor = nullptr;
};

// Statistics and gradient at once: a row whose coefficients are all 0 is not read, and its statistics are 0.
struct StatsGradArgs : GradArgs {
    float* stats_out = nullptr;
};

// out: [2, N], the divergence and sum_v q_v h_v (divergence.h).
struct DivergenceArgs : Pair {
    Divergence divergence = Divergence::jsd;
    float beta = 0.5f;
    const uint8_t* mask = nullptr;
    const float* stats = nullptr;
    float* out = nullptr;
};

// values: the [2, N] of the forward; scale: [N], dL/dD of each row, 0 = the row is not read.
struct DivergenceGradArgs : Pair {
    Divergence divergence = Divergence::jsd;
    float beta = 0.5f;
    const float* stats = nullptr;
    const float* values = nullptr;
    const float* scale = nullptr;
    Rows grad;
    int64_t width = 0;
};

// The student's N rows of V columns, which lie one behind the other, are multiplied by a number that is in memory; where it
// is 1 they are not touched, where it is 0 they become 0, NaN too.
struct ScaleArgs : Pair {
    const float* factor = nullptr;
};

// uniforms: [N, 2]. greedy: the argmax of the mixture instead of a draw. logprobs: [3, N], student, teacher, mixture.
struct SampleArgs : Pair {
    const double* uniforms = nullptr;
    double alpha = 0.0, top_p = 1.0;
    int64_t top_k = 0;
    bool greedy = false;
    int64_t* token_ids = nullptr;
    float* logprobs = nullptr;
    uint8_t* from_teacher = nullptr;
};

// The row operations, X(name, arguments): entry points, dispatch and bindings are made from this list.
#define MINILLM_ROW_OPERATIONS(X)               \
    X(row_stats, StatsArgs)                     \
    X(row_grad, GradArgs)                       \
    X(row_stats_grad, StatsGradArgs)            \
    X(row_scale, ScaleArgs)                     \
    X(row_divergence, DivergenceArgs)           \
    X(row_divergence_grad, DivergenceGradArgs)  \
    X(row_sample, SampleArgs)

}  // namespace minillm
