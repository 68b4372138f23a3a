"""What a method gets to work with, its context, and what it gives back for each optimiser step."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from minillm.config.schema import RunConfig, StageConfig
from minillm.data.examples import Batch, Example
from minillm.model.coins import share_coins
from minillm.model.head import CausalLM, Output, Sums, share_vocabulary
from minillm.model.load import end_tokens, packs_in_one_row
from minillm.model.rollout import Rollout, gather_processes, rescore
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.parallel.gathered import gathered
from minillm.parallel.shard import is_sharded
from minillm.parallel.tensor import output_of, runs_together
from minillm.run.clock import Clock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loss = Callable[[Output, Batch], Sums]
"""Sums over the targets of a batch, from the student's output on it."""


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

    def batch(self, examples: list[Example]) -> Batch:
        """A micro-batch of some of the examples."""
        return Batch.of(examples, self.row_length)


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
    teacher: CausalLM | None
    tokenizer: "PreTrainedTokenizerBase"
    examples: list[Example]
    validation: list[Example]
    text: list[list[int]]
    """Chunks of plain text."""
    about: str = ""
    """What the data filters did, in words."""
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        if self.teacher is not None:
            share_vocabulary(self.student, self.teacher)

    @property
    def vocab_size(self) -> int:
        """The one vocabulary size that every kernel call gets."""
        return self.student.vocab_size

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        models = [lm.model for lm in (self.student, self.teacher) if lm is not None]
        return end_tokens(self.tokenizer, self.run.data, models)

    @property
    def row_length(self) -> int:
        """Tokens that a row of a batch may hold of several sequences; 0: a row each."""
        data = self.config.data
        if not data.packing:
            return 0
        models = [lm.model for lm in (self.student, self.teacher) if lm is not None]
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

    def to_sample(self, items: list, *models: CausalLM | None) -> list:
        """This process's share of what these models sample: all of it where processes compute one of them together."""
        return items if any(map(runs_together, models)) else self.mine(items)

    def sample_responses(
        self, student: CausalLM, teacher: CausalLM | None, prompts: list[list[int]], uniforms: Tensor, alpha: float
    ) -> Rollout:
        """Responses of the mixture of these two, drawn as the section `rollout` says."""
        rollout = self.config.rollout
        return sample(
            student,
            teacher,
            prompts,
            Decoding(
                rollout.max_new_tokens,
                self.ends,
                temperature=rollout.temperature,
                top_k=rollout.top_k,
                top_p=rollout.top_p,
                coins_first=rollout.coins != "row" and alpha > 0,
                chunk_size=rollout.chunk_size,
            ),
            alpha=alpha,
            uniforms=uniforms,
            vocab_size=self.vocab_size,
            row_length=self.row_length,
            student_states=False,
        )

    def roll_out(self, iteration: int, examples: list[Example], teacher: CausalLM | None, alpha: float) -> Rollout:
        """The student's responses, or the mixture's, to these prompts: the processes share the work, and all of them
        know the result. Those that compute a teacher together sample all of them together.
        """
        seed = self.run.seed * 1_000_003 + iteration
        uniforms, coins = (
            draw_uniforms(seed, self.config.rollout.max_new_tokens, len(examples)),
            self.config.rollout.coins,
        )
        if coins != "row":
            uniforms = share_coins(uniforms, coins)
        rows = self.to_sample(list(range(len(examples))), teacher)
        prompts = [examples[row].prompt for row in rows]
        mixed_in = teacher if alpha > 0 else None  # else it reads the responses: as often on every process
        with self.clock("rollout"), self.autocast(), gathered(self.student, mixed_in):
            rollout = self.sample_responses(self.student, teacher, prompts, uniforms[:, rows], alpha)
            if teacher is not None and self.compute_dtype != torch.float32:
                rollout = rescore(rollout, self.student, teacher, alpha, self.vocab_size, self.row_length)
            return rollout if runs_together(teacher) else gather_processes(rollout, self.accelerator)

    @torch.no_grad()
    def score(self, batch: Batch) -> Output:
        """The teacher's output on a batch."""
        assert self.teacher is not None
        with self.clock("score"):
            return output_of(self.teacher, batch)


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
