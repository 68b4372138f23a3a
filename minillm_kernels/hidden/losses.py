"""Losses of hidden states and head weights: the logits of all rows never exist at once.

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

from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..logits import losses
from ..logits import minillm as policy
from ..logits.minillm import MiniLLMLoss
from ..rows import DIFFERENTIABLE, MIXTURE_DIVERGENCES, RowStats
from . import ops  # noqa: F401  (registers torch.ops.minillm)
from .head import Heads, PerModel, flat
from .tiled import COMPUTES


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
        mask = None if w is None else flat(w != 0)
        if name in MIXTURE_DIVERGENCES:
            per_row = torch.ops.minillm.linear_divergence(*heads.tensors, mask, name, beta, *heads.settings)
        else:
            stats = torch.ops.minillm.linear_stats(*heads.tensors, None, mask, *heads.settings)
            per_row = stats[RowStats._fields.index(name)]
        per_row = per_row.reshape(heads.leading)
        return per_row if w is None else per_row * w
    if w is None:
        w = torch.ones(heads.leading, dtype=losses.accumulator(student_hidden), device=student_hidden.device)
    row_weights = losses.normalized(w, reduction, normalizer).reshape(-1)
    if name in MIXTURE_DIVERGENCES:
        return torch.ops.minillm.linear_divergence_loss(
            *heads.tensors, row_weights, name, beta, heads.needs, *heads.settings
        )[0]
    coefficients = row_weights.new_zeros(len(DIFFERENTIABLE), len(row_weights))
    coefficients[DIFFERENTIABLE.index(name)] = row_weights
    return torch.ops.minillm.linear_stats_loss(
        *heads.tensors, None, row_weights != 0, coefficients, heads.needs, *heads.settings
    )[0]


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
        flat(ids),
        flat(counts),
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
