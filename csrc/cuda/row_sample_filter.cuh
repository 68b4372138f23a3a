// defines: add_wide, row_sample_filter_kernel
//
// Top-k and top-p: a block a row and model, a radix descent for the cut-off logit (rowmath/sampling.h); three reads a filter.
// Masses are added as integers (weights in fixed point, 2^45 for 151936 columns), so that atomics add them in any order to the
// same bits.
#pragma once

#include "row_sample.cuh"

namespace minillm::cuda {

constexpr int BUCKETS = 2048;

struct Histogram {
    unsigned long long W[BUCKETS];
    unsigned present[BUCKETS / 32];
    double total, above;
    unsigned chosen;
    Normaliser normaliser;
};

// By two atomics of 32 bits: shared memory has none of 64, which is a loop of compare and swap that every thread of a crowded
// bucket goes through. Each wrap of the lower half is seen by one thread, the one whose addition it was.
__device__ inline void add_wide(unsigned long long& sum, unsigned long long x) {
    unsigned* const half = reinterpret_cast<unsigned*>(&sum);
    const unsigned low = unsigned(x), before = atomicAdd(half, low), carry = before + low < before;
    const unsigned high = unsigned(x >> 32) + carry;
    if (high != 0) atomicAdd(half + 1, high);
}

// By warp 0: the lowest bucket that holds a column and above which less than `target` lies. h.above += what lies above it.
__device__ inline void choose_bucket(Histogram& h, bool first_level, double share, bool by_mass, double k) {
    constexpr int EACH = BUCKETS / WARP;
    const int lane = threadIdx.x % WARP;
    unsigned long long sum = 0;
    for (int i = 0; i < EACH; ++i) sum += h.W[lane * EACH + i];
    unsigned long long from_here_up = sum;
    for (int step = 1; step < WARP; step *= 2) {
        const unsigned long long x = __shfl_down_sync(ALL_LANES, from_here_up, step);
        if (lane + step < WARP) from_here_up += x;
    }
    if (first_level && lane == 0) {
        h.total = double(from_here_up);
        h.above = 0;
    }
    __syncwarp();
    const double target = by_mass ? share * h.total : k;
    double running = h.above + double(from_here_up - sum), above = 0;
    int chosen = -1;
    for (int i = EACH - 1; i >= 0 && running < target; --i) {
        const int bucket = lane * EACH + i;
        if (!(h.present[bucket / 32] >> (bucket % 32) & 1)) continue;
        chosen = bucket;
        above = running;
        running += double(h.W[bucket]);
    }
    const unsigned lanes = __ballot_sync(ALL_LANES, chosen >= 0);  // all have read h.above
    const int lowest = __ffs(lanes) - 1;
    if (lane == lowest) {
        h.chosen = unsigned(chosen);
        h.above = above;
    }
}

// The smallest z >= cutoff with W(z' > z) < target, W counting (target k) or adding mass (target share of all). By a block.
template <class E>
__device__ float cutoff_of(Histogram& h, const E* z, const SampleArgs& a, float cutoff, bool by_mass) {
    const float k = float(a.inv_T * LOG2E), max = float(h.normaliser.max);
    // V weights of at most 1 fit 63 bits.
    const float fixed_point = exp2f(float(31 + __clz(unsigned(a.V))));
    using C = Columns<E, NoTeacher, CHUNK>;
    const C c(a.V, int((0 - reinterpret_cast<uintptr_t>(z)) % 16 / sizeof(E)));
    unsigned prefix = 0;
    int shift = 32;
    for (int level = 0; level < 3; ++level) {
        const int bits = level == 2 ? 10 : 11, low = shift - bits;
        for (int i = threadIdx.x; i < BUCKETS; i += THREADS) h.W[i] = 0;
        for (int i = threadIdx.x; i < BUCKETS / 32; i += THREADS) h.present[i] = 0;
        __syncthreads();
        const auto add = [&](float x) {
            const unsigned key = ordered_key(x);
            const bool inside = level == 0 || key >> shift == prefix >> shift;
            if (!inside || !(x >= cutoff) || x == -INFINITY) return;
            const unsigned bucket = key >> low & ((1u << bits) - 1);
            const float w = by_mass ? weight(x, max, cutoff, k) * fixed_point : 1.0f;
            add_wide(h.W[bucket], static_cast<unsigned long long>(w));
            atomicOr(&h.present[bucket / 32], 1u << (bucket % 32));
        };
#pragma unroll 1
        for (int chunk = 0; chunk < c.chunks(); ++chunk) {
            Raw<E, C::WIDTH> x[C::UNITS];
#pragma unroll
            for (int j = 0; j < C::UNITS; ++j) {
                const int u = c.unit(chunk, j);
                x[j] = u < c.units ? load_aligned<Raw<E, C::WIDTH>>(z + c.head + u * C::WIDTH) : Raw<E, C::WIDTH>::absent();
            }
#pragma unroll
            for (int j = 0; j < C::UNITS; ++j)
#pragma unroll
                for (int i = 0; i < C::WIDTH; ++i) add(x[j][i]);
        }
        if (c.single() >= 0) add(load_one(z + c.single()));
        __syncthreads();
        if (threadIdx.x < WARP) choose_bucket(h, level == 0, a.top_p, by_mass, double(a.top_k));
        __syncthreads();
        prefix |= h.chosen << low;
        shift = low;
        __syncthreads();  // before the next level clears the histogram
    }
    return from_ordered_key(prefix);
}

template <class S, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS) row_sample_filter_kernel(SampleArgs a, SampleBuffers buffers) {
    MINILLM_SHARED(Histogram, h);
    const int64_t laws = a.teacher ? 2 * a.N : a.N;
    for (int64_t law = blockIdx.x; law < laws; law += gridDim.x) {
        if (threadIdx.x < WARP) {
            const Normaliser n = normaliser(buffers, law, a.inv_T);
            if (threadIdx.x == 0) h.normaliser = n;
        }
        __syncthreads();
        float cutoff = -INFINITY;
        if (h.normaliser.Z > 0) {  // else NaN or empty: nothing to filter
            const auto filter = [&](const auto* z) {
                if (a.top_k > 0 && a.top_k < a.V) cutoff = cutoff_of(h, z, a, cutoff, false);
                if (a.top_p < 1.0) cutoff = cutoff_of(h, z, a, cutoff, true);
            };
            if (law < a.N) {
                filter(row_of<const S>(a.student, law));
            } else if constexpr (!std::is_same_v<T, NoTeacher>) {
                filter(row_of<const T>(a.teacher, law - a.N));
            }
        }
        if (threadIdx.x == 0) buffers.cutoffs[law] = cutoff;
        __syncthreads();  // before the next law's normaliser
    }
}

}  // namespace minillm::cuda
