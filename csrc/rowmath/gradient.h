// defines: Coefficient, GradientRow, Needs, gradient
//
// For any loss  c_r KL(q||p) + c_f KL(p||q) + c_y log q(y) + c_h H(q) + c_l LSE_s  of a row
//
//     dL/dz_v = 1/T [ c_r q_v (log q_v - log p_v - RKL) + c_f (q_v - p_v) + c_y (1[v = y] - q_v)
//                     - c_h q_v (log q_v + H) + c_l q_v ]
//             = q_v (k_d (s - t) + k_s s + k_1) - k_p p_v + [v = y] k_y
//
// with s, t relative to the origins and in units of ln 2 as in state.h, q_v = 2^(s - log2 Z_s), p_v = 2^(t - log2 Z_t). The
// constants are formed once a row; only they know T, the statistics and the coefficients.
#pragma once

#include "state.h"

namespace minillm {

// Rows of the [COEFFICIENTS, N] tensor that row_grad takes, in order: DIFFERENTIABLE of minillm_kernels/rows.py.
#define MINILLM_COEFFICIENTS(X) \
    X(C_REVERSE_KL)             \
    X(C_FORWARD_KL)             \
    X(C_STUDENT_LOGPROBS)       \
    X(C_STUDENT_ENTROPY)        \
    X(C_STUDENT_LOGSUMEXP)
enum Coefficient { MINILLM_COEFFICIENTS(MINILLM_ENUMERATOR) COEFFICIENTS };

template <class R>
struct GradientRow {
    R ms, mt, log2Zs, log2Zt;
    R kd, ks, k1, kp, ky;

    // stat(i), coef(i): the statistics and coefficients of this row.
    template <class Stat, class Coef>
    static MINILLM_HD GradientRow make(Stat stat, Coef coef, R inv_T) {
        GradientRow r;
        r.ms = stat(STUDENT_ORIGIN);
        r.mt = stat(TEACHER_ORIGIN);
        const R lnZs = stat(STUDENT_LOGZ), lnZt = stat(TEACHER_LOGZ);
        r.log2Zs = lnZs * R(LOG2E);
        r.log2Zt = lnZt * R(LOG2E);
        const R cr = coef(C_REVERSE_KL), cf = coef(C_FORWARD_KL);
        const R ch = coef(C_STUDENT_ENTROPY), cl = coef(C_STUDENT_LOGSUMEXP);
        // log q(y) = -inf for a token outside the support: it has no gradient.
        const R cy = stat(STUDENT_LOGPROBS) == R(-INFINITY) ? R(0) : coef(C_STUDENT_LOGPROBS);
        R constant = cf - cy + cl;
        // Guarded, so that a statistic that no coefficient asks for (the KL of a one-model row) cannot bring a NaN in.
        if (cr != R(0)) constant -= cr * (lnZs - lnZt + stat(REVERSE_KL));
        if (ch != R(0)) constant += ch * (lnZs - stat(STUDENT_ENTROPY));
        r.kd = inv_T * R(LN2) * cr;
        r.ks = inv_T * R(LN2) * -ch;
        r.k1 = inv_T * constant;
        r.kp = inv_T * cf;
        r.ky = inv_T * cy;
        return r;
    }

    // A probability that underflowed has no gradient, whatever (perhaps infinite) logarithm stands beside it.
    template <class F>
    MINILLM_HD F of_student(F s) const {
        const F q = exp2_fast(s - F(log2Zs));
        return select(q == F(0.0f), q, q * (F(ks) * s + F(k1)));
    }
    // Where neither the entropy nor the forward KL has a coefficient: one exponential, two multiplications.
    MINILLM_HD bool is_simple() const { return ks == R(0) && kp == R(0); }
    template <class F>
    MINILLM_HD F of_pair_simple(F s, F t) const {
        const F q = exp2_fast(s - F(log2Zs));
        return select(q == F(0.0f), q, q * (F(kd) * (s - t) + F(k1)));
    }
    template <class F>
    MINILLM_HD F of_pair(F s, F t) const {
        const F q = exp2_fast(s - F(log2Zs));
        const F of_q = select(q == F(0.0f), q, q * (F(kd) * (s - t) + F(ks) * s + F(k1)));
        return of_q - F(kp) * exp2_fast(t - F(log2Zt));
    }
};

// What the coefficients of a row ask for; the loops are compiled once for each.
enum class Needs { student, simple_pair, pair };

template <Needs NEEDS, class F>
MINILLM_HD F gradient(const GradientRow<float>& g, F s, F t) {
    if constexpr (NEEDS == Needs::student) return g.of_student(s);
    if constexpr (NEEDS == Needs::simple_pair) return g.of_pair_simple(s, t);
    return g.of_pair(s, t);
}

}  // namespace minillm
