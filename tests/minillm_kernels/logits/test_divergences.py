"""fused_divergence_loss: all six divergences, their limits in beta and their gradients, against the float64 oracle."""

from functools import lru_cache

import cases
import oracle
import pytest
import torch
from cases import BF16, FP32, Case
from tolerance import assert_gradient, assert_values, gradient_terms

from minillm_kernels import fused_divergence_loss, fused_rkl_loss

# 0.1: the paper of the skew KL divergences; 0.9: the other side; 1: the mixture is one of the models.
LAWS = [
    ("reverse_kl", 0.5),
    ("forward_kl", 0.5),
    ("jsd", 0.5),
    ("jsd", 0.1),
    ("jsd", 0.9),
    ("jsd", 0.0),
    ("jsd", 1.0),
    ("skew_forward_kl", 0.1),
    ("skew_forward_kl", 0.9),
    ("skew_forward_kl", 0.0),
    ("skew_forward_kl", 1.0),
    ("skew_reverse_kl", 0.1),
    ("skew_reverse_kl", 0.9),
    ("skew_reverse_kl", 0.0),
    ("skew_reverse_kl", 1.0),
    ("tvd", 0.5),
]
MIXTURES = [("jsd", 0.5), ("jsd", 0.1), ("skew_forward_kl", 0.1), ("skew_reverse_kl", 0.1), ("tvd", 0.5)]


@lru_cache
def answer(case: Case, name: str, beta: float):
    s, t = case.logits()
    coefficients = case.coefficients(1)
    leaf = s.double().requires_grad_()
    truth = oracle.divergence(leaf, t, name, beta, case.temperature, case.vocab_size)
    plain = oracle.divergence(s.float(), t, name, beta, case.temperature, case.vocab_size, FP32)
    finite = torch.where(truth.isfinite(), truth * coefficients[0], 0).sum()
    log_q, log_p = oracle.log_probabilities(s, t, case.temperature, case.vocab_size)
    terms = gradient_terms(log_q, log_p, coefficients, case.temperature)
    return truth.detach(), plain, oracle.gradient(finite, leaf), terms


def check(case: Case, name: str, beta: float):
    s, t = case.logits()
    truth, plain, grad, terms = answer(case, name, beta)
    s.requires_grad_()
    values = fused_divergence_loss(
        s, t, name, beta=beta, temperature=case.temperature, vocab_size=case.vocab_size, reduction="none"
    )
    assert values.dtype == FP32
    assert_values(values, truth, plain)
    total = torch.where(values.isfinite(), values * case.coefficients(1)[0].float(), 0).sum()
    actual = oracle.gradient(total, s)
    assert actual.dtype == s.dtype
    assert_gradient(actual, grad, terms)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law[0]}-{law[1]}")
@pytest.mark.parametrize("case", [Case(4111, (2, 3)), Case(517, (5,), BF16, FP32, temperature=2.0)], ids=str)
def test_every_law(implementation, case, law):
    check(case, *law)


SOME = [c for c in cases.ALL if c.V < 10_000 and c.leading not in ((70,), (64,))]
SOME += [Case(2065, (64,)), Case(6161, (64,), pattern="peaks_outside"), Case(151936, (1,), BF16, BF16)]


@pytest.mark.parametrize("law", MIXTURES, ids=lambda law: f"{law[0]}-{law[1]}")
@pytest.mark.parametrize("case", SOME, ids=str)
def test_mixtures(implementation, case, law):
    check(case, *law)


@pytest.mark.parametrize("law", MIXTURES, ids=lambda law: f"{law[0]}-{law[1]}")
@pytest.mark.parametrize("distance", [3.0, 1e-2])
def test_precision_of_long_rows(implementation, law, distance):
    check(Case(151936, (2,), offset=1000.0, distance=distance), *law)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("law", [("forward_kl", 0.5), *MIXTURES], ids=lambda law: f"{law[0]}-{law[1]}")
def test_reductions_are_those_of_the_reverse_kl(backend, law, reduction):
    s, t = Case(517, (2, 3)).logits()
    labels = torch.tensor([[5, -100, 7], [-100, 1, 0]])
    weights = torch.tensor([[0.5, 2.0, 0.0], [1.0, 1.0, 3.25]])
    per_row = oracle.divergence(s.double(), t, *law)
    truth = oracle.reduce(per_row, weights, labels != -100, reduction)
    loss = fused_divergence_loss(s, t, law[0], labels, beta=law[1], weights=weights, reduction=reduction)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
    replaced = fused_divergence_loss(
        s, t, law[0], labels, beta=law[1], weights=weights, reduction="mean", normalizer=3.0
    )
    truth = oracle.reduce(per_row, weights, labels != -100, "mean", 3.0)
    torch.testing.assert_close(replaced.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law[0]}-{law[1]}")
def test_rows_that_do_not_count_are_not_read(implementation, law):
    s, t = torch.randn(4, 4111), torch.randn(4, 4111)
    s[1], t[2] = torch.nan, torch.inf
    s.requires_grad_()
    weights = torch.tensor([1.0, 0.0, 0.0, 2.0])
    loss = fused_divergence_loss(s, t, law[0], beta=law[1], weights=weights, reduction="none")
    assert loss[[1, 2]].tolist() == [0.0, 0.0] and loss.isfinite().all()
    loss.backward(torch.tensor([1.0, torch.nan, torch.nan, 1.0]))
    assert torch.equal(s.grad[[1, 2]], torch.zeros(2, 4111)) and s.grad.isfinite().all()
    if law[1] != 1.0:  # KL(p || p) is constant
        assert (s.grad[[0, 3]] != 0).all()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law[0]}-{law[1]}")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_nan_and_inf_are_shown_in_their_own_row(implementation, law, value, model):
    s, t = torch.randn(3, 4111), torch.randn(3, 4111)
    (s if model == "student" else t)[1, 2500] = value
    s.requires_grad_()
    loss = fused_divergence_loss(s, t, law[0], beta=law[1], reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert s.grad.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law[0]}-{law[1]}")
@pytest.mark.parametrize("pattern", ["row_empty", "disjoint"])
def test_empty_support(implementation, law, pattern):
    row = {"row_empty": 1, "disjoint": 0}[pattern]
    s, t = Case(4111, (3,), pattern=pattern).logits()
    s.requires_grad_()
    loss = fused_divergence_loss(s, t, law[0], beta=law[1], reduction="none")
    assert loss.isnan().tolist() == [i == row for i in range(3)]
    loss.sum().backward()
    assert torch.equal(s.grad[row], torch.zeros(4111)) and s.grad.isfinite().all()


@pytest.mark.parametrize("law", MIXTURES, ids=lambda law: f"{law[0]}-{law[1]}")
def test_gradient_is_exactly_zero_outside_the_support(implementation, law):
    s, t = Case(6161, (2,), teacher_V=6000, pattern="both_inf").logits()
    out = s.isinf()
    out[..., :6000] |= t.isinf()
    out[..., 6000:] = True
    s.requires_grad_()
    fused_divergence_loss(s, t, law[0], beta=law[1]).backward()
    assert (s.grad[out] == 0).all() and (s.grad[~out] != 0).all()


def test_total_variation_has_no_gradient_at_ties(implementation):
    """Equal models: every column a tie."""
    s, t = Case(4111, (3,), pattern="equal").logits()
    s.requires_grad_()
    loss = fused_divergence_loss(s, t, "tvd", reduction="none")
    loss.sum().backward()
    assert loss.abs().max() < 1e-6 and s.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_a_mixture_where_one_model_underflows(implementation, name):
    """p and q peaked apart: each term of the mixture has one probability that is 0 in fp32."""
    check(Case(4111, (2,), pattern="one_hot"), name, 0.3)


def test_reverse_kl_is_fused_rkl_loss(backend):
    s, t = Case(517, (4,)).logits()
    assert torch.equal(fused_divergence_loss(s, t, "reverse_kl"), fused_rkl_loss(s, t))
    assert torch.equal(fused_divergence_loss(s, t, "jsd", beta=1.0), fused_rkl_loss(s, t))


def test_float64_in_float64_out():
    s, t = (x.double() for x in Case(517, (4,)).logits())
    for name, beta in LAWS:
        leaf, x = s.clone().requires_grad_(), s.clone().requires_grad_()
        truth = oracle.divergence(leaf, t, name, beta).mean()
        loss = fused_divergence_loss(x, t, name, beta=beta)
        torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(oracle.gradient(loss, x), oracle.gradient(truth, leaf), rtol=1e-10, atol=1e-13)
