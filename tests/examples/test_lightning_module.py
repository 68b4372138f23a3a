"""The LightningModule trains what the plain loop trains."""

import eager
import pytest
from tiny import ragged_batch

pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")


def test_is_the_eager_loop():
    import lightning_module

    batches = [ragged_batch(seed=i) for i in range(3)]
    (student, teacher), (expected, _) = eager.models(), eager.models()
    trainer = lightning_module.fit(lightning_module.Distillation(student, teacher), batches, steps=3)
    losses = eager.train(expected, teacher, batches)
    assert trainer.callback_metrics["loss"].item() == pytest.approx(losses[-1], rel=1e-6)
    eager.assert_same_parameters(student, expected, 1e-5)
    assert not any(x.requires_grad for x in teacher.parameters())


def test_runs_as_a_script():
    eager.run_script("lightning_module")
