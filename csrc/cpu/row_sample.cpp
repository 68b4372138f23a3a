// row_sample: a token of the mixture alpha p + (1 - alpha) q of two rows, with its log-probability under each (sampling.h).
//
// One read of each row for the tile masses, one more of a single tile for the token: V elements a row and model, O(N tiles)
// extra memory. Each filter adds three reads (the levels of the radix descent), the argmax of a mixture one.
#include "../rowmath/sampling.h"
#include "tile.h"

namespace minillm::cpu::MINILLM_ISA {

// The law of one model over a row: e^((z - max)/T) / Z over the columns with z >= cutoff.
struct Law {
    const Rows* rows;
    int64_t row, V;
    float inv_T, cutoff;
    double max, Z;

    int64_t columns(int64_t tile) const { return V - tile * TILE < TILE ? V - tile * TILE : TILE; }
    double logprob(int64_t token) const { return token_logprob(value_at(*rows, row, token), cutoff, max, Z, inv_T); }
};

struct TileMass {
    float max;
    double sum;  // of e^((z - max)/T) over the kept columns of the tile
};

// weights[i] = e^((z_i - max)/T), 0 below the cut-off.
static void tile_weights(const Law& law, const float* z, int64_t n, float max, Scratch& weights) {
    const F32 cut(law.cutoff);
    for_one(z, n, max, law.inv_T * float(LOG2E), [&](int64_t i, F32 x) {
        select(F32::load(z + i) < cut, F32(0.0f), exp2_fast(x)).store(weights.x + i);
    });
}

static TileMass tile_mass(const Law& law, int64_t tile) {
    Scratch scratch;
    const int64_t n = law.columns(tile);
    const float* z = widen_tile(*law.rows, law.row, tile * TILE, n, scratch);
    const float max = maximum_of(z, n);
    const F32 cut(law.cutoff);
    F32 sum(0.0f);
    for_one(z, n, max, law.inv_T * float(LOG2E), [&](int64_t i, F32 x) {
        sum += select(F32::load(z + i) < cut, F32(0.0f), exp2_fast(x));
    });
    return {max, sum_lanes(sum)};
}

static double mass_in_row(const Law& law, const TileMass& t) {
    return minillm::mass_in_row(t.sum, t.max, law.max, law.inv_T);
}

// Normaliser of a law from its tile masses. Z = 0: no column is left; NaN: the row holds NaN or +inf.
static void normalise(Law& law, const TileMass* mass) {
    const int64_t n = tiles(law.V);
    law.max = -INFINITY;
    law.Z = 0;
    for (int64_t i = 0; i < n; ++i)
        if (mass[i].sum != 0.0) law.max = minillm::max_of(double(mass[i].max), law.max);
    for (int64_t i = 0; i < n; ++i) law.Z += mass_in_row(law, mass[i]);
}

// The first token whose cumulative probability exceeds u; one of non-zero probability even if rounding leaves u Z beyond
// the last partial sum.
static int64_t draw(const Law& law, const TileMass* mass, double u) {
    const double target = u * law.Z;
    double before = 0, chosen_before = 0;
    int64_t tile = -1;
    for (int64_t i = 0; i < tiles(law.V); ++i) {
        const double w = mass_in_row(law, mass[i]);
        if (w == 0.0) continue;
        tile = i;
        chosen_before = before;
        before += w;
        if (before > target) break;
    }
    Scratch scratch, weights;
    const int64_t n = law.columns(tile);
    const float* z = widen_tile(*law.rows, law.row, tile * TILE, n, scratch);
    tile_weights(law, z, n, mass[tile].max, weights);
    const double rest = (target - chosen_before) * exp((law.max - double(mass[tile].max)) * law.inv_T);
    double sum = 0;
    int64_t token = -1;
    for (int64_t i = 0; i < n; ++i) {
        if (weights.x[i] == 0.0f) continue;
        token = i;
        sum += weights.x[i];
        if (sum > rest) break;
    }
    return tile * TILE + token;
}

// The smallest z >= law.cutoff with W(z' > z) < target; by_mass: W sums e^((z - max)/T), else it counts.
static float cutoff_of(const Law& law, bool by_mass, double target) {
    Scratch scratch, weights;
    constexpr int bits[3] = {11, 11, 10};
    uint32_t prefix = 0;
    int shift = 32;
    double above = 0;
    for (int level = 0; level < 3; ++level) {
        const int low = shift - bits[level];
        double W[2048] = {};
        bool present[2048] = {};
        for (int64_t tile = 0; tile < tiles(law.V); ++tile) {
            const int64_t n = law.columns(tile);
            const float* z = widen_tile(*law.rows, law.row, tile * TILE, n, scratch);
            if (by_mass) tile_weights(law, z, n, float(law.max), weights);
            for (int64_t i = 0; i < n; ++i) {
                const uint32_t key = ordered_key(z[i]);
                const bool inside = shift == 32 || key >> shift == prefix >> shift;
                if (!inside || !(z[i] >= law.cutoff) || z[i] == -INFINITY) continue;
                const uint32_t bucket = key >> low & ((1u << bits[level]) - 1);
                W[bucket] += by_mass ? weights.x[i] : 1.0;
                present[bucket] = true;
            }
        }
        double running = above;
        uint32_t chosen = 0;
        for (int bucket = (1 << bits[level]) - 1; bucket >= 0 && running < target; --bucket) {
            if (!present[bucket]) continue;
            chosen = uint32_t(bucket);
            above = running;
            running += W[bucket];
        }
        prefix |= chosen << low;
        shift = low;
    }
    return from_ordered_key(prefix);
}

static void tile_masses(const Law& law, TileMass* mass) {
    for (int64_t i = 0; i < tiles(law.V); ++i) mass[i] = tile_mass(law, i);
}

// mass: scratch memory for the law's tiles.
static void apply_filters(const SampleArgs& a, Law& law, TileMass* mass) {
    tile_masses(law, mass);
    normalise(law, mass);
    if (!(law.Z > 0)) return;  // NaN or empty: nothing to filter
    if (a.top_k > 0 && a.top_k < a.V) {
        law.cutoff = cutoff_of(law, false, double(a.top_k));
        tile_masses(law, mass);
        normalise(law, mass);
    }
    if (a.top_p < 1.0) law.cutoff = cutoff_of(law, true, a.top_p * law.Z);
}

// The lowest index of the largest alpha p + (1 - alpha) q; of the largest logit where only one model counts.
static int64_t argmax_mixture(double alpha, const Law& q, const Law* p) {
    Scratch scratch_q, scratch_p, weight_q, weight_p;
    const Law& only = alpha == 1.0 ? *p : q;
    const bool single = p == nullptr || alpha == 0.0 || alpha == 1.0;
    double best = -INFINITY;
    int64_t token = 0;
    for (int64_t tile = 0; tile < tiles(q.V); ++tile) {
        const int64_t n = q.columns(tile);
        const float* z = widen_tile(*only.rows, only.row, tile * TILE, n, scratch_q);
        if (!single) {
            const float* t = widen_tile(*p->rows, p->row, tile * TILE, n, scratch_p);
            tile_weights(q, z, n, float(q.max), weight_q);
            tile_weights(*p, t, n, float(p->max), weight_p);
        }
        for (int64_t i = 0; i < n; ++i) {
            const double x =
                single ? z[i] : alpha * (weight_p.x[i] / p->Z) + (1.0 - alpha) * (weight_q.x[i] / q.Z);
            if (x > best) {
                best = x;
                token = tile * TILE + i;
            }
        }
    }
    return token;
}

void row_sample(const SampleArgs& a) {
    const int64_t models = a.teacher ? 2 : 1, n_tiles = tiles(a.V), parts = splits(a.N, a.V);
    const float inv_T = float(a.inv_T);
    Buffer<Law> laws(a.N * models);
    Buffer<TileMass> masses(a.N * models * n_tiles);

    const bool filtered = a.top_p < 1.0 || (a.top_k > 0 && a.top_k < a.V);
    parallel_for(filtered ? a.threads : 1, a.N * models, [&](int64_t i) {
        laws.data[i] = {i % models ? &a.teacher : &a.student, i / models, a.V, inv_T, -INFINITY, -INFINITY, 0.0};
        if (filtered) apply_filters(a, laws.data[i], masses.data + i * n_tiles);
    });
    parallel_for(a.threads, a.N * models * parts, [&](int64_t unit) {
        const Span span = span_of(unit, parts, a.V);  // span.row counts laws here
        for (int64_t i = span.first_tile; i < span.last_tile; ++i)
            masses.data[span.row * n_tiles + i] = tile_mass(laws.data[span.row], i);
    });
    parallel_for(a.threads, a.N, [&](int64_t row) {
        Law* law = laws.data + row * models;
        const TileMass* mass = masses.data + row * models * n_tiles;
        bool drawable = true;
        for (int64_t i = 0; i < models; ++i) {
            normalise(law[i], mass + i * n_tiles);
            drawable = drawable && law[i].Z > 0;  // neither NaN nor empty
        }
        const bool teacher = drawable && models == 2 && !a.greedy && a.uniforms[2 * row] < a.alpha;
        int64_t token = 0;
        if (drawable && a.greedy)
            token = argmax_mixture(a.alpha, law[0], models == 2 ? &law[1] : nullptr);
        else if (drawable)
            token = draw(law[teacher], mass + teacher * n_tiles, a.uniforms[2 * row + 1]);
        const double lq = drawable ? law[0].logprob(token) : NAN;
        const double lp = models == 1 ? 0.0 : drawable ? law[1].logprob(token) : NAN;
        a.token_ids[row] = token;
        a.from_teacher[row] = teacher;
        a.logprobs[row] = float(lq);
        a.logprobs[a.N + row] = float(lp);
        a.logprobs[2 * a.N + row] = float(models == 2 ? mixture_logprob(a.alpha, lq, lp) : lq);
    });
}

}  // namespace minillm::cpu::MINILLM_ISA
