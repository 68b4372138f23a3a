"""Tokens of rows whose columns are split over ranks, as one process draws them.

Each rank tells the mass of its columns, in float64. One uniform picks the rank by the running sum of these masses, and
what is left of it the token among that rank's columns; the rank tells the others. For the argmax each rank tells its
best column. Two collectives either way. Ranks need not draw the same uniforms: those of the first one count.

Legend: P ranks, M models (student, or student and teacher), ... rows, n the columns here that count.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..backends.reference import three_logprobs
from ..rows import Pair, accumulator
from .collectives import add, gather

if TYPE_CHECKING:
    from .split import Split

BELOW_1 = 1 - 2.0**-53
LOWEST = torch.finfo(torch.float64).min


class _Laws(NamedTuple):
    """The laws of the models over whole rows: e^((z - top)/T) / total."""

    top: Tensor  # [M, ...] float64
    total: Tensor  # [M, ...]
    mass: Tensor  # [P, M, ...] of each rank's columns
    drawable: Tensor  # [...]: no NaN, and a column left in each model
    uniforms: Tensor  # [2, ...]


def draw(split: Split, pair: Pair, uniforms: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """row_sample without filters, at a temperature above 0."""
    laws = _laws(split, pair, uniforms, pair.temperature)
    from_teacher = laws.drawable & (laws.uniforms[0] < alpha) & (pair.teacher is not None)
    mass = torch.where(from_teacher, laws.mass[:, -1], laws.mass[:, 0])
    until = mass.cumsum(0)
    target = laws.uniforms[1] * torch.where(from_teacher, laws.total[-1], laws.total[0])
    exceeds, possible = (until > target) & (mass > 0), (mass > 0).to(torch.uint8)
    last = len(mass) - 1 - possible.flip(0).argmax(0)
    owner = torch.where(exceeds.any(0), exceeds.to(torch.uint8).argmax(0), last).unsqueeze(0)
    rest = (target - (until - mass).gather(0, owner)[0]) / mass.gather(0, owner)[0]
    mine = laws.drawable & (owner[0] == split.rank)
    backend, own, first = split.here(pair)
    token = torch.zeros_like(owner[0])
    if own.vocab_size > 0:
        z = own.student if own.teacher is None else _of(from_teacher.unsqueeze(-1), own)
        u = torch.where(mine, rest.clamp(0, BELOW_1), 0)
        alone = Pair(z, None, own.temperature, own.vocab_size)
        token = backend.row_sample(alone, torch.stack((u, u), -1), 0.0, 0, 1.0)[0]
    logprobs = _logprobs(own, token, laws, pair.temperature)
    told = torch.stack([(token + first).double(), *logprobs])
    token, *logprobs = add(torch.where(mine, told, 0), split.group)
    return _sample(pair, token, logprobs, laws, alpha, from_teacher)


def greedy(split: Split, pair: Pair, uniforms: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The argmax of the mixture at temperature 1, lowest index first; of the logits where one model counts."""
    laws = _laws(split, pair, uniforms, 1.0)
    _backend, own, first = split.here(pair)
    score = laws.top.new_full(laws.drawable.shape, -math.inf)
    token = torch.zeros_like(score, dtype=torch.int64)
    if own.vocab_size > 0:
        z = _logits(own)
        if len(z) == 1 or alpha in (0.0, 1.0):
            law = z[int(alpha) if len(z) == 2 else 0]
        else:
            q, p = (_relative(x, top).exp() / total.unsqueeze(-1) for x, top, total in zip(z, *laws[:2], strict=True))
            law = alpha * p + (1 - alpha) * q
        token = law.argmax(-1)
        score = law.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    told = torch.stack([score, (token + first).double(), *_logprobs(own, token, laws, 1.0)])
    everyone = gather(told, split.group)
    best = everyone[:, 0].argmax(0).expand(1, len(told), *token.shape)
    _score, token, *logprobs = everyone.gather(0, best)[0]
    return _sample(pair, token, logprobs, laws, alpha, torch.zeros_like(laws.drawable))


def _laws(split: Split, pair: Pair, uniforms: Tensor, temperature: float) -> _Laws:
    def part() -> Tensor:
        _backend, own, _first = split.here(pair)
        if own.vocab_size == 0:
            top = uniforms.new_full((1 if own.teacher is None else 2, *uniforms.shape[:-1]), -math.inf)
            mass = torch.zeros_like(top)
        else:
            z = _logits(own)
            top = torch.stack([x.amax(-1) for x in z])
            mass = torch.stack([(_relative(x, m) / temperature).exp().sum(-1) for x, m in zip(z, top, strict=True)])
        return torch.stack([*top, *mass, *uniforms.unbind(-1)])

    everyone = split.gathered(part, placed=False)
    top, mass = everyone[:, :-2].unflatten(1, (2, -1)).unbind(1)
    highest = top.amax(0)
    mass = mass * ((top - highest.clamp(min=LOWEST)) / temperature).exp()
    total = mass.sum(0)
    return _Laws(highest, total, mass, (total > 0).all(0), everyone[0, -2:])


def _logits(own: Pair) -> list[Tensor]:
    """[..., n] in float64 of each model."""
    return [x[..., : own.vocab_size].double() for x in (own.student, own.teacher) if x is not None]


def _of(teacher: Tensor, own: Pair) -> Tensor:
    assert own.teacher is not None
    return torch.where(teacher, own.teacher[..., : own.vocab_size], own.student[..., : own.vocab_size])


def _relative(z: Tensor, top: Tensor) -> Tensor:
    return z - top.clamp(min=LOWEST).unsqueeze(-1)  # finite, where every column is -inf


def _logprobs(own: Pair, token: Tensor, laws: _Laws, temperature: float) -> list[Tensor]:
    """[...] of each model, of a column of this rank; 0 where it has none."""
    if own.vocab_size == 0:
        return [torch.zeros_like(x) for x in laws.top]
    logits = (
        x.gather(-1, token.unsqueeze(-1)).squeeze(-1).double() for x in (own.student, own.teacher) if x is not None
    )
    return [(z - top) / temperature - total.log() for z, top, total in zip(logits, *laws[:2], strict=True)]


def _sample(
    pair: Pair, token: Tensor, logprobs: list[Tensor], laws: _Laws, alpha: float, from_teacher: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What row_sample returns."""
    logprobs = [x.masked_fill(~laws.drawable, math.nan) for x in logprobs]
    stacked = three_logprobs(*logprobs, alpha=alpha)
    token_ids = torch.where(laws.drawable, token, 0).long()
    return token_ids, stacked.to(accumulator(pair.student, pair.teacher)), from_teacher
