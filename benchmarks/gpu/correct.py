"""Every operation on this card against float64, on random input: what each type and backend gives."""

from __future__ import annotations

import time

import torch

from .measure import RUN, attempt, backends_here, pair, record


def poison() -> None:
    """What the allocator hands out next is NaN, so an output that nobody wrote shows."""
    if RUN.dry:
        return
    sizes = (64, 1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 25, 300 * 50257, 600 * 50257, 300 * 4111, 3300, 1500)
    blocks = [torch.full((n,), float("nan"), device="cuda") for n in sizes]
    del blocks


def reference_stats(s, t, ids, T: float):
    lq, lp = torch.log_softmax(s / T, -1), torch.log_softmax(t / T, -1)
    q, p = lq.exp(), lp.exp()
    pick = lambda x: x.gather(-1, ids[..., None])[..., 0]
    return {
        "reverse_kl": (q * (lq - lp)).sum(-1),
        "forward_kl": (p * (lp - lq)).sum(-1),
        "student_logprobs": pick(lq),
        "teacher_logprobs": pick(lp),
        "student_entropy": -(q * lq).sum(-1),
        "student_logsumexp": torch.logsumexp(s / T, -1),
        "teacher_logsumexp": torch.logsumexp(t / T, -1),
    }


def reference_divergence(s, t, name: str, beta: float):
    lq, lp = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    q, p = lq.exp(), lp.exp()
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name == "skew_forward_kl":
        return kl(p, beta * p + (1 - beta) * q)
    if name == "skew_reverse_kl":
        return kl(q, (1 - beta) * p + beta * q)
    return 0.5 * (p - q).abs().sum(-1)


def apart(a, b) -> float:
    """||a - b|| / ||b||; NaN stays NaN."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


GRADIENT_LIMIT = {"float32": 2e-5, "bfloat16": 5e-3, "float16": 8e-4}


def check(name: str, error: float, limit: float, **more) -> None:
    record(name=name, error_norm=error, limit=limit, ok=bool(error <= limit), **more)  # NaN is not <=


def correct() -> None:
    for dtype in RUN.dtypes:
        for backend in backends_here():
            correct_backend(backend, getattr(torch, dtype))


def correct_backend(backend: str, dtype: torch.dtype) -> None:
    from minillm_kernels import use_backend

    shapes = [(5, 1001), (3, 4111)] if RUN.dry else [(5, 50257), (300, 4111), (3, 151936), (2, 128256), (150, 32000)]
    with use_backend(backend):
        for i, (n, V) in enumerate(shapes):
            run = lambda n=n, V=V, i=i: correct_rows(backend, dtype, n, V, i)
            attempt(f"correct {backend} {n}x{V}", run, least=3)
        attempt(f"sampling {backend}", lambda: correct_sampling(backend, dtype), least=3)
        attempt(f"linear {backend}", lambda: correct_linear(backend, dtype), least=3)
        attempt(f"odds {backend}", lambda: correct_odds(backend, dtype), least=3)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def correct_rows(backend: str, dtype, n: int, V: int, index: int) -> None:
    from minillm_kernels import distill_stats, fused_divergence_loss, fused_rkl_loss, token_logprobs

    label = {"backend": backend, "dtype": name_of(dtype), "shape": [n, V]}
    limit = GRADIENT_LIMIT[name_of(dtype)]
    seed = int(time.time() * 1000) % (1 << 31)
    s, t = pair(n, V, dtype, seed)
    ids = torch.randint(V, (n,), device=RUN.device)
    weights = torch.rand(n, device=RUN.device) + 0.5
    weights[0] = 0
    s[0, 3] = float("nan")  # a row of weight 0 is not read
    x, leaf = s.clone().requires_grad_(), torch.where(s.isnan(), 0, s).double().requires_grad_()
    T = 0.7 if index % 2 else 1.0
    truth = reference_stats(leaf, t.double(), ids, T)
    poison()
    values = fused_rkl_loss(x, t, weights=weights, temperature=T, reduction="none")
    check("rkl", apart(values, truth["reverse_kl"] * weights), 1e-5, **label, seed=seed)
    upstream = torch.randn(n, device=RUN.device)
    poison()
    (grad,) = torch.autograd.grad((values * upstream).sum(), x)
    (right,) = torch.autograd.grad((truth["reverse_kl"] * weights * upstream).sum(), leaf, retain_graph=True)
    check("rkl gradient", apart(grad, right), limit, **label, seed=seed)
    if not bool((grad[0] == 0).all()):
        check("rkl gradient of a masked row", float("nan"), 0, **label)
    s = torch.where(s.isnan(), 0, s)
    x = s.clone().requires_grad_()
    poison()
    stats = distill_stats(x, t, ids, temperature=T)
    for field, value in truth.items():
        check(field, apart(getattr(stats, field), value), 1e-5, **label, seed=seed)
    names = ("reverse_kl", "forward_kl", "student_logprobs", "student_entropy", "student_logsumexp")
    coefficients = torch.randn(len(names), n, device=RUN.device)
    ours = sum((getattr(stats, f) * c).sum() for f, c in zip(names, coefficients, strict=True))
    theirs = sum((truth[f] * c).sum() for f, c in zip(names, coefficients, strict=True))
    poison()
    (grad,) = torch.autograd.grad(ours, x)
    (right,) = torch.autograd.grad(theirs, leaf)
    check("all statistics' gradient", apart(grad, right), limit, **label, seed=seed)
    one, entropy = token_logprobs(s, ids, temperature=T, return_entropy=True)
    check("token_logprobs", apart(one, truth["student_logprobs"]), 1e-5, **label)
    check("entropy", apart(entropy, truth["student_entropy"]), 1e-5, **label)
    if index > 1:
        return  # the divergences on two shapes
    for name in ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        x, leaf = s.clone().requires_grad_(), s.double().requires_grad_()
        poison()
        values = fused_divergence_loss(x, t, name, beta=0.3, reduction="none")
        right = reference_divergence(leaf, t.double(), name, 0.3)
        check(name, apart(values, right), 2e-5, **label, seed=seed)
        poison()
        (grad,) = torch.autograd.grad((values * upstream).sum(), x)
        (exact,) = torch.autograd.grad((right * upstream).sum(), leaf)
        check(f"{name} gradient", apart(grad, exact), 2 * limit, **label, seed=seed)


def correct_sampling(backend: str, dtype) -> None:
    from minillm_kernels import mixed_sample, use_backend

    n, V = (50, 1001) if RUN.dry else (400, 50257)
    s, t = pair(n, V, dtype, 11)
    u = torch.rand(n, 2, dtype=torch.float64, device=RUN.device)
    for name, settings in {
        "plain": {},
        "T0.7": {"temperature": 0.7},
        "top-k": {"top_k": 20},
        "top-p": {"top_p": 0.8},
        "greedy": {"temperature": 0.0},
    }.items():
        poison()
        drawn = mixed_sample(s, t, 0.3, uniforms=u, **settings)
        with use_backend("reference"):
            right = mixed_sample(s, t, 0.3, uniforms=u, **settings)
        same = drawn.token_ids == right.token_ids
        record(
            name=f"mixed_sample {name}",
            backend=backend,
            dtype=name_of(dtype),
            same=float(same.double().mean()),
            logprob_error=float((drawn.mixture_logprobs - right.mixture_logprobs)[same].abs().max()),
            ok=bool(
                same.double().mean() >= 0.985
                and (drawn.mixture_logprobs - right.mixture_logprobs)[same].abs().max() < 1e-4
            ),
        )
    # against the law itself: 4 tokens of known probability, many draws
    rows = 2000 if RUN.dry else 40000
    law = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().to(RUN.device)
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().to(RUN.device)
    drawn = mixed_sample(law.expand(rows, 4).contiguous(), teacher.expand(rows, 4).contiguous(), 0.25)
    share = torch.bincount(drawn.token_ids, minlength=4).double() / rows
    expected = 0.25 * teacher.double().exp()[0] + 0.75 * law.double().exp()[0]
    far = float(((share - expected).abs() / (expected * (1 - expected) / rows).sqrt()).max())
    check("mixed_sample against its law, in deviations", far, 5.0, backend=backend, dtype=name_of(dtype))


def correct_linear(backend: str, dtype) -> None:
    from minillm_kernels import fused_linear_distill_stats, fused_linear_rkl_loss

    n, H, V = (40, 16, 501) if RUN.dry else (600, 128, 32000)
    g = torch.Generator(RUN.device).manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=g, device=RUN.device)
    h, w, th, tw = draw(n, H), 2.5 * draw(V, H) / H**0.5, draw(n, H), 2.5 * draw(V, H) / H**0.5
    h, w, th, tw = (x.to(dtype) for x in (h, w, th, tw))
    labels = torch.zeros(n, dtype=torch.long, device=RUN.device)
    labels[::5] = -100
    for impl in ("chunked", "tiled") if backend == "triton" else ("chunked",):
        leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        exact = [h.double().requires_grad_(), w.double().requires_grad_()]
        poison()
        loss = fused_linear_rkl_loss(
            *leaves, th, tw, labels, impl=impl, **({"chunk_rows": 256} if impl == "chunked" else {})
        )
        loss.backward()
        kl = reference_stats(exact[0] @ exact[1].t(), th.double() @ tw.double().t(), labels.clamp(min=0), 1.0)[
            "reverse_kl"
        ]
        right = kl[labels != -100].mean()
        right.backward()
        limit = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}[name_of(dtype)]
        label = {"backend": backend, "dtype": name_of(dtype), "impl": impl}
        check("linear rkl", apart(loss, right), limit, **label)
        for name, mine, theirs in zip(("hidden", "weight"), leaves, exact, strict=True):
            check(f"linear rkl, gradient of the {name}", apart(mine.grad, theirs.grad), limit, **label)
        ids = torch.randint(V, (n,), device=RUN.device)
        stats = fused_linear_distill_stats(h, w, th, tw, ids, impl=impl)
        right = reference_stats(h.double() @ w.double().t(), th.double() @ tw.double().t(), ids, 1.0)
        check("linear stats", apart(stats.reverse_kl, right["reverse_kl"]), limit, **label)


def correct_odds(backend: str, dtype) -> None:
    from minillm_kernels import fused_rkl_loss, token_logprobs

    V = 1001 if RUN.dry else 50257
    s, t = pair(8, V, dtype, 3)
    s3, t3 = s.view(2, 4, V), t.view(2, 4, V)
    view = fused_rkl_loss(s3[:, :-1], t3[:, :-1], reduction="none")
    copy = fused_rkl_loss(s3[:, :-1].contiguous(), t3[:, :-1].contiguous(), reduction="none")
    check("strided rows", apart(view, copy), 1e-6, backend=backend, dtype=name_of(dtype))
    masked = s.clone()
    masked[:, ::3] = -torch.inf
    keep = torch.ones(V, dtype=torch.bool, device=RUN.device)
    keep[::3] = False
    a = fused_rkl_loss(masked, t, reduction="none")
    b = reference_stats(
        s[:, keep].double(), t[:, keep].double(), torch.zeros(8, dtype=torch.long, device=RUN.device), 1.0
    )
    check("columns of -inf", apart(a, b["reverse_kl"]), 1e-5, backend=backend, dtype=name_of(dtype))
    far = fused_rkl_loss(s.float() + 1000, t.float() - 1000, reduction="none")
    near = reference_stats(
        (s.float() + 1000).double(),
        (t.float() - 1000).double(),
        torch.zeros(8, dtype=torch.long, device=RUN.device),
        1.0,
    )
    check("offset 1000", apart(far, near["reverse_kl"]), 1e-5, backend=backend, dtype=name_of(dtype))
    x = s.clone().requires_grad_()
    (out,) = torch.autograd.grad(fused_rkl_loss(x, t), x)
    y = s.clone().requires_grad_()
    z = y * 1
    fused_rkl_loss(z, t, inplace=True).backward()
    check("in place", apart(y.grad, out), 1e-6, backend=backend, dtype=name_of(dtype))
    empty = fused_rkl_loss(s[:0], t[:0])
    check("no rows", abs(float(empty)), 0.0, backend=backend, dtype=name_of(dtype))
    ids = torch.arange(8, device=RUN.device)
    if RUN.dry:
        return
    args = (s, t, ids)

    def everything(s, t, ids):
        return fused_rkl_loss(s, t, reduction="none"), token_logprobs(s, ids)

    everything(*args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            other = everything(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = everything(*args)
    s.copy_(torch.randn_like(s))
    graph.replay()
    torch.cuda.synchronize()
    again = everything(*args)
    check("CUDA graph", apart(held[0], again[0]), 0.0, backend=backend, dtype=name_of(dtype))
    record(name="own stream without synchronisation", ok=True, shape=list(other[0].shape))
