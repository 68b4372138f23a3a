// defines: F32 (a SIMD register of LANES floats), load/store of fp32, bf16 and fp16, exp2_fast, log2_fast, sum_lanes
//
// Compiled once per instruction set (csrc/CMakeLists.txt) with MINILLM_ISA naming the namespace, so one binary holds all of
// them. Everything is written with the compiler's portable vectors; intrinsics appear only where there is an
// instruction that they do not reach: fp16 conversion, maximum, permutation, scaling by a power of two.
#pragma once

#include <float.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../rowmath/scalar.h"
#include "entry.h"

namespace minillm::cpu::MINILLM_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float FloatVector __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVector __attribute__((vector_size(4 * LANES)));
typedef uint32_t WordVector __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVector __attribute__((vector_size(2 * LANES)));

struct F32 {
    FloatVector v;

    F32() = default;
    MINILLM_HD F32(FloatVector x) : v(x) {}
    MINILLM_HD explicit F32(float x) : v(x - FloatVector{}) {}

    // Memory is void* here: rows may start at any byte, and no float or uint16_t lies at an odd one.
    static MINILLM_HD F32 load(const void* p) {
        F32 r;
        memcpy(&r.v, p, sizeof r.v);
        return r;
    }
    MINILLM_HD void store(void* p) const { memcpy(p, &v, sizeof v); }

    friend MINILLM_HD F32 operator+(F32 a, F32 b) { return a.v + b.v; }
    friend MINILLM_HD F32 operator-(F32 a, F32 b) { return a.v - b.v; }
    friend MINILLM_HD F32 operator*(F32 a, F32 b) { return a.v * b.v; }
    friend MINILLM_HD F32 operator/(F32 a, F32 b) { return a.v / b.v; }
    friend MINILLM_HD IntVector operator<(F32 a, F32 b) { return a.v < b.v; }
    friend MINILLM_HD IntVector operator>(F32 a, F32 b) { return a.v > b.v; }
    friend MINILLM_HD IntVector operator==(F32 a, F32 b) { return a.v == b.v; }
    MINILLM_HD F32& operator+=(F32 b) { v += b.v; return *this; }
    MINILLM_HD F32& operator-=(F32 b) { v -= b.v; return *this; }
};

MINILLM_HD F32 select(IntVector mask, F32 a, F32 b) { return mask ? a.v : b.v; }

#if defined(__AVX512F__)
MINILLM_HD F32 max_of(F32 a, F32 b) { return (FloatVector)_mm512_max_ps((__m512)a.v, (__m512)b.v); }
#elif defined(__AVX2__)
MINILLM_HD F32 max_of(F32 a, F32 b) { return (FloatVector)_mm256_max_ps((__m256)a.v, (__m256)b.v); }
#else
MINILLM_HD F32 max_of(F32 a, F32 b) { return select(a > b, a, b); }
#endif

MINILLM_HD float max_lane(F32 a) {
    float r = a.v[0];
    for (int i = 1; i < LANES; ++i) r = minillm::max_of(a.v[i], r);
    return r;
}
// Pairwise, in double.
MINILLM_HD double sum_lanes(F32 a) {
    double r[LANES];
    for (int i = 0; i < LANES; ++i) r[i] = a.v[i];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) r[i] += r[i + half];
    return r[0];
}

// 2^x for finite x <= 127, relative error below 1.5e-7; 0 below -126 (no denormals but where the instruction makes them);
// NaN for NaN. x = n + r with n rounded to the nearest STEP: 2^x = 2^floor(n) 2^(n - floor(n)) 2^r, the middle factor from
// a table in a register, the last a minimax polynomial. A table of one entry (STEP = 1) where there is no permutation.
#if defined(__AVX512F__)
constexpr int STEPS_LOG2 = 4;
#elif defined(__AVX2__)
constexpr int STEPS_LOG2 = 3;
#else
constexpr int STEPS_LOG2 = 0;
#endif

MINILLM_HD F32 exp2_fast(F32 x) {
    // Adding 1.5 * 2^(23 - STEPS_LOG2) rounds to a multiple of the step and leaves n / step in the low bits.
    const F32 magic(float(3 << (22 - STEPS_LOG2)));
    const F32 shifted = x + magic;
    const F32 n = shifted - magic, r = x - n;
#if defined(__AVX512F__)
    const __m512 table = _mm512_set_ps(1.91520656f, 1.83400810f, 1.75625217f, 1.68179286f, 1.61049032f, 1.54221082f,
                                       1.47682619f, 1.41421354f, 1.35425556f, 1.29683959f, 1.24185777f, 1.18920708f,
                                       1.13878870f, 1.09050775f, 1.04427373f, 1.0f);
    const F32 root = (FloatVector)_mm512_permutexvar_ps((__m512i)shifted.v, table);
    const F32 p = (F32(5.55021316e-2f) * r + F32(2.40234300e-1f)) * r + F32(6.93147182e-1f);
    return (FloatVector)_mm512_scalef_ps((__m512)(root * r * p + root).v, (__m512)n.v);
#else
#if defined(__AVX2__)
    const __m256 table = _mm256_set_ps(1.83400810f, 1.68179286f, 1.54221082f, 1.41421354f, 1.29683959f, 1.18920708f,
                                       1.09050775f, 1.0f);
    const F32 root = (FloatVector)_mm256_permutevar8x32_ps(table, (__m256i)shifted.v);
    const F32 p = (F32(5.54962046e-2f) * r + F32(2.40257695e-1f)) * r + F32(6.93147242e-1f);
    const F32 e = root * r * p + root;
#else
    F32 e = F32(1.53456960e-4f) * r + F32(1.34000636e-3f);
    e = e * r + F32(9.61849000e-3f);
    e = e * r + F32(5.55032827e-2f);
    e = e * r + F32(2.40226462e-1f);
    e = e * r + F32(6.93147182e-1f);
    e = e * r + F32(1.0f);
#endif
    // times 2^n, not with n added to the exponent: that would turn a NaN with low bits set into a number.
    const WordVector power = (((WordVector)shifted.v >> STEPS_LOG2) << 23) + 0x3f800000;
    return select(x < F32(-126.0f), F32(0.0f), e * F32((FloatVector)power));
#endif
}

// log2 x for normal positive x: x = 2^e m, m in [sqrt(1/2), sqrt(2)), ln m = 2 artanh(u), u = (m - 1)/(m + 1).
MINILLM_HD F32 log2_fast(F32 x) {
    const IntVector bits = (IntVector)x.v;
    const IntVector exponent = (bits - 0x3f3504f3) >> 23;
    const F32 m((FloatVector)(bits - (exponent << 23)));
    const F32 e(__builtin_convertvector(exponent, FloatVector));
    const F32 u = (m - F32(1.0f)) / (m + F32(1.0f)), uu = u * u;
    F32 p = F32(2.0f / 9) * uu + F32(2.0f / 7);
    p = p * uu + F32(2.0f / 5);
    p = p * uu + F32(2.0f / 3);
    p = p * uu + F32(2.0f);
    return select(x == x, e + F32(float(LOG2E)) * (u * p), x);
}

// ---- element types -------------------------------------------------------------------------------------------------

MINILLM_HD F32 widen_bf16(const void* p) {
    HalfVector h;
    memcpy(&h, p, sizeof h);
    return (FloatVector)(__builtin_convertvector(h, WordVector) << 16);
}
// To nearest, ties to even. NaN stays NaN, which only matters where the caller does not know all to be finite.
MINILLM_HD void narrow_bf16(F32 x, void* p, bool finite) {
    const WordVector w = (WordVector)x.v;
    WordVector h = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    if (!finite) h = (x == x) ? h : ((w >> 16) | 0x40);
    const HalfVector narrow = __builtin_convertvector(h, HalfVector);
    memcpy(p, &narrow, sizeof narrow);
}

#if defined(__AVX512F__)
MINILLM_HD F32 widen_fp16(const void* p) {
    return (FloatVector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
MINILLM_HD void narrow_fp16(F32 x, void* p) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x.v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
MINILLM_HD F32 widen_fp16(const void* p) {
    return (FloatVector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
MINILLM_HD void narrow_fp16(F32 x, void* p) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT));
}
#else
MINILLM_HD F32 widen_fp16(const void* p) {
    HalfVector half;
    memcpy(&half, p, sizeof half);
    const WordVector h = __builtin_convertvector(half, WordVector);
    const WordVector sign = (h & 0x8000) << 16, magnitude = (h & 0x7fff) << 13;
    // Scaling by 2^112 moves the exponent bias from 15 to 127 and makes denormals normal; inf and NaN need it set.
    const FloatVector scaled = (FloatVector)magnitude * 0x1p112f;
    const WordVector special = magnitude | 0x7f800000;
    return (FloatVector)(((magnitude >= 0x0f800000) ? special : (WordVector)scaled) | sign);
}
MINILLM_HD void narrow_fp16(F32 x, void* p) {
    const WordVector w = (WordVector)x.v, sign = (w >> 16) & 0x8000, magnitude = w & 0x7fffffff;
    // Normal results: round to nearest even at bit 13, then rebias. Denormal results: adding 0.5 aligns them in fp32.
    const WordVector normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    const WordVector denormal = (WordVector)((FloatVector)magnitude + 0.5f) - 0x3f000000;
    WordVector r = (magnitude < 0x38800000) ? denormal : normal;
    r = (magnitude >= 0x477ff000) ? (WordVector{} + 0x7c00) : r;
    r = (magnitude > 0x7f800000) ? (WordVector{} + 0x7e00) : r;
    const HalfVector h = __builtin_convertvector(r | sign, HalfVector);
    memcpy(p, &h, sizeof h);
}
#endif

}  // namespace minillm::cpu::MINILLM_ISA
