"""What runs here, and what this card can do: bandwidth, matmuls, and those of a head by the rows of a chunk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from .measure import RUN, attempt, bench, record


def env() -> None:
    from minillm_kernels import available_backends

    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "transformers", "accelerate", "liger_kernel", "pytest", "numpy", "rouge_score", "gguf"):
        try:
            versions[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            versions[name] = "missing"
    record(name="versions", **versions, backends=available_backends())
    if not RUN.dry:
        p = torch.cuda.get_device_properties(0)
        query = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu,clocks.max.sm,clocks.max.mem"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        smi = attempt("smi", lambda: subprocess.run(command, capture_output=True, text=True).stdout)
        sizes = {"sms": p.multi_processor_count, "l2": p.L2_cache_size, "bytes": p.total_memory}
        record(name="gpu", device=p.name, smi=str(smi).strip(), **sizes)


def ceilings() -> None:
    attempt("bandwidth", bandwidth)
    attempt("gemm", square)
    H, V = (64, 1000) if RUN.dry else (4096, 128256)
    w = torch.randn(V, H, device=RUN.device).bfloat16()
    total = torch.zeros(V, H, device=RUN.device)
    for rows in (16, 32) if RUN.dry else (192, 256, 512, 1024, 2048, 4096):
        head_matmuls(rows, w, total)


def bandwidth() -> None:
    n = 1 << (20 if RUN.dry else 30)
    a, b = torch.randn(n // 4, device=RUN.device), torch.empty(n // 4, device=RUN.device)
    t = bench(lambda: b.copy_(a))
    record(name="copy", gbps=2 * n / t["ms"] / 1e6, **t)
    c = torch.empty_like(a)
    t = bench(lambda: torch.add(a, b, out=c))
    record(name="add", gbps=3 * n / t["ms"] / 1e6, **t)
    t = bench(lambda: a.sum())
    record(name="sum (reads alone)", gbps=n / t["ms"] / 1e6, **t)


def square() -> None:
    m = 256 if RUN.dry else 8192
    a, b = (torch.randn(m, m, device=RUN.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    t = bench(lambda: torch.mm(a, b, out=out))
    record(name="gemm", m=m, tflops=2 * m**3 / t["ms"] / 1e9, **t)


def head_matmuls(rows: int, w: torch.Tensor, total: torch.Tensor) -> None:
    """What rows a chunk must have for the matmuls of a head, and how dW is best accumulated."""
    V, H = w.shape
    h, g = torch.randn(rows, H, device=w.device).bfloat16(), torch.randn(rows, V, device=w.device).bfloat16()
    z = torch.empty_like(g)
    ways = {
        "logits": lambda: torch.mm(h, w.t(), out=z),
        "hidden gradient": lambda: torch.mm(g, w),
        "dW += g^T h": lambda: total.add_(g.t() @ h),
        "addmm out_dtype": lambda: torch.addmm(total, g.t(), h, out_dtype=torch.float32, out=total),
        "mm out_dtype, add": lambda: total.add_(torch.mm(g.t(), h, out_dtype=torch.float32)),
    }
    for label, way in ways.items():
        if not (RUN.dry and "out_dtype" in label):  # of CUDA alone
            attempt(f"probe {label} {rows}", lambda label=label, way=way: probe(label, way, rows, 2 * rows * H * V))


def probe(label: str, way: Callable[[], object], rows: int, flops: int) -> None:
    t = bench(way, rep=30)
    record(name="probe", what=label, rows=rows, tflops=flops / t["ms"] / 1e9, **t)
