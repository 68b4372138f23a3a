"""How fast the kernels are on the card that is there, beside eager, torch.compile and Liger: `pytest -m gpu -s` prints
each time, and the share of the card's bandwidth that the bytes an implementation cannot avoid amount to.

Asserted: no slower than eager or torch.compile in the same run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import available_backends, fused_rkl_loss, mixed_sample, token_logprobs, use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [((4096, 50257), torch.bfloat16), ((2048, 151936), torch.bfloat16), ((2048, 50257), torch.float32)]


def rkl_eager(s: Tensor, t: Tensor) -> Tensor:
    q, p = F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1)
    return F.kl_div(p, q, reduction="batchmean", log_target=True)


def rkl_liger(s: Tensor, t: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerJSD

    return LigerJSD(beta=1.0)(F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1))  # beta 1: its reverse KL


def logprobs_eager(s: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_q = F.log_softmax(s.float(), -1)
    return log_q.gather(-1, ids[:, None])[:, 0], -(log_q.exp() * log_q).sum(-1)


def sample_eager(s: Tensor, t: Tensor) -> Tensor:
    return torch.multinomial(0.2 * t.float().softmax(-1) + 0.8 * s.float().softmax(-1), 1)


def implementations(ours: Callable, eager: Callable, peers: dict[str, Callable]) -> dict[str, Callable]:
    def on(name: str) -> Callable:
        def run(*args):
            with use_backend(name):
                return ours(*args)

        return run

    found = {name: on(name) for name in ("cuda", "triton") if available_backends()[name] == "ok"}
    return {**found, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False), **peers}


def compare(title: str, moved: int, calls: dict[str, Callable[[], object]], leaf: Tensor | None = None) -> None:
    """moved: bytes that the operation cannot avoid."""
    testing = pytest.importorskip("triton.testing", reason="do_bench comes with Triton")
    peak = testing.get_dram_gbps()
    times = {}
    for name, call in calls.items():
        try:
            times[name] = testing.do_bench(call, grad_to_none=None if leaf is None else [leaf], return_mode="median")
        except (ImportError, torch.OutOfMemoryError) as error:
            print(f"{title}: {name} left out, {error}")
    for name, ms in times.items():
        share = moved / ms / 1e6 / peak
        print(
            f"{title}: {name} {ms:.3f} ms, {moved / ms / 1e6:.0f} GB/s, {share:.0%} of {torch.cuda.get_device_name()}"
        )
    ours = [times[name] for name in ("cuda", "triton") if name in times]
    peers = [times[name] for name in ("eager", "torch.compile") if name in times]
    assert max(ours) <= min(peers), times


def pair(shape, dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    s, t = (torch.randn(shape, generator=generator, device="cuda").mul_(3).to(dtype) for _ in range(2))
    return s, t


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_reverse_kl_forward_and_backward(shape, dtype):
    """The pair is read twice and a gradient written."""
    s, t = pair(shape, dtype)
    s.requires_grad_()

    def step(loss: Callable) -> Callable[[], object]:
        return lambda: loss(s, t).backward()

    found = implementations(fused_rkl_loss, rkl_eager, {"liger": rkl_liger})
    calls = {name: step(loss) for name, loss in found.items()}
    compare(f"reverse KL {shape} {dtype}", 5 * s.nbytes, calls, s)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_token_logprobs_with_entropy(shape, dtype):
    s, _ = pair(shape, dtype)
    ids = torch.arange(shape[0], device="cuda") % shape[1]
    ours = lambda x, y: token_logprobs(x, y, return_entropy=True)
    calls = {k: lambda f=f: f(s, ids) for k, f in implementations(ours, logprobs_eager, {}).items()}
    compare(f"log-probabilities {shape} {dtype}", s.nbytes, calls)


@pytest.mark.parametrize("rows", [8, 256])
def test_mixed_sampling(rows):
    s, t = pair((rows, 151936), torch.bfloat16)
    calls = {k: lambda f=f: f(s, t) for k, f in implementations(mixed_sample, sample_eager, {}).items()}
    compare(f"mixed sampling of {rows} rows", 2 * s.nbytes, calls)
