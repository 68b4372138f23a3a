"""How sure a difference between two methods is.

What has a value per prompt is judged by a bootstrap over prompts × seeds: both are drawn again with replacement,
10,000 times, the same for the two methods, and the 95 % interval is that of the differences found. What exists only
for all texts together (calibration, diversity) is judged by Student's t over the training seeds. Of the secondary
endpoints the p-values are corrected together by Holm's method (1979).

Legend: S seeds, P prompts, D draws.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 10_000


class Difference(NamedTuple):
    """Ours minus the rival's."""

    mean: float
    low: float
    high: float
    """The 95 % interval."""
    p: float
    """Two-sided, of no difference; 1 where too little is known."""


class Table(NamedTuple):
    """Per seed and prompt, [S, P] float64: the sum of a quantity, and the number of tokens or responses in it."""

    totals: Tensor
    counts: Tensor

    @property
    def means(self) -> Tensor:
        """[S] means over all tokens or responses of a seed."""
        return self.totals.sum(1) / self.counts.sum(1)


def bootstrap(ours: Table, rival: Table, draws: int = DRAWS) -> Difference:
    """The difference of the means, of tables of the same seeds and prompts."""
    seeds, prompts = ours.totals.shape
    generator = torch.Generator().manual_seed(0)
    of_prompts, of_seeds = _weights(draws, prompts, generator), _weights(draws, seeds, generator) / seeds
    found = torch.zeros(draws, dtype=torch.float64)
    for sign, table in ((1, ours), (-1, rival)):
        drawn = (of_prompts @ table.totals.T) / (of_prompts @ table.counts.T)
        found += sign * (of_seeds * drawn).sum(1)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    beyond = min(int((found <= 0).sum()), int((found >= 0).sum()))
    return Difference(float((ours.means - rival.means).mean()), low, high, min(1.0, 2 * (beyond + 1) / (draws + 1)))


def over_seeds(differences: Sequence[float]) -> Difference:
    """The mean of one difference per seed; with a single one nothing is known of its spread."""
    from scipy.stats import t

    mean, count = fmean(differences), len(differences)
    if count < 2:
        return Difference(mean, -math.inf, math.inf, 1.0)
    error = stdev(differences) / math.sqrt(count)
    half = float(t.ppf(0.975, count - 1)) * error
    p = 2 * float(t.sf(abs(mean) / error, count - 1)) if error else float(mean == 0)
    return Difference(mean, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected for their number: each is below 0.05 where the method rejects at 5 % in all."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def verdict(difference: Difference, better: int, p: float) -> str:
    """Of a claim that ours is on the side `better` (+1: higher, -1: lower), at the corrected p-value."""
    if p >= 0.05 or not (difference.low > 0 or difference.high < 0):
        return "open"
    return "holds" if difference.mean * better > 0 else "fails"


def detectable(difference: Difference) -> float:
    """The true difference that an interval of this width would exclude 0 for with a probability of 80 %."""
    return (difference.high - difference.low) / (2 * 1.959964) * (1.959964 + 0.841621)


def _weights(draws: int, count: int, generator: torch.Generator) -> Tensor:
    """[D, count] how often each is drawn in `count` draws with replacement."""
    drawn = torch.randint(count, (draws, count), generator=generator)
    return torch.zeros(draws, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(draws, count, dtype=torch.float64)
    )
