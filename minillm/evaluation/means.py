"""Means per token with standard errors clustered by prompt.

Tokens of one prompt are not independent, prompts are. A mean per token is a ratio of two sums over prompts; its
standard error follows from the residuals of the prompts (the delta method for ratio estimators).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Seeds(NamedTuple):
    """One value per seed of sampling."""

    by_seed: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.by_seed)

    @property
    def standard_deviation(self) -> float:
        """0 of a single seed; NaN where a value is."""
        if any(map(math.isnan, self.by_seed)):
            return math.nan
        return stdev(self.by_seed) if len(self.by_seed) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "standard_deviation": self.standard_deviation, "by_seed": list(self.by_seed)}


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean of a quantity over tokens (or responses), and its standard error over prompts."""

    mean: float
    standard_error: float
    """NaN of a single prompt."""
    prompts: int
    count: int
    """Tokens (or responses) that the mean is over."""
    totals: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    """[P] float64, per prompt the sum of the quantity; empty where only the mean was kept."""
    counts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    """[P] float64, per prompt the number of tokens (or responses) in that sum; likewise."""
    seeds: Seeds | None = None
    """For sampled responses, the mean of each seed."""
    samples: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    """[S, P] float64, for sampled responses the sum of each seed and prompt; empty where only means were kept."""

    @classmethod
    def of(cls, totals: Tensor, counts: Tensor) -> "Mean":
        """The mean Σ totals / Σ counts of [P] float64 sums and counts per prompt."""
        mean = float(totals.sum() / counts.sum())
        return cls(mean, _error(_residuals(totals, counts)), len(totals), int(counts.sum()), totals, counts)

    @classmethod
    def over_seeds(cls, means: "Sequence[Mean]") -> "Mean":
        """All seeds together: `means` are of the same prompts, one per seed of sampling."""
        seeds = Seeds(tuple(each.mean for each in means))
        totals, counts = (
            torch.stack(values).sum(0) for values in zip(*((m.totals, m.counts) for m in means), strict=True)
        )
        samples = torch.stack([each.totals for each in means])
        return replace(cls.of(totals, counts), mean=seeds.mean, seeds=seeds, samples=samples)

    def to_dict(self) -> dict[str, Any]:
        """Without the values per prompt."""
        tree = {
            "mean": self.mean,
            "standard_error": self.standard_error,
            "prompts": self.prompts,
            "count": self.count,
        }
        return tree if self.seeds is None else tree | self.seeds.to_dict()

    @classmethod
    def from_dict(cls, tree: dict[str, Any], per_prompt: Sequence[Sequence[Any]] = ()) -> "Mean":
        """What `to_dict` gave, with the `values_per_prompt`."""
        seeds = Seeds(tuple(tree["by_seed"])) if "by_seed" in tree else None
        values = [torch.tensor(column, dtype=torch.float64) for column in per_prompt]
        known = dict(zip(("totals", "counts", "samples"), values, strict=False))
        return cls(tree["mean"], tree["standard_error"], tree["prompts"], tree["count"], seeds=seeds, **known)

    def values_per_prompt(self) -> list[list[Any]]:
        """Totals, counts and, of sampled responses, the sums of each seed."""
        known = [self.totals, self.counts, *([self.samples] if self.samples.numel() else [])]
        return [column.tolist() for column in known]


def difference(after: Mean, before: Mean) -> dict[str, float]:
    """`after` - `before` on the same prompts in the same order, with the standard error of the paired difference.

    Raises ValueError for means over different prompts, or without their values per prompt.
    """
    if len(after.totals) != len(before.totals) or not len(after.totals):
        raise ValueError(
            "a paired difference needs the values per prompt of both means, over the same prompts; "
            f"got {len(after.totals)} and {len(before.totals)} of them"
        )
    residuals = _residuals(after.totals, after.counts) - _residuals(before.totals, before.counts)
    return {"mean": after.mean - before.mean, "standard_error": _error(residuals)}


def _residuals(totals: Tensor, counts: Tensor) -> Tensor:
    """[P] each prompt's contribution to the deviation of the mean, times P."""
    return (totals - float(totals.sum() / counts.sum()) * counts) / counts.mean()


def _error(residuals: Tensor) -> float:
    count = len(residuals)
    return float(residuals.std(correction=1)) / math.sqrt(count) if count > 1 else math.nan
