"""What each rank of a world does: a function of minillm_kernels on its columns, compared with the whole vocabulary in
one process, in float64 by the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

import minillm_kernels as mk

N, H, H_T = 21, 8, 12
F64 = torch.float64
TOLERANCE = {F64: 1e-12, torch.float32: 3e-6}


def cut(V: int) -> slice:
    """This rank's columns, as torch.chunk cuts."""
    step = -(-V // dist.get_world_size())
    start = min(V, dist.get_rank() * step)
    return slice(start, min(V, start + step))


def close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype = F64) -> None:
    """Within the tolerance of that type times 1 + |expected|; NaN and infinities alike."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} for {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = ((actual - expected).abs() / (1 + expected.abs())).masked_fill(same, 0)
    assert (error <= TOLERANCE[dtype]).all(), f"{name}: error {error.max():.1e}\n{actual}\n{expected}"


def agree(*tensors: Tensor) -> None:
    """The same bits on all ranks."""
    mine = torch.cat([x.detach().double().flatten() for x in tensors]).view(torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    assert all(torch.equal(x, mine) for x in everyone)


@contextmanager
def collectives(expected: dict[str, int]) -> Iterator[None]:
    with CommDebugMode() as counted:
        yield
    found = {str(name).removeprefix("c10d."): n for name, n in counted.get_comm_counts().items()}
    assert found == expected, f"{found} instead of {expected}"


def models(V: int, V_t: int | None = None, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and weights of student and teacher, the same on all ranks. shift: of all logits."""
    torch.manual_seed(V)
    h_s, w_s, h_t, w_t = (
        torch.randn(*shape, dtype=F64) for shape in ((N, H), (V, H), (N, H_T), (V if V_t is None else V_t, H_T))
    )
    h_s[:, 0], h_t[:, 0] = 1, 1
    w_s[:, 0] += shift
    w_t[:, 0] -= shift
    return h_s, w_s, h_t, w_t


def tokens(V: int) -> Tensor:
    ids = torch.randint(0, V, (N,))
    ids[2], ids[0] = -100, V - 1
    return ids


def both(function: Callable, differentiable: list[tuple[Tensor, int | None]], V: int, **split: Any) -> None:
    """function(*tensors, **keywords) whole and split: values, gradients, bits. Each tensor is given with the dimension
    that is split, None for one that every rank has."""

    def run(parts: list[Tensor], **keywords: Any) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [x.clone().requires_grad_() for x in parts]
        out = function(*leaves, **keywords)
        values = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
        carry = [x for x in values if x.requires_grad]
        torch.manual_seed(7)
        sum((x * torch.randn_like(x)).sum() for x in carry).backward()
        return values, [x.grad for x in leaves]

    columns = cut(V)
    parts = [
        x if dim is None else x.narrow(dim, columns.start, columns.stop - columns.start) for x, dim in differentiable
    ]
    with mk.use_backend("reference"):
        whole, whole_grads = run([x for x, _ in differentiable])
        values, grads = run(parts, split=columns, **split)
    for i, (x, y) in enumerate(zip(values, whole, strict=True)):
        close(f"value {i}", x, y)
    for (_, dim), x, y in zip(differentiable, grads, whole_grads, strict=True):
        close("gradient", x, y if dim is None else y.narrow(dim, columns.start, columns.stop - columns.start))
    agree(*values, *(x for (_, dim), x in zip(differentiable, grads, strict=True) if dim is None))


def of_logits(name: str, V: int, options: dict[str, Any], shift: float = 0.0) -> None:
    """A function of logits by its name."""
    h_s, w_s, h_t, w_t = models(V, shift=shift)
    z_s, z_t, ids = h_s @ w_s.T, h_t @ w_t.T, tokens(V)
    if V > 5:
        z_s[:, 1], z_t[:, V - 2] = -math.inf, -math.inf
        z_s[4, ids[4]] = -math.inf
    rows = {"advantages": torch.randn(N, dtype=F64), "old_logprobs": -torch.rand(N, dtype=F64)}
    options = {**options, **(rows if name == "minillm_loss" else {})}

    def function(student: Tensor, split: slice | None = None) -> Any:
        group = {} if split is None else {"group": dist.group.WORLD}
        teacher = z_t if split is None else z_t[:, split]
        if name == "token_logprobs":
            return mk.token_logprobs(student, ids, return_entropy=True, **options, **group)
        if name in ("fused_rkl_loss", "fused_divergence_loss"):
            given = {"weights": torch.arange(N, dtype=F64) % 5, **options}
            kind = (given.pop("divergence"),) if name == "fused_divergence_loss" else ()
            return getattr(mk, name)(student, teacher, *kind, ids, **given, **group)
        out = getattr(mk, name)(student, teacher, ids, **options, **group)
        return (out.loss, *out.stats) if name == "distill_loss" else out

    both(function, [(z_s, 1)], V)


def of_hidden(name: str, V: int, options: dict[str, Any], head: dict[str, float], bias: bool) -> None:
    """A function of hidden states by its name, its student's head with a bias, soft-cap and scale."""
    h_s, w_s, h_t, w_t = models(V)
    ids, b_s = tokens(V), torch.randn(V, dtype=F64)
    rows = {"advantages": torch.randn(N, dtype=F64), "old_logprobs": -torch.rand(N, dtype=F64)}
    options = {**options, **(rows if name == "fused_linear_minillm_loss" else {})}

    def function(hidden: Tensor, weight: Tensor, *bias: Tensor, split: slice | None = None) -> Any:
        group = {} if split is None else {"group": dist.group.WORLD}
        student = mk.Head(weight, *bias, **head)
        if name == "fused_linear_token_logprobs":
            return mk.fused_linear_token_logprobs(hidden, student, ids, return_entropy=True, **options, **group)
        pair = (hidden, student, h_t, w_t if split is None else w_t[split])
        if name in ("fused_linear_rkl_loss", "fused_linear_divergence_loss"):
            given = {"weights": torch.arange(N, dtype=F64) % 5, **options}
            kind = (given.pop("divergence"),) if name == "fused_linear_divergence_loss" else ()
            return getattr(mk, name)(*pair, *kind, ids, **given, **group)
        out = getattr(mk, name)(*pair, ids, **options, **group)
        return (out.loss, *out.stats) if name == "fused_linear_distill_loss" else out

    both(function, [(h_s, None), (w_s, 0), *([(b_s, 0)] if bias else [])], V)


def of_dtensors(V: int) -> None:
    """Heads that are DTensors, V not a multiple of the ranks: the group is their mesh's, their gradients are DTensors.
    The ranks know the split beforehand: one all-gather a chunk."""
    h_s, w_s, h_t, w_t = models(V)
    ids, b_s = tokens(V), torch.randn(V, dtype=F64)
    rows = {"advantages": torch.randn(N, dtype=F64), "old_logprobs": -torch.rand(N, dtype=F64)}

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_()

    whole = leaf(h_s), leaf(w_s), leaf(b_s)
    expected = mk.fused_linear_minillm_loss(whole[0], mk.Head(*whole[1:]), h_t, w_t, ids, **rows)
    expected.loss.backward()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    hidden, *sharded = leaf(h_s), *(distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (w_s, b_s))
    teacher = distribute_tensor(w_t, mesh, [Shard(0)])
    with collectives({"allgather_": 2, "allreduce_": 1}):
        result = mk.fused_linear_minillm_loss(hidden, mk.Head(*sharded), h_t, teacher, ids, chunk_rows=16, **rows)
        result.loss.backward()
    for name, x in result._asdict().items():
        close(name, x, getattr(expected, name))
    close("hidden", hidden.grad, whole[0].grad)
    for x, y in zip(sharded, whole[1:], strict=True):
        assert x.grad.placements == (Shard(0),) and x.grad.device_mesh == mesh
        close("head", x.grad.full_tensor(), y.grad)
    logits = [distribute_tensor(h @ w.T, mesh, [Shard(1)]) for h, w in ((h_s, w_s), (h_t, w_t))]
    logits[0].requires_grad_()
    loss = mk.fused_rkl_loss(*logits, vocab_size=V - 1)
    loss.backward()
    whole_logits = leaf(h_s @ w_s.T)
    expected_loss = mk.fused_rkl_loss(whole_logits, h_t @ w_t.T, vocab_size=V - 1)
    expected_loss.backward()
    close("logits", loss, expected_loss)
    close("gradient of logits", logits[0].grad.full_tensor(), whole_logits.grad)
    # a head that the other model's logits stand beside
    mixed = mk.fused_linear_rkl_loss(hidden, mk.Head(*sharded), logits[1], mk.Head(None))
    close("logits of one", mixed, mk.fused_linear_rkl_loss(whole[0], mk.Head(*whole[1:]), h_t @ w_t.T, mk.Head(None)))


def splits_that_change() -> None:
    """Widths that follow no rule, ranks without columns first, between and last, and another split at each call."""
    size, rank = dist.get_world_size(), dist.get_rank()
    h_s, w_s, h_t, w_t = models(31)
    z_s, z_t, ids = h_s @ w_s.T, h_t @ w_t.T, tokens(31)
    expected = mk.distill_stats(z_s, z_t, ids)
    torch.manual_seed(3)
    for empty in (None, 0, size - 1, size // 2):
        for _ in range(2):
            bounds = [0, *torch.randperm(30)[: size - 1].add(1).sort().values.tolist(), 31]
            if empty is not None:
                bounds[empty + 1 if empty + 1 < size else empty] = bounds[empty if empty + 1 < size else size]
            here = slice(bounds[rank], bounds[rank + 1])
            stats = mk.distill_stats(z_s[:, here], z_t[:, here], ids, group=dist.group.WORLD)
            for name, x in stats._asdict().items():
                close(name, x, getattr(expected, name))
            agree(*stats)


def vocabulary_ends_early(V: int, counting: int) -> None:
    """vocab_size below all columns, with ranks that lie beyond it; teachers with more columns or fewer at the end."""
    h_s, w_s, h_t, w_t = models(V)
    z_s, z_t, here = h_s @ w_s.T, h_t @ w_t.T, cut(V)
    ids = tokens(counting)

    def function(student: Tensor, split: slice | None = None) -> Any:
        keywords = {"vocab_size": counting} | ({} if split is None else {"group": dist.group.WORLD})
        teacher = z_t if split is None else z_t[:, split]
        jsd = mk.fused_divergence_loss(student, teacher, "jsd", reduction="sum", **keywords)
        return jsd, *mk.distill_stats(student, teacher, ids, **keywords)

    both(function, [(z_s, 1)], V)
    shorter = z_t[:, here.start : max(here.start, min(here.stop, counting))]  # ends with the columns that count
    stats = mk.distill_stats(z_s[:, here], shorter, ids, group=dist.group.WORLD)
    for x, y in zip(stats, mk.distill_stats(z_s, z_t, ids, vocab_size=counting), strict=True):
        close("shorter teacher", x, y)


def special_rows(backend: str, dtype: torch.dtype) -> None:
    """NaN, infinities and rows or slices without support: the same as in one process, in their own rows."""
    size, V = dist.get_world_size(), 40
    here, all_of_last = cut(V), slice(-(-V // size) * (size - 1), V)
    torch.manual_seed(1)
    z_s, z_t = torch.randn(12, V).to(dtype), torch.randn(12, V).to(dtype)
    z_s[0, V - 1] = math.nan
    z_s[1, all_of_last] = math.nan  # nothing else on its rank
    z_s[2, all_of_last] = -math.inf
    z_s[2, V - 1] = math.nan
    z_s[3, all_of_last] = -math.inf  # a rank without support
    z_t[4, all_of_last] = -math.inf
    z_s[5], z_s[6], z_t[7] = -math.inf, math.nan, -math.inf
    z_s[8, V - 1], z_t[9, V - 1], z_t[10, all_of_last] = math.inf, math.inf, math.nan
    ids = torch.tensor([0, 0, 0, V - 1, V - 1, 3, 3, 3, 0, 0, 0, V - 1])
    coefficients = torch.tensor([1.0, 0.5, -2.0, 0.3, 0.1], dtype=dtype)

    def results(s: Tensor, t: Tensor, **group: Any) -> list[Tensor]:
        s = s.clone().requires_grad_()
        stats = mk.distill_stats(s, t, ids, **group)
        differentiable = [getattr(stats, name) for name in mk.rows.DIFFERENTIABLE]
        sum((c * x.nan_to_num(0, 0, 0)).sum() for c, x in zip(coefficients, differentiable, strict=True)).backward()
        divergences = [
            mk.fused_divergence_loss(s.detach(), t, name, reduction="none", **group) for name in ("jsd", "tvd")
        ]
        student = mk.token_logprobs(s.detach(), ids, return_entropy=True, **group)
        return [s.grad, *stats, *divergences, *student]

    with mk.use_backend(backend):
        whole = results(z_s, z_t)
        split = results(z_s[:, here], z_t[:, here], group=dist.group.WORLD)
    assert len(split) == 12
    close("gradient", split[0], whole[0][:, here], dtype)
    for i, (x, y) in enumerate(zip(split[1:], whole[1:], strict=True)):
        close(f"result {i}", x, y, dtype)
    agree(*split[1:])


def in_float32(shift: float) -> None:
    """Rows of 20,000 columns far from 0, by the backend of the CPU."""
    torch.manual_seed(3)
    V = 20_000
    z_s, z_t, ids = 3 * torch.randn(6, V) + shift, 3 * torch.randn(6, V) - shift, torch.randint(0, V, (6,))
    here = cut(V)
    truth = mk.distill_stats(z_s.double(), z_t.double(), ids)
    stats = mk.distill_stats(z_s[:, here], z_t[:, here], ids, group=dist.group.WORLD)
    for name, x in stats._asdict().items():
        close(name, x, getattr(truth, name), torch.float32)
    for kind in ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        value = mk.fused_divergence_loss(z_s[:, here], z_t[:, here], kind, reduction="none", group=dist.group.WORLD)
        expected = mk.fused_divergence_loss(z_s.double(), z_t.double(), kind, reduction="none")
        close(kind, value, expected, torch.float32)
    agree(*stats)
    close("the same law twice", mk.fused_rkl_loss(z_s[:, here], z_s[:, here], group=dist.group.WORLD),
          torch.zeros(()), torch.float32)  # fmt: skip


def in_16_bits() -> None:
    """bfloat16 heads, and autocast of float32 ones: what the same calls give in one process, but for the rounding of
    the parts that ranks add up."""
    V = 301
    h_s, w_s, h_t, w_t = (x.float() for x in models(V))
    here = cut(V)
    for cast, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        results = []
        for part, group in ((slice(None), {}), (here, {"group": dist.group.WORLD})):
            hidden, weight = (x.to(cast, copy=True).requires_grad_() for x in (h_s, w_s[part]))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = mk.fused_linear_rkl_loss(hidden, weight, h_t.to(cast), w_t[part].to(cast), **group)
            loss.backward()
            assert hidden.grad.dtype == weight.grad.dtype == cast
            results.append((loss, hidden.grad, weight.grad))
        (loss, dh, dw), (loss_2, dh_2, dw_2) = results
        close("loss", loss_2, loss, torch.float32)
        assert (dh_2 - dh).abs().max() <= 2**-7 * dh.abs().max() and (
            dw_2 - dw[here]
        ).abs().max() <= 2**-7 * dw.abs().max()
        agree(loss_2, dh_2)
    z_s, z_t = (h_s @ w_s.T).bfloat16(), (h_t @ w_t.T).bfloat16()
    gradients = []
    for part, group in ((slice(None), {}), (here, {"group": dist.group.WORLD})):
        student = z_s[:, part].clone().requires_grad_()
        (3 * mk.fused_rkl_loss(student, z_t[:, part], **group)).backward()  # formed with the loss, and again for the 3
        gradients.append(student.grad)
    assert (gradients[1] - gradients[0][:, here]).abs().max() <= 2**-7 * gradients[0].abs().max()


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


def raises(error: type | tuple[type, ...], message: str, call: Callable) -> None:
    try:
        call()
    except error as found:
        assert message in str(found), found
        return
    raise AssertionError(f"no {error} that says {message!r}")


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
