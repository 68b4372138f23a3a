"""ROUGE-L of greedy answers against reference answers (google rouge_score, Porter stemmer, F-measure × 100)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from minillm.evaluate.estimate import Estimate
from minillm.rollout import sample
from minillm.vocabulary import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def greedy_answers(
    model: CausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """The most likely token at every step, decoded without special tokens."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        rollout = sample(
            model,
            None,
            prompts[start : start + batch_size],
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            alpha=0.0,
            temperature=0.0,
        )
        answers += tokenizer.batch_decode(rollout.responses(), skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> Estimate:
    """Mean over prompts, 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [100 * scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    return Estimate(torch.tensor(scores, dtype=torch.float64), torch.ones(len(scores), dtype=torch.float64))
