"""Losses and statistics of hidden states and head weights: the logits of all rows never exist at once.

Each function is its namesake on logits applied to z = hW^T + b, then z * logit_scale, then softcap * tanh(z /
softcap), for student and teacher; how it is computed is in chunked.py and tiled.py. Arguments that all share:

    student_hidden [..., H], student_weight [V, H], student_bias [V] or None: differentiable, of one type; under
    autocast
        they are cast as torch.nn.functional.linear casts.
    teacher_hidden [..., H_t], teacher_weight [V_t, H_t], teacher_bias: constants. Hidden and head sizes may differ.
    softcap, logit_scale: a number for both models or a (student, teacher) pair; softcap None: none.
    impl: "chunked", four matmuls on a buffer of some rows' logits; or "tiled", logits formed tile by tile on the
        tensor cores and never in memory (Triton; tiled.py says what it costs and computes).
    chunk_rows: rows a chunk; by default both models' logits of a chunk take at most 96 MiB.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import arguments, linear_ops, losses, policy  # noqa: F401  (linear_ops registers torch.ops.minillm)
from .heads import Heads, PerModel
from .policy import MiniLLMLoss
from .rows import MIXTURE_DIVERGENCES, RowStats
from .statistics import DistillStats
from .tiled import COMPUTES


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1)


def fused_linear_rkl_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: PerModel = None,
    logit_scale: PerModel = 1.0,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> Tensor:
    """`fused_rkl_loss` of hidden states and head weights (the arguments at the top of this file).

    A scalar reduction forms the gradients in the same sweep as the loss: four matmuls. Rows that do not count (ignored
    label, weight 0) are left out of the matmuls. reduction="none" forms the logits again in the backward pass.
    """
    return fused_linear_divergence_loss(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        "reverse_kl",
        labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        softcap=softcap,
        logit_scale=logit_scale,
        impl=impl,
        chunk_rows=chunk_rows,
        weights=weights,
        temperature=temperature,
        reduction=reduction,
        normalizer=normalizer,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        group=group,
    )


def fused_linear_divergence_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    divergence: str,
    labels: Tensor | None = None,
    *,
    beta: float = 0.5,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: PerModel = None,
    logit_scale: PerModel = 1.0,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> Tensor:
    """`fused_divergence_loss` of hidden states and head weights; see `fused_linear_rkl_loss`."""
    arguments.check_group(group)
    name = losses.check_divergence(divergence, beta, reduction)
    if impl == "tiled" and name in MIXTURE_DIVERGENCES:
        raise NotImplementedError(
            f'impl="tiled" computes {COMPUTES}; {name}, whose mixture needs both normalisers first: use impl="chunked"'
        )
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
    w = losses.row_weights(heads.like_logits, labels, weights, ignore_index)
    if reduction == "none":
        mask = None if w is None else _flat(w != 0)
        if name in MIXTURE_DIVERGENCES:
            per_row = torch.ops.minillm.linear_divergence(*heads.tensors, mask, name, beta, *heads.settings)
        else:
            stats = torch.ops.minillm.linear_stats(*heads.tensors, None, mask, *heads.settings)
            per_row = stats[RowStats._fields.index(name)]
        per_row = per_row.reshape(heads.leading)
        return per_row if w is None else per_row * w
    if w is None:
        w = torch.ones(heads.leading, dtype=losses.accumulator(student_hidden), device=student_hidden.device)
    row_weights = _flat(losses.normalized(w, reduction, normalizer))
    return torch.ops.minillm.linear_divergence_loss(
        *heads.tensors, row_weights, name, beta, heads.needs, *heads.settings
    )[0]


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
    stats = torch.ops.minillm.linear_stats(*heads.tensors, _flat(ids), _flat(mask), *heads.settings)
    stats = RowStats(*(x.reshape(heads.leading) for x in stats.unbind(0)))
    return (stats.student_logprob, stats.student_entropy) if return_entropy else stats.student_logprob


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
    stats = torch.ops.minillm.linear_stats(*heads.tensors, _flat(token_ids), _flat(mask), *heads.settings)
    return DistillStats.of(RowStats(*(x.reshape(heads.leading) for x in stats.unbind(0))))


def fused_linear_minillm_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_ids: Tensor,
    *,
    advantages: Tensor,
    old_logprobs: Tensor,
    importance_weights: Tensor | None = None,
    mask: Tensor,
    clip_range: float = 0.2,
    single_step: float = 1.0,
    weight_single_step: bool = True,
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: PerModel = None,
    logit_scale: PerModel = 1.0,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> MiniLLMLoss:
    """`minillm_loss` of hidden states and head weights, value and gradients in one sweep: four matmuls."""
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
    like = heads.like_logits
    arguments.check_token_ids("token_ids", token_ids, like)
    rows, counts = policy.check_policy(
        like, advantages, old_logprobs, importance_weights, mask, clip_range, single_step, weight_single_step
    )
    ids = torch.where(counts, token_ids, 0)
    loss, stats, *_gradients = torch.ops.minillm.linear_minillm_loss(
        *heads.tensors,
        _flat(ids),
        _flat(counts),
        torch.stack([x.reshape(-1) for x in rows]),
        1.0 / policy.denominator(counts, normalizer, rows.advantages.dtype),
        clip_range,
        entropy_coef,
        heads.needs,
        *heads.settings,
    )
    detached = RowStats(*(x.reshape(heads.leading) for x in stats.detach().unbind(0)))
    return policy.summarize(detached, rows, counts, clip_range, entropy_coef, normalizer)._replace(loss=loss)


class FusedLinearRKLLoss(nn.Module):
    """`fused_linear_rkl_loss` with its options fixed."""

    def __init__(
        self,
        *,
        softcap: PerModel = None,
        logit_scale: PerModel = 1.0,
        impl: str = "chunked",
        chunk_rows: int | None = None,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        losses.check_divergence("reverse_kl", 0.5, reduction)
        arguments.check_temperature(temperature)
        self.options: dict[str, Any] = {
            "softcap": softcap,
            "logit_scale": logit_scale,
            "impl": impl,
            "chunk_rows": chunk_rows,
            "temperature": temperature,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "vocab_size": vocab_size,
        }

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return fused_linear_rkl_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            weights=weights,
            normalizer=normalizer,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
