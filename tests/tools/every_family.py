"""Every family of causal language models that the installed transformers has, at a size that a test can afford."""

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB, LAYERS = 264, 6

SIZES = [  # by the name of a setting; the first that matches it whole
    (r"(decoder_|unpadded_)?vocab_size|n_tokens|vocab_size_per_layer_input", VOCAB),
    (r"num_hidden_layers|(num_)?n_?layers?|(num_)?(de|en)coder_layers|num_layers|depth", LAYERS),
    (r".*(key_value|kv)_heads|num_query_groups|.*num_global_key_value_heads", 2),
    (r".*heads|n_head", 4),
    (r"rotary_dim", 4),
    (r"qk_head_dim", 16),
    (r".*head_?dim|d_head|d_kv|kv_channels|attention_head_size|mamba_headdim|qk_nope_head_dim", 8),
    (
        r"hidden_size|d_model|n_embd|embedding_size|input_size|hidden_dim|dim|.*_hidden_size|word_embed_proj_dim|lru_width"
        r"|emb_dim|dim_model|attention_hidden_size|.*embed_dim|.*input_embedding_size|output_embedding_size",
        32,
    ),
    (r".*intermediate_size.*|n_inner|d_ff|dff|dim_ff|.*ffn_dim|ffn_hidden_size|feed_forward_size|mlp_dim|d_inner", 48),
    (r".*lora_rank|.*_rank", 8),
    (r".*experts_per_tok(en)?|moe_topk|moe_k|.*top_k_experts|num_selected_experts", 2),
    (r".*(routed|local|num)_experts", 4),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|original_max_.*", 512),
    (r"state_size|ssm_state_size|mamba_d_state", 8),
    (r"sliding_window(_size)?|local_attention|(attention_)?window_size|attention_chunk_size", 8),
    (r"image_size", 28),
    (r"patch_size", 14),
]


MAMBA = {"mamba_d_head": 16, "mamba_n_heads": 4}  # an inner size of 64
TURNS = ["sliding_attention", "full_attention"] * 3
LINEAR = {
    "layers_block_type": ["linear_attention", "hybrid"] * 3, "attention_hidden_size": 64, "attention_head_dim": 16,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # where the names of a family's settings do not say enough
    "bamba": {"attn_layer_indices": [1, 4], **MAMBA},
    "blenderbot": {"encoder_layers": 6},
    "cohere_compass_text": {"rope_parameters": {"full_attention": None, "sliding_attention": None}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 12, "n_input_layers": 4, "n_recurrent_layers": 4, "n_output_layers": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "intermediate_size": 48, "activation_sparsity_pattern": None, "layer_types": TURNS,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3, **MAMBA},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"mamba_dt_rank": 8, **LINEAR},
    "zamba2": {"hybrid_layer_ids": [1, 3, 5], "mamba_headdim": 16, **LINEAR},
}  # fmt: skip


def tiny(kind: str, **settings: Any) -> PreTrainedModel:
    """An untrained model of the family, in eval mode, whose distributions are far from uniform."""
    config = CONFIG_MAPPING[kind](**shrunk(CONFIG_MAPPING[kind]().to_dict()) | SETTINGS.get(kind, {}) | settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def shrunk(default: dict[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that must change for a small model."""
    found: dict[str, Any] = {}
    for key, value in default.items():
        if isinstance(value, dict) and key.endswith("_config"):
            found[key] = shrunk(value)
        elif type(value) is int and (size := size_of(key)) is not None:
            found[key] = size if size == LAYERS else min(value, size)
        elif isinstance(value, int) and key.endswith(("token_id", "token_index")) and value >= VOCAB:
            found[key] = 3
    if "is_decoder" in default:  # else attention looks ahead
        found["is_decoder"] = True
    if "kv_lora_rank" in default:  # latent attention expands to a key and a value for each head
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def size_of(key: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), None)
