"""Conversion from GGUF, on a file written here as llama.cpp does; and the packaged teacher, if cached."""

import random
import struct

import pytest
import torch
from tokenizers import pre_tokenizers

from minillm.data import packages
from minillm.data.gguf import BLOCK, OUTER, GGUFError, convert
from minillm.model.head import CausalLM
from minillm.model.load import load_model, load_tokenizer
from minillm.model.sampling import greedy_responses

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

CONTROL, NORMAL = 3, 1


def permute(weight, heads):
    """llama.cpp's own: rotary halves interleaved per head."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(path, model, pre="smollm"):
    config = model.config
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "he", "hel"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    names = {theirs: ours for ours, theirs in OUTER.items()}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}" for ours, theirs in BLOCK.items()}
    for key, value in model.state_dict().items():
        name, kind = key.rsplit(".", 1)
        if name == "lm_head" and config.tie_word_embeddings:
            continue
        if name.endswith("q_proj"):
            value = permute(value, config.num_attention_heads)
        elif name.endswith("k_proj"):
            value = permute(value, config.num_key_value_heads)
        writer.add_tensor(f"{names[name]}.{kind}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_model_is_the_one_written(tmp_path, make_llama, tied):
    model = make_llama(2, vocab_size=261, tie_word_embeddings=tied)
    write_gguf(tmp_path / "m.gguf", model)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    again = load_model(str(tmp_path / "out"))
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    ids = torch.tensor([[5, 9, 17, 200]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert again.config.tie_word_embeddings == tied
    assert again.generation_config.eos_token_id == 2


def test_the_converted_tokenizer_splits_digits_and_speaks_chatml(tmp_path, make_llama):
    write_gguf(tmp_path / "m.gguf", make_llama(1, vocab_size=261))
    convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer.tokenize("hello") == ["hel", "l", "o"]
    text = "Hello… café naïve 日本語 🙂\n\n\t= 12  x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "he"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhe<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(chat)[0] == 1


def test_what_would_not_convert_exactly_is_refused(tmp_path, make_llama):
    write_gguf(tmp_path / "m.gguf", make_llama(1, vocab_size=261), pre="llama-bpe")
    with pytest.raises(GGUFError, match=r"tokenizer\.ggml\.pre is 'llama-bpe'; only 'smollm' converts exactly"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_a_damaged_file_is_one_error(tmp_path, make_llama):
    """Cut, or with bytes and lengths of its header changed: it converts, or one error names it."""
    write_gguf(tmp_path / "m.gguf", make_llama(1, vocab_size=261))
    content, failed = (tmp_path / "m.gguf").read_bytes(), 0
    for seed in range(40):
        draw = random.Random(seed)
        damaged = bytearray(content)
        start = draw.randrange(8000)
        if seed % 4 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        elif seed % 4 == 1:
            damaged[start : start + 8] = struct.pack("<Q", draw.choice((0, 10**9, 10**18, 2**63, 2**64 - 1)))
        else:
            for _ in range(draw.choice((1, 4, 30))):
                damaged[draw.randrange(8000)] = draw.randrange(256)
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            convert(tmp_path / "damaged.gguf", tmp_path / f"out-{seed}")
        except GGUFError as error:
            assert "damaged.gguf" in str(error) and "\n" not in str(error)
            failed += 1
    assert failed > 20


@pytest.mark.skipif(
    not (packages.cache_directory() / "models" / "smollm2-135m-instruct").exists(),
    reason="the packaged teacher is not cached; `minillm distill recipes/smollm2-cpu.yaml --smoke` fetches it",
)
def test_the_packaged_teacher_answers():
    source = "package:smollm2-135m-instruct"
    model, tokenizer = CausalLM(load_model(source)), load_tokenizer(source)
    assert tokenizer.tokenize("\n\n1. Eat 25") == ["ĊĊ", "1", ".", "ĠEat", "Ġ", "2", "5"]
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    found = greedy_responses(model, tokenizer, [tokenizer.encode(prompt)], 16, 1, [tokenizer.eos_token_id])
    assert found == ["The capital of France is Paris."]
