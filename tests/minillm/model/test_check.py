"""What is tried on models before they are trained."""

from types import SimpleNamespace

import pytest
import torch
from every_family import tiny
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.config.schema import ConfigError
from minillm.model import check
from minillm.model.check import check_blocks, check_decoding, check_ids, check_packing, check_training
from minillm.model.head import CausalLM
from minillm.model.load import packs_in_one_row


def test_packed_sequences_are_kept_apart_in_two_rows(make_gpt2, make_llama):
    check_packing(make_llama())
    check_packing(make_gpt2())


def test_a_model_that_mixes_packed_sequences_up_is_refused(make_llama):
    deaf = make_llama()
    deaf.forward = lambda position_ids=None, **inputs: type(deaf).forward(deaf, **inputs)
    with pytest.raises(ConfigError, match=r"does not keep packed sequences apart: set data.packing to false"):
        check_packing(deaf)


def test_a_model_that_reads_the_positions_of_the_first_row_only_is_refused(make_llama, monkeypatch):
    """As flash-attention does behind transformers when it is given several packed rows."""
    model = make_llama()

    def first_row_only(position_ids=None, **inputs):
        if position_ids is not None and len(position_ids) > 1:
            position_ids = torch.arange(position_ids.shape[1]).expand_as(position_ids)
        return type(model).forward(model, position_ids=position_ids, **inputs)

    model.forward = first_row_only
    with pytest.raises(ConfigError, match="does not keep packed sequences apart"):
        check_packing(model)
    monkeypatch.setattr(check, "packs_in_one_row", lambda model: True)  # then all sequences share one row
    check_packing(model)


@pytest.mark.parametrize(("attention", "one"), [("flash_attention_2", True), ("sdpa", False), ("eager", False)])
def test_flash_attention_packs_in_one_row(attention, one):
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention))
    assert packs_in_one_row(model) == one


SIZES = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


def build(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.2)
    return CausalLM(model)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_decoding_by_another_law_than_the_forward_pass_is_refused(kind):
    with pytest.raises(ConfigError, match=r"decodes by another law than its forward pass has \(\d.* nats apart\)"):
        check_decoding(build(kind))


def test_decoding_behind_padding_is_the_forward_pass(make_gpt2, make_llama):
    for model in (make_llama(), make_gpt2(), make_llama().bfloat16()):
        check_decoding(CausalLM(model))


def test_blocks_behind_a_cache_are_the_forward_pass_or_refused(make_gpt2, make_llama):
    for model in (make_llama(), make_gpt2(), make_llama().bfloat16()):
        check_blocks(CausalLM(model))
    wrong = make_llama()

    def confuse_blocks(_, __, output):
        if output.last_hidden_state.shape[1] == 3:  # what is read behind the prompt
            output.last_hidden_state = output.last_hidden_state.flip(1)
        return output

    wrong.model.register_forward_hook(confuse_blocks)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM reads a block .* set rollout.coins to row"):
        check_blocks(CausalLM(wrong))


def test_decoding_is_tried_at_the_length_of_the_run():
    """A family whose cache goes wrong beyond its window alone."""
    lm = CausalLM(tiny("moshi"), "logits")
    check_decoding(lm)
    with pytest.raises(ConfigError, match="decodes by another law"):
        check_decoding(lm, 17)


def test_a_family_that_cannot_decode_says_so_in_our_words():
    with pytest.raises(ConfigError, match=r"cannot decode with a cache behind padding \(.*\)\. Train it by sft or kd"):
        check_decoding(CausalLM(tiny("openai-gpt")))


def test_packing_is_tried_on_long_sequences(make_llama):
    """Attention that keeps sequences apart for their first tokens only."""
    model = make_llama()

    def forgetful(position_ids=None, **inputs):
        if position_ids is not None:
            position_ids = position_ids.masked_fill(position_ids > 40, 41)
        return type(model).forward(model, position_ids=position_ids, **inputs)

    model.forward = forgetful
    with pytest.raises(ConfigError, match="does not keep packed sequences apart"):
        check_packing(model)


def test_a_backward_pass_that_fails_is_found_before_the_first_step(make_llama):
    lm = CausalLM(make_llama())
    check_training(lm)
    assert all(parameter.grad is None for parameter in lm.parameters())
    lm.model.model.layers[1].register_full_backward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot be trained \(division by zero\)"):
        check_training(lm)


def test_ids_without_an_embedding_are_refused(make_llama):
    check_ids(make_llama(1), 256, "train.jsonl")
    with pytest.raises(ConfigError, match=r"train.jsonl holds the token id 257, but \w+ has 257 embeddings"):
        check_ids(make_llama(1), 257, "train.jsonl")
