"""Evaluation on held-out prompts around the stages of a run: the objective itself, reverse KL on references, ROUGE-L.

`measure.py` is the full one, of `minillm evaluate`; one file here per family of metrics.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from minillm.config.schema import DataConfig, RunConfig
from minillm.data.examples import DataError, Example, encode, read_records
from minillm.evaluate.divergence import own_samples, references
from minillm.evaluate.means import Estimate
from minillm.evaluate.rouge import greedy_answers, rouge_l
from minillm.model.head import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN, REFERENCES, ROUGE = "reverse_kl/own_samples", "reverse_kl/references", "rouge_l"


@dataclass(frozen=True)
class Evaluation:
    """Estimates by name, the greedy answers they come from, and the seconds that each took."""

    estimates: dict[str, Estimate]
    answers: list[str]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Everything, exactly: a run that is resumed pairs its evaluations with those made before."""
        estimates = {name: [values.tolist() for values in estimate] for name, estimate in self.estimates.items()}
        return {"estimates": estimates, "answers": self.answers, "seconds": self.seconds}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Evaluation":
        estimates = {
            name: Estimate(*(torch.tensor(values, dtype=torch.float64) for values in pair))
            for name, pair in tree["estimates"].items()
        }
        return cls(estimates, tree["answers"], tree["seconds"])


def evaluation_set(config: RunConfig, tokenizer: "PreTrainedTokenizerBase", seen: Sequence[str] = ()) -> list[Example]:
    """`eval.prompts` prompts (0: all) with reference answers from data.eval, chosen by eval.seed; none of them is in
    the sources `seen`, which the model was trained or validated on.

    Raises DataError when too few are left.
    """
    source = config.data.eval
    limits = DataConfig(
        max_prompt_length=config.eval.max_prompt_length,
        max_response_length=config.eval.max_reference_length,
        overlong_prompts="drop",
    )
    seen_prompts = {record.prompt for name in set(seen) for record in read_records(name)}
    examples = [
        example
        for example in encode(read_records(source), tokenizer, config.data, limits, source).examples
        if example.response and example.record.prompt not in seen_prompts
    ]
    if len(examples) < max(1, config.eval.prompts):
        raise DataError(
            f"{config.data.eval} has {len(examples)} held-out prompts of at most {config.eval.max_prompt_length} "
            f"tokens with an answer; eval.prompts asks for {config.eval.prompts or 'all'}"
        )
    return random.Random(config.eval.seed).sample(examples, config.eval.prompts or len(examples))


def evaluate(
    student: CausalLM,
    teacher: CausalLM | None,
    tokenizer: "PreTrainedTokenizerBase",
    examples: list[Example],
    config: RunConfig,
) -> Evaluation:
    """All that can be measured; the divergences need a teacher. Draws are paired across calls."""
    estimates, seconds = {}, {}

    def timed(name: str, started: float) -> None:
        seconds[name] = round(time.perf_counter() - started, 2)

    if teacher is not None:
        started = time.perf_counter()
        estimates[OWN] = own_samples(student, teacher, examples, config.eval, tokenizer.eos_token_id)
        timed(OWN, started)
        started = time.perf_counter()
        estimates[REFERENCES] = references(student, teacher, examples, config.eval)[0]
        timed(REFERENCES, started)
    started = time.perf_counter()
    prompts = [example.prompt for example in examples]
    answers = greedy_answers(student, tokenizer, prompts, config.eval.greedy_tokens, config.eval.batch_size)
    estimates[ROUGE] = rouge_l(answers, [example.record.references for example in examples])
    timed(ROUGE, started)
    return Evaluation(estimates, answers, seconds)
