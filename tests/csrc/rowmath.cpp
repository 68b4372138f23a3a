// csrc/rowmath and csrc/cpu/simd.h behind C functions, for test_rowmath.py: compiled once for each instruction set.
#include "cpu/simd.h"
#include "rowmath/divergence.h"
#include "rowmath/gradient.h"
#include "rowmath/sampling.h"
#include "rowmath/state.h"

using namespace minillm;
using namespace minillm::cpu::MINILLM_ISA;

template <class Function>
static void registers(int64_t n, Function function) {
    for (int64_t i = 0; i < n; i += LANES) function(i);
}

extern "C" {
int lanes() { return LANES; }

// A state is ms, mt, Zs, Zt, A, B, C.
void merge_states(const double* a, const double* b, double inv_T, double* out) {
    RowState<double> x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    const RowState<double> r = merge(x, y, inv_T);
    memcpy(out, &r, sizeof r);
}
void empty_state(double* out) {
    const RowState<double> r = RowState<double>::empty();
    memcpy(out, &r, sizeof r);
}
void finish_state(const double* a, double inv_T, int has_teacher, double* out) {
    RowState<double> x;
    memcpy(&x, a, sizeof x);
    finish(x, inv_T, has_teacher != 0, out);
}
uint32_t key_of(float x) { return ordered_key(x); }
float of_key(uint32_t key) { return from_ordered_key(key); }
double mixture(double alpha, double lq, double lp) { return mixture_logprob(alpha, lq, lp); }

// n: a multiple of the register.
void exp2_of(const float* x, float* out, int64_t n) {
    registers(n, [&](int64_t i) { exp2_fast(F32::load(x + i)).store(out + i); });
}
void log2_of(const float* x, float* out, int64_t n) {
    registers(n, [&](int64_t i) { log2_fast(F32::load(x + i)).store(out + i); });
}
void from_bf16(const uint16_t* x, float* out, int64_t n) {
    registers(n, [&](int64_t i) { widen_bf16(x + i).store(out + i); });
}
void from_fp16(const uint16_t* x, float* out, int64_t n) {
    registers(n, [&](int64_t i) { widen_fp16(x + i).store(out + i); });
}
void to_bf16(const float* x, uint16_t* out, int64_t n) {
    registers(n, [&](int64_t i) { narrow_bf16(F32::load(x + i), out + i, false); });
}
void to_fp16(const float* x, uint16_t* out, int64_t n) {
    registers(n, [&](int64_t i) { narrow_fp16(F32::load(x + i), out + i); });
}
}
