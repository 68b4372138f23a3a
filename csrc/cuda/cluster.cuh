// defines: Cluster: several blocks that read each other's shared memory
//
// From compute capability 9.0 on a launch may ask for clusters: blocks that run at the same time on multiprocessors next to
// each other. Code for an older one does not know them; a kernel of clusters is empty there (PTX for it is never launched:
// row_stats_grad.cu, takes_pairs).
#pragma once

#include "tiles.cuh"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MINILLM_CLUSTERS 1
#else
#define MINILLM_CLUSTERS 0
#endif

namespace minillm::cuda {

// Of BLOCKS blocks; one alone waits for nobody.
template <int BLOCKS>
struct Cluster {
    // The place of a variable of the shared memory in that of another block of the cluster.
    template <class X>
    __device__ const X* of_block(X* shared, int rank) const {
        if constexpr (BLOCKS == 1) return shared;
#if !defined(__CUDACC__)
        return static_cast<const X*>(host_cuda::of_block(shared, rank));
#elif MINILLM_CLUSTERS
        return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#endif
        return shared;
    }
    __device__ int rank() const { return int(blockIdx.x) % BLOCKS; }

    // All threads of all blocks call them in turns: what was written before arrive() is seen behind wait(). A block must not
    // return before the others have read its memory.
    __device__ void arrive() const {
        if constexpr (BLOCKS == 1) return;
#if !defined(__CUDACC__)
        host_cuda::arrive_in_cluster();
#elif MINILLM_CLUSTERS
        cooperative_groups::this_cluster().barrier_arrive();
#endif
    }
    __device__ void wait() const {
        if constexpr (BLOCKS == 1) return;
#if !defined(__CUDACC__)
        host_cuda::wait_for_cluster();
#elif MINILLM_CLUSTERS
        cooperative_groups::this_cluster().barrier_wait();
#endif
    }
};

}  // namespace minillm::cuda
