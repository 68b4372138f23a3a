"""Which implementation of the row operations runs.

CPU tensors take cpu, then reference; CUDA tensors cuda, then triton, then reference; others reference. The backend is
asked for at the forward pass; the backward pass asks for the same, on the same tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import cpu, cuda, reference, request, triton
from .protocol import Backend

_logger = logging.getLogger("minillm_kernels")
BACKENDS: dict[str, Backend] = {
    "cuda": cuda.backend,
    "triton": triton.backend,
    "cpu": cpu.backend,
    "reference": reference.backend,
}
# By device, the first that can; other devices: reference.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_state = {"last": "none"}
_logged: set[str] = set()
_ready: set[Backend] = set()  # those that run on this machine, which is asked once: drivers take their time to answer


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return name


if request.NAME.get() != "auto":
    _known(request.NAME.get())  # of MINILLM_KERNELS_BACKEND


def available_backends() -> dict[str, str]:
    """Which backends run on this machine.

    Returns:
        For "cuda", "triton", "cpu" and "reference" each "ok", or why it does not run here and what to do about it.

    Examples:
        >>> from minillm_kernels import available_backends
        >>> available_backends()["reference"]
        'ok'
    """
    return {name: backend.unavailable() or "ok" for name, backend in BACKENDS.items()}


def last_backend() -> str:
    """The backend of the operation that ran last in this process.

    Returns:
        Its name, "none" before the first operation.

    Examples:
        >>> import torch
        >>> from minillm_kernels import last_backend, token_logprobs, use_backend
        >>> with use_backend("reference"):
        ...     logprobs = token_logprobs(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> last_backend()
        'reference'
    """
    return _state["last"]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """A context in which every operation runs on one backend or raises: there is no fall-back.

    Other threads and asyncio tasks keep their own choice. Outside of any such context the environment variable
    MINILLM_KERNELS_BACKEND chooses, and without it the device of the tensors.

    Args:
        name: "cuda", "triton", "cpu" or "reference".

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend does not run here; from an operation inside, it cannot take these tensors.

    Examples:
        >>> import torch
        >>> from minillm_kernels import fused_rkl_loss, use_backend
        >>> with use_backend("reference"):
        ...     fused_rkl_loss(torch.zeros(2, 4), torch.zeros(2, 4))
        tensor(0.)
    """
    reason = _obstacle(BACKENDS[_known(name)], [])
    if reason:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    token = request.NAME.set(name)
    try:
        yield
    finally:
        request.NAME.reset(token)


def requested() -> str:
    """The backend asked for, or "auto": an argument of every operation, so a compiled graph is guarded on it."""
    return request.name if torch.compiler.is_compiling() else request.NAME.get()


def resolve(name: str | Backend, *tensors: Tensor | None) -> Backend:
    """The backend that runs on these tensors: `name`, or for "auto" the first on their device that can; a backend is
    itself.

    Raises RuntimeError where the backend of that name cannot.
    """
    if not isinstance(name, str):
        return name
    chosen = _choose(name, tensors)
    _state["last"] = chosen
    return BACKENDS[chosen]


def _choose(name: str, tensors: tuple[Tensor | None, ...]) -> str:
    given = [x for x in tensors if x is not None]
    if name != "auto":
        reason = _obstacle(BACKENDS[name], given)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot do this: {reason}")
        return name
    for candidate in _ORDER.get(given[0].device.type, ("reference",)):
        reason = _obstacle(BACKENDS[candidate], given)
        if reason is None:
            return candidate
        _log_once(candidate, reason)
    raise RuntimeError(f"no backend takes these tensors: {available_backends()}")


def _obstacle(backend: Backend, tensors: list[Tensor]) -> str | None:
    """Why that backend does not run on these tensors, or None."""
    if backend not in _ready:
        if (reason := backend.unavailable()) is not None:
            return reason
        _ready.add(backend)
    for x in tensors:
        if (reason := backend.refusal(x)) is not None:
            return reason
    return None


def _log_once(name: str, reason: str) -> None:
    message = f"backend {name!r} is passed over: {reason}"
    if message not in _logged:
        _logged.add(message)
        _logger.warning(message)
