"""Estimates against what models of these shapes really save, hold and do."""

import pytest
import torch
from adapters import needs_adapters
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.distillation import load_pair
from minillm.model.cost import cost, trial
from minillm.model.load import cached, skeleton
from minillm.train.loop import METHODS
from minillm.train.preflight import prepare


def config_of(files, method, *flags):
    stage = "minillm" if method == "minillm" else "warm-up"
    recipe = load_recipe(files / "recipe.yaml", [f"--method={method}", *flags])
    return recipe.run, recipe.stages[stage]


@pytest.mark.parametrize("make", ["make_llama", "make_gpt2"])
def test_a_pass_without_weights_is_counted_like_one_with(request, make, tmp_path):
    model = request.getfixturevalue(make)()
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = skeleton(str(tmp_path))
    training, decoding = trial(empty, 3, 10, train=True), trial(empty, 3, 10)

    ids, saved = torch.zeros(3, 10, dtype=torch.long), {}
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    mask = torch.ones_like(ids)
    mask[0, 7:] = 0  # a batch that is not padded is cheaper: transformers then does without a mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), FlopCounterMode(display=False) as flops:
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
        forward = flops.get_total_flops()
        states.sum().backward()
    cache = DynamicCache(config=model.config)
    model.base_model(**inputs, **cached(model.base_model, cache))
    assert training == (flops.get_total_flops(), sum(storage.nbytes() for storage in saved.values()))
    assert decoding == (forward, sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)))


@pytest.mark.parametrize("lora", [0, pytest.param(4, marks=needs_adapters)])
def test_what_is_held_is_what_a_step_leaves(files, lora):
    config = config_of(files, "kd", f"--lora.rank={lora}")
    student, teacher, _ = load_pair(config[0])
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = sum(x.nbytes for state in optimizer.state.values() for name, x in state.items() if name != "step")
    assert cost(*config).held == {
        "student": sum(p.nbytes for p in student.parameters()),
        "teacher": sum(p.nbytes for p in teacher.parameters()),
        "gradients": sum(p.grad.nbytes for p in trained),
        "AdamW": moments,
    }


def test_the_work_grows_with_what_is_done(files):
    whole = {method: cost(*config_of(files, method)) for method in METHODS}
    assert {method: set(found.work) for method, found in whole.items()} == {
        "sft": {"update"},
        "kd": {"update", "score"},
        "seqkd": {"update", "rollout of the teacher"},
        "gkd": {"update", "score", "rollout"},
        "minillm": {"update", "rollout", "rollout of the teacher"},  # scored while it samples
    }
    twice = cost(*config_of(files, "minillm", "--stages.minillm.optim.steps=8"))
    once = cost(*config_of(files, "minillm", "--stages.minillm.optim.steps=4"))  # one rollout lasts four steps
    assert twice.work == {phase: 2 * value for phase, value in once.work.items()}
    assert cost(*config_of(files, "minillm", "--objective.pt_weight=0")).tokens == 5 * 4 * (64 + 6)
    # the longest sequences bound those of the data
    config = config_of(files, "kd")
    training = prepare(*config, *load_pair(config[0]))
    method = METHODS["kd"](training, files)
    batches = [part.batch(part.examples) for step in (1, 2, 3) for part in method.step(step).parts]
    assert sum(int(batch.attention_mask.sum()) for batch in batches) <= whole["kd"].tokens


def test_logits_cost_memory_that_fused_heads_do_not(files):
    flags = ["--data.max_response_length=256", "--optim.micro_batch_size=4"]
    logits = cost(*config_of(files, "kd", "--model.head=logits", *flags)).update["losses"]
    assert logits == 3 * 4 * 256 * 257 * 4  # of both models and their gradient, fp32


def test_recomputing_keeps_the_inputs_of_the_layers(files):
    whole, less = (cost(*config_of(files, "sft", f"--model.recompute={on}")) for on in (False, True))
    batch, tokens, layers = 4, 64 + 16, 2
    inputs = layers * batch * tokens * 32 * 4
    assert inputs < less.update["activations"] < inputs + 0.3 * whole.update["activations"]
    assert 1.1 < less.work["update"] / whole.work["update"] < 4 / 3  # the head is computed once


def test_no_weights_are_read(files, capsys):
    for name in ("teacher", "student"):
        (files / name / "model.safetensors").unlink()
    assert main(["estimate", str(files / "recipe.yaml")]) == 0
    out = capsys.readouterr().out
    assert "minillm (minillm): 5 steps, at most 1,560 tokens trained on" in out  # 5 · (4 · (64 + 6) + 2 · 16)
    assert out.count("peak") == 2 and "TFLOP/s of a large matmul here" in out
    (files / "student" / "config.json").unlink()
    with pytest.raises(ConfigError, match="no causal language model could be loaded from"):
        cost(*config_of(files, "kd"))
