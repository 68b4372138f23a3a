"""The row operations by the compiled core: tensors as the addresses, sizes and strides of csrc/args.h."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..rows import MIXTURE_DIVERGENCES, Pair, RowStats, row_strides
from .protocol import Backend

core: ModuleType | None
try:
    # After torch: the core then shares torch's OpenMP, hence its threads.
    from .. import _core as core
except ImportError as error:
    core = None
    import_error = str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def missing() -> str | None:
    """Why there is no compiled core, or None."""
    if core is None:
        return (
            f"the compiled core is missing ({import_error}); install a C++ compiler and run "
            "`pip install -e .` (or `pip install .`) in the repository again"
        )
    return None


@dataclass(frozen=True)
class Compiled(Backend):
    """The functions of a compiled module on the tensors of one device type. cpu.py and cuda.py say what is theirs."""

    device: str
    module: Any
    why_not: Callable[[], str | None]  # the module does not run here
    call: Callable[..., None]  # (module, operation, pair, *arguments)
    holds_rows: Callable[[Any, Pair], bool]  # the module's row_stats_grad is there and takes this pair

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
        self.run("row_stats", pair, mask_at, ids_at, stats.data_ptr())
        return stats

    def row_grad(
        self, pair: Pair, token_ids: Tensor | None, stats: Tensor, coefficients: Tensor, out: Tensor | None = None
    ) -> Tensor:
        ids_at, _ids = pointer(token_ids, torch.int64)
        stats_at, _stats = pointer(stats, torch.float32)
        coefficients_at, _coefficients = pointer(coefficients, torch.float32)
        grad = gradient_of(pair, out)
        self.run("row_grad", pair, ids_at, stats_at, coefficients_at, self.rows(grad), grad.shape[-1])
        return grad

    def row_stats_grad(
        self, pair: Pair, token_ids: Tensor | None, coefficients: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One launch where the device can hold a row pair: the bits of two, and zeros as the statistics of a row
        whose coefficients are all 0."""
        if not self.holds_rows(self.module, pair):
            return super().row_stats_grad(pair, token_ids, coefficients, out)
        ids_at, _ids = pointer(token_ids, torch.int64)
        coefficients_at, _coefficients = pointer(coefficients, torch.float32)
        stats, grad = per_row(pair, len(RowStats._fields)), gradient_of(pair, out)
        outputs = (stats.data_ptr(), self.rows(grad), grad.shape[-1])
        self.run("row_stats_grad", pair, ids_at, coefficients_at, *outputs)
        return stats, grad

    def row_divergence(self, pair: Pair, mask: Tensor | None, stats: Tensor, divergence: str, beta: float) -> Tensor:
        mask_at, _mask = pointer(mask, torch.bool)
        stats_at, _stats = pointer(stats, torch.float32)
        out = per_row(pair, 2)
        self.run("row_divergence", pair, code_of(divergence), beta, mask_at, stats_at, out.data_ptr())
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
        grad = gradient_of(pair, out)
        inputs = (code_of(divergence), beta, stats_at, values_at, scale_at)
        self.run("row_divergence_grad", pair, *inputs, self.rows(grad), grad.shape[-1])
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
        outputs = (token_ids.data_ptr(), logprobs.data_ptr(), from_teacher.data_ptr())
        self.run("row_sample", pair, uniforms_at, alpha, top_k, top_p, greedy, *outputs)
        return token_ids, logprobs, from_teacher

    def run(self, operation: str, pair: Pair, *args: object) -> None:
        teacher = None if pair.teacher is None else self.rows(pair.teacher)
        rows = (self.rows(pair.student), teacher, pair.n_rows, pair.vocab_size, pair.temperature)
        self.call(self.module, operation, pair, *rows, *args)

    def rows(self, x: Tensor) -> object:
        return self.module.Rows(x.data_ptr(), DTYPES[x.dtype], *row_strides(x))


def pointer(x: Tensor | None, dtype: torch.dtype) -> tuple[int, Tensor | None]:
    """The address of a small per-row tensor in the type that the core expects, and the tensor that must stay alive."""
    if x is None:
        return 0, None
    x = x.to(dtype).contiguous()
    return x.data_ptr(), x


def per_row(pair: Pair, fields: int) -> Tensor:
    return pair.student.new_empty((fields, *pair.student.shape[:-1]), dtype=torch.float32)


def gradient_of(pair: Pair, out: Tensor | None) -> Tensor:
    return pair.student.new_empty(pair.student.shape) if out is None else out


def code_of(divergence: str) -> int:
    return MIXTURE_DIVERGENCES.index(divergence)
