"""A GGUF file of the Llama family → a directory that `from_pretrained` loads: fp32 safetensors, config, tokenizer.

Written out because the general path through transformers takes four times as long, returns a model that cannot be
saved, and loses the tokenizer's digit splitting. The weights are those of the file, de-quantised: bit-identical.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.foreign import foreign

# llama.cpp's names of one block's tensors → those of transformers' LlamaForCausalLM
BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
SPECIAL = 3  # tokenizer.ggml.token_type of control tokens

# The file's own template inserts a default system prompt of twenty tokens; training without it costs nothing in
# likelihood and saves them on every prompt, so the tokenizer we write carries plain ChatML.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class GGUFError(ValueError):
    """A file that cannot be converted."""


def convert(source: Path, target: Path) -> None:
    """Write the model and tokenizer of `source` (a .gguf file) into the new directory `target`.

    Raises GGUFError for an architecture or a tokenizer that is not known to convert exactly, and for a damaged file.
    """
    with foreign(f"{source.name} is damaged, or no GGUF file", GGUFError):
        _convert(source, target)


def _convert(source: Path, target: Path) -> None:
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaForCausalLM

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    known = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    for key, expected in known.items():
        if fields.get(key) != expected:
            raise GGUFError(f"{source.name}: {key} is {fields.get(key)!r}; only {expected!r} converts exactly")
    blocks = {t.name.split(".")[1] for t in reader.tensors if t.name.startswith("blk.")}
    if fields["llama.block_count"] != len(blocks):
        raise GGUFError(f"{source.name} is damaged: it holds {len(blocks)} of {fields['llama.block_count']} blocks")
    config = _config(fields, tied="output.weight" not in {t.name for t in reader.tensors})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = _weights(reader, config)
    model.load_state_dict(weights, strict=not config.tie_word_embeddings, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(target)
    _tokenizer(fields).save_pretrained(target)


def _config(fields: dict[str, Any], tied: bool) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),  # stored as fp32: 9.9999997e-06
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=tied,
    )


def _weights(reader: Any, config: Any) -> dict[str, Tensor]:
    from gguf.quants import dequantize

    weights = {}
    for tensor in reader.tensors:
        name, kind = tensor.name.rsplit(".", 1)  # blk.3.attn_q, weight
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            if part in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
                value = _undo_rotary_permutation(value, heads)
            name = f"model.layers.{layer}.{BLOCK[part]}"
        else:
            name = OUTER[name]
        weights[f"{name}.{kind}"] = value
    return weights


def _undo_rotary_permutation(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp stores each head's rotary pairs (i, i + d/2) side by side; transformers keeps the halves apart."""
    out_features, in_features = weight.shape
    pairs = weight.view(heads, out_features // heads // 2, 2, in_features)
    return pairs.transpose(1, 2).reshape(out_features, in_features)


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    backend.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, kinds, strict=True)
            if kind == SPECIAL
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    )
