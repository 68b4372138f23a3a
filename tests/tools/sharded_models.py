"""Models, stages and steps for the worlds of sharded.py."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from minillm.config.parallel import ParallelConfig
from minillm.config.recipe import Recipe, stage_from
from minillm.config.schema import LoraConfig, Route, RunConfig
from minillm.data.examples import Example, Record
from minillm.model.adapters import add_adapters
from minillm.model.head import CausalLM
from minillm.model.layers import recompute_layers
from minillm.model.load import load_tokenizer
from minillm.parallel import student as parallel
from minillm.parallel.shard import place_student, place_teacher
from minillm.parallel.whole import whole
from minillm.run import checkpoint
from minillm.teacher.routed import Routed
from minillm.train import loop
from minillm.train.context import Context, chunks
from minillm.train.loop import METHODS, Micro
from minillm.train.optimizers import make_optimizer

FOLDER, TOKENIZER = Path(sys.argv[1]), sys.argv[2]
V, BATCH = 257, 12
SHARDED = ParallelConfig(student="shard", teacher="shard")
TENSOR = ParallelConfig(student="shard", teacher="tensor")
HSDP = ParallelConfig(student="shard", teacher="shard", hosts=2)


def llama(layers: int, seed: int, tied: bool = False, hidden: int = 32, rows: int = V) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=hidden, intermediate_size=3 * hidden // 2, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().double()


ROLLOUT = {"batch_size": BATCH, "max_new_tokens": 6, "epochs": 3, "alpha": 0.3, "on_policy": 0.6}
OBJECTIVE = {"pt_batch_size": BATCH, "pt_length": 5, "pt_teacher": 0.5}
OPTIM = {"batch_size": BATCH, "micro_batch_size": 2, "lr": 1e-2, "max_grad_norm": 0.5, "steps": 4}


@dataclass(frozen=True)
class Pair:
    """What the models of a case are."""

    tied: bool = False
    """The student's head, which is its embedding."""
    recompute: bool = False
    rank: int = 0
    """Of adapters."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """What is special of it, as in `llama`."""
    half: bool = False
    """Float32 weights, of which bfloat16 computes."""
    several: bool = False
    """Two teachers, each of half of the examples."""


def build(method: str, where: ParallelConfig, pair: Pair = Pair(), packing: bool = False, **sections) -> Context:
    """A stage with its models in place; `sections` change some of its settings."""
    sections = {name: dict(settings) for name, settings in sections.items()}
    defaults = {
        "data": {"train": "x", "packing": packing, "max_prompt_length": 16, "max_response_length": 16},
        "rollout": ROLLOUT, "objective": OBJECTIVE, "optim": OPTIM, "validation": {"every": 0},
    }  # fmt: skip
    config = stage_from({"method": method} | {name: x | sections.get(name, {}) for name, x in defaults.items()})
    student, teacher = llama(2, 1, pair.tied), llama(2, 2, **pair.teacher).requires_grad_(False)
    if pair.rank:
        add_adapters(student, LoraConfig(rank=pair.rank), 0)
        student.double()
    if pair.recompute:
        recompute_layers(student)
    run = RunConfig(parallel=where)
    if pair.half:
        student, teacher = student.float(), teacher.float()
        run = replace(run, model=replace(run.model, compute_dtype="bfloat16"))
    lm, taught_by = CausalLM(student), CausalLM(teacher)
    tokenizer = load_tokenizer(TOKENIZER)
    drawn = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, V, (2 + i % 5,), generator=drawn).tolist() for i in range(24)]
    records = [Record([], None, f"row {i}", teacher="ab"[i % 5 % 2] if pair.several else "") for i in range(24)]
    examples = [Example(record, p, [*p[::-1], 0]) for record, p in zip(records, prompts, strict=True)]
    text = [torch.randint(1, V, (5,), generator=drawn).tolist() for _ in range(24)]
    routed = None
    if pair.several:
        other = CausalLM(llama(1, 3).requires_grad_(False))
        routed = Routed({"a": taught_by, "b": other}, {"a": Route("a"), "b": Route("b", weight=0.5, divergence="jsd")})
    place_teacher(taught_by, where)
    context = Context(
        run, config, Accelerator(cpu=True), lm, None if routed else taught_by, tokenizer,
        examples, examples[:5], text, routed=routed,
    )  # fmt: skip
    place_student(lm, where, torch.float32)
    return context


def micros_of(context: Context, method, number: int) -> list[Micro]:
    return [
        Micro(part, part.batch(examples))
        for part in method.step(number).parts
        for examples in chunks(part.examples, context.config.optim.micro_batch_size)
    ]


def train(context: Context, optimizer, steps: range, folder: Path) -> dict[str, torch.Tensor]:
    """Metrics and gradients of each step, and the weights after the last."""
    predictor, wrapped = parallel.prepare(context.student, optimizer, context.accelerator)
    method, model, found = METHODS[context.config.method](context, folder), context.student.model, {}
    for number in steps:
        sums = loop.backward(context, predictor, micros_of(context, method, number))
        found |= {f"{number} metric {name}": value.double() for name, value in sums.items()}
        for name, parameter in checkpoint.trained(model).items():
            found[f"{number} gradient {name}"] = whole(parameter.grad).clone()
        norm = context.accelerator.clip_grad_norm_(checkpoint.trained(model).values(), 0.5)
        found[f"{number} metric norm"] = whole(norm).double()
        wrapped.step()
        wrapped.zero_grad()
        parallel.to_step(context.student)  # shards after every step
    return found | {f"weight {name}": whole(p.detach()).clone() for name, p in model.named_parameters()}


def optimizer_of(context: Context) -> torch.optim.Optimizer:
    return make_optimizer(context.config.optim, parallel.to_step(context.student))


def recipe(context: Context) -> Recipe:
    return Recipe("sharded", context.run, {"sft": context.config})
