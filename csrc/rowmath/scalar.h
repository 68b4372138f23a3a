// defines: LOG2E, LN2, exp2_fast, log2_fast, select, max_of for one number
//
// The formulas of this folder are templates over F, a real number or a vector of them. These are the few functions that
// they need beyond arithmetic and comparison; csrc/cpu/simd.h has the same names for a SIMD register.
#pragma once

#include <math.h>

#include "config.h"

namespace minillm {

constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

// Base 2 throughout: it is what the hardware has (ex2 on a GPU, the exponent field on a CPU), and saves a multiplication.
// On a GPU one instruction each: ex2 to 2^-22.5 of the value, 0 where the result would be denormal; lg2 to 2^-22, absolute
// for x in [1/2, 2] and relative outside.
MINILLM_HD float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#else
    return exp2f(x);
#endif
}
MINILLM_HD float log2_fast(float x) {
#ifdef __CUDA_ARCH__
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#else
    return log2f(x);
#endif
}
MINILLM_HD double exp2_fast(double x) { return exp2(x); }
MINILLM_HD double log2_fast(double x) { return log2(x); }

MINILLM_HD float select(bool mask, float a, float b) { return mask ? a : b; }
MINILLM_HD double select(bool mask, double a, double b) { return mask ? a : b; }
// b where a comparison with NaN fails: max_of(NaN, b) is b.
MINILLM_HD float max_of(float a, float b) { return a > b ? a : b; }
MINILLM_HD double max_of(double a, double b) { return a > b ? a : b; }

}  // namespace minillm
