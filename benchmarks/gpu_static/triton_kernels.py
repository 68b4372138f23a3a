"""What the Triton kernels cost, from their disassembly: python -m benchmarks.gpu_static.triton_kernels

Needs Triton, no GPU. Writes "triton" in benchmarks/results/gpu-static.json: registers, spills and the main loop of
each kernel as a launch on such a GPU compiles it (recording.py); and "triton_traffic", the bytes that a row moves,
counted by Triton's interpreter in a process of its own (traffic.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from minillm_kernels.rows import MIXTURE_DIVERGENCES, Pair

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu-static.json"
ARCHITECTURES = (80, 90, 100)
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
N, V = 2, 151936  # Qwen's head: rows of 19 or 38 tiles


class Kernel(NamedTuple):
    """A launch, and what a column of it must read and write, in bytes."""

    label: str
    function: str  # of the kernel that is counted
    read: int
    written: int
    launch: Callable[[], object]
    extra: int = 0  # columns that it reads a second time: the tile from which a token is drawn


def _rows(dtype: torch.dtype, n: int = N) -> Tensor:
    return torch.randn(n, V, generator=torch.Generator().manual_seed(0)).to(dtype)


def row_kernels() -> list[Kernel]:
    from minillm_kernels.backends.triton import divergence, grad, sample, stats

    found = []
    for label, dtype in TYPES.items():
        s, t, size = _rows(dtype), _rows(dtype), dtype.itemsize
        statistics, coefficients = torch.zeros(11, N), torch.ones(5, N)

        def add(name, function, read, written, launch, label=label):
            found.append(Kernel(f"{name} {label}", function, read, written, launch))

        def gradient(s=s, t=t, statistics=statistics, coefficients=coefficients):
            return grad.row_grad(Pair(s, t, 1.0, V), None, statistics, coefficients)

        add(
            "row_stats",
            "row_stats_kernel",
            2 * size,
            0,
            lambda s=s, t=t: stats.row_stats(Pair(s, t, 1.0, V), None, None),
        )
        one = lambda s=s: stats.row_stats(Pair(s, None, 1.0, V), None, None)
        add("row_stats, one model", "row_stats_kernel", size, 0, one)
        add("row_grad", "row_grad_kernel", 2 * size, size, gradient)
        add("row_grad, one model", "row_grad_kernel", size, size, lambda f=gradient: f(t=None))
        for kind in MIXTURE_DIVERGENCES:
            row = (Pair(s, t, 1.0, V), statistics, statistics[:2], statistics[0] + 1, kind, 0.5)

            def value(s=s, t=t, kind=kind, statistics=statistics):
                return divergence.row_divergence(Pair(s, t, 1.0, V), None, statistics, kind, 0.5)

            add(kind, "row_divergence_kernel", 2 * size, 0, value)
            add(
                f"{kind} gradient",
                "row_divergence_grad_kernel",
                2 * size,
                size,
                lambda row=row: divergence.row_divergence_grad(*row),
            )
        uniforms = torch.full((N, 2), 0.5, dtype=torch.float64)
        draw = lambda s=s, u=uniforms: sample.row_sample(Pair(s, None, 1.0, V), u, 0.0, 0, 1.0)
        found.append(Kernel(f"mixed_sample, one model {label}", "tile_mass_kernel", size, 0, draw, sample.SIZE.value))
    return found


def linear_kernels() -> list[Kernel]:
    """Their loop is a matmul's: no bytes a column, but tensor-core instructions and no spill."""
    from minillm_kernels.backends.triton import linear
    from minillm_kernels.hidden.operands import Projection

    found = []
    for label, dtype in TYPES.items():
        n, width, hidden = 256, 4096, 1024
        tensors = [(torch.zeros(n, h, dtype=dtype), torch.zeros(width, h, dtype=dtype)) for h in (hidden, 2 * hidden)]
        heads = [Projection(*states_and_weight, None, 30.0, 1.0) for states_and_weight in tensors]
        tile = torch.zeros(n, 1024, dtype=dtype)
        args = (torch.zeros(n, dtype=torch.int64), torch.zeros(11, n), torch.ones(5, n), 1.0, width, tile, 0)

        def value(heads=heads, ids=args[0], width=width):
            return linear.linear_stats(*heads, ids, None, 1.0, width)

        def gradient(heads=heads, args=args):
            return linear.linear_grad_tile(*heads, *args)

        found.append(Kernel(f"linear_stats {label}", "linear_stats_kernel", 0, 0, value))
        found.append(Kernel(f"linear_grad_tile {label}", "linear_grad_kernel", 0, 0, gradient))
    return found


def measure(kernel: Kernel, architecture: int) -> dict:
    from . import sass
    from .recording import recording

    with recording(architecture) as launches:
        kernel.launch()
    launch = next(x for x in launches if x.name == kernel.function)
    options = (
        {"read_bytes": kernel.read, "written_bytes": kernel.written}
        if kernel.read
        else {"read_bytes": 0, "columns": 1}
    )
    cubin, shared = launch.kernel.asm["cubin"], launch.kernel.metadata.shared
    found = sass.report(cubin, launch.name, architecture, dynamic_shared=shared, **options)
    if not kernel.read:  # a matmul: of its loop only the tensor instructions say something
        keep = ("registers", "stack_bytes", "local_bytes", "shared_bytes", "spills", "tensor_instructions")
        found = {"architecture": architecture, **{k: found[k] for k in keep}}
    return {"kernel": kernel.label, **found}


def static() -> list[dict]:
    return [measure(k, architecture) for k in (*row_kernels(), *linear_kernels()) for architecture in ARCHITECTURES]


def traffic() -> list[dict]:
    """Bytes a row of V columns, over the least that it can move; in a process whose Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu_static.traffic"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    counted = {"triton": static(), "triton_traffic": traffic(), "triton_version": triton.__version__}
    results = {**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), **counted}
    results = {k: results[k] for k in sorted(results)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for x in results["triton"]:
        bound = f"{x['headroom']:.2f} of {x['gpu']}, {x['bound_by']}" if "headroom" in x else ""
        count = f"{x['instructions_per_column']:6.2f} instructions" if "instructions_per_column" in x else ""
        print(f"{x['kernel']:30} sm_{x['architecture']:<4}{x['registers']:4} registers {count} {bound}")
    for x in results["triton_traffic"]:
        print(f"{x['kernel']:30} {x['bytes_per_row']} bytes a row, {x['of_minimum']:.4f} of the least")


if __name__ == "__main__":
    main()
