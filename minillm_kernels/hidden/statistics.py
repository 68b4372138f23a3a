"""Statistics of hidden states and head weights, and losses that are linear in them; the shared arguments are in
linear.py."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import arguments
from ..logits.statistics import DistillStats
from ..rows import RowStats
from . import ops  # noqa: F401  (registers torch.ops.minillm)
from .head import Heads, PerModel, flat


@overload
def fused_linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    impl: str = ...,
    chunk_rows: int | None = ...,
    temperature: float = ...,
    return_entropy: Literal[False] = ...,
    ignore_index: int = ...,
    vocab_size: int | None = ...,
    group: object = ...,
) -> Tensor: ...
@overload
def fused_linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    impl: str = ...,
    chunk_rows: int | None = ...,
    temperature: float = ...,
    return_entropy: Literal[True],
    ignore_index: int = ...,
    vocab_size: int | None = ...,
    group: object = ...,
) -> tuple[Tensor, Tensor]: ...
def fused_linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of hidden states and a head. The backward pass forms the logits again."""
    arguments.check_group(group)
    heads = Heads((hidden, weight, bias), None, softcap, logit_scale, impl, chunk_rows, temperature, vocab_size)
    arguments.check_token_ids("token_ids", token_ids, heads.like_logits)
    mask = token_ids != ignore_index
    ids = torch.where(mask, token_ids, 0)
    stats = torch.ops.minillm.linear_stats(*heads.tensors, flat(ids), flat(mask), *heads.settings)
    stats = RowStats(*(x.reshape(heads.leading) for x in stats.unbind(0)))
    return (stats.student_logprobs, stats.student_entropy) if return_entropy else stats.student_logprobs


def fused_linear_distill_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_ids: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: PerModel = None,
    logit_scale: PerModel = 1.0,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    group: object = None,
) -> DistillStats:
    """`distill_stats` of hidden states and head weights. The backward pass forms the logits again."""
    arguments.check_group(group)
    heads = Heads(
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        softcap,
        logit_scale,
        impl,
        chunk_rows,
        temperature,
        vocab_size,
    )
    arguments.check_token_ids("token_ids", token_ids, heads.like_logits)
    if mask is not None:
        mask = arguments.check_per_row("mask", mask, heads.like_logits) != 0
        token_ids = torch.where(mask, token_ids, 0)
    stats = torch.ops.minillm.linear_stats(*heads.tensors, flat(token_ids), flat(mask), *heads.settings)
    return DistillStats.of(RowStats(*(x.reshape(heads.leading) for x in stats.unbind(0))))


class DistillLoss(NamedTuple):
    """`loss` is a differentiable scalar; `stats`, each [...] and 0 in rows that were not read, are for logging."""

    loss: Tensor
    stats: DistillStats


def fused_linear_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    token_ids: Tensor | None = None,
    *,
    reverse_kl: float | Tensor = 0.0,
    forward_kl: float | Tensor = 0.0,
    student_logprobs: float | Tensor = 0.0,
    student_entropy: float | Tensor = 0.0,
    student_logsumexp: float | Tensor = 0.0,
    mask: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: PerModel = None,
    logit_scale: PerModel = 1.0,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: object = None,
) -> DistillLoss:
    """Any loss that is linear in the statistics, and its gradients, in one sweep over the logits: the sum over rows of

        reverse_kl KL(q || p) + forward_kl KL(p || q) + student_logprobs log q(token) + student_entropy H(q)
        + student_logsumexp LSE

    Each coefficient is a number or a tensor [...] that broadcasts (weights, a mean's 1 / n), in nats. Cross entropy is
    `student_logprobs=-1 / n`, without a teacher three matmuls; distillation mixed with it costs the four of either
    alone. Rows where `mask` is 0 or every coefficient is 0 are left out of the matmuls, whatever they hold.

    Raises ValueError for a divergence without a teacher, log-probabilities without token_ids, or no coefficient.
    """
    arguments.check_group(group)
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("teacher_hidden and teacher_weight come together, or both are None")
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = (teacher_hidden, teacher_weight, teacher_bias)
    student = (student_hidden, student_weight, student_bias)
    heads = Heads(student, teacher, softcap, logit_scale, impl, chunk_rows, temperature, vocab_size)
    like = heads.like_logits
    given = {  # in the order of row_grad's coefficients
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "student_logprobs": student_logprobs,
        "student_entropy": student_entropy,
        "student_logsumexp": student_logsumexp,
    }

    def unused(name: str) -> bool:
        value = given[name]
        return not isinstance(value, Tensor) and value == 0

    if all(unused(name) for name in given):
        raise ValueError("every coefficient is 0: there is no loss; fused_linear_distill_stats gives the statistics")
    for name in ("reverse_kl", "forward_kl"):
        if teacher is None and not unused(name):
            raise ValueError(f"{name} needs a teacher: pass teacher_hidden and teacher_weight")
    if token_ids is None and not unused("student_logprobs"):
        raise ValueError("student_logprobs needs token_ids, the tokens whose log-probabilities count")
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    rows = [_coefficient(name, value, like, dtype) for name, value in given.items()]
    coefficients = torch.stack(rows)
    read = None
    if mask is not None or any(isinstance(value, Tensor) for value in given.values()):
        if mask is not None:
            counts = arguments.check_per_row("mask", mask, like) != 0
            coefficients = torch.where(counts.reshape(-1), coefficients, 0)
        read = (coefficients != 0).any(0)
    ids = None
    if token_ids is not None:
        ids = arguments.check_token_ids("token_ids", token_ids, like).reshape(-1)
        ids = ids if read is None else torch.where(read, ids, 0)
    loss, stats, *_gradients = torch.ops.minillm.linear_stats_loss(
        *heads.tensors, ids, read, coefficients, heads.needs, *heads.settings
    )
    detached = RowStats(*(x.reshape(heads.leading) for x in stats.detach().unbind(0)))
    return DistillLoss(loss, DistillStats.of(detached))


def _coefficient(name: str, value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[N]."""
    if not isinstance(value, Tensor):
        return torch.full((like.shape[:-1].numel(),), value, dtype=dtype, device=like.device)
    return arguments.check_per_row(name, value, like).to(dtype).reshape(-1)
