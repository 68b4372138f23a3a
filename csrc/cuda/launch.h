// defines: Launch, the launchers of the CUDA row operations and the workspaces that they need
//
// Launchers take the arguments of args.h with device pointers, and a stream; they allocate nothing, never synchronise, and
// return an empty string or an error that names the kernel and its launch shape.
#pragma once

#include <stdint.h>

#include <string>

#include "../args.h"

namespace minillm::cuda {

struct Launch {
    void* workspace = nullptr;  // device memory of the size that workspace() asks for, aligned to 16 bytes
    void* stream = nullptr;
};

#define MINILLM_DECLARE_LAUNCHER(name, Args) std::string name(const Args&, const Launch&);
MINILLM_ROW_OPERATIONS(MINILLM_DECLARE_LAUNCHER)

// Whether row_stats_grad is the better way: a block of the current device, or a cluster of them, can hold a row pair of that
// type, and there are enough rows for all multiprocessors.
bool holds_rows(int64_t N, int64_t V, DType type);

// Bytes of workspace of an operation: none, but for those that say so.
template <class Args>
int64_t workspace(const Args&) {
    return 0;
}
int64_t workspace(const StatsArgs&);
int64_t workspace(const DivergenceArgs&);
int64_t workspace(const SampleArgs&);

// Into how many parts a row is divided: as many as give every card enough blocks, of at least 8192 columns (with fewer,
// merging states takes longer than making them); or, where parts are long enough for that to cost little, as many as leave
// the last wave of blocks a small share of all. Depends on N and V alone (determinism).
inline int splits(int64_t N, int64_t V) {
    const auto parts = [&](int64_t blocks, int64_t possible) {
        const int64_t wanted = N > 0 ? (blocks + N - 1) / N : 1;
        return wanted < possible ? wanted : possible;
    };
    const int64_t enough = parts(1024, (V + 8191) / 8192), even = parts(2112, V / 16384);
    return int(enough > even ? enough : even);
}

}  // namespace minillm::cuda
