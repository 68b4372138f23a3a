"""The row operations over rows whose columns are split over ranks: a backend above the one that runs on each rank.

`row_stats` is the local one and one all-gather of its finished statistics (merge.py). From the merged statistics
`row_grad` and `row_divergence_grad` are local: the gradient of a column needs no other column. `row_divergence` adds
its two sums. Whatever is written in terms of the row operations, losses and sweeps over hidden states alike, holds for
a split vocabulary too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .. import arguments
from ..backends import choose
from ..backends.protocol import Backend
from ..backends.reference import check_token_ids
from ..rows import DIFFERENTIABLE, Pair, RowStats, accumulator
from . import sampling
from .collectives import add, gather
from .merge import exchanged, merged
from .ranks import Ranks, different_splits, local, ranks_of

_last_widths: WeakKeyDictionary = WeakKeyDictionary()  # of each group, the same on all its ranks
_Y, _L = DIFFERENTIABLE.index("student_logprobs"), DIFFERENTIABLE.index("student_logsumexp")


class Split(Backend):
    """For one call of a public function, its backward pass included.

    Where a rank's columns begin depends on how many the others hold. DTensors tell. Plain tensors do not: then a rank
    takes it to be as in the call before, or where it held another number then, all ranks to hold as many as itself.
    The widths travel with the first gather, after which every rank knows whether all were right. Where one was not,
    all of them do their part again.
    """

    def __init__(self, ranks: Ranks, vocab_size: int | None, widths: tuple[int, ...], name: str) -> None:
        """vocab_size: the columns of all ranks that count, None for all. widths: how many each model has here.
        name: the backend that runs here, or "auto"."""
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
        self.group, self.vocab_size, self.own, self.name = ranks.group, vocab_size, widths, name
        self.rank = dist.get_rank(ranks.group)
        self.known = ranks.widths is not None
        self.widths = ranks.widths or self._assumed(self.rank, min(widths))
        if self.known:
            self._check_vocabulary()

    def unavailable(self) -> str | None:
        return None

    def refusal(self, x: Tensor) -> str | None:
        return None  # what runs here says so

    def here(self, pair: Pair) -> tuple[Backend, Pair, int]:
        """What runs here, on which columns of this rank, and the place of the first of them in the vocabulary."""
        first, count = sum(self.widths[: self.rank]), pair.vocab_size
        if self.vocab_size is not None:
            count = min(max(self.vocab_size - first, 0), count)
        return choose.resolve(self.name, pair.student, pair.teacher), pair._replace(vocab_size=count), first

    def gathered(self, part: Callable[[], Tensor], placed: bool) -> Tensor:
        """[P, ...]: what part() gives on each rank, in rank order. placed: whether it depends on where the columns
        lie in the vocabulary."""
        placed = placed or self.vocab_size is not None
        if self.known:
            return gather(part(), self.group)
        while True:
            x = part()
            everything = gather(torch.cat((x.flatten(), x.new_tensor((self.own[0], self.own[-1])))), self.group)
            if self._learn(everything[:, -2:]) or not placed:
                return everything[:, :-2].reshape(-1, *x.shape)

    def row_stats(self, pair: Pair, token_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        names = exchanged(pair.teacher is not None, token_ids is not None)

        def part() -> Tensor:
            own = self._own_stats(pair, token_ids, mask)
            return torch.stack([getattr(own, name) for name in names])

        slices = self.gathered(part, placed=token_ids is not None).unbind(1)
        row = merged(dict(zip(names, slices, strict=True)), pair.temperature)
        if token_ids is not None:
            row = self._checked_tokens(row, pair, token_ids, mask)
        stats = torch.stack(tuple(row)).to(slices[0].dtype)
        return stats if mask is None else torch.where(mask, stats, 0)

    def row_grad(
        self,
        pair: Pair,
        token_ids: Tensor | None,
        stats: Tensor,
        coefficients: Tensor,
        out: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        backend, own, first = self.here(pair)
        if own.vocab_size == 0:
            return _zeros(pair, out)
        if token_ids is not None:  # c (1[v = y] - q) is -c q where another rank has the column y
            held, token_ids = _held(token_ids, own, first)
            c = torch.where(torch.isneginf(RowStats(*stats).student_logprobs), 0, coefficients[_Y])
            elsewhere = coefficients.clone()
            elsewhere[_L] -= c
            elsewhere[_Y] = 0
            coefficients = torch.where(held, coefficients, elsewhere)
        return backend.row_grad(own, token_ids, stats, coefficients, out, factor)

    def row_scale(self, x: Tensor, factor: Tensor) -> None:
        choose.resolve(self.name, x).row_scale(x, factor)

    def row_divergence(self, pair: Pair, mask: Tensor | None, stats: Tensor, divergence: str, beta: float) -> Tensor:
        backend, own, _first = self.here(pair)
        if own.vocab_size == 0:
            return add(torch.zeros_like(stats[:2]), self.group)
        return add(backend.row_divergence(own, mask, stats, divergence, beta), self.group)

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
        backend, own, _first = self.here(pair)
        if own.vocab_size == 0:
            return _zeros(pair, out)
        return backend.row_divergence_grad(own, stats, values, scale, divergence, beta, out)

    def row_sample(
        self, pair: Pair, uniforms: Tensor, alpha: float, top_k: int, top_p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if top_k > 0 or top_p < 1.0:
            raise NotImplementedError(
                "top_k and top_p need all columns of a row on one rank: with a vocabulary split over ranks (group=) "
                "mixed_sample takes temperature, 0 for the argmax included, alpha and vocab_size; gather the logits "
                "to filter them"
            )
        return (sampling.greedy if pair.temperature == 0 else sampling.draw)(self, pair, uniforms, alpha)

    @property
    def _total(self) -> int:
        return sum(self.widths) if self.vocab_size is None else self.vocab_size

    def _own_stats(self, pair: Pair, token_ids: Tensor | None, mask: Tensor | None) -> RowStats:
        """Of the columns here; all of it -inf where there are none, or none is in the support."""
        backend, own, first = self.here(pair)
        if own.vocab_size == 0:
            shape, dtype = (len(RowStats._fields), *pair.student.shape[:-1]), accumulator(pair.student, pair.teacher)
            return RowStats(*pair.student.new_full(shape, -math.inf, dtype=dtype))
        held, ids = (None, None) if token_ids is None else _held(token_ids, own, first)
        own_stats = RowStats(*stats_of_slice(backend, own, ids, mask))
        if held is None:
            return own_stats
        tokens = {name: getattr(own_stats, name) for name in ("student_logprobs", "teacher_logprobs")}
        return own_stats._replace(**{name: torch.where(held, x, -math.inf) for name, x in tokens.items()})

    def _checked_tokens(self, row: RowStats, pair: Pair, token_ids: Tensor, mask: Tensor | None) -> RowStats:
        """IndexError for a token outside the whole vocabulary, on a GPU NaN."""
        if mask is not None:
            token_ids = token_ids.masked_fill(~mask, 0)
        if token_ids.device.type == "cpu":
            if token_ids.numel():
                check_token_ids(token_ids, self._total)
            return row
        known = (token_ids >= 0) & (token_ids < self._total)
        names = ["student_logprobs", *(["teacher_logprobs"] if pair.teacher is not None else [])]
        return row._replace(**{name: torch.where(known, getattr(row, name), math.nan) for name in names})

    def _learn(self, widths: Tensor) -> bool:
        """Takes note of [P, 2] how many columns every rank has of each model; whether all began where they assumed."""
        student, teacher = zip(*widths.long().tolist(), strict=True)
        both = tuple(map(min, student, teacher))
        starts = (tuple(accumulate(x, initial=0)) for x in (both, student, teacher))
        if any(count and len({*begins}) > 1 for count, *begins in zip(both, *starts, strict=False)):
            raise different_splits(student, teacher)
        assumed = [sum(self._assumed(rank, width)[:rank]) for rank, width in enumerate(both)]
        self.known, self.widths = True, both
        _last_widths[self.group] = both
        self._check_vocabulary()
        return assumed == list(accumulate(both, initial=0))[:-1]

    def _assumed(self, rank: int, width: int) -> tuple[int, ...]:
        """What a rank of that width takes the widths to be."""
        last = _last_widths.get(self.group)
        return last if last is not None and last[rank] == width else (width,) * dist.get_world_size(self.group)

    def _check_vocabulary(self) -> None:
        arguments.resolve_vocab_size(self._total, sum(self.widths))


def stats_of_slice(backend: Backend, pair: Pair, token_ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """row_stats of some columns of each row: -inf, and not NaN, in rows without support there."""
    stats = backend.row_stats(pair, token_ids, mask)
    # NaN is what such a row has, and one that holds a NaN. The sum of |p - q| tells them apart: it is one of nothing,
    # or NaN again. No other row is read.
    unknown = torch.isnan(RowStats(*stats).student_logz)
    both = pair._replace(teacher=pair.student if pair.teacher is None else pair.teacher)
    distance = backend.row_divergence(both, unknown, torch.zeros_like(stats), "tvd", 0.5)[0]
    return torch.where(unknown & (distance == 0), -math.inf, stats)


def columns(ranks: Ranks | None, vocab_size: int | None, *widths: int) -> tuple[int, str | Split]:
    """How many of the columns here count, and the backend for them: a name, or the split over the ranks."""
    if ranks is None:
        return arguments.resolve_vocab_size(vocab_size, *widths), choose.requested()
    return min(widths), Split(ranks, vocab_size, widths, choose.requested())


def checked_rows(
    student: Tensor, teacher: Tensor | None, vocab_size: int | None, group: object
) -> tuple[Tensor, Any, int, str | Split]:
    """The logits here, how many of their columns count, and the backend for them."""
    ranks = ranks_of(group, *((x, -1) for x in (student, teacher) if isinstance(x, Tensor)))
    if ranks is not None:
        student, teacher = local(student), local(teacher)
    arguments.check_logits(student, teacher, least=0 if ranks else 1)
    sizes = [x.shape[-1] for x in (student, teacher) if x is not None]
    return student, teacher, *columns(ranks, vocab_size, *sizes)


def _held(token_ids: Tensor, own: Pair, first: int) -> tuple[Tensor, Tensor]:
    """Which tokens are columns of this rank, and these columns; 0 for the others."""
    held = (token_ids >= first) & (token_ids < first + own.vocab_size)
    return held, torch.where(held, token_ids - first, 0)


def _zeros(pair: Pair, out: Tensor | None) -> Tensor:
    like = torch.zeros_like(pair.student, memory_format=torch.contiguous_format)
    return like if out is None else out.zero_()
