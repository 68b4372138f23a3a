"""The divergence over a teacher's top tokens and one bucket, against the formula written out in float64."""

import doctest

import pytest
import torch

from minillm.model.head import Output
from minillm.teacher import top_k
from minillm.teacher.top_k import TopK, top_k_divergence
from minillm_kernels import Head, fused_linear_divergence_loss
from minillm_kernels.rows import DIVERGENCES

N, V, H, K = 33, 90, 12, 5


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


FORMULAS = {
    "forward_kl": lambda p, q, b: kl(p, q),
    "reverse_kl": lambda p, q, b: kl(q, p),
    "jsd": lambda p, q, b: b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q),
    "skew_forward_kl": lambda p, q, b: kl(p, b * p + (1 - b) * q),
    "skew_reverse_kl": lambda p, q, b: kl(q, (1 - b) * p + b * q),
    "tvd": lambda p, q, b: (p - q).abs().sum(-1) / 2,
}


def student(columns=V):
    weight, bias = torch.randn(columns, H, requires_grad=True), torch.randn(columns, requires_grad=True)
    return torch.randn(N, H, requires_grad=True), Head(weight, bias, softcap=20.0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_are_those_of_the_formula(divergence, temperature, monkeypatch):
    monkeypatch.setattr(top_k, "BUFFER", 16 * V)  # three chunks
    states, head = student(V + 7)
    law = TopK.of(torch.randn(N, V) * 3 / temperature, K)
    found = top_k_divergence(Output(states, head), law, divergence, beta=0.3, temperature=temperature, vocab_size=V)
    found.backward()

    exact = [x.detach().double().requires_grad_() for x in (states, head.weight, head.bias)]
    z = (exact[0] @ exact[1].T + exact[2])[:, :V]
    q = (20 * torch.tanh(z / 20) / temperature).softmax(-1)
    kept = q.gather(1, law.token_ids)
    q = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], 1)
    p = law.logprobs.double().exp()
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], 1)
    expected = FORMULAS[divergence](p, q, 0.3).sum()
    expected.backward()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for ours, theirs in zip((states, head.weight, head.bias), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_never_above_the_divergence_over_the_whole_vocabulary(divergence):
    output, teacher = student(), (torch.randn(N, H), Head(torch.randn(V, H)))
    law = TopK.of(teacher[1].logits(teacher[0]), V - 1)
    exact = fused_linear_divergence_loss(*output, *teacher, divergence, beta=0.3, reduction="sum")
    found = [float(top_k_divergence(Output(*output), law, divergence, beta=0.3))]
    found += [
        float(top_k_divergence(Output(*output), TopK.of(teacher[1].logits(teacher[0]), k), divergence, beta=0.3))
        for k in (20, 3)
    ]
    assert found[0] == pytest.approx(float(exact), rel=1e-4)  # all but one token: the bucket is that one
    assert found[0] * (1 + 1e-5) >= found[1] >= found[2] * (1 - 1e-5) >= 0


def test_a_tail_that_is_next_to_nothing_keeps_its_precision():
    logits = torch.randn(N, V)
    logits[:, 3] += 60.0
    law = TopK.of(logits, 1)
    assert bool((law.tail < -50).all()) and bool(law.tail.isfinite().all())
    output = student()
    found = top_k_divergence(Output(*output), law, "reverse_kl")
    q = law.outcomes_of(output[1].logits(output[0]).double())
    expected = (q.exp() * (q - law.outcomes().double())).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_the_example_in_its_docstring_runs():
    (example,) = doctest.DocTestFinder().find(top_k_divergence, "top_k_divergence", module=False, globs={})
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


def test_one_chunk_of_logits_is_kept_at_a_time(monkeypatch):
    monkeypatch.setattr(top_k, "BUFFER", 16 * V)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        top_k_divergence(Output(*student()), TopK.of(torch.randn(N, V), K), "forward_kl")
    assert all(V not in shape[1:] for shape in saved)
