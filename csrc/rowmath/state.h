// defines: outside, PairSums, RowState, rebased, added, merge, Statistic, finish
//
// What one read of a row of student logits z_s and teacher logits z_t leaves behind. Everything is kept relative to origins
// m_s, m_t at or near the maxima (subtract first, then scale by 1/T), so a common offset of the logits costs no precision:
//
//     s = (z_s - m_s)/T     Z_s = sum e^s     A = sum e^s (s - t)     B = sum e^s s
//     t = (z_t - m_t)/T     Z_t = sum e^t     C = sum e^t (t - s)
//
//     KL(q||p) = A/Z_s - ln Z_s + ln Z_t      KL(p||q) = C/Z_t - ln Z_t + ln Z_s      H(q) = ln Z_s - B/Z_s
//
// The origins and ln Z stay apart: their fp32 sum would lose 1e-5 at an offset of 1000.
#pragma once

#include "config.h"
#include "scalar.h"

namespace minillm {

// A column is outside the support when -inf in one model and not NaN or +inf in the other (those are never hidden): the
// halves, because the sum of two finite numbers may overflow.
template <class F>
MINILLM_HD auto outside(F s, F t) {
    return F(0.5f) * s + F(0.5f) * t == F(-INFINITY);
}

// The sums over some columns that share one pair of origins, with s and t in units of ln 2: s = (z_s - m_s) log2(e)/T, so that
// e^s is one exp2. s and t are finite: a column outside the support (-inf in one of the models) comes as s = t = -FLT_MAX
// and adds zero.
template <class F>
struct PairSums {
    F Zs, Zt, A, B, C;

    MINILLM_HD void add(F s, F t) {
        const F es = exp2_fast(s), et = exp2_fast(t), d = s - t;
        Zs += es;
        Zt += et;
        A += es * d;
        B += es * s;
        C -= et * d;
    }
    MINILLM_HD void add_student(F s) {
        const F es = exp2_fast(s);
        Zs += es;
        B += es * s;
    }
};

template <class R>
struct RowState {
    R ms, mt;  // -inf while empty
    R Zs, Zt, A, B, C;

    // The state of some columns from their origins and sums: A, B, C leave the units of ln 2.
    template <class S>
    static MINILLM_HD RowState of(R ms, R mt, const PairSums<S>& x) {
        const R ln2 = R(LN2);
        return {ms, mt, R(x.Zs), R(x.Zt), ln2 * R(x.A), ln2 * R(x.B), ln2 * R(x.C)};
    }
    static MINILLM_HD RowState empty() { return {R(-INFINITY), R(-INFINITY), 0, 0, 0, 0, 0}; }
    // Not `ms == -inf`: a row of NaN has no maximum either, and must not pass for empty.
    MINILLM_HD bool is_empty() const { return Zs == R(0) && Zt == R(0); }
};

// The same columns relative to origins that are not below their own. States of equal origins are added field by field.
template <class R>
MINILLM_HD RowState<R> rebased(const RowState<R>& x, R ms, R mt, R inv_T) {
    const R ds = x.ms == ms ? R(0) : (x.ms - ms) * inv_T;  // equal origins, also when both are -inf (one model)
    const R dt = x.mt == mt ? R(0) : (x.mt - mt) * inv_T;
    const R f = ds == R(0) ? R(1) : exp2_fast(ds * R(LOG2E));
    const R g = dt == R(0) ? R(1) : exp2_fast(dt * R(LOG2E));
    RowState<R> r = {ms, mt, f * x.Zs, g * x.Zt, 0, 0, 0};
    // What vanishes adds nothing, however large its (finite) differences are.
    if (f != R(0)) {
        r.A = f * (x.A + x.Zs * (ds - dt));
        r.B = f * (x.B + x.Zs * ds);
    }
    if (g != R(0)) r.C = g * (x.C + x.Zt * (dt - ds));
    return r;
}

template <class R>
MINILLM_HD RowState<R> added(const RowState<R>& a, const RowState<R>& b) {
    return {a.ms, a.mt, a.Zs + b.Zs, a.Zt + b.Zt, a.A + b.A, a.B + b.B, a.C + b.C};
}

// The state of the union of two sets of columns: associative, commutative, empty() is its identity.
template <class R>
MINILLM_HD RowState<R> merge(const RowState<R>& a, const RowState<R>& b, R inv_T) {
    if (a.is_empty()) return b;
    if (b.is_empty()) return a;
    const R ms = max_of(a.ms, b.ms), mt = max_of(a.mt, b.mt);
    return added(rebased(a, ms, mt, inv_T), rebased(b, ms, mt, inv_T));
}

// Rows of the [STATISTICS, N] tensor that row_stats returns, in order: RowStats of minillm_kernels/rows.py.
#define MINILLM_STATISTICS(X) \
    X(STUDENT_ORIGIN)         \
    X(STUDENT_LOGZ)           \
    X(TEACHER_ORIGIN)         \
    X(TEACHER_LOGZ)           \
    X(REVERSE_KL)             \
    X(FORWARD_KL)             \
    X(STUDENT_LOGPROBS)       \
    X(TEACHER_LOGPROBS)       \
    X(STUDENT_ENTROPY)        \
    X(STUDENT_LOGSUMEXP)      \
    X(TEACHER_LOGSUMEXP)
enum Statistic { MINILLM_STATISTICS(MINILLM_ENUMERATOR) STATISTICS };

// All statistics of a row but the two log-probabilities of a token, which need the row's logits once more.
template <class R>
MINILLM_HD void finish(const RowState<R>& x, R inv_T, bool has_teacher, R out[STATISTICS]) {
    for (int i = 0; i < STATISTICS; ++i) out[i] = R(0);
    const R nan = R(NAN);
    const bool empty = x.is_empty();
    const R lnZs = empty ? nan : R(LN2) * log2_fast(x.Zs);
    out[STUDENT_ORIGIN] = x.ms;
    out[STUDENT_LOGZ] = lnZs;
    out[STUDENT_ENTROPY] = lnZs - x.B / x.Zs;
    out[STUDENT_LOGSUMEXP] = x.ms * inv_T + lnZs;
    if (!has_teacher) return;
    const R lnZt = empty ? nan : R(LN2) * log2_fast(x.Zt);
    out[TEACHER_ORIGIN] = x.mt;
    out[TEACHER_LOGZ] = lnZt;
    out[TEACHER_LOGSUMEXP] = x.mt * inv_T + lnZt;
    out[REVERSE_KL] = x.A / x.Zs - lnZs + lnZt;
    out[FORWARD_KL] = x.C / x.Zt - lnZt + lnZs;
}

}  // namespace minillm
