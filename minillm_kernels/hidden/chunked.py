"""The chunk driver: vocabulary heads, their losses and gradients over a few rows at a time.

A loss that takes hidden states and heads needs the logits of a chunk of rows only while that chunk is worked on: one
matmul a model forms them in a reused buffer, the row operations turn the student's into their own gradient in place,
and two matmuls send it to the hidden states and the weight. Four matmuls, none done twice (in float16 two of them, see
float16.py); the extra memory is the two buffers, 2 x chunk_rows x V, whatever the number of rows (plus one more when a
soft-cap needs the logits and their gradient at once, and their fp32 copies on a CPU for 16-bit weights).

Chunks are slices of a fixed size: the host looks at no tensor, so nothing waits for the device and a CUDA graph can
hold it all. Rows that do not count take part in the matmuls as zeros, with a gradient of zeros. `gather` leaves them
out instead, which pays where most rows do not count, and makes the host wait for their numbers.

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
from .matmul import add_product, linear
from .operands import Operands, Projection

BUFFER_BYTES = 96 << 20  # both models' logits of a chunk together on a CPU, unless chunk_rows says otherwise
CUDA_ROWS = (1024, 4096)  # of a chunk, at least and at most, unless chunk_rows says otherwise


class Gradients(NamedTuple):
    """Of the student's hidden states, weight and bias; an empty tensor for one that was not asked for."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


class Sweep:
    """One pass over the rows, a chunk at a time:

        for rows in sweep:            # a slice of them, or with `gather` the numbers of n that count
            ... sweep.pair ...        # their logits, under no other name; sweep.mask: which of them count, or None
            sweep.backward()          # sweep.gradient, filled before, goes to the hidden states, weight and bias

    What the chunks add up to, in their order (deterministic), is sweep.gradients; sweep.finished(unit) where the
    coefficients came in a unit.
    """

    def __init__(self, heads: Operands, mask: Tensor | None, needs: Sequence[bool] = (False, False, False)) -> None:
        self.heads, self.student, self.teacher, self.needs = heads, heads.student, heads.teacher, needs
        self.backend = choose.resolve(heads.backend, heads.student_weight, heads.teacher_weight)
        self.gradients = empty_gradients(self.student, needs)
        size, n_rows = heads.chunk_rows or default_chunk_rows(heads), heads.n_rows
        self.chunks: Sequence[slice | Tensor]
        if heads.gather and mask is not None:
            counting = mask.nonzero().squeeze(1)
            mask, n_rows = None, len(counting)
            self.chunks = counting.split(size) if n_rows else ()
        else:
            self.chunks = [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
        self._counts = mask
        shape = (min(size, n_rows), heads.vocab_size)
        models = (self.student, self.teacher)
        self._buffers = [_buffer(shape, x.weight) for x in models if x is not None]
        self._apart = _buffer(shape, self.student.weight) if self.student.softcap and any(needs) else None

    def __iter__(self) -> Iterator[slice | Tensor]:
        for rows in self.chunks:
            self.rows = rows
            self.mask = None if self._counts is None else self._counts[rows]
            self._hidden = self.student.hidden[rows]
            if self.mask is not None:  # 0 times the NaN of such a row would be NaN in the weight's gradient
                self._hidden = torch.where(self.mask[:, None], self._hidden, 0)
            self.pair = Pair(
                _logits(self.student, self._hidden, self._buffers[0]),
                None if self.teacher is None else _logits(self.teacher, self.teacher.hidden[rows], self._buffers[1]),
                self.heads.temperature,
                self.heads.vocab_size,
            )
            yield rows
            del self.pair, self._hidden  # before the next chunk's are made

    @property
    def gradient(self) -> Tensor:
        """[n, V]: where the gradient of the student's logits goes. Over them, but where a soft-cap needs both."""
        return self.pair.student if self._apart is None else self._apart[: len(self._hidden)]

    def outputs(self, fields: int) -> Tensor:
        """Zeros [fields, N], for values of each row."""
        heads = self.heads
        return heads.student_hidden.new_zeros(fields, heads.n_rows, dtype=heads.accumulator)

    def backward(self) -> None:
        """Adds what the gradient of this chunk's logits gives. It is overwritten, and so are the logits."""
        student, total, g = self.student, self.gradients, self.gradient
        vocab_size = self.heads.vocab_size
        if student.softcap:  # d/d(hW^T + b) from d/dz: the factor scale (1 - (z/cap)^2)
            g.mul_(self.pair.student.div_(student.softcap).square_().neg_().add_(1.0))
        if student.scale != 1.0:
            g.mul_(student.scale)
        if self.needs[0]:
            total.hidden[self.rows] = linear(g, student.weight[:vocab_size].t())
        if self.needs[1]:
            add_product(total.weight[:vocab_size], g.t(), self._hidden)
        if self.needs[2]:
            total.bias[:vocab_size] += g.sum(0, dtype=total.bias.dtype)

    def finished(self, unit: Tensor | None) -> Gradients:
        """The gradients, of coefficients that float16.py has brought to that unit."""
        if unit is not None:
            for g in self.gradients:
                if g.numel() > 0:
                    self.backend.row_scale(g, unit)
        return self.gradients


def _buffer(shape: tuple[int, int], weight: Tensor) -> Tensor:
    return advise(torch.empty(shape, dtype=weight.dtype, device=weight.device))


def _logits(model: Projection, hidden: Tensor, buffer: Tensor) -> Tensor:
    """[n, V] in the buffer's first n rows, or in memory of the matmul's own."""
    vocab_size = buffer.shape[1]
    z = linear(hidden, model.weight[:vocab_size], buffer[: len(hidden)])
    if model.bias is not None:
        z += model.bias[:vocab_size]
    if model.scale != 1.0:
        z *= model.scale
    if model.softcap:
        z.div_(model.softcap).tanh_().mul_(model.softcap)
    return z


def default_chunk_rows(heads: Operands) -> int:
    """On a CPU as many rows as keep the logits of a chunk within BUFFER_BYTES, in whole multiples of 16."""
    models = 1 if heads.teacher_weight is None else 2
    element = heads.student_weight.element_size()
    if heads.student_weight.is_cuda or not isinstance(heads.backend, str):  # ranks of unequal slices: equal chunks
        return chunk_rows_of_matmuls(heads.student_weight.shape[1], models * element)
    return max(16, BUFFER_BYTES // (models * heads.vocab_size * element) // 16 * 16)


def chunk_rows_of_matmuls(hidden_size: int, column_bytes: int) -> int:
    """Each chunk's matmuls read the weights again, and the weight's gradient, in fp32, twice: few rows are bound by
    that traffic. As many, in whole tiles, as keep the logits (column_bytes of both models) below half
    of that gradient, within CUDA_ROWS."""
    least, most = CUDA_ROWS
    return min(max(2 * hidden_size // column_bytes // 256 * 256, least), most)


def empty_gradients(student: Projection, needs: Sequence[bool]) -> Gradients:
    """Zeros of the right shapes, empty where nothing is needed. The weight's and the bias's accumulate over chunks in
    fp32 (fp64 for fp64). Rows are dense whatever the operands' strides are: row_scale takes nothing else."""
    dense = torch.contiguous_format
    accumulator = torch.promote_types(student.weight.dtype, torch.float32)
    gradients = no_gradients(student)
    if needs[0]:
        gradients = gradients._replace(hidden=torch.zeros_like(student.hidden, memory_format=dense))
    if needs[1]:
        weight = torch.empty_like(student.weight, dtype=accumulator, memory_format=dense)
        gradients = gradients._replace(weight=advise(weight).zero_())
    if needs[2] and student.bias is not None:
        gradients = gradients._replace(bias=torch.zeros_like(student.bias, dtype=accumulator))
    return gradients


def no_gradients(student: Projection) -> Gradients:
    """Three tensors, not one thrice: what an operator of torch returns may share no memory."""
    return Gradients(*(student.hidden.new_empty(0) for _ in Gradients._fields))
