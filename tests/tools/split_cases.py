"""What each rank of a world does: a function of minillm_kernels on its columns, compared with the whole vocabulary in
one process, in float64 by the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def raises(error: type | tuple[type, ...], message: str, call: Callable) -> None:
    try:
        call()
    except error as found:
        assert message in str(found), found
        return
    raise AssertionError(f"no {error} that says {message!r}")


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
