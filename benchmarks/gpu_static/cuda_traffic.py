"""Bytes and 32-byte sectors that a row moves in the CUDA kernels, counted by their host build: every load and store of
logits, gradients and statistics, and on top the workspace, which is written and read once."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from minillm_kernels.rows import MIXTURE_DIVERGENCES

from .triton_kernels import TYPES, N, V, _rows

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "tools"))
import host_build

HELD = {"bf16": 50256, "fp32": 28672}  # columns of row_stats_grad: what an H100's shared memory holds
TILE = 1024  # columns of csrc/cuda/row_sample.cuh: one is read a second time to draw a token from it


def traffic() -> list[dict]:
    from minillm_kernels.backends.cuda import _Cuda

    class OnHost(_Cuda):
        module = host_build.module()

        def call(self, operation, student, n_rows, vocab_size, *args):
            size = getattr(self.module, f"cuda_{operation}_workspace", None)
            self.workspace = size(n_rows, vocab_size) if size else 0
            workspace = torch.empty(self.workspace, dtype=torch.uint8)
            getattr(self.module, f"cuda_{operation}")(workspace.data_ptr(), 0, *args)

    run = OnHost()
    found = []

    def count(label: str, least: int, operation: str, *args):
        run.module.count(True)
        result = getattr(run, operation)(*args)
        c = run.module.counters()
        run.module.count(False)
        used = run.workspace // 2 if operation == "row_sample" else run.workspace  # it has room for a second model
        moved = (c["loaded"] + c["stored"] + 2 * used) // N
        sectors = (c["sectors_loaded"] + c["sectors_stored"]) // N
        counted = {"bytes_per_row": moved, "sectors_per_row": sectors, "least": least}
        found.append({"kernel": label, **counted, "of_minimum": round(moved / least, 4)})
        return result

    ones, uniforms = torch.ones(5, N), torch.full((N, 2), 0.5, dtype=torch.float64)
    for label, dtype in TYPES.items():
        s, t, row = _rows(dtype), _rows(dtype), V * dtype.itemsize
        stats = count(f"row_stats {label}", 2 * row, "row_stats", s, t, None, None, 1.0, V)
        one = count(f"row_stats, one model {label}", row, "row_stats", s, None, None, None, 1.0, V)
        count(f"row_grad {label}", 3 * row, "row_grad", s, t, None, stats, ones, 1.0, V)
        count(f"row_grad, one model {label}", 2 * row, "row_grad", s, None, None, one, ones, 1.0, V)
        held = HELD[label]
        pair = (s[:, :held].contiguous(), t[:, :held].contiguous())
        least = 3 * held * dtype.itemsize
        count(f"row_stats_grad {label}", least, "row_stats_grad", *pair, None, ones, 1.0, held)
        for kind in MIXTURE_DIVERGENCES:
            values = count(f"{kind} {label}", 2 * row, "row_divergence", s, t, None, stats, kind, 0.5, 1.0, V)
            args = (s, t, stats, values, ones[0], kind, 0.5, 1.0, V)
            count(f"{kind} gradient {label}", 3 * row, "row_divergence_grad", *args)
        least = row + TILE * dtype.itemsize
        count(f"mixed_sample, one model {label}", least, "row_sample", s, None, uniforms, 0.0, 1.0, 0, 1.0, V)
    return found
