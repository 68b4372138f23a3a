"""The compiled CPU backend: csrc/cpu through minillm_kernels._core."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import MIXTURE_DIVERGENCES, RowStats

try:
    # After torch: the core then shares torch's OpenMP, hence its threads.
    from .. import _core
except ImportError as error:
    _core = None  # type: ignore[assignment]
    _import_error = str(error)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unavailable() -> str | None:
    if _core is None:
        return (
            f"the compiled core is missing ({_import_error}); install a C++ compiler and run "
            "`pip install -e .` (or `pip install .`) in the repository again"
        )
    return None


def refusal(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"it takes CPU tensors, not {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    return None


def advise(x: Tensor) -> Tensor:
    """Huge pages for a large CPU tensor that nothing was written to yet: their faults cost far less. Returns it."""
    if _core is not None and type(x) is Tensor and x.device.type == "cpu":  # no fake tensor
        _core.advise_huge_pages(x.data_ptr(), x.numel() * x.element_size())
    return x


def _rows(x: Tensor):
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
            f"logits of shape {tuple(x.shape)} and strides {x.stride()}: at most two strides may describe the rows; "
            "call .contiguous() first"
        )
    inner = sizes[-1] if sizes else 1
    inner_stride = strides[-1] if sizes else 0
    outer_stride = strides[0] if len(sizes) == 2 else 0
    return _core.Rows(x.data_ptr(), _DTYPES[x.dtype], max(inner, 1), outer_stride, inner_stride)


def _common(student: Tensor, teacher: Tensor | None, temperature: float, vocab_size: int):
    n_rows = student.shape[:-1].numel()
    # Waking threads takes longer than 32768 elements do: torch's own grain, and the same bits either way.
    threads = torch.get_num_threads() if n_rows * vocab_size > 32768 else 1
    return (_rows(student), None if teacher is None else _rows(teacher), n_rows, vocab_size, temperature, threads)


def _pointer(x: Tensor | None, dtype: torch.dtype) -> tuple[int, Tensor | None]:
    """The address of a small per-row tensor in the type that the core expects, and the tensor that must stay alive."""
    if x is None:
        return 0, None
    x = x.to(dtype).contiguous()
    return x.data_ptr(), x


def row_stats(student, teacher, token_ids, mask, temperature, vocab_size) -> Tensor:
    ids_at, _ids = _pointer(token_ids, torch.int64)
    mask_at, _mask = _pointer(mask, torch.bool)
    stats = torch.empty((len(RowStats._fields), *student.shape[:-1]), dtype=torch.float32)
    _core.row_stats(*_common(student, teacher, temperature, vocab_size), mask_at, ids_at, stats.data_ptr())
    return stats


def row_grad(student, teacher, token_ids, stats, coefficients, temperature, vocab_size, out=None) -> Tensor:
    ids_at, _ids = _pointer(token_ids, torch.int64)
    stats_at, _stats = _pointer(stats, torch.float32)
    coefficients_at, _coefficients = _pointer(coefficients, torch.float32)
    grad = torch.empty(student.shape, dtype=student.dtype) if out is None else out
    common = _common(student, teacher, temperature, vocab_size)
    _core.row_grad(*common, ids_at, stats_at, coefficients_at, _rows(grad), grad.shape[-1])
    return grad


def row_divergence(student, teacher, mask, stats, divergence, beta, temperature, vocab_size) -> Tensor:
    mask_at, _mask = _pointer(mask, torch.bool)
    stats_at, _stats = _pointer(stats, torch.float32)
    out = torch.empty((2, *student.shape[:-1]), dtype=torch.float32)
    kind = MIXTURE_DIVERGENCES.index(divergence)
    common = _common(student, teacher, temperature, vocab_size)
    _core.row_divergence(*common, kind, beta, mask_at, stats_at, out.data_ptr())
    return out


def row_divergence_grad(
    student, teacher, stats, values, scale, divergence, beta, temperature, vocab_size, out=None
) -> Tensor:
    stats_at, _stats = _pointer(stats, torch.float32)
    values_at, _values = _pointer(values, torch.float32)
    scale_at, _scale = _pointer(scale, torch.float32)
    grad = torch.empty(student.shape, dtype=student.dtype) if out is None else out
    kind = MIXTURE_DIVERGENCES.index(divergence)
    common = _common(student, teacher, temperature, vocab_size)
    _core.row_divergence_grad(*common, kind, beta, stats_at, values_at, scale_at, _rows(grad), grad.shape[-1])
    return grad


def row_sample(
    student, teacher, uniforms, alpha, temperature, top_k, top_p, vocab_size
) -> tuple[Tensor, Tensor, Tensor]:
    uniforms_at, _uniforms = _pointer(uniforms, torch.float64)
    leading = student.shape[:-1]
    token_ids = torch.empty(leading, dtype=torch.int64)
    logprobs = torch.empty((3, *leading), dtype=torch.float32)
    from_teacher = torch.empty(leading, dtype=torch.bool)
    greedy = temperature == 0
    _core.row_sample(
        *_common(student, teacher, 1.0 if greedy else temperature, vocab_size),
        uniforms_at,
        alpha,
        top_k,
        top_p,
        greedy,
        token_ids.data_ptr(),
        logprobs.data_ptr(),
        from_teacher.data_ptr(),
    )
    return token_ids, logprobs, from_teacher
