"""Evaluation on held-out prompts: the objective itself, reverse KL on references, and ROUGE-L."""

import dataclasses
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minillm.config import Config
from minillm.data import DataError, Example, encode, read_records
from minillm.evaluate.divergence import own_samples, references
from minillm.evaluate.estimate import Estimate
from minillm.evaluate.rouge import greedy_answers, rouge_l
from minillm.vocabulary import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN, REFERENCES, ROUGE = "reverse_kl/own_samples", "reverse_kl/references", "rouge_l"


@dataclass(frozen=True)
class Evaluation:
    """Estimates by name, the greedy answers they come from, and the seconds that each took."""

    estimates: dict[str, Estimate]
    answers: list[str]
    seconds: dict[str, float]


def held_out(config: Config, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """`eval.prompts` prompts with reference answers from data.eval, chosen by eval.seed; none that was trained on.

    Raises DataError when too few are left.
    """
    limits = dataclasses.replace(config.data, max_prompt_length=config.eval.max_prompt_length, overlong_prompts="drop")
    trained_on = {record.prompt for record in read_records(config.data.train)} if config.data.train else set()
    examples = [
        example
        for example in encode(read_records(config.data.eval), tokenizer, limits, config.data.eval)
        if example.response and example.record.prompt not in trained_on
    ]
    if len(examples) < config.eval.prompts:
        raise DataError(
            f"{config.data.eval} has {len(examples)} held-out prompts of at most {config.eval.max_prompt_length} "
            f"tokens with an answer; eval.prompts asks for {config.eval.prompts}"
        )
    return random.Random(config.eval.seed).sample(examples, config.eval.prompts)


def evaluate(
    student: CausalLM,
    teacher: CausalLM | None,
    tokenizer: "PreTrainedTokenizerBase",
    examples: list[Example],
    config: Config,
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
        estimates[REFERENCES] = references(student, teacher, examples, config.eval)
        timed(REFERENCES, started)
    started = time.perf_counter()
    prompts = [example.prompt for example in examples]
    answers = greedy_answers(student, tokenizer, prompts, config.eval.rouge_new_tokens, config.eval.batch_size)
    estimates[ROUGE] = rouge_l(answers, [example.record.answer or "" for example in examples])
    timed(ROUGE, started)
    return Evaluation(estimates, answers, seconds)
