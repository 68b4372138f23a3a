"""Both loops of the example train what reverse KL written out in PyTorch trains."""

import eager
import plain_pytorch
import pytest
from tiny import ragged_batch


@pytest.mark.parametrize("loop", [plain_pytorch.train, plain_pytorch.train_without_logits])
def test_is_the_eager_loop(loop):
    batches = [ragged_batch(seed=i) for i in range(3)]
    (student, teacher), (expected, _) = eager.models(), eager.models()
    assert loop(student, teacher, batches) == pytest.approx(eager.train(expected, teacher, batches), rel=1e-6)
    eager.assert_same_parameters(student, expected, 1e-5)  # of 9e-3 that three steps can move


def test_runs_as_a_script():
    eager.run_script("plain_pytorch")
