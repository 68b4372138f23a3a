"""Losses of hidden states and head weights against eager, torch.compile and the peers' chunked losses.

Bound: the matmuls that no implementation can leave out (a row of its own), four for two models, three for one. Peak
memory is that of a process of its own; benchmarks/linear_rows.py says what is counted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from linear_rows import ROWS, problem, step
from torch import Tensor

from minillm_kernels.hidden.matmul import linear

SHAPES = [(1024, 576, 49152), (256, 1024, 151936)]
# The second shape, seconds a step, has only the rows that the comparison rests on: all fit in five minutes.
CASES = [(loss, row, *SHAPES[0]) for loss, rows in ROWS.items() for row in rows]
CASES += [("reverse_kl", row, *SHAPES[1]) for row in ("minillm", "eager", "four matmuls")]
NEEDS = {"trl chunked": "trl", "liger chunked": "liger_kernel"}


def own_process(loss: str, row: str, *shape: int) -> dict[str, int]:
    """The peaks of one row in a process that does nothing else; empty where the kernel does not tell."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return {}
    command = [sys.executable, "linear_rows.py", loss, row, *map(str, shape)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
    folder = Path(__file__).parent
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=environment)
    return json.loads(result.stdout)


@lru_cache(maxsize=1)  # cases of one loss and shape follow one another
def truth_of(loss: str, *shape: int) -> tuple[tuple[Tensor, ...], Tensor, list[Tensor]]:
    """The problem, eager's value and its gradients."""
    tensors = problem(*shape)
    value = step(loss, "eager", tensors)
    return tensors, value, [x.grad for x in tensors[:2]]


@pytest.mark.parametrize(("loss", "row", "N", "H", "V"), CASES)
def test_forward_backward(measure, loss, row, N, H, V):
    if row in NEEDS and importlib.util.find_spec(NEEDS[row]) is None:
        pytest.skip(f"{NEEDS[row]} is not installed")
    (tensors, truth, gradients), info = truth_of(loss, N, H, V), {}
    value = step(loss, row, tensors)
    if "matmuls" not in row:
        assert torch.allclose(value, truth, rtol=1e-4)
        for ours, exact in zip(tensors[:2], gradients, strict=True):
            assert (ours.grad - exact).abs().max() <= 1e-3 * exact.abs().max()
        info = {f"{name}_MiB": round(size / 2**20, 1) for name, size in own_process(loss, row, N, H, V).items()}
    measure(f"linear {loss} forward+backward fp32-{N}x{H}x{V}", (N, V), torch.float32)(
        lambda: step(loss, row, tensors), rounds=2, implementation=row, **info
    )


@pytest.mark.parametrize("rows", [8, 256])
@pytest.mark.parametrize("implementation", ["minillm", "torch.mm"])
def test_head(measure, implementation, rows):
    """The logits alone, of a decode step and of a chunk: by the library that matmul.py takes, and by torch.mm."""
    hidden, weight = torch.randn(rows, 576), torch.randn(49152, 576)
    out = torch.empty(rows, len(weight))
    fn = {"minillm": lambda: linear(hidden, weight, out), "torch.mm": lambda: torch.mm(hidden, weight.t(), out=out)}
    assert torch.allclose(fn[implementation](), hidden @ weight.t(), rtol=1e-4, atol=1e-3)
    measure(f"head {rows}x576x49152", (rows, len(weight)), torch.float32)(
        fn[implementation], rounds=5, implementation=implementation
    )
