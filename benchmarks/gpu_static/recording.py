"""Compiles what a Triton launcher launches, for a GPU that is not there.

    with recording(90) as launches:
        stats.row_stats(student, teacher, token_ids, None, 1.0, V)   # of minillm_kernels.backends.triton, CPU tensors

Each launch goes through Triton's own specialisation of its arguments (alignment, constants, types), so the kernels are
those that a launch on such a GPU would compile; they are kept, not run, and the outputs stay unwritten. `run` is
called with each launch instead: tests/ptx hands it to an executor of PTX. Not with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    function: JITFunction
    kernel: Any  # triton's CompiledKernel: .asm, .metadata
    grid: tuple[int, ...]
    arguments: list  # those that the compiled kernel takes: flat, without constants

    @property
    def name(self) -> str:
        return self.kernel.metadata.name

    @property
    def threads(self) -> int:
        return 32 * self.kernel.metadata.num_warps


class _Driver:
    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # a device of its own, hence a cache of its own, for each architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _flat(value, kind) -> list:
    if isinstance(kind, tuple):
        return [x for v, k in zip(value, kind, strict=True) for x in _flat(v, k)]
    return [] if kind == "constexpr" else [value]


@contextmanager
def recording(architecture: int, run: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled; unset it before Python starts")
    launches: list[Launch] = []
    compile_and_run = JITFunction.run

    def record(self, *args, grid, warmup, **options):
        kernel = compile_and_run(self, *args, grid=grid, warmup=True, **options)
        names = {k: v for k, v in options.items() if k in self.arg_names}
        bound = inspect.signature(self.fn).bind(*args, **names).arguments
        kinds = kernel.src.signature
        flat = [x for name, value in bound.items() for x in _flat(value, kinds[name])]
        launch = Launch(self, kernel, grid, flat)
        launches.append(launch)
        if run is not None:
            run(launch)
        return kernel

    JITFunction.run = record
    driver.set_active(_Driver(architecture))
    try:
        yield launches
    finally:
        JITFunction.run = compile_and_run
        driver._active = None
