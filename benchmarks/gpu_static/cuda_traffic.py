"""Bytes and 32-byte sectors that a row moves in the CUDA kernels, counted by their host build: every load and store of
logits, gradients and statistics, and on top the workspace, which is written and read once."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from minillm_kernels.rows import MIXTURE_DIVERGENCES, Pair

from .triton_kernels import TYPES, N, V, _rows

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "tools"))
import host_build

HELD = {"bf16": 28656, "fp32": 14328}  # columns of row_stats_grad: what a block holds where two share an H100's memory
TILE = 1024  # columns of csrc/cuda/row_sample.cuh: one is read a second time to draw a token from it


def traffic() -> list[dict]:
    module = host_build.module()
    workspaces: list[int] = []  # bytes that the launches asked for

    @contextmanager
    def launch(pair: Pair):
        with host_build.launch(pair) as (allocate, stream):

            def counted(size: int) -> int:
                workspaces.append(size)
                return allocate(size)

            yield counted, stream

    run = dataclasses.replace(host_build.backend(module), launch=launch, holds_rows=lambda operations, pair: True)
    found = []

    def count(label: str, least: int, operation: Callable, *args, sampled: bool = False):
        workspaces.clear()
        module.count(True)
        result = operation(*args)
        c = module.counters()
        module.count(False)
        used = sum(workspaces) // (2 if sampled else 1)  # that of a sample has room for a second model
        moved = (c["loaded"] + c["stored"] + 2 * used) // N
        sectors = (c["sectors_loaded"] + c["sectors_stored"]) // N
        row = {"bytes_per_row": moved, "sectors_per_row": sectors, "least": least}
        found.append({"kernel": label, **row, "of_minimum": round(moved / least, 4)})
        return result

    ones, uniforms = torch.ones(5, N), torch.full((N, 2), 0.5, dtype=torch.float64)
    for label, dtype in TYPES.items():
        s, t, row = _rows(dtype), _rows(dtype), V * dtype.itemsize
        pair, alone = Pair(s, t, 1.0, V), Pair(s, None, 1.0, V)
        stats = count(f"row_stats {label}", 2 * row, run.row_stats, pair, None, None)
        one = count(f"row_stats, one model {label}", row, run.row_stats, alone, None, None)
        count(f"row_grad {label}", 3 * row, run.row_grad, pair, None, stats, ones)
        count(f"row_grad, one model {label}", 2 * row, run.row_grad, alone, None, one, ones)
        for name, held in (("row_stats_grad", HELD[label]), ("row_stats_grad, cluster", 2 * HELD[label])):
            held_pair = Pair(s[:, :held].contiguous(), t[:, :held].contiguous(), 1.0, held)
            count(f"{name} {label}", 3 * held * dtype.itemsize, run.row_stats_grad, held_pair, None, ones)
        for kind in MIXTURE_DIVERGENCES:
            values = count(f"{kind} {label}", 2 * row, run.row_divergence, pair, None, stats, kind, 0.5)
            args = (pair, stats, values, ones[0], kind, 0.5)
            count(f"{kind} gradient {label}", 3 * row, run.row_divergence_grad, *args)
        least = row + TILE * dtype.itemsize
        name = f"mixed_sample, one model {label}"
        count(name, least, run.row_sample, alone, uniforms, 0.0, 0, 1.0, sampled=True)
    return found
