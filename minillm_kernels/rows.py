"""The layout of what the row operations exchange: statistics, coefficients, divergences. csrc/rowmath has the same
order."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
    student_entropy: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    student_logsumexp: Tensor
    teacher_logsumexp: Tensor


# The statistics that are differentiable in the student, in the order of row_grad's coefficients.
DIFFERENTIABLE = ("reverse_kl", "forward_kl", "student_logprob", "student_entropy", "student_logsumexp")
DIFFERENTIABLE_INDEX = [RowStats._fields.index(name) for name in DIFFERENTIABLE]

# Divergences of row_divergence, in the order of csrc/rowmath/divergence.h.
MIXTURE_DIVERGENCES = ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
