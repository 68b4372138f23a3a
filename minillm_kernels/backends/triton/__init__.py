"""The Triton backend: CUDA tensors, and CPU tensors in Triton's interpreter. One file per kernel, the mathematics in
rowmath.py. Triton is imported when an operation first runs; importing this package needs neither it nor a GPU."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...rows import Pair
from ..protocol import Backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MINIMUM = (8, 0)  # compute capability: what the kernels are compiled for and counted on
OLDEST = (3, 6)  # Triton whose compiler takes every kernel: .ci/run compiles with it and with the newest


def interpreted() -> bool:
    """Whether Triton's functions are, or would be, run by its interpreter: it asks when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def version() -> str | None:
    """Of the installed Triton, without importing it; None where there is none."""
    for distribution in ("triton", "pytorch-triton"):  # the second comes with torch's nightly builds
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@contextmanager
def _launching(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device. In its interpreter numpy warns of infinities, which are meant."""
    if interpreted():
        import numpy

        with numpy.errstate(all="ignore"):
            yield
    else:
        with torch.cuda.device(x.get_device()):
            yield


class Triton(Backend):
    def unavailable(self) -> str | None:
        found = version()
        if found is None:
            return "Triton is not installed; `pip install triton` (Linux)"
        if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < OLDEST:
            return f"it needs Triton {OLDEST[0]}.{OLDEST[1]} or newer, installed is {found}; `pip install -U triton`"
        if interpreted():
            return None
        if torch.version.hip:
            return "it has not been tried on ROCm; the reference runs there"
        if not torch.cuda.is_available():
            return "there is no CUDA device; set TRITON_INTERPRET=1 before Python starts to run CPU tensors, slowly"
        if torch.cuda.get_device_capability() < _MINIMUM:
            return f"it needs compute capability 8.0, this device has {torch.cuda.get_device_capability()}"
        return None

    def refusal(self, x: Tensor) -> str | None:
        if x.dtype not in _DTYPES:
            return f"it takes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
        if interpreted():
            return None if x.device.type == "cpu" else f"its interpreter takes CPU tensors, not {x.device.type}"
        if x.device.type == "cuda":
            return None
        if x.device.type == "cpu":
            return "a CPU tensor runs only in its interpreter: set TRITON_INTERPRET=1 before Python starts"
        return f"it takes CUDA tensors, not {x.device.type}"

    def row_stats(self, pair: Pair, token_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        from .stats import row_stats

        with _launching(pair.student):
            return row_stats(pair, token_ids, mask)

    def row_grad(
        self,
        pair: Pair,
        token_ids: Tensor | None,
        stats: Tensor,
        coefficients: Tensor,
        out: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        from .grad import row_grad

        with _launching(pair.student):
            return row_grad(pair, token_ids, stats, coefficients, out, factor)

    def row_scale(self, x: Tensor, factor: Tensor) -> None:
        from .scale import row_scale

        with _launching(x):
            row_scale(x, factor)

    def row_divergence(self, pair: Pair, mask: Tensor | None, stats: Tensor, divergence: str, beta: float) -> Tensor:
        from .divergence import row_divergence

        with _launching(pair.student):
            return row_divergence(pair, mask, stats, divergence, beta)

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
        from .divergence import row_divergence_grad

        with _launching(pair.student):
            return row_divergence_grad(pair, stats, values, scale, divergence, beta, out)

    def row_sample(
        self, pair: Pair, uniforms: Tensor, alpha: float, top_k: int, top_p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        from .sample import row_sample

        with _launching(pair.student):
            return row_sample(pair, uniforms, alpha, top_k, top_p)


backend = Triton()


# ---- Triton's alone: rows whose logits are never in memory (linear.py); minillm_kernels/hidden/tiled.py calls them


def linear_stats(student, teacher, token_ids, mask, temperature: float, vocab_size: int) -> Tensor:
    from . import linear

    with _launching(student.hidden):
        return linear.linear_stats(student, teacher, token_ids, mask, temperature, vocab_size)


def linear_grad_tile(
    student, teacher, token_ids, stats, coefficients, temperature: float, vocab_size: int, out: Tensor, start: int
) -> Tensor:
    from . import linear

    with _launching(student.hidden):
        return linear.linear_grad_tile(
            student, teacher, token_ids, stats, coefficients, temperature, vocab_size, out, start
        )
