"""The row operations by the compiled core: tensors as the addresses, sizes and strides of csrc/args.h."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..rows import DIFFERENTIABLE, MIXTURE_DIVERGENCES, Pair, RowStats, row_strides
from .protocol import Backend

if TYPE_CHECKING:
    from .._core import How, Operations, PairAt, RowsAt

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INSTALL = "`pip install -e .` (or `pip install .`) in the repository again"
# The orders that Python and C++ share, as csrc/rowmath names them.
_ORDERS = {
    "STATISTICS": tuple(name.upper() for name in RowStats._fields),
    "COEFFICIENTS": tuple(f"C_{name.upper()}" for name in DIFFERENTIABLE),
    "DIVERGENCES": MIXTURE_DIVERGENCES,
}


def _load() -> tuple[Any, str | None]:
    """The compiled core, or why there is none. Imported after torch, it shares torch's OpenMP, hence its threads."""
    try:
        from .. import _core
    except ImportError as error:
        return None, f"the compiled core is missing ({error}); install a C++ compiler and run {_INSTALL}"
    for name, order in _ORDERS.items():
        if getattr(_core, name, None) != order:
            return None, f"the compiled core was built from other sources ({name} differ); run {_INSTALL}"
    return _core, None


core, missing = _load()


@dataclass(frozen=True, eq=False)
class Compiled(Backend):
    """The functions of a compiled module on the tensors of one device type. cpu.py and cuda.py say what is theirs."""

    device: str
    operations: Operations  # _core.cpu or _core.cuda; None where why_not() says that there is none
    why_not: Callable[[], str | None]  # it does not run on this machine
    launch: Callable[[Pair], AbstractContextManager[How]]  # how its functions are to run on that pair, inside
    holds_rows: Callable[[Operations, Pair], bool]  # whether its row_stats_grad, if any, takes that pair
    gradient_like: Callable[[Tensor], Tensor]  # uninitialised, contiguous, of the shape and type of these logits

    def unavailable(self) -> str | None:
        return self.why_not()

    def refusal(self, x: Tensor) -> str | None:
        if x.device.type != self.device:
            return f"it takes {self.device.upper()} tensors, not {x.device.type}"
        if x.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
        return None

    def row_stats(self, pair: Pair, token_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        ids_at, _ids = pointer(token_ids, torch.int64)
        mask_at, _mask = pointer(mask, torch.bool)
        stats = per_row(pair, len(RowStats._fields))
        with self.launch(pair) as how:
            self.operations.row_stats(how, pair_at(pair), mask_at, ids_at, stats.data_ptr())
        return stats

    def row_grad(
        self,
        pair: Pair,
        token_ids: Tensor | None,
        stats: Tensor,
        coefficients: Tensor,
        out: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        ids_at, _ids = pointer(token_ids, torch.int64)
        stats_at, _stats = pointer(stats, torch.float32)
        coefficients_at, _coefficients = pointer(coefficients, torch.float32)
        factor_at, _factor = pointer(factor, torch.float32)
        grad = self.gradient_like(pair.student) if out is None else out
        with self.launch(pair) as how:
            inputs = (pair_at(pair), ids_at, stats_at, coefficients_at)
            self.operations.row_grad(how, *inputs, rows_at(grad), grad.shape[-1], factor_at)
        return grad

    def row_stats_grad(
        self, pair: Pair, token_ids: Tensor | None, coefficients: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One visit of each row where the device can hold a row pair: the bits of two."""
        if not self.holds_rows(self.operations, pair):
            return super().row_stats_grad(pair, token_ids, coefficients, out)
        ids_at, _ids = pointer(token_ids, torch.int64)
        coefficients_at, _coefficients = pointer(coefficients, torch.float32)
        stats = per_row(pair, len(RowStats._fields))
        grad = self.gradient_like(pair.student) if out is None else out
        with self.launch(pair) as how:
            outputs = (stats.data_ptr(), rows_at(grad), grad.shape[-1])
            self.operations.row_stats_grad(how, pair_at(pair), ids_at, coefficients_at, *outputs)
        return stats, grad

    def row_scale(self, x: Tensor, factor: Tensor) -> None:
        factor_at, _factor = pointer(factor, torch.float32)
        rows = Pair(x.reshape(-1, x.shape[-1]), None, 1.0, x.shape[-1])
        with self.launch(rows) as how:
            self.operations.row_scale(how, pair_at(rows), factor_at)

    def row_divergence(self, pair: Pair, mask: Tensor | None, stats: Tensor, divergence: str, beta: float) -> Tensor:
        mask_at, _mask = pointer(mask, torch.bool)
        stats_at, _stats = pointer(stats, torch.float32)
        out = per_row(pair, 2)
        with self.launch(pair) as how:
            inputs = (pair_at(pair), code_of(divergence), beta, mask_at, stats_at)
            self.operations.row_divergence(how, *inputs, out.data_ptr())
        return out

    def row_divergence_grad(
        self,
        pair: Pair,
        stats: Tensor,
        values: Tensor,
        scale: Tensor,
        divergence: str,
        beta: float,
        out: Tensor | None = None,
    ) -> Tensor:
        stats_at, _stats = pointer(stats, torch.float32)
        values_at, _values = pointer(values, torch.float32)
        scale_at, _scale = pointer(scale, torch.float32)
        grad = self.gradient_like(pair.student) if out is None else out
        with self.launch(pair) as how:
            inputs = (pair_at(pair), code_of(divergence), beta, stats_at, values_at, scale_at)
            self.operations.row_divergence_grad(how, *inputs, rows_at(grad), grad.shape[-1])
        return grad

    def row_sample(
        self, pair: Pair, uniforms: Tensor, alpha: float, top_k: int, top_p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        uniforms_at, _uniforms = pointer(uniforms, torch.float64)
        leading = pair.student.shape[:-1]
        token_ids = pair.student.new_empty(leading, dtype=torch.int64)
        logprobs = per_row(pair, 3)
        from_teacher = pair.student.new_empty(leading, dtype=torch.bool)
        greedy = pair.temperature == 0
        if greedy:
            pair = pair._replace(temperature=1.0)
        with self.launch(pair) as how:
            inputs = (pair_at(pair), uniforms_at, alpha, top_k, top_p, greedy)
            outputs = (token_ids.data_ptr(), logprobs.data_ptr(), from_teacher.data_ptr())
            self.operations.row_sample(how, *inputs, *outputs)
        return token_ids, logprobs, from_teacher


def rows_at(x: Tensor) -> RowsAt:
    return (x.data_ptr(), DTYPES[x.dtype], *row_strides(x))


def pair_at(pair: Pair) -> PairAt:
    student, teacher, temperature, vocab_size = pair
    return rows_at(student), None if teacher is None else rows_at(teacher), pair.n_rows, vocab_size, temperature


def pointer(x: Tensor | None, dtype: torch.dtype) -> tuple[int, Tensor | None]:
    """The address of a small per-row tensor in the type that the core expects, and the tensor that must stay alive."""
    if x is None:
        return 0, None
    if x.dtype != dtype or not x.is_contiguous():
        x = x.to(dtype).contiguous()
    address = x.data_ptr()
    if address % dtype.itemsize:  # a view of bytes
        x = x.clone()
        address = x.data_ptr()
    return address, x


def per_row(pair: Pair, fields: int) -> Tensor:
    return pair.student.new_empty((fields, *pair.student.shape[:-1]), dtype=torch.float32)


def code_of(divergence: str) -> int:
    return MIXTURE_DIVERGENCES.index(divergence)
