"""Log-probabilities, entropies and divergences of given tokens, as one read of the logits gives them."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import arguments
from ..backends import choose
from ..rows import RowStats
from . import ops  # noqa: F401  (registers torch.ops.minillm)


class DistillStats(NamedTuple):
    """Per row, in nats. Differentiable in the student: all but teacher_logprobs and teacher_logsumexp."""

    reverse_kl: Tensor
    forward_kl: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    student_entropy: Tensor
    student_logsumexp: Tensor
    teacher_logsumexp: Tensor

    @classmethod
    def of(cls, stats: RowStats) -> DistillStats:
        return cls(
            reverse_kl=stats.reverse_kl,
            forward_kl=stats.forward_kl,
            student_logprobs=stats.student_logprobs,
            teacher_logprobs=stats.teacher_logprobs.detach(),
            student_entropy=stats.student_entropy,
            student_logsumexp=stats.student_logsumexp,
            teacher_logsumexp=stats.teacher_logsumexp.detach(),
        )


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = ...,
    return_entropy: Literal[False] = ...,
    ignore_index: int = ...,
    vocab_size: int | None = ...,
    group: object = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = ...,
    return_entropy: Literal[True],
    ignore_index: int = ...,
    vocab_size: int | None = ...,
    group: object = ...,
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits/T)[token_ids] per row, in nats; with `return_entropy` also the entropy of the row.
    Differentiable.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, columns contiguous.
        token_ids: [...] integers in [0, vocab_size). Rows with `ignore_index` are not read: log-probability and
            entropy 0. Others outside the vocabulary raise IndexError on a CPU and give NaN on CUDA (no
            synchronisation).
        vocab_size: only the first `vocab_size` columns count, by default all.

    Returns float32 [...] (float64 for float64 logits), -inf for a token whose logit is -inf.
    """
    arguments.check_logits(logits, None)
    arguments.check_group(group)
    temperature = arguments.check_temperature(temperature)
    vocab_size = arguments.resolve_vocab_size(vocab_size, logits, None)
    token_ids = arguments.check_token_ids("token_ids", token_ids, logits)
    mask = token_ids != ignore_index
    ids = torch.where(mask, token_ids, 0)
    stats = RowStats(
        *torch.ops.minillm.row_stats(
            logits, None, ids, mask, False, temperature, vocab_size, choose.requested()
        ).unbind(0)
    )
    return (stats.student_logprobs, stats.student_entropy) if return_entropy else stats.student_logprobs


def distill_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    group: object = None,
) -> DistillStats:
    """Both KL divergences, both log-probabilities of `token_ids`, the student's entropy and both log-sum-exps, in one
    read.

    Args:
        student_logits: [..., V], teacher_logits: [..., V_t], as in `fused_rkl_loss`.
        token_ids: [...] integers in [0, vocab_size); not looked at where `mask` is 0.
        mask: [...] bool or 0/1, broadcastable. Rows with 0 are not read: everything is 0, with gradient 0.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.

    The support is the columns finite in both models, for every statistic; a token outside has log-probability -inf and
    gradient 0. Gradients of all differentiable fields together cost one more read and one write.
    """
    arguments.check_logits(student_logits, teacher_logits)
    arguments.check_group(group)
    temperature = arguments.check_temperature(temperature)
    vocab_size = arguments.resolve_vocab_size(vocab_size, student_logits, teacher_logits)
    token_ids = arguments.check_token_ids("token_ids", token_ids, student_logits)
    if mask is not None:
        mask = arguments.check_per_row("mask", mask, student_logits) != 0
        token_ids = torch.where(mask, token_ids, 0)
    settings = (temperature, vocab_size, choose.requested())
    stats = RowStats(
        *torch.ops.minillm.row_stats(student_logits, teacher_logits, token_ids, mask, False, *settings).unbind(0)
    )
    return DistillStats.of(stats)
