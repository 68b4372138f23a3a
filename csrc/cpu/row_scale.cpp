// row_scale: a gradient that was formed with the loss, times what arrives for the loss. That is 1 in most training loops, and
// then nothing is read.
#include "tile.h"

namespace minillm::cpu::MINILLM_ISA {

void row_scale(const ScaleArgs& a) {
    const float factor = *a.factor;
    if (factor == 1.0f) return;
    const int64_t columns = a.N * a.V;
    const Rows row = {a.student.data, a.student.dtype, 1, 0, columns};
    parallel_for(a.threads, tiles(columns), [&](int64_t tile) {
        Scratch scratch, out;
        const int64_t begin = tile * TILE, n = columns - begin < TILE ? columns - begin : TILE;
        const float* x = widen_tile(row, 0, begin, n, scratch);
        for (int64_t i = 0; i < padded_size(n); i += LANES) (factor == 0.0f ? F32(0.0f) : F32::load(x + i) * F32(factor)).store(out.x + i);
        store_tile(row, 0, begin, n, out, false);
    });
}

}  // namespace minillm::cpu::MINILLM_ISA
