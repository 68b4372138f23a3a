import pytest
import torch

from minillm.evaluate.buckets import bucket, by_length
from minillm.evaluate.means import Estimate


def test_edges():
    assert [bucket(n) for n in (0, 5, 6, 10, 11, 400)] == ["<=5", "<=5", "6-10", "6-10", ">=11", ">=11"]


def test_each_bucket_has_its_own_mean():
    score = Estimate(torch.tensor([10.0, 20.0, 60.0]).double(), torch.ones(3).double())
    found = by_length([3, 30, 2], {"rouge_l": score})
    assert found["<=5"]["prompts"] == 2 and found["<=5"]["rouge_l"]["mean"] == pytest.approx(35)
    assert found[">=11"]["rouge_l"]["mean"] == pytest.approx(20)
    assert found["6-10"] == {"prompts": 0}
