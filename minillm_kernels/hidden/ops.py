"""torch.ops.minillm.linear_*: losses of hidden states and heads as torch operators.

Two kinds. `linear_stats` and `linear_divergence` return a value a row; their backward pass forms the logits again,
since what arrives is not known before. `linear_stats_loss`, `linear_divergence_loss` and `linear_minillm_loss` return
a scalar whose coefficients are known beforehand, so the gradients are formed in the same sweep as the loss, and the
backward pass only scales them. Losses of float16 are made of the first kind: see float16.py.

Each takes its own arguments first, then those of `Operands`. Legend: N rows; `rows` a chunk of them, as chunked.py
makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..backends import choose
from ..logits.loss_ops import weighted_sum
from ..logits.ops import ALL, call, check_divergence_name, check_rows, least_columns, no_double_backward, register
from ..logits.policy import Policy, loss_coefficients, loss_terms
from ..logits.reduction import reduced, scalar_weights, write_row_weights
from ..rows import DIFFERENTIABLE, DIFFERENTIABLE_INDEX, RowStats
from . import chunked, tiled
from .chunked import Gradients, Sweep
from .float16 import in_units
from .operands import Operands

STATISTICS = len(RowStats._fields)


def _at(per_row: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    return None if per_row is None else per_row[..., rows]


# ---- implementations

_FLOATS = (torch.float32, torch.float64)
_PER_ROW: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
    "token_ids": ((torch.int64,), ()),
    "mask": ((torch.bool,), ()),
    "weights": (_FLOATS, ()),
    "stats": (_FLOATS, (STATISTICS,)),
    "coefficients": (_FLOATS, (len(DIFFERENTIABLE),)),
    "constants": (_FLOATS, (4,)),
}
"""Types and leading dimensions of what comes for each row."""


def _checked(operands: tuple, **per_row: Tensor | None) -> Operands:
    """The operands of a call that anyone may have made, and its numbers for each row: kernels take sizes on trust."""
    heads = Operands(*operands)
    arguments.check_temperature(heads.temperature)
    weights = [heads.student_weight] + ([] if heads.teacher is None else [heads.teacher.weight])
    sizes = (weight.shape[0] for weight in weights)
    arguments.resolve_vocab_size(heads.vocab_size, *sizes, least=least_columns(heads.backend))
    if heads.student_hidden.dim() != 2 or (heads.teacher is not None and len(heads.teacher.hidden) != heads.n_rows):
        raise ValueError("hidden states are [N, H], of both models with the same N")
    if heads.chunk_rows is not None and heads.chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {heads.chunk_rows}")
    for name, x in per_row.items():
        dtypes, fields = _PER_ROW[name]
        check_rows(heads.student_hidden, name, x, dtypes, *fields)
    return heads


def _linear_stats(token_ids: Tensor | None, mask: Tensor | None, *operands: Any) -> Tensor:
    heads = _checked(operands, token_ids=token_ids, mask=mask)
    if heads.impl == "tiled":
        return tiled.statistics(heads, token_ids, mask)
    sweep = Sweep(heads, mask)
    stats = sweep.outputs(STATISTICS)
    for rows in sweep:
        stats[:, rows] = sweep.backend.row_stats(sweep.pair, _at(token_ids, rows), sweep.mask)
    return stats


def _linear_stats_grad(
    token_ids: Tensor | None, stats: Tensor, coefficients: Tensor, needs: list[bool], *operands: Any
) -> tuple[Tensor, ...]:
    heads = _checked(operands, token_ids=token_ids, stats=stats, coefficients=coefficients)
    if heads.impl == "tiled":
        return tuple(tiled.gradients(heads, token_ids, stats, coefficients, needs))
    sweep = Sweep(heads, (coefficients != 0).any(0), needs)
    coefficients, unit = in_units(coefficients, heads)
    for rows in sweep:
        ids, known, c = _at(token_ids, rows), stats[:, rows], coefficients[:, rows]
        sweep.backend.row_grad(sweep.pair, ids, known, c, out=sweep.gradient)
        sweep.backward()
    return tuple(sweep.finished(unit))


def _linear_stats_loss(
    token_ids: Tensor | None, mask: Tensor | None, coefficients: Tensor, needs: list[bool], *operands: Any
) -> tuple[Tensor, ...]:
    """The coefficients are 0 in the rows that the mask leaves out."""
    heads = _checked(operands, token_ids=token_ids, mask=mask, coefficients=coefficients)
    if heads.impl == "tiled":
        stats = tiled.statistics(heads, token_ids, mask)
        gradients = tiled.gradients(heads, token_ids, stats, coefficients, needs)
        return weighted_sum(stats, coefficients), stats, *gradients
    sweep = Sweep(heads, mask, needs)
    stats = sweep.outputs(STATISTICS)
    scaled, unit = in_units(coefficients, heads)
    for rows in sweep:
        ids = _at(token_ids, rows)
        if any(needs):
            c = scaled[:, rows]
            stats[:, rows] = sweep.backend.row_stats_grad(sweep.pair, ids, c, out=sweep.gradient)[0]
            sweep.backward()
        else:
            stats[:, rows] = sweep.backend.row_stats(sweep.pair, ids, sweep.mask)
    return weighted_sum(stats, coefficients), stats, *sweep.finished(unit)


def _linear_divergence(mask: Tensor | None, divergence: str, beta: float, *operands: Any) -> Tensor:
    check_divergence_name(divergence, beta)
    sweep = Sweep(_checked(operands, mask=mask), mask)
    values = sweep.outputs(1)[0]
    for rows in sweep:
        stats = sweep.backend.row_stats(sweep.pair, None, sweep.mask)
        values[rows] = sweep.backend.row_divergence(sweep.pair, sweep.mask, stats, divergence, beta)[0]
    return values


def _linear_divergence_loss(
    weights: Tensor | None,
    normalizer: Tensor | None,
    divisor: float | None,
    reduction: str,
    divergence: str,
    beta: float,
    needs: list[bool],
    *operands: Any,
) -> tuple[Tensor, ...]:
    """`weights` of the rows, None where each counts once, and the reduction, as in logits/loss_ops.py."""
    heads = _checked(operands, weights=weights)
    mask = None if weights is None else weights != 0
    coefficients = heads.student_hidden.new_zeros((len(DIFFERENTIABLE), heads.n_rows), dtype=heads.accumulator)
    own = scalar_weights(coefficients[0], weights, reduction, normalizer, divisor)
    if divergence in DIFFERENTIABLE:
        write_row_weights(coefficients[DIFFERENTIABLE.index(divergence)], own)
        loss, _stats, *gradients = _linear_stats_loss(None, mask, coefficients, needs, *operands)
        return loss, *gradients
    check_divergence_name(divergence, beta)
    row_weights = write_row_weights(coefficients[0], own)
    sweep = Sweep(heads, mask, needs)
    per_row = sweep.outputs(1)[0]
    scaled, unit = in_units(row_weights, heads)
    for rows in sweep:
        stats = sweep.backend.row_stats(sweep.pair, None, sweep.mask)
        values = sweep.backend.row_divergence(sweep.pair, sweep.mask, stats, divergence, beta)
        per_row[rows] = values[0]
        if any(needs):
            args = (stats, values, scaled[rows], divergence, beta)
            sweep.backend.row_divergence_grad(sweep.pair, *args, out=sweep.gradient)
            sweep.backward()
    return reduced(per_row, own), *sweep.finished(unit)


def _linear_minillm_loss(
    token_ids: Tensor,
    counts: Tensor,
    constants: Tensor,
    loss_scale: Tensor,
    clip_range: float,
    entropy_coef: float,
    needs: list[bool],
    *operands: Any,
) -> tuple[Tensor, ...]:
    """`constants` [4, N]: Policy's tensors. loss_scale: 1 / normalizer."""
    heads = _checked(operands, token_ids=token_ids, mask=counts, constants=constants)
    everywhere = Policy.of(constants, clip_range, entropy_coef)
    if heads.impl == "tiled":
        stats = tiled.statistics(heads, token_ids, counts)
        coefficients = loss_coefficients(RowStats(*stats.unbind(0)), everywhere) * loss_scale
        gradients = tiled.gradients(heads, token_ids, stats, torch.where(counts, coefficients, 0), needs)
    else:
        sweep = Sweep(heads, counts, needs)
        stats, gradients = sweep.outputs(STATISTICS), sweep.gradients
        for rows in sweep:
            known = sweep.backend.row_stats(sweep.pair, token_ids[rows], sweep.mask)
            stats[:, rows] = known
            if any(needs):
                policy = Policy.of(constants[:, rows], clip_range, entropy_coef)
                coefficients = loss_coefficients(RowStats(*known.unbind(0)), policy) * loss_scale
                coefficients = torch.where(counts[rows], coefficients, 0)
                sweep.backend.row_grad(sweep.pair, token_ids[rows], known, coefficients, out=sweep.gradient)
                sweep.backward()
    terms = loss_terms(RowStats(*stats.unbind(0)), everywhere)
    per_row = torch.where(counts, terms.policy + terms.single_step + terms.entropy_bonus, 0)
    return per_row.sum() * loss_scale, stats, *gradients


def _first_derivative(gradient: Tensor, *_of: Tensor | None) -> Tensor:
    """The same, as something that cannot be differentiated by the student: its second derivative is nowhere."""
    return gradient.clone()


# ---- fakes: shapes and types only


def _fake_rows(operands: tuple, *fields: int) -> Tensor:
    heads = Operands(*operands)
    return heads.student_hidden.new_empty((*fields, heads.n_rows), dtype=heads.accumulator)


def _fake_gradients(operands: tuple, needs: list[bool]) -> Gradients:
    heads = Operands(*operands)
    return (tiled if heads.impl == "tiled" else chunked).empty_gradients(heads.student, needs)


def _stats_fake(token_ids, mask, *operands):
    return _fake_rows(operands, STATISTICS)


def _stats_grad_fake(token_ids, stats, coefficients, needs, *operands):
    return tuple(_fake_gradients(operands, needs))


def _stats_loss_fake(token_ids, mask, coefficients, needs, *operands):
    stats = _fake_rows(operands, STATISTICS)
    return stats.new_empty(()), stats, *_fake_gradients(operands, needs)


def _divergence_fake(mask, divergence, beta, *operands):
    return _fake_rows(operands)


def _divergence_loss_fake(weights, normalizer, divisor, reduction, divergence, beta, needs, *operands):
    return _fake_rows(operands).new_empty(()), *_fake_gradients(operands, needs)


def _minillm_loss_fake(token_ids, counts, constants, loss_scale, clip_range, entropy_coef, needs, *operands):
    return _stats_loss_fake(token_ids, counts, constants, needs, *operands)


# ---- autograd: in the student's hidden states, weight and bias


def _remember(ctx, inputs: tuple) -> Operands:
    """What the gradients of the inputs need to know, in any of the backward passes below."""
    heads = Operands(*inputs[-len(Operands._fields) :])
    student = (heads.student_hidden, heads.student_weight, heads.student_bias)
    ctx.dtypes = [None if x is None else x.dtype for x in student]
    return heads


def _needs(ctx) -> list[bool]:
    return list(ctx.needs_input_grad[-3:])


def _input_gradients(ctx, gradients: tuple) -> tuple:
    """Of the student's operands in their own types, None where nothing was asked for."""
    wanted = zip(gradients, ctx.dtypes, _needs(ctx), strict=True)
    return tuple(g.to(dtype) if needed else None for g, dtype, needed in wanted)


def _once_differentiable(gradients: tuple, student: Sequence[Tensor | None]) -> tuple:
    """That asking for the derivative of these is an error, under create_graph=True."""
    if not torch.is_grad_enabled():
        return gradients
    return tuple(torch.ops.minillm.first_derivative(g, *student) for g in gradients)


def _stats_context(ctx, inputs, output) -> None:
    token_ids, mask, *_ = inputs
    heads = _remember(ctx, inputs)
    ctx.settings = heads.settings
    ctx.save_for_backward(token_ids, mask, output, *heads.tensors)


def _stats_backward(ctx, grad_stats):
    token_ids, mask, stats, *tensors = ctx.saved_tensors
    coefficients = torch.stack([grad_stats[i] for i in DIFFERENTIABLE_INDEX])
    if mask is not None:  # a masked row has gradient 0 even when what arrives is NaN
        coefficients = torch.where(mask, coefficients, 0)
    own = (token_ids, stats, coefficients, _needs(ctx))
    return _input_gradients(ctx, call("linear_stats_grad", *own, *tensors, *ctx.settings))


def _divergence_context(ctx, inputs, output) -> None:
    mask, ctx.divergence, ctx.beta, *_ = inputs
    heads = _remember(ctx, inputs)
    ctx.settings = heads.settings
    ctx.save_for_backward(mask, *heads.tensors)


def _divergence_backward(ctx, grad_values):
    mask, *tensors = ctx.saved_tensors
    weights = grad_values if mask is None else torch.where(mask, grad_values, 0)
    own = (weights, None, None, "sum", ctx.divergence, ctx.beta, _needs(ctx))
    _, *gradients = call("linear_divergence_loss", *own, *tensors, *ctx.settings)
    return _input_gradients(ctx, _once_differentiable(tuple(gradients), tensors[:3]))


def _loss_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # zeros for the other outputs would be as large as the weight
    heads = _remember(ctx, inputs)
    *_, hidden, weight, bias = output
    ctx.save_for_backward(hidden, weight, bias)
    ctx.backend, ctx.spent = heads.settings[-1], False
    # Named by the gradients alone, never read: they may change between the two passes.
    ctx.student = (heads.student_hidden, heads.student_weight, heads.student_bias)


def _loss_backward(ctx, grad_loss, *_ignored):
    """The gradients are there already. They are scaled in place, since the weight's is as large as the weight: they
    can be had once."""
    if grad_loss is None:
        return (None,) * 3
    if ctx.spent:
        raise RuntimeError(
            "the gradients of this loss were formed with it, and a first backward pass has taken them: compute the "
            'loss again, or take reduction="none", whose backward pass can be repeated'
        )
    gradients = ctx.saved_tensors
    if any(type(g) is not Tensor for g in gradients):  # a graph is traced: out of place, which the compiler may undo
        gradients = tuple(g * grad_loss.to(g.dtype) for g in gradients)
    else:
        ctx.spent = True
        for g in gradients:
            if g.numel() > 0:
                choose.resolve(ctx.backend, g).row_scale(g, grad_loss)
    return _input_gradients(ctx, _once_differentiable(gradients, ctx.student))


# ---- the operators

_OPERANDS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "float[] softcap, float[] scale, float temperature, int vocab_size, str impl, int? chunk_rows, "
    "bool gather, str backend"
)
_GRADIENTS = "Tensor, Tensor, Tensor"
_STUDENT = slice(-len(Operands._fields), 3 - len(Operands._fields))  # its hidden states, weight and bias

register(
    f"linear_stats(Tensor? token_ids, Tensor? mask, {_OPERANDS}) -> Tensor",
    _linear_stats,
    _stats_fake,
    _stats_backward,
    _stats_context,
    _STUDENT,
)
register(
    f"linear_stats_grad(Tensor? token_ids, Tensor stats, Tensor coefficients, bool[] needs, {_OPERANDS}) "
    f"-> ({_GRADIENTS})",
    _linear_stats_grad,
    _stats_grad_fake,
    no_double_backward,
    differentiable=ALL,
)
register(
    f"linear_stats_loss(Tensor? token_ids, Tensor? mask, Tensor coefficients, bool[] needs, {_OPERANDS}) "
    f"-> (Tensor, Tensor, {_GRADIENTS})",
    _linear_stats_loss,
    _stats_loss_fake,
    _loss_backward,
    _loss_context,
    _STUDENT,
)
register(
    f"linear_divergence(Tensor? mask, str divergence, float beta, {_OPERANDS}) -> Tensor",
    _linear_divergence,
    _divergence_fake,
    _divergence_backward,
    _divergence_context,
    _STUDENT,
)
register(
    "linear_divergence_loss(Tensor? weights, Tensor? normalizer, float? divisor, str reduction, str divergence, "
    f"float beta, bool[] needs, {_OPERANDS}) -> (Tensor, {_GRADIENTS})",
    _linear_divergence_loss,
    _divergence_loss_fake,
    _loss_backward,
    _loss_context,
    _STUDENT,
)
register(
    "linear_minillm_loss(Tensor token_ids, Tensor counts, Tensor constants, Tensor loss_scale, float clip_range, "
    f"float entropy_coef, bool[] needs, {_OPERANDS}) -> (Tensor, Tensor, {_GRADIENTS})",
    _linear_minillm_loss,
    _minillm_loss_fake,
    _loss_backward,
    _loss_context,
    _STUDENT,
)
register(
    "first_derivative(Tensor gradient, Tensor? hidden, Tensor? weight, Tensor? bias) -> Tensor",
    _first_derivative,
    lambda gradient, *_of: torch.empty_like(gradient),
    no_double_backward,
    differentiable=ALL,
)
