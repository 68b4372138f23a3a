// defines: span_state, write_stats: every statistic of a student row (and of a pair of rows) in one read of memory
//
// 2V elements a row pair, two exponentials an element. Two forms of one computation: a plain loop over raw memory, with no
// masks and no separate search for the maximum, whose sums are accepted when they are finite; and a masked loop for the
// tiles where they are not (a column of -inf, NaN, a span beyond exp2's range) and for the last columns of a row. The plain
// loop measures from the origin that the tile before it left; when a tile's maximum lies more than 8 (in log2) above, it is
// done again from there. The partial states are merged in tile order in double.
#pragma once

#include "tile.h"

namespace minillm::cpu::MINILLM_ISA {

struct Origins {
    float s, t;
};
// An fp32 sum has at most 128 terms before it moves to double, whatever the width of the register: a tile, or a part of one.
constexpr int64_t RUN = 128 * LANES;
static_assert(TILE % RUN == 0);
constexpr float MAX_RISE = 8.0f;  // e^s up to 2^8: costs half a decimal digit at most

MINILLM_HD bool rises(float max, float origin, float scale) { return (max - origin) * scale > MAX_RISE; }

static inline RowState<double> summed(const Origins& o, const PairSums<F32>& x) {
    const auto sum = [&](F32 PairSums<F32>::*field) { return sum_lanes(x.*field); };
    const PairSums<double> sums = {sum(&PairSums<F32>::Zs), sum(&PairSums<F32>::Zt), sum(&PairSums<F32>::A),
                                   sum(&PairSums<F32>::B), sum(&PairSums<F32>::C)};
    return RowState<double>::of(o.s, o.t, sums);
}

// n columns, a multiple of two registers. False: the masked loop must do it.
template <DType S, DType T>
static bool plain_pair(const char* student, const char* teacher, int64_t n, float scale, Origins& o, RowState<double>& out) {
    const F32 k(scale);
    for (;;) {
        const F32 ms(o.s), mt(o.t);
        F32 top_s = ms, top_t = mt;
        PairSums<F32> sums = {};
        const auto add = [&](F32 a, F32 b) {
            top_s = max_of(a, top_s);
            top_t = max_of(b, top_t);
            sums.add((a - ms) * k, (b - mt) * k);
        };
        for (int64_t i = 0; i < n; i += 2 * LANES) {
            if constexpr (S == T) {
                const Two s = load_two<S>(student, i), t = load_two<T>(teacher, i);
                add(s.a, t.a);
                add(s.b, t.b);
            } else {
                add(load<S>(student, i), load<T>(teacher, i));
                add(load<S>(student, i + LANES), load<T>(teacher, i + LANES));
            }
        }
        const Origins top = {max_lane(top_s), max_lane(top_t)};
        if (!(top.s < INFINITY && top.t < INFINITY)) return false;
        if (!rises(top.s, o.s, scale) && !rises(top.t, o.t, scale)) {
            out = summed(o, sums);
            return isfinite(out.Zs + out.Zt + out.A + out.B + out.C);
        }
        o = top;
    }
}

template <DType S>
static bool plain_student(const char* student, int64_t n, float scale, Origins& o, RowState<double>& out) {
    const F32 k(scale);
    for (;;) {
        const F32 ms(o.s);
        F32 top = ms;
        PairSums<F32> sums = {};
        for (int64_t i = 0; i < n; i += 2 * LANES) {
            const Two s = load_two<S>(student, i);
            top = max_of(s.b, max_of(s.a, top));
            sums.add_student((s.a - ms) * k);
            sums.add_student((s.b - ms) * k);
        }
        const float max = max_lane(top);
        if (!(max < INFINITY)) return false;
        if (!rises(max, o.s, scale)) {
            out = summed({o.s, -INFINITY}, sums);
            return isfinite(out.Zs + out.B);
        }
        o.s = max;
    }
}

static inline RowState<double> masked_pair(const float* s, const float* t, int64_t n, float scale) {
    const Maxima m = maxima_of(s, t, n);
    PairSums<F32> sums = {};
    for_pairs(s, t, n, m.s, m.t, scale, [&](int64_t, F32 a, F32 b) { sums.add(a, b); });
    return summed({m.s, m.t}, sums);
}

static inline RowState<double> masked_student(const float* s, int64_t n, float scale) {
    const float max = maximum_of(s, n);
    PairSums<F32> sums = {};
    for_one(s, n, max, scale, [&](int64_t, F32 a) { sums.add_student(a); });
    return summed({max, -INFINITY}, sums);
}

static inline RowState<double> span_state(const StatsArgs& a, const Span& span) {
    Scratch scratch_s, scratch_t;
    const float scale = float(a.inv_T * LOG2E);
    // A first guess; a tile whose maximum is far above it corrects it.
    const int64_t first = span.first_tile * TILE;
    Origins o = {value_at(a.student, span.row, first), a.teacher ? value_at(a.teacher, span.row, first) : -INFINITY};
    if (!(o.s > -FLT_MAX)) o.s = -FLT_MAX;
    if (a.teacher && !(o.t > -FLT_MAX)) o.t = -FLT_MAX;

    const auto plain = [&](int64_t begin, int64_t n, RowState<double>& part) {
        const char* s = a.student.row(span.row) + begin * size_of(a.student.dtype);
        return with_type(a.student.dtype, [&](auto S) {
            if (!a.teacher) return plain_student<S.value>(s, n, scale, o, part);
            const char* t = a.teacher.row(span.row) + begin * size_of(a.teacher.dtype);
            return with_type(a.teacher.dtype, [&](auto T) {
                return plain_pair<S.value, T.value>(s, t, n, scale, o, part);
            });
        });
    };
    const auto masked = [&](int64_t begin, int64_t n) {
        const float* s = widen_tile(a.student, span.row, begin, n, scratch_s);
        return a.teacher ? masked_pair(s, widen_tile(a.teacher, span.row, begin, n, scratch_t), n, scale)
                         : masked_student(s, n, scale);
    };

    RowState<double> state = RowState<double>::empty(), part;
    const int64_t end = span.last_tile * TILE < a.V ? span.last_tile * TILE : a.V;
    for (int64_t begin = first; begin < end; begin += RUN) {
        const int64_t n = end - begin < RUN ? end - begin : RUN, whole = n / (2 * LANES) * (2 * LANES);
        if (whole > 0) {
            if (!plain(begin, whole, part)) {
                part = masked(begin, whole);
                // Anew from the support: a high logit outside it must not push the tiles that follow below exp2's range.
                o = {minillm::max_of(float(part.ms), -FLT_MAX), minillm::max_of(float(part.mt), -FLT_MAX)};
            }
            state = merge(state, part, a.inv_T);
        }
        if (whole < n) state = merge(state, masked(begin + whole, n - whole), a.inv_T);
    }
    return state;
}

static inline void write_stats(const StatsArgs& a, int64_t row, const RowState<double>& state) {
    double out[STATISTICS];
    finish(state, a.inv_T, bool(a.teacher), out);
    if (a.token_ids != nullptr) {
        const int64_t y = a.token_ids[row];
        const float s = value_at(a.student, row, y), t = a.teacher ? value_at(a.teacher, row, y) : s;
        const bool out_of_support = outside(s, t) && !state.is_empty();
        out[STUDENT_LOGPROBS] = out_of_support ? -INFINITY : (double(s) - state.ms) * a.inv_T - out[STUDENT_LOGZ];
        if (a.teacher)
            out[TEACHER_LOGPROBS] = out_of_support ? -INFINITY : (double(t) - state.mt) * a.inv_T - out[TEACHER_LOGZ];
    }
    for (int i = 0; i < STATISTICS; ++i) a.stats[i * a.N + row] = float(out[i]);
}

static inline bool unread(const uint8_t* mask, int64_t row) { return mask != nullptr && mask[row] == 0; }

static inline void write_no_stats(float* stats, int64_t N, int64_t row) {
    for (int i = 0; i < STATISTICS; ++i) stats[i * N + row] = 0.0f;
}

}  // namespace minillm::cpu::MINILLM_ISA
