"""What a scalar reduction makes of the rows' weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import arguments


def normalized(w: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    """The row weights of a scalar reduction: w over its denominator; 0 where nothing counts."""
    if reduction == "sum" or w.numel() == 0:
        return w
    if normalizer is not None:
        return w / arguments.check_normalizer(normalizer, w, w.dtype)
    if reduction == "batchmean":
        return w / arguments.nonzero((w != 0).sum().to(w.dtype))
    w = w / arguments.nonzero(w.abs().amax())  # the sum of the weights themselves may be beyond their type
    return w / arguments.nonzero(w.sum())


def write_row_weights(
    out: Tensor, w: Tensor | None, reduction: str, normalizer: Tensor | None, divisor: float | None
) -> Tensor:
    """Into out [...]: what each row's value is multiplied by before the sum. w: None where every row counts once. The
    normalizer comes as a tensor, or as a number in `divisor`."""
    if w is None and (reduction == "sum" or (normalizer is None and divisor is None)):
        return out.fill_(1.0 if reduction == "sum" else 1.0 / max(out.numel(), 1))
    w = torch.ones_like(out) if w is None else w
    return out.copy_(normalized(w, reduction, divisor if normalizer is None else normalizer))


def split_normalizer(normalizer: float | Tensor | None, like: Tensor) -> tuple[Tensor | None, float | None]:
    """As an operator takes it: a tensor on the device of `like`, or a number."""
    if isinstance(normalizer, Tensor):
        if normalizer.requires_grad and torch.is_grad_enabled():
            raise ValueError("normalizer requires a gradient, but is a constant here: pass normalizer.detach()")
        return normalizer.to(like.device, non_blocking=True), None
    return None, None if normalizer is None else float(normalizer)
