"""The methods that MiniLLM is compared with: where each step gets its responses, and its loss on them.

    sft      cross entropy with the responses of the data
    kd       word-level distillation on the responses of the data (any divergence of minillm_kernels)
    seqkd    cross entropy with responses that the teacher sampled once, before the first step (Kim & Rush, 2016)
    gkd      the loss of kd; a share of the steps on the student's own samples (Agarwal et al., ICLR 2024, alg. 1);
             the share can grow with the validation loss (DistiLLM, Ko et al., ICML 2024)

A method is made of the stage's context and a folder for its files. It offers what `Given` does: `step`, and `memory`
with `remember`, for checkpoints; those selected by their validation loss also `parts` and `validated`. Nothing is
differentiated through sampling. What a step draws is a function of the seed and the step's number, so that the number
alone is the position in the data; `memory` is all other state of a method: a rollout in use, a share that has grown.
"""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from minillm.data.examples import Batch, Example, Shuffled
from minillm.data.sources import DataError
from minillm.engine.rollout import engine_gap
from minillm.files import read_lines, write_atomically
from minillm.model.head import CausalLM, Output, Sums
from minillm.model.sampling import draw_uniforms
from minillm.parallel.gathered import gathered
from minillm.parallel.tensor import Loss
from minillm.teacher.served import ServedTeacher
from minillm.teacher.stored import StoredTeacher
from minillm.teacher.top_k import top_k_divergence
from minillm.terminal import say
from minillm.train.context import Context, Part, Step, chunks
from minillm_kernels import fused_linear_distill_loss, fused_linear_divergence_loss

LossOf = Callable[[Context, Output, Batch], Sums]
"""A loss, before it knows in which context."""


def sft(context: Context, folder: Path) -> "Given":
    """Cross entropy with the responses of the data."""
    return Given(context, context.examples, label_loss)


def kd(context: Context, folder: Path) -> "Given":
    """distill_weight · divergence(teacher, student) + label_weight · cross entropy, on the responses of the data."""
    return Given(context, context.examples, kd_loss, asks_teacher=True)


def seqkd(context: Context, folder: Path) -> "Given":
    """Cross entropy with the teacher's text, which is sampled once and kept (data.teacher_answers)."""
    return Given(context, with_teacher_responses(context, folder), label_loss)


class Given:
    """Learns from responses that exist before the first step."""

    def __init__(self, context: Context, examples: list[Example], loss: "LossOf", asks_teacher: bool = False) -> None:
        self.context, self.examples, self.loss, self.asks_teacher = context, examples, loss, asks_teacher
        self.order = Shuffled(len(examples), context.run.seed)
        self.memory: dict[str, Tensor] = {}

    def step(self, number: int) -> Step:
        """What step `number`, from 1, learns from."""
        return Step(self.parts(self.context.mine(self.drawn(number))), {})

    def drawn(self, number: int) -> list[Example]:
        """The examples of a step, over all processes."""
        size = self.context.config.optim.batch_size
        return [self.examples[i] for i in self.order.take((number - 1) * size, size)]

    def parts(self, examples: list[Example], loss: "LossOf | None" = None) -> list[Part]:
        """Examples with the loss of this method, those of each teacher apart; also those of the validation."""
        found = []
        for each, chosen in self.context.by_teacher(examples):
            own: Loss = partial(loss or self.loss, each)
            if self.asks_teacher:
                own = each.beside_teacher(own)
            found.append(Part("responses", chosen, own, self.context.row_length, self.asks_teacher))
        return found

    def validated(self, loss: float) -> None:
        """Called with each validation loss, which changes nothing here."""

    def remember(self, memory: dict[str, Tensor], number: int) -> None:
        """Restore the memory that step `number` left; here there is none."""


class Gkd:
    """The loss of kd, on the student's own samples for a share `rollout.on_policy` of the steps, else on the data."""

    def __init__(self, context: Context, folder: Path) -> None:
        self.context, self.given = context, kd(context, folder)
        self.parts = self.given.parts
        self.share = context.config.rollout.on_policy
        self.validation_loss = math.inf

    def step(self, number: int) -> Step:
        """What step `number`, from 1, learns from."""
        context = self.context
        coin = torch.rand((), generator=torch.Generator().manual_seed(context.run.seed * 1_000_003 - number))
        if float(coin.numpy()) >= self.share:  # drawn on the host, as all that decides about a step
            return self.given.step(number)
        drawn = self.given.drawn(number)
        rollout = context.roll_out(number, drawn, teacher=None, alpha=0.0, done=number - 1)
        pairs = zip(drawn, rollout.responses(), strict=True)
        examples = [example._replace(response=response, turns=()) for example, response in pairs]
        metrics = {"completions/mean_length": rollout.lengths.float().mean()}
        if rollout.engine_logprobs is not None:
            metrics["rollout/engine_gap"] = engine_gap(rollout)
        return Step(self.parts(context.mine(examples), on_policy_loss), metrics)

    def validated(self, loss: float) -> None:
        """Let the share grow when the validation loss has risen."""
        if loss >= self.validation_loss + 0.1:
            self.share = min(1.0, self.share + self.context.config.rollout.on_policy_step)
        self.validation_loss = loss

    @property
    def memory(self) -> dict[str, Tensor]:
        """The share as it has grown, and the validation loss that it has seen last."""
        values = {"on_policy": self.share, "validation_loss": self.validation_loss}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def remember(self, memory: dict[str, Tensor], number: int) -> None:
        """Restore the memory that step `number` left."""
        self.share, self.validation_loss = (float(memory[name]) for name in ("on_policy", "validation_loss"))


# ---- losses


def label_loss(context: Context, student: Output, batch: Batch) -> Sums:
    """Cross entropy with the targets."""
    return {"loss": cross_entropy(context, student, batch)}


def kd_loss(context: Context, student: Output, batch: Batch) -> Sums:
    """Divergence from the teacher and cross entropy with the targets."""
    settings = context.config.loss
    one_sweep = settings.divergence in ("forward_kl", "reverse_kl") and settings.temperature == 1
    if one_sweep and settings.support == "full":
        weights: dict[str, Any] = {settings.divergence: settings.distill_weight}
        loss, stats = fused_linear_distill_loss(
            *student,
            *context.score(batch),
            batch.targets,
            student_logprobs=-settings.label_weight,
            vocab_size=context.vocab_size,
            **weights,
        )
        label = -stats.student_logprobs.sum()
        return {"loss": loss, "loss/distill": getattr(stats, settings.divergence).sum(), "loss/label": label}
    distilled = divergence_from_teacher(context, student, batch)
    label = cross_entropy(context, student, batch)
    total = settings.distill_weight * distilled + settings.label_weight * label
    return {"loss": total, "loss/distill": distilled, "loss/label": label}


def on_policy_loss(context: Context, student: Output, batch: Batch) -> Sums:
    """The divergence alone: nobody says that the student's own samples are right."""
    distilled = divergence_from_teacher(context, student, batch)
    return {"loss": context.config.loss.distill_weight * distilled, "loss/distill": distilled}


def cross_entropy(context: Context, student: Output, batch: Batch) -> Tensor:
    """Summed over the targets, in nats."""
    return fused_linear_distill_loss(
        *student, token_ids=batch.targets, student_logprobs=-1.0, vocab_size=context.vocab_size
    ).loss


def divergence_from_teacher(context: Context, student: Output, batch: Batch) -> Tensor:
    """Summed over the targets, in nats."""
    settings = context.config.loss
    if settings.support == "top_k":
        assert isinstance(context.teacher, StoredTeacher)
        with context.clock("score"):
            law = context.teacher.law(batch)
        return top_k_divergence(
            student,
            law,
            settings.divergence,
            beta=settings.beta,
            temperature=settings.temperature,
            vocab_size=context.vocab_size,
        )
    return fused_linear_divergence_loss(
        *student,
        *context.score(batch),
        settings.divergence,
        beta=settings.beta,
        temperature=settings.temperature,
        reduction="sum",
        vocab_size=context.vocab_size,
    )


# ---- the teacher's text


def with_teacher_responses(context: Context, folder: Path) -> list[Example]:
    """The examples with the teacher's responses, read from a file that is written first where it does not exist.

    Raises DataError when the file is of other prompts.
    """
    path = Path(context.config.data.teacher_answers or folder / "teacher-answers.jsonl")
    if not path.exists():
        sample_teacher(context, path)
        context.accelerator.wait_for_everyone()
    kept = [json.loads(line) for line in read_lines(path)]
    if [line["prompt"] for line in kept] != [e.record.prompt for e in context.examples]:
        raise DataError(
            f"{path} answers other prompts than this run learns from: delete it, or name another file in "
            "data.teacher_answers"
        )
    return [e._replace(response=line["token_ids"], turns=()) for e, line in zip(context.examples, kept, strict=True)]


def sample_teacher(context: Context, path: Path) -> None:
    """Write one response of the teacher per example; the processes share the work. Until all exist, they stand in a
    file beside `path`, to which each batch is added: whatever interrupts, the next run goes on there."""
    teacher = context.teacher
    assert isinstance(teacher, CausalLM | ServedTeacher)
    rollout, examples, process = context.config.rollout, context.examples, context.accelerator
    uniforms = draw_uniforms(context.run.seed, rollout.longest, len(examples))
    unfinished = path.with_name(f"{path.name}.unfinished")
    kept = gather_object([_answers_in(unfinished, examples)])[0]  # as the first process sees them
    if process.is_main_process:
        write_atomically(unfinished, "".join(kept))
    with gathered(teacher):
        for part in chunks(list(range(len(kept), len(examples))), rollout.batch_size):
            mine = context.to_sample(part, teacher)
            sampled: list[list[int]] = []
            if mine or rollout.engine != "builtin":  # an engine is asked by all processes, or by none
                prompts = [examples[i].prompt_of_teacher for i in mine]
                if isinstance(teacher, CausalLM):
                    sampled = context.sample_responses(teacher, None, prompts, uniforms[:, mine], 0.0).responses()
                else:
                    sampled = teacher.sample(
                        prompts, context.decoding(0.0, rollout.longest), uniforms[:, mine], context.vocab_size
                    )
            answers = list(zip(mine, sampled, strict=True))
            numbered = sorted(dict(gather_object(answers)).items())  # of a host that samples together, once
            if process.is_main_process:
                with unfinished.open("a", encoding="utf-8") as file:
                    for i, response in numbered:
                        text = {"prompt": examples[i].record.prompt, "completion": context.tokenizer.decode(response)}
                        file.write(json.dumps(text | {"token_ids": response}, ensure_ascii=False) + "\n")
                say(f"teacher answers  {part[-1] + 1}/{len(examples)}")
    if process.is_main_process:
        os.replace(unfinished, path)


def _answers_in(path: Path, examples: list[Example]) -> list[str]:
    """The whole lines of an unfinished file; none where it answers other prompts."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    prompts = [json.loads(line)["prompt"] for line in lines]
    alike = prompts == [e.record.prompt for e in examples[: len(lines)]]
    return [f"{line}\n" for line in lines] if alike else []
