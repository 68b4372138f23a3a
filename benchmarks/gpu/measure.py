"""What the sections share: the run that is under way, records, timing on the device, peak memory."""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Run:
    """A section of `python -m benchmarks.gpu`; one in a process."""

    out: Path = Path("results.jsonl")
    dry: bool = False
    section: str = ""
    seconds: float = 120.0  # of the section
    began: float = field(default_factory=time.perf_counter)
    backend: str = ""  # only this one
    dtypes: Sequence[str] = ()  # of the checks

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)


RUN = Run()
DTYPES = ("bfloat16", "float32", "float16")


def record(**fields: Any) -> None:
    """A line of the results, at once: whatever stops a section loses nothing."""
    line = json.dumps({"section": RUN.section, **fields}, default=str)
    with RUN.out.open("a") as f:
        f.write(line + "\n")
    print(line[:200], flush=True)


def attempt(name: str, function: Callable[[], Any], least: float = 2.0) -> Any:
    """One measurement: skipped when the section's time is nearly up, recorded when it fails, never fatal."""
    if RUN.left() < least:
        record(name=name, skipped="no time left")
        return None
    try:
        return function()
    except ImportError as error:  # of a peer
        record(name=name, skipped=str(error))
        return None
    except Exception as error:
        record(name=name, error=f"{type(error).__name__}: {error}"[:600], at=traceback.format_exc()[-700:])
        return None
    finally:
        gc.collect()
        if not RUN.dry:
            torch.cuda.empty_cache()


def sync() -> None:
    if not RUN.dry:
        torch.cuda.synchronize()


def bench(call: Callable[[], object], leaves: Sequence[Tensor] = (), rep: int = 60) -> dict[str, float]:
    """Median, least and most milliseconds by CUDA events, L2 flushed before each (Triton's do_bench)."""

    def clear() -> None:
        for x in leaves:
            x.grad = None

    clear()
    call()
    sync()
    if RUN.dry:
        times = []
        for _ in range(3):
            clear()
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return {"ms": statistics.median(times), "least": min(times), "most": max(times)}
    from triton.testing import do_bench

    found = do_bench(call, warmup=15, rep=rep, grad_to_none=list(leaves) or None, quantiles=[0.5, 0.0, 1.0])
    return dict(zip(("ms", "least", "most"), found, strict=True))


def peak(call: Callable[[], object], leaves: Sequence[Tensor] = ()) -> int | None:
    """Bytes beyond what was allocated before."""
    if RUN.dry:
        call()
        return None
    for x in leaves:
        x.grad = None
    sync()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    sync()
    return torch.cuda.max_memory_allocated() - before


def backends_here() -> list[str]:
    from minillm_kernels import available_backends

    found = available_backends()
    wanted = [RUN.backend] if RUN.backend else ["cpu"] if RUN.dry else ["cuda", "triton"]
    return [name for name in wanted if found[name] == "ok"]


def ours(function: Callable, backend: str, **options: Any) -> Callable:
    from minillm_kernels import use_backend

    def run(*args: Any) -> Any:
        with use_backend(backend):
            return function(*args, **options)

    return run


def pair(n: int, V: int, dtype: torch.dtype, seed: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator(RUN.device).manual_seed(seed)
    s = spread * torch.randn(n, V, generator=g, device=RUN.device)
    t = s + torch.randn(n, V, generator=g, device=RUN.device) * spread
    return s.to(dtype), t.to(dtype)
