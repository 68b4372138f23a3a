// defines: MINILLM_HD, the qualifier that lets one formula serve the CPU and the GPU
#pragma once

#ifdef __CUDACC__
#define MINILLM_HD __host__ __device__ __forceinline__
#else
#define MINILLM_HD inline __attribute__((always_inline))
#endif
