"""The training loop: rollout → score → loss → backward → step → log.

Each method is a generator that yields, per optimiser step, the micro-batches to learn from, each with the function
that turns the student's output into summed losses. The loop knows nothing else of the methods: it divides the sums by
the number of tokens that count, over all micro-batches and processes, so that 1 × 8 sequences, 8 × 1 and 2 processes
× 4 give the same gradient.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from minillm.config import Config, ConfigError
from minillm.data import Batch, Example, chunk_text, collate, encode, read_records, read_text, shuffled
from minillm.models import check_context
from minillm.objective import PolicyTerms, concatenate, policy_terms, token_rewards
from minillm.rollout import Rollout, draw_uniforms, sample
from minillm.run import Run
from minillm.vocabulary import CausalLM, Output, Sums, common_vocabulary, divergence, minillm_loss, token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Micro(NamedTuple):
    """Sequences of one forward and backward pass, and how the student's output becomes sums.

    Micro-batches of one `kind` are normalised together, by the number of their targets.
    """

    kind: str
    batch: Batch
    loss: Callable[[Output, Batch], Sums]


class Step(NamedTuple):
    """What one optimiser step learns from, and what is known about it already."""

    micros: list[Micro]
    metrics: dict[str, float]


@dataclass
class Clock:
    """Seconds spent per phase since the last reset."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def reset(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds


@dataclass
class Training:
    """All that a method may use. The models live on `accelerator.device`."""

    config: Config
    accelerator: Accelerator
    student: CausalLM
    teacher: CausalLM | None
    tokenizer: "PreTrainedTokenizerBase"
    examples: list[Example]
    text: list[list[int]]
    clock: Clock = field(default_factory=Clock)

    @property
    def vocab_size(self) -> int | None:
        """The one vocabulary size that every kernel call gets."""
        return None if self.teacher is None else common_vocabulary(self.student, self.teacher)

    def mine(self, items: list) -> list:
        """This process's share of what all processes draw alike."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]


def prepare(
    config: Config,
    student: CausalLM,
    teacher: CausalLM | None,
    tokenizer: "PreTrainedTokenizerBase",
) -> Training:
    """Read and check the data against the models, before any work that could be lost."""
    accelerator = Accelerator()
    torch.manual_seed(config.seed)
    examples = encode(read_records(config.data.train), tokenizer, config.data, config.data.train)
    if config.method != "minillm":
        examples = [example for example in examples if example.response]
        if not examples:
            raise ConfigError(f"{config.data.train} holds no answers; method {config.method} learns from them")
    wants_text = config.method == "minillm" and config.objective.pt_weight > 0
    text = chunk_text(read_text(config.data.text), tokenizer, config.objective.pt_length) if wants_text else []
    answer = config.rollout.max_new_tokens if config.method == "minillm" else config.data.max_response_length
    for model in (student, teacher):
        if model is not None:
            check_context(model.model, config.data.max_prompt_length + answer)
            model.to(accelerator.device)
    if teacher is not None:
        teacher.requires_grad_(False)
    for key in ("optim.batch_size", "rollout.batch_size"):
        size = config.optim.batch_size if key == "optim.batch_size" else config.rollout.batch_size
        if size % accelerator.num_processes:
            raise ConfigError(f"{key} is {size}, which {accelerator.num_processes} processes cannot share equally")
    return Training(config, accelerator, student, teacher, tokenizer, examples, text)


def train(training: Training, run: Run, stage: str, first_step: int = 0) -> dict[str, float]:
    """Run one stage: `optim.steps` optimiser steps, counted on from `first_step` in everything written.

    Returns tokens seen (prompts included) and seconds, in all and per phase.

    Raises FloatingPointError, naming the step, before a loss or gradient that is not finite reaches the weights.
    """
    config, accelerator, clock = training.config, training.accelerator, training.clock
    optim = config.optim
    optimizer = torch.optim.AdamW(
        training.student.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    predictor, optimizer = accelerator.prepare(training.student, optimizer)
    steps = METHODS[config.method](training)
    started, seen, history = time.perf_counter(), 0.0, []
    totals: dict[str, float] = {}

    for step in range(1, optim.steps + 1):
        # ---- what this step learns from (MiniLLM rolls out here when the last rollouts are used up)
        step_started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * lr_factor(step, config)
        micros, metrics = next(steps)

        # ---- loss and gradient
        metrics |= backward(predictor, micros, accelerator)

        # ---- update
        grad_norm = float(accelerator.clip_grad_norm_(predictor.parameters(), optim.max_grad_norm))
        if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"{stage}, step {step}: loss {metrics['loss']}, gradient norm {grad_norm}. The weights were not "
                "updated; lower optim.lr, or look at the data of this step"
            )
        optimizer.step()
        optimizer.zero_grad()

        # ---- log
        elapsed, phases = time.perf_counter() - step_started, clock.reset()
        now = total(accelerator, *(micro.batch.attention_mask.sum() for micro in micros))
        seen += now
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "step_time": elapsed,
            "tokens_per_second": now / elapsed,
            "time/rollout": phases.get("rollout", 0.0),
            "time/score": phases.get("score", 0.0),
            "time/update": elapsed - sum(phases.values()),
        }
        for name in ("step_time", "time/rollout", "time/score", "time/update"):
            totals[name] = totals.get(name, 0.0) + metrics[name]
        history.append(metrics)
        if step % config.log.every == 0 or step == optim.steps:
            left = (time.perf_counter() - started) / step * (optim.steps - step)
            if accelerator.is_main_process:
                run.log(stage, step, optim.steps, first_step + step, average(history) | {"num_tokens": seen}, left)
            history = []
        if config.log.checkpoint_every and step % config.log.checkpoint_every == 0:
            run.checkpoint(accelerator, first_step + step)
    accelerator.free_memory()  # of the optimiser, before the next stage allocates its own
    return {"num_tokens": seen, **{name: round(value, 2) for name, value in totals.items()}}


def backward(predictor: torch.nn.Module, micros: list[Micro], accelerator: Accelerator) -> dict[str, float]:
    """Accumulate the gradient of the losses per token; returns every named sum per token, over all processes."""
    tokens = count_targets(micros, accelerator)
    metrics: Sums = {}
    for i, micro in enumerate(micros):
        batch = micro.batch.to(accelerator.device)
        last = i + 1 == len(micros)
        with nullcontext() if last else accelerator.no_sync(predictor):
            sums = predictor(batch, micro.loss)
            # gradients are averaged over processes, the token count is global: undo the average
            accelerator.backward(sums["loss"] * accelerator.num_processes / tokens[micro.kind])
        for name, value in sums.items():
            share = value.detach().float() / tokens[micro.kind]
            metrics[name] = metrics[name] + share if name in metrics else share
    reduced = accelerator.reduce(torch.stack(list(metrics.values())), "sum")  # one synchronisation for all of them
    return dict(zip(metrics, reduced.tolist(), strict=True))


# ---- methods


def sft_steps(training: Training) -> Iterator[Step]:
    """Cross entropy with the reference answers."""

    def loss(student: Output, batch: Batch) -> Sums:
        return {"loss": cross_entropy(student, batch, training.vocab_size)}

    for batch in answer_batches(training):
        yield Step([Micro("answers", micro, loss) for micro in batch], {})


def kd_steps(training: Training) -> Iterator[Step]:
    """Word-level distillation on the reference answers: distill_weight · divergence + label_weight · cross entropy."""
    config, teacher, vocab_size = training.config.loss, training.teacher, training.vocab_size
    assert teacher is not None

    def loss(student: Output, batch: Batch) -> Sums:
        with training.clock("score"), torch.no_grad():
            target = teacher.output(batch)
        options = {"beta": config.beta, "temperature": config.temperature, "vocab_size": vocab_size}
        distill = divergence(student, target, config.divergence, **options)
        label = cross_entropy(student, batch, vocab_size)
        total = config.distill_weight * distill + config.label_weight * label
        return {"loss": total, "loss/distill": distill, "loss/label": label}

    for batch in answer_batches(training):
        yield Step([Micro("answers", micro, loss) for micro in batch], {})


def minillm_steps(training: Training) -> Iterator[Step]:
    """The paper's algorithm: roll out a batch of prompts, then pass over it `rollout.epochs` times in minibatches."""
    config, teacher, clock = training.config, training.teacher, training.clock
    assert teacher is not None
    prompts = shuffled(len(training.examples), config.seed)
    passages = shuffled(len(training.text), config.seed + 1)
    minibatches = torch.Generator().manual_seed(config.seed + 2)
    size = config.optim.batch_size // training.accelerator.num_processes
    iteration = 0
    while True:
        # ---- rollout: everything about the sampled tokens is known from here on
        with clock("rollout"), training.accelerator.autocast():
            chosen = training.mine([next(prompts) for _ in range(config.rollout.batch_size)])
            uniforms = draw_uniforms(
                config.seed * 1_000_003 + iteration, config.rollout.max_new_tokens, config.rollout.batch_size
            )[:, training.accelerator.process_index :: training.accelerator.num_processes]
            rollout = sample(
                training.student,
                teacher,
                [training.examples[i].prompt for i in chosen],
                max_new_tokens=config.rollout.max_new_tokens,
                eos_token_id=training.tokenizer.eos_token_id,
                alpha=config.rollout.alpha,
                uniforms=uniforms,
                vocab_size=training.vocab_size,
            )
        responses = rollout.responses()
        terms = policy_terms(
            rollout,
            length_norm=config.objective.length_norm,
            single_step=config.objective.single_step,
            weighted=config.objective.importance_weights,
        )
        assert rollout.teacher_hidden is not None
        about = describe(rollout, training.accelerator)
        iteration += 1

        # ---- updates
        for _ in range(config.rollout.epochs):
            order = torch.randperm(len(responses), generator=minibatches).tolist()
            for start in range(0, len(order), size):
                micros = []
                for rows in chunks(order[start : start + size], config.optim.micro_batch_size):
                    batch = collate([rollout.prompts[i] for i in rows], [responses[i] for i in rows])
                    states = torch.cat([rollout.teacher_hidden[i, : len(responses[i])] for i in rows])
                    constants = concatenate([terms[i] for i in rows])
                    loss = policy_loss(training, Output(states, teacher.head), constants)
                    micros.append(Micro("responses", batch, loss))
                if config.objective.pt_weight > 0:
                    drawn = training.mine([next(passages) for _ in range(config.objective.pt_batch_size)])
                    for rows in chunks(drawn, config.optim.micro_batch_size):
                        texts = [training.text[i] for i in rows]
                        batch = collate([t[:1] for t in texts], [t[1:] for t in texts])
                        micros.append(Micro("text", batch, text_loss(training)))
                yield Step(micros, dict(about))


def policy_loss(training: Training, teacher: Output, terms: PolicyTerms) -> Callable[[Output, Batch], Sums]:
    """Single + Long on sampled tokens, from what the rollout kept: the teacher's final states and the constants."""
    settings = training.config.objective

    def loss(student: Output, batch: Batch) -> Sums:
        result = minillm_loss(
            student,
            teacher,
            batch.targets,
            **terms._asdict(),
            mask=torch.ones_like(batch.targets, dtype=torch.bool),
            clip_range=settings.clip_range or math.inf,
            single_step=float(settings.single_step),
            normalizer=1.0,  # sums: the loop divides
            vocab_size=training.vocab_size,
        )
        return {
            "loss": result.loss,
            "loss/policy": result.policy_loss,
            "loss/single_step": result.single_step_loss,
            "kl/reverse": result.reverse_kl.sum(),
            "entropy": result.entropy.sum(),
            "clip_fraction": result.clip_fraction * len(batch.targets),
        }

    return loss


def text_loss(training: Training) -> Callable[[Output, Batch], Sums]:
    """L_PT, the language-modelling loss on plain text."""

    def loss(student: Output, batch: Batch) -> Sums:
        total = cross_entropy(student, batch, training.vocab_size)
        return {"loss": training.config.objective.pt_weight * total, "loss/pt": total}

    return loss


METHODS = {"sft": sft_steps, "kd": kd_steps, "minillm": minillm_steps}

# ---- helpers


def cross_entropy(student: Output, batch: Batch, vocab_size: int | None) -> Tensor:
    """Summed over tokens, in nats."""
    return -token_logprobs(student, batch.targets, vocab_size).sum()


def answer_batches(training: Training) -> Iterator[list[Batch]]:
    """Micro-batches of prompts with reference answers, one list per optimiser step."""
    config = training.config
    order = shuffled(len(training.examples), config.seed)
    while True:
        chosen = training.mine([next(order) for _ in range(config.optim.batch_size)])
        examples = [training.examples[i] for i in chosen]
        yield [
            collate([example.prompt for example in part], [example.response for example in part])
            for part in chunks(examples, config.optim.micro_batch_size)
        ]


def count_targets(micros: list[Micro], accelerator: Accelerator) -> dict[str, float]:
    """Tokens that count, per kind, over all micro-batches and processes; at least 1."""
    kinds = dict.fromkeys(micro.kind for micro in micros)
    return {
        kind: max(1.0, total(accelerator, *(len(m.batch.targets) for m in micros if m.kind == kind))) for kind in kinds
    }


def describe(rollout: Rollout, accelerator: Accelerator) -> dict[str, float]:
    """Means per token, and the mean length, of what all processes sampled."""
    mask, sequences = rollout.mask, total(accelerator, len(rollout.lengths))
    tokens = total(accelerator, rollout.lengths.sum())
    return {
        "reward/mean": total(accelerator, token_rewards(rollout)[mask].sum()) / tokens,
        "rollout/from_teacher": total(accelerator, rollout.from_teacher[mask].sum()) / tokens,
        "completions/mean_length": tokens / sequences,
    }


def total(accelerator: Accelerator, *values: Tensor | float) -> float:
    """Sum over the values and over all processes."""
    here = torch.tensor(sum(float(value) for value in values), device=accelerator.device)
    return float(accelerator.reduce(here, "sum"))


def lr_factor(step: int, config: Config) -> float:
    """Learning rate of a step (from 1) as a share of the peak."""
    warmup, total = config.optim.warmup_steps, config.optim.steps
    if step <= warmup:
        return step / warmup
    done = (step - warmup - 1) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.optim.schedule]


def average(history: list[dict[str, float]]) -> dict[str, float]:
    """Mean over the steps of a log interval."""
    names = dict.fromkeys(name for metrics in history for name in metrics)
    return {name: sum(metrics.get(name, 0.0) for metrics in history) / len(history) for name in names}


def chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
