"""Means per token with standard errors clustered by prompt.

Tokens of one prompt are not independent, prompts are: a mean per token is a ratio of sums over prompts, and its error
follows from the prompts' residuals (the delta method for ratio estimators).
"""

import math
from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """Per prompt, the sum of a quantity and the number of tokens (or answers) summed; [P] each, float64."""

    totals: Tensor
    counts: Tensor

    @property
    def mean(self) -> float:
        return float(self.totals.sum() / self.counts.sum())

    @property
    def standard_error(self) -> float:
        return _error(self._residuals())

    def _residuals(self) -> Tensor:
        """[P] each prompt's contribution to the deviation of the mean, times P."""
        return (self.totals - self.mean * self.counts) / self.counts.mean()

    def to_dict(self) -> dict[str, float]:
        return {
            "mean": self.mean,
            "standard_error": self.standard_error,
            "prompts": len(self.totals),
            "count": int(self.counts.sum()),
        }


def difference(after: Estimate, before: Estimate) -> dict[str, float]:
    """`after` - `before` on the same prompts in the same order, with the standard error of the paired difference."""
    if len(after.totals) != len(before.totals):
        raise ValueError(f"paired estimates need the same prompts; got {len(after.totals)} and {len(before.totals)}")
    return {
        "mean": after.mean - before.mean,
        "standard_error": _error(after._residuals() - before._residuals()),
    }


def _error(residuals: Tensor) -> float:
    count = len(residuals)
    return float(residuals.std(correction=1)) / math.sqrt(count) if count > 1 else math.nan
