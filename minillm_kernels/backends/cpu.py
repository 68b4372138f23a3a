"""The compiled CPU backend: csrc/cpu through minillm_kernels._core."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compiled

_core = compiled.core


def unavailable() -> str | None:
    return compiled.missing()


def refusal(x: Tensor) -> str | None:
    return compiled.refusal(x, "cpu")


def advise(x: Tensor) -> Tensor:
    """Huge pages for a large CPU tensor that nothing was written to yet: their faults cost far less. Returns it."""
    if _core is not None and type(x) is Tensor and x.device.type == "cpu":  # no fake tensor
        _core.advise_huge_pages(x.data_ptr(), x.numel() * x.element_size())
    return x


class _Cpu(compiled.Compiled):
    def call(self, operation: str, student: Tensor, n_rows: int, vocab_size: int, *args: object) -> None:
        # Waking threads takes longer than 32768 elements do: torch's own grain, and the same bits either way.
        threads = torch.get_num_threads() if n_rows * vocab_size > 32768 else 1
        getattr(self.module, operation)(threads, *args)


_operations = _Cpu()
row_stats = _operations.row_stats
row_grad = _operations.row_grad
row_divergence = _operations.row_divergence
row_divergence_grad = _operations.row_divergence_grad
row_sample = _operations.row_sample
