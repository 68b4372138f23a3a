"""torch.ops.minillm.*: the row operations as torch operators, with fakes for torch.compile and autograd.

Registered with `torch.library.Library`, whose dispatch costs a few microseconds; one implementation serves every
device and picks the backend. `backend` is an argument ("auto" or a name), so a compiled graph is guarded on it, and
the backward pass takes what the forward pass took.

Legend: ... rows, V' the width of the student's head, V = vocab_size <= V' the columns that count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import choose
from ..rows import DIFFERENTIABLE_INDEX, RowStats

_library = torch.library.Library("minillm", "DEF")
_SETTINGS = "float temperature, SymInt vocab_size, str backend"
_DIVERGENCE = f"str divergence, float beta, {_SETTINGS}"

_library.define(
    f"row_stats(Tensor student, Tensor? teacher, Tensor? token_ids, Tensor? mask, bool inplace, {_SETTINGS}) -> Tensor"
)
_library.define(
    "row_grad(Tensor student, Tensor? teacher, Tensor? token_ids, Tensor stats, Tensor coefficients, "
    f"{_SETTINGS}) -> Tensor"
)
_library.define(
    "row_grad_(Tensor(a!) student, Tensor? teacher, Tensor? token_ids, Tensor stats, Tensor coefficients, "
    f"{_SETTINGS}) -> ()"
)
_library.define(
    "row_divergence(Tensor student, Tensor teacher, Tensor? mask, Tensor stats, bool inplace, "
    f"{_DIVERGENCE}) -> Tensor"
)
_library.define(
    "row_divergence_grad(Tensor student, Tensor teacher, Tensor stats, Tensor values, Tensor scale, "
    f"{_DIVERGENCE}) -> Tensor"
)
_library.define(
    "row_divergence_grad_(Tensor(a!) student, Tensor teacher, Tensor stats, Tensor values, Tensor scale, "
    f"{_DIVERGENCE}) -> ()"
)
_library.define(
    "row_sample(Tensor student, Tensor? teacher, Tensor uniforms, float alpha, float temperature, int top_k, "
    "float top_p, SymInt vocab_size, str backend) -> (Tensor, Tensor, Tensor)"
)


# ---- implementations
# -------------------------------------------------------------------------------------------------


def _row_stats(student, teacher, token_ids, mask, inplace, temperature, vocab_size, backend):
    backend = choose.resolve(backend, student, teacher)
    return choose.run(backend, "row_stats", student, teacher, token_ids, mask, temperature, vocab_size)


def _row_grad(student, teacher, token_ids, stats, coefficients, temperature, vocab_size, backend):
    backend = choose.resolve(backend, student, teacher)
    args = (student, teacher, token_ids, stats, coefficients, temperature, vocab_size)
    return choose.run(backend, "row_grad", *args)


def _row_grad_(student, teacher, token_ids, stats, coefficients, temperature, vocab_size, backend):
    backend = choose.resolve(backend, student, teacher)
    args = (student, teacher, token_ids, stats, coefficients, temperature, vocab_size)
    _into(student, backend, "row_grad", args)


def _row_divergence(student, teacher, mask, stats, inplace, divergence, beta, temperature, vocab_size, backend):
    backend = choose.resolve(backend, student, teacher)
    args = (student, teacher, mask, stats, divergence, beta, temperature, vocab_size)
    return choose.run(backend, "row_divergence", *args)


def _row_divergence_grad(student, teacher, stats, values, scale, divergence, beta, temperature, vocab_size, backend):
    backend = choose.resolve(backend, student, teacher)
    args = (student, teacher, stats, values, scale, divergence, beta, temperature, vocab_size)
    return choose.run(backend, "row_divergence_grad", *args)


def _row_divergence_grad_(student, teacher, stats, values, scale, divergence, beta, temperature, vocab_size, backend):
    backend = choose.resolve(backend, student, teacher)
    args = (student, teacher, stats, values, scale, divergence, beta, temperature, vocab_size)
    _into(student, backend, "row_divergence_grad", args)


def _into(student: Tensor, backend: str, operation: str, args: tuple) -> None:
    """Overwrites the student with its gradient; only the reference needs memory for that."""
    if backend == "reference":
        student.copy_(choose.run(backend, operation, *args))
    else:
        choose.run(backend, operation, *args, student)
        torch.autograd.graph.increment_version(student)  # written behind torch's back


def _row_sample(student, teacher, uniforms, alpha, temperature, top_k, top_p, vocab_size, backend):
    backend = choose.resolve(backend, student, teacher)
    args = (student, teacher, uniforms, alpha, temperature, top_k, top_p, vocab_size)
    return choose.run(backend, "row_sample", *args)


_IMPLEMENTATIONS = {
    "row_stats": _row_stats,
    "row_grad": _row_grad,
    "row_grad_": _row_grad_,
    "row_divergence": _row_divergence,
    "row_divergence_grad": _row_divergence_grad,
    "row_divergence_grad_": _row_divergence_grad_,
    "row_sample": _row_sample,
}
for _name, _implementation in _IMPLEMENTATIONS.items():
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


# ---- fakes: shapes and types only
# ------------------------------------------------------------------------------------


def _accumulator(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    double = student.dtype == torch.float64 or (teacher is not None and teacher.dtype == torch.float64)
    return torch.float64 if double else torch.float32


def _per_row(student: Tensor, teacher: Tensor | None, fields: int) -> Tensor:
    return student.new_empty((fields, *student.shape[:-1]), dtype=_accumulator(student, teacher))


def _like(student: Tensor, *_args) -> Tensor:
    return student.new_empty(student.shape)


def _nothing(*_args) -> None:
    return None


_FAKES: dict[str, Callable] = {
    "row_stats": lambda student, teacher, *_: _per_row(student, teacher, len(RowStats._fields)),
    "row_grad": _like,
    "row_grad_": _nothing,
    "row_divergence": lambda student, teacher, *_: _per_row(student, teacher, 2),
    "row_divergence_grad": _like,
    "row_divergence_grad_": _nothing,
    "row_sample": lambda student, teacher, *_: (
        student.new_empty(student.shape[:-1], dtype=torch.int64),
        _per_row(student, teacher, 3),
        student.new_empty(student.shape[:-1], dtype=torch.bool),
    ),
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"minillm::{_name}", _fake, lib=_library)


# ---- autograd: in the student's logits only
# --------------------------------------------------------------------------


def _stats_context(ctx, inputs, output) -> None:
    student, teacher, token_ids, mask, ctx.inplace, *settings, backend = inputs
    ctx.save_for_backward(student, teacher, token_ids, mask, output)
    ctx.settings = (*settings, choose.kept(backend, student, teacher))


def _stats_backward(ctx, grad_stats: Tensor):
    student, teacher, token_ids, mask, stats = ctx.saved_tensors
    coefficients = torch.stack([grad_stats[i] for i in DIFFERENTIABLE_INDEX])
    if mask is not None:  # a masked row has gradient 0 even when what arrives is NaN
        coefficients = torch.where(mask, coefficients, 0)
        token_ids = None if token_ids is None else torch.where(mask, token_ids, 0)
    args = (teacher, token_ids, stats, coefficients, *ctx.settings)
    grad = _gradient(ctx, torch.ops.minillm.row_grad, torch.ops.minillm.row_grad_, student, args)
    return grad, *([None] * 7)


def _divergence_context(ctx, inputs, output) -> None:
    student, teacher, mask, stats, ctx.inplace, *settings, backend = inputs
    ctx.save_for_backward(student, teacher, mask, stats, output)
    ctx.settings = (*settings, choose.kept(backend, student, teacher))


def _divergence_backward(ctx, grad_values: Tensor):
    student, teacher, mask, stats, values = ctx.saved_tensors
    scale = grad_values[0] if mask is None else torch.where(mask, grad_values[0], 0)
    args = (teacher, stats, values, scale, *ctx.settings)
    grad = _gradient(ctx, torch.ops.minillm.row_divergence_grad, torch.ops.minillm.row_divergence_grad_, student, args)
    return grad, *([None] * 9)


def _gradient(ctx, out_of_place, in_place, student: Tensor, args: tuple) -> Tensor:
    if not ctx.inplace:
        return out_of_place(student, *args)
    logits = student.detach()  # shares memory and version counter: a second backward pass, or another user, is told
    in_place(logits, *args)
    return logits


def _no_double_backward(ctx, *_grads):
    raise RuntimeError(
        "the losses of minillm_kernels have no second derivative; call backward() without create_graph=True, or use "
        "the plain formula (log_softmax) where a double backward is needed"
    )


torch.library.register_autograd("minillm::row_stats", _stats_backward, setup_context=_stats_context, lib=_library)
torch.library.register_autograd(
    "minillm::row_divergence", _divergence_backward, setup_context=_divergence_context, lib=_library
)
torch.library.register_autograd("minillm::row_grad", _no_double_backward, lib=_library)
torch.library.register_autograd("minillm::row_divergence_grad", _no_double_backward, lib=_library)


def _no_vmap(info, in_dims, *_args):
    raise NotImplementedError(
        "torch.func.vmap over minillm_kernels is not supported: the functions take any leading dimensions themselves"
    )


for _name in ("row_stats", "row_grad", "row_divergence", "row_divergence_grad", "row_sample"):
    torch.library.register_vmap(f"minillm::{_name}", _no_vmap, lib=_library)
