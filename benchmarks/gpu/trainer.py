"""The trainer by its public command, and its rollouts, on a pair of random weights of the demo's sizes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from .measure import RUN, attempt, record, sync

KEYS = ("step", "loss", "kl/reverse", "step_time", "time/rollout", "time/score", "time/update", "tokens_per_second")
KEYS = (*KEYS, "memory/rollout", "memory/update")
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def trainer() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        attempt("rollouts", lambda: rollouts(folder), least=15)
        attempt("distill", lambda: distill(folder), least=20)


def write_models(folder: Path) -> None:
    """Student and teacher, shaped as SmolLM2-135M-Instruct and its cut, with a tokenizer of bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = 257 if RUN.dry else 49152
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = ["<eos>", *alphabet, *(f"<unused{i}>" for i in range(vocab - 1 - len(alphabet)))]
    words = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(symbols)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", chat_template=TEMPLATE
    )
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    if RUN.dry:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    for name, layers in (("teacher", 2 if RUN.dry else 30), ("student", 1 if RUN.dry else 24)):
        torch.manual_seed(layers)
        config = LlamaConfig(
            vocab_size=vocab,
            num_hidden_layers=layers,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            **sizes,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def rollouts(folder: Path) -> None:
    """Tokens a second of both models and of the student alone, by CUDA graphs and without; of transformers' generate,
    and of vLLM where it is installed."""
    from transformers import LlamaForCausalLM

    from minillm.model.head import CausalLM
    from minillm.model.sampling import Decoding, sample

    dtype = torch.float32 if RUN.dry else torch.bfloat16
    load = lambda name: LlamaForCausalLM.from_pretrained(folder / name, dtype=dtype).to(RUN.device).eval()
    student, teacher = CausalLM(load("student")), CausalLM(load("teacher"))
    new = 4 if RUN.dry else 64
    plain, decoding = Decoding(new, ends=(), graphs=False), Decoding(new, ends=())
    engine = vllm(folder, new) if importlib.util.find_spec("vllm") and not RUN.dry else None
    for sequences in (2,) if RUN.dry else (32, 128):
        prompts = [[1 + (i * 7 + j) % 200 for j in range(24)] for i in range(sequences)]
        ids = torch.tensor(prompts, device=RUN.device)
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        ways: dict[str, Callable[[], object]] = {
            "both": lambda p=prompts: sample(student, teacher, p, decoding, alpha=0.2),
            "student": lambda p=prompts: sample(student, None, p, decoding, alpha=0.0),
            "both, no graphs": lambda p=prompts: sample(student, teacher, p, plain, alpha=0.2),
            "student, no graphs": lambda p=prompts: sample(student, None, p, plain, alpha=0.0),
            "generate": lambda x=ids, o=options: student.model.generate(x, attention_mask=torch.ones_like(x), **o),
        }
        if engine is not None:
            ways["vllm"] = lambda p=prompts: engine(p)
        for by, way in ways.items():
            attempt(f"rollout {by} {sequences}", lambda b=by, w=way, n=sequences: timed(b, w, n, new))


def vllm(folder: Path, new: int) -> Callable[[list[list[int]]], object]:
    """The student's responses of vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder / "student"), dtype="bfloat16", gpu_memory_utilization=0.3, skip_tokenizer_init=True)
    law = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
    return lambda prompts: llm.generate([{"prompt_token_ids": p} for p in prompts], law, use_tqdm=False)


def timed(by: str, way: Callable[[], object], sequences: int, new: int) -> None:
    way()
    sync()
    start = time.perf_counter()
    way()
    sync()
    seconds = time.perf_counter() - start
    rate = sequences * new / seconds
    record(name="rollout", by=by, sequences=sequences, new_tokens=new, seconds=seconds, tokens_per_second=rate)


def distill(folder: Path) -> None:
    """Steps of MiniLLM as `minillm distill` runs them."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder), sort_keys=False))
    command = [sys.executable, "-m", "minillm", "distill", str(folder / "recipe.yaml")]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=max(10.0, RUN.left()))
    metrics = folder / "run" / "metrics.jsonl"
    steps = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    kept = [{key: step[key] for key in KEYS if key in step} for step in steps]
    told = result.stderr[-1000:] if result.returncode else ""
    record(name="distill", rc=result.returncode, ok=result.returncode == 0, steps=kept, tail=told)


def recipe(folder: Path) -> dict[str, Any]:
    examples = [
        {"instruction": f"Say the letter {c} {i} times", "input": "", "output": " ".join(c * i)}
        for i in range(1, 21)
        for c in "abcdefghij"
    ]
    for name, part in (("train", examples[:160]), ("eval", examples[160:176])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in part))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 2000)
    new, batch, steps = (4, 8, 2) if RUN.dry else (64, 32, 12)
    return {
        "output": str(folder / "run"),
        "model": {"teacher": str(folder / "teacher"), "student": str(folder / "student")},
        "data": {"eval": str(folder / "eval.jsonl")},
        "eval": {"prompts": 4, "samples": 1, "sample_tokens": 4, "greedy_tokens": 4, "batch_size": 4},
        "stages": {
            "minillm": {
                "method": "minillm",
                "data": {
                    "train": str(folder / "train.jsonl"),
                    "text": str(folder / "text.txt"),
                    "max_prompt_length": 64,
                    "max_response_length": 64,
                },
                "rollout": {"batch_size": batch, "max_new_tokens": new, "epochs": 2},
                "objective": {"pt_batch_size": 2, "pt_length": 64},
                "optim": {"steps": steps, "batch_size": 8, "lr": 1e-5},
                "validation": {"every": 0},
            }
        },
    }
