"""What the row operations exchange: the pair of rows, how rows lie in memory, statistics, coefficients, divergences.
csrc/args.h and csrc/rowmath have the same on the C++ side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """What every row operation reads: rows of student logits [..., V_s] and, unless it is None, of teacher logits
    [..., V_t], both divided by `temperature`. The first `vocab_size` columns count, at most the smaller head."""

    student: Tensor
    teacher: Tensor | None
    temperature: float
    vocab_size: int

    @property
    def n_rows(self) -> int:
        return self.student.shape[:-1].numel()


class RowStats(NamedTuple):
    """The statistics of a row pair, each [...]; `row_stats` returns them stacked along a new first dimension.

    Origins and log-normalisers are kept apart (see csrc/rowmath/state.h): with s = (z - origin)/T,
    log q(v) = s_v - logz. The teacher's fields are 0 when there is no teacher, everything is 0 in a row that was
    masked.
    """

    student_origin: Tensor
    student_logz: Tensor
    teacher_origin: Tensor
    teacher_logz: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    student_entropy: Tensor
    student_logsumexp: Tensor
    teacher_logsumexp: Tensor


# The statistics that are differentiable in the student, in the order of row_grad's coefficients.
DIFFERENTIABLE = ("reverse_kl", "forward_kl", "student_logprobs", "student_entropy", "student_logsumexp")
DIFFERENTIABLE_INDEX = [RowStats._fields.index(name) for name in DIFFERENTIABLE]

# Divergences of row_divergence, in the order of csrc/rowmath/divergence.h.
MIXTURE_DIVERGENCES = ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
# All divergences: the first two are statistics.
DIVERGENCES = ("reverse_kl", "forward_kl", *MIXTURE_DIVERGENCES)


class RowStrides(NamedTuple):
    """Row i starts (i // inner) * outer_stride + (i % inner) * inner_stride elements after the first."""

    inner: int
    outer_stride: int
    inner_stride: int


def row_strides(x: Tensor) -> RowStrides:
    """The leading dimensions as two strides: no copy for logits[:, :-1].

    Raises ValueError where the rows need a third stride, or columns are not neighbours.
    """
    elements = x.numel()
    if elements and x.is_contiguous():
        width = x.shape[-1]
        return RowStrides(elements // width, 0, width)
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if strides and strides[-1] == size * stride:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 2:
        raise ValueError(
            f"logits of shape {tuple(x.shape)} and strides {x.stride()}: at most two strides may describe the "
            "rows; call .contiguous() first"
        )
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"the last dimension must have stride 1, not {x.stride(-1)}: call .contiguous() first")
    outer_stride = strides[0] if len(sizes) == 2 else 0
    return RowStrides(max(sizes[-1], 1), outer_stride, strides[-1]) if sizes else RowStrides(1, 0, 0)


def rows_overlap(x: Tensor) -> bool:
    """Whether rows of [..., V] may share memory with each other: False where each dimension steps over all that the
    finer ones hold, as in every tensor that nobody strided by hand."""
    held = x.shape[-1]
    for stride, size in sorted(zip(x.stride()[:-1], x.shape[:-1], strict=True)):
        if size > 1 and stride < held:
            return True
        held += (size - 1) * stride
    return False


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether a row of x [..., V] and a row of y [..., W] have a byte in common."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    (x_first, x_last, x_bytes), (y_first, y_last, y_bytes) = _extent(x), _extent(y)
    if x_last <= y_first or y_last <= x_first:
        return False
    starts_x, starts_y = _row_addresses(x), _row_addresses(y).sort().values
    begun = torch.searchsorted(starts_y, starts_x + x_bytes)
    ended = torch.searchsorted(starts_y, starts_x - y_bytes, right=True)
    return bool((begun > ended).any())


def _extent(x: Tensor) -> tuple[int, int, int]:
    """The first address, the one behind the last, and the bytes of a row."""
    size, first = x.element_size(), x.data_ptr()
    steps = sum((n - 1) * stride for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    row = x.shape[-1] * size
    return first, first + steps * size + row, row


def _row_addresses(x: Tensor) -> Tensor:
    address = torch.tensor(x.data_ptr())
    for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        address = address.unsqueeze(-1) + torch.arange(n) * (stride * x.element_size())
    return address.flatten()


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """The type of what is summed up over these tensors: float64 if one of them is, else float32."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32
