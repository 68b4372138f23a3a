// row_grad: the gradient of any weighted sum of the statistics, from the saved statistics.
#include "row_grad.h"

namespace minillm::cpu::MINILLM_ISA {

void row_grad(const GradArgs& a) {
    if (a.factor != nullptr && *a.factor == 1.0f) return;
    for_gradient_rows(a, [&](const Span& span) { return write_row_gradient(a, span); });
}

}  // namespace minillm::cpu::MINILLM_ISA
