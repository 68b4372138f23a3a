"""mixed_sample: the law of its tokens, by chi-square and by the inverse CDF; log-probabilities, filters, edges."""

import importlib
import math

import oracle
import pytest
import torch
from cases import BF16, FP16, FP32, NAMES, Case
from tolerance import error

from minillm_kernels import mixed_sample, use_backend
from minillm_kernels.backends import reference

SETTINGS = {
    "plain": {},
    "T0.7": dict(temperature=0.7),
    "T3": dict(temperature=3.0),
    "top-k": dict(top_k=20),
    "top-p": dict(top_p=0.8),
    "all": dict(temperature=1.5, top_k=30, top_p=0.9),
}


def _chi_square(tokens: torch.Tensor, law: torch.Tensor) -> float:
    """The probability of a deviation at least this large if the tokens follow the law; bins of 5 expected or more."""
    counts, expected = torch.bincount(tokens, minlength=len(law)).double(), law * len(tokens)
    assert (counts[law == 0] == 0).all()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)])
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    if expected[-1] < 5:
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0).double(), statistic / 2).item()


def _rows(V: int, dtype=FP32, pattern: str = "finite", teacher_V: int | None = None):
    s, t = Case(V, (1,), dtype, FP32, teacher_V=teacher_V, pattern=pattern).logits()
    return s[0] / 2, t[0] / 2


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("setting", SETTINGS)
def test_goodness_of_fit(alpha, setting):
    """With 400 000 draws a token of probability 1e-4 has 40. Each part of the mixture has its own model's law."""
    draws = 400_000 if setting in ("plain", "T0.7", "T3") else 50_000
    s, t = _rows(257)
    q, p = (oracle.log_law(z, **SETTINGS[setting]).exp() for z in (s, t))
    mixture = alpha * p + (1 - alpha) * q
    assert setting != "plain" or (mixture < 2e-4).sum() > 10
    x = mixed_sample(s.expand(draws, -1), t.expand(draws, -1), alpha, **SETTINGS[setting])
    assert _chi_square(x.token_ids, mixture) > 1e-3
    for law, drawn in ((p, x.token_ids[x.from_teacher]), (q, x.token_ids[~x.from_teacher])):
        if len(drawn):
            assert _chi_square(drawn, law) > 1e-3
    deviation = (x.from_teacher.sum() - alpha * draws) / math.sqrt(draws * max(alpha * (1 - alpha), 1e-9))
    assert abs(deviation) < 4


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=NAMES.get)
@pytest.mark.parametrize("pattern", ["finite", "both_inf"])
def test_goodness_of_fit_of_other_rows(dtype, pattern):
    """Unequal heads and types, and -inf: a column is removed from one model alone, so the mixture keeps it."""
    s, t = _rows(257, dtype, pattern, teacher_V=300)
    q, p = oracle.log_law(s).exp(), oracle.log_law(t[:257]).exp()
    assert pattern == "finite" or ((q == 0) & (p > 0)).any()
    x = mixed_sample(s.expand(200_000, -1), t.expand(200_000, -1), 0.4)
    assert _chi_square(x.token_ids, 0.4 * p + 0.6 * q) > 1e-3


def test_chi_square_sees_a_wrong_law():
    """The test of the test: a law that is 2 % off in its rarer half, or that never draws tokens below 1e-4."""
    law = oracle.log_law(_rows(257)[0]).exp()
    biased = torch.where(law < law.median(), 1.1 * law, law)
    cut = torch.where(law < 1e-4, 0, law)
    for wrong in (biased, cut):
        tokens = torch.multinomial(wrong, 400_000, replacement=True)
        assert _chi_square(tokens, law) < 1e-3


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("pattern", ["finite", "both_inf", "tiles_inf"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=NAMES.get)
def test_inverse_cdf(implementation, setting, pattern, dtype):
    """The uniform in the middle of a token's share of [0, 1) draws it, whatever the tiles, from either model."""
    s, t = _rows(4500, dtype, pattern)
    q, p = (oracle.log_law(z, **SETTINGS[setting]).exp() for z in (s, t))
    for law, coin in ((q, 0.5), (p, 0.1)):
        tokens = (law > 1e-5).nonzero().squeeze(-1)[:: 1 + len(law) // 600]
        middle = (law.cumsum(0) - law / 2)[tokens]
        uniforms = torch.stack([torch.full_like(middle, coin), middle], -1)
        rows = len(tokens)
        x = mixed_sample(s.expand(rows, -1), t.expand(rows, -1), 0.2, uniforms=uniforms, **SETTINGS[setting])
        assert torch.equal(x.token_ids, tokens)
        assert (x.from_teacher == (coin < 0.2)).all()
        lq, lp = q.log()[tokens], p.log()[tokens]
        assert (error(x.student_logprobs, lq) < 3e-6).all() and (error(x.teacher_logprobs, lp) < 3e-6).all()
        mixture = torch.logaddexp(lp + math.log(0.2), lq + math.log(0.8))
        assert (error(x.mixture_logprobs, mixture) < 3e-6).all()


def test_a_uniform_on_a_boundary_draws_the_token_after_it(implementation):
    """The first whose cumulative probability exceeds it: 4096 equal tokens in two tiles, where all sums are exact."""
    tokens = torch.tensor([0, 1, 2047, 2048, 2049, 4095])
    uniforms = torch.stack([torch.zeros(6), tokens / 4096], -1).double()
    assert torch.equal(mixed_sample(torch.zeros(6, 4096), None, 0.0, uniforms=uniforms).token_ids, tokens)


@pytest.mark.parametrize("number", [-1.0, -torch.inf, 1.0, 2.0**60, torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 1])
def test_uniforms_outside_the_unit_interval(implementation, number, place, monkeypatch):
    """An error where looking costs no synchronisation; elsewhere some token of the model, and never a teacher's where
    there is none."""
    s, uniforms = torch.randn(5, 3000), torch.full((5, 2), 0.5, dtype=torch.float64)
    s[:, 2500:] = -torch.inf
    uniforms[3, place] = number
    if implementation != "cuda":
        with pytest.raises(ValueError, match=r"uniforms must lie in \[0, 1\), got"):
            mixed_sample(s, s, uniforms=uniforms)
        if implementation == "cpu":  # the kernel by itself: tests/csrc/fuzz_core.cpp
            return
        for module in (reference, importlib.import_module("minillm_kernels.backends.triton.sample")):
            monkeypatch.setattr(module, "check_uniforms", lambda uniforms: None)  # as on a GPU
    expected = mixed_sample(s, None, 0.0, uniforms=torch.full_like(uniforms, 0.5)).token_ids
    for settings in ({}, {"top_k": 40}, {"temperature": 0}):
        x = mixed_sample(s, None, 0.0, uniforms=uniforms, **settings)
        assert not x.from_teacher.any() and (x.token_ids < 2500).all() and x.student_logprobs.isfinite().all()
        assert settings or torch.equal(x.token_ids[:3], expected[:3])
    x = mixed_sample(s, s, 1.0, uniforms=uniforms)
    assert (x.token_ids < 2500).all() and x.teacher_logprobs.isfinite().all()


def test_uniforms_at_any_byte(implementation):
    s, uniforms = torch.randn(5, 60), torch.rand(5, 2, dtype=torch.float64)
    askew = torch.zeros(5 * 16 + 3, dtype=torch.uint8)
    askew[3:].view(5, 16)[:] = uniforms.view(torch.uint8)
    view = torch.from_numpy(askew.numpy()[3:].view("float64")).view(5, 2)
    assert view.data_ptr() % 8
    assert torch.equal(mixed_sample(s, s, uniforms=view).token_ids, mixed_sample(s, s, uniforms=uniforms).token_ids)


def test_the_coin(implementation):
    """Teacher iff the first uniform is below alpha."""
    s, t = torch.randn(4, 60), torch.randn(4, 60)
    coins = torch.tensor([0.0, 0.3 - 2**-54, 0.3, 1 - 2**-53], dtype=torch.float64)
    x = mixed_sample(s, t, 0.3, uniforms=torch.stack([coins, torch.full_like(coins, 0.5)], -1))
    assert x.from_teacher.tolist() == [True, True, False, False]
    for alpha, teacher in ((0.0, False), (1.0, True)):
        x = mixed_sample(s, t, alpha, uniforms=torch.stack([coins, coins], -1))
        assert (x.from_teacher == teacher).all()
        assert torch.equal(x.mixture_logprobs, x.teacher_logprobs if teacher else x.student_logprobs)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=NAMES.get)
def test_backends_draw_the_same_tokens(implementation, setting, dtype):
    """Unless the uniform lies within 1e-5 of the boundary of two tokens, where fp32 weights may decide otherwise."""
    s, t = Case(2500, (40,), dtype, BF16).logits()
    uniforms = torch.rand(40, 2, dtype=torch.float64)
    with use_backend("reference"):
        right = mixed_sample(s, t, 0.4, uniforms=uniforms, **SETTINGS[setting])
    x = mixed_sample(s, t, 0.4, uniforms=uniforms, **SETTINGS[setting])
    assert torch.equal(x.from_teacher, right.from_teacher)
    for i in (x.token_ids != right.token_ids).nonzero().squeeze(-1).tolist():
        cumulative = oracle.log_law(t[i] if x.from_teacher[i] else s[i], **SETTINGS[setting]).exp().cumsum(0)
        assert (cumulative - uniforms[i, 1]).abs().min() < 1e-5
    same = x.token_ids == right.token_ids
    assert same.sum() >= 38
    for ours, theirs in zip(x[1:4], right[1:4], strict=True):
        assert (error(ours[same], theirs[same].double()) < 3e-6).all()


@pytest.mark.parametrize("pattern", ["finite", "both_inf", "tiles_inf", "one_left", "lowest", "one_hot"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_token_is_never_one_of_probability_zero(implementation, pattern, setting):
    """At both ends of [0, 1) above all: u = 0 with the first columns removed, u = 1 - 2^-53 with the last."""
    s, t = _rows(4500, FP32, pattern)
    s[-3:], t[:2], s[:5] = -torch.inf, -torch.inf, -torch.inf
    s[5], t[5] = 1.0, 1.0
    edges = torch.tensor([0.0, 2**-53, 0.25, 0.5, 1 - 2**-30, 1 - 2**-53], dtype=torch.float64)
    uniforms = torch.cartesian_prod(torch.tensor([0.0, 0.9], dtype=torch.float64), edges)
    x = mixed_sample(s.expand(12, -1), t.expand(12, -1), 0.5, uniforms=uniforms, **SETTINGS[setting])
    q, p = (oracle.log_law(z, **SETTINGS[setting]).exp() for z in (s, t))
    for token, teacher, u in zip(x.token_ids, x.from_teacher, uniforms[:, 1], strict=True):
        law = p if teacher else q
        assert law[token] > 0
        assert law[:token].sum() <= u + 1e-6 and law[: token + 1].sum() >= u - 1e-6
    assert (torch.where(x.from_teacher, x.teacher_logprobs, x.student_logprobs) > -torch.inf).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_temperature_zero_is_the_argmax_of_the_mixture(implementation, alpha):
    s, t = Case(4500, (50,), distance=1.0).logits()
    q, p = s.double().softmax(-1), t.double().softmax(-1)
    mixture = alpha * p + (1 - alpha) * q
    top = mixture.topk(2, -1)
    assert ((top.values[:, 0] - top.values[:, 1]) / top.values[:, 0] > 1e-5).all()  # nothing that rounding decides
    x = mixed_sample(s, t, alpha, temperature=0.0)
    assert torch.equal(x.token_ids, top.indices[:, 0])
    assert not x.from_teacher.any()
    rows = torch.arange(50)
    assert (error(x.student_logprobs, q.log()[rows, x.token_ids]) < 3e-6).all()
    assert (error(x.teacher_logprobs, p.log()[rows, x.token_ids]) < 3e-6).all()
    assert (error(x.mixture_logprobs, mixture.log()[rows, x.token_ids]) < 3e-6).all()


def test_temperature_zero_takes_the_lowest_index_of_a_tie(implementation):
    s = torch.full((3, 4500), -1.0)
    s[0, [7, 2047, 2048]] = 5.0
    s[1, [2048, 4499]] = 5.0
    assert mixed_sample(s, None, 0.0, temperature=0).token_ids.tolist() == [7, 2048, 0]
    assert mixed_sample(s.flip(-1), s, 1.0, temperature=0).token_ids.tolist() == [7, 2048, 0]
    a, b = torch.zeros(1, 4500), torch.zeros(1, 4500)
    a[0, [100, 3000]], b[0, [100, 3000]] = 4.0, 3.0
    assert mixed_sample(a, b, 0.3, temperature=0).token_ids.tolist() == [100]


def test_temperature_zero_may_take_neither_models_favourite(implementation):
    s, t = torch.tensor([[0.5, 0.01, 0.49]]).log(), torch.tensor([[0.01, 0.5, 0.49]]).log()
    assert mixed_sample(s, t, 0.5, temperature=0).token_ids.tolist() == [2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("setting", ["plain", "top-k", "top-p"])
def test_rows_that_cannot_be_drawn_from(implementation, temperature, setting):
    """NaN, +inf, or no column left, in one of the models: token 0, NaN, not from the teacher; other rows as ever."""
    s, t = torch.randn(8, 4500), torch.randn(8, 4500)
    s[0, 4400], t[1, 3], s[2, 0], t[3, 2050] = torch.nan, torch.nan, torch.inf, torch.inf
    s[4], t[5], s[6] = -torch.inf, -torch.inf, torch.nan
    setting = {k: v for k, v in SETTINGS[setting].items() if k != "temperature"}
    x = mixed_sample(s, t, 0.5, temperature=temperature, **setting)
    assert x.token_ids[:7].tolist() == [0] * 7 and not x.from_teacher[:7].any()
    for logprobs in x[1:4]:
        assert logprobs.isnan().tolist() == [True] * 7 + [False]


def test_ties_at_the_top_k_cut_are_kept(implementation):
    z = torch.tensor([1.0, 2.0, 3.0, 2.0, 2.0, -5.0]).expand(600, -1)
    grid = torch.stack([torch.zeros(600).double(), torch.arange(600).double() / 600], -1)
    for top_k, kept in (
        (1, [2]),
        (2, [1, 2, 3, 4]),
        (4, [1, 2, 3, 4]),
        (5, [0, 1, 2, 3, 4]),
        (6, range(6)),
        (99, range(6)),
    ):
        tokens = mixed_sample(z, None, 0.0, top_k=top_k, uniforms=grid).token_ids
        assert set(tokens.tolist()) == set(kept) - {5 if top_k >= 6 else None}  # 5: below 1/600
    zeros = torch.tensor([-1.0, -0.0, 0.0, -0.0]).expand(600, -1)  # 0.0 and -0.0 are a tie
    assert set(mixed_sample(zeros, None, 0.0, top_k=1, uniforms=grid).token_ids.tolist()) == {1, 2, 3}


def test_top_p_keeps_while_the_mass_strictly_before_is_below_it(implementation):
    z = torch.tensor([0.2, 0.5, 0.3]).log().expand(300, -1)
    grid = torch.stack([torch.zeros(300).double(), torch.arange(300).double() / 300], -1)
    for top_p, kept in (
        (1e-9, [1]),
        (0.499, [1]),
        (0.501, [1, 2]),
        (0.799, [1, 2]),
        (0.801, [0, 1, 2]),
        (1.0, [0, 1, 2]),
    ):
        x = mixed_sample(z, None, 0.0, top_p=top_p, uniforms=grid)
        assert set(x.token_ids.tolist()) == set(kept)
        total = torch.tensor([0.2, 0.5, 0.3])[kept].sum()
        torch.testing.assert_close(x.student_logprobs, (z[0].exp() / total).log()[x.token_ids], rtol=0, atol=3e-6)
    tied = torch.zeros(300, 4)  # the whole tie, though half of it would do
    assert set(mixed_sample(tied, None, 0.0, top_p=0.3, uniforms=grid).token_ids.tolist()) == {0, 1, 2, 3}


def test_filters_act_on_each_model_before_mixing(implementation):
    """A token that only the teacher's filter keeps: -inf under the student, the teacher's share under the mixture."""
    s, t = torch.tensor([[4.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 4.0]])
    x = mixed_sample(s, t, 0.25, top_k=1, uniforms=torch.tensor([[0.1, 0.5]], dtype=torch.float64))
    assert x.token_ids.tolist() == [2] and x.from_teacher.tolist() == [True]
    assert x.student_logprobs.tolist() == [-torch.inf] and x.teacher_logprobs.tolist() == [0.0]
    torch.testing.assert_close(x.mixture_logprobs, torch.tensor([0.25]).log())


def test_without_a_teacher(implementation):
    s = torch.randn(5, 4500)
    uniforms = torch.rand(5, 2, dtype=torch.float64)
    x = mixed_sample(s, None, 0.0, uniforms=uniforms)
    with_teacher = mixed_sample(s, torch.randn(5, 4500), 0.0, uniforms=uniforms)
    assert x.teacher_logprobs is None and not x.from_teacher.any()
    assert torch.equal(x.token_ids, with_teacher.token_ids)
    assert torch.equal(x.student_logprobs, with_teacher.student_logprobs)
    assert torch.equal(x.mixture_logprobs, x.student_logprobs)


def test_generator(backend):
    s, t = torch.randn(100, 60), torch.randn(100, 60)

    def seeded(n):
        return mixed_sample(s, t, 0.5, generator=torch.Generator().manual_seed(n))

    for a, b in zip(seeded(3), seeded(3), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(seeded(3).token_ids, seeded(4).token_ids)
    drawn = torch.rand(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(seeded(3).token_ids, mixed_sample(s, t, 0.5, uniforms=drawn).token_ids)
    torch.manual_seed(1)
    first = mixed_sample(s, t, 0.5).token_ids
    assert not torch.equal(first, mixed_sample(s, t, 0.5).token_ids)
    torch.manual_seed(1)
    assert torch.equal(first, mixed_sample(s, t, 0.5).token_ids)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (1,), (2, 3), (70,)])
def test_shapes_and_vocabulary(implementation, leading):
    s, t = torch.randn(*leading, 70, dtype=BF16), torch.randn(*leading, 80)
    s[..., 50:], t[..., 50:] = torch.nan, torch.inf  # beyond vocab_size: not read
    x = mixed_sample(s, t, vocab_size=50)
    assert all(field.shape == leading for field in x)
    assert [field.dtype for field in x] == [torch.int64, FP32, FP32, FP32, torch.bool]
    assert (x.token_ids < 50).all() and x.mixture_logprobs.isfinite().all()


def test_constants_need_not_be_detached(backend):
    x = mixed_sample(torch.randn(3, 60, requires_grad=True), torch.randn(3, 60, requires_grad=True))
    assert not any(field.requires_grad for field in x)


def test_float64_logits():
    s, t = torch.randn(5, 60, dtype=torch.float64), torch.randn(5, 60)
    x = mixed_sample(s, t)
    expected = s.log_softmax(-1)[torch.arange(5), x.token_ids]
    torch.testing.assert_close(x.student_logprobs, expected, rtol=1e-12, atol=1e-12)
