"""MiniLLM's objective per token, and its derivatives by the statistics of a row (Gu et al., ICLR 2024).

    rho    = exp(log q(y) - old_logprob) w
    policy = -min(rho A, clip(rho, 1 - eps, 1 + eps) A)
    single = single_step * (w if weight_single_step else 1) * KL(q || p)
    loss   = sum over the rows that count of (policy + single - entropy_coef H(q)) / normalizer

The paper's form: old_logprobs are the rollout's student log-probabilities, w = exp(student - mixture log-probability)
of the rollout, A the length-normalised future return R_{t+1}. Everything here is O(rows): the vocabulary is behind the
statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..rows import DIFFERENTIABLE, RowStats


class Policy(NamedTuple):
    """The constants of the objective; the tensors are [...] in fp32 (fp64 for fp64 logits), 0 in rows left out."""

    advantages: Tensor
    old_logprobs: Tensor
    importance_weights: Tensor
    """w."""
    single_step_weights: Tensor
    """What multiplies KL(q || p)."""
    clip_range: float
    entropy_coef: float

    @classmethod
    def of(cls, tensors: Tensor, clip_range: float, entropy_coef: float) -> Policy:
        """tensors: [4, ...], in the order above."""
        advantages, old_logprobs, importance_weights, single_step_weights = tensors.unbind(0)
        return cls(advantages, old_logprobs, importance_weights, single_step_weights, clip_range, entropy_coef)


def policy_tensors(policy: Policy) -> Tensor:
    """[4, ...]: those of `Policy.of`. Neither a method nor a slice: older compilers of torch trace no such thing of a
    named tuple."""
    return torch.stack([policy.advantages, policy.old_logprobs, policy.importance_weights, policy.single_step_weights])


class LossTerms(NamedTuple):
    """Per token, [...]: the summands of the loss, and whether the clip acts."""

    policy: Tensor
    single_step: Tensor
    entropy_bonus: Tensor
    clipped: Tensor


def loss_terms(stats: RowStats, policy: Policy) -> LossTerms:
    """The formulas above, differentiable in `stats`."""
    plain, bounded = _surrogates(stats, policy)
    return LossTerms(
        policy=-torch.minimum(plain, bounded),
        single_step=policy.single_step_weights * stats.reverse_kl,
        entropy_bonus=-policy.entropy_coef * stats.student_entropy,
        clipped=bounded < plain,
    )


def loss_coefficients(stats: RowStats, policy: Policy) -> Tensor:
    """[5, ...] the derivative of each token's summand by the differentiable statistics, for row_grad.

    Where the clipped branch is the smaller one it is constant in the student; everywhere else d policy / d log q =
    -rho A.
    """
    plain, bounded = _surrogates(stats, policy)
    by_name = {
        "reverse_kl": policy.single_step_weights,
        "student_logprobs": torch.where(bounded < plain, 0, -plain),
        "student_entropy": torch.full_like(plain, -policy.entropy_coef),
    }
    nothing = torch.zeros_like(plain)
    return torch.stack([by_name.get(name, nothing) for name in DIFFERENTIABLE])


def _surrogates(stats: RowStats, policy: Policy) -> tuple[Tensor, Tensor]:
    """rho A, plain and clipped."""
    ratio = torch.exp(stats.student_logprobs - policy.old_logprobs) * policy.importance_weights
    clipped = ratio.clamp(1 - policy.clip_range, 1 + policy.clip_range)
    return ratio * policy.advantages, clipped * policy.advantages


def check_policy(
    like: Tensor,
    counts: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    importance_weights: Tensor | None,
    clip_range: float,
    single_step: float,
    weight_single_step: bool,
    entropy_coef: float,
) -> Policy:
    """The constants, of the leading shape of the logits that `like` is like; whatever stands in rows left out, 0."""
    if not clip_range >= 0:
        raise ValueError(f"clip_range must be a number >= 0, got {clip_range}")
    dtype = torch.promote_types(like.dtype, torch.float32)

    def kept(name: str, x: Tensor) -> Tensor:
        return torch.where(counts, arguments.check_per_row(name, x, like).to(dtype), 0)

    advantages, old_logprobs = kept("advantages", advantages), kept("old_logprobs", old_logprobs)
    ones = torch.ones_like(advantages)
    w = ones if importance_weights is None else kept("importance_weights", importance_weights)
    single_step_weights = single_step * (w if weight_single_step else ones)
    return Policy(advantages, old_logprobs, w, single_step_weights, clip_range, entropy_coef)


def denominator(counts: Tensor, normalizer: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """The normalizer, by default the tokens that count; infinite for 0, where the sum over them is 0."""
    if normalizer is None:
        return arguments.nonzero(counts.sum().to(dtype))
    return arguments.check_normalizer(normalizer, counts, dtype)


class LossSums(NamedTuple):
    """Scalars over one denominator, but for the last, a share of the rows that count."""

    loss: Tensor
    policy: Tensor
    single_step: Tensor
    clip_fraction: Tensor


def loss_sums(stats: RowStats, policy: Policy, counts: Tensor, over: Tensor) -> LossSums:
    """The sums of the objective over the rows that count, divided by `over`: see `denominator`."""
    terms = loss_terms(stats, policy)
    per_token = (terms.policy, terms.single_step, terms.entropy_bonus)
    surrogate, single, bonus = (torch.where(counts, x, 0).sum() for x in per_token)
    clip_fraction = (terms.clipped & counts).sum() / denominator(counts, None, surrogate.dtype)
    return LossSums((surrogate + single + bonus) / over, surrogate / over, single / over, clip_fraction)
