import pytest
import torch
from transformers import GenerationConfig

from minillm.evaluate.rouge import exact_match, greedy, normalize, rouge_l
from minillm.model.head import CausalLM


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


@torch.no_grad()
def test_greedy_is_the_argmax_whatever_the_generation_config(make_llama):
    model = make_llama(2)
    model.generation_config = GenerationConfig(no_repeat_ngram_size=1, repetition_penalty=5.0, do_sample=True)
    prompts = [[5, 6, 7], [9]]
    answers = greedy(CausalLM(model), prompts, 60, batch_size=2, eos_token_id=256)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(set(answer)) < len(answer)  # a penalty on repetition would show
        ids = list(prompt)
        for token in answer:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
