"""torch.ops.minillm.minillm_loss: MiniLLM's objective on logits, with all that its rows need around their statistics.

How much a row's log-probability counts depends on its statistics, so the gradient is formed in the backward pass; the
derivatives by the statistics are formed with the loss.
"""

from __future__ import annotations

import torch

from .. import arguments
from ..backends import choose
from ..rows import DIFFERENTIABLE, RowStats, accumulator
from .loss_ops import remember
from .ops import checked_pair, gradient_of_logits, register
from .policy import check_policy, denominator, loss_coefficients, loss_sums


def _minillm_loss(student, teacher, token_ids, advantages, old_logprobs, importance_weights, *settings):
    """(loss, its policy part, its single-step part, the share of rows that are clipped; the statistics, the
    derivatives of the loss by the differentiable ones, the ids)."""
    normalizer, divisor, ignore_index, *weighing, inplace, temperature, vocab_size, backend = settings
    pair = checked_pair(student, teacher, temperature, vocab_size, backend, inplace)
    ids, counts = arguments.check_token_ids(token_ids, student, ignore_index)
    policy = check_policy(student, counts, advantages, old_logprobs, importance_weights, *weighing)
    stats = choose.resolve(backend, student, teacher).row_stats(pair, ids, counts)
    over = denominator(counts, divisor if normalizer is None else normalizer, stats.dtype)
    by_name = RowStats(*stats.unbind(0))
    sums = loss_sums(by_name, policy, counts, over)
    coefficients = torch.where(counts, loss_coefficients(by_name, policy) / over, 0)
    return *sums, stats, coefficients, ids


def _fake(student, teacher, token_ids, *_settings):
    dtype, leading = accumulator(student, teacher), student.shape[:-1]
    stats = student.new_empty((len(RowStats._fields), *leading), dtype=dtype)
    coefficients = stats.new_empty((len(DIFFERENTIABLE), *leading))
    return *(stats.new_empty(()) for _ in range(4)), stats, coefficients, stats.new_empty(leading, dtype=torch.int64)


def _context(ctx, inputs, output) -> None:
    student, teacher, *_rows, inplace, temperature, vocab_size, backend = inputs
    ctx.settings = (temperature, vocab_size)
    remember(ctx, inplace, backend, output)
    ctx.save_for_backward(student, teacher, *output[4:])


def _backward(ctx, grad_loss, *_others):
    student, teacher, stats, coefficients, ids = ctx.saved_tensors
    coefficients = torch.where(coefficients != 0, coefficients * grad_loss, 0)  # 0 also when what arrives is NaN
    grad = gradient_of_logits(
        ctx, "row_grad", student, (teacher, ids, stats, coefficients, *ctx.settings, ctx.backend)
    )
    return (grad,)


register(
    "minillm_loss(Tensor student, Tensor teacher, Tensor token_ids, Tensor advantages, Tensor old_logprobs, "
    "Tensor? importance_weights, Tensor? normalizer, float? divisor, int ignore_index, float clip_range, "
    "float single_step, bool weight_single_step, float entropy_coef, bool inplace, float temperature, "
    "SymInt vocab_size, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _minillm_loss,
    _fake,
    _backward,
    _context,
)
