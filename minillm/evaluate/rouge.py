"""Answers against reference answers: ROUGE-L (google rouge_score, Porter stemmer, F-measure × 100) and exact match,
the best over the references of each prompt."""

import re
import string
from collections.abc import Callable, Sequence

import torch

from minillm.evaluate.means import Estimate

References = Sequence[Sequence[str]]
"""Right answers of each prompt."""


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
