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

// s, t relative to the origins and in units of ln 2 (state.h), so log2 q = s - log2Zs. Where m underflows both probabilities are below 1e-38 and add nothing.
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
        const F m = alpha * p + (one - alpha) * q;
        const auto underflow = m < F(FLT_MIN);
        const F lm = log2_fast(select(underflow, one, m)), ln2{float(LN2)};
        const F log_p_m = select(underflow, zero, ln2 * (lp - lm)), log_q_m = select(underflow, zero, ln2 * (lq - lm));
        // 0 * log 0: lq is finite (the support is), so q = 0 gives 0 by itself.
        if constexpr (D == Divergence::jsd) {
            return {q, beta * p * log_p_m + (one - beta) * q * log_q_m, (one - beta) * log_q_m};
        } else if constexpr (D == Divergence::skew_forward_kl) {
            return {q, p * log_p_m, zero - (one - beta) * p / select(underflow, one, m)};
        } else {
            return {q, q * log_q_m, log_q_m + one - beta * q / select(underflow, one, m)};
        }
    }
}

}  // namespace minillm
