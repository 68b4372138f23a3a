// defines: row_scale_kernel
//
// A gradient that was formed with the loss, times what arrives for the loss. That number is on the device, where the host
// cannot look without waiting; it is 1 in most training loops, and then every block returns after reading it.
#pragma once

#include "tiles.cuh"

namespace minillm::cuda {

template <class E>
__global__ void __launch_bounds__(THREADS, BLOCKS) row_scale_kernel(ScaleArgs a) {
    const float factor = load_one(a.factor);
    if (factor == 1.0f) return;
    constexpr int W = 16 / sizeof(E);
    using Unit = Raw<E, W>;
    E* x = row_of<E>(a.student, 0);
    const int64_t n = a.N * a.V, thread = int64_t(blockIdx.x) * THREADS + threadIdx.x, step = int64_t(gridDim.x) * THREADS;
    const int64_t units = reinterpret_cast<uintptr_t>(x) % sizeof(Unit) == 0 ? n / W : 0;  // torch aligns what it allocates
    for (int64_t i = thread; i < units; i += step) {
        const Unit u = load_aligned<Unit>(x + i * W);
        float scaled[W];
#pragma unroll
        for (int j = 0; j < W; ++j) scaled[j] = factor == 0.0f ? 0.0f : u[j] * factor;
        store(x + i * W, Unit::of(scaled));
    }
    for (int64_t i = units * W + thread; i < n; i += step) store_one(x + i, factor == 0.0f ? 0.0f : load_one(x + i) * factor);
}

}  // namespace minillm::cuda
