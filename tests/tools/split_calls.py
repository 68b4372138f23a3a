"""What each rank of a world does: how calls with a split vocabulary communicate, draw, fail and differentiate."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from split_cases import F64, N, agree, close, collectives, cut, models, raises, tokens
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import minillm_kernels as mk


def as_modules() -> None:
    h_s, w_s, h_t, w_t = models(50)
    z_s, z_t, here, group = h_s @ w_s.T, h_t @ w_t.T, cut(50), dist.group.WORLD
    close("logits", mk.FusedRKLLoss(group=group)(z_s[:, here], z_t[:, here]), mk.FusedRKLLoss()(z_s, z_t))
    of_slices = mk.FusedLinearRKLLoss(group=group)(h_s, w_s[here], h_t, w_t[here])
    close("hidden states", of_slices, mk.FusedLinearRKLLoss()(h_s, w_s, h_t, w_t))


def compiled() -> None:
    """Between two graphs, and never inside one."""
    h_s, w_s, h_t, w_t = models(50)
    z_s, z_t, here = h_s @ w_s.T, h_t @ w_t.T, cut(50)

    def function(student: Tensor) -> Tensor:
        return 3 * mk.fused_rkl_loss(2 * student, z_t[:, here], group=dist.group.WORLD)

    student, plain = (z_s[:, here].clone().requires_grad_() for _ in range(2))
    loss = torch.compile(function, backend="aot_eager")(student)
    loss.backward()
    function(plain).backward()
    close("loss", loss, 3 * mk.fused_rkl_loss(2 * z_s, z_t))
    close("gradient", student.grad, plain.grad)
    torch.compiler.reset()
    whole = partial(torch.compile(function, backend="aot_eager", fullgraph=True), student)
    raises(RuntimeError, "cannot be part of a compiled graph", whole)


def gradients_anew() -> None:
    """In place, scaled, under checkpointing, twice; and no second derivative."""
    V = 50
    h_s, w_s, h_t, w_t = models(V)
    z_s, z_t, here, group = h_s @ w_s.T, h_t @ w_t.T, cut(V), dist.group.WORLD
    whole = z_s.clone().requires_grad_()
    (3 * mk.fused_rkl_loss(whole, z_t)).backward()
    student = z_s[:, here].clone().requires_grad_()
    logits = student * 1.0
    (3 * mk.fused_rkl_loss(logits, z_t[:, here], inplace=True, group=group)).backward()
    close("in place", student.grad, whole.grad[:, here])
    close("in place", logits, whole.grad[:, here])
    student = z_s[:, here].clone().requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(
        lambda s: 3 * mk.fused_rkl_loss(s, z_t[:, here], group=group), student, use_reentrant=False
    )
    loss.backward(retain_graph=True)
    close("checkpoint", student.grad, whole.grad[:, here])
    student = z_s[:, here].clone().requires_grad_()
    loss = 3 * mk.fused_rkl_loss(student, z_t[:, here], group=group)
    for times in (1, 2):
        loss.backward(retain_graph=True)
        close("again", student.grad, times * whole.grad[:, here])
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    if here.stop > here.start:
        raises(RuntimeError, "have no second derivative", lambda: grad.sum().backward())
    weight = w_s[here].clone().requires_grad_()
    linear = mk.fused_linear_rkl_loss(h_s, weight, h_t, w_t[here], group=group)
    linear.backward(retain_graph=True)
    raises(RuntimeError, "a first backward pass has taken them", linear.backward)


def counted_collectives() -> None:
    """One all-gather for statistics, of 9 numbers a row, 7 without a token; one of each chunk of hidden states; one
    all-reduce of [N, H] backward; one more for mixtures; two for sampling. Twice: then the split is known."""
    V = 7 * dist.get_world_size()
    h_s, w_s, h_t, w_t = models(V)
    z_s, z_t, here, ids = h_s @ w_s.T, h_t @ w_t.T, cut(V), tokens(V)
    s, t, group = z_s[:, here].requires_grad_(), z_t[:, here], {"group": dist.group.WORLD}
    rows = {"advantages": torch.randn(N, dtype=F64), "old_logprobs": -torch.rand(N, dtype=F64)}
    sent = []
    gather = dist.all_gather

    def listening(out: list[Tensor], x: Tensor, **keywords: Any) -> Any:
        sent.append(x.numel())
        return gather(out, x, **keywords)

    dist.all_gather = listening
    try:
        for _ in range(2):
            for numbers, call in (
                (9, lambda: mk.distill_stats(s, t, ids, **group).reverse_kl.sum().backward()),
                (7, lambda: mk.fused_rkl_loss(s, t, **group).backward()),
                (4, lambda: mk.token_logprobs(s, ids, **group).sum().backward()),
            ):
                sent.clear()
                with collectives({"allgather_": 1}):
                    call()
                assert sent == [numbers * N + 2], sent  # and the widths
            with collectives({"allgather_": 1, "allreduce_": 1}):
                mk.fused_divergence_loss(s, t, "jsd", **group).backward()
            for temperature, expected in ((1.0, {"allgather_": 1, "allreduce_": 1}), (0.0, {"allgather_": 2})):
                with collectives(expected):
                    mk.mixed_sample(s, t, temperature=temperature, **group)
            for chunk_rows, chunks in ((None, 1), (8, 3)):
                hidden, weight = h_s.clone().requires_grad_(), w_s[here].clone().requires_grad_()
                options = {"chunk_rows": chunk_rows, **group}
                sent.clear()
                with collectives({"allgather_": chunks, "allreduce_": 1}):
                    loss = mk.fused_linear_minillm_loss(hidden, weight, h_t, w_t[here], ids, **rows, **options).loss
                    loss.backward()
                assert sum(sent) == 9 * N + 2, sent
                with collectives({"allgather_": chunks}):  # hidden states that want no gradient
                    mk.fused_linear_rkl_loss(h_s, weight, h_t, w_t[here], **options).backward()
    finally:
        dist.all_gather = gather


def sampled(V: int, dtype: torch.dtype) -> None:
    """The tokens of one process, from the same uniforms."""
    h_s, w_s, h_t, w_t = models(V)
    torch.manual_seed(V)
    rows = torch.randint(0, N, (400,))
    z_s, z_t = (h_s @ w_s.T).to(dtype)[rows], (h_t @ w_t.T).to(dtype)[rows]
    uniforms, here = torch.rand(400, 2, dtype=F64), cut(V)
    if V > 5:
        z_s[:, 1], z_s[:40, : V // 2], z_t[40:80, V // 2 :] = -math.inf, -math.inf, -math.inf
        z_s[3], z_t[4, 2], z_s[5, V - 1] = -math.inf, math.nan, math.inf
    for temperature in (1.0, 0.7, 0.0):
        for alpha in (0.0, 0.2, 1.0):
            options = {"temperature": temperature, "vocab_size": max(1, V - 1)}
            expected = mk.mixed_sample(z_s, z_t, alpha, uniforms=uniforms, **options)
            mine = uniforms if dist.get_rank() == 0 else torch.zeros_like(uniforms)  # the first rank's count
            found = mk.mixed_sample(
                z_s[:, here], z_t[:, here], alpha, uniforms=mine, group=dist.group.WORLD, **options
            )
            for name, x in found._asdict().items():
                y = getattr(expected, name)
                close(name, x, y) if not x.is_floating_point() else close(name, x, y, dtype)
            agree(*found)
    alone = mk.mixed_sample(z_s[:, here], None, 0.0, uniforms=uniforms, group=dist.group.WORLD)
    expected = mk.mixed_sample(z_s, None, 0.0, uniforms=uniforms)
    assert torch.equal(alone.token_ids, expected.token_ids) and alone.teacher_logprobs is None


def drawn(n_rows: int) -> Tensor:
    """[V] how often each token is drawn from one law, with uniforms of the ranks' own generators."""
    h_s, w_s, h_t, w_t = models(23)
    here = cut(23)
    torch.manual_seed(dist.get_rank())
    z_s, z_t = (x.float()[:1, here].expand(n_rows, -1) for x in (h_s @ w_s.T / 3, h_t @ w_t.T / 3))
    found = mk.mixed_sample(z_s, z_t, 0.3, group=dist.group.WORLD)
    agree(*found)
    return found.token_ids.bincount(minlength=23)


def law() -> Tensor:
    """[V] that `drawn` draws from."""
    h_s, w_s, h_t, w_t = models(23)
    q, p = ((h @ w.T / 3)[0].softmax(-1) for h, w in ((h_s, w_s), (h_t, w_t)))
    return 0.3 * p + 0.7 * q


def errors() -> None:
    """The same on all ranks, so that none waits for another."""
    size, group, here = dist.get_world_size(), dist.group.WORLD, cut(515)
    h_s, w_s, h_t, w_t = models(515, 518)
    z_s, z_t, ids = h_s @ w_s.T, h_t @ w_t.T, tokens(515)
    theirs = cut(518)
    raises(ValueError, "split differently", lambda: mk.fused_rkl_loss(z_s[:, here], z_t[:, theirs], group=group))
    raises(
        ValueError,
        "split differently",
        lambda: mk.fused_linear_rkl_loss(h_s, w_s[here], h_t, w_t, group=group),
    )
    mesh = init_device_mesh("cpu", (size,))
    w, other = (distribute_tensor(x, mesh, [Shard(0)]) for x in (w_s, w_t))
    raises(ValueError, "split differently", lambda: mk.fused_linear_rkl_loss(h_s, w, h_t, other))
    across = distribute_tensor(w_s, mesh, [Shard(1)])
    raises(ValueError, "must be Shard(0)", lambda: mk.fused_linear_rkl_loss(h_s, across, h_t, across))
    s, t = z_s[:, here], z_t[:, here]
    outside = torch.where(ids == ids[1], 515, ids)
    raises(IndexError, "515 is outside the vocabulary [0, 515)", lambda: mk.distill_stats(s, t, outside, group=group))
    for wrong, message in ((0, "at least 1, got 0"), (516, "vocab_size 516 must lie between 1 and")):
        raises(ValueError, message, partial(mk.fused_rkl_loss, s, t, vocab_size=wrong, group=group))
    for filters in ({"top_k": 3}, {"top_p": 0.9}):
        sample = partial(mk.mixed_sample, s, t, group=group, **filters)
        raises(NotImplementedError, "takes temperature, 0 for the argmax included", sample)
    tiled = partial(mk.fused_linear_rkl_loss, h_s, w_s[here], h_t, w_t[here], impl="tiled", group=group)
    raises(NotImplementedError, 'use impl="chunked"', tiled)
    raises(TypeError, "group must be a torch.distributed process group", lambda: mk.fused_rkl_loss(s, t, group="tp"))
    part = dist.new_group([0])
    raises(
        (ValueError, TypeError),
        "different processes" if dist.get_rank() == 0 else "that this process belongs to",
        lambda: mk.fused_linear_rkl_loss(h_s, w, h_t, w, group=part),
    )
    none = z_s[:, :0]
    raises(ValueError, "vocab_size 0 must lie between 1", lambda: mk.fused_rkl_loss(none, none, group=group))


def two_by_two() -> None:
    """Two tensor-parallel groups of two, each with rows of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    h_s, w_s, h_t, w_t = models(51)
    rows = slice(0, 12) if mesh.get_local_rank("data") == 0 else slice(12, N)
    whole, hidden = (h_s[rows].clone().requires_grad_() for _ in range(2))
    head, teacher = (distribute_tensor(w, mesh["tensor"], [Shard(0)]) for w in (w_s, w_t))
    expected = mk.fused_linear_rkl_loss(whole, w_s, h_t[rows], w_t)
    expected.backward()
    loss = mk.fused_linear_rkl_loss(hidden, head, h_t[rows], teacher)
    loss.backward()
    close("loss", loss, expected)
    close("hidden", hidden.grad, whole.grad)
    group = mesh.get_group("tensor")
    drawn = mk.mixed_sample(*(h[rows] @ w.to_local().T for h, w in ((h_s, head), (h_t, teacher))), group=group)
    assert drawn.token_ids.shape == (rows.stop - rows.start,) and drawn.mixture_logprobs.isfinite().all()
    across = distribute_tensor(w_s, mesh, [Shard(0), Shard(0)])
    message = "on a mesh of one dimension"
    raises(ValueError, message, partial(mk.fused_linear_rkl_loss, hidden, across, h_t[rows], across))
