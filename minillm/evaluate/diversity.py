"""Diversity: distinct-n, the share of n-grams that are different ones (Li et al., 2016)."""

from collections.abc import Sequence


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words (white space apart, lower case) over all n-grams, in percent, all texts pooled.

    It falls with the amount of text: compare equal numbers of prompts and like lengths. NaN where no text has n words.
    """
    grams = [tuple(words[i : i + n]) for words in map(_words, texts) for i in range(len(words) - n + 1)]
    return 100 * len(set(grams)) / len(grams) if grams else float("nan")


def _words(text: str) -> list[str]:
    return text.lower().split()
