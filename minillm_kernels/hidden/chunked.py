"""The chunk driver: vocabulary heads, their losses and gradients over a few rows at a time.

A loss that takes hidden states and heads needs the logits of a chunk of rows only while that chunk is worked on: one
matmul a model forms them in a reused buffer, the row operations turn the student's into their own gradient in place,
and two matmuls send it to the hidden states and the weight. Four matmuls, none done twice; the extra memory is the two
buffers, 2 x chunk_rows x V, whatever the number of rows (plus one more when a soft-cap needs the logits and their
gradient at once, and their fp32 copies on a CPU for 16-bit weights). Rows of weight 0 never reach a matmul.

Legend: N rows, n rows of a chunk, H hidden, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..backends.cpu import advise
from ..rows import Pair
from .matmul import linear
from .operands import Operands, Projection

BUFFER_BYTES = 96 << 20  # both models' logits of a chunk together, unless chunk_rows says otherwise


class Gradients(NamedTuple):
    """Of the student's hidden states, weight and bias; an empty tensor for one that was not asked for."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


class Sweep:
    """One pass over the rows that count, a chunk at a time:

        for rows in sweep:            # their numbers, [n]
            ... sweep.pair ...        # their logits
            sweep.backward()          # sweep.gradient, filled before, goes to the hidden states, weight and bias

    What the chunks add up to, in their order (deterministic), is sweep.gradients.
    """

    def __init__(self, heads: Operands, mask: Tensor | None, needs: Sequence[bool] = (False, False, False)) -> None:
        self.heads, self.student, self.teacher, self.needs = heads, heads.student, heads.teacher, needs
        self.backend = choose.resolve(heads.backend, heads.student_weight, heads.teacher_weight)
        self.gradients = empty_gradients(self.student, needs)
        device = heads.student_hidden.device
        rows = torch.arange(heads.n_rows, device=device) if mask is None else mask.nonzero().squeeze(1)
        size = heads.chunk_rows or default_chunk_rows(heads)
        self.chunks = rows.split(size) if len(rows) else ()
        shape = (min(size, len(rows)), heads.vocab_size)
        models = (self.student, self.teacher)
        self._buffers = [_buffer(shape, x.weight) for x in models if x is not None]
        self._apart = _buffer(shape, self.student.weight) if self.student.softcap and any(needs) else None

    def __iter__(self) -> Iterator[Tensor]:
        for rows in self.chunks:
            self.rows = rows
            self.pair = Pair(
                _logits(self.student, rows, self._buffers[0]),
                None if self.teacher is None else _logits(self.teacher, rows, self._buffers[1]),
                self.heads.temperature,
                self.heads.vocab_size,
            )
            yield rows
            del self.pair  # before the next chunk's is made

    @property
    def gradient(self) -> Tensor:
        """[n, V]: where the gradient of the student's logits goes. Over them, but where a soft-cap needs both."""
        return self.pair.student if self._apart is None else self._apart[: len(self.rows)]

    def outputs(self, fields: int) -> Tensor:
        """Zeros [fields, N], for values of each row."""
        heads = self.heads
        return heads.student_hidden.new_zeros(fields, heads.n_rows, dtype=heads.accumulator)

    def backward(self) -> None:
        """Adds what the gradient of this chunk's logits gives. It is overwritten, and so are the logits."""
        student, total, rows, g = self.student, self.gradients, self.rows, self.gradient
        vocab_size = self.heads.vocab_size
        if student.softcap:  # d/d(hW^T + b) from d/dz: the factor scale (1 - (z/cap)^2)
            g.mul_(self.pair.student.div_(student.softcap).square_().neg_().add_(1.0))
        if student.scale != 1.0:
            g.mul_(student.scale)
        if self.needs[0]:
            total.hidden[rows] = linear(g, student.weight[:vocab_size].t())
        if self.needs[1]:
            h, weight = student.hidden[rows], total.weight[:vocab_size]
            if g.dtype == weight.dtype:
                weight.addmm_(g.t(), h)
            elif g.is_cuda:  # the matmul accumulates in fp32 by itself and rounds once a chunk
                weight += g.t() @ h
            else:
                weight.addmm_(g.t().to(weight.dtype), h.to(weight.dtype))
        if self.needs[2]:
            total.bias[:vocab_size] += g.sum(0, dtype=total.bias.dtype)


def _buffer(shape: tuple[int, int], weight: Tensor) -> Tensor:
    return advise(torch.empty(shape, dtype=weight.dtype, device=weight.device))


def _logits(model: Projection, rows: Tensor, buffer: Tensor) -> Tensor:
    """[n, V] in the buffer's first n rows, or in memory of the matmul's own."""
    vocab_size = buffer.shape[1]
    z = linear(model.hidden[rows], model.weight[:vocab_size], buffer[: len(rows)])
    if model.bias is not None:
        z += model.bias[:vocab_size]
    if model.scale != 1.0:
        z *= model.scale
    if model.softcap:
        z.div_(model.softcap).tanh_().mul_(model.softcap)
    return z


def default_chunk_rows(heads: Operands) -> int:
    """As many rows as keep the logits of a chunk within BUFFER_BYTES, in whole multiples of 16, at least 16."""
    models = 1 if heads.teacher_weight is None else 2
    rows = BUFFER_BYTES // (models * heads.vocab_size * heads.student_weight.element_size())
    return max(16, rows // 16 * 16)


def empty_gradients(student: Projection, needs: Sequence[bool]) -> Gradients:
    """Zeros of the right shapes. The weight's and the bias's accumulate over chunks in fp32 (fp64 for fp64)."""
    accumulator = torch.promote_types(student.weight.dtype, torch.float32)
    none = student.hidden.new_empty(0)
    hidden = torch.zeros_like(student.hidden) if needs[0] else none
    weight = advise(torch.empty_like(student.weight, dtype=accumulator)).zero_() if needs[1] else none
    bias = torch.zeros_like(student.bias, dtype=accumulator) if needs[2] and student.bias is not None else none
    return Gradients(hidden, weight, bias)
