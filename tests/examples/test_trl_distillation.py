"""TRL's trainers with our loss: losses and gradients are TRL's own on the same ragged batch."""

import inspect

import eager
import pytest
import torch
from tiny import VOCABULARY, ragged_batch

pytest.importorskip("trl", reason="trl is not installed: pip install trl")
pytest.importorskip("trl.experimental.gkd", reason="this trl has no GKDTrainer")

import trl_distillation as example
from trl import DistillationTrainer
from trl.experimental.gkd import GKDTrainer

RTOL = 2e-5  # of each parameter's largest gradient: two ways of rounding a sum over the vocabulary in fp32


def assert_same_gradients(ours, theirs):
    for name, x in ours.items():
        assert (x - theirs[name]).abs().max() <= RTOL * theirs[name].abs().max() + 1e-8, name


@pytest.mark.parametrize("count", [None, 50])
@pytest.mark.parametrize("beta", [1.0, 0.0, 0.5, 0.1])
def test_gkd(beta, count, tmp_path):
    measured = []
    for trainer in (example.FusedGKDTrainer, GKDTrainer):
        built = example.gkd(str(tmp_path), trainer, beta=beta)
        loss = built.compute_loss(built.model, ragged_batch(), num_items_in_batch=count)
        loss.backward()
        measured.append((loss.item(), eager.gradients(built.model)))
    (ours, our_gradients), (theirs, their_gradients) = measured
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert_same_gradients(our_gradients, their_gradients)


def ragged_completions():
    """Prompts padded on the left, completions on the right, as DistillationTrainer leaves them."""
    generator = torch.Generator().manual_seed(0)
    prompt_lengths, lengths = torch.tensor([2, 5, 3, 4]), torch.tensor([7, 1, 11, 4])
    ids = torch.randint(1, VOCABULARY, (4, 5 + 11), generator=generator)
    prompt_mask = (torch.arange(5) >= 5 - prompt_lengths[:, None]).long()
    completion_mask = (torch.arange(11) < lengths[:, None]).long()
    return {
        "prompt_ids": ids[:, :5] * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, 5:] * completion_mask,
        "completion_mask": completion_mask,
    }


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("count", [None, 50])
@pytest.mark.parametrize("tools", [False, True])
def test_distillation(tools, count, temperature, tmp_path):
    batch = ragged_completions()
    if tools:
        batch["tool_mask"] = (torch.arange(11) != 2).long().expand(4, 11)
    measured = []
    for trainer in (example.FusedDistillationTrainer, DistillationTrainer):
        built = example.distillation(str(tmp_path), trainer, temperature=temperature)
        loss, entropy, tokens = built._compute_loss(built.model, batch, count)
        loss.backward()
        measured.append(((loss.item(), entropy.item(), tokens.item()), eager.gradients(built.model)))
    (ours, our_gradients), (theirs, their_gradients) = measured
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert_same_gradients(our_gradients, their_gradients)


@pytest.mark.parametrize(
    ("build", "fused", "stock"),
    [
        (example.gkd, example.FusedGKDTrainer, GKDTrainer),
        (example.distillation, example.FusedDistillationTrainer, DistillationTrainer),
    ],
)
def test_training_logs_what_trl_logs(build, fused, stock, tmp_path):
    logs = []
    for trainer in (fused, stock):
        torch.manual_seed(0)
        built = build(str(tmp_path), trainer)
        built.train()
        names = ("loss", "grad_norm", "entropy")
        logs.append([{n: float(e[n]) for n in names if n in e} for e in built.state.log_history if "loss" in e])
    assert len(logs[0]) == 2
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_another_beta_is_refused(tmp_path):
    built = example.distillation(str(tmp_path), beta=0.5)
    with pytest.raises(ValueError, match="beta = 1"):
        built._compute_loss(built.model, ragged_completions(), None)


def test_gkd_loss_is_replaced_in_at_most_five_lines():
    assert len(inspect.getsource(example.FusedGKDTrainer).splitlines()) <= 5


def test_runs_as_a_script():
    eager.run_script("trl_distillation")
