"""torch.ops.minillm.*: the row operations as torch operators, with fakes for torch.compile and autograd.

Registered with `torch.library.Library`, whose dispatch costs a few microseconds; one implementation serves every
device and picks the backend. `backend` is an argument ("auto" or a name), so a compiled graph is guarded on it, and
the backward pass takes what the forward pass took.

Legend: ... rows, V' the width of the student's head, V = vocab_size <= V' the columns that count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import arguments
from ..backends import choose
from ..backends.protocol import Backend
from ..rows import DIFFERENTIABLE, DIFFERENTIABLE_INDEX, MIXTURE_DIVERGENCES, Pair, RowStats, accumulator

_library = torch.library.Library("minillm", "DEF")


FIRST, ALL = slice(0, 1), slice(None)  # arguments of an operator


class Operator(NamedTuple):
    implementation: Callable
    backward: Callable | None
    setup_context: Callable | None
    differentiable: slice


_operators: dict[str, Operator] = {}


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    differentiable: slice = FIRST,
) -> None:
    """An operator of torch.ops.minillm: one implementation for every device, `fake` for shapes and types alone, and
    how it is differentiated, if it can be: `backward` gives the gradients of the `differentiable` arguments."""
    name = schema.partition("(")[0]
    _operators[name] = Operator(implementation, backward, setup_context, differentiable)
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minillm::{name}", _of_one_device(fake), lib=_library)
    autograd = _autograd_of(getattr(torch.ops.minillm, name).default, _operators[name])
    _library.impl(name, autograd, "Autograd", with_keyset=True)
    if "(a!)" not in schema:
        torch.library.register_vmap(f"minillm::{name}", _no_vmap, lib=_library)


def call(name: str, *args: Any) -> Any:
    """The operator of that name, without the way through torch's dispatcher where nothing on that way would look at
    it: that takes longer than a launch.

    The last argument is the backend: a name, or one above the ranks of a process group, which is no argument of
    torch.ops and communicates. Then there is no operator, only what it is made of.
    """
    own = _operators[name]
    if not isinstance(args[-1], str):
        run = _differentiated
        if "torch._dynamo" in sys.modules:  # what takes seconds to import; without it nothing is compiled
            run = torch.compiler.disable(run)
        return run(own, partial(_without_autocast, own.implementation), args)
    if torch.compiler.is_compiling() or not _is_eager(args):
        return getattr(torch.ops.minillm, name)(*args)
    return _differentiated(own, partial(_below_autograd, own.implementation), args)


_Keys, _Key = torch._C.DispatchKeySet, torch._C.DispatchKey
# Of a tensor whose operators end at a kernel of its device: no subclass, no view that is to be resolved first.
_PLAIN = {torch._C._dispatch_keys(torch.empty(0)).raw_repr()} | {
    _Keys(_Key.CUDA).add(_Key.ADInplaceOrView).add(_Key.AutogradCUDA).add(_Key.AutocastCUDA).raw_repr()
}
_NO_MODE = _Keys(_Key.BackendSelect).add(_Key.ADInplaceOrView).raw_repr()


def _is_eager(args: tuple) -> bool:
    """Whether nothing but autograd stands between a call and the implementation: no mode, transformation, trace or
    profile, and tensors that are nothing else."""
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() == _NO_MODE
        and forward_ad._current_level < 0
        and not torch._C._has_torch_function(args)
        and not torch.autograd._profiler_enabled()  # which is to name the operators
        and all([torch._C._dispatch_keys(x).raw_repr() in _PLAIN for x in args if isinstance(x, Tensor)])
    )


def _below_autograd(step: Callable, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return step(*args)


def _without_autocast(implementation: Callable, *args: Any) -> Any:
    """As below the dispatcher: operands have been cast."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        return implementation(*args)


def _differentiated(own: Operator, run: Callable, args: tuple) -> Any:
    """run(*args), what the operator does, and its derivative."""
    if own.backward is not None and torch.is_grad_enabled():
        inputs = args[own.differentiable]
        if any([isinstance(x, Tensor) and x.requires_grad for x in inputs]):
            return _Differentiated.apply(own, run, args, *inputs)
    return run(*args)


class _Differentiated(torch.autograd.Function):
    """The arguments without a derivative come in `args` alone: autograd looks at each of its own."""

    @staticmethod
    def forward(ctx, own, run, args, *_differentiable):
        ctx.operator = own
        output = run(*args)
        if own.setup_context is not None:
            own.setup_context(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *ctx.operator.backward(ctx, *grads)


def _autograd_of(operator: torch._ops.OpOverload, own: Operator) -> Callable:
    """What register_autograd makes, in a tenth of its time: that asks the schema for defaults at every call.

    Forward-mode derivatives are refused here, where autograd begins: below no operator sees that there are any.
    """
    names = [argument.name for argument in operator._schema.arguments]

    def autograd(keyset, *args):
        if forward_ad._current_level >= 0:
            for name, x in zip(names, args, strict=True):
                if isinstance(x, Tensor):
                    arguments.check_no_tangent(name, x)
        below = partial(operator.redispatch, keyset & torch._C._after_autograd_keyset)
        return _differentiated(own, partial(_below_autograd, below), args)

    return autograd


def _of_one_device(fake: Callable) -> Callable:
    """torch asks the fake, and not the implementation, as soon as one tensor is on "meta": its results are nothing."""

    def checked(*args):
        devices = {str(x.device) for x in args if isinstance(x, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"the tensors are on {' and '.join(sorted(devices))}: move them to one device")
        return fake(*args)

    return checked


def _no_vmap(info, in_dims, *_args):
    raise NotImplementedError(
        "torch.func.vmap over minillm_kernels is not supported: the functions take any leading dimensions themselves"
    )


def no_double_backward(ctx, *_grads):
    raise RuntimeError(
        "the losses of minillm_kernels have no second derivative; call backward() without create_graph=True, or use "
        "the plain formula (log_softmax) where a double backward is needed"
    )


# ---- checks: the operators can be called without the public functions, and kernels take sizes on trust

_IDS, _BOOL, _FLOATS = (torch.int64,), (torch.bool,), (torch.float32, torch.float64)


def checked_pair(student, teacher, temperature, vocab_size, backend, inplace=False, argmax_allowed=False) -> Pair:
    """inplace: the gradient will be written over the student; said here, where compiled code comes by too."""
    arguments.check_temperature(temperature, argmax_allowed)
    width = student.shape[-1]
    if teacher is not None:
        width = min(width, teacher.shape[-1])
        if teacher.shape[:-1] != student.shape[:-1] or teacher.device != student.device:
            arguments.check_logits(student, teacher)  # says which
    arguments.resolve_vocab_size(vocab_size, width, least=least_columns(backend))
    if inplace:
        arguments.check_inplace(student, teacher_logits=teacher)
    return Pair(student, teacher, temperature, vocab_size)


def least_columns(backend: str | Backend) -> int:
    """That a call must have: a rank of several may have none."""
    return 1 if isinstance(backend, str) else 0


def check_rows(student: Tensor, name: str, x: Tensor | None, dtypes: tuple[torch.dtype, ...], *fields: int) -> None:
    """x: numbers for each row of the student, [*fields, ...]."""
    if x is not None:
        shape = (*fields, *student.shape[:-1])
        if x.shape != shape or x.dtype not in dtypes or x.device != student.device:
            raise ValueError(
                f"{name} must be {' or '.join(map(str, dtypes))} of shape {shape} on {student.device}, got {x.dtype} "
                f"of shape {tuple(x.shape)} on {x.device}"
            )


def _check_gradient(student, token_ids, stats, coefficients) -> None:
    check_rows(student, "token_ids", token_ids, _IDS)
    check_rows(student, "stats", stats, _FLOATS, len(RowStats._fields))
    check_rows(student, "coefficients", coefficients, _FLOATS, len(DIFFERENTIABLE))


def check_divergence_name(divergence: str, beta: float) -> None:
    if divergence not in MIXTURE_DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}: expected one of {', '.join(MIXTURE_DIVERGENCES)}")
    arguments.check_unit_interval("beta", beta)


def check_divergence(student, mask, stats, divergence, beta) -> None:
    check_divergence_name(divergence, beta)
    check_rows(student, "mask", mask, _BOOL)
    check_rows(student, "stats", stats, _FLOATS, len(RowStats._fields))


def _check_divergence_gradient(student, stats, values, scale, divergence, beta) -> None:
    check_divergence(student, None, stats, divergence, beta)
    check_rows(student, "values", values, _FLOATS, 2)
    check_rows(student, "scale", scale, _FLOATS)


# ---- implementations


def _row_stats(student, teacher, token_ids, mask, inplace, temperature, vocab_size, backend):
    pair = checked_pair(student, teacher, temperature, vocab_size, backend, inplace)
    check_rows(student, "token_ids", token_ids, _IDS)
    check_rows(student, "mask", mask, _BOOL)
    return choose.resolve(backend, student, teacher).row_stats(pair, token_ids, mask)


def _row_grad(student, teacher, token_ids, stats, coefficients, temperature, vocab_size, backend):
    pair = checked_pair(student, teacher, temperature, vocab_size, backend)
    _check_gradient(student, token_ids, stats, coefficients)
    return choose.resolve(backend, student, teacher).row_grad(pair, token_ids, stats, coefficients)


def _row_grad_(student, teacher, token_ids, stats, coefficients, temperature, vocab_size, backend):
    pair = checked_pair(student, teacher, temperature, vocab_size, backend, inplace=True)
    _check_gradient(student, token_ids, stats, coefficients)
    choose.resolve(backend, student, teacher).row_grad(pair, token_ids, stats, coefficients, out=student)
    torch.autograd.graph.increment_version(student)  # written behind torch's back


def _row_divergence(student, teacher, mask, stats, inplace, divergence, beta, temperature, vocab_size, backend):
    pair = checked_pair(student, teacher, temperature, vocab_size, backend, inplace)
    check_divergence(student, mask, stats, divergence, beta)
    return choose.resolve(backend, student, teacher).row_divergence(pair, mask, stats, divergence, beta)


def _row_divergence_grad(student, teacher, stats, values, scale, divergence, beta, temperature, vocab_size, backend):
    pair = checked_pair(student, teacher, temperature, vocab_size, backend)
    _check_divergence_gradient(student, stats, values, scale, divergence, beta)
    chosen = choose.resolve(backend, student, teacher)
    return chosen.row_divergence_grad(pair, stats, values, scale, divergence, beta)


def _row_divergence_grad_(student, teacher, stats, values, scale, divergence, beta, temperature, vocab_size, backend):
    pair = checked_pair(student, teacher, temperature, vocab_size, backend, inplace=True)
    _check_divergence_gradient(student, stats, values, scale, divergence, beta)
    chosen = choose.resolve(backend, student, teacher)
    chosen.row_divergence_grad(pair, stats, values, scale, divergence, beta, out=student)
    torch.autograd.graph.increment_version(student)  # written behind torch's back


def _row_sample(student, teacher, uniforms, alpha, temperature, top_k, top_p, vocab_size, backend):
    pair = checked_pair(student, teacher, temperature, vocab_size, backend, argmax_allowed=True)
    arguments.check_law(teacher, alpha, top_k, top_p)
    arguments.check_uniforms(uniforms, student)
    return choose.resolve(backend, student, teacher).row_sample(pair, uniforms, alpha, top_k, top_p)


# ---- fakes: shapes and types only


def _per_row(student: Tensor, teacher: Tensor | None, fields: int) -> Tensor:
    return student.new_empty((fields, *student.shape[:-1]), dtype=accumulator(student, teacher))


def _stats_fake(student, teacher, *_args) -> Tensor:
    return _per_row(student, teacher, len(RowStats._fields))


def _divergence_fake(student, teacher, *_args) -> Tensor:
    return _per_row(student, teacher, 2)


def _gradient_fake(student, *_args) -> Tensor:
    return student.new_empty(student.shape)


def _in_place_fake(*_args) -> None:
    return None


def _sample_fake(student, teacher, *_args) -> tuple[Tensor, Tensor, Tensor]:
    leading = student.shape[:-1]
    token_ids, from_teacher = (student.new_empty(leading, dtype=dtype) for dtype in (torch.int64, torch.bool))
    return token_ids, _per_row(student, teacher, 3), from_teacher


# ---- autograd: in the student's logits only


def _stats_context(ctx, inputs, output) -> None:
    student, teacher, token_ids, mask, ctx.inplace, *ctx.settings = inputs
    ctx.save_for_backward(student, teacher, token_ids, mask, output)


def _stats_backward(ctx, grad_stats: Tensor):
    student, teacher, token_ids, mask, stats = ctx.saved_tensors
    coefficients = torch.stack([grad_stats[i] for i in DIFFERENTIABLE_INDEX])
    if mask is not None:  # a masked row has gradient 0 even when what arrives is NaN
        coefficients = torch.where(mask, coefficients, 0)
        token_ids = None if token_ids is None else torch.where(mask, token_ids, 0)
    args = (teacher, token_ids, stats, coefficients, *ctx.settings)
    grad = gradient_of_logits(ctx, "row_grad", student, args)
    return (grad,)


def _divergence_context(ctx, inputs, output) -> None:
    student, teacher, mask, stats, ctx.inplace, *ctx.settings = inputs
    ctx.save_for_backward(student, teacher, mask, stats, output)


def _divergence_backward(ctx, grad_values: Tensor):
    student, teacher, mask, stats, values = ctx.saved_tensors
    scale = grad_values[0] if mask is None else torch.where(mask, grad_values[0], 0)
    args = (teacher, stats, values, scale, *ctx.settings)
    grad = gradient_of_logits(ctx, "row_divergence_grad", student, args)
    return (grad,)


def gradient_of_logits(ctx, operator: str, student: Tensor, args: tuple) -> Tensor:
    """By the operator of that name, or where ctx.inplace says so by its namesake that overwrites the student."""
    if not ctx.inplace:
        return call(operator, student, *args)
    logits = student.detach()  # shares memory and version counter: a second backward pass, or another user, is told
    call(f"{operator}_", logits, *args)
    return logits


# ---- the operators

_MODELS = "Tensor student, Tensor? teacher"
_SETTINGS = "float temperature, SymInt vocab_size, str backend"
_GRAD = f"Tensor? teacher, Tensor? token_ids, Tensor stats, Tensor coefficients, {_SETTINGS}"
_DIVERGENCE = f"str divergence, float beta, {_SETTINGS}"
_DIVERGENCE_GRAD = f"Tensor teacher, Tensor stats, Tensor values, Tensor scale, {_DIVERGENCE}"

register(
    f"row_stats({_MODELS}, Tensor? token_ids, Tensor? mask, bool inplace, {_SETTINGS}) -> Tensor",
    _row_stats,
    _stats_fake,
    _stats_backward,
    _stats_context,
)
register(
    f"row_grad(Tensor student, {_GRAD}) -> Tensor", _row_grad, _gradient_fake, no_double_backward, differentiable=ALL
)
register(f"row_grad_(Tensor(a!) student, {_GRAD}) -> ()", _row_grad_, _in_place_fake)
register(
    "row_divergence(Tensor student, Tensor teacher, Tensor? mask, Tensor stats, bool inplace, "
    f"{_DIVERGENCE}) -> Tensor",
    _row_divergence,
    _divergence_fake,
    _divergence_backward,
    _divergence_context,
)
register(
    f"row_divergence_grad(Tensor student, {_DIVERGENCE_GRAD}) -> Tensor",
    _row_divergence_grad,
    _gradient_fake,
    no_double_backward,
    differentiable=ALL,
)
register(f"row_divergence_grad_(Tensor(a!) student, {_DIVERGENCE_GRAD}) -> ()", _row_divergence_grad_, _in_place_fake)
register(
    f"row_sample({_MODELS}, Tensor uniforms, float alpha, float temperature, int top_k, "
    "float top_p, SymInt vocab_size, str backend) -> (Tensor, Tensor, Tensor)",
    _row_sample,
    _sample_fake,
)
