"""The tiled driver: losses of hidden states and head weights whose logits never exist, beside the chunk driver.

A kernel of the Triton backend forms the logits tile by tile and folds them into the statistics of each row: the extra
memory is O(N). The gradient goes one vocabulary tile at a time: a kernel forms the logits of all rows on that tile
again and writes their gradient [N, tile] into a buffer of at most GRADIENT_BYTES; two matmuls send it to the hidden
states (accumulated in fp32) and to the tile's rows of the weight, which are then complete: no fp32 copy of the
weight's gradient, but in float16 one of a tile's rows. Six matmuls where chunked.py takes four: the memory optimum
beside the speed optimum.

Legend: N rows, H hidden, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import choose, triton
from .chunked import Gradients, no_gradients
from .float16 import in_units
from .matmul import add_product
from .operands import Operands, Projection

GRADIENT_BYTES = 16 << 20
COMPUTES = "reverse_kl, forward_kl, token log-probabilities, statistics and the MiniLLM loss"


def statistics(heads: Operands, token_ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """[len(RowStats), N], 0 in rows that `mask` leaves out."""
    choose.resolve(heads.backend, heads.student_weight, heads.teacher_weight)
    settings = (heads.temperature, heads.vocab_size)
    return triton.linear_stats(heads.student, heads.teacher, token_ids, mask, *settings)


def empty_gradients(student: Projection, needs: Sequence[bool]) -> Gradients:
    """Of the hidden states in fp32, where tiles add up; of the weight in its own type. Rows are dense."""
    dense = torch.contiguous_format
    gradients = no_gradients(student)
    if needs[0]:
        gradients = gradients._replace(
            hidden=torch.zeros_like(student.hidden, dtype=torch.float32, memory_format=dense)
        )
    if needs[1]:
        gradients = gradients._replace(weight=torch.zeros_like(student.weight, memory_format=dense))
    if needs[2] and student.bias is not None:
        gradients = gradients._replace(bias=torch.zeros_like(student.bias))
    return gradients


def gradients(
    heads: Operands, token_ids: Tensor | None, stats: Tensor, coefficients: Tensor, needs: Sequence[bool]
) -> Gradients:
    """Of sum(coefficients * differentiable statistics), rows without a coefficient not read."""
    choose.resolve(heads.backend, heads.student_weight, heads.teacher_weight)
    student, teacher, vocab_size = heads.student, heads.teacher, heads.vocab_size
    result = empty_gradients(student, needs)
    n_rows = student.hidden.shape[0]
    if n_rows == 0 or not any(needs):
        return result
    width = max(128, GRADIENT_BYTES // (n_rows * student.weight.element_size()) // 128 * 128)
    width = min(width, (vocab_size + 127) // 128 * 128)
    coefficients, unit = in_units(coefficients, heads)
    if unit is not None and needs[1]:  # the tile's rows of the weight's gradient, before their unit is taken off
        width = min(width, max(128, GRADIENT_BYTES // (4 * student.hidden.shape[1]) // 128 * 128))
        sums = result.weight.new_empty(width, student.hidden.shape[1], dtype=torch.float32)
    buffer = student.weight.new_empty(n_rows, width)
    # 0 times the NaN of a row that does not count would be NaN in the weight's gradient.
    hidden = torch.where((coefficients != 0).any(0)[:, None], student.hidden, 0) if needs[1] else student.hidden
    for start in range(0, vocab_size, width):
        end = min(start + width, vocab_size)
        g = buffer[:, : end - start]
        args = (student, teacher, token_ids, stats, coefficients, heads.temperature, vocab_size)
        triton.linear_grad_tile(*args, out=g, start=start)
        if needs[0]:
            add_product(result.hidden, g, student.weight[start:end])
        if needs[1]:
            weight = result.weight[start:end]
            if unit is None:
                torch.mm(g.t(), hidden, out=weight)
            else:
                add_product(sums[: end - start].zero_(), g.t(), hidden)
                torch.mul(sums[: end - start], unit, out=weight)
        if needs[2]:
            bias = g.sum(0, dtype=torch.float32)
            result.bias[start:end] = bias if unit is None else bias * unit
    if unit is not None:
        result.hidden.mul_(unit)
    return result
