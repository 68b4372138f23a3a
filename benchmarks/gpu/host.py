"""What the host spends on a call, and the device alone by graph replay."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from minillm_kernels import fused_rkl_loss, mixed_sample, token_logprobs, use_backend

from .measure import RUN, attempt, backends_here, pair, record, sync
from .rows import eager_rkl, eager_sample

NOT_CAPTURED = ("rkl f+b", "eager rkl f+b", "mixed_sample", "eager sample")


def host() -> None:
    """Microseconds of Python and launches a call, without waiting for the device."""
    for shape in [(8, 1001)] if RUN.dry else [(8, 151936), (64, 50257)]:
        s, t = pair(*shape, torch.bfloat16, 1)
        for backend in backends_here():
            for name, call in calls(s, t).items():
                run = lambda n=name, b=backend, c=call, x=shape: measure(n, b, c, x)
                attempt(f"host {name} {backend}", run)


def calls(s: Tensor, t: Tensor) -> dict[str, Callable[[], object]]:
    x, ids = s.clone().requires_grad_(), torch.arange(len(s), device=s.device)
    u = torch.rand(len(s), 2, dtype=torch.float64, device=s.device)

    def forward_backward(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        x.grad = None
        loss(x, t).backward()

    return {
        "rkl f+b": lambda: forward_backward(fused_rkl_loss),
        "eager rkl f+b": lambda: forward_backward(eager_rkl),
        "rkl forward": lambda: fused_rkl_loss(s, t),
        "rkl forward, none": lambda: fused_rkl_loss(s, t, reduction="none"),
        "token_logprobs": lambda: token_logprobs(s, ids, return_entropy=True),
        "mixed_sample": lambda: mixed_sample(s, t, 0.2),
        "mixed_sample, uniforms given": lambda: mixed_sample(s, t, 0.2, uniforms=u),
        "mixed_sample, top-k top-p": lambda: mixed_sample(s, t, 0.2, uniforms=u, top_k=50, top_p=0.9),
        "mixed_sample, greedy": lambda: mixed_sample(s, t, 0.2, uniforms=u, temperature=0.0),
        "eager sample": lambda: eager_sample(s, t),
    }


def measure(name: str, backend: str, call: Callable[[], object], shape: tuple[int, int]) -> None:
    with use_backend(backend):
        for _ in range(5):
            call()
        sync()
        times = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(10):
                call()
            times.append(1e5 * (time.perf_counter() - start))
            sync()
        found = {"us": statistics.median(times), "us_least": min(times)}
        if not RUN.dry and name not in NOT_CAPTURED:
            found["device_us"] = replayed(call)
    record(name=name, by=backend, shape=list(shape), **found)


def replayed(call: Callable[[], object]) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    sync()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(50):
        graph.replay()
    end.record()
    sync()
    return 1e3 * start.elapsed_time(end) / 50
