// defines: MINILLM_HD, the qualifier that lets one formula serve the CPU and the GPU; what a list of names is made into
#pragma once

#ifdef __CUDACC__
#define MINILLM_HD __host__ __device__ __forceinline__
#else
#define MINILLM_HD inline __attribute__((always_inline))
#endif

// A list of names X(a) X(b) ... as enumerators and as strings.
#define MINILLM_ENUMERATOR(name) name,
#define MINILLM_NAME(name) #name,
