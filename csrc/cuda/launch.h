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

// Whether row_stats_grad is the better way: a block of the current device can hold a row pair of that type, and there are
// enough rows for all multiprocessors.
bool holds_rows(int64_t N, int64_t V, DType type);

// Bytes of workspace of an operation: none, but for those that say so.
template <class Args>
int64_t workspace(const Args&) {
    return 0;
}
int64_t workspace(const StatsArgs&);
int64_t workspace(const DivergenceArgs&);
int64_t workspace(const SampleArgs&);

// Into how many parts a row is divided: enough blocks for any card, each with two chunks a thread (with fewer, merging its
// states takes longer than making them). Depends on N and V alone (determinism).
inline int splits(int64_t N, int64_t V) {
    constexpr int64_t enough_blocks = 1024, smallest_part = 8192;
    const int64_t wanted = N >= enough_blocks ? 1 : (enough_blocks + N - 1) / (N > 0 ? N : 1);
    const int64_t possible = (V + smallest_part - 1) / smallest_part;
    return int(wanted < possible ? wanted : possible);
}

}  // namespace minillm::cuda
