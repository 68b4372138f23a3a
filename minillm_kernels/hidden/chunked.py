"""The chunk driver: vocabulary heads, their losses and gradients over a few rows at a time.

A loss that takes hidden states and head weights needs the logits of a chunk of rows only while that chunk is worked
on: one matmul a model forms them in a reused buffer, the row operations turn the student's into their own gradient in
place, and two matmuls send it to the hidden states and the weight. Four matmuls, none done twice; the extra memory is
the two buffers, 2 x chunk_rows x V, whatever the number of rows (plus one more when a soft-cap needs the logits and
their gradient at once, and their fp32 copies on a CPU for 16-bit weights). Rows of weight 0 never reach a matmul.

Legend: N rows, n rows of a chunk, H hidden, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.cpu import advise
from .matmul import linear

BUFFER_BYTES = 96 << 20  # both models' logits of a chunk together, unless chunk_rows says otherwise


class Head(NamedTuple):
    """z = hW^T + b, then z * scale, then cap * tanh(z / cap) (cap 0: none)."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V', H], V' >= V
    bias: Tensor | None  # [V']
    softcap: float
    scale: float

    def logits(self, rows: Tensor, buffer: Tensor) -> Tensor:
        """[n, V] in the buffer's first n rows, or in memory of the matmul's own."""
        vocab_size = buffer.shape[1]
        z = linear(self.hidden[rows], self.weight[:vocab_size], buffer[: len(rows)])
        if self.bias is not None:
            z += self.bias[:vocab_size]
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def gradient_before_cap(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """From d/dz after scale and soft-cap to d/d(hW^T + b): the factor scale (1 - (z/cap)^2)."""
        if self.softcap:
            gradient = gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1.0))
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


class Gradients(NamedTuple):
    """Of the student's hidden states, weight and bias; an empty tensor for one that was not asked for."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def default_chunk_rows(vocab_size: int, element_size: int, models: int) -> int:
    """As many rows as keep the logits of a chunk within BUFFER_BYTES, in whole multiples of 16, at least 16."""
    rows = BUFFER_BYTES // (models * vocab_size * element_size)
    return max(16, rows // 16 * 16)


def empty_gradients(student: Head, needs: list[bool]) -> Gradients:
    """Zeros of the right shapes. The weight's and the bias's accumulate over chunks in fp32 (fp64 for fp64)."""
    accumulator = torch.promote_types(student.weight.dtype, torch.float32)
    none = student.hidden.new_empty(0)
    hidden = torch.zeros_like(student.hidden) if needs[0] else none
    weight = advise(torch.empty_like(student.weight, dtype=accumulator)).zero_() if needs[1] else none
    bias = none
    if needs[2] and student.bias is not None:
        bias = torch.zeros_like(student.bias, dtype=accumulator)
    return Gradients(hidden, weight, bias)


def over_chunks(
    student: Head,
    teacher: Head | None,
    mask: Tensor | None,
    vocab_size: int,
    chunk_rows: int,
    fields: int,
    needs: list[bool],
    row_loss: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Gradients]:
    """Calls row_loss(rows, student logits, teacher logits) -> (outputs [fields, n], gradient [n, V] or None) for each
    chunk.

    The gradient may be the student's buffer, overwritten. Returns the outputs [fields, N], 0 in rows that `mask`
    leaves out, and what the gradients add up to, in chunk order (deterministic).
    """
    n_rows, device = student.hidden.shape[0], student.hidden.device
    accumulator = torch.promote_types(student.hidden.dtype, torch.float32)
    outputs = torch.zeros(fields, n_rows, dtype=accumulator, device=device)
    gradients = empty_gradients(student, needs)
    rows = torch.arange(n_rows, device=device) if mask is None else mask.nonzero().squeeze(1)
    size = min(chunk_rows, max(len(rows), 1))
    student_buffer = advise(torch.empty(size, vocab_size, dtype=student.weight.dtype, device=device))
    teacher_buffer = None
    if teacher is not None:
        teacher_buffer = advise(torch.empty(size, vocab_size, dtype=teacher.weight.dtype, device=device))
    for chunk in rows.split(size) if len(rows) else ():
        z_s = student.logits(chunk, student_buffer)
        z_t = None if teacher is None or teacher_buffer is None else teacher.logits(chunk, teacher_buffer)
        values, gradient = row_loss(chunk, z_s, z_t)
        outputs[:, chunk] = values.to(accumulator)
        if gradient is not None:
            _accumulate(gradients, student, chunk, student.gradient_before_cap(gradient, z_s), needs)
        del z_s, z_t, gradient  # before the next chunk's are made
    return outputs, gradients


def _accumulate(gradients: Gradients, student: Head, rows: Tensor, g: Tensor, needs: list[bool]) -> None:
    vocab_size = g.shape[1]
    if needs[0]:
        gradients.hidden[rows] = linear(g, student.weight[:vocab_size].t())
    if needs[1]:
        h, weight = student.hidden[rows], gradients.weight[:vocab_size]
        if g.dtype == weight.dtype:
            weight.addmm_(g.t(), h)
        elif g.is_cuda:  # the matmul accumulates in fp32 by itself and rounds once a chunk
            weight += g.t() @ h
        else:
            weight.addmm_(g.t().to(weight.dtype), h.to(weight.dtype))
    if needs[2] and student.bias is not None:
        gradients.bias[:vocab_size] += g.sum(0, dtype=gradients.bias.dtype)
