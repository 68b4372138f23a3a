"""MiniLLM's objective per token: exact single-step reverse KL and a clipped policy gradient (Gu et al., ICLR 2024):
policy.py has the formulas, minillm_ops.py the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..parallel.split import checked_rows
from ..rows import RowStats
from . import minillm_ops  # noqa: F401  (registers torch.ops.minillm.minillm_loss)
from .ops import call
from .policy import LossSums
from .reduction import split_normalizer


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


def named_loss(sums: LossSums, stats: RowStats) -> MiniLLMLoss:
    """Only the loss carries a gradient."""
    return MiniLLMLoss(*sums, stats.reverse_kl, stats.student_entropy, stats.student_logprobs, stats.teacher_logprobs)


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
    arguments.check_integers("token_ids", token_ids, student_logits)
    constants = {"advantages": advantages, "old_logprobs": old_logprobs, "importance_weights": importance_weights}
    rows = [None if x is None else arguments.check_per_row(name, x, student_logits) for name, x in constants.items()]
    weighing = (clip_range, single_step, weight_single_step, entropy_coef)
    *sums, stats, _coefficients, _ids = call(
        "minillm_loss",
        student_logits,
        teacher_logits,
        token_ids,
        *rows,
        *split_normalizer(normalizer, student_logits),
        ignore_index,
        *weighing,
        inplace,
        temperature,
        vocab_size,
        backend,
    )
    if inplace and not torch.compiler.is_compiling():  # the operator has checked the logits; constants it does not see
        arguments.check_inplace(student_logits, token_ids=token_ids, **constants)
    return named_loss(LossSums(*sums), RowStats(*stats.detach().unbind(0)))
