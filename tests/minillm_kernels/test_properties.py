"""Random shapes, strides, types and special values together: what no list of cases thought of."""

import os

import hypothesis.strategies as st
import oracle
import pytest
import torch
from cases import BF16, FP16, FP32
from hypothesis import HealthCheck, given, settings
from tolerance import FP32_EPS, assert_gradient, assert_values, error, gradient_terms

from minillm_kernels import (
    Head,
    MixedSample,
    distill_loss,
    distill_stats,
    fused_divergence_loss,
    fused_linear_distill_loss,
    fused_linear_divergence_loss,
    mixed_sample,
)
from minillm_kernels.rows import DIVERGENCES

FUZZ = int(os.environ.get("MINILLM_FUZZ_CASES", "0"))  # fuzz.py: more cases, other ones every time
BOUNDED = settings(
    max_examples=FUZZ or int(os.environ.get("QQ", "400")),
    deadline=None,
    derandomize=not FUZZ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = st.sampled_from([FP32, BF16, FP16])


LEADING = st.sampled_from([(), (1,), (3,), (4,), (2, 2), (2, 1, 2), (1, 3)])
TEMPERATURES = st.sampled_from([0.5, 1.0, 1.0, 3.0, 1e-3, 1e4, 1e-15, 1e37])
OUTSIDE = st.sampled_from([-1.0, -torch.inf, 1.0, 1e300, torch.inf, torch.nan])  # of [0, 1)


@st.composite
def logits(draw, leading: tuple[int, ...], V: int):
    """[*leading, V] in a random type, scale and layout, with some columns replaced by a special value."""
    dtype = draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    gap, offset = draw(st.integers(0, 20)), draw(st.integers(0, 3))
    rows = leading and (*leading[:-1], leading[-1] + draw(st.integers(0, 1)))  # logits[:, :-1]
    x = torch.randn(*rows, V + gap + offset, generator=generator) * draw(st.sampled_from([0.01, 1.0, 5.0]))
    x = (x + draw(st.sampled_from([0.0, 30.0, -1000.0]))).to(dtype)[..., offset : offset + V]
    x = x[..., : leading[-1], :] if leading else x
    special = st.sampled_from([-torch.inf, torch.finfo(dtype).min])
    poison = draw(st.integers(0, 4)) == 0
    for value in (
        draw(st.lists(special, max_size=2))
        + draw(st.lists(st.sampled_from([torch.nan, torch.inf]), max_size=1)) * poison
    ):
        first = draw(st.integers(0, V - 1))
        step = draw(st.sampled_from([1, 2, 7]))
        last = draw(st.integers(first, V))
        some = x[..., draw(st.integers(0, leading[-1] - 1)) :, :] if leading else x
        some[..., first:last:step] = value
    return x


@st.composite
def pairs(draw):
    leading = draw(LEADING)
    V = draw(st.integers(1, 70) | st.integers(2030, 2070) | st.integers(4090, 4200))
    teacher_V = max(1, V + draw(st.sampled_from([0, 0, 5, -5])))
    vocab_size = draw(st.none() | st.integers(1, min(V, teacher_V)))
    return draw(logits(leading, V)), draw(logits(leading, teacher_V)), vocab_size


def numbers(data, leading: tuple[int, ...], *choices: float) -> torch.Tensor:
    """[*leading] of these, by hypothesis."""
    n = torch.Size(leading).numel()
    return torch.tensor(data.draw(st.lists(st.sampled_from(choices), min_size=n, max_size=n))).reshape(leading)


def _columns(s: torch.Tensor, t: torch.Tensor, vocab_size: int | None) -> int:
    return vocab_size or min(s.shape[-1], t.shape[-1])


def _poisoned(s: torch.Tensor, t: torch.Tensor, V: int) -> torch.Tensor:
    """Rows of NaN."""
    return ((s[..., :V].isnan() | s[..., :V].isposinf()) | (t[..., :V].isnan() | t[..., :V].isposinf())).any(-1)


def _floored(log_q: torch.Tensor, log_p: torch.Tensor, T: float) -> torch.Tensor:
    """Rows where one model has a finite floor inside the other's support: a divergence of 1e4 to 1e38 times 1/T."""
    both = log_q.isfinite() & log_p.isfinite()
    apart = (log_q - log_p).abs() > FLOOR / min(T, 1.0)
    return (both & apart & ((log_q > -100) | (log_p > -100))).any(-1)


def _compare_gradients(actual, truth, terms, poisoned, what: str = "") -> None:
    """Of rows without NaN, where the type of the logits holds them: at T = 1e-15 fp16 does not."""
    fits = (truth.abs() + 8 * FP32_EPS * terms < torch.finfo(actual.dtype).max) & ~poisoned.unsqueeze(-1)
    assert_gradient(actual[fits], truth[fits], terms[fits], what)


FLOOR = 1e4  # a difference of logits, or a log-probability, that only a floor makes


@BOUNDED
@given(pair=pairs(), T=TEMPERATURES, data=st.data())
def test_statistics(core, pair, T, data):
    s, t, vocab_size = pair
    V, leading = _columns(s, t, vocab_size), s.shape[:-1]
    counts, poisoned = numbers(data, leading, True, True, True, False), _poisoned(s, t, V)
    ids = torch.where(counts, torch.arange(leading.numel()).reshape(leading) % V, -100)
    leaf, x = s.double().requires_grad_(), s.detach().requires_grad_()
    truth = oracle.statistics(leaf, t, ids.clamp(min=0), T, vocab_size)
    stats = distill_stats(x, t, ids, temperature=T, vocab_size=vocab_size)
    log_q, log_p = oracle.log_probabilities(s, t, T, vocab_size)
    floored = _floored(log_q, log_p, T)
    upstream = torch.linspace(1.5, -1.0, leading.numel()).reshape(leading)
    expected, actual = torch.zeros(()), 0
    for name, value in zip(stats._fields, stats, strict=True):
        right = torch.where(counts, truth[name], 0)
        compared = ~poisoned if name not in ("reverse_kl", "forward_kl") else ~floored | poisoned
        # A log-probability of 1e5 and more is the floor's own.
        compared = compared & ((right.abs() < FLOOR / min(T, 1.0)) | ~right.isfinite())
        assert_values(value[compared], right[compared].detach(), what=name)
        if name in oracle.DIFFERENTIABLE:
            used = compared & right.isfinite() & ~poisoned
            expected = expected + torch.where(used, right * upstream, 0).sum()
            actual = actual + torch.where(used, value * upstream, 0).sum()
    terms = gradient_terms(
        log_q, log_p, torch.where(counts, upstream, 0).double().expand(5, *leading), T, ids.clamp(min=0)
    )
    ours, right = oracle.gradient(actual, x), oracle.gradient(expected, leaf)
    _compare_gradients(ours, right, terms, poisoned)
    assert (ours[~counts] == 0).all() and (ours[s.isneginf()] == 0).all()


@BOUNDED
@given(
    pair=pairs(),
    law=st.tuples(st.sampled_from(DIVERGENCES), st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    T=TEMPERATURES,
    inplace=st.booleans(),
    data=st.data(),
)
def test_losses(core, pair, law, T, inplace, data):
    s, t, vocab_size = pair
    name, beta = law
    leading, poisoned = s.shape[:-1], _poisoned(s, t, _columns(s, t, vocab_size))
    weights, counts = numbers(data, leading, 0.0, 1.0, 0.5), numbers(data, leading, True, True, True, False)
    leaf, before = s.double().requires_grad_(), s._base.clone()
    log_q, log_p = oracle.log_probabilities(s, t, T, vocab_size)
    per_row = oracle.divergence(leaf, t, name, beta, T, vocab_size)
    unusable = _floored(log_q, log_p, T) | per_row.isnan()
    if name == "tvd":  # rounding decides the sign of q - p at a near tie
        unusable |= ((log_q - log_p).abs() < 1e-5).any(-1)
    weights = torch.where(unusable | poisoned, 0, weights)
    truth = oracle.reduce(per_row, weights, counts, "batchmean")
    settings = {"beta": beta, "weights": weights, "vocab_size": vocab_size, "temperature": T, "inplace": inplace}
    out, x = s.isneginf(), s.detach().requires_grad_()
    loss = fused_divergence_loss(x, t, name, torch.where(counts, 1, -100), **settings)
    assert_values(loss, truth.detach(), what=name)
    weights = torch.where(counts, weights, 0)
    coefficients = weights[None].double() / max(int(weights.count_nonzero()), 1)
    actual, right = oracle.gradient(loss, x), oracle.gradient(truth, leaf)
    terms = gradient_terms(log_q, log_p, coefficients, T)
    _compare_gradients(actual, right, terms, poisoned, name)
    assert (actual[weights == 0] == 0).all() and (actual[out] == 0).all()
    if inplace and leading.numel():  # over the logits, and over nothing else
        before.as_strided(s.shape, s.stride(), s.storage_offset()).copy_(actual)
    assert torch.equal(s._base.nan_to_num(7.0), before.nan_to_num(7.0))


@BOUNDED
@given(
    leading=st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 2)]),
    V=st.integers(1, 40) | st.integers(2040, 2060),
    chunk_rows=st.integers(1, 7),
    head=st.fixed_dictionaries({"scale": st.sampled_from([1.0, 0.5]), "softcap": st.sampled_from([None, 3.0])}),
    T=st.sampled_from([1.0, 3.0]),
    dtype=st.sampled_from([FP32, torch.float64]),
    data=st.data(),
)
def test_linear_forms(core, leading, V, chunk_rows, head, T, dtype, data):
    """Equal to the loss on logits in float64, value and gradients; masked rows hold NaN and are not read."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator).to(dtype)

    counts, weights = numbers(data, leading, True, True, False), numbers(data, leading, 0.0, 1.0, 0.5)
    ids = torch.where(counts, torch.randint(V, leading, generator=generator), -100)
    law, teacher_V = (
        data.draw(st.sampled_from([*DIVERGENCES[: None if dtype == torch.float64 else -1], "linear"])),
        V + data.draw(st.sampled_from([0, 3])),
    )
    student, teacher = (
        [draw(*leading, 6), draw(V, 6), draw(V)],
        [draw(*leading, 4), draw(teacher_V, 4), draw(teacher_V)],
    )
    coefficients = {name: data.draw(st.sampled_from([0.0, 0.5, -1.0])) for name in oracle.DIFFERENTIABLE}
    coefficients["student_entropy"] = weights
    results = []
    for of_logits in (True, False):
        leaves = [x.double() if of_logits else x.clone() for x in student]
        if not of_logits:
            leaves[0][~counts] = torch.nan
        hidden, *own = (x.requires_grad_() for x in leaves)
        other, *theirs = (x.double() if of_logits else x for x in teacher)
        heads = Head(*own, **head), Head(*theirs, **head)
        models = (hidden, heads[0], other, heads[1])
        if of_logits:
            models = (heads[0].logits(hidden), heads[1].logits(other))
        options = {"temperature": T} if of_logits else {"temperature": T, "chunk_rows": chunk_rows}
        if law == "linear":
            function = distill_loss if of_logits else fused_linear_distill_loss
            loss = function(*models, ids, **coefficients, **options).loss
        else:
            function = fused_divergence_loss if of_logits else fused_linear_divergence_loss
            loss = function(*models, law, ids, beta=0.3, weights=weights, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    tolerance = {FP32: 2e-5, torch.float64: 1e-10}[dtype]  # of values and terms of the size of 1
    for ours, truth in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance)


@BOUNDED
@given(
    pair=pairs(),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    top_k=st.integers(0, 80),
    # Within fp32's rounding of 1, that decides whether columns of no probability stay (log-probability -1e38) or go.
    top_p=st.floats(0.05, 1 - 1e-5) | st.just(1.0),
    T=st.sampled_from([1.0, 0.7, 3.0, 1e-15, 1e37]),
    outside=st.none() | st.none() | OUTSIDE,
)
def test_samples(core, pair, alpha, top_k, top_p, T, outside):
    """The token has a probability, is one that its uniform allows, and has the right log-probabilities."""
    s, t, vocab_size = pair
    V, rows = _columns(s, t, vocab_size), s.shape[:-1].numel()
    uniforms = torch.rand(*s.shape[:-1], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(V))
    settings = {"top_k": top_k, "top_p": top_p, "vocab_size": vocab_size, "temperature": T}
    if outside is not None:
        wrong = uniforms.clone()
        wrong.view(-1)[V % (2 * rows)] = outside
        with pytest.raises(ValueError, match="uniforms must lie in"):
            mixed_sample(s, t, alpha, uniforms=wrong, **settings)
    x = MixedSample(*(field.reshape(-1) for field in mixed_sample(s, t, alpha, uniforms=uniforms, **settings)))
    s, t, uniforms = s.reshape(rows, -1), t.reshape(rows, -1), uniforms.reshape(rows, 2)
    for i, token in enumerate(x.token_ids.tolist()):
        lq, lp = (oracle.log_law(z[i, :V], T, top_k, top_p) for z in (s, t))
        if lq.isnan().any() or lp.isnan().any():
            assert token == 0 and x.mixture_logprobs[i].isnan()
            continue
        law = (lp if x.from_teacher[i] else lq).exp()
        assert law[token] > 0
        assert law[:token].sum() <= uniforms[i, 1] + 1e-5 and law[: token + 1].sum() >= uniforms[i, 1] - 1e-5
        lq, lp = (log.float().double()[token] for log in (lq, lp))  # below the least float32, -inf
        mixture = torch.logaddexp(lp + torch.tensor(alpha).double().log(), lq + torch.tensor(-alpha).double().log1p())
        assert error(x.student_logprobs[i], lq) < 3e-6
        assert error(x.teacher_logprobs[i], lp) < 3e-6
        assert error(x.mixture_logprobs[i], mixture) < 3e-6
