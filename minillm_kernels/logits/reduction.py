"""What a scalar loss makes of the rows' weights and coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..rows import DIFFERENTIABLE


def normalized(w: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    """The row weights of a scalar reduction: w over its denominator; 0 where nothing counts."""
    if reduction == "sum" or w.numel() == 0:
        return w
    if normalizer is not None:
        return w / arguments.check_normalizer(normalizer, w, w.dtype)
    if reduction == "batchmean":
        return w / (w != 0).sum().clamp(min=1)
    w = w / arguments.nonzero(w.abs().amax())  # the sum of the weights themselves may be beyond their type
    return w / arguments.nonzero(w.sum())


def scalar_weights(
    like: Tensor, w: Tensor | None, reduction: str, normalizer: Tensor | None, divisor: float | None
) -> Tensor | float:
    """What each row's value is multiplied by before the sum: [...] of the type of `like`, or one number for all rows.
    w: None where every row counts once. The normalizer comes as a tensor, or as a number in `divisor`."""
    if w is None and (reduction == "sum" or (normalizer is None and divisor is None)):
        return 1.0 if reduction == "sum" else 1.0 / max(like.numel(), 1)
    w = torch.ones_like(like) if w is None else w.to(like.dtype)
    return normalized(w, reduction, divisor if normalizer is None else normalizer)


def write_row_weights(out: Tensor, weights: Tensor | float) -> Tensor:
    """`scalar_weights` into out [...]."""
    return out.copy_(weights) if isinstance(weights, Tensor) else out.fill_(weights)


def reduced(per_row: Tensor, weights: Tensor | float) -> Tensor:
    """The sum of the rows by their `scalar_weights`."""
    if isinstance(weights, Tensor):
        return (per_row * weights).sum()
    return per_row.sum() if weights == 1.0 else per_row.mean()


def split_normalizer(normalizer: float | Tensor | None, like: Tensor) -> tuple[Tensor | None, float | None]:
    """As an operator takes it: a tensor on the device of `like`, or a number."""
    if isinstance(normalizer, Tensor):
        if normalizer.requires_grad and torch.is_grad_enabled():
            raise ValueError("normalizer requires a gradient, but is a constant here: pass normalizer.detach()")
        return normalizer.to(like.device, non_blocking=True), None
    return None, None if normalizer is None else float(normalizer)


class WeightedRows(NamedTuple):
    """Which rows of a loss count, and for how much."""

    coefficients: Tensor
    """[5, ...] in the order of DIFFERENTIABLE, 0 in rows that do not count."""
    token_ids: Tensor | None
    """[...] int64, 0 in rows that do not count."""
    counts: Tensor | None
    """[...] bool; None where every row counts."""


Coefficients = Sequence[float | Tensor]  # one of each differentiable statistic, in the order of DIFFERENTIABLE


def check_coefficients(given: Coefficients, teacher: bool, token_ids: Tensor | None) -> None:
    """That they make a loss, and that there is what they need."""
    used = {name for name, x in zip(DIFFERENTIABLE, given, strict=True) if isinstance(x, Tensor) or x != 0}
    if not used:
        raise ValueError(
            "every coefficient is 0: there is no loss; pass one of "
            f"{', '.join(DIFFERENTIABLE)}, or take the statistics from distill_stats"
        )
    for name in ("reverse_kl", "forward_kl"):
        if name in used and not teacher:
            raise ValueError(f"{name} needs a teacher: pass the teacher's logits, or its hidden states and head")
    if "student_logprobs" in used and token_ids is None:
        raise ValueError("student_logprobs needs token_ids, the tokens whose log-probabilities count")


def split_coefficients(given: Coefficients, like: Tensor) -> tuple[list[Tensor | None], list[float]]:
    """As an operator takes them: tensors of the leading shape of `like`, and numbers where there is none."""
    named = zip(DIFFERENTIABLE, given, strict=True)
    tensors = [arguments.check_per_row(name, x, like) if isinstance(x, Tensor) else None for name, x in named]
    return tensors, [0.0 if isinstance(x, Tensor) else float(x) for x in given]


def weighted_rows(given: Coefficients, like: Tensor, token_ids: Tensor | None, ignore_index: int) -> WeightedRows:
    """The coefficients as one tensor, checked against the leading shape of `like`."""
    dtype, shape = torch.promote_types(like.dtype, torch.float32), like.shape[:-1]
    coefficients = torch.zeros((len(DIFFERENTIABLE), *shape), dtype=dtype, device=like.device)
    for row, name, x in zip(coefficients.unbind(0), DIFFERENTIABLE, given, strict=True):
        if isinstance(x, Tensor):
            row.copy_(arguments.check_per_row(name, x, like))
        elif x != 0:
            row.fill_(x)
    ids, counts = None, None
    if token_ids is not None:
        ids, counts = arguments.check_token_ids(token_ids, like, ignore_index)
        coefficients = torch.where(counts, coefficients, 0)
    if any(isinstance(x, Tensor) for x in given):
        counts = (coefficients != 0).any(0)
        ids = None if ids is None else torch.where(counts, ids, 0)
    return WeightedRows(coefficients, ids, counts)
