"""Answers against reference answers: ROUGE-L (google rouge_score, Porter stemmer, F-measure × 100) and exact match,
the best over the references of each prompt."""

import re
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from minillm.evaluate.means import Estimate
from minillm.model.head import CausalLM
from minillm.model.sampling import sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

References = Sequence[Sequence[str]]
"""Right answers of each prompt."""


def greedy_answers(
    model: CausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """The most likely token at every step, decoded without special tokens."""
    return decode(tokenizer, greedy(model, prompts, max_new_tokens, batch_size, tokenizer.eos_token_id))


def greedy(
    model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, eos_token_id: int
) -> list[list[int]]:
    """The same as token ids, end-of-sequence included where it was reached."""
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        answers += sample(
            model,
            None,
            prompts[start : start + batch_size],
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            alpha=0.0,
            temperature=0.0,
        ).responses()
    return answers


def decode(tokenizer: "PreTrainedTokenizerBase", token_ids: list[list[int]]) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(token_ids, skip_special_tokens=True)]


def rouge_l(answers: Sequence[str], references: References) -> Estimate:
    """Mean over prompts, 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return _best(answers, references, lambda answer, reference: scorer.score(reference, answer)["rougeL"].fmeasure)


def exact_match(answers: Sequence[str], references: References) -> Estimate:
    """Share of answers that are a reference, in percent, after SQuAD's normalisation."""
    return _best(answers, references, lambda answer, reference: float(normalize(answer) == normalize(reference)))


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _best(answers: Sequence[str], references: References, score: Callable[[str, str], float]) -> Estimate:
    scores = [100 * max(score(a, r) for r in given) for a, given in zip(answers, references, strict=True)]
    return Estimate(torch.tensor(scores, dtype=torch.float64), torch.ones(len(scores), dtype=torch.float64))
