"""What NVIDIA's profiler says of the kernels: bandwidth, occupancy, stalls."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from .measure import RUN, backends_here, record, sync

KERNELS = "regex:^(row_stats_kernel|row_grad_kernel|row_stats_grad_kernel|row_sample_mass_kernel|tile_mass_kernel)"
CHAPTERS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy", "SchedulerStats", "LaunchStats")


def ncu() -> None:
    if RUN.dry:
        launch_each()
        record(name="ncu", skipped="this is --dry: the kernels ran without the profiler")
        return
    if shutil.which("ncu") is None:
        record(name="ncu", skipped="ncu is not on PATH")
        return
    command = ["ncu", "--csv", "--clock-control", "none", "--target-processes", "application-only", "-c", "8"]
    command += ["-k", KERNELS, *(word for chapter in CHAPTERS for word in ("--section", chapter))]
    command += [sys.executable, "-m", "benchmarks.gpu.profiler"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=RUN.left())
    kernels = metrics(result.stdout)
    if not kernels:  # most often a user who may not read the counters
        record(name="ncu", rc=result.returncode, skipped=(result.stdout + result.stderr)[-600:])
    for kernel, found in kernels:
        record(name="ncu", kernel=kernel, **found)


def metrics(output: str) -> list[tuple[str, dict[str, float | str]]]:
    """The kernels of ncu's CSV in the order of their launches, each with its metrics by name and unit."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, tuple[str, dict[str, float | str]]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if not row["Metric Name"]:  # a remark
            continue
        _, found = kernels.setdefault(row["ID"], (row["Kernel Name"].partition("(")[0], {}))
        text = row["Metric Value"].replace(",", "")
        try:
            value: float | str = float(text)
        except ValueError:
            value = text
        found[f"{row['Metric Name']} [{row['Metric Unit']}]" if row["Metric Unit"] else row["Metric Name"]] = value
    return list(kernels.values())


def launch_each() -> None:
    """Every kernel once."""
    from minillm_kernels import fused_rkl_loss, mixed_sample, use_backend

    shapes = (
        [(8, 1001)] if RUN.dry else [(1056, 128256), (1056, 50256)]
    )  # a row that no cluster holds, and one that it does
    for n, V in shapes:
        s, t = (torch.empty(n, V, device=RUN.device, dtype=torch.bfloat16).normal_(0, 3) for _ in range(2))
        s.requires_grad_()
        for backend in backends_here():
            with use_backend(backend):
                fused_rkl_loss(s, t).backward()
                mixed_sample(s.detach()[:64], t[:64])
    sync()


if __name__ == "__main__":
    launch_each()
