"""The compiled CPU backend: csrc/cpu through minillm_kernels._core."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rows import Pair
from . import compiled

_core = compiled.core


def advise(x: Tensor) -> Tensor:
    """Huge pages for a large CPU tensor that nothing was written to yet: their faults cost far less. Returns it."""
    if _core is not None and type(x) is Tensor and x.device.type == "cpu":  # no fake tensor
        _core.advise_huge_pages(x.data_ptr(), x.numel() * x.element_size())
    return x


def _call(module: Any, operation: str, pair: Pair, *args: object) -> None:
    # Waking threads takes longer than 32768 elements do: torch's own grain, and the same bits either way.
    threads = torch.get_num_threads() if pair.n_rows * pair.vocab_size > 32768 else 1
    getattr(module, operation)(threads, *args)


backend = compiled.Compiled("cpu", _core, compiled.missing, _call, holds_rows=lambda module, pair: False)
