"""The compiled CUDA backend: csrc/cuda through minillm_kernels._core, on the current stream of the tensors' device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..rows import RowStats
from . import compiled

_core = compiled.core


def unavailable() -> str | None:
    missing = compiled.missing()
    if missing or _core is None:
        return missing
    if not _core.CUDA_ARCHITECTURES:
        return (
            "the compiled core was built without nvcc; put nvcc on PATH (or set CUDA_HOME) and install again with "
            "MINILLM_CUDA=1"
        )
    driver, runtime = _core.cuda_versions()
    if driver == 0:
        return "there is no CUDA driver on this machine"
    if driver // 1000 < runtime // 1000:
        return (
            f"the CUDA driver is too old: it supports CUDA {_version(driver)}, the core was built with "
            f"{_version(runtime)}; update the driver, or install again with an nvcc of CUDA {driver // 1000}"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: " + (
            "it was built without CUDA" if torch.version.cuda is None else "see torch.cuda.init()"
        )
    return None


def _version(v: int) -> str:
    return f"{v // 1000}.{v % 1000 // 10}"


def refusal(x: Tensor) -> str | None:
    return compiled.refusal(x, "cuda")


class _Cuda(compiled.Compiled):
    """Beside the operations of every backend `row_stats_grad`, which reads the logits once."""

    @contextmanager
    def stream_of(self, x: Tensor) -> Iterator[int]:
        """The current stream of the tensor's device, which is the current device inside."""
        with torch.cuda.device(x.device):
            yield torch.cuda.current_stream().cuda_stream

    def call(self, operation: str, student: Tensor, n_rows: int, vocab_size: int, *args: object) -> None:
        size = getattr(self.module, f"cuda_{operation}_workspace", None)
        workspace = student.new_empty(size(n_rows, vocab_size) if size else 0, dtype=torch.uint8)
        with self.stream_of(student) as stream:
            getattr(self.module, f"cuda_{operation}")(workspace.data_ptr(), stream, *args)

    def holds_rows(self, student: Tensor, teacher: Tensor | None, vocab_size: int) -> bool:
        """Whether row_stats_grad takes these: a multiprocessor can hold a row pair, and there are rows for all."""
        if teacher is None or teacher.dtype != student.dtype:
            return False
        with self.stream_of(student):
            n_rows = student.shape[:-1].numel()
            return self.module.cuda_holds_rows(n_rows, vocab_size, compiled.DTYPES[student.dtype])

    def row_stats_grad(
        self, student, teacher, token_ids, coefficients, temperature, vocab_size, out=None
    ) -> tuple[Tensor, Tensor]:
        """The results of row_stats and row_grad, the same bits; where a row's coefficients are all 0, zeros."""
        ids_at, _ids = compiled.pointer(token_ids, torch.int64)
        coefficients_at, _coefficients = compiled.pointer(coefficients, torch.float32)
        stats = student.new_empty((len(RowStats._fields), *student.shape[:-1]), dtype=torch.float32)
        grad = student.new_empty(student.shape) if out is None else out
        args = (ids_at, coefficients_at, stats.data_ptr(), self.rows(grad), grad.shape[-1])
        self.run("row_stats_grad", student, teacher, temperature, vocab_size, *args)
        return stats, grad


_operations = _Cuda()
row_stats = _operations.row_stats
row_grad = _operations.row_grad
row_divergence = _operations.row_divergence
row_divergence_grad = _operations.row_divergence_grad
row_sample = _operations.row_sample
row_stats_grad = _operations.row_stats_grad
holds_rows = _operations.holds_rows
