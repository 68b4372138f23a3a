// defines: mass_in_row, token_logprob, ordered_key, from_ordered_key, mixture_logprob
//
// A token of the mixture alpha p + (1 - alpha) q is drawn exactly by one coin for the model and one draw from that model
// alone. The draw is a two-level inverse CDF: with w_j the probability mass of tile j (left behind by the pass that forms the
// normaliser), the tile is the first whose running sum of w exceeds u Z, the token the first whose running sum inside the
// tile exceeds the rest. Sums in double, in vocabulary order: the tokens do not depend on how the work was divided.
//
// Top-k and top-p are one cut-off logit a model, and the same question twice: the smallest z with W(z' > z) < target,
// W counting tokens (target k) or summing probability (target top_p). A radix descent over ordered_key answers it.
#pragma once

#include <stdint.h>
#include <string.h>

#include "scalar.h"

namespace minillm {

// The mass of a tile, `sum` of e^((z - tile_max)/T), relative to the row's maximum; 0 stays 0 where that is -inf.
MINILLM_HD double mass_in_row(double sum, double tile_max, double row_max, double inv_T) {
    return sum == 0.0 ? 0.0 : sum * exp((tile_max - row_max) * inv_T);
}
// ln of e^((z - max)/T) / Z over the columns with z >= cutoff.
MINILLM_HD double token_logprob(float z, float cutoff, double max, double Z, double inv_T) {
    return z < cutoff || z == -INFINITY ? -INFINITY : (double(z) - max) * inv_T - log(Z);
}

// a < b  <=>  ordered_key(a) < ordered_key(b), for all floats but NaN.
MINILLM_HD uint32_t ordered_key(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
MINILLM_HD float from_ordered_key(uint32_t key) {
    const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// ln(alpha e^lp + (1 - alpha) e^lq), also where one of the log-probabilities or weights is -inf or 0.
MINILLM_HD double mixture_logprob(double alpha, double lq, double lp) {
    if (alpha == 0.0) return lq;
    if (alpha == 1.0) return lp;
    const double a = log(alpha) + lp, b = log1p(-alpha) + lq;
    const double high = max_of(a, b);
    return high == -INFINITY ? high : high + log(exp(a - high) + exp(b - high));
}

}  // namespace minillm
