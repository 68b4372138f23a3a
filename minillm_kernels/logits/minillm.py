"""MiniLLM's objective per token: exact single-step reverse KL and a clipped policy gradient (Gu et al., ICLR 2024).

    rho    = exp(log q(y) - old_logprob) w
    policy = -min(rho A, clip(rho, 1 - eps, 1 + eps) A)
    single = single_step * (w if weight_single_step else 1) * KL(q || p)
    loss   = sum over the mask of (policy + single - entropy_coef H(q)) / normalizer

The paper's form: old_logprobs are the rollout's student log-probabilities, w = exp(student - mixture log-probability)
of the rollout, A the length-normalised future return R_{t+1}. Everything here is O(rows): the vocabulary is behind
`row_stats`, whose statistics this differentiates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..backends import choose
from ..rows import DIFFERENTIABLE, RowStats
from . import ops  # noqa: F401  (registers torch.ops.minillm)


class MiniLLMLoss(NamedTuple):
    """`loss` is a differentiable scalar; everything else is for logging and carries no gradient."""

    loss: Tensor
    policy_loss: Tensor
    """Its policy part, a scalar with the same denominator."""
    single_step_loss: Tensor
    """Its single-step part."""
    clip_fraction: Tensor
    """The share of tokens that count where the clipped branch is strictly smaller."""
    reverse_kl: Tensor
    """[...] KL(q || p) per token, in nats; 0 where the mask is 0, as the fields below."""
    entropy: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor


class PolicyRows(NamedTuple):
    """The constants of the objective, each [...] in fp32 (fp64 for fp64 logits)."""

    advantages: Tensor
    old_logprobs: Tensor
    importance_weights: Tensor
    """w."""
    single_step_weights: Tensor
    """What multiplies KL(q || p)."""


class PolicyTerms(NamedTuple):
    """Per token, [...]: the summands of the loss, and whether the clip acts."""

    policy: Tensor
    single_step: Tensor
    entropy_bonus: Tensor
    clipped: Tensor


def policy_terms(stats: RowStats, rows: PolicyRows, clip_range: float, entropy_coef: float) -> PolicyTerms:
    """The formulas above, differentiable in `stats`."""
    ratio = torch.exp(stats.student_logprobs - rows.old_logprobs) * rows.importance_weights
    plain = ratio * rows.advantages
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range) * rows.advantages
    return PolicyTerms(
        policy=-torch.minimum(plain, bounded),
        single_step=rows.single_step_weights * stats.reverse_kl,
        entropy_bonus=-entropy_coef * stats.student_entropy,
        clipped=bounded < plain,
    )


def policy_coefficients(stats: RowStats, rows: PolicyRows, clip_range: float, entropy_coef: float) -> Tensor:
    """[5, ...] the derivative of each token's summand by the differentiable statistics, for row_grad.

    Where the clipped branch is the smaller one it is constant in the student; everywhere else d policy / d log q =
    -rho A.
    """
    ratio = torch.exp(stats.student_logprobs - rows.old_logprobs) * rows.importance_weights
    plain = ratio * rows.advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * rows.advantages < plain
    by_name = {
        "reverse_kl": rows.single_step_weights,
        "student_logprobs": torch.where(clipped, 0, -plain),
        "student_entropy": torch.full_like(plain, -entropy_coef),
    }
    return torch.stack([by_name.get(name, torch.zeros_like(plain)) for name in DIFFERENTIABLE])


def check_policy(
    logits_like: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    importance_weights: Tensor | None,
    mask: Tensor,
    clip_range: float,
    single_step: float,
    weight_single_step: bool,
) -> tuple[PolicyRows, Tensor]:
    """The constants of the objective, and the mask as bool, all of the leading shape of logits_like."""
    if not clip_range >= 0:
        raise ValueError(f"clip_range must be a number >= 0, got {clip_range}")
    dtype = torch.promote_types(logits_like.dtype, torch.float32)
    given = {"advantages": advantages, "old_logprobs": old_logprobs, "mask": mask}
    if importance_weights is not None:
        given["importance_weights"] = importance_weights
    rows = {name: arguments.check_per_row(name, x, logits_like) for name, x in given.items()}
    counts = rows["mask"] != 0
    kept = {name: torch.where(counts, rows[name].to(dtype), 0) for name in given if name != "mask"}
    w = kept.get("importance_weights", torch.ones_like(kept["advantages"]))
    single = single_step * (w if weight_single_step else torch.ones_like(w))
    return PolicyRows(kept["advantages"], kept["old_logprobs"], w, single), counts


def denominator(mask: Tensor, normalizer: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """The normalizer, by default the tokens that count (1 where none does: their sum is 0)."""
    if normalizer is None:
        return mask.sum().clamp(min=1).to(dtype)
    return torch.as_tensor(normalizer, dtype=dtype, device=mask.device)


def summarize(
    stats: RowStats,
    rows: PolicyRows,
    mask: Tensor,
    clip_range: float,
    entropy_coef: float,
    normalizer: float | Tensor | None,
) -> MiniLLMLoss:
    """The sums of the objective. Its gradient flows through `stats` where they carry one."""
    terms = policy_terms(stats, rows, clip_range, entropy_coef)
    zero = torch.zeros((), dtype=terms.policy.dtype, device=terms.policy.device)
    policy, single, bonus = (torch.where(mask, x, zero).sum() for x in terms[:3])
    over = denominator(mask, normalizer, zero.dtype)
    return MiniLLMLoss(
        loss=(policy + single + bonus) / over,
        policy_loss=(policy / over).detach(),
        single_step_loss=(single / over).detach(),
        clip_fraction=(terms.clipped & mask).sum() / denominator(mask, None, zero.dtype),
        reverse_kl=stats.reverse_kl.detach(),
        entropy=stats.student_entropy.detach(),
        student_logprobs=stats.student_logprobs.detach(),
        teacher_logprobs=stats.teacher_logprobs.detach(),
    )


def minillm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
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
    temperature: float = 1.0,
    vocab_size: int | None = None,
    inplace: bool = False,
) -> MiniLLMLoss:
    """MiniLLM's objective (the formulas at the top of this file) on logits that exist already.

    Args:
        student_logits: [..., V], differentiable; teacher_logits: [..., V_t], constant; as in `fused_rkl_loss`.
        token_ids: [...] the sampled tokens, not looked at where `mask` is 0.
        advantages, old_logprobs, importance_weights: [...] constants, broadcastable; `importance_weights` default to
        1. mask: [...] bool or 0/1: the tokens that count. Others are not read, and what stands there may be anything.
        clip_range: eps; single_step: the coefficient of the single-step part, 0 leaves it out.
        weight_single_step: whether w multiplies the single-step part (the paper's formula; the authors' code does
            not).
        normalizer: the denominator, by default the tokens that count here; pass the global count under accumulation.
    """
    arguments.check_logits(student_logits, teacher_logits)
    arguments.check_inplace(inplace, student_logits)
    temperature = arguments.check_temperature(temperature)
    vocab_size = arguments.resolve_vocab_size(vocab_size, student_logits, teacher_logits)
    arguments.check_token_ids("token_ids", token_ids, student_logits)
    rows, counts = check_policy(
        student_logits,
        advantages,
        old_logprobs,
        importance_weights,
        mask,
        clip_range,
        single_step,
        weight_single_step,
    )
    ids = torch.where(counts, token_ids, 0)
    settings = (temperature, vocab_size, choose.requested())
    stats = torch.ops.minillm.row_stats(student_logits, teacher_logits, ids, counts, inplace, *settings)
    return summarize(RowStats(*stats.unbind(0)), rows, counts, clip_range, entropy_coef, normalizer)
