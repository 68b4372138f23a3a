"""Tiny models of many families with random weights, and a rollout sampled from their mixture."""

from typing import NamedTuple

import torch
import transformers as hf
from torch import Tensor

from minillm_kernels import mixed_sample

V, PROMPT, LENGTHS = 131, 4, torch.tensor([9, 3, 12, 7])
SIZES = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15}
LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
GEMMA = {**LLAMA, "head_dim": 8, "final_logit_softcapping": 2.5, "sliding_window": 8}  # at 30 these logits stay linear
FAMILIES = {
    "gpt2": (hf.GPT2Config, {"n_head": 4, "n_positions": 64}),
    "opt": (hf.OPTConfig, {"num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "llama": (hf.LlamaConfig, LLAMA),
    "qwen3": (hf.Qwen3Config, {**LLAMA, "head_dim": 8}),
    "gemma2": (hf.Gemma2Config, GEMMA),
    "gemma3": (hf.Gemma3TextConfig, GEMMA),
    "phi": (hf.PhiConfig, {"num_attention_heads": 4, "intermediate_size": 48}),  # its head has a bias
    "cohere": (hf.CohereConfig, {**LLAMA, "logit_scale": 0.25}),
    "granite": (hf.GraniteConfig, {**LLAMA, "logits_scaling": 4.0}),
}


def build(family: str, hidden: int, layers: int, seed: int, dtype: torch.dtype) -> hf.PreTrainedModel:
    torch.manual_seed(seed)
    config, settings = FAMILIES[family]
    model = hf.AutoModelForCausalLM.from_config(
        config(hidden_size=hidden, num_hidden_layers=layers, **SIZES | settings), attn_implementation="eager"
    )
    for name, x in model.named_parameters():
        if name.endswith("bias"):  # zero at first, which would hide a bias left out
            torch.nn.init.normal_(x, std=0.3)
    return model.to(dtype).eval()


def pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[hf.PreTrainedModel, hf.PreTrainedModel]:
    """Student and teacher; hidden sizes differ."""
    return build(family, 32, 1, 0, dtype), build(family, 64, 2, 1, dtype)


class Sampled(NamedTuple):
    ids: Tensor  # [B, P + T], prompts first
    tokens: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    constants: dict[str, Tensor | bool]

    @property
    def counted(self) -> Tensor:
        """The tokens, -100 where the mask is 0."""
        return self.tokens.where(self.mask, -100)


@torch.no_grad()
def rollout(student, teacher, variant: str) -> Sampled:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, V, (len(LENGTHS), PROMPT), generator=generator)
    draws = []
    for _ in range(int(LENGTHS.max())):
        draw = mixed_sample(student(ids).logits[:, -1], teacher(ids).logits[:, -1], 0.2, generator=generator)
        ids = torch.cat([ids, draw.token_ids[:, None]], 1)
        draws.append(draw)
    q, p, mixture = (
        torch.stack([getattr(x, name) for x in draws], 1)
        for name in ("student_logprobs", "teacher_logprobs", "mixture_logprobs")
    )
    mask = torch.arange(q.shape[1]) < LENGTHS[:, None]
    constants = {"old_logprobs": q, "importance_weights": (q - mixture).exp()}
    constants["advantages"] = torch.zeros_like(q)
    for i, length in enumerate(LENGTHS.tolist()):  # sums written out, token by token
        for t in range(length):
            reward = (p - q)[i, t:length]
            if variant == "paper":
                future = reward[1:]
                constants["advantages"][i, t] = future.mean() if len(future) else 0.0
            else:
                discount = 0.95 ** torch.arange(len(reward), dtype=q.dtype)
                constants["advantages"][i, t] = (discount * reward).sum() / len(reward)
    if variant == "reference":
        valid = constants["advantages"][mask]
        constants["advantages"] = (constants["advantages"] - valid.mean()) / valid.std()
    constants["weight_single_step"] = variant == "paper"
    return Sampled(ids, ids[:, PROMPT:], mask, constants)


def logits(model, sampled):
    return model(sampled.ids).logits[:, PROMPT - 1 : -1]


def hidden(model, sampled):
    return model.base_model(sampled.ids).last_hidden_state[:, PROMPT - 1 : -1]
