"""The compiled CUDA backend: csrc/cuda through minillm_kernels._core, on the current stream of the tensors' device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..rows import Pair
from . import compiled

_core = compiled.core


def _why_not() -> str | None:
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


@contextmanager
def stream_of(x: Tensor) -> Iterator[int]:
    """The current stream of the tensor's device, which is the current device inside."""
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream().cuda_stream


def _call(module: Any, operation: str, pair: Pair, *args: object) -> None:
    size = getattr(module, f"cuda_{operation}_workspace", None)
    workspace = pair.student.new_empty(size(pair.n_rows, pair.vocab_size) if size else 0, dtype=torch.uint8)
    with stream_of(pair.student) as stream:
        getattr(module, f"cuda_{operation}")(workspace.data_ptr(), stream, *args)


def _holds_rows(module: Any, pair: Pair) -> bool:
    """Whether a multiprocessor can hold a row pair, and there are rows for all of them."""
    if pair.teacher is None or pair.teacher.dtype != pair.student.dtype:
        return False
    with stream_of(pair.student):
        return module.cuda_holds_rows(pair.n_rows, pair.vocab_size, compiled.DTYPES[pair.student.dtype])


backend = compiled.Compiled("cuda", _core, _why_not, _call, _holds_rows)
