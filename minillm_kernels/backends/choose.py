"""The implementations of the row operations, and which of them runs.

A backend is a module with `row_stats`, `row_grad`, `row_divergence`, `row_divergence_grad`, `row_sample` (the
signatures of reference.py), `unavailable()`: why it does not run here, or None, and `refusal(tensor)`:
why it cannot take a tensor, or None. It may have `row_stats_grad`, statistics and gradient at once for coefficients
that are known beforehand, and `holds_rows(student, teacher, vocab_size)`: whether that takes these rows. CPU tensors
take cpu, then reference; CUDA tensors cuda, then triton, then reference. The backend is chosen at the forward pass and
kept for the backward pass.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, cuda, reference, triton

_logger = logging.getLogger("minillm_kernels")
_BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}
# By device, the first that can; other devices: reference.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_forced: list[str] = []
_state = {"last": "none"}
_logged: set[str] = set()


def _known(name: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(_BACKENDS)}")
    return name


if os.environ.get("MINILLM_KERNELS_BACKEND"):
    _forced.append(_known(os.environ["MINILLM_KERNELS_BACKEND"]))


def available_backends() -> dict[str, str]:
    """For each backend "ok", or why it does not run here."""
    return {name: backend.unavailable() or "ok" for name, backend in _BACKENDS.items()}


def last_backend() -> str:
    """The backend of the operation that ran last in this process, "none" before the first."""
    return _state["last"]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every operation inside runs on this backend or raises: there is no fall-back.

    Raises ValueError for an unknown name, RuntimeError when the backend does not run here.
    """
    reason = _BACKENDS[_known(name)].unavailable()
    if reason:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def requested() -> str:
    """The backend asked for, or "auto": an argument of every operation, so a compiled graph is guarded on it."""
    return _forced[-1] if _forced else "auto"


def resolve(name: str, *tensors: Tensor | None) -> str:
    """The backend that will run on these tensors: `name`, or for "auto" the first on their device that can."""
    given = [x for x in tensors if x is not None]
    if name != "auto":
        for x in given:
            reason = _BACKENDS[name].unavailable() or _BACKENDS[name].refusal(x)
            if reason:
                raise RuntimeError(f"backend {name!r} cannot do this: {reason}")
        return name
    for candidate in _ORDER.get(given[0].device.type, ("reference",)):
        backend = _BACKENDS[candidate]
        reason = backend.unavailable() or next(filter(None, map(backend.refusal, given)), None)
        if reason is None:
            return candidate
        _log_once(candidate, reason)
    raise RuntimeError(f"no backend takes these tensors: {available_backends()}")


def kept(name: str, *tensors: Tensor | None) -> str:
    """The name for the backward pass of an operation that ran on these tensors under `name`."""
    if name != "auto" or torch.compiler.is_compiling():
        return name
    return resolve(name, *tensors)


def _log_once(name: str, reason: str) -> None:
    message = f"backend {name!r} is passed over: {reason}"
    if message not in _logged:
        _logged.add(message)
        _logger.warning(message)


def stats_and_gradient(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    token_ids: Tensor | None,
    coefficients: Tensor,
    temperature: float,
    vocab_size: int,
    *out: Tensor,
) -> tuple[Tensor, Tensor]:
    """row_stats and row_grad of rows that all have a coefficient: one launch where the backend can hold a row pair."""
    holds_rows = getattr(_BACKENDS[name], "holds_rows", None)
    row, settings = (student, teacher, token_ids), (temperature, vocab_size)
    if holds_rows is not None and holds_rows(student, teacher, vocab_size):
        return run(name, "row_stats_grad", *row, coefficients, *settings, *out)
    stats = run(name, "row_stats", *row, None, *settings)
    return stats, run(name, "row_grad", *row, stats, coefficients, *settings, *out)


def run(name: str, operation: str, *args):
    """Runs one operation of a resolved backend."""
    _state["last"] = name
    return getattr(_BACKENDS[name], operation)(*args)
