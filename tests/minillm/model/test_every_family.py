"""Every family that the installed transformers has: rollouts, packed rows, cut students, layers computed again and
adapters are right, or refused by a message of ours. Never wrong, and never an error of somebody else."""

import copy

import pytest
import torch
import transformers
from adapters import needs_adapters
from every_family import FAMILIES, LAYERS, tiny

from minillm.config.schema import ConfigError, LoraConfig
from minillm.data.examples import collate
from minillm.model.adapters import add_adapters, merge_adapters
from minillm.model.check import check_decoding, check_packing, check_training
from minillm.model.head import CausalLM
from minillm.model.layers import drop_layers, layers_of, recompute_layers
from minillm.model.load import load_model
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm_kernels import fused_linear_token_logprobs

TRIED = "5.24"  # the transformers for which the lists below are complete; others may refuse more, or less
UNBUILT = {
    "dots3_note": "each layer has sizes of its own",
    "dots3_note_text": "each layer has sizes of its own",
    "gemma3n": "needs timm",
    "gemma4_assistant": "its default configuration is refused by itself",
    "musicgen": "AutoModelForCausalLM makes none from its configuration",
    "musicgen_melody": "AutoModelForCausalLM makes none from its configuration",
    "qwen4_exp": "its default configuration makes no model",
}
"""Families that cannot be built at this size, and why."""
REFUSED = {
    "packing": (
        "afmoe bailing_hybrid bamba bert bert-generation big_bird biogpt bloom electra ernie gpt_oss "
        "granitemoehybrid inkling2_loop_text inkling2_text inkling_text kimi_linear lara_mini lfm2_moe lfm3 "
        "megatron-bert mpt opt qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next rembert roc_bert "
        "xglm"
    ),
    "rollouts packing cut": (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet "
        "recurrent_gemma xlstm"
    ),
    "rollouts packing": (
        "camembert data2vec-text minimax openai-gpt roberta roberta-prelayernorm roformer rwkv trocr xlm-roberta "
        "xlm-roberta-xl xmod"
    ),
    "cut": "beam diffllama dory gemma3n_text gemma4 gemma4_text minicpm3 whisper",
    "adapters": "axk2 deepseek_v32 glm_moe_dsa hy_v4 phimoe",
    "rollouts packing cut recomputing adapters": "blt cpmant gemma4_unified_assistant xlm xlnet",
    "packing adapters": "falcon_h1 mamba2 nemotron_h qwen4_exp_text zamba",
    "cut adapters": "emu3 llama4 llama4_text mllama",
    "rollouts packing adapters": "deepseek_v4 falcon_mamba mamba",
    "packing cut adapters": "jamba zamba2",
    "packing cut": "olmo_hybrid zaya",
    "rollouts cut": "git",
    "cut recomputing": "hrm_text",
    "cut recomputing adapters": "longcat_flash",
    "rollouts": "moshi",
    "rollouts packing cut recomputing": "reformer",
}  # fmt: skip
"""What is refused, and of which families."""


def opened(model):
    try:
        return CausalLM(model)
    except ConfigError as error:
        if "et model.head to logits" not in str(error):
            raise
        return CausalLM(model, "logits")


@torch.no_grad()
def read(model, ids):
    """Logits [T, V] of one sequence alone."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def same(found, expected, tolerance=1e-3):
    apart = (found - expected).abs().max()
    assert apart <= tolerance * expected.abs().max().clamp(min=1)


def rollouts(model, tmp_path):
    """Beyond the windows of attention, and almost all padding; rows that have ended make place for others."""
    lm = opened(model)
    check_decoding(lm, 17)
    prompts, decoding = [[*range(5, 16)], [7], [100, 3, 45], [8] * 5], Decoding(6, range(0, 264, 9), chunk_size=2)
    rollout = sample(lm, None, prompts, decoding, alpha=0.0, uniforms=draw_uniforms(1, 6, 4))
    for prompt, response, found in zip(prompts, rollout.responses(), rollout.student_logprobs, strict=True):
        own = read(model, prompt + response)[len(prompt) - 1 : -1].log_softmax(-1)
        same(found[: len(response)], own.gather(-1, torch.tensor(response)[:, None])[:, 0])


@torch.no_grad()
def packing(model, tmp_path):
    opened(model)
    check_packing(model)
    sequences = [[*range(30, 42)], [3, 9, 200], [60, 61, 62, 63], [8] * 5, [*range(100, 140)]]
    packed = collate([ids[:1] for ids in sequences], [ids[1:] for ids in sequences], 48)
    assert len(packed.input_ids) == 2
    found = model(**packed.inputs(), use_cache=False).logits[packed.predict].float()
    same(found, torch.cat([read(model, ids)[:-1] for ids in sequences]))


def cut(model, tmp_path):
    """As the teacher with two layers whose output is replaced by their input; the same when read from its files."""
    opened(model)
    student, (_, layers), ids = drop_layers(model, 2, 4), layers_of(model), list(range(3, 40))
    assert len(layers_of(student)[1]) == len(layers) - 2
    found = read(student, ids)

    def passed_on(forward):
        def call(*args, **kwargs):
            output = forward(*args, **kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if isinstance(output, torch.Tensor) else type(output)([hidden, *output[1:]])

        return call

    for layer in layers[2:4]:
        layer.forward = passed_on(layer.forward)
    same(found, read(model, ids))
    student.save_pretrained(tmp_path)
    same(read(load_model(str(tmp_path), attn="eager"), ids), found, 1e-5)


def recomputing(model, tmp_path):
    lm = opened(model)
    check_training(lm)

    def gradients():
        model.zero_grad()
        batch = collate([[3, 4, 5], [6]], [[6, 7, 8, 9], [1, 2]])
        fused_linear_token_logprobs(*lm.output(batch), batch.targets).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    recompute_layers(model)
    check_training(lm)
    found = gradients()
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        same(found[name], gradient, 1e-5)


def adapters(model, tmp_path):
    opened(model)
    ids = list(range(3, 20))
    plain = read(model, ids)
    add_adapters(model, LoraConfig(rank=2), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero until trained
            torch.nn.init.normal_(parameter, std=0.05)
    found = read(model, ids)
    assert (found - plain).abs().max() > 1e-3
    merged = merge_adapters(model)
    same(read(merged, ids), found)
    merged.save_pretrained(tmp_path)
    same(read(load_model(str(tmp_path), attn="eager"), ids), found)


CHECKS = (rollouts, packing, cut, recomputing, adapters)


@needs_adapters
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_right_or_refused(kind, tmp_path):
    listed = transformers.__version__.startswith(TRIED)
    try:
        model = tiny(kind)
    except Exception as error:
        if kind in UNBUILT or not listed:
            pytest.skip(f"not built at this size: {UNBUILT.get(kind, error)}")
        raise
    assert UNBUILT.get(kind, "needs").startswith("needs"), "it can be built: strike it from the list"
    refused = []
    for check in CHECKS:
        try:
            check(copy.deepcopy(model), tmp_path / check.__name__)
        except ConfigError as error:
            print(f"{kind}: {error}")
            refused.append(check.__name__)
    if listed:
        assert " ".join(refused) == next((what for what, kinds in REFUSED.items() if kind in kinds.split()), "")


def test_the_lists_do_not_grow_unseen():
    """A new family is tried; what cannot be tried, or is refused, is counted."""
    assert len(UNBUILT) == 7
    assert {
        check.__name__: sum(len(kinds.split()) for what, kinds in REFUSED.items() if check.__name__ in what)
        for check in CHECKS
    } == {"rollouts": 35, "packing": 72, "cut": 37, "recomputing": 8, "adapters": 25}
    assert LAYERS > 4  # two of them are cut, and some stay on both sides
