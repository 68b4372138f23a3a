"""How far from the float64 oracle a result may be: small multiples of rounding errors that cannot be avoided."""

import torch
from torch import Tensor

FP32_EPS = 2.0**-23
TINY = 1e-37  # probabilities below the smallest normal fp32 are 0
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
SMALLEST = {torch.float32: TINY, torch.bfloat16: TINY, torch.float16: 2.0**-25, torch.float64: 0.0}


def same_special(actual: Tensor, truth: Tensor) -> Tensor:
    return (actual == truth) | (actual.isnan() & truth.isnan())


def error(actual: Tensor, truth: Tensor) -> Tensor:
    """|actual - truth| / (1 + |truth|), 0 for equal infinities and for two NaNs, inf for one."""
    difference = (actual.double() - truth).abs() / (1 + truth.abs())
    return torch.where(same_special(actual.double(), truth), 0, difference.nan_to_num(torch.inf, torch.inf))


def assert_values(actual: Tensor, truth: Tensor, plain: Tensor | None = None, what: str = "") -> None:
    """At most 3e-6 (1 + |value|), and 4 times the worst error of the formula in plain fp32 plus 5 roundings.

    The second bound is for logits without a pattern. plain=None for others: where equal terms are added, roundings do
    not cancel, and torch's sum is a tree.
    """
    assert actual.shape == truth.shape, what
    ours = error(actual, truth)
    assert (ours <= 3e-6).all(), f"{what}: error {ours.max():.2e}"
    if plain is None:
        return
    theirs = error(plain, truth)
    if theirs.numel() and theirs.max() < torch.inf:
        assert ours.max() <= 4 * theirs.max() + 5 * FP32_EPS, (
            f"{what}: error {ours.max():.2e}, plain {theirs.max():.2e}"
        )


def assert_gradient(actual: Tensor, truth: Tensor, terms: Tensor, what: str = "") -> None:
    """Elementwise: the rounding to the student's type and 8 fp32 roundings of the terms that it is a sum of."""
    assert actual.shape == truth.shape, what
    bound = HALF_ULP[actual.dtype] * truth.abs() + 8 * FP32_EPS * terms + SMALLEST[actual.dtype]
    excess = (actual.double() - truth).abs() - bound
    if excess.numel():
        worst = excess.argmax()
        assert excess.max() <= 0, (
            f"{what}: {actual.flatten()[worst].item()!r} for {truth.flatten()[worst].item()!r}, "
            f"bound {bound.flatten()[worst].item():.2e}"
        )


def gradient_terms(log_q: Tensor, log_p: Tensor, coefficients: Tensor, temperature: float, token_ids=None) -> Tensor:
    """The magnitudes of what d(sum of statistics)/dz_v adds up: q_v (|log q| + |log p| + KL + H) + p_v + 1[v = token],
    where q and p have the relative error of their exponent's rounding, |log q| and |log p|. Below the smallest normal
    fp32 number q and p are 0, and what they are multiplied by is lost."""
    q, p = log_q.exp().nan_to_num(0), log_p.exp().nan_to_num(0)
    lq, lp = log_q.nan_to_num(0, 0, 0).abs(), log_p.nan_to_num(0, 0, 0).abs()
    typical = (q * (lq + lp)).sum(-1, keepdim=True)  # >= KL and >= H
    terms = q * (1 + lq) * (1 + lq + lp + typical) + p * (1 + lp)
    underflow = 2.0**-126 / (8 * FP32_EPS)  # assert_gradient's factor makes it 2^-126
    terms = terms + torch.where(log_q.isfinite() & log_p.isfinite(), underflow * (2 + lq + lp + typical), 0)
    if token_ids is not None:
        terms = terms.scatter_add(-1, token_ids.unsqueeze(-1), torch.ones_like(terms[..., :1]))
    return terms * coefficients.abs().sum(0).unsqueeze(-1) / temperature
