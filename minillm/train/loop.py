"""The training loop: rollout → score → loss → backward → step → log → validate → save.

A method (minillm.py, baselines.py) says, for each optimiser step, which examples to learn from and with which loss;
MiniLLM samples its responses there. The loop knows nothing else of the methods: it cuts a step into micro-batches and
divides the summed losses by the number of tokens that count, over all micro-batches and processes, so that 1 × 8
sequences, 8 × 1 and 2 processes × 4 give the same gradient.

The host runs ahead of the device. It waits once a step, for the numbers that say whether the weights may be updated,
and once more where it measures time (minillm/run/clock.py).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from minillm.config.schema import OptimConfig
from minillm.lost import ServerLost
from minillm.model.head import Sums
from minillm.parallel import student as parallel
from minillm.parallel.gathered import gathered
from minillm.parallel.tensor import runs_together
from minillm.parallel.whole import whole
from minillm.run import checkpoint
from minillm.run.checkpoint import Checkpoint, Progress
from minillm.run.directory import RunDirectory
from minillm.run.interrupt import Interrupt, Interrupted
from minillm.teacher.choose import Elsewhere
from minillm.train.baselines import Given, Gkd, kd, seqkd, sft
from minillm.train.context import Context, Micro, Part, Step, chunks
from minillm.train.minillm import MiniLLM
from minillm.train.optimizers import make_optimizer, set_lr, take_step
from minillm.train.selection import Selection

METHODS: dict[str, Callable[[Context, Path], Given | Gkd | MiniLLM]] = {
    "sft": sft, "kd": kd, "seqkd": seqkd, "gkd": Gkd, "minillm": MiniLLM,
}  # fmt: skip


def train(
    context: Context, directory: RunDirectory, stage: str, first_step: int = 0, resumed: Checkpoint | None = None
) -> dict[str, float]:
    """Run one stage, `optim.steps` optimiser steps.

    Args:
        context: models, data and settings, as `prepare` returns them. The student is trained in place.
        directory: where metrics and checkpoints are written.
        stage: the name of the stage.
        first_step: the steps of the stages before, added to a step's number in everything written.
        resumed: the checkpoint of this stage to go on from.

    Returns the tokens seen (prompts included), seconds in all and per phase, and the best validation.

    Raises FloatingPointError, naming step and sample, before a loss or gradient that is not finite reaches the
    weights; Interrupted after a checkpoint when a signal asked to stop, ServerLost after one when a server that
    samples or teaches no longer answers; CheckpointError.
    """
    config, accelerator, clock = context.config, context.accelerator, context.clock
    optim, log, model = config.optim, context.run.log, context.student.model
    folder = directory.path / "stages" / stage
    optimizer: torch.optim.Optimizer = make_optimizer(optim, parallel.to_step(context.student))
    predictor, optimizer = parallel.prepare(context.student, optimizer, accelerator)
    moving = context.average
    if moving is not None:
        moving.restart()
    progress = Progress(stage, first_step=first_step, stages=dict(directory.stages))
    if resumed is not None:
        progress = resumed.progress
        checkpoint.restore(model, optimizer, accelerator, resumed)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(progress.scaler)

    def save() -> None:
        memory = (method.memory if method is not None else {}) | (moving.memory if moving is not None else {})
        groups = {**checkpoint.state_of(model, optimizer, accelerator), "memory": memory}
        progress.scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
        directory.checkpoint(progress, groups, model, log.checkpoints_kept)
        if accelerator.is_main_process and selection is not None:
            selection.forget(checkpoint.best_steps(directory.path, stage) | {progress.best.get("step", 0)})
        accelerator.wait_for_everyone()

    @contextmanager
    def saved_when_lost() -> Iterator[None]:
        try:
            yield
        except ServerLost as lost:
            if lost.everywhere or accelerator.num_processes == 1:  # else the others may still wait for this one
                save()
            raise

    method: Given | Gkd | MiniLLM | None = None
    selection: Selection | None = None
    with saved_when_lost():
        method = METHODS[config.method](context, folder)
    if resumed is not None and progress.step > 0:  # at step 0 it has nothing to remember
        memory = {name: value.to(accelerator.device) for name, value in resumed.groups.get("memory", {}).items()}
        if moving is not None:
            moving.remember(memory)
        method.remember(memory, progress.step)
    selection = Selection(context, method, folder)
    selection.weights(progress)  # what the end of the stage reads must be there before its first step

    def plan(step: int) -> tuple[Step, list[Micro]]:
        learnt = method.step(step)
        return learnt, [
            Micro(part, part.batch(examples))
            for part in learnt.parts
            for examples in chunks(part.examples, optim.micro_batch_size)
        ]

    following: tuple[Step, list[Micro]] | None = None
    started, begun = time.perf_counter(), progress.step
    if progress.step == 0 and context.validation:
        selection.validate(progress)  # the weights a stage starts with are its first candidate
    clock.reset()
    with Interrupt() as interrupt:
        while progress.step < optim.steps:
            # ---- what this step learns from (MiniLLM samples here when the last rollout is used up)
            step = progress.step + 1
            step_started, computed = time.perf_counter(), time.process_time()
            set_lr(optimizer, optim.lr * lr_factor(step, optim))
            with saved_when_lost():
                (parts, known), micros = following or plan(step)
                looks_ahead = isinstance(method, Given) and isinstance(context.teacher, Elsewhere)
                following = plan(step + 1) if looks_ahead and step < optim.steps else None

                # ---- loss and gradient
                sums = backward(context, predictor, micros, following[1] if following else None)
            grad_norm = whole(accelerator.clip_grad_norm_(checkpoint.trained(model).values(), optim.max_grad_norm))
            seen = sum(len(example.prompt) + len(example.response) for part in parts for example in part.examples)
            (tokens,) = over_processes(accelerator, [seen])
            metrics = read({**known, **sums, "grad_norm": grad_norm, "tokens": tokens})

            # ---- update
            finite = math.isfinite(metrics["grad_norm"]) or accelerator.scaler is not None  # which skips such steps
            if not (math.isfinite(metrics["loss"]) and finite):
                raise FloatingPointError(
                    f"{stage}, step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; "
                    f"{blame(context, parts)}. The weights were not updated. {directory.how_to_resume()}"
                )
            take_step(optimizer, optim, context.run.seed, step)
            optimizer.zero_grad()
            if moving is not None:
                moving.update()
            progress.step = step

            # ---- validate
            if selection.due(step):
                metrics |= selection.validate(progress)

            # ---- log
            phases, elapsed = clock.reset(), time.perf_counter() - step_started
            now = metrics.pop("tokens")
            progress.num_tokens += now
            phases = {"time/rollout": 0.0, "time/score": 0.0} | phases
            metrics |= {
                "learning_rate": optim.lr * lr_factor(step, optim),
                "step_time": elapsed,
                "cpu_time": time.process_time() - computed,
                "tokens_per_second": now / elapsed,
                **phases,
            }
            for name in ("step_time", "cpu_time", *(name for name in phases if name.startswith("time/"))):
                progress.totals[name] = progress.totals.get(name, 0.0) + metrics[name]
            progress.history.append(metrics)
            if step % log.every == 0 or step == optim.steps:
                left = (time.perf_counter() - started) / (step - begun) * (optim.steps - step)
                if accelerator.is_main_process:
                    line = average(progress.history) | {"num_tokens": progress.num_tokens}
                    directory.log(stage, step, optim.steps, progress.global_step, line, left)
                progress.history = []

            # ---- save
            every, stop = log.checkpoint_every, interrupt.asked(accelerator)
            if stop or (every and (step % every == 0 or step == optim.steps)):
                with clock("save"):
                    save()
            if stop:
                raise Interrupted(directory.how_to_resume())
    selection.restore(progress)
    accelerator.free_memory()  # the optimiser's, before the next stage allocates its own
    best = {f"best_{name}": value for name, value in progress.best.items()}
    return {"num_tokens": progress.num_tokens, **best, **{k: round(v, 2) for k, v in progress.totals.items()}}


def backward(
    context: Context, predictor: torch.nn.Module, micros: list[Micro], following: list[Micro] | None = None
) -> Sums:
    """Accumulate the gradient of the losses per token; returns every named sum per token, over all processes. A
    teacher that is not here is asked about the micro-batches `following` in the next step, too."""
    accelerator = context.accelerator
    tokens = count_targets(micros, accelerator)
    metrics: Sums = {}
    for i, micro in enumerate(context.ask_ahead(micros, following or [])):
        batch, kind = micro.batch.to(accelerator.device), micro.part.kind
        last = i + 1 == len(micros)
        with nullcontext() if last else accelerator.no_sync(predictor):
            with context.autocast():
                sums = predictor(batch, micro.part.loss)
            # the token count is global: where gradients are averaged over processes, undo that
            accelerator.backward(sums["loss"] * parallel.averaged_over(predictor, accelerator) / tokens[kind])
        for name, value in sums.items():
            share = value.detach().float() / tokens[kind]
            metrics[name] = metrics[name] + share if name in metrics else share
    reduced = accelerator.reduce(torch.stack(list(metrics.values())), "sum")  # one message for all of them
    return dict(zip(metrics, reduced, strict=True))


def read(values: Sums) -> dict[str, float]:
    """Numbers of the device as numbers of Python: the one place of a step where the host waits for them."""
    return dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist(), strict=True))


def blame(context: Context, parts: list[Part]) -> str:
    """The first example, in words, whose own loss or gradient is not finite; tried one by one, as many on every
    process: their teacher may be sharded. Where their losses are joined, all processes try one example at a time."""
    found: list[str] = []
    together = runs_together(context.teacher)
    with gathered(context.student):
        parameters = list(checkpoint.trained(context.student.model).values())
        for part, example in [
            (each, example)
            for each in parts
            for example in (gather_object(each.examples) if together else each.examples)
        ]:
            batch = part.batch([example]).to(context.accelerator.device)
            with context.autocast():
                value = part.loss(context.student.output(batch), batch)["loss"]
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            if not all(torch.isfinite(x).all() for x in (value, *gradients) if x is not None):
                found.append(f"{example.record.where} ({part.kind})")
    found = gather_object(found[:1])
    return f"the first sample at fault is {found[0]}" if found else "no sample alone gives that: lower optim.lr"


# ---- helpers


def count_targets(micros: list[Micro], accelerator: Accelerator) -> Sums:
    """Tokens that count, per kind, over all micro-batches and processes; at least 1."""
    kinds = dict.fromkeys(micro.part.kind for micro in micros)
    here = [sum(len(m.batch.targets) for m in micros if m.part.kind == kind) for kind in kinds]
    return dict(zip(kinds, over_processes(accelerator, here).clamp(min=1), strict=True))


def over_processes(accelerator: Accelerator, counts: list[int]) -> Tensor:
    """Their sums over all processes, on the device."""
    here = torch.tensor(counts, dtype=torch.float32).to(accelerator.device, non_blocking=True)
    return accelerator.reduce(here, "sum")


def lr_factor(step: int, optim: OptimConfig) -> float:
    """Learning rate of a step (from 1) as a share of the peak."""
    warmup, total = optim.warmup_steps, optim.steps
    if step <= warmup:
        return step / warmup
    done = (step - warmup - 1) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[optim.schedule]


def average(history: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the steps of a log interval that have it; the maximum for memory."""
    names = dict.fromkeys(name for metrics in history for name in metrics)
    known = {name: [metrics[name] for metrics in history if name in metrics] for name in names}
    return {
        name: max(values) if name.startswith("memory/") else sum(values) / len(values)
        for name, values in known.items()
    }
