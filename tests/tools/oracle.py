"""The right answers: each definition written out row by row with log_softmax, differentiated by autograd, in float64.

With dtype=torch.float32 they are what one would write in plain PyTorch, whose error is the measure of ours.
"""

import torch
from torch import Tensor

STATISTICS = (
    "reverse_kl",
    "forward_kl",
    "student_logprobs",
    "teacher_logprobs",
    "student_entropy",
    "student_logsumexp",
    "teacher_logsumexp",
)
DIFFERENTIABLE = ("reverse_kl", "forward_kl", "student_logprobs", "student_entropy", "student_logsumexp")


def _support(s: Tensor, t: Tensor) -> Tensor:
    """Columns finite in both models, and those with a NaN or +inf, which must come out as NaN."""
    shown = s.isnan() | t.isnan() | s.isposinf() | t.isposinf()
    return (s.isfinite() & t.isfinite()) | shown


def _rows(student: Tensor, teacher: Tensor | None, temperature: float, vocab_size: int | None, dtype: torch.dtype):
    """Of each row: s/T and t/T over the support, and the support's columns."""
    teacher = student if teacher is None else teacher
    V = min(student.shape[-1], teacher.shape[-1]) if vocab_size is None else vocab_size
    for s, t in zip(_flat(student), _flat(teacher), strict=True):
        columns = _support(s[:V], t[:V]).nonzero().squeeze(-1)
        yield s[columns].to(dtype) / temperature, t[columns].to(dtype) / temperature, columns


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def log_probabilities(student, teacher, temperature=1.0, vocab_size=None) -> tuple[Tensor, Tensor]:
    """log q and log p [..., student's head] in float64: -inf outside the support, NaN in rows without one."""
    log_q = torch.full(student.shape, -torch.inf, dtype=torch.float64)
    log_p = log_q.clone()
    rows = _rows(student.detach(), teacher, temperature, vocab_size, torch.float64)
    for q, p, (s, t, columns) in zip(_flat(log_q), _flat(log_p), rows, strict=True):
        q[columns], p[columns] = s.log_softmax(-1), t.log_softmax(-1)
    return log_q, log_p


def _entropy(log_q: Tensor) -> Tensor:
    return -(log_q.exp() * log_q).sum()


def _logsumexp(z: Tensor) -> Tensor:
    """torch's gradient takes the probabilities from z minus the result, which is nothing at 30 over T = 1e-15."""
    largest = z.detach().amax(-1)
    return (z - largest).logsumexp(-1) + largest


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum()


def statistics(
    student: Tensor,
    teacher: Tensor | None,
    token_ids: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The fields of DistillStats, each with the leading shape; without a teacher only the student's."""
    rows = []
    tokens = [0] * _flat(student).shape[0] if token_ids is None else token_ids.flatten().tolist()
    nan = torch.full((), torch.nan, dtype=dtype)
    for (s, t, columns), token in zip(_rows(student, teacher, temperature, vocab_size, dtype), tokens, strict=True):
        if len(columns) == 0:
            rows.append([nan] * len(STATISTICS))
            continue
        log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
        at = (columns == token).nonzero()
        outside = torch.full((), -torch.inf, dtype=dtype)
        rows.append(
            [
                _kl(log_q, log_p),
                _kl(log_p, log_q),
                log_q[at.item()] if len(at) else outside,
                log_p[at.item()] if len(at) else outside,
                _entropy(log_q),
                _logsumexp(s),
                _logsumexp(t),
            ]
        )
    fields = [torch.stack(f) if f else student.new_zeros(0, dtype=dtype) for f in zip(*rows, strict=True)]
    fields = fields or [student.new_zeros(0, dtype=dtype)] * len(STATISTICS)
    return {name: f.reshape(student.shape[:-1]) for name, f in zip(STATISTICS, fields, strict=True)}


def divergence(
    student: Tensor,
    teacher: Tensor,
    name: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[...], by name as in fused_divergence_loss; exactly beta = 0 and 1 of "jsd" are forward and reverse KL."""
    values = []
    for s, t, columns in _rows(student, teacher, temperature, vocab_size, dtype):
        if len(columns) == 0:
            values.append(torch.full((), torch.nan, dtype=dtype))
            continue
        values.append(_divergence_of(s.log_softmax(-1), t.log_softmax(-1), name, beta))
    return torch.stack(values or [student.new_zeros(0, dtype=dtype)]).reshape(student.shape[:-1])


def _divergence_of(log_q: Tensor, log_p: Tensor, name: str, beta: float) -> Tensor:
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return _kl(log_q, log_p)
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return _kl(log_p, log_q)
    if name == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum()
    share_of_p = torch.tensor(1 - beta if name == "skew_reverse_kl" else beta, dtype=log_q.dtype)
    log_m = torch.logaddexp(share_of_p.log() + log_p, (-share_of_p).log1p() + log_q)
    if name == "jsd":
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return _kl(log_p, log_m) if name == "skew_forward_kl" else _kl(log_q, log_m)


def reduce(values: Tensor, weights: Tensor | None, counts: Tensor | None, reduction: str, normalizer=None) -> Tensor:
    """The reductions' definitions, one row after another. counts: False where the label is ignored."""
    loss = values.flatten()
    w = torch.ones_like(loss) if weights is None else weights.expand(values.shape).flatten().to(loss.dtype)
    c = torch.ones_like(loss, dtype=torch.bool) if counts is None else counts.flatten()
    used = [i for i in range(loss.numel()) if c[i] and w[i] != 0]
    if reduction == "none":
        terms = [w[i] * loss[i] if i in used else loss.new_zeros(()) for i in range(loss.numel())]
        return torch.stack(terms).reshape(values.shape) if terms else values
    total = sum((w[i] * loss[i] for i in used), loss.new_zeros(()))
    if reduction == "sum":
        return total
    if normalizer is None:
        normalizer = len(used) if reduction == "batchmean" else sum(w[i] for i in used)
    return total / normalizer if normalizer != 0 else loss.new_zeros(())


def gradient(scalar: Tensor, leaf: Tensor) -> Tensor:
    """d scalar/d leaf, 0 where scalar does not depend on it."""
    if not scalar.requires_grad:
        return torch.zeros_like(leaf)
    (grad,) = torch.autograd.grad(scalar, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if grad is None else grad


def log_law(z: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Log-probabilities [V] of one row in float64: T, then top-k, renormalised, then top-p; whole ties are kept."""
    z = z.double() / temperature
    if top_k:
        z = torch.where(_above(z, torch.ones_like(z)) < top_k, z, -torch.inf)
    if top_p < 1:  # 1 keeps also what has all of the mass above it, to rounding
        z = torch.where(_above(z, z.softmax(-1)) < top_p, z, -torch.inf)
    return z.log_softmax(-1)


def _above(z: Tensor, mass: Tensor) -> Tensor:
    """Of each column, the mass of the columns with a larger logit."""
    values, place = z.unique(return_inverse=True)
    of_value = torch.zeros_like(values).scatter_add(0, place, mass)
    from_here_up = of_value.flip(0).cumsum(0).flip(0)
    return torch.cat([from_here_up[1:], values.new_zeros(1)])[place]


def of_any_origin(stats: Tensor) -> Tensor:
    """Rows 0 to 3 are an origin and the logarithm of the sum relative to it, of each model: their sum is defined, not
    where parts of a row put the origin."""
    return torch.cat([stats[0:1] + stats[1:2], stats[2:3] + stats[3:4], stats[4:]])
