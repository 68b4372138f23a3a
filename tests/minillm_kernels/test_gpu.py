"""What only a GPU can show of the CUDA and Triton kernels: `pytest -m gpu -n 8`, and the tests that matter first,
`pytest -m gpu_first -n 8`. Skipped elsewhere.

Under NVIDIA's checker:  compute-sanitizer --tool memcheck python -m pytest -m gpu tests/minillm_kernels/test_gpu.py
(and --tool racecheck, initcheck, synccheck; set PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor has its own
allocation).
"""

from contextlib import nullcontext

import cases
import oracle
import pytest
import torch
from cases import BF16, FP16, FP32, NAMES, Case
from tolerance import assert_gradient, assert_values, gradient_terms

from minillm_kernels import (
    available_backends,
    distill_stats,
    fused_divergence_loss,
    fused_linear_distill_stats,
    fused_linear_divergence_loss,
    fused_linear_minillm_loss,
    fused_linear_rkl_loss,
    fused_rkl_loss,
    last_backend,
    mixed_sample,
    token_logprobs,
    use_backend,
)
from minillm_kernels.backends import cuda
from minillm_kernels.rows import Pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DIVERGENCES = ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
FIRST = cases.ALL[:: max(1, len(cases.ALL) // 12)]


def marked(found: list[Case]) -> list:
    """The cases, those that matter first with the marker that says so."""
    return [pytest.param(c, marks=pytest.mark.gpu_first) if c in FIRST else c for c in found]


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def on_gpu(request):
    if available_backends()[request.param] != "ok":
        pytest.skip(available_backends()[request.param])
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("case", marked(cases.ALL), ids=str)
def test_statistics_and_their_gradient(case, on_gpu):
    s, t = case.logits()
    ids, coefficients = case.token_ids(), case.coefficients(len(oracle.DIFFERENTIABLE))
    leaf, x = s.double().requires_grad_(), s.cuda().requires_grad_()
    truth = oracle.statistics(leaf, t, ids, case.temperature, case.vocab_size)
    plain = oracle.statistics(s.float(), t, ids, case.temperature, case.vocab_size, FP32)
    stats = distill_stats(x, t.cuda(), ids.cuda(), temperature=case.temperature, vocab_size=case.vocab_size)
    assert last_backend() == on_gpu
    expected = actual = 0
    for name, c in zip(oracle.DIFFERENTIABLE, coefficients, strict=True):
        expected = expected + torch.where(truth[name].isfinite(), truth[name] * c, 0).sum()
        value = getattr(stats, name)
        actual = actual + torch.where(value.isfinite(), value * c.cuda().float(), 0).sum()
    for name in oracle.STATISTICS:
        assert_values(getattr(stats, name).cpu(), truth[name].detach(), plain[name], name)
    log_q, log_p = oracle.log_probabilities(s, t, case.temperature, case.vocab_size)
    terms = gradient_terms(log_q, log_p, coefficients, case.temperature, ids)
    assert_gradient(oracle.gradient(actual, x).cpu(), oracle.gradient(expected, leaf), terms)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("case", [c for c in cases.ALL if c.V < 10_000 and c.temperature == 1.0], ids=str)
def test_divergences(case, name):
    s, t = case.logits()
    leaf, x = s.double().requires_grad_(), s.cuda().requires_grad_()
    truth = oracle.divergence(leaf, t, name, 0.3, 1.0, case.vocab_size)
    values = fused_divergence_loss(x, t.cuda(), name, beta=0.3, vocab_size=case.vocab_size, reduction="none")
    assert_values(values.cpu(), truth.detach())
    expected = torch.where(truth.isfinite(), truth, 0).sum()
    actual = torch.where(values.isfinite(), values, 0).sum()
    log_q, log_p = oracle.log_probabilities(s, t, 1.0, case.vocab_size)
    terms = gradient_terms(log_q, log_p, torch.ones(1, *case.leading).double(), 1.0)
    assert_gradient(oracle.gradient(actual, x).cpu(), oracle.gradient(expected, leaf), terms)


SETTINGS = {
    "plain": {},
    "T0.7": dict(temperature=0.7),
    "top-k": dict(top_k=20),
    "top-p": dict(top_p=0.8),
    "greedy": dict(temperature=0.0),
}


@pytest.mark.gpu_first
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=NAMES.get)
def test_the_tokens_of_the_cpu(setting, dtype):
    """But where the uniform lies within 1e-5 of the boundary of two tokens: at most 2 of 400 rows."""
    s, t = Case(4500, (400,), dtype, BF16).logits()
    uniforms = torch.rand(400, 2, dtype=torch.float64)
    with use_backend("cpu"):
        right = mixed_sample(s, t, 0.4, uniforms=uniforms, **SETTINGS[setting])
    x = mixed_sample(s.cuda(), t.cuda(), 0.4, uniforms=uniforms.cuda(), **SETTINGS[setting])
    same = x.token_ids.cpu() == right.token_ids
    assert same.sum() >= 398
    torch.testing.assert_close(x.mixture_logprobs.cpu()[same], right.mixture_logprobs[same], rtol=3e-6, atol=3e-6)


def _everything(s, t, ids, uniforms):
    x = s.detach().requires_grad_()
    stats = distill_stats(x, t, ids)
    jsd = fused_divergence_loss(x, t, "jsd", reduction="none")
    (grad,) = torch.autograd.grad(stats.reverse_kl.sum() + stats.student_logprobs.sum() + jsd.sum(), x)
    scalars = [fused_rkl_loss(x, t, ids), fused_divergence_loss(x, t, "forward_kl", ids, weights=ids.float())]
    grads = [torch.autograd.grad(loss * factor, x)[0] for loss, factor in zip(scalars, (1.0, 0.3), strict=True)]
    return [*stats, jsd, grad, *scalars, *grads, *mixed_sample(s, t, uniforms=uniforms)]


def _everything_linear(heads, ids):
    """Of hidden states and heads, in several chunks; a third of the rows does not count."""
    hidden, weight, *teacher = heads
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    models, options = (*leaves, *teacher), {"chunk_rows": 24}
    constants = dict.fromkeys(("advantages", "old_logprobs"), torch.ones_like(ids, dtype=FP32))
    stats = fused_linear_distill_stats(*models, ids, **options)
    losses = [
        fused_linear_rkl_loss(*models, **options),
        fused_linear_rkl_loss(*models, ids, **options),
        fused_linear_divergence_loss(*models, "jsd", ids, **options),
        fused_linear_minillm_loss(*models, ids, **constants, **options).loss,
        stats.reverse_kl.sum() + stats.student_logprobs.sum(),
    ]
    grads = [torch.autograd.grad(loss, leaves) for loss in losses]
    return [*stats, *losses, *(g for pair in grads for g in pair)]


def _linear_problem():
    heads = [torch.randn(shape, device="cuda").bfloat16() for shape in ((64, 32), (5003, 32), (64, 48), (5003, 48))]
    ids = torch.arange(64, device="cuda")
    return heads, ids.masked_fill(ids % 3 == 0, -100)


@pytest.mark.gpu_first
def test_the_same_bits_every_time_and_wherever_the_rows_lie(on_gpu):
    """Triton's tiles start where a row is aligned: elsewhere in memory it adds in another order."""
    s, t = (x.cuda() for x in Case(50257, (9,), BF16, BF16).logits())  # of an odd width: each row aligned otherwise
    ids, uniforms = torch.arange(9).cuda(), torch.rand(9, 2, dtype=torch.float64).cuda()
    shifted = torch.empty(9 * 50257 + 3, dtype=BF16, device="cuda")[3:].view(9, 50257).copy_(s)
    first = _everything(s, t, ids, uniforms)
    for other in (s, shifted) if on_gpu == "cuda" else (s, s):
        for a, b in zip(first, _everything(other, t, ids, uniforms), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu_first
def test_losses_of_hidden_states_on_a_stream_that_forbids_synchronisation():
    heads, ids = _linear_problem()
    right = _everything_linear(heads, ids)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            results = _everything_linear(heads, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    for a, b in zip(right, results, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


@pytest.mark.gpu_first
def test_losses_of_hidden_states_in_a_cuda_graph():
    heads, ids = _linear_problem()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _everything_linear(heads, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _everything_linear(heads, ids)
    for x in heads:
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(outputs, _everything_linear(heads, ids), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


@pytest.mark.gpu_first
def test_the_weights_gradient_is_summed_in_fp32():
    """Over 64 chunks, each without a rounding of its own to bf16: as near to float64 as a matmul of all rows is."""
    shapes = ((4096, 64), (1000, 64), (4096, 64), (1000, 64))
    heads = [
        (0.3 * torch.randn(shape, device="cuda")).bfloat16() for shape in shapes
    ]  # logits that bf16 hardly rounds
    exact = [x.double().requires_grad_(i < 2) for i, x in enumerate(heads)]
    zeros = torch.zeros(4096, device="cuda", dtype=torch.long)
    oracle.statistics(exact[0] @ exact[1].t(), exact[2] @ exact[3].t(), zeros)["reverse_kl"].sum().backward()
    right = exact[1].grad

    def error(grad):
        return float((grad.double() - right).norm() / right.norm())

    def of_chunks(rows):
        leaves = [x.clone().requires_grad_() for x in heads[:2]]
        fused_linear_rkl_loss(*leaves, *heads[2:], chunk_rows=rows, reduction="sum").backward()
        return leaves[1].grad

    assert error(of_chunks(64)) <= 1.05 * error(of_chunks(4096)) < 2**-8


@pytest.mark.gpu_first
def test_a_stream_of_ones_own_and_no_synchronisation():
    s, t = (x.cuda() for x in Case(50257, (64,), BF16, BF16).logits())
    ids, uniforms = torch.arange(64).cuda(), torch.rand(64, 2, dtype=torch.float64).cuda()
    right = _everything(s, t, ids, uniforms)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            results = _everything(s, t, ids, uniforms)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    for a, b in zip(right, results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu_first
def test_cuda_graph():
    s, t = (x.cuda() for x in Case(50257, (8,), BF16, BF16).logits())
    ids, uniforms = torch.arange(8).cuda(), torch.rand(8, 2, dtype=torch.float64).cuda()
    _everything(s, t, ids, uniforms)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _everything(s, t, ids, uniforms)
    s.copy_(torch.randn_like(s))
    graph.replay()
    for a, b in zip(outputs, _everything(s, t, ids, uniforms), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu_first
@pytest.mark.parametrize("V", [32000, 50257])
def test_losses_of_hidden_states_are_those_of_the_reference(V):
    """bf16 rows that the CUDA backend reads once where shared memory holds them."""
    hidden, weight = torch.randn(600, 64, device="cuda").bfloat16(), torch.randn(V, 64, device="cuda").bfloat16()
    results = []
    for backend in (None, "reference"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with use_backend(backend) if backend else nullcontext():
            loss = fused_linear_rkl_loss(*leaves, hidden.flip(0), weight)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for ours, theirs in zip(*results, strict=True):
        error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert error < 2**-6


@pytest.mark.gpu_first
@pytest.mark.parametrize("V", [28000, 32000, 50257])
def test_statistics_and_gradient_in_one_launch_are_those_of_two(on_gpu, V):
    """By one block a row, and by clusters of two; also over the student. Twice the same bits."""
    if on_gpu != "cuda":
        pytest.skip("of the CUDA backend alone")
    s, t = (x.cuda() for x in Case(V, (150,), BF16, BF16).logits())
    pair = Pair(s, t, temperature=1.0, vocab_size=V)
    if not cuda.backend.holds_rows(cuda.backend.operations, pair):
        pytest.skip(f"the multiprocessors of this device hold no row pair of {V} columns")
    coefficients, ids = torch.randn(5, 150, device="cuda"), torch.arange(150, device="cuda") * (V // 150)
    stats = cuda.backend.row_stats(pair, ids, None)
    at_once = cuda.backend.row_stats_grad(pair, ids, coefficients)
    found, expected = oracle.of_any_origin(at_once[0]), oracle.of_any_origin(stats)
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=3e-6)
    grad = cuda.backend.row_grad(pair, ids, stats, coefficients)
    torch.testing.assert_close(at_once[1], grad, rtol=2**-7, atol=1e-6)
    again = cuda.backend.row_stats_grad(pair, ids, coefficients, s)
    assert torch.equal(again[0], at_once[0]) and torch.equal(s, at_once[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    s, t = (x.to("cuda:1") for x in Case(4111).logits())
    assert fused_rkl_loss(s, t).device == s.device and torch.cuda.current_device() == 0


@pytest.mark.gpu_first
def test_a_token_outside_the_vocabulary_is_nan():
    s = torch.randn(3, 60).cuda()
    assert token_logprobs(s, torch.tensor([3, 60, -1]).cuda()).isnan().tolist() == [False, True, True]


@pytest.mark.gpu_first
def test_memory_of_the_loss_is_of_the_order_of_the_rows():
    s, t = torch.randn(64, 50257, device="cuda"), torch.randn(64, 50257, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_rkl_loss(s, t)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_offsets_beyond_32_bits():
    try:
        storage = torch.empty(2**31 + 10_000, dtype=BF16, device="cuda")
    except torch.OutOfMemoryError as error:
        pytest.skip(str(error))
    far = storage.as_strided((2, 4111), (2**31 + 14, 1))
    far.copy_(torch.randn(2, 4111))
    near, t = far.clone(), torch.randn(2, 4111, device="cuda")
    ids, uniforms = torch.tensor([0, 5]).cuda(), torch.rand(2, 2, dtype=torch.float64).cuda()
    for a, b in zip(_everything(far, t, ids, uniforms), _everything(near, t, ids, uniforms), strict=True):
        assert torch.equal(a, b)
