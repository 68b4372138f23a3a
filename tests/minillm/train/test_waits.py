"""How often the host waits for the device: at most once for a token of a rollout, and twice for an optimiser step."""

import pytest
import torch
from waits import Waits

from minillm.config.recipe import load_recipe
from minillm.model import places
from minillm.model.head import CausalLM
from minillm.model.masks import takes_masks
from minillm.run.directory import RunDirectory
from minillm.train.loop import METHODS, train
from minillm.train.preflight import prepare

FLAGS = ["--optim.batch_size=4", "--optim.micro_batch_size=1", "--optim.steps=3", "--rollout.max_new_tokens=7",
         "--rollout.on_policy=1.0", "--rollout.batch_size=16", "--validation.every=0", "--log.checkpoint_every=0",
         "--objective.pt_batch_size=2", "--objective.pt_length=16", "--rollout.epochs=1"]  # fmt: skip


@pytest.fixture
def count(files, make_llama, make_gpt2, make_tokenizer, monkeypatch):
    """Of each step: the tokens that were decoded in it, and the waits."""

    def run(method, *flags, family="llama"):
        recipe = load_recipe(files / "recipe.yaml", [*FLAGS, f"--method={method}", *flags])
        make = make_llama if family == "llama" else make_gpt2
        student, teacher = CausalLM(make(seed=1)), CausalLM(make_llama(4))
        context = prepare(recipe.run, recipe.stages["warm-up"], student, teacher, make_tokenizer())
        assert all(takes_masks(lm) for lm in (student, teacher))  # tried here, once
        steps, decoded = [], 0

        def mixed_sample(*args, drawn=places.mixed_sample, **settings):
            nonlocal decoded
            decoded += 1
            return drawn(*args, **settings)

        def log(self, *args):
            nonlocal decoded
            steps.append((decoded, dict(waits.found)))
            decoded = 0
            waits.found.clear()

        monkeypatch.setattr(places, "mixed_sample", mixed_sample)
        monkeypatch.setattr(RunDirectory, "log", log)
        directory = RunDirectory(recipe)
        with Waits() as waits:
            train(context, directory, "warm-up")
        return steps

    return run


@pytest.mark.parametrize("method", METHODS)
def test_the_host_waits_once_a_token_and_twice_a_step(count, method):
    steps = count(method)
    assert len(steps) == 3
    for decoded, found in steps:
        assert sum(found.values()) <= decoded + 2, (decoded, found)
    sampled = {"minillm": 7, "gkd": 7, "seqkd": 7}.get(method, 0)
    assert steps[0][0] == sampled  # it was counted at all
    assert sum(sum(found.values()) for _, found in steps) >= 3  # and something was seen


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("minillm", ["--model.compute_dtype=bfloat16"]),  # the rollout is read again by whole passes
        ("minillm", ["--rollout.alpha=0.0", "--model.head=logits"]),
        ("minillm", ["--objective.variant=reference", "--rollout.epochs=4", "--optim.micro_batch_size=4"]),
        ("kd", ["--data.packing=true", "--loss.divergence=jsd"]),
    ],
    ids=str,
)
def test_no_setting_makes_it_wait_more(count, method, flags):
    for decoded, found in count(method, *flags):
        assert sum(found.values()) <= decoded + 2, (decoded, found)


def test_nor_does_a_model_that_looks_for_pads(count):
    for decoded, found in count("minillm", family="gpt2"):
        assert sum(found.values()) <= decoded + 2, (decoded, found)


def test_what_waits_is_seen():
    lines = "float(x.sum()); x[x > 1]; x.nonzero(); x.tolist(); x.cpu(); x.to('cpu')"
    with Waits() as waits:
        exec(compile(lines, places.__file__, "exec"), {"x": torch.arange(4.0)})
    assert sum(waits.found.values()) == 6
