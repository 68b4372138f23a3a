"""The row operations (protocol.py) in plain PyTorch, on any device: the oracle of every other backend.

The formulas are those of csrc/rowmath, written for tensors. fp64 input is computed and returned in fp64, everything
else in fp32. Nothing here is fused: each function makes several tensors of the size of the logits.

Legend: ... rows, V vocabulary; s, t = (z - max)/T of student and teacher; q, p their probabilities.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows import MIXTURE_DIVERGENCES, Pair, RowStats, accumulator
from .protocol import Backend


class _Scaled(NamedTuple):
    """Logits relative to their maxima and scaled. Columns outside the support have s = t = 0 and weight 0."""

    s: Tensor
    t: Tensor
    weight: Tensor  # 1 inside the support, 0 outside
    excluded: Tensor  # outside the support, or -inf in the student beside NaN or +inf in the teacher: no gradient
    s_max: Tensor
    t_max: Tensor


def _outside(s: Tensor, t: Tensor) -> Tensor:
    # -inf in one model; the halves keep finite sums finite, and NaN or +inf in the other model is not hidden.
    return torch.isneginf(0.5 * s + 0.5 * t)


def _relative(z: Tensor, z_max: Tensor, outside: Tensor, temperature: float) -> Tensor:
    s = (z - z_max.unsqueeze(-1)) / temperature
    s = torch.where(s == -math.inf, torch.finfo(s.dtype).min, s)  # finite: 0 * x is 0
    return s.masked_fill(outside, 0)


def _scaled(pair: Pair, stats: Tensor | None = None) -> _Scaled:
    """Relative to the origins in the statistics, where there are some: those of the whole rows, of which the pair may
    have a part of the columns."""
    student, teacher, temperature, vocab_size = pair
    dtype = accumulator(student, teacher)
    z_s = student[..., :vocab_size].to(dtype)
    z_t = z_s if teacher is None else teacher[..., :vocab_size].to(dtype)
    outside = _outside(z_s, z_t)
    if stats is None:
        s_max, t_max = (z.masked_fill(outside, -math.inf).amax(-1) for z in (z_s, z_t))
    else:
        r = RowStats(*stats.to(dtype))
        s_max, t_max = r.student_origin, r.student_origin if teacher is None else r.teacher_origin
    s = _relative(z_s, s_max, outside, temperature)
    t = _relative(z_t, t_max, outside, temperature)
    return _Scaled(s, t, (~outside).to(dtype), outside | torch.isneginf(z_s), s_max, t_max)


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x with 0 * anything finite or infinite = 0, NaN kept: an underflowed probability adds nothing."""
    return torch.where(weight == 0, weight, weight * x)


def check_token_ids(token_ids: Tensor, vocab_size: int) -> None:
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= vocab_size:
        raise IndexError(
            f"token id {low if low < 0 else high} is outside the vocabulary [0, {vocab_size}); exclude rows without a "
            "token by the mask or by ignore_index"
        )


def check_uniforms(uniforms: Tensor) -> None:
    outside = ~((uniforms >= 0) & (uniforms < 1))  # NaN too
    if outside.any():
        raise ValueError(f"uniforms must lie in [0, 1), got {uniforms[outside][0].item()}")


def _finish_gradient(grad: Tensor, x: _Scaled, rows: Tensor, student: Tensor, out: Tensor | None) -> Tensor:
    """Exactly 0 outside the support, in rows without weight, beyond vocab_size; in the student's type and width."""
    grad = grad.masked_fill(x.excluded | ~rows.unsqueeze(-1), 0)
    full = torch.zeros_like(student, memory_format=torch.contiguous_format) if out is None else out.zero_()
    full[..., : grad.shape[-1]] = grad
    return full


def _divergence_terms(q: Tensor, p: Tensor, log_q: Tensor, log_p: Tensor, divergence: str, beta: float):
    """value_v = f(q_v, p_v) and slope_v = dD/dq_v (csrc/rowmath/divergence.h)."""
    if divergence == "tvd":
        d = q - p
        return 0.5 * d.abs(), torch.where(d.isnan(), d, 0.5 * d.sign())  # sign(NaN) is 0: it would hide a NaN
    alpha = 1 - beta if divergence == "skew_reverse_kl" else beta
    m = alpha * p + (1 - alpha) * q
    underflow = m < torch.finfo(torch.float32).tiny
    m = m.masked_fill(underflow, 1)
    log_q_m = (log_q - m.log()).masked_fill(underflow, 0)
    log_p_m = (log_p - m.log()).masked_fill(underflow, 0)
    if divergence == "jsd":
        return beta * _weighted(p, log_p_m) + (1 - beta) * _weighted(q, log_q_m), (1 - beta) * log_q_m
    if divergence == "skew_forward_kl":
        return _weighted(p, log_p_m), -(1 - beta) * p / m
    return _weighted(q, log_q_m), log_q_m + 1 - beta * q / m


def _probabilities(x: _Scaled, stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r = RowStats(*stats.to(x.s.dtype).unsqueeze(-1).unbind(0))
    log_q, log_p = x.s - r.student_logz, x.t - r.teacher_logz
    return x.weight * log_q.exp(), x.weight * log_p.exp(), log_q, log_p


def _filtered(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf below the cut-off logit: top-k, then top-p of what is left; ties at a cut-off are all kept."""
    if 0 < top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(top_k, -1).values[..., -1:], -math.inf)
    if top_p < 1.0:
        ordered = z.sort(-1, descending=True).values
        p = ordered.softmax(-1)
        strictly_before = p.cumsum(-1) - p
        last = (strictly_before < top_p).sum(-1, keepdim=True).clamp(min=1) - 1
        z = z.masked_fill(z < ordered.gather(-1, last), -math.inf)
    return z


def three_logprobs(lq: Tensor, lp: Tensor | None = None, *, alpha: float) -> Tensor:
    """[3, ...]: of a token under student, teacher (0 without one) and mixture."""
    if lp is None:
        return torch.stack((lq, torch.zeros_like(lq), lq))
    if alpha in (0.0, 1.0):
        return torch.stack((lq, lp, lp if alpha else lq))
    return torch.stack((lq, lp, torch.logaddexp(lp + math.log(alpha), lq + math.log1p(-alpha))))


class Reference(Backend):
    """Any device, any floating-point type."""

    def unavailable(self) -> str | None:
        return None

    def refusal(self, x: Tensor) -> str | None:
        return None

    def row_stats(self, pair: Pair, token_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        x = _scaled(pair)
        es, et = x.weight * x.s.exp(), x.weight * x.t.exp()
        Zs, Zt = es.sum(-1), et.sum(-1)
        lnZs, lnZt = Zs.log(), Zt.log()  # of an empty support: -inf - (-inf) below gives NaN
        empty = (Zs == 0) & (Zt == 0)
        lnZs, lnZt = lnZs.masked_fill(empty, math.nan), lnZt.masked_fill(empty, math.nan)
        d = x.s - x.t
        zero = torch.zeros_like(Zs)
        log_q = log_p = zero
        if token_ids is not None:
            if mask is not None:
                token_ids = token_ids.masked_fill(~mask, 0)
            if token_ids.device.type == "cpu" and token_ids.numel():
                check_token_ids(token_ids, pair.vocab_size)
            valid = (token_ids >= 0) & (token_ids < pair.vocab_size)
            y = token_ids.masked_fill(~valid, 0).unsqueeze(-1)
            excluded = x.excluded.gather(-1, y).squeeze(-1) & ~empty
            absent = (x.weight.gather(-1, y).squeeze(-1) == 0) & ~empty
            log_q, log_p = (z.gather(-1, y).squeeze(-1) - lnZ for z, lnZ in ((x.s, lnZs), (x.t, lnZt)))
            log_q = log_q.masked_fill(excluded, -math.inf).masked_fill(~valid, math.nan)
            log_p = log_p.masked_fill(absent, -math.inf).masked_fill(~valid, math.nan)
        has_teacher = pair.teacher is not None
        stats = RowStats(
            student_origin=x.s_max,
            student_logz=lnZs,
            teacher_origin=x.t_max if has_teacher else zero,
            teacher_logz=lnZt if has_teacher else zero,
            reverse_kl=_weighted(es, d).sum(-1) / Zs - lnZs + lnZt if has_teacher else zero,
            forward_kl=_weighted(et, -d).sum(-1) / Zt - lnZt + lnZs if has_teacher else zero,
            student_entropy=lnZs - _weighted(es, x.s).sum(-1) / Zs,
            student_logprobs=log_q,
            teacher_logprobs=log_p if has_teacher else zero,
            student_logsumexp=x.s_max / pair.temperature + lnZs,
            teacher_logsumexp=x.t_max / pair.temperature + lnZt if has_teacher else zero,
        )
        stacked = torch.stack(tuple(stats))
        return stacked if mask is None else torch.where(mask, stacked, 0)

    def row_grad(
        self,
        pair: Pair,
        token_ids: Tensor | None,
        stats: Tensor,
        coefficients: Tensor,
        out: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        x = _scaled(pair, stats)
        r = RowStats(*stats.to(x.s.dtype).unsqueeze(-1).unbind(0))
        coefficients = coefficients if factor is None else factor * coefficients
        c_r, c_f, c_y, c_h, c_l = coefficients.to(x.s.dtype).unsqueeze(-1).unbind(0)
        c_y = c_y.masked_fill(torch.isneginf(r.student_logprobs), 0)
        log_q = x.s - r.student_logz
        q = x.weight * log_q.exp()
        grad = _weighted(q, -c_h * (log_q + r.student_entropy)).masked_fill(c_h == 0, 0) + q * (c_l - c_y)
        if pair.teacher is not None:
            log_p = x.t - r.teacher_logz
            grad = grad + _weighted(q, c_r * (log_q - log_p - r.reverse_kl)).masked_fill(c_r == 0, 0)
            grad = grad + (c_f * (q - x.weight * log_p.exp())).masked_fill(c_f == 0, 0)
        if token_ids is not None:
            y = token_ids.clamp(0, pair.vocab_size - 1).unsqueeze(-1)
            grad = grad.scatter_add(-1, y, c_y)
        return _finish_gradient(grad / pair.temperature, x, (coefficients != 0).any(0), pair.student, out)

    def row_scale(self, x: Tensor, factor: Tensor) -> None:
        x.copy_(torch.where(factor == 0, 0, factor * x.to(accumulator(x))))

    def row_divergence(self, pair: Pair, mask: Tensor | None, stats: Tensor, divergence: str, beta: float) -> Tensor:
        assert divergence in MIXTURE_DIVERGENCES
        x = _scaled(pair, stats)
        probabilities = _probabilities(x, stats)
        value, slope = _divergence_terms(*probabilities, divergence, beta)
        out = torch.stack((value.sum(-1), _weighted(probabilities[0], slope).sum(-1)))
        return out if mask is None else torch.where(mask, out, 0)

    def row_divergence_grad(
        self,
        pair: Pair,
        stats: Tensor,
        values: Tensor,
        scale: Tensor,
        divergence: str,
        beta: float,
        out: Tensor | None = None,
    ) -> Tensor:
        x = _scaled(pair, stats)
        probabilities = _probabilities(x, stats)
        _, slope = _divergence_terms(*probabilities, divergence, beta)
        grad = _weighted(probabilities[0], slope - values[1].unsqueeze(-1)) * (scale / pair.temperature).unsqueeze(-1)
        return _finish_gradient(grad, x, scale != 0, pair.student, out)

    def row_sample(
        self, pair: Pair, uniforms: Tensor, alpha: float, top_k: int, top_p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher, temperature, vocab_size = pair
        if uniforms.device.type == "cpu":
            check_uniforms(uniforms)
        greedy = temperature == 0
        models = [student] if teacher is None else [student, teacher]
        scaled = [m[..., :vocab_size].double() / (1.0 if greedy else temperature) for m in models]
        kept = torch.stack([_filtered(z, top_k, top_p) for z in scaled])  # [models, ..., V]
        log_laws = kept.log_softmax(-1)
        undrawable = log_laws.isnan().any(-1).any(0)  # NaN, +inf, or no column left: then the whole row is NaN
        if greedy:
            laws = log_laws.exp()
            law = laws[0] if teacher is None else alpha * laws[1] + (1 - alpha) * laws[0]
            only = scaled[0] if teacher is None or alpha == 0 else scaled[1] if alpha == 1 else law
            token_ids = only.argmax(-1)
            from_teacher = torch.zeros_like(undrawable)
        else:
            from_teacher = (uniforms[..., 0] < alpha) & (teacher is not None)
            # Relative to the maximum: equal logits have exact sums.
            weights = (kept - kept.amax(-1, keepdim=True)).exp()
            law = weights[0] if teacher is None else torch.where(from_teacher.unsqueeze(-1), weights[1], weights[0])
            cumulative = law.cumsum(-1)
            exceeds = (cumulative > uniforms[..., 1:] * cumulative[..., -1:]) & (law > 0)
            last_possible = law.shape[-1] - 1 - (law > 0).flip(-1).to(torch.uint8).argmax(-1)
            token_ids = torch.where(exceeds.any(-1), exceeds.to(torch.uint8).argmax(-1), last_possible)
        token_ids = token_ids.masked_fill(undrawable, 0)
        from_teacher = from_teacher & ~undrawable
        logprobs = log_laws.gather(-1, token_ids.expand(len(models), *token_ids.shape).unsqueeze(-1)).squeeze(-1)
        logprobs = logprobs.masked_fill(undrawable, math.nan)
        three = three_logprobs(*logprobs, alpha=alpha)
        return token_ids, three.to(accumulator(student, teacher)), from_teacher


backend = Reference()
