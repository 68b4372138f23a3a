"""MiniLLM's objective of hidden states and heads; the formulas are those of logits/policy.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import arguments
from ..logits import minillm
from ..logits.loss_ops import weighted_sum
from ..logits.minillm import MiniLLMLoss
from ..logits.ops import call
from ..logits.policy import LossSums, check_policy, denominator, loss_coefficients, loss_sums, policy_tensors
from . import ops  # noqa: F401  (registers torch.ops.minillm)
from .float16 import formed_late
from .head import Head, as_heads, models_here
from .operands import flat, like_logits, named, needs_of, operands


def fused_linear_minillm_loss(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
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
    impl: str = "chunked",
    chunk_rows: int | None = None,
    gather: bool = False,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: object = None,
) -> MiniLLMLoss:
    r"""MiniLLM's objective of hidden states and heads (Gu et al., ICLR 2024, eq. 2 to 6 and algorithm 1).

    It is `minillm_loss`, where the formulas are, of the logits that the heads make, which never exist for all rows at
    once: value and gradients in one sweep, four matmuls (in float16 two sweeps, as in `fused_linear_rkl_loss`). The
    parameters, more than a dozen, are those of `minillm_loss` with a head for each model and how to go about it.

    Args:
        student_hidden: [..., H], differentiable, as in `fused_linear_rkl_loss`.
        student_head: its `Head` or weight [V, H], differentiable.
        teacher_hidden: [..., H_t], constant.
        teacher_head: its `Head` or weight [V_t, H_t], constant.
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
        impl: "chunked" or "tiled", as in `fused_linear_rkl_loss`.
        chunk_rows: rows in the buffer of "chunked".
        gather: leave rows that do not count out of the matmuls, as in `fused_linear_rkl_loss`.
        temperature: both models' logits are divided by it.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        group: a process group whose ranks hold the heads' rows, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so.

    Returns:
        MiniLLMLoss: `loss`, differentiable, and parts and statistics for logging.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: shapes, devices, names or numbers do not fit, or a constant requires a gradient.
        IndexError: a token outside the vocabulary, on CPU tensors (on CUDA: NaN).
        RuntimeError: "tiled" where the Triton backend does not run.
        NotImplementedError: "tiled" with a split vocabulary.

    Examples:
        Two sampled tokens and a row of padding:

        >>> import torch
        >>> from minillm_kernels import fused_linear_minillm_loss
        >>> hidden, weight = torch.zeros(3, 8), torch.randn(50, 8, requires_grad=True)
        >>> result = fused_linear_minillm_loss(
        ...     hidden, weight, torch.zeros(3, 16), torch.randn(50, 16), torch.tensor([7, 9, -100]),
        ...     advantages=torch.ones(3), old_logprobs=torch.full((3,), 1 / 50).log(),
        ... )
        >>> round(result.loss.item(), 4), result.clip_fraction.item()
        (-1.0, 0.0)
        >>> result.loss.backward()
    """
    student_head, teacher_head = as_heads(student_head, teacher_head)
    ranks, (student, teacher) = models_here(group, (student_hidden, student_head), (teacher_hidden, teacher_head))
    if student[1].weight is None or teacher[1].weight is None:
        return minillm.minillm_loss(
            student[1].logits(student[0]),
            teacher[1].logits(teacher[0]),
            token_ids,
            advantages=advantages,
            old_logprobs=old_logprobs,
            importance_weights=importance_weights,
            ignore_index=ignore_index,
            clip_range=clip_range,
            single_step=single_step,
            weight_single_step=weight_single_step,
            entropy_coef=entropy_coef,
            normalizer=normalizer,
            temperature=temperature,
            vocab_size=vocab_size,
            group=ranks,
        )
    heads = operands(student, teacher, impl, chunk_rows, gather, temperature, vocab_size, ranks)
    like = like_logits(heads, student_hidden.shape[:-1])
    ids, counts = arguments.check_token_ids(token_ids, like, ignore_index)
    policy = check_policy(
        like,
        counts,
        advantages,
        old_logprobs,
        importance_weights,
        clip_range,
        single_step,
        weight_single_step,
        entropy_coef,
    )
    over = denominator(counts, normalizer, policy.advantages.dtype)
    late = formed_late(heads)
    if late:
        stats = call("linear_stats", flat(ids), flat(counts), *heads)
    else:
        loss, stats, *_gradients = call(
            "linear_minillm_loss",
            flat(ids),
            flat(counts),
            policy_tensors(policy).flatten(1),
            1.0 / over,
            clip_range,
            entropy_coef,
            needs_of(heads),
            *heads,
        )
    by_name = named(stats.detach(), like)
    sums = loss_sums(by_name, policy, counts, over)
    if late:
        slopes = torch.where(counts, loss_coefficients(by_name, policy) / over, 0)
        linear = weighted_sum(stats, slopes.flatten(1))
        loss = sums.loss + (linear - linear.detach())  # the value of the one, the gradient of the other
    return minillm.named_loss(LossSums(loss, sums.policy, sums.single_step, sums.clip_fraction), by_name)
