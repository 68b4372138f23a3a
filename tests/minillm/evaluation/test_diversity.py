import math

import pytest

from minillm.evaluate.diversity import distinct


def test_distinct_by_hand():
    texts = ["a b a b", "A c"]
    assert distinct(texts, 1) == pytest.approx(100 * 3 / 6)
    assert distinct(texts, 2) == pytest.approx(100 * 3 / 4)  # ab ba ab | ac: no bigram crosses two texts
    assert distinct(texts, 4) == 100


def test_against_nltk():
    ngrams = pytest.importorskip("nltk.util").ngrams  # comes with rouge-score
    texts = ["the cat and the dog and the cat and the bird", "one", "the dog and the cat and the dog"]
    for n in (1, 2, 3, 4):
        every = [gram for text in texts for gram in ngrams(text.split(), n)]
        assert distinct(texts, n) == pytest.approx(100 * len(set(every)) / len(every))


def test_nothing_to_count():
    assert math.isnan(distinct(["too short"], 3))
