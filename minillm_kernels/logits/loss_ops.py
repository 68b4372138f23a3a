"""torch.ops.minillm.stats_loss and divergence_loss: scalar losses of logits.

The weight of each row in a scalar is known beforehand, so the gradient of what is linear in the statistics is formed
with the loss, while a row pair is in the cache or in shared memory. What arrives for the loss in the backward pass is
1 in most training loops, and then nothing more is done; the host does not look, which would wait for the device. For
any other number an fp32 gradient is scaled, a bf16 one formed again, since it would be rounded twice. The gradient is
formed in the backward pass alone where it overwrites the logits, for mixture divergences, in fp16, which is trained
with a loss scale, and while a graph is traced; and anew in a second backward pass and under create_graph.

Legend: ... rows, V' the width of the student's head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from ..rows import DIFFERENTIABLE, DIFFERENTIABLE_INDEX, Pair, RowStats, accumulator
from .ops import check_divergence_name, check_rows, checked_pair, gradient_of_logits, register
from .reduction import reduced, scalar_weights, weighted_rows, write_row_weights


def wants_gradient(student: Tensor) -> bool:
    """Whether an operator here is to form the gradient with the loss: its argument `needed`."""
    return differentiable(student) and not torch.compiler.is_compiling()


def differentiable(student: Tensor) -> bool:
    return student.requires_grad and torch.is_grad_enabled()


# ---- implementations


def _stats_loss(student, teacher, token_ids, *settings):
    """(the weighted sum of the differentiable statistics; for the backward pass the statistics, the coefficients of
    each row, the ids, none of them where none were given, and the gradient where it is formed now)."""
    *tensors, numbers, ignore_index, inplace, needed, temperature, vocab_size, backend = settings
    pair = checked_pair(student, teacher, temperature, vocab_size, backend, inplace)
    given = [x if x is not None else numbers[i] for i, x in enumerate(tensors)]
    coefficients, ids, counts = weighted_rows(given, student, token_ids, ignore_index)
    chosen = choose.resolve(backend, student, teacher)
    if _ahead(student, inplace, needed):
        stats, grad = chosen.row_stats_grad(pair, ids, coefficients)
    else:
        stats = chosen.row_stats(pair, ids, counts)
        grad = student.new_empty(0)
    ids = coefficients.new_empty(0, dtype=torch.int64) if ids is None else ids
    return weighted_sum(stats, coefficients), stats, coefficients, ids, grad


def _ahead(student: Tensor, inplace: bool, needed: bool) -> bool:
    """Whether the gradient is formed with the loss."""
    return needed and not inplace and student.dtype != torch.float16


def _divergence_loss(student, teacher, weights, normalizer, divisor, reduction, divergence, beta, *rest):
    """(the reduced divergence; for the backward pass the coefficients of each row, its statistics, and what was formed
    of them: the gradient where that is now, or the values of row_divergence)."""
    inplace, needed, temperature, vocab_size, backend = rest
    pair = checked_pair(student, teacher, temperature, vocab_size, backend, inplace)
    check_rows(student, "weights", weights, (torch.float32, torch.float64))
    linear = divergence in DIFFERENTIABLE
    if not linear:
        check_divergence_name(divergence, beta)
    chosen = choose.resolve(backend, student, teacher)
    shape = (len(DIFFERENTIABLE), *student.shape[:-1])
    coefficients = torch.zeros(shape, dtype=accumulator(student, teacher), device=student.device)
    row = coefficients[DIFFERENTIABLE.index(divergence) if linear else 0]
    own = scalar_weights(row, weights, reduction, normalizer, divisor)
    write_row_weights(row, own)
    if linear and _ahead(student, inplace, needed):
        stats, formed = chosen.row_stats_grad(pair, None, coefficients)
        return reduced(stats[RowStats._fields.index(divergence)], own), coefficients, stats, formed
    mask = None if weights is None else weights != 0
    stats = chosen.row_stats(pair, None, mask)
    if linear:
        return reduced(stats[RowStats._fields.index(divergence)], own), coefficients, stats, student.new_empty(0)
    values = chosen.row_divergence(pair, mask, stats, divergence, beta)
    return reduced(values[0], own), coefficients, stats, values


def weighted_sum(stats: Tensor, coefficients: Tensor) -> Tensor:
    """Of the differentiable statistics. One that nobody asked about may be infinite: 0 times it is 0."""
    differentiable = torch.stack([stats[i] for i in DIFFERENTIABLE_INDEX])  # an index would be copied to the device
    return torch.where(coefficients != 0, coefficients * differentiable, 0).sum()


# ---- fakes: shapes and types only


def _gradient_fake(student, inplace, needed):
    return student.new_empty(student.shape if _ahead(student, inplace, needed) else 0)


def _stats_loss_fake(student, teacher, token_ids, *settings):
    *_given, inplace, needed, _temperature, _vocab_size, _backend = settings
    leading = student.shape[:-1]
    stats = student.new_empty((len(RowStats._fields), *leading), dtype=accumulator(student, teacher))
    coefficients = student.new_empty((len(DIFFERENTIABLE), *leading), dtype=accumulator(student))
    ids = student.new_empty(0 if token_ids is None else leading, dtype=torch.int64)
    return stats.new_empty(()), stats, coefficients, ids, _gradient_fake(student, inplace, needed)


def _divergence_loss_fake(student, teacher, weights, normalizer, divisor, reduction, divergence, beta, *rest):
    inplace, needed, *_settings = rest
    dtype, leading = accumulator(student, teacher), student.shape[:-1]
    coefficients = student.new_empty((len(DIFFERENTIABLE), *leading), dtype=dtype)
    stats = student.new_empty((len(RowStats._fields), *leading), dtype=dtype)
    linear = divergence in DIFFERENTIABLE
    formed = _gradient_fake(student, inplace, needed) if linear else student.new_empty((2, *leading), dtype=dtype)
    return stats.new_empty(()), coefficients, stats, formed


# ---- autograd: in the student's logits only


def remember(ctx, inplace: bool, backend: str, output: tuple) -> None:
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)  # zeros for the gradient's gradient would be as large as it is
    ctx.inplace, ctx.backend = inplace, backend
    ctx.taken = False  # the gradient that was formed with the loss


def _gradient_ahead(ctx, student, teacher, token_ids, stats, coefficients, grad, grad_loss) -> Tensor | None:
    """What was formed with the loss, brought to what arrives for it; None where there is nothing to take. Not while a
    graph is traced: it writes behind torch's back."""
    if ctx.taken or grad.numel() == 0 or torch.is_grad_enabled() or type(grad) is not Tensor:
        return None
    ctx.taken = True
    grad = grad.data  # of another version counter: a second backward pass asks for what was saved beside it
    chosen = choose.resolve(ctx.backend, student, teacher)
    if grad.dtype == torch.bfloat16:
        pair = Pair(student, teacher, *ctx.settings)
        return chosen.row_grad(pair, token_ids, stats, coefficients, out=grad, factor=grad_loss)
    chosen.row_scale(grad, grad_loss)
    return grad


def _stats_loss_context(ctx, inputs, output) -> None:
    student, teacher, token_ids, *_given, inplace, _needed, temperature, vocab_size, backend = inputs
    ctx.settings, ctx.with_ids = (temperature, vocab_size), token_ids is not None
    remember(ctx, inplace, backend, output)
    ctx.save_for_backward(student, teacher, *output[1:])


def _stats_loss_backward(ctx, grad_loss, *_others):
    student, teacher, stats, coefficients, ids, ahead = ctx.saved_tensors
    ids = ids if ctx.with_ids else None
    grad = _gradient_ahead(ctx, student, teacher, ids, stats, coefficients, ahead, grad_loss)
    if grad is None:
        args = (teacher, ids, stats, coefficients * grad_loss, *ctx.settings, ctx.backend)
        grad = gradient_of_logits(ctx, "row_grad", student, args)
    return (grad,)


def _divergence_loss_context(ctx, inputs, output) -> None:
    student, teacher, *_reduction, ctx.divergence, ctx.beta, inplace, _needed, temperature, V, backend = inputs
    ctx.settings = (temperature, V)
    remember(ctx, inplace, backend, output)
    ctx.save_for_backward(student, teacher, *output[1:])


def _divergence_loss_backward(ctx, grad_loss, *_others):
    student, teacher, coefficients, stats, formed = ctx.saved_tensors
    settings = (*ctx.settings, ctx.backend)
    if ctx.divergence in DIFFERENTIABLE:
        grad = _gradient_ahead(ctx, student, teacher, None, stats, coefficients, formed, grad_loss)
        if grad is None:
            args = (teacher, None, stats, coefficients * grad_loss, *settings)
            grad = gradient_of_logits(ctx, "row_grad", student, args)
    else:
        args = (teacher, stats, formed, coefficients[0] * grad_loss, ctx.divergence, ctx.beta, *settings)
        grad = gradient_of_logits(ctx, "row_divergence_grad", student, args)
    return (grad,)


# ---- the operators

_SETTINGS = "bool inplace, bool needed, float temperature, SymInt vocab_size, str backend"

register(
    "stats_loss(Tensor student, Tensor? teacher, Tensor? token_ids, "
    f"{', '.join(f'Tensor? {name}' for name in DIFFERENTIABLE)}, float[] numbers, int ignore_index, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _stats_loss,
    _stats_loss_fake,
    _stats_loss_backward,
    _stats_loss_context,
)
register(
    "divergence_loss(Tensor student, Tensor teacher, Tensor? weights, Tensor? normalizer, float? divisor, "
    f"str reduction, str divergence, float beta, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _divergence_loss,
    _divergence_loss_fake,
    _divergence_loss_backward,
    _divergence_loss_context,
)
