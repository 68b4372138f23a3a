"""Tiny random models, a byte-level tokenizer and tiny data: everything the trainer needs, in milliseconds, offline."""

import json

import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def byte_tokenizer(extra: str = "", reverse: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte; pad and end-of-sequence are one token, as in many released models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    vocab = {symbol: i for i, symbol in enumerate(["<eos>", *alphabet, *([extra] if extra else [])])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", chat_template=TEMPLATE
    )


def tiny_llama(layers: int = 3, vocab_size: int = 257, seed: int = 0, **settings) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    defaults = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # distributions far from uniform
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**defaults | settings)).eval()


def tiny_gpt2(vocab_size: int = 257, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


ANSWERS = [
    {"instruction": f"Say the letter {c} {i} times", "input": "", "output": " ".join(c * i)}
    for i in range(1, 5)
    for c in "abcde"
]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from a second thread, and lose seconds where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_llama():
    return tiny_llama


@pytest.fixture
def make_gpt2():
    return tiny_gpt2


@pytest.fixture
def make_tokenizer():
    return byte_tokenizer


@pytest.fixture(scope="session")
def module_tokenizer():
    """One for a whole module."""
    return byte_tokenizer()


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def files(tmp_path):
    """A directory with teacher/, student/, train.jsonl, eval.jsonl, text.txt and recipe.yaml."""
    for name, model in (("teacher", tiny_llama(4)), ("student", tiny_llama(2, seed=1))):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    write_jsonl(tmp_path / "train.jsonl", ANSWERS[:14])
    write_jsonl(tmp_path / "eval.jsonl", ANSWERS[14:])
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(tmp_path), sort_keys=False))
    return tmp_path


def recipe_tree(path) -> dict:
    return {
        "output": str(path / "run"),
        "model": {"teacher": str(path / "teacher"), "student": str(path / "student")},
        "data": {
            "train": str(path / "train.jsonl"),
            "text": str(path / "text.txt"),
            "eval": str(path / "eval.jsonl"),
            "max_prompt_length": 64,
            "max_response_length": 16,
        },
        "validation": {"every": 0},
        "eval": {"prompts": 6, "samples": 2, "sample_tokens": 6, "greedy_tokens": 6, "batch_size": 4},
        "log": {"checkpoint_every": 5},
        "stages": {
            "warm-up": {"method": "kd", "optim": {"steps": 3, "batch_size": 4, "lr": 1e-3}},
            "minillm": {
                "method": "minillm",
                "rollout": {"batch_size": 8, "max_new_tokens": 6, "epochs": 2},
                "objective": {"pt_batch_size": 2, "pt_length": 16},
                "optim": {"steps": 5, "batch_size": 4, "lr": 1e-3},
            },
        },
        "smoke": {"stages": {"warm-up": {"optim": {"steps": 1}}, "minillm": {"optim": {"steps": 1}}}},
    }


def write_jsonl(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
