// defines: Divergence, DivergenceTerm, divergence_term
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

#include "scalar.h"

namespace minillm {

enum class Divergence { jsd, skew_forward_kl, skew_reverse_kl, tvd };

template <class F>
struct DivergenceTerm {
    F q, value, slope;  // f(q_v, p_v) and h_v
};

// s, t relative to the origins and in units of ln 2 (state.h), so log2 q = s - log2Zs. Where m underflows both probabilities are
// below 1e-38 / beta and add nothing.
template <Divergence D, class F>
MINILLM_HD DivergenceTerm<F> divergence_term(F s, F t, F log2Zs, F log2Zt, F beta) {
    const F zero(0.0f), one(1.0f), half(0.5f);
    const F lq = s - log2Zs, lp = t - log2Zt;
    const F q = exp2_fast(lq), p = exp2_fast(lp);
    if constexpr (D == Divergence::tvd) {
        const F d = q - p;
        const F slope = select(d > zero, half, select(d < zero, zero - half, d));  // d: 0 at ties, NaN stays NaN
        return {q, d * slope, slope};
    } else {
        const F alpha = D == Divergence::skew_reverse_kl ? one - beta : beta;  // weight of p in m
        const F mixture = alpha * p + (one - alpha) * q, smallest{FLT_MIN};
        const F m = select(mixture < smallest, smallest, mixture);  // NaN stays
        const F lm = log2_fast(m), ln2{float(LN2)};
        // 0 * log 0: lq and lp are finite (the support is), so q = 0 and p = 0 give 0 by themselves.
        if constexpr (D == Divergence::jsd) {
            const F slope = (one - beta) * ln2 * (lq - lm);
            return {q, beta * ln2 * p * (lp - lm) + q * slope, slope};
        } else if constexpr (D == Divergence::skew_forward_kl) {
            return {q, ln2 * p * (lp - lm), zero - (one - beta) * p / m};
        } else {
            const F log_q_m = ln2 * (lq - lm);
            return {q, q * log_q_m, log_q_m + one - beta * q / m};
        }
    }
}

}  // namespace minillm
