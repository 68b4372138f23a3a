import math

import pytest
import torch

from minillm.evaluation.exposure import Reaching, excess_accumulated_error


def samples(values):
    """[P, 1, T] divergences, and lengths that say all of it is there."""
    values = torch.tensor(values, dtype=torch.float64)[:, None]
    return values, torch.full(values.shape[:2], values.shape[2])


def test_by_hand():
    student, n = samples([[1.0, 2.0, 4.0], [1.0, 4.0, 2.0]])
    teacher, _ = samples([[1.0, 1.0, 2.0], [1.0, 2.0, 1.0]])
    found = excess_accumulated_error(student, teacher, n, n)
    assert found.length == [1, 2, 3]
    assert found.regret == pytest.approx([1, 4, 7])  # 1, then 3 and 3 more
    assert found.expected == pytest.approx([1, 2.5, 4])
    assert found.exaccerr == pytest.approx([0, 60, 75])
    # jackknife of two prompts: half the distance of the two values with one left out; at l = 2: 5/3 and 3/2
    assert found.standard_error[1] == pytest.approx(100 * (5 / 3 - 3 / 2) / 2)


def test_one_law_has_no_exposure_bias():
    values, n = samples([[0.5, 3.0], [2.0, 0.1]])
    found = excess_accumulated_error(values, values, n, n)
    assert found.exaccerr == [0, 0] and found.standard_error == [0, 0]


def test_a_student_that_is_its_teacher_up_to_rounding_has_no_quotient():
    rounding, n = samples([[1e-7, -2e-7], [0.0, 1e-7]])
    found = excess_accumulated_error(-rounding, rounding, n, n)
    assert all(map(math.isnan, found.exaccerr + found.standard_error))


def test_each_position_averages_over_the_samples_that_reach_it():
    student = torch.tensor([[[1.0, 8.0], [1.0, 99.0]]])  # the second sample ends after one token; 99 is not read
    teacher, n = samples([[1.0, 2.0]])
    found = excess_accumulated_error(student, teacher, torch.tensor([[2, 1]]), n)
    assert found.regret == pytest.approx([1, 9])
    assert found.samples_reaching == Reaching([2, 1], [1, 1])


def test_which_prompts_go_on_is_no_exposure_bias():
    """Each prompt has one divergence, the same along the texts of both models, which stop at different lengths."""
    divergence = torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64)[:, None, None].expand(3, 2, 6)
    student = torch.tensor([[1, 2], [6, 3], [6, 6]])  # goes on where it errs
    teacher = torch.tensor([[6, 6], [6, 1], [2, 3]])
    found = excess_accumulated_error(divergence, divergence, student, teacher)
    assert found.length == [1, 2, 3, 4, 5, 6]
    assert found.exaccerr == pytest.approx([0.0] * 6, abs=1e-12)
    assert found.regret == pytest.approx([13 / 3, 26 / 3, 26 / 3 + 6, 26 / 3 + 9, 26 / 3 + 12, 26 / 3 + 15])
    assert found.samples_reaching == Reaching([6, 5, 4, 3, 3, 3], [6, 5, 4, 3, 3, 3])
    assert found.name == "prompt-weighted ExAccErr"


def test_every_prompt_weighs_the_same_however_many_of_its_samples_go_on():
    student = torch.tensor([[[1.0, 2.0]] * 3, [[1.0, 8.0]] * 3])
    lengths = torch.tensor([[2, 2, 2], [2, 1, 1]])
    found = excess_accumulated_error(student, torch.ones_like(student), lengths, torch.full((2, 3), 2))
    assert found.regret == pytest.approx([1, 1 + (2 + 8) / 2]) and found.expected == pytest.approx([1, 2])


def test_the_curve_stops_where_few_samples_are_left():
    student, n = samples([[1.0] * 6] * 8)
    lengths = torch.tensor([6, 3, 3, 3, 2, 2, 2, 2])[:, None]  # 4 of 8 reach position 3, 1 reaches 4
    found = excess_accumulated_error(student, student, lengths, n)
    assert found.length == [1, 2, 3]
    with pytest.raises(ValueError, match="same prompts"):
        excess_accumulated_error(student[:4], student, lengths[:4], n)


def test_jackknife_against_resampling():
    g = torch.Generator().manual_seed(0)
    prompts = 150
    student, teacher = (torch.rand(prompts, 2, 3, generator=g).double() * scale for scale in (3.0, 1.5))
    lengths = torch.randint(1, 4, (prompts, 2), generator=g)
    found = excess_accumulated_error(student, teacher, lengths, lengths)
    curves = []
    for _ in range(400):
        rows = torch.randint(prompts, (prompts,), generator=g)
        resampled = excess_accumulated_error(student[rows], teacher[rows], lengths[rows], lengths[rows])
        curves.append(resampled.exaccerr[:2])
    spread = torch.tensor(curves).std(0).tolist()
    assert found.standard_error[:2] == pytest.approx(spread, rel=0.15)  # 400 replicas: sd known to 4 %
