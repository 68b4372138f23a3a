"""MiniLLM's objective: sequence-level reverse KL by policy gradient, as the paper prints it (arXiv 2306.08543).

    ∇L = ∇Single + ∇Long + ∇L_PT
    Single = Σ_t w_t RKL_t                                    w_t = q(y_t) / p̃(y_t), RKL exact       (eq 3, 5)
    Long   = -Σ_t min(ρ_t R_{t+1}, clip(ρ_t, 1±ε) R_{t+1})    ρ_t = q_θ(y_t) / p̃(y_t)           (algorithm 1)
    R_{t+1} = mean over t' > t of r_t'; 0 at the last token   r_t = log p(y_t) - log q(y_t)             (eq 6)
    L_PT   = -Σ log q(d) over plain text

with p̃ = α p + (1-α) q the mixture that was sampled, and q in w_t and r_t the student that sampled. The mean divides
by its number of terms; the paper prints one less, which is 0 one token before the last. With α > 0 the single ratio
in place of the product of ratios, and the normalised return, make this a biased estimate of the gradient of KL(q‖p):
it is exact at α = 0 with plain sums.

Here is what the rollout fixes; `minillm_kernels.minillm_loss` is Single + Long of the student being trained.

Legend: B sequences, T positions, N tokens that exist over the batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minillm.rollout import Rollout


class PolicyTerms(NamedTuple):
    """What the rollout fixes, per token that exists, [N] in row-major order; constants of the update."""

    advantages: Tensor
    """R_{t+1} of the formulas, in nats."""
    old_logprobs: Tensor
    """log q(y_t) of the student that sampled."""
    importance_weights: Tensor
    """w_t."""


def returns(rewards: Tensor, mask: Tensor, *, length_norm: bool = True, include_current: bool = False) -> Tensor:
    """[B, T] mean (or, without length_norm, sum) of the rewards after each token; 0 at the last token and on padding.

    `include_current` counts the token's own reward too: the return of the undecomposed policy gradient (eq 2), for
    training without the single-step term.
    """
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    from_here = rewards.flip(1).cumsum(1).flip(1)
    remaining = mask.to(rewards.dtype).flip(1).cumsum(1).flip(1)
    if not include_current:
        # shifted rather than from_here - rewards, which would leave rounding where the sum is empty
        from_here = torch.nn.functional.pad(from_here[:, 1:], (0, 1))
        remaining = torch.nn.functional.pad(remaining[:, 1:], (0, 1))
    if length_norm:
        from_here = from_here / remaining.clamp(min=1)
    return torch.where(mask, from_here, torch.zeros_like(from_here))


def token_rewards(rollout: Rollout) -> Tensor:
    """[B, T] r_t = log p(y_t) - log q(y_t)."""
    assert rollout.teacher_logprobs is not None
    return rollout.teacher_logprobs - rollout.student_logprobs


def importance_weights(rollout: Rollout) -> Tensor:
    """[B, T] w_t = q(y_t) / p̃(y_t), at most 1 / (1-α)."""
    return torch.exp(rollout.student_logprobs - rollout.mixture_logprobs)


def policy_terms(
    rollout: Rollout, *, length_norm: bool = True, single_step: bool = True, weighted: bool = True
) -> list[PolicyTerms]:
    """The constants of each sequence of a rollout, trimmed to its length."""
    advantages = returns(
        token_rewards(rollout), rollout.mask, length_norm=length_norm, include_current=not single_step
    )
    weights = importance_weights(rollout) if weighted else torch.ones_like(advantages)
    columns = zip(rollout.lengths.tolist(), advantages, rollout.student_logprobs, weights, strict=True)
    return [PolicyTerms(a[:n], q[:n], w[:n]) for n, a, q, w in columns]


def concatenate(terms: list[PolicyTerms]) -> PolicyTerms:
    """The terms of several sequences, in the order of their tokens in a batch."""
    return PolicyTerms(*(torch.cat(column) for column in zip(*terms, strict=True)))
