// defines: row_sample_mass_kernel, normaliser, row_sample_argmax_kernel, row_sample_draw_kernel
//
// A token of the mixture alpha p + (1 - alpha) q of two rows, with its log-probability under each (rowmath/sampling.h).
//
//     mass     a warp a tile: its maximum and the sum of e^((z - maximum)/T). One read of each row: V elements a row and model
//     filter   top-k, top-p (row_sample_filter.cuh): a cut-off logit a row and model, then the masses again
//     argmax   temperature 0: the largest alpha p + (1 - alpha) q of a part of a row; one more read of each
//     draw     a warp a row: the normalisers from the masses, then tile and token by scans in double, in vocabulary order
#pragma once

#include "../rowmath/sampling.h"
#include "tiles.cuh"

namespace minillm::cuda {

constexpr int LANE_COLUMNS = 32, TILE = WARP * LANE_COLUMNS;

struct TileMass {
    float max, sum;  // relative to its maximum
};
struct Best {
    float x;
    int token;
};

// In the workspace; a law is a row of one model, student rows first.
struct SampleBuffers {
    TileMass* masses;  // [models * N, tiles]
    float* cutoffs;    // [models * N], when filtered
    Best* best;        // [N, splits], when greedy
    int tiles, splits;
    bool filtered;

    __device__ float cutoff(int64_t law) const { return filtered ? cutoffs[law] : -INFINITY; }
};

// e^((z - max)/T), 0 below the cut-off and for -inf (max is not), NaN for NaN and +inf.
__device__ inline float weight(float z, float max, float cutoff, float k) {
    return z < cutoff ? 0.0f : exp2_fast((z - max) * k);
}

// Units first, first + stride, ... of a row of V columns, which lie in columns [begin, end); -inf behind the row's end.
template <class E, int W, int UNITS>
__device__ void load_units(Raw<E, W> (&x)[UNITS], const E* z, int V, int begin, int end, int first, int stride) {
    const Row<E, W> row(z);
    const auto unit_of = [&](int j) { return first + j * stride; };
    const bool is_inner = row.aligned() ? end <= V : begin > 0 && end + W <= V;
    if (is_inner && row.aligned()) {  // a branch each, so that the loads follow each other
#pragma unroll
        for (int j = 0; j < UNITS; ++j) x[j] = row.load_first(unit_of(j));
    } else if (is_inner) {
        Unaligned<E, W, UNITS>(row, unit_of, [](int) { return true; }).join(x, row);
    } else {
#pragma unroll
        for (int j = 0; j < UNITS; ++j) {
            float one[W];
#pragma unroll
            for (int i = 0; i < W; ++i) {
                const int v = unit_of(j) * W + i;
                one[i] = v < V ? load_one(z + v) : -INFINITY;
            }
            x[j] = Raw<E, W>::of(one);  // exact
        }
    }
}

template <class E>
__device__ TileMass tile_mass(const E* z, int V, int tile, float cutoff, float k) {
    constexpr int W = UNIT<E>, UNITS = LANE_COLUMNS / W;
    const int begin = tile * TILE;
    Raw<E, W> x[UNITS];
    load_units(x, z, V, begin, begin + TILE, begin / W + int(threadIdx.x) % WARP, WARP);
    float max = -INFINITY;
#pragma unroll
    for (int j = 0; j < UNITS; ++j)
#pragma unroll
        for (int i = 0; i < W; ++i) max = fmaxf(x[j][i], max);  // NaN ignored
    max = __shfl_sync(ALL_LANES, warp_reduce(max, [](float a, float b) { return max_of(a, b); }), 0);
    const float origin = max == -INFINITY ? 0.0f : max;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < UNITS; ++j)
#pragma unroll
        for (int i = 0; i < W; ++i) sum += weight(x[j][i], origin, cutoff, k);
    return {max, warp_reduce(sum, [](float a, float b) { return a + b; })};
}

template <class S, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS) row_sample_mass_kernel(SampleArgs a, SampleBuffers buffers) {
    const float k = float(a.inv_T * LOG2E);
    const int64_t laws = a.teacher ? 2 * a.N : a.N;
    const auto mass_of = [&](const auto* row, int64_t law, int tile) {
        return tile_mass(row, int(a.V), tile, buffers.cutoff(law), k);
    };
    for (int64_t index = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP; index < laws * buffers.tiles;
         index += int64_t(gridDim.x) * WARPS) {
        const int64_t law = index / buffers.tiles;
        const int tile = int(index % buffers.tiles);
        TileMass mass;
        if (law < a.N) {
            mass = mass_of(row_of<const S>(a.student, law), law, tile);
        } else if constexpr (!std::is_same_v<T, NoTeacher>) {
            mass = mass_of(row_of<const T>(a.teacher, law - a.N), law, tile);
        }
        if (threadIdx.x % WARP == 0) buffers.masses[index] = mass;
    }
}

struct Normaliser {
    double max, Z;  // Z = 0: no column is left; NaN: the row holds NaN or +inf
};

// use(mass) for this lane's tiles, of which MASSES at a time are on their way together: those of 262144 columns at once.
template <class Use>
__device__ void for_masses(const TileMass* mass, int tiles, const Use& use) {
    constexpr int MASSES = 8;
#pragma unroll 1
    for (int first = int(threadIdx.x) % WARP; first < tiles; first += MASSES * WARP) {
        TileMass x[MASSES];
#pragma unroll
        for (int j = 0; j < MASSES; ++j) x[j] = first + j * WARP < tiles ? mass[first + j * WARP] : TileMass{-INFINITY, 0.0f};
#pragma unroll
        for (int j = 0; j < MASSES; ++j) use(x[j]);
    }
}

// By one warp, the same result in every lane.
__device__ inline Normaliser normaliser(const SampleBuffers& buffers, int64_t law, double inv_T) {
    const TileMass* mass = buffers.masses + law * buffers.tiles;
    double max = -INFINITY, Z = 0;
    for_masses(mass, buffers.tiles, [&](const TileMass& x) { max = x.sum != 0.0f ? max_of(double(x.max), max) : max; });
    max = __shfl_sync(ALL_LANES, warp_reduce(max, [](double a, double b) { return max_of(a, b); }), 0);
    for_masses(mass, buffers.tiles, [&](const TileMass& x) { Z += mass_in_row(x.sum, x.max, max, inv_T); });
    return {max, __shfl_sync(ALL_LANES, warp_reduce(Z, [](double a, double b) { return a + b; }), 0)};
}

// The inclusive sum over the lanes up to this one.
__device__ inline double scan_lanes(double x) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const double before = __shfl_up_sync(ALL_LANES, x, step);
        if (lane >= step) x += before;
    }
    return x;
}

// ---- temperature 0 ---------------------------------------------------------------------------------------------------------

struct BetterOf {
    __device__ Best operator()(const Best& a, const Best& b) const {
        return a.x > b.x || (a.x == b.x && a.token < b.token) ? a : b;
    }
};

struct Normalisers {
    Normaliser model[2];
};

// The lowest index of the largest alpha p + (1 - alpha) q; of the largest logit where only one model counts.
template <class S, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS) row_sample_argmax_kernel(SampleArgs a, SampleBuffers buffers) {
    constexpr bool pair = !std::is_same_v<T, NoTeacher>;
    MINILLM_SHARED(Normalisers, normaliser_of);
    const float k = float(a.inv_T * LOG2E), cut = -INFINITY;
    for (int64_t index = blockIdx.x; index < a.N * buffers.splits; index += gridDim.x) {
        const int64_t row = index / buffers.splits, part = index % buffers.splits;
        const S* s = row_of<const S>(a.student, row);
        const T* t = row_of<const T>(a.teacher, row);
        if (threadIdx.x < WARP)
            for (int i = 0; i < (pair ? 2 : 1); ++i) {
                const Normaliser n = normaliser(buffers, row + i * a.N, a.inv_T);
                if (threadIdx.x == 0) normaliser_of.model[i] = n;
            }
        __syncthreads();
        const float max_q = float(normaliser_of.model[0].max), cut_q = buffers.cutoff(row);
        const float share_q = float((1.0 - a.alpha) / normaliser_of.model[0].Z);
        float max_p = 0.0f, cut_p = cut, share_p = 0.0f;
        if constexpr (pair) {
            max_p = float(normaliser_of.model[1].max);
            cut_p = buffers.cutoff(row + a.N);
            share_p = float(a.alpha / normaliser_of.model[1].Z);
        }
        Best best = {-INFINITY, 0};
        const int end = int((part + 1) * a.V / buffers.splits);
#pragma unroll 4
        for (int v = int(part * a.V / buffers.splits) + int(threadIdx.x); v < end; v += THREADS) {
            float x;
            if constexpr (pair) {
                const bool mixed = a.alpha != 0.0 && a.alpha != 1.0;
                const float q = a.alpha == 1.0 ? 0.0f : load_one(s + v), p = a.alpha == 0.0 ? 0.0f : load_one(t + v);
                x = mixed ? share_p * weight(p, max_p, cut_p, k) + share_q * weight(q, max_q, cut_q, k) : p + q;
            } else {
                x = load_one(s + v);
            }
            if (x > best.x) best = {x, v};
        }
        best = block_reduce(best, BetterOf());  // its barriers also part this row's normalisers from the next's
        if (threadIdx.x == 0) buffers.best[index] = best;
    }
}

// ---- the token -------------------------------------------------------------------------------------------------------------

// LANE_COLUMNS of a row from column `begin` on: all are on their way before the first is used. -inf behind the row's end.
template <class E>
struct LaneColumns {
    static constexpr int W = UNIT<E>, UNITS = LANE_COLUMNS / W;
    Raw<E, W> x[UNITS];

    __device__ LaneColumns(const E* z, int V, int begin) {
        load_units(x, z, V, begin, begin + LANE_COLUMNS, begin / W, 1);
    }
    __device__ float operator[](int i) const { return x[i / W][i % W]; }
};

// By a warp: the first token whose cumulative probability exceeds u; one of non-zero probability even if rounding leaves
// u Z beyond the last partial sum.
template <class E>
__device__ int draw(const E* z, const SampleBuffers& buffers, int64_t law, const SampleArgs& a, const Normaliser& n, double u) {
    const TileMass* mass = buffers.masses + law * buffers.tiles;
    const int lane = threadIdx.x % WARP;
    const double target = u * n.Z;
    double before = 0, chosen_before = 0;
    int tile = 0;
    bool found = false;
    for (int base = 0; base < buffers.tiles && !found; base += WARP) {
        const int i = base + lane;
        const double w = i < buffers.tiles ? mass_in_row(mass[i].sum, mass[i].max, n.max, a.inv_T) : 0.0;
        const double up_to = before + scan_lanes(w), below = __shfl_up_sync(ALL_LANES, up_to, 1);
        const unsigned exceeds = __ballot_sync(ALL_LANES, w != 0.0 && up_to > target);
        const unsigned possible = __ballot_sync(ALL_LANES, w != 0.0);
        found = exceeds != 0;
        const int at = found ? __ffs(exceeds) - 1 : possible != 0 ? 31 - __clz(possible) : -1;
        const double at_below = __shfl_sync(ALL_LANES, lane == 0 ? before : below, at < 0 ? 0 : at);
        if (at >= 0) {
            tile = base + at;
            chosen_before = at_below;
        }
        before = __shfl_sync(ALL_LANES, up_to, WARP - 1);
    }
    const float k = float(a.inv_T * LOG2E), max = mass[tile].max, cutoff = buffers.cutoff(law);
    const double rest = (target - chosen_before) * exp((n.max - double(max)) * a.inv_T);
    const int begin = tile * TILE + lane * LANE_COLUMNS;
    const LaneColumns<E> columns(z, int(a.V), begin);
    double sum = 0;
#pragma unroll
    for (int i = 0; i < LANE_COLUMNS; ++i) sum += weight(columns[i], max, cutoff, k);
    const double up_to = scan_lanes(sum), below = __shfl_up_sync(ALL_LANES, up_to, 1);
    const unsigned exceeds = __ballot_sync(ALL_LANES, sum != 0.0 && up_to > rest);
    const unsigned possible = __ballot_sync(ALL_LANES, sum != 0.0);
    const int chosen = exceeds != 0 ? __ffs(exceeds) - 1 : 31 - __clz(possible);
    int token = 0;
    sum = lane == 0 ? 0.0 : below;
    bool found_token = false;
#pragma unroll
    for (int i = 0; i < LANE_COLUMNS; ++i) {
        const float w = weight(columns[i], max, cutoff, k);
        if (w == 0.0f || found_token) continue;
        token = begin + i;
        sum += w;
        found_token = sum > rest;
    }
    return __shfl_sync(ALL_LANES, token, chosen);
}

static __global__ void __launch_bounds__(THREADS, BLOCKS) row_sample_draw_kernel(SampleArgs a, SampleBuffers buffers) {
    const int lane = threadIdx.x % WARP;
    for (int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP; row < a.N; row += int64_t(gridDim.x) * WARPS) {
        const bool pair = bool(a.teacher);
        const Normaliser q = normaliser(buffers, row, a.inv_T), p = pair ? normaliser(buffers, row + a.N, a.inv_T) : q;
        const bool drawable = q.Z > 0 && p.Z > 0;  // neither NaN nor empty
        const bool teacher = drawable && pair && !a.greedy && a.uniforms[2 * row] < a.alpha;
        int token = 0;
        if (drawable && a.greedy) {
            Best best = {-INFINITY, 0};
            for (int i = 0; i < buffers.splits; ++i) best = BetterOf()(best, buffers.best[row * buffers.splits + i]);
            token = best.token;
        } else if (drawable) {
            const Rows& rows = teacher ? a.teacher : a.student;
            const Normaliser n = {teacher ? p.max : q.max, teacher ? p.Z : q.Z};
            const auto draw_from = [&](const auto* z) {
                return draw(z, buffers, teacher ? row + a.N : row, a, n, a.uniforms[2 * row + 1]);
            };
            if (rows.dtype == DType::fp32) token = draw_from(row_of<const float>(rows, row));
            if (rows.dtype == DType::bf16) token = draw_from(row_of<const __nv_bfloat16>(rows, row));
            if (rows.dtype == DType::fp16) token = draw_from(row_of<const __half>(rows, row));
        }
        if (lane != 0) continue;
        const auto logprob = [&](const Rows& rows, int64_t law, const Normaliser& n) {
            return token_logprob(value_at(rows, row, token), buffers.cutoff(law), n.max, n.Z, a.inv_T);
        };
        const double lq = drawable ? logprob(a.student, row, q) : NAN;
        const double lp = !pair ? 0.0 : drawable ? logprob(a.teacher, row + a.N, p) : NAN;
        a.token_ids[row] = token;
        a.from_teacher[row] = teacher;
        store_one(a.logprobs + row, float(lq));
        store_one(a.logprobs + a.N + row, float(lp));
        store_one(a.logprobs + 2 * a.N + row, float(pair ? mixture_logprob(a.alpha, lq, lp) : lq));
    }
}

}  // namespace minillm::cuda
