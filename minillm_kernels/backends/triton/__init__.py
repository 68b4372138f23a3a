"""The Triton backend: CUDA tensors, and CPU tensors in Triton's interpreter. One file per kernel, the mathematics in
rowmath.py. Triton is imported when an operation first runs; importing this package needs neither it nor a GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MINIMUM = (8, 0)  # compute capability: what the kernels are compiled for and counted on


def interpreted() -> bool:
    """Whether Triton's functions are, or would be, run by its interpreter: it asks when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def unavailable() -> str | None:
    if not _installed():
        return "Triton is not installed; `pip install triton` (Linux)"
    if interpreted():
        return None
    if torch.version.hip:
        return "it has not been tried on ROCm; the reference runs there"
    if not torch.cuda.is_available():
        return "there is no CUDA device; set TRITON_INTERPRET=1 before Python starts to run CPU tensors, slowly"
    if torch.cuda.get_device_capability() < _MINIMUM:
        return f"it needs compute capability 8.0, this device has {torch.cuda.get_device_capability()}"
    return None


def refusal(x: Tensor) -> str | None:
    if x.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    if interpreted():
        return None if x.device.type == "cpu" else f"its interpreter takes CPU tensors, not {x.device.type}"
    if x.device.type == "cuda":
        return None
    if x.device.type == "cpu":
        return "a CPU tensor runs only in its interpreter: set TRITON_INTERPRET=1 before Python starts"
    return f"it takes CUDA tensors, not {x.device.type}"


def _operation(module: str, name: str):
    def run(*args):
        function = getattr(importlib.import_module(f".{module}", __name__), name)
        if interpreted():
            return _quietly(function, *args)
        first = args[0] if isinstance(args[0], Tensor) else args[0].hidden  # logits, or a Head
        with torch.cuda.device(first.device):  # Triton launches on the current device
            return function(*args)

    return run


def _quietly(function, *args):
    """In the interpreter numpy warns of infinities, which are meant."""
    import numpy

    with numpy.errstate(all="ignore"):
        return function(*args)


row_stats = _operation("stats", "row_stats")
row_grad = _operation("grad", "row_grad")
row_divergence = _operation("divergence", "row_divergence")
row_divergence_grad = _operation("divergence", "row_divergence_grad")
row_sample = _operation("sample", "row_sample")
linear_stats = _operation("linear", "linear_stats")
linear_grad_tile = _operation("linear", "linear_grad_tile")
