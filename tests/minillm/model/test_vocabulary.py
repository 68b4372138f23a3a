"""Heads of different size have one vocabulary, their common columns: in training, in every evaluation, and in what is
made of the student afterwards."""

import json

import pytest
import torch
from transformers import AutoConfig

from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.distillation import run_recipe
from minillm.model import places
from minillm.model.head import VOCABULARY, CausalLM, share_vocabulary

COMMON, WIDE = 257, 1200


@pytest.fixture
def largest(monkeypatch):
    """The largest token ids that were sampled, call by call."""
    found = []

    def mixed_sample(*args, drawn=places.mixed_sample, **settings):
        result = drawn(*args, **settings)
        found.append(int(result.token_ids.max()))
        return result

    monkeypatch.setattr(places, "mixed_sample", mixed_sample)
    return found


def widen(files, make_llama, name):
    """A model whose further columns would be sampled nearly always."""
    model = make_llama(2, vocab_size=WIDE, seed=5)
    with torch.no_grad():
        model.lm_head.weight[COMMON:] *= 3
    model.save_pretrained(files / name)


def outside(largest):
    """Whether any token since the last call lay outside; there were some."""
    assert largest
    found = max(largest) >= COMMON
    largest.clear()
    return found


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_no_evaluation_and_no_answer_leaves_the_common_vocabulary(files, make_llama, largest, name, capsys):
    widen(files, make_llama, name)
    evaluate = ["--data", str(files / "eval.jsonl"), "--eval.sample_tokens=6", "--eval.greedy_tokens=6"]
    assert main(["evaluate", str(files / name), *evaluate]) == 0 and outside(largest)  # before, it does leave it
    flags = ["--optim.steps=2", "--log.checkpoint_every=1", "--validation.every=1", f"--output={files / 'run'}"]
    run = files / "run"
    run_recipe(load_recipe(files / "recipe.yaml", flags), "")
    assert (run / "evaluations" / "teacher.json").exists()
    assert not outside(largest)
    stored = json.loads((run / "model" / "config.json").read_text()).get(VOCABULARY)
    assert stored == (COMMON if name == "student" else None)  # a student that has no others has nothing to say

    main(["export", str(run), "--checkpoint", str(run / "checkpoints" / "step-3"), "--output", str(files / "early")])
    for model in (run / "model", files / "early"):
        for head in ("fused", "logits"):
            assert main(["evaluate", str(model), *evaluate, f"--model.head={head}"]) == 0 and not outside(largest)
        for how in ([], ["--temperature=1"]):
            assert main(["generate", str(model), "--prompt", "Say a", *how]) == 0 and not outside(largest)
    assert main(["evaluate", str(run / "model"), *evaluate, "--teacher", str(files / "teacher")]) == 0
    assert not outside(largest)


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_logits_and_gradients_have_the_common_columns_alone(make_llama, tmp_path, head):
    wide, narrow = CausalLM(make_llama(vocab_size=WIDE), head), CausalLM(make_llama(vocab_size=COMMON), head)
    ids = torch.tensor([[1, 2, 3]])
    expected = wide.logits(wide.states(ids, torch.ones_like(ids)))[..., :COMMON]
    share_vocabulary(wide, narrow)
    assert wide.vocab_size == narrow.vocab_size == COMMON
    states = wide.states(ids, torch.ones_like(ids))
    torch.testing.assert_close(wide.logits(states), expected)
    (states @ wide.head.weight.T if head == "fused" else states).sum().backward()
    assert wide.model.lm_head.weight.grad[:COMMON].any() and not wide.model.lm_head.weight.grad[COMMON:].any()
    wide.model.save_pretrained(tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path), VOCABULARY) == COMMON
    assert CausalLM(type(wide.model).from_pretrained(tmp_path), head).vocab_size == COMMON
