"""The compiled CUDA backend: csrc/cuda through minillm_kernels._core, on the current stream of the tensors' device."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..rows import Pair
from . import compiled

if TYPE_CHECKING:
    from .._core import Operations

operations: Any = compiled.core.cuda if compiled.core is not None and compiled.core.CUDA_ARCHITECTURES else None


def why_not() -> str | None:
    if compiled.missing is not None:
        return compiled.missing
    if operations is None:
        return (
            "the compiled core was built without nvcc; put nvcc on PATH (or set CUDA_HOME) and install again with "
            "MINILLM_CUDA=1"
        )
    driver, runtime = operations.versions()
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


class Launch:
    """Memory for an operation, and the current stream of the pair's device, which is the current device inside."""

    def __init__(self, pair: Pair) -> None:
        self.student = pair.student
        self.index = pair.student.get_device()
        self.device = torch.cuda.device(self.index)

    def __enter__(self) -> tuple[Callable[[int], int], int]:
        self.device.__enter__()
        return self.allocate, torch._C._cuda_getCurrentRawStream(self.index)

    def __exit__(self, *raised: object) -> None:
        self.device.__exit__(*raised)

    def allocate(self, size: int) -> int:
        """Asked for once at most."""
        self.workspace = self.student.new_empty(size, dtype=torch.uint8)
        return self.workspace.data_ptr()


def holds_rows(operations: Operations, pair: Pair) -> bool:
    """Whether a multiprocessor can hold two row pairs, or a cluster four, and there are rows for all of them."""
    if pair.teacher is None or pair.teacher.dtype != pair.student.dtype:
        return False
    return _holds(operations, pair.student.get_device(), pair.n_rows, pair.vocab_size, pair.student.dtype)


@lru_cache(4096)
def _holds(operations: Operations, device: int, n_rows: int, vocab_size: int, dtype: torch.dtype) -> bool:
    """What the driver says, which takes it longer than a launch."""
    with torch.cuda.device(device):
        return operations.holds_rows(n_rows, vocab_size, compiled.DTYPES[dtype])


backend = compiled.Compiled(
    device="cuda",
    operations=operations,
    why_not=why_not,
    launch=Launch,
    holds_rows=holds_rows,
    gradient_like=lambda x: x.new_empty(x.shape),
)
