"""A stage in small, which the checks try, and what a check finds.

Legend: N tokens tried, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from minillm.data.examples import Batch, Example
from minillm.model.head import CausalLM, Scorer
from minillm.model.rollout import Rollout
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.parallel.shard import is_sharded
from minillm.parallel.tensor import runs_together
from minillm.teacher.stored import StoredTeacher
from minillm.train.context import Context

EXAMPLES, TOKENS = 4, 32
"""How many examples are tried, and the length of answers and samples."""


class Finding(NamedTuple):
    """What a check found. `wrong` stops a run; a `warning` does not; `skipped` says why there is nothing to check."""

    status: str
    found: str
    mend: str = ""


def judged(passes: bool, found: str, mend: str, otherwise: str = "wrong") -> Finding:
    return Finding("ok", found) if passes else Finding(otherwise, found, mend)


@dataclass(frozen=True)
class Patient:
    """A stage in small: few examples, short answers and samples, no plain text, one pass over a rollout."""

    context: Context
    whole: Context
    """The stage as it will run."""

    @classmethod
    def of(cls, context: Context) -> "Patient":
        processes, config = context.accelerator.num_processes, context.config
        size = -(-EXAMPLES // processes) * processes
        config = replace(
            config,
            data=replace(config.data, packing=False),
            loss=replace(config.loss, distill_weight=1.0, label_weight=0.0),
            objective=replace(config.objective, pt_weight=0.0),
            optim=replace(config.optim, batch_size=size, micro_batch_size=size),
            rollout=replace(
                config.rollout, batch_size=size, epochs=1, max_new_tokens=min(TOKENS, config.rollout.longest)
            ),
        )
        examples = [context.examples[i % len(context.examples)] for i in range(size)]
        return cls(replace(context, config=config, examples=examples), context)

    @property
    def lms(self) -> dict[str, Scorer]:
        both = {"student": self.context.student, "teacher": self.context.teacher}
        return {name: lm for name, lm in both.items() if lm is not None}

    @property
    def judge(self) -> Scorer:
        """The model that is believed: the teacher, or the student where there is none."""
        return self.context.teacher or self.context.student

    @property
    def local(self) -> CausalLM:
        """The same, or the student where the teacher is not in this process."""
        return self.judge if isinstance(self.judge, CausalLM) else self.context.student

    @cached_property
    def samples(self) -> Rollout:
        """The student's own, as a rollout draws them."""
        rollout = self.context.config.rollout
        with self.context.autocast():
            return self.sampled(self.context.student, rollout.longest, self.context.ends)

    def sampled(self, lm: CausalLM, tokens: int, ends: Iterable[int] = (), copies: int = 1) -> Rollout:
        """Samples of a model alone, unfiltered, at temperature 1."""
        prompts = [example.prompt for example in self.context.examples]
        uniforms = draw_uniforms(self.context.run.seed, tokens, len(prompts) * copies)
        settings = {"alpha": 0.0, "samples_per_prompt": copies, "uniforms": uniforms, "vocab_size": self.columns}
        return sample(lm, None, prompts, Decoding(tokens, tuple(ends)), **settings)  # type: ignore[arg-type]

    @cached_property
    def answers(self) -> Batch:
        """The answers of the data; the student's samples where there are none."""
        given = [e._replace(response=e.response[:TOKENS], turns=()) for e in self.context.examples]
        if not any(e.response for e in given):
            return self.batch(self.samples)
        return Batch.of([e for e in given if e.response]).to(self.context.accelerator.device)

    def tried(self, examples: list[Example]) -> list[Example]:
        """These of all processes, where they hold the teacher in parts: then all ask it the same, equally often."""
        in_parts = runs_together(self.context.teacher) or is_sharded(self.context.teacher)
        return gather_object(examples) if in_parts else examples

    def batch(self, rollout: Rollout) -> Batch:
        pairs = zip(rollout.prompts, rollout.responses(), strict=True)
        record = self.context.examples[0].record
        return Batch.of([Example(record, prompt, response) for prompt, response in pairs]).to(
            self.context.accelerator.device
        )

    @property
    def columns(self) -> int:
        """V: the columns of the heads that count."""
        return self.context.vocab_size or self.context.student.vocab_size

    @torch.no_grad()
    def logits(self, lm: Scorer, batch: Batch) -> Tensor:
        """[N, V] float64, by the model's own forward: without our reading of its head, where the model is here."""
        if lm is self.context.teacher:
            batch = batch.for_teacher
        if isinstance(lm, StoredTeacher) and lm.plan.kind == "top_k":
            return lm.law(batch).logits(self.columns).double()
        if not isinstance(lm, CausalLM):
            output = lm.output(batch)
            return output.head.logits(output.states)[:, : self.columns].double()
        with lm.own_dtype():
            return lm.model(**batch.inputs(), use_cache=False).logits[batch.predict][:, : self.columns].double()

    def rounding(self, *lms: Scorer, exact: float, half: float) -> float:
        """What log-probs of two kinds of passes may differ by, in nats."""
        dtypes = {lm.model.dtype for lm in lms if isinstance(lm, CausalLM)} | {self.context.compute_dtype}
        return half if dtypes & {torch.bfloat16, torch.float16} else exact
