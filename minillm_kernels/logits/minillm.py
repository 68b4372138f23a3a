"""MiniLLM's objective per token: exact single-step reverse KL and a clipped policy gradient (Gu et al., ICLR 2024).

    rho    = exp(log q(y) - old_logprob) w
    policy = -min(rho A, clip(rho, 1 - eps, 1 + eps) A)
    single = single_step * (w if weight_single_step else 1) * KL(q || p)
    loss   = sum over the rows that count of (policy + single - entropy_coef H(q)) / normalizer

The paper's form: old_logprobs are the rollout's student log-probabilities, w = exp(student - mixture log-probability)
of the rollout, A the length-normalised future return R_{t+1}. Everything here is O(rows): the vocabulary is behind
`row_stats`, whose statistics this differentiates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..parallel.split import checked_rows
from ..rows import DIFFERENTIABLE, RowStats
from .ops import call


class MiniLLMLoss(NamedTuple):
    """What `minillm_loss` and `fused_linear_minillm_loss` give. Only `loss` carries a gradient; the rest is for logs.

    Attributes:
        loss: the scalar to differentiate.
        policy_loss: the policy part of it, a scalar over the same denominator.
        single_step_loss: the single-step part of it, likewise.
        clip_fraction: the share of the tokens that count for which the clipped branch is strictly smaller.
        reverse_kl: [...] KL(q || p) per token, in nats; 0 in rows that do not count, as in the fields below.
        entropy: [...] the student's entropy H(q), in nats.
        student_logprobs: [...] log q(y), in nats.
        teacher_logprobs: [...] log p(y), in nats.

    Examples:
        >>> import torch
        >>> from minillm_kernels import minillm_loss
        >>> logits, zeros = torch.zeros(2, 4), torch.zeros(2)
        >>> result = minillm_loss(logits, logits, torch.tensor([1, 2]), advantages=zeros, old_logprobs=zeros)
        >>> result.entropy
        tensor([1.3863, 1.3863])
    """

    loss: Tensor
    policy_loss: Tensor
    single_step_loss: Tensor
    clip_fraction: Tensor
    reverse_kl: Tensor
    entropy: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor


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

    @property
    def tensors(self) -> Tensor:
        """[4, ...]: those of `of`."""
        return torch.stack(self[:4])

    @classmethod
    def of(cls, tensors: Tensor, clip_range: float, entropy_coef: float) -> Policy:
        advantages, old_logprobs, importance_weights, single_step_weights = tensors.unbind(0)
        return cls(advantages, old_logprobs, importance_weights, single_step_weights, clip_range, entropy_coef)


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
    return torch.stack([by_name.get(name, torch.zeros_like(plain)) for name in DIFFERENTIABLE])


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


def summarize(stats: RowStats, policy: Policy, counts: Tensor, normalizer: float | Tensor | None) -> MiniLLMLoss:
    """The sums of the objective. Its gradient flows through `stats` where they carry one."""
    terms = loss_terms(stats, policy)
    zero = torch.zeros((), dtype=terms.policy.dtype, device=terms.policy.device)
    surrogate, single, bonus = (torch.where(counts, x, zero).sum() for x in terms[:3])
    over = denominator(counts, normalizer, zero.dtype)
    return MiniLLMLoss(
        loss=(surrogate + single + bonus) / over,
        policy_loss=(surrogate / over).detach(),
        single_step_loss=(single / over).detach(),
        clip_fraction=(terms.clipped & counts).sum() / denominator(counts, None, zero.dtype),
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
    ignore_index: int = -100,
    clip_range: float = 0.2,
    single_step: float = 1.0,
    weight_single_step: bool = True,
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    inplace: bool = False,
    group: object = None,
) -> MiniLLMLoss:
    r"""MiniLLM's objective on logits that exist already (Gu et al., ICLR 2024, eq. 2 to 6 and algorithm 1).

    With student q, teacher p, sampled token y, advantage A and importance weight w of a row:

        rho    = exp(log q(y) - old_logprobs) w
        policy = -min(rho A, clip(rho, 1 - clip_range, 1 + clip_range) A)
        single = single_step (w if weight_single_step else 1) KL(q || p)
        loss   = sum over the rows that count of (policy + single - entropy_coef H(q)) / normalizer

    The parameters, more than a dozen, are what the formulas hold, and those of every loss here.

    Args:
        student_logits: [..., V], differentiable, as in `fused_rkl_loss`.
        teacher_logits: [..., V_t], constant.
        token_ids: [...] integers, the sampled tokens y. Rows with `ignore_index` do not count.
        advantages: [...] or broadcastable, constant. The paper: the length-normalised return after the token, R_{t+1}.
        old_logprobs: [...] or broadcastable, constant, in nats. The paper: log q(y) of the student that sampled.
        importance_weights: [...] or broadcastable, constant; None is 1. The paper: w = q(y) / (mixture of p and q)(y)
            of the student that sampled, exp(student_logprobs - mixture_logprobs) of `mixed_sample`.
        ignore_index: the id of rows that do not count; they are not read, and what stands in the other arguments there
            may be anything.
        clip_range: the clip of the ratio, >= 0; math.inf leaves it out.
        single_step: the coefficient of the single-step part; 0 leaves it out.
        weight_single_step: whether w multiplies the single-step part (the paper's formula; the authors' code does
            not).
        entropy_coef: the coefficient of an entropy bonus; the paper has none.
        normalizer: the denominator, a number or a tensor; by default the number of rows that count. Pass the global
            count under accumulation.
        temperature: both models' logits are divided by it; in [1e-15, 1e37], where float32 holds the quotients.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        inplace: the backward pass writes the gradient over `student_logits`; nothing else shares their memory.
        group: a process group whose ranks hold the logits' columns, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so.

    Returns:
        MiniLLMLoss: `loss`, differentiable, and parts and statistics for logging.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: shapes, devices or numbers do not fit, a constant requires a gradient, or `inplace` would
            overwrite what is read.
        IndexError: a token outside the vocabulary, on CPU tensors (on CUDA: NaN).
        RuntimeError: the logits carry a forward-mode tangent (torch.func.jvp).

    Examples:
        The student draws token 1; its reward afterwards was good, so the gradient raises that token's logit. The
        second row is padding:

        >>> import torch
        >>> from minillm_kernels import minillm_loss
        >>> student = torch.zeros(2, 4, requires_grad=True)
        >>> tokens = torch.tensor([1, -100])
        >>> old = torch.full((2,), 0.25).log()
        >>> result = minillm_loss(student, torch.zeros(2, 4), tokens, advantages=torch.ones(2), old_logprobs=old)
        >>> result.loss.item(), result.single_step_loss.item()
        (-1.0, 0.0)
        >>> result.loss.backward()
        >>> student.grad
        tensor([[ 0.2500, -0.7500,  0.2500,  0.2500],
                [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    student_logits, teacher_logits, vocab_size, backend = checked_rows(
        student_logits, teacher_logits, vocab_size, group
    )
    temperature = arguments.check_temperature(temperature)
    ids, counts = arguments.check_token_ids(token_ids, student_logits, ignore_index)
    policy = check_policy(
        student_logits,
        counts,
        advantages,
        old_logprobs,
        importance_weights,
        clip_range,
        single_step,
        weight_single_step,
        entropy_coef,
    )
    settings = (temperature, vocab_size, backend)
    stats = call("row_stats", student_logits, teacher_logits, ids, counts, inplace, *settings)
    if inplace and not torch.compiler.is_compiling():  # the operator has checked the logits; constants it does not see
        constants = {"advantages": advantages, "old_logprobs": old_logprobs, "importance_weights": importance_weights}
        arguments.check_inplace(student_logits, token_ids=token_ids, **constants)
    return summarize(RowStats(*stats.unbind(0)), policy, counts, normalizer)
