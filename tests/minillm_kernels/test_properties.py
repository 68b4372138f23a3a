"""Random shapes, strides, types and special values together: what no list of cases thought of."""

import os

import hypothesis.strategies as st
import oracle
import torch
from cases import BF16, FP16, FP32
from hypothesis import HealthCheck, given, settings
from tolerance import assert_gradient, assert_values, error, gradient_terms

from minillm_kernels import distill_stats, fused_divergence_loss, mixed_sample
from minillm_kernels.rows import DIVERGENCES

FUZZ = int(os.environ.get("MINILLM_FUZZ_CASES", "0"))  # fuzz.py: more cases, other ones every time
BOUNDED = settings(
    max_examples=FUZZ or 400,
    deadline=None,
    derandomize=not FUZZ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = st.sampled_from([FP32, BF16, FP16])


@st.composite
def logits(draw, rows: int, V: int):
    """[rows, V] in a random type, scale and layout, with some columns replaced by a special value."""
    dtype = draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    gap, offset = draw(st.integers(0, 20)), draw(st.integers(0, 3))
    x = torch.randn(rows, V + gap + offset, generator=generator) * draw(st.sampled_from([0.01, 1.0, 5.0]))
    x = (x + draw(st.sampled_from([0.0, 30.0, -1000.0]))).to(dtype)[:, offset : offset + V]
    for value in draw(st.lists(st.sampled_from([-torch.inf, torch.finfo(dtype).min]), max_size=2)):
        first = draw(st.integers(0, V - 1))
        step = draw(st.sampled_from([1, 2, 7]))
        last = draw(st.integers(first, V))
        x[draw(st.integers(0, rows - 1)) :, first:last:step] = value
    return x


@st.composite
def pairs(draw):
    rows = draw(st.integers(1, 4))
    V = draw(st.integers(1, 70) | st.integers(2030, 2070) | st.integers(4090, 4200))
    teacher_V = max(1, V + draw(st.sampled_from([0, 0, 5, -5])))
    vocab_size = draw(st.none() | st.integers(1, min(V, teacher_V)))
    return draw(logits(rows, V)), draw(logits(rows, teacher_V)), vocab_size


def _floored(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Rows where one model has a finite floor inside the other's support: a divergence of 1e4 to 1e38."""
    both = log_q.isfinite() & log_p.isfinite()
    apart = (log_q - log_p).abs() > 1e4
    return (both & apart & ((log_q > -100) | (log_p > -100))).any(-1)


@BOUNDED
@given(pair=pairs(), T=st.sampled_from([0.5, 1.0, 3.0]))
def test_statistics(core, pair, T):
    s, t, vocab_size = pair
    ids = torch.arange(len(s)) % (vocab_size or min(s.shape[-1], t.shape[-1]))
    leaf, x = s.double().requires_grad_(), s.detach().requires_grad_()
    truth = oracle.statistics(leaf, t, ids, T, vocab_size)
    stats = distill_stats(x, t, ids, temperature=T, vocab_size=vocab_size)
    log_q, log_p = oracle.log_probabilities(s, t, T, vocab_size)
    floored = _floored(log_q, log_p)
    upstream, expected, actual = torch.tensor([1.5, -1.0, 0.5, 2.0])[: len(s)], 0, 0
    for name, value in zip(stats._fields, stats, strict=True):
        right = truth[name]
        compared = ~floored if name in ("reverse_kl", "forward_kl") else torch.ones_like(floored)
        # A log-probability of 1e5 and more is the floor's own.
        compared = compared & ((right.abs() < 1e4) | ~right.isfinite())
        assert_values(value[compared], right[compared].detach(), what=name)
        if name in oracle.DIFFERENTIABLE:
            used = compared & right.isfinite()
            expected = expected + torch.where(used, right * upstream, 0).sum()
            actual = actual + torch.where(used, value * upstream, 0).sum()
    terms = gradient_terms(log_q, log_p, upstream.double().expand(5, -1), T, ids)
    assert_gradient(oracle.gradient(actual, x), oracle.gradient(expected, leaf), terms)


@BOUNDED
@given(pair=pairs(), name=st.sampled_from(DIVERGENCES), beta=st.sampled_from([0.0, 0.1, 0.5, 1.0]), data=st.data())
def test_losses(core, pair, name, beta, data):
    s, t, vocab_size = pair
    weights = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=len(s), max_size=len(s))))
    leaf, x = s.double().requires_grad_(), s.detach().requires_grad_()
    log_q, log_p = oracle.log_probabilities(s, t, 1.0, vocab_size)
    per_row = oracle.divergence(leaf, t, name, beta, 1.0, vocab_size)
    unusable = _floored(log_q, log_p) | per_row.isnan()
    if name == "tvd":  # rounding decides the sign of q - p at a near tie
        unusable |= ((log_q - log_p).abs() < 1e-5).any(-1)
    weights = torch.where(unusable, 0, weights)
    truth = oracle.reduce(per_row, weights, None, "batchmean")
    loss = fused_divergence_loss(x, t, name, beta=beta, weights=weights, vocab_size=vocab_size)
    assert_values(loss, truth.detach(), what=name)
    coefficients = weights[None].double() / max(int(weights.count_nonzero()), 1)
    actual = oracle.gradient(loss, x)
    assert_gradient(actual, oracle.gradient(truth, leaf), gradient_terms(log_q, log_p, coefficients, 1.0), name)
    assert (actual[weights == 0] == 0).all()


@BOUNDED
@given(
    pair=pairs(),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    top_k=st.integers(0, 80),
    # Within fp32's rounding of 1, that decides whether columns of no probability stay (log-probability -1e38) or go.
    top_p=st.floats(0.05, 1 - 1e-5) | st.just(1.0),
)
def test_samples(core, pair, alpha, top_k, top_p):
    """The token has a probability, is one that its uniform allows, and has the right log-probabilities."""
    s, t, vocab_size = pair
    V = vocab_size or min(s.shape[-1], t.shape[-1])
    uniforms = torch.rand(len(s), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(V))
    x = mixed_sample(s, t, alpha, uniforms=uniforms, top_k=top_k, top_p=top_p, vocab_size=vocab_size)
    for i, token in enumerate(x.token_ids.tolist()):
        lq, lp = (oracle.log_law(z[i, :V], 1.0, top_k, top_p) for z in (s, t))
        if lq.isnan().any() or lp.isnan().any():
            assert token == 0 and x.mixture_logprobs[i].isnan()
            continue
        law = (lp if x.from_teacher[i] else lq).exp()
        assert law[token] > 0
        assert law[:token].sum() <= uniforms[i, 1] + 1e-5 and law[: token + 1].sum() >= uniforms[i, 1] - 1e-5
        lq, lp = lq[token], lp[token]
        mixture = torch.logaddexp(lp + torch.tensor(alpha).double().log(), lq + torch.tensor(-alpha).double().log1p())
        assert error(x.student_logprobs[i], lq) < 3e-6
        assert error(x.teacher_logprobs[i], lp) < 3e-6
        assert error(x.mixture_logprobs[i], mixture) < 3e-6
