"""The methods: where each optimiser step gets its sequences, and what it loses on them.

    sft      cross entropy with the reference answers
    kd       word-level distillation on the reference answers (any divergence of minillm_kernels)
    seqkd    cross entropy with answers that the teacher sampled once, before the first step (Kim & Rush, 2016)
    gkd      the loss of kd; a share of the steps on the student's own samples (Agarwal et al., ICLR 2024, alg. 1);
             the share can grow with the validation loss (DistiLLM, Ko et al., ICML 2024)
    minillm  minillm/train/minillm.py

Nothing is differentiated through sampling. Whatever a step draws is a function of the seed and its number, so that a
position in the data is a step's number; `memory` is all other state of a method: samples in use, a share that grew.
"""

import json
import math
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from minillm.data.examples import Batch, Example, Shuffled, collate
from minillm.data.sources import DataError
from minillm.files import read_lines, write_atomically
from minillm.model.head import Output, Sums, cross_entropy, distill_loss, divergence, minillm_loss
from minillm.model.sampling import Rollout, draw_uniforms
from minillm.train.context import Loss, Part, Step, Training, chunks
from minillm.train.minillm import concatenate, policy_terms, token_rewards, whiten


class Sft:
    """Cross entropy with the reference answers; also the frame of the methods that learn from answers."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.training = training
        self.examples = training.examples
        self.order = Shuffled(len(self.examples), training.run.seed)
        self.memory: dict[str, Tensor] = {}

    def step(self, number: int) -> Step:
        """What step `number`, from 1, learns from."""
        return Step([self.answers(self.examples, self.training.mine(self.drawn(number)))], {})

    def remember(self, memory: dict[str, Tensor], number: int) -> None:
        """Take up what step `number` had in use: here nothing outlives a step."""

    def validated(self, loss: float) -> None:
        """Hear the validation loss: here nothing follows from it."""

    def drawn(self, number: int) -> list[int]:
        size = self.training.config.optim.batch_size
        return self.order.take((number - 1) * size, size)

    def answers(self, examples: list[Example], rows: list[int]) -> Part:
        def make(rows: list[int]) -> tuple[Batch, Loss]:
            chosen = [examples[i] for i in rows]
            batch = self.training.collate(
                [e.prompt for e in chosen], [e.response for e in chosen], [e.turns for e in chosen]
            )
            return batch, self.loss

        return Part("answers", rows, make, lambda i: examples[i].record.where)

    def loss(self, student: Output, batch: Batch) -> Sums:
        return {"loss": cross_entropy(student, batch.targets, self.training.vocab_size)}


class Kd(Sft):
    """distill_weight · divergence(teacher, student) + label_weight · cross entropy, on the reference answers."""

    def loss(self, student: Output, batch: Batch) -> Sums:
        settings, vocab_size = self.training.config.loss, self.training.vocab_size
        if settings.divergence in ("forward_kl", "reverse_kl") and settings.temperature == 1:  # one sweep for both
            weights = {settings.divergence: settings.distill_weight, "student_logprobs": -settings.label_weight}
            target = self.training.score(batch)
            loss, stats = distill_loss(student, target, batch.targets, vocab_size=vocab_size, **weights)
            label = -stats.student_logprobs.sum()
            return {"loss": loss, "loss/distill": getattr(stats, settings.divergence).sum(), "loss/label": label}
        distilled = self.distilled(student, batch)
        label = cross_entropy(student, batch.targets, vocab_size)
        total = settings.distill_weight * distilled["loss/distill"] + settings.label_weight * label
        return {"loss": total, **distilled, "loss/label": label}

    def distilled(self, student: Output, batch: Batch) -> Sums:
        settings, vocab_size = self.training.config.loss, self.training.vocab_size
        target = self.training.score(batch)
        options = {"beta": settings.beta, "temperature": settings.temperature, "vocab_size": vocab_size}
        return {"loss/distill": divergence(student, target, settings.divergence, **options)}


class SeqKd(Sft):
    """Cross entropy with the teacher's text: sampled once and kept (data.teacher_answers), then read."""

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        path = Path(training.config.data.teacher_answers or folder / "teacher-answers.jsonl")
        if not path.exists():
            sampled = teacher_answers(training)
            if training.accelerator.is_main_process:
                lines = (
                    {"prompt": e.record.prompt, "completion": training.tokenizer.decode(r), "token_ids": r}
                    for e, r in zip(self.examples, sampled, strict=True)
                )
                write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            training.accelerator.wait_for_everyone()
        answers = [json.loads(line) for line in read_lines(path)]
        if [answer["prompt"] for answer in answers] != [e.record.prompt for e in self.examples]:
            raise DataError(
                f"{path} answers other prompts than this run learns from: delete it, or name another file in "
                "data.teacher_answers"
            )
        self.examples = [e._replace(response=a["token_ids"]) for e, a in zip(self.examples, answers, strict=True)]


class Gkd(Kd):
    """The loss of kd, on the student's own samples for a share `rollout.on_policy` of the steps, else on answers."""

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        share = torch.tensor(training.config.rollout.on_policy, dtype=torch.float64)
        self.memory = {"on_policy": share, "validation_loss": torch.tensor(math.inf, dtype=torch.float64)}

    def remember(self, memory: dict[str, Tensor], number: int) -> None:
        self.memory = memory

    def validated(self, loss: float) -> None:
        if loss >= self.memory["validation_loss"] + 0.1:
            grown = self.memory["on_policy"] + self.training.config.rollout.on_policy_step
            self.memory["on_policy"] = grown.clamp(max=1)
        self.memory["validation_loss"] = torch.full_like(self.memory["validation_loss"], loss)

    def step(self, number: int) -> Step:
        training, seed = self.training, self.training.run.seed
        coin = torch.rand((), generator=torch.Generator().manual_seed(seed * 1_000_003 - number))
        if coin >= self.memory["on_policy"]:
            return super().step(number)
        chosen = self.drawn(number)
        rollout = training.roll_out(number, chosen, alpha=0.0)
        examples = [
            self.examples[i]._replace(response=response, turns=())
            for i, response in zip(chosen, rollout.responses(), strict=True)
        ]
        part = self.answers(examples, training.mine(list(range(len(examples)))))

        def make(rows: list[int]) -> tuple[Batch, Loss]:
            return part.make(rows)[0], self.loss_on_policy

        return Step([part._replace(make=make)], {"completions/mean_length": float(rollout.lengths.float().mean())})

    def loss_on_policy(self, student: Output, batch: Batch) -> Sums:
        """No labels here: the student's own samples are nobody's reference."""
        distilled = self.distilled(student, batch)
        return {"loss": self.training.config.loss.distill_weight * distilled["loss/distill"], **distilled}


class MiniLLM:
    """The paper's algorithm: roll out a batch of prompts, then pass over it `rollout.epochs` times in minibatches."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.training, config, seed = training, training.config, training.run.seed
        self.prompts = Shuffled(len(training.examples), seed)
        self.passages = Shuffled(len(training.text), seed + 1)
        self.minibatches = Shuffled(config.rollout.batch_size, seed + 2)
        self.rollout: Rollout | None = None

    def step(self, number: int) -> Step:
        training, config, done = self.training, self.training.config, number - 1
        iteration, used = divmod(done, config.rollout.epochs * config.rollout.batch_size // config.optim.batch_size)
        chosen = self.prompts.take(iteration * config.rollout.batch_size, config.rollout.batch_size)

        # ---- rollout: everything about the sampled tokens is known from here on
        if used == 0 or self.rollout is None:
            rollout = training.roll_out(iteration, chosen, config.rollout.alpha)
            self.rollout = rollout._replace(student_hidden=None)  # formed again, with a gradient
        rollout, responses = self.rollout, self.rollout.responses()

        # ---- the minibatch of this step
        rows = self.minibatches.take(done * config.optim.batch_size, config.optim.batch_size)
        terms = policy_terms(rollout, config.objective)
        if config.objective.whiten:
            for row, whitened in zip(rows, whiten([terms[i] for i in rows]), strict=True):
                terms[row] = whitened

        def make(rows: list[int]) -> tuple[Batch, Loss]:
            assert training.teacher is not None and rollout.teacher_hidden is not None
            batch = training.collate([rollout.prompts[i] for i in rows], [responses[i] for i in rows])
            states = torch.cat([rollout.teacher_hidden[i, : len(responses[i])] for i in rows])
            constants = concatenate([terms[i] for i in rows])._asdict()
            teacher = Output(states, training.teacher.head)
            return batch, lambda student, batch: self.policy_loss(student, teacher, batch, constants)

        def name(row: int) -> str:
            return training.examples[chosen[row]].record.where

        parts = [Part("responses", training.mine(rows), make, name)]
        if config.objective.pt_weight > 0:
            size = config.objective.pt_batch_size
            drawn = training.mine(self.passages.take(done * size, size))
            parts.append(Part("text", drawn, self.make_text, lambda i: f"{config.data.text}, chunk {i + 1}"))
        return Step(parts, describe(rollout))

    def policy_loss(self, student: Output, teacher: Output, batch: Batch, constants: dict[str, Tensor]) -> Sums:
        """Single + Long on sampled tokens, from what the rollout kept: the teacher's states and the constants."""
        settings = self.training.config.objective
        result = minillm_loss(
            student,
            teacher,
            batch.targets,
            **constants,
            mask=torch.ones_like(batch.targets, dtype=torch.bool),
            clip_range=settings.clip_range or math.inf,
            single_step=float(settings.single_step),
            weight_single_step=settings.weight_single_step,
            normalizer=1.0,  # sums: the loop divides
            vocab_size=self.training.vocab_size,
        )
        return {
            "loss": result.loss,
            "loss/policy": result.policy_loss,
            "loss/single_step": result.single_step_loss,
            "kl/reverse": result.reverse_kl.sum(),
            "entropy": result.entropy.sum(),
            "clip_fraction": result.clip_fraction * len(batch.targets),
        }

    def make_text(self, rows: list[int]) -> tuple[Batch, Loss]:
        texts = [self.training.text[i] for i in rows]
        return collate([text[:1] for text in texts], [text[1:] for text in texts]), self.text_loss

    def text_loss(self, student: Output, batch: Batch) -> Sums:
        """L_PT: cross entropy with the text and, for a share pt_teacher, with the teacher's distribution."""
        settings, vocab_size = self.training.config.objective, self.training.vocab_size
        if settings.pt_teacher:
            weights = {"forward_kl": settings.pt_teacher, "student_logprobs": settings.pt_teacher - 1}
            target = self.training.score(batch)
            total = distill_loss(student, target, batch.targets, vocab_size=vocab_size, **weights).loss
        else:
            total = cross_entropy(student, batch.targets, vocab_size)
        return {"loss": settings.pt_weight * total, "loss/pt": total}

    @property
    def memory(self) -> dict[str, Tensor]:
        """The rollouts still in use, but the prompts, which are drawn again."""
        fields = self.rollout._asdict() if self.rollout is not None else {}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}

    def remember(self, memory: dict[str, Tensor], number: int) -> None:
        """Take up the rollouts that step `number` had in use."""
        config = self.training.config
        iteration = (number - 1) // (config.rollout.epochs * config.rollout.batch_size // config.optim.batch_size)
        chosen = self.prompts.take(iteration * config.rollout.batch_size, config.rollout.batch_size)
        prompts = [self.training.examples[i].prompt for i in chosen]
        self.rollout = Rollout(prompts=prompts, student_hidden=None, **memory)


METHODS: dict[str, type[Sft] | type[MiniLLM]] = {
    "sft": Sft, "kd": Kd, "seqkd": SeqKd, "gkd": Gkd, "minillm": MiniLLM,
}  # fmt: skip

# ---- helpers


def teacher_answers(training: Training) -> list[list[int]]:
    """One sample of the teacher per example, shared out over the processes."""
    assert training.teacher is not None
    rollout, numbers = training.config.rollout, training.mine(list(range(len(training.examples))))
    uniforms = draw_uniforms(training.run.seed, rollout.max_new_tokens, len(training.examples))
    size = max(1, rollout.batch_size // training.accelerator.num_processes)
    mine: list[tuple[int, list[int]]] = []
    for part in chunks(numbers, size):
        samples = training.sample(training.teacher, None, part, uniforms[:, part], alpha=0.0)
        mine += zip(part, samples.responses(), strict=True)
        if training.accelerator.is_main_process:
            print(f"teacher answers  {len(mine)}/{len(numbers)}", flush=True)
    return [response for _, response in sorted(gather_object(mine))]


def describe(rollout: Rollout) -> dict[str, float]:
    """Means per token, and the mean length, of what all processes sampled."""
    mask, tokens = rollout.mask, rollout.lengths.sum()
    return {
        "reward/mean": float(token_rewards(rollout)[mask].sum() / tokens),
        "rollout/from_teacher": float(rollout.from_teacher[mask].sum() / tokens),
        "completions/mean_length": float(tokens / len(rollout.lengths)),
    }
