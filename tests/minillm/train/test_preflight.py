"""What is found before the first step."""

import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.distillation import load_pair
from minillm.train.preflight import prepare


def context_of(files, stage, *flags):
    recipe = load_recipe(files / "recipe.yaml", flags)
    return prepare(recipe.run, recipe.stages[stage], *load_pair(recipe.run))


@pytest.mark.parametrize(
    ("stage", "flag"),
    [
        ("minillm", "--objective.pt_length=600"),
        ("minillm", "--rollout.max_new_tokens=600"),
        ("warm-up", "--data.max_response_length=600"),
    ],
)
def test_sequences_beyond_the_positions_are_refused(files, stage, flag):
    (files / "text.txt").write_text("words and more words " * 400)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has 512 positions"):
        context_of(files, stage, flag)


def test_validation_beyond_the_positions_is_refused(files):
    flags = ["--validation.every=2", f"--validation.data={files / 'eval.jsonl'}", "--validation.greedy_tokens=600"]
    with pytest.raises(ConfigError, match="LlamaForCausalLM has 512 positions"):
        context_of(files, "minillm", *flags)


def test_a_token_without_an_embedding_is_refused(files):
    for name in ("teacher", "student"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(files / name)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
        tokenizer.save_pretrained(files / name)
    rows = [{"prompt": f"hi {i} <extra>", "completion": "yo"} for i in range(8)]
    (files / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ConfigError, match=r"train.jsonl holds the token id 257, but LlamaForCausalLM has 257 embeddings"
    ):
        context_of(files, "warm-up")


def test_gradients_are_not_divided_by_what_the_environment_accumulates(files, monkeypatch):
    def weights(name):
        assert main(["train", str(files / "recipe.yaml"), "--optim.steps=2", f"--output={files / name}"]) == 0
        from safetensors.torch import load_file

        return load_file(files / name / "model" / "model.safetensors")

    plain = weights("plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    for name, value in weights("asked").items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_are_not_trained(files, dtype):
    with pytest.raises(ConfigError, match=rf"model.dtype is {dtype}: trained weights of 16 bits lose .*compute_dtype"):
        load_recipe(files / "recipe.yaml", [f"--model.dtype={dtype}"])


def test_graphs_that_are_asked_for_without_a_card_are_refused(files):
    """Only where our decoder would use them: those of a stage that samples nothing are no matter."""
    with pytest.raises(ConfigError, match=r"cuda_graphs is true, and LlamaForCausalLM is on the cpu.*Set it to auto"):
        context_of(files, "minillm", "--rollout.cuda_graphs=true")
    for flag in ("auto", "false"):
        context = context_of(files, "minillm", f"--rollout.cuda_graphs={flag}")
        assert context.decoding(0.2, 4).graphs is (None if flag == "auto" else False)
    context_of(files, "warm-up", "--rollout.cuda_graphs=true")
