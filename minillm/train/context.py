"""What a step is made of: its parts, and all that a method (minillm/train/baselines.py) may use to make them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from minillm.config.schema import RunConfig, StageConfig
from minillm.data.examples import Batch, Example, collate
from minillm.model.head import CausalLM, Output, Sums, common_vocabulary
from minillm.model.sampling import Rollout, draw_uniforms, gather, sample
from minillm.run.clock import Clock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loss = Callable[[Output, Batch], Sums]


class Part(NamedTuple):
    """Sequences of a step, known by row numbers, of which micro-batches of any size can be made.

    Losses of one kind are normalised together, by the number of their targets over all processes.
    """

    kind: str
    rows: list[int]
    """This process's share."""
    make: Callable[[list[int]], tuple[Batch, Loss]]
    name: Callable[[int], str]
    """Where a row came from, for messages."""


class Step(NamedTuple):
    """What one optimiser step learns from, and what is known about it already."""

    parts: list[Part]
    metrics: dict[str, float]


@dataclass
class Training:
    """All that a method may use. The models live on `accelerator.device`."""

    run: RunConfig
    config: StageConfig
    """Of this stage."""
    accelerator: Accelerator
    student: CausalLM
    teacher: CausalLM | None
    tokenizer: "PreTrainedTokenizerBase"
    examples: list[Example]
    validation: list[Example]
    text: list[list[int]]
    about: str = ""
    """What the data filters did, in words."""
    clock: Clock = field(default_factory=Clock)

    @property
    def vocab_size(self) -> int | None:
        """The one vocabulary size that every kernel call gets."""
        return None if self.teacher is None else common_vocabulary(self.student, self.teacher)

    def mine(self, items: list) -> list:
        """This process's share of what all processes draw alike."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def collate(
        self,
        prompts: list[list[int]],
        responses: list[list[int]],
        turns: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> Batch:
        """A batch, packed where data.packing says so."""
        return collate(prompts, responses, self.row_length, turns)

    @property
    def row_length(self) -> int:
        """Tokens that a row of a batch may hold of several sequences; 0: a row each."""
        data = self.config.data
        return data.max_prompt_length + data.max_response_length if data.packing else 0

    def sample(
        self, student: CausalLM, teacher: CausalLM | None, numbers: list[int], uniforms: Tensor, alpha: float
    ) -> Rollout:
        """Samples for the prompts of these examples, as section `rollout` says."""
        rollout = self.config.rollout
        return sample(
            student,
            teacher,
            [self.examples[i].prompt for i in numbers],
            max_new_tokens=rollout.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            alpha=alpha,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            uniforms=uniforms,
            vocab_size=self.vocab_size,
            row_length=self.row_length,
        )

    def roll_out(self, iteration: int, chosen: list[int], alpha: float) -> Rollout:
        """Samples for these examples, shared out over the processes and known to all of them afterwards."""
        seed = self.run.seed * 1_000_003 + iteration
        uniforms = draw_uniforms(seed, self.config.rollout.max_new_tokens, len(chosen))
        mine = uniforms[:, self.accelerator.process_index :: self.accelerator.num_processes]
        teacher = self.teacher if alpha > 0 or self.config.method == "minillm" else None
        with self.clock("rollout"), self.accelerator.autocast():
            return gather(self.sample(self.student, teacher, self.mine(chosen), mine, alpha), self.accelerator)

    @torch.no_grad()
    def score(self, batch: Batch) -> Output:
        """The teacher's output on a batch."""
        assert self.teacher is not None
        with self.clock("score"):
            return self.teacher.output(batch)


def chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
