"""Masks made ahead are those that transformers makes: the same states, with and without them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.data.examples import collate
from minillm.model.decoder import takes_rows
from minillm.model.head import CausalLM
from minillm.model.masks import of_batch, takes_masks
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.model.static import takes_graphs

PROMPTS = [[5, 9, 17, 33, 2, 7, 8, 9, 10], [7], [100, 3, 45]]
SIZES = {
    "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 128, "state_size": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(kind, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.2)
    return CausalLM(model)


@torch.no_grad()
def everything(lm):
    """Responses, their log-probs, and final states of them in padded rows and in shared ones."""
    rollout = sample(lm, None, PROMPTS, Decoding(8, [-1]), alpha=0.0, uniforms=draw_uniforms(0, 8, len(PROMPTS)))
    batches = (collate(PROMPTS, rollout.responses(), row_length).to(lm.device) for row_length in (0, 100))
    return rollout.responses(), rollout.student_logprobs, *(lm.output(batch).states for batch in batches)


@pytest.mark.parametrize(
    ("kind", "settings", "taken"),
    [
        ("llama", {}, True),
        ("llama", {"attn_implementation": "eager"}, True),
        ("gpt2", {}, True),
        ("gemma3_text", {"sliding_window": 4}, True),  # two types of layers; all sequences are longer
        ("mistral", {"sliding_window": 4}, True),
        ("mamba", {}, False),  # no attention at all
        ("bloom", {}, False),  # makes its positions of the mask
    ],
    ids=str,
)
def test_the_states_are_those_of_the_masks_that_transformers_makes(kind, settings, taken):
    lm = build(kind, **settings)
    assert takes_masks(lm) == taken
    if not taken:
        batch = collate(PROMPTS, PROMPTS)
        assert of_batch(lm, batch).keys() == batch.inputs().keys()
        return
    found, lm.takes_masks = everything(lm), False
    expected = everything(lm)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-5, atol=1e-5)


def test_a_model_that_does_otherwise_with_such_masks_is_called_as_before(make_llama):
    model = make_llama()
    forward = model.model.forward

    def deaf(attention_mask=None, **inputs):
        padding = attention_mask is not None and attention_mask.dim() == 2
        return forward(attention_mask=attention_mask if padding else None, **inputs)

    model.model.forward = deaf
    lm = CausalLM(model)
    found = everything(lm)
    assert not takes_masks(lm)
    assert found[0] == everything(CausalLM(make_llama()))[0]


def test_flash_attention_does_not_decode(make_llama):
    """It knows no masks: torch's attention decodes, and flash-attention is back for whole sequences."""
    lm, plain = CausalLM(make_llama()), CausalLM(make_llama())
    lm.model.config._attn_implementation = "flash_attention_2"  # is not installed here, and would raise
    settings = {"alpha": 0.0, "uniforms": draw_uniforms(0, 6, len(PROMPTS))}
    found, expected = (sample(each, None, PROMPTS, Decoding(6, [-1]), **settings) for each in (lm, plain))
    assert found.responses() == expected.responses()
    assert lm.model.config._attn_implementation == "flash_attention_2"
    inputs = of_batch(lm, collate(PROMPTS, PROMPTS))
    assert inputs["attention_mask"] is None and "cache" in inputs  # padding behind needs none, so nothing is gathered
    packed = collate(PROMPTS, PROMPTS, 100)
    assert of_batch(lm, packed).keys() == packed.inputs().keys()  # it finds sequences by their positions


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_rounding_in_16_bits_is_not_taken_for_another_law(kind):
    """As teachers are, and students under the autocast of a rollout, in which they are first tried."""
    settings = {"sliding_window": 4} if kind == "gemma3_text" else {}
    lm = build(kind, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        assert takes_masks(lm) and takes_rows(lm) and takes_graphs(lm)
        lm = CausalLM(build(kind, **settings).model.bfloat16())
        assert takes_masks(lm) and takes_rows(lm) and takes_graphs(lm)
