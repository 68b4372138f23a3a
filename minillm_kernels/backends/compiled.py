"""What the compiled backends share: row operations on tensors, as the addresses, sizes and strides of csrc/rows.h."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..rows import MIXTURE_DIVERGENCES, RowStats

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


def refusal(x: Tensor, device: str) -> str | None:
    """Why a compiled backend of that device type cannot take this tensor, or None."""
    if x.device.type != device:
        return f"it takes {device.upper()} tensors, not {x.device.type}"
    if x.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    return None


class Compiled:
    """The row operations (see `minillm_kernels.backends.reference`) on a compiled module, by way of `call`."""

    module: Any = core

    def call(self, operation: str, student: Tensor, n_rows: int, vocab_size: int, *args: object) -> None:
        """Runs an operation of the module; args are its own, after those that say how to run it."""
        raise NotImplementedError

    def run(self, operation: str, student, teacher, temperature: float, vocab_size: int, *args: object) -> None:
        n_rows = student.shape[:-1].numel()
        teacher = None if teacher is None else self.rows(teacher)
        pair = (self.rows(student), teacher, n_rows, vocab_size, temperature)
        self.call(operation, student, n_rows, vocab_size, *pair, *args)

    def rows(self, x: Tensor):
        """The leading dimensions as (outer, inner) with two strides: no copy for logits[:, :-1]."""
        sizes: list[int] = []
        strides: list[int] = []
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if size == 1:
                continue
            if strides and strides[-1] == size * stride:
                sizes[-1], strides[-1] = sizes[-1] * size, stride
            else:
                sizes.append(size)
                strides.append(stride)
        if len(sizes) > 2:
            raise ValueError(
                f"logits of shape {tuple(x.shape)} and strides {x.stride()}: at most two strides may describe the "
                "rows; call .contiguous() first"
            )
        inner = sizes[-1] if sizes else 1
        inner_stride = strides[-1] if sizes else 0
        outer_stride = strides[0] if len(sizes) == 2 else 0
        return self.module.Rows(x.data_ptr(), DTYPES[x.dtype], max(inner, 1), outer_stride, inner_stride)

    def row_stats(self, student, teacher, token_ids, mask, temperature, vocab_size) -> Tensor:
        ids_at, _ids = pointer(token_ids, torch.int64)
        mask_at, _mask = pointer(mask, torch.bool)
        stats = student.new_empty((len(RowStats._fields), *student.shape[:-1]), dtype=torch.float32)
        self.run("row_stats", student, teacher, temperature, vocab_size, mask_at, ids_at, stats.data_ptr())
        return stats

    def row_grad(self, student, teacher, token_ids, stats, coefficients, temperature, vocab_size, out=None) -> Tensor:
        ids_at, _ids = pointer(token_ids, torch.int64)
        stats_at, _stats = pointer(stats, torch.float32)
        coefficients_at, _coefficients = pointer(coefficients, torch.float32)
        grad = student.new_empty(student.shape) if out is None else out
        args = (ids_at, stats_at, coefficients_at, self.rows(grad), grad.shape[-1])
        self.run("row_grad", student, teacher, temperature, vocab_size, *args)
        return grad

    def row_divergence(self, student, teacher, mask, stats, divergence, beta, temperature, vocab_size) -> Tensor:
        mask_at, _mask = pointer(mask, torch.bool)
        stats_at, _stats = pointer(stats, torch.float32)
        out = student.new_empty((2, *student.shape[:-1]), dtype=torch.float32)
        args = (MIXTURE_DIVERGENCES.index(divergence), beta, mask_at, stats_at, out.data_ptr())
        self.run("row_divergence", student, teacher, temperature, vocab_size, *args)
        return out

    def row_divergence_grad(
        self, student, teacher, stats, values, scale, divergence, beta, temperature, vocab_size, out=None
    ) -> Tensor:
        stats_at, _stats = pointer(stats, torch.float32)
        values_at, _values = pointer(values, torch.float32)
        scale_at, _scale = pointer(scale, torch.float32)
        grad = student.new_empty(student.shape) if out is None else out
        kind = MIXTURE_DIVERGENCES.index(divergence)
        args = (kind, beta, stats_at, values_at, scale_at, self.rows(grad), grad.shape[-1])
        self.run("row_divergence_grad", student, teacher, temperature, vocab_size, *args)
        return grad

    def row_sample(
        self, student, teacher, uniforms, alpha, temperature, top_k, top_p, vocab_size
    ) -> tuple[Tensor, Tensor, Tensor]:
        uniforms_at, _uniforms = pointer(uniforms, torch.float64)
        leading = student.shape[:-1]
        token_ids = student.new_empty(leading, dtype=torch.int64)
        logprobs = student.new_empty((3, *leading), dtype=torch.float32)
        from_teacher = student.new_empty(leading, dtype=torch.bool)
        greedy = temperature == 0
        args = (uniforms_at, alpha, top_k, top_p, greedy)
        outputs = (token_ids.data_ptr(), logprobs.data_ptr(), from_teacher.data_ptr())
        self.run("row_sample", student, teacher, 1.0 if greedy else temperature, vocab_size, *args, *outputs)
        return token_ids, logprobs, from_teacher


def pointer(x: Tensor | None, dtype: torch.dtype) -> tuple[int, Tensor | None]:
    """The address of a small per-row tensor in the type that the core expects, and the tensor that must stay alive."""
    if x is None:
        return 0, None
    x = x.to(dtype).contiguous()
    return x.data_ptr(), x
