// defines: the entry points of the CPU row operations, and how they divide the work
#pragma once

#include "../args.h"

namespace minillm::cpu {

#define MINILLM_DECLARE(name, Args) void name(const Args&);
MINILLM_ROW_OPERATIONS(MINILLM_DECLARE)

// The widest instruction set in use; use_instruction_set(name) picks a narrower one (tests), false if it is not available.
const char* instruction_set();
bool use_instruction_set(const char* name);

// ---- shared by the operations --------------------------------------------------------------------------------------

// Columns are read in tiles that fit the L1 cache, and partial results are merged tile by tile in this order whatever the
// number of threads: same input, same bits.
constexpr int64_t TILE = 2048;
MINILLM_HD int64_t tiles(int64_t V) { return (V + TILE - 1) / TILE; }

// A row is split over several work units when there are few rows. Depends on N and V alone (determinism).
MINILLM_HD int64_t splits(int64_t N, int64_t V) {
    constexpr int64_t enough_units = 64;
    const int64_t wanted = N >= enough_units ? 1 : (enough_units + N - 1) / (N > 0 ? N : 1);
    return wanted < tiles(V) ? wanted : tiles(V);
}

struct Span {
    int64_t row, split, first_tile, last_tile;  // tiles [first_tile, last_tile)
};
MINILLM_HD Span span_of(int64_t unit, int64_t n_splits, int64_t V) {
    const int64_t row = unit / n_splits, split = unit % n_splits, n = tiles(V);
    return {row, split, split * n / n_splits, (split + 1) * n / n_splits};
}

}  // namespace minillm::cpu
