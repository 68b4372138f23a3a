"""What the examples run on without a model hub: a random model, a byte-level tokenizer and a ragged batch.

Replace these three with your own models, tokenizer and data.
"""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 257  # one token a byte, and end-of-sequence
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def tiny_llama(layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,  # distributions far from uniform, so that there is something to distil
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()  # without dropout


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(["<eos>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", chat_template=TEMPLATE, padding_side="left"
    )


def ragged_batch(lengths: tuple[int, ...] = (5, 12, 9, 16), prompt: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Right-padded sequences [B, T]; the labels are -100 on prompts and padding, and not shifted."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    position = torch.arange(max(lengths))
    exists = position < torch.tensor(lengths)[:, None]
    labels = torch.where(exists & (position >= prompt), ids, -100)
    return {"input_ids": ids.masked_fill(~exists, 0), "attention_mask": exists.long(), "labels": labels}
