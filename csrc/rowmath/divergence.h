// defines: Divergence, value_unit, slope_unit, DivergenceTerm, divergence_term
//
// Divergences D = sum_v f(q_v, p_v) that the one-pass state of state.h cannot hold, because their mixture m needs both
// normalisers first. With h_v = dD/dq_v, and q = softmax(z/T):
//
//     dD/dz_v = 1/T q_v (h_v - sum_u q_u h_u)
//
//     jsd             beta KL(p||m) + (1-beta) KL(q||m)   m = beta p + (1-beta) q     h = (1-beta) log(q/m)
//     skew forward    KL(p||m)                            m = beta p + (1-beta) q     h = -(1-beta) p/m
//     skew reverse    KL(q||m)                            m = (1-beta) p + beta q     h = log(q/m) + 1 - beta q/m
//     tvd             1/2 sum |p - q|                                                 h = sign(q - p)/2
//
// (for jsd the other terms of h add up to a constant, which the centring removes). One read of the pair for the value and
// sum q h, one read and one write for the gradient.
#pragma once

#include <float.h>

#include "config.h"
#include "scalar.h"

namespace minillm {

// MIXTURE_DIVERGENCES of minillm_kernels/rows.py.
#define MINILLM_DIVERGENCES(X) \
    X(jsd)                     \
    X(skew_forward_kl)         \
    X(skew_reverse_kl)         \
    X(tvd)
enum class Divergence { MINILLM_DIVERGENCES(MINILLM_ENUMERATOR) };

// What the fields of DivergenceTerm are in units of: base-2 logarithms are left as they come.
MINILLM_HD constexpr double value_unit(Divergence D) { return D == Divergence::tvd ? 1.0 : LN2; }
MINILLM_HD constexpr double slope_unit(Divergence D) { return D == Divergence::jsd ? LN2 : 1.0; }

template <class F>
struct DivergenceTerm {
    F q, value, q_slope;  // f(q_v, p_v) and q_v h_v
};

// lq, lp: log2 of the probabilities, finite (-FLT_MAX outside the support, where q and p are 0). Where m underflows both
// probabilities are below 1e-38 / beta and add nothing.
template <Divergence D, class F>
MINILLM_HD DivergenceTerm<F> divergence_term(F lq, F lp, F beta) {
    const F zero(0.0f), one(1.0f), half(0.5f);
    const F q = exp2_fast(lq), p = exp2_fast(lp);
    if constexpr (D == Divergence::tvd) {
        const F d = q - p;
        const F slope = select(d > zero, half, select(d < zero, zero - half, d));  // d: 0 at ties, NaN stays NaN
        return {q, d * slope, q * slope};
    } else {
        const F alpha = D == Divergence::skew_reverse_kl ? one - beta : beta;  // weight of p in m
        const F of_p = alpha * p, of_q = (one - alpha) * q, mixture = of_p + of_q, smallest{FLT_MIN};
        const F lm = log2_fast(select(mixture < smallest, smallest, mixture));  // NaN stays
        // 0 * log 0: lq and lp are finite, so q = 0 and p = 0 give 0 by themselves.
        if constexpr (D == Divergence::jsd) {
            const F q_slope = of_q * (lq - lm);
            return {q, of_p * (lp - lm) + q_slope, q_slope};
        } else if constexpr (D == Divergence::skew_forward_kl) {
            return {q, p * (lp - lm), zero - of_q * exp2_fast(lp - lm)};
        } else {
            const F log_q_m = lq - lm, value = q * log_q_m, ln2{float(LN2)};
            return {q, value, ln2 * value + (q - of_q * exp2_fast(log_q_m))};
        }
    }
}

}  // namespace minillm
