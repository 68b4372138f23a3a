"""The methods that MiniLLM is compared with: where each step gets its responses, and its loss on them.

    sft      cross entropy with the responses of the data
    kd       word-level distillation on the responses of the data (any divergence of minillm_kernels)
    seqkd    cross entropy with responses that the teacher sampled once, before the first step (Kim & Rush, 2016)
    gkd      the loss of kd; a share of the steps on the student's own samples (Agarwal et al., ICLR 2024, alg. 1);
             the share can grow with the validation loss (DistiLLM, Ko et al., ICML 2024)

A method is made of the stage's context and a folder for its files. It offers what `Given` does: `step`, and `memory`
with `remember`, for checkpoints; those selected by their validation loss also `part` and `validated`. Nothing is
differentiated through sampling. What a step draws is a function of the seed and the step's number, so that the number
alone is the position in the data; `memory` is all other state of a method: a rollout in use, a share that has grown.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from minillm.data.examples import Batch, Example, Shuffled
from minillm.data.sources import DataError
from minillm.files import read_lines, write_atomically
from minillm.model.head import Output, Sums
from minillm.model.sampling import draw_uniforms
from minillm.parallel.gathered import gathered
from minillm.parallel.tensor import runs_together
from minillm.terminal import say
from minillm.train.context import Context, Loss, Part, Step, chunks
from minillm_kernels import fused_linear_distill_loss, fused_linear_divergence_loss


def sft(context: Context, folder: Path) -> "Given":
    """Cross entropy with the responses of the data."""
    return Given(context, context.examples, partial(label_loss, context))


def kd(context: Context, folder: Path) -> "Given":
    """distill_weight · divergence(teacher, student) + label_weight · cross entropy, on the responses of the data."""
    return Given(context, context.examples, partial(kd_loss, context))


def seqkd(context: Context, folder: Path) -> "Given":
    """Cross entropy with the teacher's text, which is sampled once and kept (data.teacher_answers)."""
    return Given(context, with_teacher_responses(context, folder), partial(label_loss, context))


class Given:
    """Learns from responses that exist before the first step."""

    def __init__(self, context: Context, examples: list[Example], loss: Loss) -> None:
        self.context, self.examples, self.loss = context, examples, loss
        self.order = Shuffled(len(examples), context.run.seed)
        self.memory: dict[str, Tensor] = {}

    def step(self, number: int) -> Step:
        """What step `number`, from 1, learns from."""
        return Step([self.part(self.context.mine(self.drawn(number)))], {})

    def drawn(self, number: int) -> list[Example]:
        """The examples of a step, over all processes."""
        size = self.context.config.optim.batch_size
        return [self.examples[i] for i in self.order.take((number - 1) * size, size)]

    def part(self, examples: list[Example]) -> Part:
        """Examples with the loss of this method; also those of the validation."""
        return Part("responses", examples, self.loss, self.context.row_length)

    def validated(self, loss: float) -> None:
        """Called with each validation loss, which changes nothing here."""

    def remember(self, memory: dict[str, Tensor], number: int) -> None:
        """Restore the memory that step `number` left; here there is none."""


class Gkd:
    """The loss of kd, on the student's own samples for a share `rollout.on_policy` of the steps, else on the data."""

    def __init__(self, context: Context, folder: Path) -> None:
        self.context, self.given = context, kd(context, folder)
        self.part = self.given.part
        self.share = context.config.rollout.on_policy
        self.validation_loss = math.inf

    def step(self, number: int) -> Step:
        """What step `number`, from 1, learns from."""
        context = self.context
        coin = torch.rand((), generator=torch.Generator().manual_seed(context.run.seed * 1_000_003 - number))
        if float(coin.numpy()) >= self.share:  # drawn on the host, as all that decides about a step
            return self.given.step(number)
        drawn = self.given.drawn(number)
        rollout = context.roll_out(number, drawn, teacher=None, alpha=0.0)
        pairs = zip(drawn, rollout.responses(), strict=True)
        examples = [example._replace(response=response, turns=()) for example, response in pairs]
        part = self.part(context.mine(examples))._replace(loss=partial(on_policy_loss, context))
        return Step([part], {"completions/mean_length": rollout.lengths.float().mean()})

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
    if settings.divergence in ("forward_kl", "reverse_kl") and settings.temperature == 1:  # one sweep for both
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
        sampled = sample_teacher(context)
        if context.accelerator.is_main_process:
            lines = (
                {"prompt": e.record.prompt, "completion": context.tokenizer.decode(r), "token_ids": r}
                for e, r in zip(context.examples, sampled, strict=True)
            )
            write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        context.accelerator.wait_for_everyone()
    kept = [json.loads(line) for line in read_lines(path)]
    if [line["prompt"] for line in kept] != [e.record.prompt for e in context.examples]:
        raise DataError(
            f"{path} answers other prompts than this run learns from: delete it, or name another file in "
            "data.teacher_answers"
        )
    return [e._replace(response=line["token_ids"], turns=()) for e, line in zip(context.examples, kept, strict=True)]


def sample_teacher(context: Context) -> list[list[int]]:
    """One response of the teacher per example; the processes share the work."""
    assert context.teacher is not None
    rollout, everything = context.config.rollout, list(range(len(context.examples)))
    numbers = context.to_sample(everything, context.teacher)
    uniforms = draw_uniforms(context.run.seed, rollout.max_new_tokens, len(context.examples))
    size = max(1, rollout.batch_size // context.accelerator.num_processes)
    mine: list[tuple[int, list[int]]] = []
    with gathered(context.teacher):
        for part in chunks(numbers, size):
            prompts = [context.examples[i].prompt for i in part]
            samples = context.sample_responses(context.teacher, None, prompts, uniforms[:, part], alpha=0.0)
            mine += zip(part, samples.responses(), strict=True)
            if context.accelerator.is_main_process:
                say(f"teacher answers  {len(mine)}/{len(numbers)}")
    return [response for _, response in sorted(mine if runs_together(context.teacher) else gather_object(mine))]
