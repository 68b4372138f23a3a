"""What a method gets to work with, its context, and what it gives back for each optimiser step."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from minillm.config.schema import RunConfig, StageConfig
from minillm.data.examples import Batch, Example
from minillm.engine import Engine
from minillm.engine.pair import Draw, draw, engine_of
from minillm.engine.rollout import drawn, read
from minillm.model.coins import share_coins
from minillm.model.head import CausalLM, Output, share_vocabulary
from minillm.model.load import packs_in_one_row
from minillm.model.rollout import Rollout, add_teacher, gather_processes, rescore
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.parallel.gathered import gathered
from minillm.parallel.shard import is_sharded
from minillm.parallel.tensor import Loss, joined, share_of_work
from minillm.run.clock import Clock
from minillm.teacher import Teacher
from minillm.teacher.choose import Elsewhere, ends_of
from minillm.teacher.own_base import MovingAverage
from minillm.teacher.routed import Routed, by_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Part(NamedTuple):
    """Examples of a step that share a loss; any of them can be put into a batch together.

    Losses of one kind are normalised together, by the number of their targets over all processes.
    """

    kind: str
    examples: list[Example]
    """This process's share."""
    loss: Loss
    row_length: int = 0
    """As in `collate`."""
    asks_teacher: bool = False
    """Whether the loss asks the teacher about each batch."""

    def batch(self, examples: list[Example]) -> Batch:
        """A micro-batch of some of the examples."""
        return Batch.of(examples, self.row_length)


class Micro(NamedTuple):
    """A micro-batch: what goes through one forward and backward pass, and the part it is of."""

    part: Part
    batch: Batch


class Step(NamedTuple):
    """What one optimiser step learns from, and what is known about it already."""

    parts: list[Part]
    metrics: dict[str, Tensor]
    """Numbers on the device, the same in every process; the loop reads them together with its own."""


@dataclass
class Context:
    """All that a method may use in a stage. The models live on `accelerator.device`."""

    run: RunConfig
    config: StageConfig
    """The stage's."""
    accelerator: Accelerator
    student: CausalLM
    teacher: Teacher | None
    tokenizer: "PreTrainedTokenizerBase"
    examples: list[Example]
    validation: list[Example]
    text: list[list[int]]
    """Chunks of plain text."""
    about: str = ""
    """What the data filters did, in words."""
    clock: Clock = field(default_factory=Clock)

    routed: Routed | None = None
    """Several teachers, each for the examples that name it; then `teacher` is None."""
    route: str = ""
    """Of several teachers, which one is the teacher of this context."""
    average: MovingAverage | None = field(init=False, default=None)
    """Of the student, where that is the teacher; the loop moves it."""

    def __post_init__(self) -> None:
        if self.teacher is not None:
            share_vocabulary(self.student, self.teacher)
            if self.run.teacher.source == "ema":
                assert isinstance(self.teacher, CausalLM)
                self.average = MovingAverage(self.student, self.teacher, self.run.teacher.decay)
        if self.routed is not None:
            share_vocabulary(self.student, *self.teachers)

    @property
    def teachers(self) -> list[Teacher]:
        """The teacher, or all of several."""
        if self.routed is not None:
            return list(self.routed.teachers.values())  # type: ignore[arg-type]
        return [] if self.teacher is None else [self.teacher]

    def by_teacher(self, examples: list[Example]) -> "list[tuple[Context, list[Example]]]":
        """The examples of each teacher, with the context in which it is the one."""
        if self.routed is None or self.config.method not in ("kd", "gkd"):
            return [(self, examples)]
        chosen = by_name(examples)
        return [(context, chosen[name]) for name, context in self._of_teachers.items() if name in chosen]

    @cached_property
    def _of_teachers(self) -> "dict[str, Context]":
        """This context as it is for the records of each of several teachers."""
        assert self.routed is not None
        teachers: dict[str, Any] = dict(self.routed.teachers.items())
        stages, examples = {name: self.routed.stage(name, self.config) for name in teachers}, by_name(self.examples)
        return {
            name: replace(
                self, config=stages[name], teacher=teacher, examples=examples.get(name, []), routed=None, route=name
            )
            for name, teacher in teachers.items()
        }

    @property
    def vocab_size(self) -> int:
        """The one vocabulary size that every kernel call gets."""
        return self.student.vocab_size

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        return ends_of(self.tokenizer, self.run.data, (self.student, *self.teachers))

    @property
    def row_length(self) -> int:
        """Tokens that a row of a batch may hold of several sequences; 0: a row each."""
        data = self.config.data
        if not data.packing:
            return 0
        models = [lm.model for lm in (self.student, *self.teachers) if isinstance(lm, CausalLM)]
        if any(packs_in_one_row(model) for model in models):
            return sys.maxsize
        return data.max_prompt_length + data.max_response_length

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.run, self.accelerator)

    def autocast(self) -> torch.autocast:
        """The student's forward passes in `compute_dtype`. The weights that are trained are cast once per context;
        what is frozen, a teacher or the base below adapters, is in its own dtype already, and a sharded student is
        gathered in `compute_dtype`."""
        device, dtype = self.accelerator.device.type, self.compute_dtype
        if is_sharded(self.student):
            return torch.autocast(device, enabled=False)
        trained = {parameter.dtype for parameter in self.student.model.parameters() if parameter.requires_grad}
        return torch.autocast(device, dtype, enabled=dtype != torch.float32 and trained != {dtype})

    def mine(self, items: list) -> list:
        """This process's share of what all processes draw alike."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def to_sample(self, items: list, *models: Teacher | None) -> list:
        """Of what these models sample, the share of this process, or of its host where that computes one together."""
        share, shares = share_of_work(*models)
        return items[share::shares]

    def decoding(self, alpha: float, limit: int) -> Decoding:
        """How the section `rollout` says that responses of a mixture are drawn, of at most `limit` tokens."""
        rollout = self.config.rollout
        return Decoding(
            limit,
            self.ends,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            coins_first=rollout.coins != "row" and alpha > 0,
            chunk_size=rollout.chunk_size,
            graphs=None if rollout.cuda_graphs == "auto" else bool(rollout.cuda_graphs),
        )

    def sample_responses(
        self, student: CausalLM, teacher: Teacher | None, prompts: list[list[int]], uniforms: Tensor, alpha: float
    ) -> Rollout:
        """Responses of the mixture of these two, drawn as the section `rollout` says."""
        if self.config.rollout.engine != "builtin":
            return self._drawn_by_engines(student, teacher, prompts, uniforms, alpha)
        return sample(
            student,
            teacher,
            prompts,
            self.decoding(alpha, len(uniforms)),
            alpha=alpha,
            uniforms=uniforms,
            vocab_size=self.vocab_size,
            row_length=self.row_length,
            student_states=False,
        )

    def engine(self, lm: CausalLM) -> Engine:
        """The engine of the student, its older copy or a teacher. Raises ConfigError where there can be none."""
        taught = all(lm is not teacher for teacher in self.teachers)
        dtype = self.compute_dtype if taught else None
        return engine_of(lm, self.run.engine, dtype, changes=taught and lm is not self.student)

    def _drawn_by_engines(
        self, student: CausalLM, teacher: Teacher | None, prompts: list[list[int]], uniforms: Tensor, alpha: float
    ) -> Rollout:
        """Drawn by engines, then read by our own models. The teacher's own answers are text, of which nothing else is
        asked, and log-probs of a filtered law are nobody's."""
        decoding, beside = self.decoding(alpha, len(uniforms)), teacher if alpha > 0 else None
        assert beside is None or isinstance(beside, CausalLM)  # prepare refuses others
        engines = self.engine(student), None if beside is None else self.engine(beside)
        how = Draw(student, beside, alpha, decoding, self.vocab_size)
        rollout = drawn(draw(how, engines, prompts, uniforms), student.device)
        if student is self.teacher or decoding.temperature == 0 or decoding.top_k or decoding.top_p < 1:
            return rollout
        with self.clock("score") if student is self.student else nullcontext():  # a thread of its own is not timed
            return read(
                rollout,
                student,
                teacher,
                alpha,
                temperature=decoding.temperature,
                vocab_size=self.vocab_size,
                row_length=self.row_length,
            )

    def roll_out(
        self, iteration: int, examples: list[Example], teacher: Teacher | None, alpha: float, done: int = 0
    ) -> Rollout:
        """The student's responses, or the mixture's, to these prompts: the processes share the work, and all of them
        know the result. `done`: the steps of the stage, on which the limit of tokens may depend.
        """
        with self.clock("rollout"):
            found = self.draw(self.student, iteration, examples, teacher, alpha, done)
            return self.of_all(found, teacher)

    def draw(
        self,
        student: CausalLM,
        iteration: int,
        examples: list[Example],
        teacher: Teacher | None,
        alpha: float,
        done: int,
    ) -> Rollout:
        """This process's share of a rollout of `student`; its host's where processes compute the teacher together."""
        seed, coins = self.run.seed * 1_000_003 + iteration, self.config.rollout.coins
        uniforms = draw_uniforms(seed, self.config.rollout.limit(done), len(examples))
        if coins != "row":
            uniforms = share_coins(uniforms, coins)
        rows = self.to_sample(list(range(len(examples))), teacher)
        prompts = [examples[row].prompt for row in rows]
        told = any(example.teacher_prompt is not None for example in examples)  # then alpha is 0
        mixed_in = teacher if alpha > 0 else None  # else it reads the responses: as often on every process
        with self.autocast(), gathered(student, mixed_in):
            rollout = self.sample_responses(student, None if told else teacher, prompts, uniforms[:, rows], alpha)
            if told and teacher is not None:
                private = rollout._replace(prompts=[examples[row].prompt_of_teacher for row in rows])
                rollout = add_teacher(private, teacher, 1.0, self.vocab_size, self.row_length)
                rollout = rollout._replace(prompts=prompts)
            decoded = self.config.rollout.engine == "builtin"
            if decoded and teacher is not None and self.compute_dtype != torch.float32:
                rollout = rescore(rollout, student, teacher, alpha, self.vocab_size, self.row_length)
            return rollout

    def of_all(self, rollout: Rollout, teacher: Teacher | None) -> Rollout:
        """The rollout of all processes. Those that compute a teacher together have sampled their host's together."""
        return gather_processes(rollout, getattr(teacher, "copies", None))

    def ask_ahead(self, micros: list[Micro], following: list[Micro]) -> Iterator[Micro]:
        """The micro-batches, one by one. A teacher that is not here has by then been asked about each, and about
        `teacher.prefetch` of those after it, the `following` ones of the next step included, which stand in their list
        with what was asked."""
        upcoming = [(part, i) for part in (micros, following) for i in range(len(part))]
        for now in range(len(micros)):
            for part, i in upcoming[: now + 1 + self.run.teacher.prefetch]:
                asks = part[i].part.asks_teacher and part[i].batch.asked is None
                if asks and isinstance(self.teacher, Elsewhere):
                    batch = part[i].batch
                    part[i] = part[i]._replace(batch=batch._replace(asked=self.teacher.ask(batch.for_teacher)))
            yield micros[now]

    @torch.no_grad()
    def score(self, batch: Batch) -> Output:
        """The teacher's output on a batch."""
        assert self.teacher is not None
        if batch.teacher_states is not None:
            return Output(batch.teacher_states, self.teacher.head)
        with self.clock("score"):
            return self.teacher.output(batch.for_teacher)

    def beside_teacher(self, loss: Loss) -> Loss:
        """A loss that reads the teacher's head, which several processes may hold together."""
        return joined(loss, self.teacher, self.score)


def compute_dtype(run: RunConfig, accelerator: Accelerator) -> torch.dtype:
    """In which the student's layers compute."""
    asked, launched = run.model.compute_dtype, accelerator.mixed_precision
    if run.model.dtype != "float32":
        return getattr(torch, run.model.dtype)
    if asked != "auto":
        return getattr(torch, asked)
    if launched in ("bf16", "fp16"):
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[launched]
    return torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32


def chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
