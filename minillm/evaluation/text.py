"""Responses as text: ROUGE-L (google rouge_score, Porter stemmer, F-measure × 100) and exact match against the best of
the references of each prompt, also by the length of the reference; and diversity, distinct-n.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import torch

from minillm.evaluation.means import Mean

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, kana and Chinese characters: written without spaces between words."""
References = Sequence[Sequence[str]]
"""The texts that each response is scored against, one or more per prompt."""
BUCKETS = {"<=5": (0, 5), "6-10": (6, 10), ">=11": (11, None)}
"""The paper's buckets of prompts: tokens of the reference, end-of-sequence not counted."""


def rouge_l(responses: Sequence[str], references: References) -> Mean:
    """Mean over prompts, 0 to 100.

    Words of the letters a to z and of digits are those of rouge_score, stemmed. It knows no others, and would score
    two equal texts in another script as 0: here words of other letters count as they are, and in scripts that are
    written without spaces every character is a word.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return _best(responses, references, lambda text, reference: scorer.score(reference, text)["rougeL"].fmeasure)


def exact_match(responses: Sequence[str], references: References) -> Mean:
    """Share of responses that equal a reference after SQuAD's normalisation, in percent."""
    return _best(responses, references, lambda text, reference: float(normalize(text) == normalize(reference)))


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words (split at white space, lower case) over all n-grams of all texts, in percent (Li et
    al., 2016).

    It falls with the amount of text: compare equal numbers of prompts and similar lengths. NaN if no text has n words.
    """
    words = [text.lower().split() for text in texts]
    grams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return 100 * len(set(grams)) / len(grams) if grams else float("nan")


def bucket(length: int) -> str:
    """Name of the bucket of a reference of `length` tokens."""
    return next(name for name, (_, last) in BUCKETS.items() if last is None or length <= last)


def by_length(lengths: Sequence[int], means: Mapping[str, Mean]) -> dict[str, dict[str, Mean]]:
    """Each mean over the prompts of each bucket alone; an empty bucket has none. `lengths` are the references'."""
    names = [bucket(length) for length in lengths]
    rows = {name: [i for i, found in enumerate(names) if found == name] for name in BUCKETS}
    return {
        name: {key: Mean.of(mean.totals[at], mean.counts[at]) for key, mean in means.items() if at}
        for name, at in rows.items()
    }


class _Words:
    """A tokenizer as rouge_score calls it."""

    def tokenize(self, text: str) -> list[str]:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.tokenize import tokenize

        words: list[str] = []
        for word in re.findall(r"[^\W_]+(?:[\u0300-\u036f][^\W_]*)*", unicodedata.normalize("NFC", text.lower())):
            if word.isascii():
                words += tokenize(word, PorterStemmer())
            else:
                words += re.findall(rf"[{UNSPACED}]|[^{UNSPACED}]+", word)
        return words


def _best(responses: Sequence[str], references: References, score: Callable[[str, str], float]) -> Mean:
    scores = [100 * max(score(r, text) for text in given) for r, given in zip(responses, references, strict=True)]
    return Mean.of(torch.tensor(scores, dtype=torch.float64), torch.ones(len(scores), dtype=torch.float64))
