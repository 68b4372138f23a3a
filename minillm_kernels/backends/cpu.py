"""The compiled CPU backend: csrc/cpu through minillm_kernels._core."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..rows import Pair
from . import compiled

operations: Any = compiled.core.cpu if compiled.core is not None else None


def advise(x: Tensor) -> Tensor:
    """Huge pages for a large CPU tensor that nothing was written to yet: their faults cost far less. Returns it."""
    if operations is not None and type(x) is Tensor and x.device.type == "cpu":  # no fake tensor
        operations.advise_huge_pages(x.data_ptr(), x.numel() * x.element_size())
    return x


def gradient_like(x: Tensor) -> Tensor:
    """Above 32 MiB, where every malloc is of fresh pages, on those of the gradient that was freed last."""
    if x.numel() * x.element_size() <= 32 << 20:
        return x.new_empty(x.shape)
    pages = operations.Pages(x.numel() * x.element_size())
    return torch.frombuffer(pages, dtype=x.dtype, count=x.numel()).view(x.shape)


def launch(pair: Pair) -> nullcontext[int]:
    """The number of threads: waking them takes longer than 32768 elements do, torch's own grain. The same bits
    either way."""
    return nullcontext(torch.get_num_threads() if pair.n_rows * pair.vocab_size > 32768 else 1)


backend = compiled.Compiled(
    device="cpu",
    operations=operations,
    why_not=lambda: compiled.missing,
    launch=launch,
    holds_rows=lambda operations, pair: True,  # in its cache
    gradient_like=gradient_like,
)
