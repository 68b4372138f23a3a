"""torch.ops.minillm.linear_*: losses of hidden states and head weights as torch operators, on the chunk driver,
or with chunk_rows = TILED on the tiled one.

Two kinds. `linear_stats` and `linear_divergence` return a value a row; their backward pass forms the logits again,
since what arrives is not known before. `linear_stats_loss`, `linear_divergence_loss` and `linear_minillm_loss` return
a scalar whose coefficients are known beforehand, so the gradients are formed in the same sweep as the loss, and the
backward pass only scales them.

Legend: N rows, H hidden; a head comes as (hidden [N, H], weight [V', H], bias [V'] or None).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import choose
from ..backends.protocol import Backend
from ..logits.minillm import PolicyRows, policy_coefficients, policy_terms
from ..logits.ops import no_double_backward, register
from ..rows import DIFFERENTIABLE_INDEX, Pair, RowStats
from . import tiled
from .chunked import Gradients, Head, empty_gradients, over_chunks
from .tiled import TILED

N_HEADS = 6  # tensors that describe the two heads


def _heads(tensors: tuple, softcap: list[float], scale: list[float]) -> tuple[Head, Head | None]:
    hidden, weight, bias = tensors[:3]
    student = Head(hidden, weight, bias, softcap[0], scale[0])
    if tensors[3] is None:
        return student, None
    hidden, weight, bias = tensors[3:6]
    return student, Head(hidden, weight, bias, softcap[1], scale[1])


def _resolve(backend: str, tensors: tuple) -> Backend:
    return choose.resolve(backend, tensors[1], tensors[4])  # the weights have the logits' types


# ---- implementations


def _linear_stats(*args):
    tensors, (token_ids, mask, softcap, scale, *settings) = args[:N_HEADS], args[N_HEADS:]
    temperature, vocab_size, chunk_rows, backend = settings
    backend = _resolve(backend, tensors)
    heads = _heads(tensors, softcap, scale)
    if chunk_rows == TILED:
        return tiled.statistics(*heads, token_ids, mask, temperature, vocab_size)

    def row_loss(rows, z_s, z_t):
        ids = None if token_ids is None else token_ids[rows]
        return backend.row_stats(Pair(z_s, z_t, temperature, vocab_size), ids, None), None

    return over_chunks(*heads, mask, vocab_size, chunk_rows, len(RowStats._fields), [False] * 3, row_loss)[0]


def _linear_stats_grad(*args):
    tensors, (token_ids, mask, stats, coefficients, needs, softcap, scale, *settings) = args[:N_HEADS], args[N_HEADS:]
    temperature, vocab_size, chunk_rows, backend = settings
    backend = _resolve(backend, tensors)
    heads = _heads(tensors, softcap, scale)
    if chunk_rows == TILED:
        return tuple(tiled.gradients(*heads, token_ids, stats, coefficients, needs, temperature, vocab_size))

    def row_loss(rows, z_s, z_t):
        ids = None if token_ids is None else token_ids[rows]
        kept = stats[:, rows]
        pair = Pair(z_s, z_t, temperature, vocab_size)
        return kept[:0], backend.row_grad(pair, ids, kept, coefficients[:, rows], _gradient_buffer(z_s, softcap[0]))

    read = (coefficients != 0).any(0)
    mask = read if mask is None else mask & read
    return tuple(over_chunks(*heads, mask, vocab_size, chunk_rows, 0, needs, row_loss)[1])


def _gradient_buffer(z_s: Tensor, softcap: float) -> Tensor:
    """Where the gradient goes: over the student's logits; beside them where a soft-cap needs both."""
    return torch.empty_like(z_s) if softcap else z_s


def _sweep(
    heads: tuple[Head, Head | None],
    token_ids: Tensor | None,
    mask: Tensor | None,
    coefficients: Tensor | Callable[[Tensor, Tensor | slice], Tensor],
    needs: list[bool],
    temperature: float,
    vocab_size: int,
    chunk_rows: int,
    backend: Backend,
) -> tuple[Tensor, Gradients]:
    """Statistics [fields, N] and, from the same logits, the gradients of sum(coefficients * differentiable
    statistics). The coefficients are [5, N] known beforehand, where no row that `mask` keeps has all 0, or
    coefficients(stats, rows) gives those of some rows."""
    if chunk_rows == TILED:
        stats = tiled.statistics(*heads, token_ids, mask, temperature, vocab_size)
        known = coefficients if isinstance(coefficients, Tensor) else coefficients(stats, slice(None))
        if mask is not None:
            known = torch.where(mask, known, 0)
        return stats, tiled.gradients(*heads, token_ids, stats, known, needs, temperature, vocab_size)

    def row_loss(rows, z_s, z_t):
        ids = None if token_ids is None else token_ids[rows]
        pair = Pair(z_s, z_t, temperature, vocab_size)
        if not any(needs):
            return backend.row_stats(pair, ids, None), None
        out = _gradient_buffer(z_s, heads[0].softcap)
        if isinstance(coefficients, Tensor):
            return backend.row_stats_grad(pair, ids, coefficients[:, rows], out)
        stats = backend.row_stats(pair, ids, None)
        return stats, backend.row_grad(pair, ids, stats, coefficients(stats, rows), out)

    return over_chunks(*heads, mask, vocab_size, chunk_rows, len(RowStats._fields), needs, row_loss)


def _linear_stats_loss(*args):
    tensors, (token_ids, mask, coefficients, needs, softcap, scale, *settings) = args[:N_HEADS], args[N_HEADS:]
    *settings, backend = settings
    heads, backend = _heads(tensors, softcap, scale), _resolve(backend, tensors)
    stats, gradients = _sweep(heads, token_ids, mask, coefficients, needs, *settings, backend)
    # A statistic that nobody asked about may be infinite: 0 times it is 0.
    terms = torch.where(coefficients != 0, coefficients * stats[DIFFERENTIABLE_INDEX], 0)
    return terms.sum(), stats, *gradients


def _divergence_of(pair: Pair, name: str, beta: float, backend: Backend) -> tuple[Tensor, Tensor]:
    """(stats, values): values[0] is the divergence of each row."""
    stats = backend.row_stats(pair, None, None)
    return stats, backend.row_divergence(pair, None, stats, name, beta)


def _linear_divergence(*args):
    tensors, (mask, name, beta, softcap, scale, *settings) = args[:N_HEADS], args[N_HEADS:]
    temperature, vocab_size, chunk_rows, backend = settings
    backend = _resolve(backend, tensors)

    def row_loss(rows, z_s, z_t):
        return _divergence_of(Pair(z_s, z_t, temperature, vocab_size), name, beta, backend)[1][:1], None

    heads = _heads(tensors, softcap, scale)
    return over_chunks(*heads, mask, vocab_size, chunk_rows, 1, [False] * 3, row_loss)[0][0]


def _linear_divergence_loss(*args):
    tensors, (row_weights, name, beta, needs, softcap, scale, *settings) = args[:N_HEADS], args[N_HEADS:]
    temperature, vocab_size, chunk_rows, backend = settings
    backend = _resolve(backend, tensors)
    heads = _heads(tensors, softcap, scale)

    def row_loss(rows, z_s, z_t):
        pair = Pair(z_s, z_t, temperature, vocab_size)
        stats, values = _divergence_of(pair, name, beta, backend)
        if not any(needs):
            return values[:1], None
        out = _gradient_buffer(z_s, softcap[0])
        return values[:1], backend.row_divergence_grad(pair, stats, values, row_weights[rows], name, beta, out)

    outputs, gradients = over_chunks(*heads, row_weights != 0, vocab_size, chunk_rows, 1, needs, row_loss)
    return (outputs[0] * row_weights).sum(), *gradients


def _linear_minillm_loss(*args):
    tensors = args[:N_HEADS]
    token_ids, mask, rows_tensor, loss_scale, clip_range, entropy_coef, needs, softcap, scale, *settings = args[
        N_HEADS:
    ]
    *settings, backend = settings
    heads, backend = _heads(tensors, softcap, scale), _resolve(backend, tensors)

    def coefficients_of(stats: Tensor, rows: Tensor | slice) -> Tensor:
        policy = PolicyRows(*rows_tensor[:, rows].unbind(0))
        return policy_coefficients(RowStats(*stats.unbind(0)), policy, clip_range, entropy_coef) * loss_scale

    stats, gradients = _sweep(heads, token_ids, mask, coefficients_of, needs, *settings, backend)
    terms = policy_terms(RowStats(*stats.unbind(0)), PolicyRows(*rows_tensor.unbind(0)), clip_range, entropy_coef)
    per_row = torch.where(mask, terms.policy + terms.single_step + terms.entropy_bonus, 0)
    return per_row.sum() * loss_scale, stats, *gradients


# ---- fakes


def _per_row(fields: int):
    def fake(student_hidden, *_args):
        dtype = torch.promote_types(student_hidden.dtype, torch.float32)
        return student_hidden.new_empty((fields, student_hidden.shape[0]), dtype=dtype)

    return fake


def _fake_gradients(args: tuple, needs: list[bool]) -> Gradients:
    *_, chunk_rows, _backend = args
    hidden, weight, bias = args[:3]
    empty = tiled.empty_gradients if chunk_rows == TILED else empty_gradients
    return empty(Head(hidden, weight, bias, 0.0, 1.0), needs)


def _stats_grad_fake(*args):
    return tuple(_fake_gradients(args, args[N_HEADS + 4]))


def _divergence_fake(*args):
    return _per_row(1)(*args)[0]


def _divergence_loss_fake(*args):
    return _per_row(1)(*args).sum(), *_fake_gradients(args, args[N_HEADS + 3])


def _loss_fake(needs: int):
    """(loss, stats, gradients) of an operator whose argument of that number, after the heads, is `needs`."""

    def fake(*args):
        stats = _per_row(len(RowStats._fields))(*args)
        return _per_row(1)(*args).sum(), stats, *_fake_gradients(args, args[N_HEADS + needs])

    return fake


# ---- autograd: in the student's hidden states, weight and bias


def _needs(ctx) -> list[bool]:
    return [bool(x) for x in ctx.needs_input_grad[:3]]


def _head_gradients(ctx, gradients: tuple, n_inputs: int) -> tuple:
    """In the parameters' own types, None where nothing was asked for."""
    own = [
        g.to(dtype) if needed else None
        for g, dtype, needed in zip(gradients, ctx.head_dtypes, _needs(ctx), strict=True)
    ]
    return *own, *([None] * (n_inputs - 3))


def _remember_heads(ctx, tensors: tuple) -> None:
    ctx.head_dtypes = [torch.float32 if x is None else x.dtype for x in tensors[:3]]


def _stats_context(ctx, inputs, output) -> None:
    tensors, (token_ids, mask, *ctx.settings, backend) = inputs[:N_HEADS], inputs[N_HEADS:]
    ctx.settings.append(choose.kept(backend, tensors[1], tensors[4]))
    ctx.save_for_backward(*tensors, token_ids, mask, output)
    _remember_heads(ctx, tensors)


def _stats_backward(ctx, grad_stats):
    *inputs, stats = ctx.saved_tensors
    coefficients = torch.stack([grad_stats[i] for i in DIFFERENTIABLE_INDEX])
    mask = inputs[-1]
    if mask is not None:  # a masked row has gradient 0 even when what arrives is NaN
        coefficients = torch.where(mask, coefficients, 0)
    gradients = torch.ops.minillm.linear_stats_grad(*inputs, stats, coefficients, _needs(ctx), *ctx.settings)
    return _head_gradients(ctx, gradients, N_HEADS + 8)


def _divergence_context(ctx, inputs, output) -> None:
    tensors, (mask, *ctx.settings, backend) = inputs[:N_HEADS], inputs[N_HEADS:]
    ctx.settings.append(choose.kept(backend, tensors[1], tensors[4]))
    ctx.save_for_backward(*tensors, mask)
    _remember_heads(ctx, tensors)


def _divergence_backward(ctx, grad_values):
    *tensors, mask = ctx.saved_tensors
    weights = grad_values if mask is None else torch.where(mask, grad_values, 0)
    name, beta, *settings = ctx.settings
    needs = _needs(ctx)
    _, *gradients = torch.ops.minillm.linear_divergence_loss(*tensors, weights, name, beta, needs, *settings)
    return _head_gradients(ctx, tuple(gradients), N_HEADS + 9)


def _loss_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # zeros for the other outputs would be as large as the weight
    ctx.n_inputs = len(inputs)
    ctx.save_for_backward(*output[-3:])
    _remember_heads(ctx, inputs[:N_HEADS])


def _loss_backward(ctx, grad_loss, *_ignored):
    """The gradients are there already, and are scaled in place, since the weight's is as large as the weight: their
    version counter refuses a second backward pass. While a graph is traced, out of place, which the compiler may undo.
    """
    if grad_loss is None:
        return (None,) * ctx.n_inputs
    scaled = []
    for g in ctx.saved_tensors:
        scale = grad_loss.to(g.dtype)
        scaled.append(g.mul_(scale) if type(g) is Tensor else g * scale)
    return _head_gradients(ctx, tuple(scaled), ctx.n_inputs)


# ---- the operators

_HEADS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias"
)
_SETTINGS = "float[] softcap, float[] scale, float temperature, int vocab_size, int chunk_rows, str backend"
_GRADIENTS = "Tensor, Tensor, Tensor"

register(
    f"linear_stats({_HEADS}, Tensor? token_ids, Tensor? mask, {_SETTINGS}) -> Tensor",
    _linear_stats,
    _per_row(len(RowStats._fields)),
    _stats_backward,
    _stats_context,
)
register(
    f"linear_stats_grad({_HEADS}, Tensor? token_ids, Tensor? mask, Tensor stats, Tensor coefficients, bool[] needs, "
    f"{_SETTINGS}) -> ({_GRADIENTS})",
    _linear_stats_grad,
    _stats_grad_fake,
    no_double_backward,
)
register(
    f"linear_stats_loss({_HEADS}, Tensor? token_ids, Tensor? mask, Tensor coefficients, bool[] needs, {_SETTINGS}) "
    f"-> (Tensor, Tensor, {_GRADIENTS})",
    _linear_stats_loss,
    _loss_fake(needs=3),
    _loss_backward,
    _loss_context,
)
register(
    f"linear_divergence({_HEADS}, Tensor? mask, str divergence, float beta, {_SETTINGS}) -> Tensor",
    _linear_divergence,
    _divergence_fake,
    _divergence_backward,
    _divergence_context,
)
register(
    f"linear_divergence_loss({_HEADS}, Tensor row_weights, str divergence, float beta, bool[] needs, {_SETTINGS}) "
    f"-> (Tensor, {_GRADIENTS})",
    _linear_divergence_loss,
    _divergence_loss_fake,
    _loss_backward,
    _loss_context,
)
register(
    f"linear_minillm_loss({_HEADS}, Tensor token_ids, Tensor mask, Tensor rows, Tensor loss_scale, "
    f"float clip_range, float entropy_coef, bool[] needs, {_SETTINGS}) -> (Tensor, Tensor, {_GRADIENTS})",
    _linear_minillm_loss,
    _loss_fake(needs=6),
    _loss_backward,
    _loss_context,
)
