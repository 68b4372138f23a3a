"""A cut student computes what its teacher computes with the block skipped, or is refused: per family."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.config.schema import ConfigError
from minillm.model.layers import drop_layers, layers_of
from minillm.model.load import load_model

SIZES = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXACT = {  # families that can be cut, with settings that say something of each layer
    "llama": {},
    "smollm3": {},  # no rotary embedding in every fourth layer
    "gemma2": {"head_dim": 8},  # sliding windows in turns
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 8},
    "qwen3_moe": {"mlp_only_layers": [0, 5], **EXPERTS},  # numbers of layers
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {},
}
REFUSED = {  # what a layer is follows from its number
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
}


def build(kind, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **(SIZES | settings)), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.2)
    return model


@pytest.mark.parametrize("kind", EXACT)
def test_a_family_is_cut_with_all_that_its_configuration_says_of_a_layer(kind, tmp_path):
    teacher = build(kind, **EXACT[kind])
    student = drop_layers(teacher, 1, 3)  # compares itself with the teacher
    assert len(layers_of(student)[1]) == 4
    assert student.config._attn_implementation == teacher.config._attn_implementation == "eager"
    student.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(load_model(str(tmp_path), attn="eager")(ids).logits, student(ids).logits)


def test_a_configuration_that_says_a_thing_twice_is_cut_in_both_or_refused(tmp_path):
    """GPT-Neo's lists its layers' attention, and says in another way how the list is made."""
    types = {"attention_types": [[["global", "local"], 3]], "window_size": 4, "num_layers": 6, "num_heads": 4}
    teacher = build("gpt_neo", **types)
    try:
        student = drop_layers(teacher, 1, 3)
    except ConfigError as error:
        assert "GPTNeoForCausalLM cannot be cut" in str(error)
        return
    student.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(load_model(str(tmp_path), attn="eager")(ids).logits, student(ids).logits)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_cut_that_would_change_the_layers_kept_is_refused(kind):
    with pytest.raises(ConfigError, match=r"\w+ cannot be cut by model.drop_layers .* Name a smaller model"):
        drop_layers(build(kind, **REFUSED[kind]), 1, 3)


def test_the_comparison_with_the_teacher_sees_a_wrong_cut(monkeypatch):
    """Rotary embeddings in the wrong layers, as when their list is not cut."""
    from minillm.model import layers

    whole = layers._cut_config

    def without_list(config, kept):
        tree = whole(config, kept).to_dict()
        return type(config).from_dict(tree | {"no_rope_layers": config.no_rope_layers[: len(kept)]})

    monkeypatch.setattr(layers, "_cut_config", without_list)
    with pytest.raises(ConfigError, match="would compute something else"):
        drop_layers(build("smollm3"), 1, 3)


def test_a_model_with_a_vision_tower_is_cut_in_its_text_layers():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                        "num_attention_heads", "num_key_value_heads")} | {"head_dim": 8}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    assert len(layers_of(teacher)[1]) == 6
    student = drop_layers(teacher, 1, 3)
    assert len(layers_of(student)[1]) == 4
    assert student.config.vision_config.num_hidden_layers == 2


# ---- what is read from a directory


def test_weights_that_are_missing_are_not_drawn_at_random(make_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    make_llama(4).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if ".layers.3." not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"is incomplete: .*model.layers.3.*drawn at random"):
        load_model(str(tmp_path))


def test_tied_heads_are_not_missing(make_llama, tmp_path):
    make_llama(1, tie_word_embeddings=True).save_pretrained(tmp_path)
    load_model(str(tmp_path))


def test_a_quantised_model_without_its_library_says_so(make_llama, tmp_path):
    make_llama(1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"cannot be loaded here: .*\(its weights are quantised"):
        load_model(str(tmp_path))
