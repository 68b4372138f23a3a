// defines: what nvcc supplies, for g++: threadIdx, __syncthreads, __shfl_down_sync, ..., and host_cuda::launch
//
// The kernels of csrc/cuda, the very same source, run block by block on the CPU. Each thread of a block is a fiber; a barrier
// or a warp collective is a rendezvous of the threads that it names. Which of the threads that can run goes next follows from
// a seed, so a missing barrier shows as results that differ from seed to seed. Shared memory is fresh for each block and
// filled with NaN. The blocks of a cluster run together, all their threads in one such order, and find each other's shared
// memory. Found and reported instead of executed: a deadlock, a collective that its lanes do not agree on or that
// reads from a lane it does not name, a global access that is misaligned or outside of the memory that was allowed, a copy to
// shared memory that nobody waited for, the shared memory of a block that has returned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <string>
#include <vector>

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace host_cuda {

enum class Collective : int { none, shuffle, ballot, barrier_of_warp };

struct Settings {
    uint64_t seed = 0;     // 0: threads in order
    bool count = false;    // loads and stores
    int processors = 132;  // what cudaDeviceGetAttribute reports
    int shared_memory = 227 << 10;
    int most_blocks_a_cluster = 8;  // 1: a device without clusters
};
struct Counters {
    int64_t loaded = 0, stored = 0;                  // bytes
    int64_t sectors_loaded = 0, sectors_stored = 0;  // different 32-byte sectors
    int64_t blocks = 0, launches = 0;
};
extern Settings settings;
extern Counters counters;

void allow(const void* begin, int64_t bytes);  // global memory; none allowed = everything is
void allow_everything();

std::string run(const std::function<void()>& kernel, unsigned blocks, unsigned threads, size_t dynamic_shared,
                unsigned cluster);
void barrier();
uint64_t rendezvous(Collective what, unsigned mask, uint64_t value, int source_lane);
int lane();
void* shared(const void* key, size_t bytes);
void* dynamic_shared();
size_t dynamic_shared_bytes();
void arrive_in_cluster();
void wait_for_cluster();
void* of_block(const void* shared, int rank);  // the same place in another block's shared memory
void touch(const void* p, int bytes, bool store);
void count_sectors();                         // that were touched, once each
[[noreturn]] void fail(const std::string& what);  // by the thread that runs

// Copies of 16 bytes that a thread has under way: done when it waits for their group, not before.
void copy_async(void* to, const void* from);
void commit_copies();
void wait_for_copies(size_t groups_left);

// In place of run(), if set: takes the kernel's name and its parameters as a GPU would find them.
using Executor = std::function<std::string(const char* name, unsigned blocks, unsigned threads, size_t dynamic_shared,
                                           const std::vector<std::string>& parameters)>;
extern Executor executor;

// A kernel launch: an empty string, or what went wrong.
template <class... P, class... A>
std::string launch(const char* name, void (*kernel)(P...), unsigned blocks, unsigned threads, size_t dynamic_shared,
                   unsigned cluster, A... args) {
    if (!executor) return run([=] { kernel(args...); }, blocks, threads, dynamic_shared, cluster);
    if (cluster > 1) return "what executes it knows no clusters";
    const auto bytes = [](const auto& x) { return std::string(reinterpret_cast<const char*>(&x), sizeof x); };
    return executor(name, blocks, threads, dynamic_shared, {bytes(P(args))...});
}

template <class T>
T exchange(unsigned mask, T value, int source_lane) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = rendezvous(Collective::shuffle, mask, bits, source_lane);
    memcpy(&value, &bits, sizeof value);
    return value;
}

// One object a block, by the place of its declaration.
template <class T, int LINE>
T& shared_variable() {
    static const char key = 0;
    return *static_cast<T*>(shared(&key, sizeof(T)));
}

}  // namespace host_cuda

#define MINILLM_SHARED(T, name) T& name = host_cuda::shared_variable<T, __LINE__>()
#define MINILLM_DYNAMIC_SHARED(name) char* name = static_cast<char*>(host_cuda::dynamic_shared())
#define MINILLM_TOUCH(p, bytes, store) host_cuda::touch(p, bytes, store)
#define __launch_bounds__(...)

inline void __syncthreads() { host_cuda::barrier(); }
inline void __syncwarp(unsigned mask = ~0u) {
    host_cuda::rendezvous(host_cuda::Collective::barrier_of_warp, mask, 0, host_cuda::lane());
}
// Beyond the warp's end a lane keeps its own value.
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta) {
    const int source = host_cuda::lane() + int(delta);
    return host_cuda::exchange(mask, x, source < 32 ? source : host_cuda::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta) {
    const int source = host_cuda::lane() - int(delta);
    return host_cuda::exchange(mask, x, source >= 0 ? source : host_cuda::lane());
}
template <class T>
T __shfl_sync(unsigned mask, T x, int source) {
    return host_cuda::exchange(mask, x, source & 31);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return unsigned(host_cuda::rendezvous(host_cuda::Collective::ballot, mask, predicate != 0, host_cuda::lane()));
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline float __uint_as_float(unsigned x) {
    float r;
    memcpy(&r, &x, sizeof r);
    return r;
}
inline unsigned __float_as_uint(float x) {
    unsigned r;
    memcpy(&r, &x, sizeof r);
    return r;
}
// Fibers take turns only at rendezvous, so a plain addition is atomic.
template <class T>
T atomicAdd(T* p, T x) {
    const T before = *p;
    *p = before + x;
    return before;
}
template <class T>
T atomicOr(T* p, T x) {
    const T before = *p;
    *p = before | x;
    return before;
}
