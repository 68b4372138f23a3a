import math

import pytest
import torch

from minillm.evaluation.means import Mean, Seeds, difference


def mean(totals, counts):
    return Mean.of(torch.tensor(totals, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64))


def test_equal_counts_give_the_usual_standard_error():
    values = [1.0, 2.0, 4.0, 5.0]
    found = mean([3 * v for v in values], [3.0] * 4)
    assert found.mean == pytest.approx(3.0)
    assert found.standard_error == pytest.approx(torch.tensor(values).std().item() / 2)


def test_standard_error_of_a_ratio_against_resampling():
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 40, (200,), generator=g).double()
    totals = counts * (1 + 0.3 * torch.randn(200, generator=g, dtype=torch.float64)) + torch.rand(200, generator=g)
    found = Mean.of(totals, counts)
    picks = torch.randint(200, (4000, 200), generator=g)
    bootstrap = (totals[picks].sum(1) / counts[picks].sum(1)).std().item()
    assert found.standard_error == pytest.approx(bootstrap, rel=0.1)


def test_pairing_removes_what_the_prompts_share():
    before = mean([1.0, 5.0, 9.0, 2.0], [1.0] * 4)
    after = mean([0.5, 4.5, 8.5, 1.5], [1.0] * 4)
    change = difference(after, before)
    assert change["mean"] == pytest.approx(-0.5)
    assert change["standard_error"] == pytest.approx(0.0, abs=1e-12)
    assert before.standard_error > 1
    with pytest.raises(ValueError, match="the same prompts"):
        difference(after, mean([1.0], [1.0]))


def test_one_prompt_has_no_standard_error():
    assert math.isnan(mean([1.0], [2.0]).standard_error)


def test_means_of_the_seeds_are_one():
    seeds = [mean([1.0, 2.0], [1.0, 1.0]), mean([3.0, 6.0], [1.0, 1.0])]
    found = Mean.over_seeds(seeds)
    assert found.seeds == Seeds((1.5, 4.5)) and found.mean == 3 and found.count == 4
    assert found.standard_error == mean([4.0, 8.0], [2.0, 2.0]).standard_error
    assert Mean.from_dict(found.to_dict()).to_dict() == found.to_dict()
    with pytest.raises(ValueError, match="values per prompt"):
        difference(Mean.from_dict(found.to_dict()), found)


def test_the_spread_over_seeds():
    found = Seeds((1.0, 3.0))
    assert found.to_dict() == {"mean": 2, "standard_deviation": pytest.approx(math.sqrt(2)), "by_seed": [1, 3]}
    assert Seeds((4.0,)).standard_deviation == 0
    assert math.isnan(Seeds((4.0, math.nan)).standard_deviation)
