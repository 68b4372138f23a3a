"""token_logprobs and distill_stats against the float64 oracle: every statistic, and one gradient of all together."""

from functools import lru_cache

import cases
import oracle
import pytest
import torch
from cases import Case
from tolerance import assert_gradient, assert_values, gradient_terms

from minillm_kernels import distill_stats, fused_divergence_loss, mixed_sample, token_logprobs


def _weighted_sum(fields: dict, coefficients: torch.Tensor) -> torch.Tensor:
    """Of the statistics that are finite: the others have no gradient."""
    values = torch.stack([fields[name] for name in oracle.DIFFERENTIABLE])
    return torch.where(values.isfinite(), values * coefficients.to(values.dtype), 0).sum()


@lru_cache
def pair_answer(case: Case):
    s, t = case.logits()
    ids, coefficients = case.token_ids(), case.coefficients(len(oracle.DIFFERENTIABLE))
    leaf = s.double().requires_grad_()
    truth = oracle.statistics(leaf, t, ids, case.temperature, case.vocab_size)
    plain = oracle.statistics(s.float(), t, ids, case.temperature, case.vocab_size, torch.float32)
    grad = oracle.gradient(_weighted_sum(truth, coefficients), leaf)
    log_q, log_p = oracle.log_probabilities(s, t, case.temperature, case.vocab_size)
    terms = gradient_terms(log_q, log_p, coefficients, case.temperature, ids)
    return {name: x.detach() for name, x in truth.items()}, plain, grad, terms


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_distill_stats(implementation, case):
    s, t = case.logits()
    truth, plain, grad, terms = pair_answer(case)
    s.requires_grad_()
    stats = distill_stats(s, t, case.token_ids(), temperature=case.temperature, vocab_size=case.vocab_size)
    for name in oracle.STATISTICS:
        value = getattr(stats, name)
        assert value.dtype == torch.float32
        assert_values(value, truth[name], plain[name], name)
    actual = oracle.gradient(_weighted_sum(stats._asdict(), case.coefficients(len(oracle.DIFFERENTIABLE))), s)
    assert actual.dtype == s.dtype
    assert_gradient(actual, grad, terms)


@lru_cache
def single_answer(case: Case):
    s, _ = case.logits()
    ids, coefficients = case.token_ids(), case.coefficients(2)
    leaf = s.double().requires_grad_()
    truth = oracle.statistics(leaf, None, ids, case.temperature, case.vocab_size)
    plain = oracle.statistics(s.float(), None, ids, case.temperature, case.vocab_size, torch.float32)
    names = ("student_logprobs", "student_entropy")
    truth, plain = [truth[n] for n in names], [plain[n] for n in names]
    total = sum(torch.where(x.isfinite(), x * c, 0).sum() for x, c in zip(truth, coefficients, strict=True))
    log_q, _ = oracle.log_probabilities(s, s, case.temperature, case.vocab_size)
    terms = gradient_terms(log_q, log_q, coefficients, case.temperature, ids)
    return [x.detach() for x in truth], plain, oracle.gradient(total, leaf), terms


SINGLE = [c for c in cases.ALL if (c.teacher_V is None and c.teacher == c.student) or c.pattern != "finite"]


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_token_logprobs(implementation, case):
    s, _ = case.logits()
    truth, plain, grad, terms = single_answer(case)
    s.requires_grad_()
    values = token_logprobs(
        s, case.token_ids(), temperature=case.temperature, vocab_size=case.vocab_size, return_entropy=True
    )
    total = torch.zeros(())
    for value, right, fp32, c in zip(values, truth, plain, case.coefficients(2), strict=True):
        assert value.dtype == torch.float32
        assert_values(value, right, fp32)
        total = total + torch.where(value.isfinite(), value * c.float(), 0).sum()
    actual = oracle.gradient(total, s)
    assert actual.dtype == s.dtype
    assert_gradient(actual, grad, terms)


def test_token_logprobs_without_entropy_is_one_tensor(backend):
    s, ids = torch.randn(4, 31), torch.tensor([0, 30, 7, 7])
    alone = token_logprobs(s, ids)
    assert torch.equal(alone, token_logprobs(s, ids, return_entropy=True)[0])


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1e4])
@pytest.mark.parametrize("distance", [3.0, 1e-2, 1e-4], ids=lambda d: f"distance{d:g}")
def test_precision_of_long_rows(implementation, offset, distance):
    """fp32 rows of 151936 columns, at any offset and when the models almost agree: 3e-6 (1 + |value|) absolute.

    At distance 1e-4 the KL itself is 5e-9, so a sum that loses its relative precision shows as a negative divergence.
    """
    case = Case(151936, (2,), offset=offset, distance=distance)
    s, t = case.logits()
    truth, plain, _, _ = pair_answer(case)
    stats = distill_stats(s, t, case.token_ids())
    for name in oracle.STATISTICS:
        assert_values(getattr(stats, name), truth[name], plain[name], name)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_any_integer_type_of_token_ids(backend, dtype):
    """156 is -100 in uint8: it must not be taken for ignore_index."""
    s, t = torch.randn(4, 200), torch.randn(4, 200)
    ids = torch.tensor([0, 101, 27, 127 if dtype != torch.uint8 else 156])
    expected = s.double().log_softmax(-1)[torch.arange(4), ids]
    torch.testing.assert_close(token_logprobs(s, ids.to(dtype)).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        distill_stats(s, t, ids.to(dtype)).student_logprobs.double(), expected, rtol=0, atol=1e-6
    )


def test_ignored_tokens_are_not_read(backend):
    s = torch.randn(4, 60)
    s[1] = torch.nan
    s.requires_grad_()
    ids = torch.tensor([3, -100, 5, -100])
    logprobs, entropy = token_logprobs(s, ids, return_entropy=True)
    assert logprobs[[1, 3]].tolist() == entropy[[1, 3]].tolist() == [0.0, 0.0]
    (logprobs * torch.tensor([1.0, torch.nan, 1.0, 2.0]) + entropy).sum().backward()
    assert torch.equal(s.grad[[1, 3]], torch.zeros(2, 60))
    assert s.grad[[0, 2]].isfinite().all() and (s.grad[[0, 2]] != 0).all()
    other = token_logprobs(s, torch.tensor([3, 7, 5, 7]), ignore_index=7)
    assert torch.equal(other[[0, 2]], logprobs[[0, 2]]) and other[[1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("ignored", [-100, 59])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_ignored_rows_of_a_pair_are_not_read(backend, dtype, ignored):
    """Whether the id that says so is a token or not; their logits hold NaN."""
    s, t = torch.randn(2, 3, 60), torch.randn(2, 3, 60)
    s[0, 1], t[1, 2] = torch.nan, torch.nan
    ids = torch.tensor([[0, ignored, 58], [3, 4, ignored]], dtype=dtype)
    x = s.clone().requires_grad_()
    stats = distill_stats(x, t, ids, ignore_index=ignored)
    sum(f.sum() for f in stats if f.requires_grad).backward()
    kept = ids != ignored
    for name, field in stats._asdict().items():
        assert torch.equal(field[~kept], torch.zeros(2)), name
    assert torch.equal(x.grad[~kept], torch.zeros(2, 60))
    alone = s[kept].clone().requires_grad_()
    rows = distill_stats(alone, t[kept], ids[kept])
    sum(f.sum() for f in rows if f.requires_grad).backward()
    for name, field in stats._asdict().items():
        torch.testing.assert_close(field[kept], getattr(rows, name), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.grad[kept], alone.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [-1, 60, 2**40])
def test_token_outside_the_vocabulary(backend, bad):
    s, t, ids = torch.randn(2, 60), torch.randn(2, 60), torch.tensor([3, bad])
    if backend == "cuda":  # an error would need a synchronisation: NaN instead, and no gradient
        x = s.requires_grad_()
        logprobs = token_logprobs(x, ids)
        assert logprobs.isnan().tolist() == distill_stats(x, t, ids).teacher_logprobs.isnan().tolist() == [False, True]
        assert token_logprobs(s, torch.tensor([2, 3]), vocab_size=3).isnan().tolist() == [False, True]
        return
    with pytest.raises(IndexError, match=rf"token id {bad}.*outside the vocabulary \[0, 60\)"):
        token_logprobs(s, ids)
    with pytest.raises(IndexError, match=rf"token id {bad}.*outside the vocabulary \[0, 60\)"):
        distill_stats(s, t, ids)
    with pytest.raises(IndexError, match=r"token id 3 .*outside the vocabulary \[0, 3\)"):
        token_logprobs(s, torch.tensor([3, 2]), vocab_size=3)


def test_token_outside_the_support(backend):
    """-inf, for both models, whichever excludes it; its gradient is 0, the rest of the row's is not touched."""
    s, t = torch.randn(3, 60), torch.randn(3, 60)
    s[0, 7], t[1, 7] = -torch.inf, -torch.inf
    x = s.clone().requires_grad_()
    stats = distill_stats(x, t, torch.tensor([7, 7, 7]))
    assert stats.student_logprobs[:2].tolist() == stats.teacher_logprobs[:2].tolist() == [-torch.inf] * 2
    stats.student_logprobs.sum().backward()
    assert torch.equal(x.grad[:2], torch.zeros(2, 60)) and (x.grad[2] != 0).all()
    x.grad = None
    distill_stats(x, t, torch.tensor([7, 7, 7])).reverse_kl.sum().backward()
    assert (x.grad[:2, 7] == 0).all() and (x.grad[:2].count_nonzero(-1) == 59).all()


def test_teacher_statistics_carry_no_gradient(backend):
    stats = distill_stats(torch.randn(3, 60, requires_grad=True), torch.randn(3, 60), torch.tensor([0, 1, 2]))
    assert {name for name, field in stats._asdict().items() if field.requires_grad} == set(oracle.DIFFERENTIABLE)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0x7F800001, 0xFFC00000 - 2**32, -1], ids=hex)
def test_every_nan_is_shown(implementation, bits):
    """Whatever its payload and sign: arithmetic on the bits of 2^x must not turn it into a number."""
    s, t = torch.randn(2, 4111), torch.randn(2, 4111)
    s[0, 2500] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    logprobs, entropy = token_logprobs(s, torch.tensor([3, 3]), return_entropy=True)
    sample = mixed_sample(s, t)
    for value in (logprobs, entropy, sample.student_logprobs, fused_divergence_loss(s, t, "tvd", reduction="none")):
        assert value.isnan().tolist() == [True, False]
    assert sample.token_ids[0] == 0
