"""Runs the compiled PTX of the Triton kernels on the CPU: python tests/tools/triton_ptx.py 80|90

Whole operations, through their launchers: benchmarks.gpu_static.recording compiles what they launch, ptxjit executes
it, with bounds checks on every buffer and four schedules of the threads, which must give the same bits without a
message. The results are compared with the reference in float64. test_triton_ptx.py calls this, with the repository
and ptxjit on the path.
"""

import sys

import torch
from ptxjit import Module  # type: ignore[import-not-found]

from benchmarks.gpu_static.recording import Launch, recording
from minillm_kernels.backends.reference import backend as REFERENCE
from minillm_kernels.backends.triton import divergence, grad, linear, sample, scale, stats
from minillm_kernels.hidden.operands import Projection
from minillm_kernels.rows import Pair

modules: dict[int, Module] = {}
launched: set[str] = set()


def executor(schedule: int):
    def execute(launch: Launch) -> None:
        module = modules.setdefault(id(launch.kernel), Module(launch.kernel.asm["ptx"]))
        shared = launch.kernel.metadata.shared
        result = module.launch(launch.name, launch.grid, launch.threads, launch.arguments, smem=shared, order=schedule)
        assert not result.msg, (launch.name, result.msg)
        launched.add(launch.name)

    return execute


def check(name: str, tolerance: float, run, truth) -> None:
    """run() -> tensors, in each schedule; truth: what they must be, in float64."""
    results = []
    for schedule in range(4):
        with recording(int(sys.argv[1]), executor(schedule)):
            results.append(run())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), f"{name}: a schedule changed the bits"
    for a, b in zip(results[0], truth, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
    print("ok", name, flush=True)


def rows(n: int, V: int, s_type: torch.dtype, t_type: torch.dtype) -> None:
    """Odd V: rows start on every column modulo 8, and the last tile is partial."""
    torch.manual_seed(V)
    s = (3 * torch.randn(n, V)).to(s_type)
    t = (s + torch.randn(n, V)).to(t_type)
    s[0, 5:9], t[-1, 2:4] = -torch.inf, -torch.inf
    ids, mask, T = torch.randint(V, (n,)), torch.arange(n) != 1, 1.3
    ids[0] = V - 1
    label = f"{n} x {V} {s_type}/{t_type}".replace("torch.", "")
    S, R = s.double(), t.double()
    gradient = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[s_type]

    pair, exact = Pair(s, t, T, V), Pair(S, R, T, V)
    x = REFERENCE.row_stats(exact, ids, mask)
    check(f"row_stats {label}", 4e-6, lambda: [stats.row_stats(pair, ids, mask)], [x])
    one = REFERENCE.row_stats(Pair(S, None, T, V), ids, None)
    check(f"row_stats, one model {label}", 4e-6, lambda: [stats.row_stats(Pair(s, None, T, V), ids, None)], [one])

    c = torch.randn(5, n)
    c[:, 1] = 0  # the masked row
    truth = REFERENCE.row_grad(exact, ids, x, c.double())
    check(f"row_grad {label}", gradient, lambda: [grad.row_grad(pair, ids, x.float(), c)], [truth])
    factor = torch.tensor(-2.0)
    again = lambda: [grad.row_grad(pair, ids, x.float(), c, torch.zeros_like(s), factor)]
    check(f"row_grad again {label}", gradient, again, [-2 * truth])
    y = truth.to(s_type)

    def scaled() -> list[torch.Tensor]:
        z = y.clone()
        scale.row_scale(z, factor)
        return [z]

    check(f"row_scale {label}", 0, scaled, [-2 * y.double()])
    for kind in ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd") if V == 4111 else ("jsd",):
        d = REFERENCE.row_divergence(exact, mask, x, kind, 0.3)
        args = (pair, mask, x.float(), kind, 0.3)
        check(f"{kind} {label}", 4e-6, lambda args=args: [divergence.row_divergence(*args)], [d])
        g = REFERENCE.row_divergence_grad(exact, x, d, c[0].double(), kind, 0.3)
        args = (pair, x.float(), d.float(), c[0], kind, 0.3)
        check(f"{kind} gradient {label}", gradient, lambda args=args: [divergence.row_divergence_grad(*args)], [g])

    u = torch.rand(n, 2, dtype=torch.float64)
    for options in ((T, 0, 1.0), (0.0, 0, 1.0)) + (((T, 20, 0.9),) if V == 4111 else ()):
        temperature, *filters = options
        args = (Pair(s, t, temperature, V), u, 0.4, *filters)
        draw = REFERENCE.row_sample(*args)
        check(f"row_sample {options} {label}", 4e-6, lambda args=args: sample.row_sample(*args), draw)


def heads(dtype: torch.dtype) -> None:
    """70 rows of 64: a second, partial block. Hidden sizes that are not whole steps of K; soft-cap, bias, scale."""
    torch.manual_seed(1)
    n, V, T = 70, 301, 1.3
    models = []
    for h in (40, 72):
        hidden, weight, bias = torch.randn(n, h), 0.3 * torch.randn(V, h), torch.randn(V)
        models.append(Projection(hidden.to(dtype), weight.to(dtype), bias.to(dtype), 5.0, 0.7))
    z = []
    for m in models:
        x = (m.hidden.double() @ m.weight.double().t() + m.bias.double()) * 0.7
        z.append(5.0 * torch.tanh(x / 5.0))
    ids, mask = torch.randint(V, (n,)), torch.arange(n) % 5 != 0
    truth = REFERENCE.row_stats(Pair(*z, T, V), ids, mask)
    check(f"linear_stats {dtype}", 2e-5, lambda: [linear.linear_stats(*models, ids, mask, T, V)], [truth])
    c = torch.randn(5, n) * mask
    g = REFERENCE.row_grad(Pair(*z, T, V), ids, truth, c.double()) * (1 - (z[0] / 5.0) ** 2) * 0.7

    def run():
        tile = torch.zeros(n, 128, dtype=dtype)
        return [linear.linear_grad_tile(*models, ids, truth.float(), c, T, V, tile, 128)]

    check(f"linear_grad_tile {dtype}", 2**-8 if dtype == torch.bfloat16 else 2e-5, run, [g[:, 128:256]])


rows(3, 4111, torch.bfloat16, torch.float32)
rows(2, 2050, torch.float32, torch.float32)
rows(2, 9001, torch.bfloat16, torch.bfloat16)
heads(torch.bfloat16)
print(f"{len(launched)} kernels executed: {', '.join(sorted(launched))}")
