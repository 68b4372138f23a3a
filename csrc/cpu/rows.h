// defines: DType, Rows, and the arguments and entry points of the CPU row operations
#pragma once

#include <stdint.h>

#include "../rowmath/divergence.h"
#include "../rowmath/gradient.h"
#include "../rowmath/state.h"

namespace minillm::cpu {

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

// What every operation has: N rows of V columns of a student and, unless teacher.data is null, of a teacher.
struct Pair {
    Rows student, teacher;
    int64_t N = 0, V = 0;
    double inv_T = 1.0;
    int threads = 1;
};

// mask[i] == 0: row i is not read and its results are 0. mask and token_ids may be null.
// stats: [STATISTICS, N].
struct StatsArgs : Pair {
    const uint8_t* mask = nullptr;
    const int64_t* token_ids = nullptr;
    float* stats = nullptr;
};

// grad: N rows of `width` >= V columns of the student's dtype; columns from V on are set to 0. May be the student itself.
// coefficients: [COEFFICIENTS, N]; a row whose coefficients are all 0 is not read.
struct GradArgs : Pair {
    const int64_t* token_ids = nullptr;
    const float* stats = nullptr;
    const float* coefficients = nullptr;
    Rows grad;
    int64_t width = 0;
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

void row_stats(const StatsArgs&);
void row_grad(const GradArgs&);
void row_divergence(const DivergenceArgs&);
void row_divergence_grad(const DivergenceGradArgs&);
void row_sample(const SampleArgs&);
// The widest instruction set in use; use_instruction_set(name) picks a narrower one (tests), false if it is not available.
const char* instruction_set();
bool use_instruction_set(const char* name);

// ---- shared by the operations --------------------------------------------------------------------------------------

// Columns are read in tiles that fit the L1 cache, and partial results are merged tile by tile in this order whatever the
// number of threads: same input, same bits.
constexpr int64_t TILE = 2048;
MINILLM_HD int64_t tiles(int64_t V) { return (V + TILE - 1) / TILE; }

// A row is split over several work units when there are few rows. Depends on N and V alone (determinism).
MINILLM_HD int64_t splits(int64_t N, int64_t V) {
    constexpr int64_t enough_units = 64;
    const int64_t wanted = N >= enough_units ? 1 : (enough_units + N - 1) / (N > 0 ? N : 1);
    return wanted < tiles(V) ? wanted : tiles(V);
}

struct Span {
    int64_t row, split, first_tile, last_tile;  // tiles [first_tile, last_tile)
};
MINILLM_HD Span span_of(int64_t unit, int64_t n_splits, int64_t V) {
    const int64_t row = unit / n_splits, split = unit % n_splits, n = tiles(V);
    return {row, split, split * n / n_splits, (split + 1) * n / n_splits};
}

}  // namespace minillm::cpu
