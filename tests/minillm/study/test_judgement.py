"""Intervals and corrections, against closed forms and by hand."""

import math

import pytest
import torch

from minillm.study.judgement import Difference, Table, bootstrap, detectable, holm, over_seeds, verdict


def table(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    return Table(values, torch.ones_like(values))


def test_the_bootstrap_of_one_seed_is_the_normal_interval_of_the_paired_differences():
    generator = torch.Generator().manual_seed(1)
    prompts = 400
    difficulty = torch.randn(1, prompts, generator=generator, dtype=torch.float64) * 10  # shared: it cancels
    gain = torch.randn(1, prompts, generator=generator, dtype=torch.float64) + 0.3
    found = bootstrap(table(difficulty + gain), table(difficulty))
    error = float(gain.std()) / math.sqrt(prompts)
    assert found.mean == pytest.approx(float(gain.mean()))
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.1 * error)
    assert detectable(found) == pytest.approx(2.8016 * error, rel=0.05)


def test_seeds_are_drawn_too():
    """Without any spread over prompts, that over seeds is all there is: all of three seeds are the lowest in 1/27."""
    values = torch.tensor([[1.0], [2.0], [6.0]]).expand(3, 50)
    found = bootstrap(table(values), table(torch.zeros(3, 50)))
    assert found.mean == pytest.approx(3) and found.low == pytest.approx(1) and found.high == pytest.approx(6)


def test_a_quotient_of_sums_is_weighed_by_its_counts():
    ours = Table(torch.tensor([[30.0, 10.0]]), torch.tensor([[10.0, 10.0]]))
    assert bootstrap(Table(*(x.double() for x in ours)), table([[0.0, 0.0]])).mean == 2


def test_no_difference_is_rejected_in_five_percent():
    generator = torch.Generator().manual_seed(2)
    rejected = 0
    for _ in range(200):
        ours, rival = torch.randn(2, 1, 60, generator=generator, dtype=torch.float64)
        rejected += bootstrap(table(ours), table(rival), draws=400).p < 0.05
    assert 2 <= rejected <= 22  # 10 expected; a binomial leaves this range once in a thousand


def test_over_seeds_is_students_t():
    found = over_seeds([1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))
    assert found.p == pytest.approx(0.074180, abs=1e-5)  # two-sided, t = 2 √3, two degrees of freedom
    assert over_seeds([5.0]) == Difference(5, -math.inf, math.inf, 1.0)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_verdicts():
    up, down = Difference(0.2, 0.1, 0.3, 0.01), Difference(-0.2, -0.3, -0.1, 0.01)
    assert verdict(up, 1, 0.01) == "holds" and verdict(up, -1, 0.01) == "fails"
    assert verdict(down, -1, 0.01) == "holds" and verdict(down, 1, 0.01) == "fails"
    assert verdict(up, 1, 0.06) == "open" and verdict(Difference(0.1, -0.1, 0.3, 0.01), 1, 0.01) == "open"
