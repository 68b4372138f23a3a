"""fused_rkl_loss and FusedRKLLoss: values, gradients, what a row counts for, and the reductions."""

from functools import lru_cache

import cases
import oracle
import pytest
import torch
from cases import BF16, FP16, FP32, Case
from tolerance import assert_gradient, assert_values, gradient_terms

from minillm_kernels import (
    FusedRKLLoss,
    fused_divergence_loss,
    fused_linear_rkl_loss,
    fused_rkl_loss,
    token_logprobs,
)
from minillm_kernels.rows import DIVERGENCES

REDUCTIONS = ("none", "sum", "mean", "batchmean")


@lru_cache
def rows_answer(case: Case):
    """Of each row: the reverse KL in float64 and in plain fp32, and log q and log p."""
    s, t = case.logits()
    per_row = oracle.statistics(s.double(), t, None, case.temperature, case.vocab_size)["reverse_kl"]
    plain = oracle.statistics(s.float(), t, None, case.temperature, case.vocab_size, FP32)["reverse_kl"]
    return per_row, plain, *oracle.log_probabilities(s, t, case.temperature, case.vocab_size)


def check(case: Case, loss_of, labels=None, weights=None, reduction="batchmean", normalizer=None, ignore_index=-100):
    """loss_of(student, teacher) and its gradient, for upstream gradients other than 1, against the oracle."""
    per_row, plain, log_q, log_p = rows_answer(case)
    counts = None if labels is None else labels != ignore_index
    per_row = per_row.clone().requires_grad_()
    truth = oracle.reduce(per_row, weights, counts, reduction, normalizer)
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(9))
    coefficients = oracle.gradient((truth * upstream).sum(), per_row)

    s, t = case.logits()
    student = s.clone().requires_grad_()
    loss = loss_of(student, t)
    assert loss.shape == truth.shape and loss.dtype == FP32
    assert_values(loss, truth.detach(), oracle.reduce(plain, weights, counts, reduction, normalizer))
    leaf = s.double().requires_grad_()
    again = oracle.statistics(leaf, t, None, case.temperature, case.vocab_size)["reverse_kl"]
    grad = oracle.gradient((again * coefficients).sum(), leaf)
    actual = oracle.gradient((loss * upstream).sum(), student)
    assert_gradient(actual, grad, gradient_terms(log_q, log_p, coefficients[None], case.temperature))


# distill_stats has met every case; these are the reverse KL's own path through every kind of them.
SOME = [c for c in cases.ALL if c.V < 5000 and c.pattern not in ("row_empty", "disjoint", "tiles_inf")]
SOME = [c for c in SOME if c.leading != (70,)] + [Case(151936, (1,), BF16, BF16)]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_batchmean_of_all_rows(implementation, case):
    check(case, lambda s, t: fused_rkl_loss(s, t, temperature=case.temperature, vocab_size=case.vocab_size))


def _labels(*values):
    return torch.tensor(values).reshape(2, 3)


MASKS = {
    "all": (None, None),
    "labels": (_labels(5, -100, 7, -100, -100, 0), None),
    "weights": (None, torch.tensor([[0.5, 0.0, 2.0], [0.0, 1.0, 3.25]])),
    "both": (_labels(5, -100, 7, -100, 2, 0), torch.tensor([[0.5, 2.0, 0.0], [1.0, 1.0, 3.25]])),
    "negative": (None, torch.tensor([[-1.0, 0.5, 2.0], [1.0, 0.0, 3.0]])),
    "weights-broadcast": (None, torch.tensor([[2.0], [0.5]])),
    "weights-integer": (None, torch.tensor([[2, 0, 1], [1, 1, 0]])),
    "no-label": (_labels(*[-100] * 6), None),
    "no-weight": (None, torch.zeros(2, 3)),
    "weights-cancel": (None, torch.tensor([[1.0, -1.0, 0.0], [0.0, 2.0, -2.0]])),
}


@pytest.mark.parametrize("normalizer", [None, 7.5, torch.tensor(12.0)], ids=["", "number", "tensor"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=cases.NAMES.get)
def test_reductions(backend, masks, reduction, normalizer, dtype):
    labels, weights = MASKS[masks]
    check(
        Case(517, (2, 3), dtype, FP16),
        lambda s, t: fused_rkl_loss(s, t, labels, weights=weights, reduction=reduction, normalizer=normalizer),
        labels,
        weights,
        reduction,
        normalizer,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignore_index(backend, reduction):
    labels = _labels(5, 0, 7, 0, -100, 1)
    check(
        Case(60, (2, 3)),
        lambda s, t: fused_rkl_loss(s, t, labels, ignore_index=0, reduction=reduction),
        labels,
        None,
        reduction,
        ignore_index=0,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_no_rows(implementation, leading, reduction):
    s = torch.randn(*leading, 60, requires_grad=True)
    loss = fused_rkl_loss(s, torch.randn(*leading, 60), reduction=reduction)
    assert loss.shape == (leading if reduction == "none" else ()) and loss.sum() == 0
    loss.sum().backward()
    assert s.grad.shape == s.shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masks", ["no-label", "no-weight"])
def test_nothing_that_counts_gives_zero(backend, reduction, masks):
    labels, weights = MASKS[masks]
    s = torch.full((2, 3, 60), torch.nan, requires_grad=True)
    loss = fused_rkl_loss(s, torch.randn(2, 3, 60), labels, weights=weights, reduction=reduction)
    assert (loss == 0).all()
    loss.sum().backward()
    assert torch.equal(s.grad, torch.zeros(2, 3, 60))


@pytest.mark.parametrize("masks", ["labels", "weights"])
def test_rows_that_do_not_count_are_not_read(implementation, masks):
    """NaN, +inf and empty rows behind a zero weight: loss and gradient exactly 0, even for NaN from upstream."""
    labels, weights = MASKS[masks]
    kept = (weights != 0) if labels is None else labels != -100
    s, t = torch.randn(2, 3, 4111), torch.randn(2, 3, 4111)
    s[~kept], t[~kept] = torch.nan, torch.inf
    s[0, 1], t[0, 1] = -torch.inf, -torch.inf
    s.requires_grad_()
    loss = fused_rkl_loss(s, t, labels, weights=weights, reduction="none")
    assert (loss[~kept] == 0).all() and (loss[kept] > 0).all()
    loss.backward(torch.where(kept, 1.0, torch.nan))
    assert torch.equal(s.grad[~kept], torch.zeros_like(s.grad[~kept]))
    assert s.grad[kept].isfinite().all() and (s.grad[kept] != 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("partner", [0.0, -torch.inf], ids=["beside-finite", "beside-inf"])
@pytest.mark.parametrize("column", [0, 2047, 4110])
def test_nan_and_inf_are_shown_in_their_own_row(implementation, value, model, partner, column):
    """Also where the other model has -inf in that column: it is not taken out of the support silently."""
    s, t = torch.randn(3, 4111), torch.randn(3, 4111)
    bad, other = (s, t) if model == "student" else (t, s)
    bad[1, column] = value
    other[1, column] += partner
    s.requires_grad_()
    loss = fused_rkl_loss(s, t, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert s.grad.isnan().any(-1).tolist() == [False, True, False]


def test_a_row_of_nothing_but_nan(implementation):
    s, t = torch.full((2, 4111), torch.nan), torch.full((2, 4111), torch.nan)
    t[0] = 0.0
    s.requires_grad_()
    loss = fused_rkl_loss(s, t, reduction="none")
    assert loss.isnan().all()
    loss.sum().backward()
    assert s.grad.isnan().all()


@pytest.mark.parametrize("pattern", ["row_empty", "disjoint"])
def test_empty_support(implementation, pattern):
    """NaN with gradient 0, while the other rows are as always."""
    case = Case(4111, (3,), pattern=pattern)
    row = {"row_empty": 1, "disjoint": 0}[pattern]
    s, t = case.logits()
    s.requires_grad_()
    loss = fused_rkl_loss(s, t, reduction="none")
    assert loss.isnan().tolist() == [i == row for i in range(3)]
    loss.sum().backward()
    assert torch.equal(s.grad[row], torch.zeros(4111))
    assert (s.grad.count_nonzero(-1) == 4111).tolist() == [i != row for i in range(3)]


@pytest.mark.parametrize("case", cases.HEADS, ids=str)
def test_columns_beyond_the_vocabulary(implementation, case):
    """Not read (NaN), and their gradient is exactly 0."""
    s, t = case.logits()
    clean = s.clone().requires_grad_()
    fused_rkl_loss(clean, t, vocab_size=case.vocab_size, temperature=case.temperature).backward()
    s[..., case.columns :], t[..., case.columns :] = torch.nan, torch.nan
    s.requires_grad_()
    fused_rkl_loss(s, t, vocab_size=case.vocab_size, temperature=case.temperature).backward()
    assert torch.equal(s.grad, clean.grad)
    assert torch.equal(s.grad[..., case.columns :], torch.zeros_like(s[..., case.columns :]))


def test_gradient_is_exactly_zero_outside_the_support(implementation):
    s, t = Case(6161, (2,), pattern="both_inf").logits()
    out = s.isinf() | t.isinf()
    s.requires_grad_()
    fused_rkl_loss(s, t).backward()
    assert (s.grad[out] == 0).all() and (s.grad[~out] != 0).all()


POISONS = {
    "teacher-inf": lambda s, t: t[0].__setitem__(3, torch.inf),
    "teacher-nan": lambda s, t: t[0].__setitem__(3, torch.nan),
    "student-nan": lambda s, t: s[0].__setitem__(5, torch.nan),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("loss", [*DIVERGENCES, "token_logprobs", "entropy"])
def test_columns_that_the_student_excludes_have_gradient_zero_in_a_row_of_nan(implementation, loss, poison):
    """Column 3, beside whatever the teacher has there; what is wrong stays in row 0."""
    s, t = torch.randn(2, 2065), torch.randn(2, 2065)
    s[:, [3, 40, 2060]] = -torch.inf
    POISONS[poison](s, t)
    s.requires_grad_()
    if loss in DIVERGENCES:
        per_row = fused_divergence_loss(s, t, loss, beta=0.3, reduction="none")
        assert per_row[0].isnan()
    else:
        logprobs, entropy = token_logprobs(s, torch.tensor([7, 7]), return_entropy=True)
        per_row = entropy if loss == "entropy" else logprobs
        assert per_row[0].isnan() == (poison == "student-nan")
    per_row.sum().backward()
    assert (s.grad[:, [3, 40, 2060]] == 0).all()
    assert s.grad[1].isfinite().all() and s.grad[1].any()


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 3e38])
def test_mean_over_weights_whose_sum_float32_does_not_hold(backend, scale):
    s, t = torch.randn(4, 60, requires_grad=True), torch.randn(4, 60)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    expected = fused_rkl_loss(s, t, weights=weights, reduction="mean")
    loss = fused_rkl_loss(s, t, weights=scale * weights, reduction="mean")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(x, s)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
    head = torch.randn(60, 60)
    linear = [fused_linear_rkl_loss(s, head, t, head, weights=w, reduction="mean") for w in (weights, scale * weights)]
    torch.testing.assert_close(*linear, rtol=1e-6, atol=0)


def test_equal_models_have_no_divergence(implementation):
    s, t = Case(50257, (2,), pattern="equal").logits()
    s.requires_grad_()
    loss = fused_rkl_loss(s, t)
    loss.backward()
    assert loss.abs() < 1e-8 and s.grad.abs().max() < 1e-8  # not 0: s - t may be one fused multiply-add


def test_float64_in_float64_out():
    s, t = Case(517, (4,)).logits()
    weights = torch.tensor([1.0, 0.0, 0.3, 2.0], dtype=torch.float64)
    for student, teacher in ((s.double(), t), (s, t.double()), (s.double(), t.double())):
        leaf = s.double().requires_grad_()
        truth = (oracle.statistics(leaf, t)["reverse_kl"] * weights).sum() / weights.sum()
        x = student.clone().requires_grad_()
        loss = fused_rkl_loss(x, teacher, weights=weights, reduction="mean")
        assert loss.dtype == torch.float64 and x.dtype == student.dtype
        loss.backward()
        assert x.grad.dtype == student.dtype
        rtol = 1e-6 if student.dtype == FP32 else 1e-12
        if student.dtype == torch.float64:
            torch.testing.assert_close(loss, truth.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x.grad.double(), oracle.gradient(truth, leaf), rtol=rtol, atol=rtol)


def test_labels_are_only_a_mask(backend):
    s, t = torch.randn(4, 60), torch.randn(4, 60)
    a = fused_rkl_loss(s, t, torch.tensor([1, -100, 3, 59]))
    b = fused_rkl_loss(s, t, torch.tensor([10**6, -100, -7, 0], dtype=torch.int32))
    assert torch.equal(a, b)


def test_module_is_the_function(backend):
    s, t = torch.randn(2, 3, 60, dtype=BF16), torch.randn(2, 3, 70)
    labels, weights = MASKS["both"]
    options = dict(temperature=2.0, reduction="mean", ignore_index=7, vocab_size=50)
    module = FusedRKLLoss(**options)
    a = s.clone().requires_grad_()
    b = s.clone().requires_grad_()
    loss = module(a, t, labels, weights=weights, normalizer=11.0)
    expected = fused_rkl_loss(b, t, labels, weights=weights, normalizer=11.0, **options)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected) and torch.equal(a.grad, b.grad)
    assert repr(module) == "FusedRKLLoss(temperature=2.0, reduction='mean', vocab_size=50)"
    with pytest.raises(ValueError, match="unknown reduction 'median'"):
        FusedRKLLoss(reduction="median")
    with pytest.raises(ValueError, match="temperature"):
        FusedRKLLoss(temperature=0.0)
