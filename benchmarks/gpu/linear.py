"""Losses of hidden states and heads, timed, beside the four matmuls that nothing can leave out, and the peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import fused_linear_rkl_loss

from .measure import RUN, attempt, backends_here, bench, ours, peak, record, sync

Heads = tuple[Tensor, Tensor, Tensor, Tensor]  # student's hidden states and weight, teacher's


# Rows, width of the student, of the teacher, vocabulary: equal widths, as peers are measured; Llama-3.2-1B from 8B;
# Qwen2.5-0.5B from 7B.
SHAPES = ((8192, 4096, 4096, 128256), (8192, 2048, 4096, 128256), (4096, 896, 3584, 151936))


def linear() -> None:
    for shape in [(64, 32, 48, 1001)] if RUN.dry else SHAPES:
        if RUN.left() < 8:
            record(name=f"linear {shape}", skipped="no time left")
            continue
        heads = draw(*shape)
        for name, loss in ways(heads).items():
            attempt(f"linear {name} {shape}", lambda n=name, f=loss, x=heads: measure(n, f, x), least=6)
        del heads


def draw(N: int, H: int, H_t: int, V: int) -> Heads:
    generator = torch.Generator(RUN.device).manual_seed(0)

    def normal(rows: int, width: int, scale: float) -> Tensor:
        x = torch.empty(rows, width, device=RUN.device, dtype=torch.bfloat16)
        return x.normal_(0, scale, generator=generator)

    h, w, th, tw = (x for width in (H, H_t) for x in (normal(N, width, 1.0), normal(V, width, 2.5 / width**0.5)))
    return h.requires_grad_(), w.requires_grad_(), th, tw


def ways(heads: Heads) -> dict[str, Callable[..., object]]:
    """Forward and backward pass of each implementation, by name."""
    found: dict[str, Callable[..., object]] = {"four matmuls": four_matmuls}
    here = backends_here()
    if here:
        found[f"minillm {here[0]}"] = stepped(ours(fused_linear_rkl_loss, here[0]))
        for rows in (16, 32) if RUN.dry else (512, 1024, 2048, 4096):
            loss = ours(fused_linear_rkl_loss, here[0], chunk_rows=rows)
            found[f"minillm {here[0]} chunk_rows={rows}"] = stepped(loss)
    found["eager"] = stepped(eager)
    if not RUN.dry:
        found["torch.compile, chunks of 1024"] = in_chunks(torch.compile(chunk_loss, dynamic=False), 1024)
        if "triton" in here:
            found["minillm triton"] = stepped(ours(fused_linear_rkl_loss, "triton"))
            found["minillm tiled"] = stepped(ours(fused_linear_rkl_loss, "triton", impl="tiled"))
        for name, size in (("liger fused linear jsd", None), ("liger, chunks of 1024", 1024)):
            if (loss := attempt("liger", lambda size=size: liger(len(heads[0]), size))) is not None:
                found[name] = loss
    return found


def stepped(loss: Callable[..., Tensor]) -> Callable[..., None]:
    return lambda *heads: loss(*heads).backward()


def four_matmuls(h: Tensor, w: Tensor, th: Tensor, tw: Tensor) -> None:
    with torch.no_grad():
        z = h @ w.t()
        th @ tw.t()
        z @ w
        z.t() @ h


def eager(h: Tensor, w: Tensor, th: Tensor, tw: Tensor) -> Tensor:
    q = F.log_softmax((h @ w.t()).float(), -1)
    with torch.no_grad():
        p = F.log_softmax((th @ tw.t()).float(), -1)
    return F.kl_div(p, q, reduction="batchmean", log_target=True)


def chunk_loss(h: Tensor, w: Tensor, th: Tensor, tw: Tensor) -> Tensor:
    q, p = F.log_softmax((h @ w.t()).float(), -1), F.log_softmax((th @ tw.t()).float(), -1)
    return F.kl_div(p, q, reduction="sum", log_target=True)


def in_chunks(loss: Callable[..., Tensor], size: int) -> Callable[..., None]:
    def run(h: Tensor, w: Tensor, th: Tensor, tw: Tensor) -> None:
        for a, b in zip(h.split(size), th.split(size), strict=True):
            (loss(a, w, b, tw) / len(h)).backward()

    return run


def liger(n_rows: int, chunk_size: int | None) -> Callable[..., None]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=True, **options)
    labels = torch.zeros(n_rows, dtype=torch.long, device=RUN.device)
    return lambda *heads: loss(*heads, labels).backward()


def measure(name: str, step: Callable[..., object], heads: Heads) -> None:
    leaves: Sequence[Tensor] = heads[:2]
    N, H, H_t, V = *heads[0].shape, heads[2].shape[1], len(heads[1])
    run = lambda: step(*heads)
    for x in leaves:
        x.grad = None
    run()
    sync()
    memory = peak(run, leaves)
    found = bench(run, leaves, rep=600)
    mib = None if memory is None else memory >> 20
    tflops = 2 * N * V * (3 * H + H_t) / found["ms"] / 1e9
    shape = {"shape": [N, H, V], "teacher_width": H_t}
    record(name="linear rkl f+b", by=name, **shape, tflops=tflops, extra_mib=mib, **found)
