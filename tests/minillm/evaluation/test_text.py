import math

import pytest
import torch

from minillm.evaluation.means import Mean
from minillm.evaluation.text import bucket, by_length, distinct, exact_match, normalize, rouge_l


def test_rouge_l_by_hand():
    score = rouge_l(["the cat sat", "no"], [["the cats sat down"], ["no"]])
    # stems: cats → cat; the longest common subsequence has 3 words: precision 3/3, recall 3/4
    assert score.totals.tolist() == pytest.approx([100 * 2 * 1.0 * 0.75 / 1.75, 100.0])


def test_the_best_reference_counts():
    answers, references = ["a dog barks"], ["cats sleep", "the dog barks", "a dog"]
    alone = [rouge_l(answers, [[text]]).mean for text in references]
    assert rouge_l(answers, [references]).mean == max(alone) > min(alone)
    assert exact_match(["b"], [["a", "B."]]).mean == 100


def test_exact_match_forgives_case_punctuation_and_articles():
    assert normalize("The  Answer, is: 42!") == "answer is 42"
    assert normalize("another theory") == "another theory"  # articles are words, not letters
    found = exact_match(["The cat.", "42", ""], [["cat"], ["43"], ["the"]])
    assert found.totals.tolist() == [100, 0, 100]


def test_edges_of_buckets():
    assert [bucket(n) for n in (0, 5, 6, 10, 11, 400)] == ["<=5", "<=5", "6-10", "6-10", ">=11", ">=11"]


def test_each_bucket_has_its_own_mean():
    score = Mean.of(torch.tensor([10.0, 20.0, 60.0]).double(), torch.ones(3).double())
    found = by_length([3, 30, 2], {"rouge_l": score})
    assert found["<=5"]["rouge_l"].prompts == 2 and found["<=5"]["rouge_l"].mean == pytest.approx(35)
    assert found[">=11"]["rouge_l"].mean == pytest.approx(20)
    assert found["6-10"] == {}


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


@pytest.mark.parametrize(
    ("text", "partly"),
    [
        ("今天天气很好", "今天下雨"),
        ("Сегодня хорошая погода", "Сегодня дождь"),
        ("วันนี้อากาศดี", "วันนี้ฝนตก"),
        ("오늘 날씨가 좋다", "오늘 비가 온다"),
        ("اليوم الطقس جميل", "اليوم ممطر"),
        ("今日は天気がいい", "今日は雨"),
        ("आज मौसम अच्छा है", "आज बारिश है"),
    ],
)
def test_rouge_knows_other_scripts_than_latin(text, partly):
    assert rouge_l([text], [[text]]).mean == pytest.approx(100)
    assert 0 < rouge_l([partly], [[text]]).mean < 100
    assert rouge_l(["nothing of it"], [[text]]).mean == 0


def test_accents_are_letters():
    assert rouge_l(["café"], [["caf"]]).mean == 0
    assert rouge_l(["cafe\u0301"], [["café"]]).mean == pytest.approx(100)  # composed or not


def test_rouge_of_plain_english_is_that_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [
        ("The cats were running, quickly!", "A cat runs quick_ly; 3.5 times."),
        ("snake_case and don't", "snake case and do not"),
        ("A-b C/d 10,000", "a b c d 10 000"),
    ]
    for text, reference in pairs:
        expected = 100 * scorer.score(reference, text)["rougeL"].fmeasure
        assert rouge_l([text], [[reference]]).mean == pytest.approx(expected)
