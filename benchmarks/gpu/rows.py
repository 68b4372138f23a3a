"""The row operations, timed, beside eager, torch.compile and Liger."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import fused_divergence_loss, fused_rkl_loss, mixed_sample, token_logprobs

from .measure import RUN, attempt, backends_here, bench, ours, peak, record


def eager_rkl(s: Tensor, t: Tensor) -> Tensor:
    q, p = F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1)
    return F.kl_div(p, q, reduction="batchmean", log_target=True)


def eager_logprobs(s: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_q = F.log_softmax(s.float(), -1)
    return log_q.gather(-1, ids[:, None])[:, 0], -(log_q.exp() * log_q).sum(-1)


def eager_sample(s: Tensor, t: Tensor) -> Tensor:
    return torch.multinomial(0.2 * t.float().softmax(-1) + 0.8 * s.float().softmax(-1), 1)


def eager_jsd(s: Tensor, t: Tensor) -> Tensor:
    q, p = F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1)
    m = torch.logsumexp(torch.stack([q, p]) - 0.6931471805599453, 0)
    kl = lambda a, b: F.kl_div(b, a, reduction="batchmean", log_target=True)
    return 0.5 * kl(p, m) + 0.5 * kl(q, m)


def liger_rkl(s: Tensor, t: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerJSD

    return LigerJSD(beta=1.0)(F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1))


compiled = functools.cache(functools.partial(torch.compile, dynamic=False))


class Operation(NamedTuple):
    tensors: int  # of the logits' size that must move
    ours: Callable
    eager: Callable | None = None
    peers: dict[str, Callable] = {}  # noqa: RUF012


def operations(ids: Tensor) -> dict[str, Operation]:
    rkl_peers = {"liger": liger_rkl, "torch.compile": lambda s, t: compiled(eager_rkl)(s, t)}
    sample_peers = {"torch.compile": lambda s, t: compiled(eager_sample)(s, t)}
    return {
        # Six bytes a bf16 column where the gradient is formed with the loss and a row pair is held, ten elsewhere.
        "rkl f+b": Operation(5, fused_rkl_loss, eager_rkl, rkl_peers),
        "rkl f+b in place": Operation(5, lambda s, t: fused_rkl_loss(s, t, inplace=True)),
        "rkl forward": Operation(2, fused_rkl_loss),
        "token_logprobs+entropy": Operation(
            1, lambda s, _: token_logprobs(s, ids, return_entropy=True), lambda s, _: eager_logprobs(s, ids)
        ),
        "mixed_sample": Operation(2, mixed_sample, eager_sample, sample_peers),
        "jsd f+b": Operation(7, lambda s, t: fused_divergence_loss(s, t, "jsd"), eager_jsd),
    }


def rows() -> None:
    shapes = (
        [(16, 1001), (8, 1001)]
        if RUN.dry
        else [(8192, 128256), (8192, 50257), (8192, 32000), (8192, 151936), (8, 151936)]
    )
    for dtype, peers in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
        for shape in shapes:
            run = lambda d=dtype, s=shape, p=peers: sweep(d, s, p)
            attempt(f"rows {shape} {dtype}{' peers' * peers}", run, least=5)


def sweep(dtype: torch.dtype, shape: tuple[int, int], peers: bool) -> None:
    n, V = shape
    s, t = (torch.empty(shape, device=RUN.device, dtype=dtype).normal_(0, 3) for _ in range(2))
    for name, operation in operations(torch.randint(V, (n,), device=RUN.device)).items():
        few = n < 1000 and not RUN.dry
        if ("in place" in name and few) or ("jsd" in name and (dtype is torch.float32 or V != 128256)):
            continue
        calls = dict(operation.peers)
        if not peers:
            calls = {b: ours(operation.ours, b) for b in backends_here()}
            calls |= {} if operation.eager is None else {"eager": operation.eager}
        if RUN.dry:
            calls.pop("torch.compile", None)
        for by, call in calls.items():
            run = lambda n=name, o=operation, b=by, c=call: measure(n, o, b, c, s, t)
            attempt(f"{name} {shape} {dtype} {by}", run, least=3)
            s.grad = None


def measure(name: str, operation: Operation, by: str, call: Callable, s: Tensor, t: Tensor) -> None:
    backward = "f+b" in name
    s.requires_grad_(backward)

    def step() -> None:
        if "in place" in name:  # of logits that are no leaf; they hold the gradient of the last call
            call(s.view_as(s), t).backward()
        elif backward:
            call(s, t).backward()
        else:
            call(s, t)

    leaves = [s] if backward else []
    found = bench(step, leaves)
    extra = peak(step, leaves)
    s.requires_grad_(False)
    if "in place" in name:
        s.normal_(0, 3)
    gbps = operation.tensors * s.nbytes / found["ms"] / 1e6
    dtype = str(s.dtype).removeprefix("torch.")
    record(name=name, shape=list(s.shape), dtype=dtype, by=by, gbps=gbps, extra=extra, **found)
