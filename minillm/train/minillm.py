"""MiniLLM's objective: sequence-level reverse KL by policy gradient (arXiv 2306.08543), in two variants.

    ∇L = ∇Single + ∇Long + ∇L_PT,   each a mean over its tokens

`objective.variant: paper`, as printed:

    Single = w_t RKL_t                                    w_t = q(y_t) / p̃(y_t), RKL exact       (eq 3, 5)
    Long   = -min(ρ_t R_t, clip(ρ_t, 1±ε) R_t)            ρ_t = q_θ(y_t) / p̃(y_t)           (algorithm 1)
    R_t    = 1/(T-t) Σ_{t'>t} r_t';  0 at t = T           r_t = log p(y_t) - log q(y_t)             (eq 6)
    L_PT   = -log q(d_t) over plain text

`objective.variant: reference`, what the authors' code runs:

    Single = RKL_t
    Long   = the same with Â_t for R_t
    R_t    = 1/(T-t+1) Σ_{t'≥t} 0.95^(t'-t) r̂_t'          r̂_t = clip((log p(y_t) - log q(y_t)) / 0.5, ±100)
    Â_t    = (R_t - mean R) / √(var R + 1e-8)              over the valid tokens of the optimiser step
    L_PT   = -½ log q(d_t) - ½ Σ_v p(v) log q(v) over plain text

with p̃ = α p + (1-α) q the mixture that was sampled, q in w_t and r_t the student that sampled, t = 1 … T. Every piece
is a key of its own in the section `objective`. The paper prints 1/(T-t-1) for the mean, which is 0 one token before
the last; here it divides by its number of terms. The authors' code also counts padding in the mean and variance of R,
and whitens each micro-batch by itself; here whitening does not depend on how the work is split. Soft cross entropy
enters as KL(p‖q), which has the same gradient.

With α > 0 the single ratio in place of the product of ratios, and the normalised return, make this a biased estimate
of the gradient of KL(q‖p): it is exact at α = 0 with plain sums.

Here is what the rollout fixes; `minillm_kernels.minillm_loss` is Single + Long of the student being trained.

Legend: B sequences, T positions, N tokens that exist over the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.config.schema import ObjectiveConfig
from minillm.model.sampling import Rollout


class PolicyTerms(NamedTuple):
    """What the rollout fixes, per token that exists, [N] in row-major order; constants of the update."""

    advantages: Tensor
    """R_t of the formulas, in nats."""
    old_logprobs: Tensor
    """log q(y_t) of the student that sampled."""
    importance_weights: Tensor
    """w_t."""


def returns(
    rewards: Tensor, mask: Tensor, *, length_norm: bool = True, include_current: bool = False, discount: float = 1.0
) -> Tensor:
    """[B, T] discounted mean (or, without length_norm, sum) of the rewards after each token; 0 where there is none.

    `include_current` counts the token's own reward too.
    """
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    after, columns = torch.zeros_like(rewards[:, 0]), []
    for reward in reversed(rewards.unbind(dim=1)):
        from_here = reward + discount * after
        columns.append(from_here if include_current else after)
        after = from_here
    sums = torch.stack(columns[::-1], dim=1)
    if length_norm:
        terms = mask.to(rewards.dtype).flip(1).cumsum(1).flip(1) - (0 if include_current else 1)
        sums = sums / terms.clamp(min=1)
    return torch.where(mask, sums, torch.zeros_like(sums))


def token_rewards(rollout: Rollout) -> Tensor:
    """[B, T] r_t = log p(y_t) - log q(y_t)."""
    assert rollout.teacher_logprobs is not None
    return rollout.teacher_logprobs - rollout.student_logprobs


def importance_weights(rollout: Rollout) -> Tensor:
    """[B, T] w_t = q(y_t) / p̃(y_t), at most 1 / (1-α)."""
    return torch.exp(rollout.student_logprobs - rollout.mixture_logprobs)


def policy_terms(rollout: Rollout, objective: ObjectiveConfig) -> list[PolicyTerms]:
    """The constants of each sequence of a rollout, trimmed to its length; the returns not whitened yet.

    Without the single-step term, a token's own reward can only come from its return (eq 2), which then includes it.
    """
    rewards = token_rewards(rollout) / objective.reward_scaling
    if objective.reward_clip:
        rewards = rewards.clamp(-objective.reward_clip, objective.reward_clip)
    advantages = returns(
        rewards,
        rollout.mask,
        length_norm=objective.length_norm,
        include_current=objective.include_current or not objective.single_step,
        discount=objective.discount,
    )
    weights = importance_weights(rollout) if objective.importance_weights else torch.ones_like(advantages)
    columns = zip(rollout.lengths.tolist(), advantages, rollout.student_logprobs, weights, strict=True)
    return [PolicyTerms(a[:n], q[:n], w[:n]) for n, a, q, w in columns]


def whiten(terms: Sequence[PolicyTerms]) -> list[PolicyTerms]:
    """The same with advantages of mean 0 and variance 1 over all tokens of these sequences."""
    joined = torch.cat([sequence.advantages for sequence in terms])
    scale = torch.rsqrt(joined.var(correction=0) + 1e-8)
    return [sequence._replace(advantages=(sequence.advantages - joined.mean()) * scale) for sequence in terms]


def concatenate(terms: Sequence[PolicyTerms]) -> PolicyTerms:
    """The terms of several sequences, in the order of their tokens in a batch."""
    return PolicyTerms(*(torch.cat(column) for column in zip(*terms, strict=True)))
